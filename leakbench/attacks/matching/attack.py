"""The attack: the search from several starts for the best match."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.attacks.batch_labels import batch_labels
from leakbench.attacks.known_draws import read_draws
from leakbench.attacks.matching.objective import SECRET_PREFIX, MatchingObjective, draw, evaluate
from leakbench.attacks.matching.problem import MatchingProblem
from leakbench.attacks.matching.sets import merged
from leakbench.attacks.matching.tensors import double
from leakbench.core.loss_curve import Curve
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients import Evaluator, plain_loss
from leakbench.gradients.evaluate import tensors_of
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns, value_and_gradient


@dataclass(frozen=True)
class GradientMatching(MatchingProblem):
    """Minimise a distance between the dummy and the observed gradient, plus total variation, over the image.

    A subclass defines ``distance`` and ``solve``; ``MatchingProblem`` has its options, and what else it may define.
    """

    held: ClassVar[int] = 5
    """How many copies of the unknowns the solver holds: for Adam two iterates, a gradient and two moments."""

    @property
    def exact(self) -> bool:
        """Whether the attack works in float64."""
        return False

    @abstractmethod
    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Minimise the objective from this start."""

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Evaluate the objective and its gradient once."""
        objective = self._objective(double(observation) if self.exact else observation, rng).with_path()
        start = self._begin(objective)
        value_and_gradient(objective, start, 0)
        return self.held * sum(value.numel() * value.element_size() for value in start.values())

    def pace(self, observation: Observation, rng: Rng) -> float | None:
        """Time one evaluation, the second one, of as many as there are steps and restarts."""
        objective = self._objective(double(observation) if self.exact else observation, rng).with_path()
        start = self._begin(objective)
        value_and_gradient(objective, start, 0)[0].sum().item()
        begun = time.perf_counter()
        value_and_gradient(objective, start, 1)[0].sum().item()
        return (time.perf_counter() - begun) * self.steps * self.restarts

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if the label cannot be had or the network cannot be differentiated twice."""
        self._objective(observation, Rng(tuple(map(str, range(observation.trials))), observation.device)).with_path()

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the best of ``restarts`` optimisations by ``judge``, for every trial."""
        used = double(observation) if self.exact else observation
        first = self._objective(used, rng).with_path()
        runs = [self._search(first)]
        for index in range(1, self.restarts):
            other = self._objective(used, rng.fork(f"restart {index}"))
            runs.append(self._search(replace(other, evaluator=first.evaluator, restart=index)))
        objective = torch.stack([torch.where(run.failed, torch.inf, run.objective) for run in runs])
        best = torch.where(torch.isnan(objective), torch.inf, objective).argmin(0)
        rows = torch.arange(len(best), device=best.device)

        def pick(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(parts))[best, rows]

        return Reconstruction(
            images=pick([run.images for run in runs]).to(observation.dtype),
            labels=pick([run.labels for run in runs]),
            objective=pick([run.objective for run in runs]),
            failed=pick([run.failed for run in runs]),
            evaluations=torch.stack([run.evaluations for run in runs]).sum(0),
            path=first.evaluator.path,
            findings={name: pick([run.findings[name] for run in runs]) for name in runs[0].findings},
            curve=_joined([run.curve for run in runs], pick),
        )

    def _objective(self, observation: Observation, rng: Rng) -> MatchingObjective:
        observation = relaxed(observation)
        model, adaptive = observation.model, observation.adaptive
        loss = plain_loss if adaptive is None or adaptive.loss is None else adaptive.loss
        matched = tuple(observation.gradient)
        if adaptive is not None and adaptive.release is not None:
            matched = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        evaluator = Evaluator(model, matched, loss, "batched")
        if observation.count == 0:
            raise Unsupported(f"{self.name} needs the number of images, which is hidden; use count=known")
        if (
            observation.labels is None
            and observation.count > 1
            and (self.labels == "analytic" or observation.counts is not None)
        ):
            observation = replace(observation, labels=batch_labels(observation))
        elif observation.labels is None and self.labels == "analytic":
            observation = replace(observation, labels=self.read_labels(observation))
        if self.repeats and observation.threat.shares == "weights":
            _check_repeated(self, observation)
        own = tensors_of(model)
        secrets = {
            secret.name: draw(secret, own[secret.name], rng, "secret", observation.dtype)
            for secret in observation.secrets
            if not (secret.fresh or secret.optimised)
        }
        return MatchingObjective(
            attack=self,
            observation=observation,
            evaluator=evaluator,
            tensors={**observation.weights, **secrets},
            rng=rng,
            draws=read_draws(observation).masks if observation.count == 1 else {},
        )

    def _search(self, objective: MatchingObjective) -> Found:
        start = self._begin(objective)
        solution = self.solve(objective, start)
        begun, _, _ = evaluate(objective, start)
        if objective.observation.sent_unit is None:
            begun = objective.cap_by_null(begun)
        match, images, logits = evaluate(objective, solution.unknowns)
        finite = solution.finite & torch.isfinite(images.flatten(1)).all(1)
        labels = objective.observation.labels
        if labels is None:
            assert logits is not None  # or ``match`` would have raised
            labels = logits.argmax(-1)
        if objective.epochs > 1:
            client, seen = objective.observation.client, objective.taken.seen(objective.observation.count)
            assert client is not None
            images = merged(images.unflatten(1, (objective.epochs, -1)), labels, seen, client.same_inputs)
        # an optimisation that ends no closer than it began has diverged, whatever it returns
        failed = ~finite | ~torch.isfinite(match) | (match >= begun)
        findings = {name: value.detach() for name, value in self.findings(solution.unknowns).items()}
        return Found(images, labels, match, failed, solution.evaluations + 2, findings, solution.curve)

    def _begin(self, objective: MatchingObjective) -> Unknowns:
        """Return the start of the optimisation, with that of the secrets that are optimised."""
        observation, rng = objective.observation, objective.rng
        start = self.start(observation, rng)
        if objective.epochs > 1:
            every = replace(observation, count=objective.epochs * observation.count)
            start["image"] = self.start(every, rng)["image"]
        model = objective.evaluator.model
        tensors, buffers = tensors_of(model), dict(model.named_buffers())
        for secret in observation.secrets:
            if secret.optimised or (self.secrets == "optimise" and secret.name in buffers):
                start[SECRET_PREFIX + secret.name] = draw(
                    secret, tensors[secret.name], rng, "secret", observation.dtype, observation.places
                )
        return start


@dataclass(frozen=True)
class Found:
    """The result of one optimisation: as Reconstruction, with nothing missing."""

    images: Tensor
    labels: Tensor
    objective: Tensor
    failed: Tensor
    evaluations: Tensor
    findings: Mapping[str, Tensor]
    curve: Curve | None


def _joined(curves: Sequence[Curve | None], pick: Callable[[Sequence[Tensor]], Tensor]) -> Curve | None:
    """Return the curve of the optimisation that was picked for each trial."""
    known = [curve for curve in curves if curve is not None]
    return replace(known[0], values=pick([curve.values for curve in known])) if len(known) == len(curves) else None


def relaxed(observation: Observation) -> Observation:
    """Return the observation with the network that an adaptive attacker relaxes, if it relaxes one."""
    adaptive = observation.adaptive
    hidden = {secret.name for secret in observation.secrets}
    if adaptive is not None and adaptive.relax is not None:
        model, optimised = adaptive.relax(observation.model, hidden)
    elif adaptive is not None and adaptive.relax_on is not None:
        shape, classes = observation.image_shape, observation.num_classes
        model, optimised = adaptive.relax_on(observation.model, hidden, shape, classes)
    else:
        return observation
    own = tensors_of(model)
    matched = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    searched = {secret.name for secret in optimised}
    kept = [secret for secret in observation.secrets if secret.name in own.keys() - searched]
    return replace(
        observation,
        model=model,
        weights={name: value for name, value in observation.weights.items() if name in own},
        gradient={name: value for name, value in observation.gradient.items() if name in matched},
        shown=observation.shown and {name: value for name, value in observation.shown.items() if name in matched},
        secrets=(*kept, *(replace(secret, optimised=True) for secret in optimised)),
    )


def _check_repeated(attack: GradientMatching, observation: Observation) -> None:
    """Raise Unsupported if an attack cannot repeat the client's steps: it has no rate, or optimises their draws."""
    if observation.threat.learning_rate is None and not attack.learns_rate:
        raise Unsupported(
            f"{attack.name} with local={attack.local} repeats the client's steps, and the learning rate is neither "
            "known nor learned; use a threat model with rate=known, dlm, or local=summed"
        )
    drawn = [secret.group for secret in observation.secrets if secret.fresh]
    if drawn and attack.secrets == "optimise" and observation.threat.local_steps > 1:
        raise Unsupported(
            f"{attack.name} optimises one value of the secret {drawn[0]!r}, and each of the client's "
            f"{observation.threat.local_steps} steps has its own; use secrets=sample, or local=summed"
        )
    if attack.local != "separate":
        return
    if observation.client is None or observation.count == 1:
        raise Unsupported(
            f"{attack.name} with local=separate has a set of images for each epoch of a client of several images whose "
            "recipe is known; use local=unrolled"
        )
    adaptive = observation.adaptive
    if adaptive is not None and (adaptive.encode is not None or adaptive.release is not None):
        raise Unsupported(
            f"{attack.name} with local=separate cannot model a defense that changes the images or simulates what is "
            "sent; use local=unrolled"
        )
