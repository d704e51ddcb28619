"""Gradient matching: search for an image whose gradient is the observed one. The engine behind most attacks.

An attack is a choice of search space, distance, prior, labels, secrets and solver; everything here acts on all trials
at once. The search space is the image itself, or whatever else an image can be rendered from.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.base import Attack
from leakbench.core.component import LATER
from leakbench.core.loss_curve import Curve
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient, Reconstruction, Secret
from leakbench.defenses.adaptive import AdaptiveAttacker
from leakbench.errors import Unsupported
from leakbench.gradients import Evaluator, choose_path, plain_loss
from leakbench.gradients.bilinear import squared_norm
from leakbench.gradients.evaluate import tensors_of
from leakbench.models.surgery import linears
from leakbench.observation import Observation
from leakbench.optim import Evaluation, Solution, Unknowns, take_rows, value_and_gradient

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SECRET = "secret:"
SMALL = 2**16
"""Gradients of up to this many values are joined; a copy of larger ones costs more than the operations it saves."""
ROUGHNESS = 0.05
"""What the absolute difference of neighbouring pixels is expected to be, in an image of [0, 1]; that of 32 photographs.

It is the scale of the Laplace law that the total variation stands for beside a likelihood.
"""
FINAL = -1
"""The evaluation at which start and end of a search are compared; what is drawn anew is the same for both."""


@dataclass(frozen=True)
class GradientMatching(Attack):
    """Minimise a distance between the dummy and the observed gradient, plus total variation, over the image.

    An attack that searches elsewhere than in the image overrides ``start`` and ``render``. What ``observation.labels``
    holds there is what the attack works with: the granted labels, those read off the gradient, or None where soft
    labels are sought.

    Attributes:
        steps: the solver's steps.
        lr: the solver's step size.
        tv: the weight of the image's total variation; beside the likelihood of strong noise it weighs what the
            posterior gives it instead.
        restarts: independent starts; the one that matches best (``judge``) is returned.
        labels: where the threat model does not grant the label: ``joint`` optimises soft labels with the image,
            ``analytic`` reads the label off the last layer's gradient.
        secrets: the defense's secrets that are not revealed: ``sample`` draws them by their law (a key once, noise at
            every evaluation, as the network itself would, or once where the solver ``compares`` evaluations);
            ``optimise`` searches for those that are inputs of the network (a key, noise), starting from such a draw,
            and samples those that are weights.
        local: where a client takes several steps before it sends its weights: ``summed`` matches one gradient, at the
            weights before, to the mean of all steps; ``unrolled`` repeats the client's steps with the dummy, by the
            learning rate that was granted or is learned.
    """

    steps: Count = 300
    lr: Positive = 1.0
    tv: NonNegative = 0.0
    restarts: Count = 1
    labels: Literal["joint", "analytic"] = "joint"
    secrets: Literal["sample", "optimise"] = "sample"
    local: Literal["summed", "unrolled"] = field(default="summed", metadata=LATER)

    per_tensor: ClassVar[bool] = False
    held: ClassVar[int] = 5
    """How many copies of the unknowns the solver holds: for Adam two iterates, a gradient and two moments."""

    @abstractmethod
    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return [T], how far each dummy gradient [T, *shape] is from the observed one.

        Both arrive packed (``pack``), as the distances of most attacks do not tell the parameters apart; an attack
        whose distance does sets ``per_tensor`` and gets them by name.
        """

    def judge(self, gradient: Gradient, observed: Mapping[str, Tensor], factor: Tensor | None) -> Tensor:
        """Return [T], by what restarts are compared, and the end of a search with its start: the distance.

        Args:
            gradient: as for ``distance``.
            observed: as for ``distance``, without the factor.
            factor: what ``factor`` returned.
        """
        return self.distance(gradient, scaled(observed, factor))

    @abstractmethod
    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Minimise the objective from this start."""

    @property
    def compares(self) -> bool:
        """Whether the solver compares evaluations, so that what is drawn at each must stay the same in a search."""
        return False

    def factor(self, unknowns: Unknowns) -> Tensor | None:
        """Return [T], what is learned that an update is multiplied by before it is matched (1 / rate); None for 1."""
        return None

    def findings(self, unknowns: Unknowns) -> Mapping[str, Tensor]:
        """Return further numbers [T] that the attack found, by name."""
        return {}

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return what the search starts from, name -> [T, *shape]: image, and label logits where labels are sought.

        Both are drawn from N(0, 1).
        """
        start = {"image": rng.normal("image", observation.image_shape).to(observation.dtype)}
        if observation.labels is None:
            start["label"] = rng.normal("label", (observation.num_classes,)).to(observation.dtype)
        return start

    def render(self, unknowns: Unknowns, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Return images [T, C, H, W], and label logits [T, K] where labels are sought; differentiable."""
        return unknowns["image"], unknowns.get("label")

    def read_labels(self, observation: Observation) -> Tensor:
        """Return the labels [T] for ``labels=analytic``: by the published rule; raises Unsupported."""
        return analytic_labels(observation)

    def prior(self, images: Tensor) -> Tensor:
        """Return [T], what is added to the distance for images [T, C, H, W]: the weighted total variation."""
        return self.tv * total_variation(images) if self.tv else images.new_zeros(len(images))

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Evaluate the objective and its gradient once."""
        objective = self._objective(observation, rng).with_path()
        start = self._begin(objective)
        value_and_gradient(objective, start, 0)
        return self.held * sum(value.numel() * value.element_size() for value in start.values())

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where the label cannot be had or the network cannot be differentiated twice."""
        self._objective(observation, Rng(tuple(map(str, range(observation.trials))), observation.device)).with_path()

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the best of ``restarts`` searches by what ``judge`` says, for every trial."""
        first = self._objective(observation, rng).with_path()
        runs = [self._search(first)]
        for index in range(1, self.restarts):
            other = self._objective(observation, rng.fork(f"restart {index}"))
            runs.append(self._search(replace(other, evaluator=first.evaluator, restart=index)))
        objective = torch.stack([torch.where(run.failed, torch.inf, run.objective) for run in runs])
        best = torch.where(torch.isnan(objective), torch.inf, objective).argmin(0)
        rows = torch.arange(len(best), device=best.device)

        def pick(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(parts))[best, rows]

        return Reconstruction(
            images=pick([run.images for run in runs]),
            labels=pick([run.labels for run in runs]),
            objective=pick([run.objective for run in runs]),
            failed=pick([run.failed for run in runs]),
            evaluations=torch.stack([run.evaluations for run in runs]).sum(0),
            path=first.evaluator.path,
            findings={name: pick([run.findings[name] for run in runs]) for name in runs[0].findings},
            curve=_joined([run.curve for run in runs], pick),
        )

    def _objective(self, observation: Observation, rng: Rng) -> MatchingObjective:
        observation = _relaxed(observation)
        model, adaptive = observation.model, observation.adaptive
        loss = plain_loss if adaptive is None or adaptive.loss is None else adaptive.loss
        evaluator = Evaluator(model, tuple(observation.gradient), loss, "batched")
        if observation.labels is None and self.labels == "analytic":
            observation = replace(observation, labels=self.read_labels(observation))
        if self.local == "unrolled" and observation.threat.shares == "weights":
            _check_unrolled(self, observation)
        own = tensors_of(model)
        secrets = {
            secret.name: _draw(secret, own[secret.name], rng, "secret", observation.dtype)
            for secret in observation.secrets
            if not (secret.fresh or secret.optimised)
        }
        return MatchingObjective(
            attack=self,
            observation=observation,
            evaluator=evaluator,
            tensors={**observation.weights, **secrets},
            rng=rng,
        )

    def _search(self, objective: MatchingObjective) -> _Run:
        start = self._begin(objective)
        solution = self.solve(objective, start)
        begun, _, _ = _look(objective, start)
        if objective.observation.threat.unit is None:
            begun = objective.no_more_than_nothing(begun)
        match, images, logits = _look(objective, solution.unknowns)
        finite = solution.finite & torch.isfinite(images.flatten(1)).all(1)
        labels = objective.labels
        if labels is None:
            assert logits is not None  # or ``match`` would have raised
            labels = logits.argmax(1)
        # a search that ends no closer than it began has diverged, whatever it returns
        failed = ~finite | ~torch.isfinite(match) | (match >= begun)
        findings = {name: value.detach() for name, value in self.findings(solution.unknowns).items()}
        return _Run(images, labels, match, failed, solution.evaluations + 2, findings, solution.curve)

    def _begin(self, objective: MatchingObjective) -> Unknowns:
        """Return the start of the search, secrets that are sought included."""
        observation, rng = objective.observation, objective.rng
        start = self.start(observation, rng)
        buffers = dict(objective.evaluator.model.named_buffers())
        for secret in observation.secrets:
            if secret.optimised or (self.secrets == "optimise" and secret.name in buffers):
                start[SECRET + secret.name] = _draw(secret, buffers[secret.name], rng, "secret", observation.dtype)
        return start


@dataclass(frozen=True)
class _Run:
    """One search: see Reconstruction, with nothing missing."""

    images: Tensor
    labels: Tensor
    objective: Tensor
    failed: Tensor
    evaluations: Tensor
    findings: Mapping[str, Tensor]
    curve: Curve | None


def _joined(curves: Sequence[Curve | None], pick: Callable[[Sequence[Tensor]], Tensor]) -> Curve | None:
    """Return the curve of the search that was picked for each trial."""
    known = [curve for curve in curves if curve is not None]
    return replace(known[0], values=pick([curve.values for curve in known])) if len(known) == len(curves) else None


@dataclass(frozen=True)
class MatchingObjective:
    """The matching objective of T trials, a function of the attack's unknowns and of the secrets that it seeks.

    Attributes:
        attack: whose search space, distance and prior are used.
        observation: what was seen, with the labels where these are granted or were read off the gradient.
        evaluator: how dummy gradients are computed.
        tensors: every tensor of the network that is fixed: public weights, revealed and sampled secrets.
        rng: what is drawn anew at each evaluation (noise, the masks of dropout) comes from.
        restart: which of the attack's ``restarts`` this is, from 0 on.
    """

    attack: GradientMatching
    observation: Observation
    evaluator: Evaluator
    tensors: Mapping[str, Tensor]
    rng: Rng
    restart: int = 0

    @property
    def labels(self) -> Tensor | None:
        """[T] int64, or None where soft labels are sought."""
        return self.observation.labels

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [T], the matching distance plus the prior."""
        images, logits = self.render(unknowns)
        return self._distance(images, logits, unknowns, evaluation) + self.attack.prior(images)

    def match(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [T], how well these unknowns match (``judge``); infinite for a negative rate.

        Without the prior, unless they match by a likelihood, which means nothing without it: where noise is strong, the
        image that it fits best is noise.
        """
        images, logits = self.render(unknowns)
        match = self._distance(images, logits, unknowns, evaluation, judge=True)
        if self._of_nothing is not None:
            match = match + self.attack.prior(images)
        factor = self.attack.factor(unknowns)
        return match if factor is None else torch.where(factor > 0, match, torch.inf)

    def render(self, unknowns: Unknowns) -> tuple[Tensor, Tensor | None]:
        """Return the images [T, C, H, W] of these unknowns, and the label logits [T, K] where labels are sought."""
        return self.attack.render(unknowns, self.observation)

    def no_more_than_nothing(self, match: Tensor) -> Tensor:
        """Return ``match`` [T], or what a gradient of zeros is at where that is less and a likelihood is gone by.

        A rate that is learned can make any gradient an update of zero.
        """
        likelihood = self._of_nothing
        return match if likelihood is None else torch.minimum(match, likelihood / self._unlikely)

    def _distance(
        self, images: Tensor, logits: Tensor | None, unknowns: Unknowns, evaluation: Evaluation, judge: bool = False
    ) -> Tensor:
        gradient = self._masked(self.dummy(images, self._labels(logits), unknowns, evaluation))
        factor, adaptive = self.attack.factor(unknowns), self.observation.adaptive
        if adaptive is not None and adaptive.models_release:
            unit = self._unit(factor)
            gradient = self._released(adaptive, scaled(gradient, unit))
            if adaptive.likelihood is not None:
                return adaptive.likelihood(gradient, self._sent, self.observation.weights) / self._unlikely
            gradient = scaled(gradient, 1 / unit)
        observed: Mapping[str, Tensor] = self.observation.gradient
        if not self.attack.per_tensor:
            gradient, observed = pack(gradient), self._packed
        if judge:
            return self.attack.judge(gradient, observed, factor)
        return self.attack.distance(gradient, scaled(observed, factor))

    def ratio(self, unknowns: Unknowns) -> Tensor:
        """Return [T], |g'| / |g| for the dummy and the observed gradient."""
        found = []
        for some, own in self.parts(unknowns):
            images, logits = some.render(own)
            with torch.no_grad():
                labels = some._labels(logits)
                gradient = some._masked(some._gradient(some._filled(own, 0), images, labels, 0))
            observed = some.observation.gradient
            sizes = [torch.stack([squared_norm(x[name]) for name in observed]).sum(0) for x in (gradient, observed)]
            found.append((sizes[0] / sizes[1]).sqrt())
        return torch.cat(found)

    def parts(self, unknowns: Unknowns) -> Iterator[tuple[MatchingObjective, Unknowns]]:
        """Yield the objective and the unknowns of as many trials at a time as fit."""
        trials = self.observation.trials
        size = self.observation.slots or trials
        for begin in range(0, trials, size):
            part = range(begin, min(begin + size, trials))
            some = self if size >= trials else self.select(part)
            yield some, {name: value[begin : part.stop].detach() for name, value in unknowns.items()}

    def _labels(self, logits: Tensor | None) -> Tensor:
        """Return the labels [T], or class probabilities [T, K], of the dummy gradient."""
        if self.observation.targets is not None:
            return self.observation.targets
        if self.labels is not None:
            return self.labels
        assert logits is not None, "an attack that seeks labels renders their logits"
        return torch.softmax(logits, 1)

    def _masked(self, gradient: Gradient) -> Gradient:
        """Return the dummy gradient, with zeros where nothing is known of the observed one."""
        shown = self.observation.shown
        if shown is None:
            return gradient
        return {name: torch.where(shown[name], value, 0.0) for name, value in gradient.items()}

    def _unit(self, factor: Tensor | None) -> Tensor | float:
        """Return what the mean gradient is multiplied by to be what was sent, with a rate that is known or learned."""
        unit = self.observation.threat.unit
        if unit is not None:
            return unit
        assert factor is not None, "an attack without a rate is not informed of what counts in units (prepare)"
        return self.observation.unit / factor

    def dummy(self, images: Tensor, labels: Tensor, unknowns: Unknowns, evaluation: Evaluation) -> Gradient:
        """Return the gradient [T, *shape] of images [T, C, H, W] and labels; under ``no_grad`` it has no graph.

        Where local steps are unrolled, the mean of their gradients.
        """
        tensors, threat = self._filled(unknowns, evaluation), self.observation.threat
        steps = threat.local_steps if self.attack.local == "unrolled" and threat.shares == "weights" else 1
        if steps == 1:
            return self._gradient(tensors, images, labels, evaluation)
        factor = self.attack.factor(unknowns)
        trained = tuple(name for name, parameter in self.evaluator.model.named_parameters() if parameter.requires_grad)
        every = replace(self, evaluator=replace(self.evaluator, names=trained))
        total: Gradient = {}
        for step in range(steps):
            if step:
                tensors = tensors | self._fresh(unknowns, evaluation, step)
            gradient = every._gradient(tensors, images, labels, evaluation, step)
            total = {name: total[name] + gradient[name] if total else gradient[name] for name in self.evaluator.names}
            move = scaled(gradient, threat.learning_rate if factor is None else 1 / factor)
            tensors = tensors | {name: tensors[name] - move[name] for name in trained}
        return {name: value / steps for name, value in total.items()}

    def _gradient(
        self, tensors: Mapping[str, Tensor], images: Tensor, labels: Tensor, evaluation: Evaluation, step: int = 0
    ) -> Gradient:
        """Return the gradient of images and labels at these tensors, in one of the local steps."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            return self.evaluator.gradient(
                tensors,
                images,
                labels,
                create_graph=differentiable,
                generators=lambda: self.rng.generators(self._purposes("layers", evaluation, step)),
            )

    def select(self, rows: Sequence[int]) -> Self:
        """Return the objective of these trials alone."""
        own = self._own
        index = torch.tensor(list(rows), device=self.observation.device)

        def take(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: take_rows(value, index) if value.ndim > own[name].ndim else value
                for name, value in tensors.items()
            }

        observation = replace(
            self.observation,
            weights=take(self.observation.weights),
            gradient=take(self.observation.gradient),
            labels=None if self.labels is None else self.labels[index],
            targets=None if self.observation.targets is None else self.observation.targets[index],
            shown=None if self.observation.shown is None else take(self.observation.shown),
        )
        return replace(
            self,
            observation=observation,
            tensors=take(self.tensors),
            rng=self.rng.select(rows),
        )

    def with_path(self) -> Self:
        """Return the objective with the evaluation path that serves its network; raises Unsupported."""
        observation = self.observation
        unknowns = {
            SECRET + secret.name: _draw(secret, self._own[secret.name], self.rng, "probe", observation.dtype)
            for secret in observation.secrets
            if secret.fresh or secret.optimised
        }
        tensors = self._filled(unknowns, 0)
        path = choose_path(self.evaluator, tensors, observation.image_shape, observation.num_classes)
        return replace(self, evaluator=replace(self.evaluator, path=path))

    def _filled(self, unknowns: Unknowns, evaluation: Evaluation) -> dict[str, Tensor]:
        """Return every tensor of the network: fixed, sought, and drawn for this evaluation."""
        names = {secret.name: SECRET + secret.name for secret in self.observation.secrets}
        sought = {name: unknowns[own] for name, own in names.items() if own in unknowns}
        return {**self.tensors, **sought, **self._fresh(unknowns, evaluation)}

    def _fresh(self, unknowns: Unknowns, evaluation: Evaluation, step: int = 0) -> dict[str, Tensor]:
        """Return what is drawn for one of the local steps of this evaluation."""
        drawn = [secret for secret in self.observation.secrets if secret.fresh and SECRET + secret.name not in unknowns]
        purposes = self._purposes("pass", evaluation, step) if drawn else []
        own, dtype = self._own, self.observation.dtype
        return {secret.name: _draw(secret, own[secret.name], self.rng, purposes, dtype) for secret in drawn}

    def _purposes(self, of: str, evaluation: Evaluation, step: int = 0) -> list[str]:
        """Return by trial what is drawn for: something in this evaluation, in one of the local steps."""
        if self.attack.compares:
            evaluation = 0
        each = [evaluation] * len(self.rng.keys) if isinstance(evaluation, int) else evaluation
        return [f"{of} {number}" + (f" step {step}" if step else "") for number in each]

    @cached_property
    def _packed(self) -> Gradient:
        return pack(self.observation.gradient)

    @cached_property
    def _sent(self) -> Mapping[str, Tensor]:
        """What was sent, in the units in which it was."""
        return scaled(self.observation.gradient, self.observation.unit)

    @cached_property
    def _unlikely(self) -> Tensor:
        """What a likelihood is divided by [T], so that it stands beside the weighted total variation.

        That is how unlikely a gradient of zeros is, as beside a relative distance; or more, where the noise is so
        strong that the total variation must weigh what it does in the posterior (maximum a posteriori): an image of N
        values and total variation v is unlikely by N v / ROUGHNESS.
        """
        unlikely, tv = self._of_nothing, self.attack.tv
        assert unlikely is not None
        least = math.prod(self.observation.image_shape) / (ROUGHNESS * tv) if tv else torch.finfo(unlikely.dtype).tiny
        return unlikely.clamp(min=least)

    @cached_property
    def _of_nothing(self) -> Tensor | None:
        """How unlikely a gradient of zeros is [T]; None where there is no likelihood."""
        adaptive = self.observation.adaptive
        if adaptive is None or adaptive.likelihood is None:
            return None
        zeros = self._released(adaptive, {name: torch.zeros_like(value) for name, value in self._sent.items()})
        return adaptive.likelihood(zeros, self._sent, self.observation.weights)

    def _released(self, adaptive: AdaptiveAttacker, gradient: Gradient) -> Gradient:
        """Return a gradient, in the units in which it is sent, as the adaptive attacker has it released."""
        if adaptive.surrogate is None:
            return gradient
        return adaptive.surrogate(gradient, self._sent, self.observation.weights)

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return tensors_of(self.evaluator.model)


def _relaxed(observation: Observation) -> Observation:
    """Return what an attack works with: of an adaptive attacker, the network that it relaxes."""
    adaptive = observation.adaptive
    if adaptive is None or adaptive.relax is None:
        return observation
    model, optimised = adaptive.relax(observation.model, {secret.name for secret in observation.secrets})
    own = tensors_of(model)
    matched = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = [secret for secret in observation.secrets if secret.name in own]
    return replace(
        observation,
        model=model,
        weights={name: value for name, value in observation.weights.items() if name in own},
        gradient={name: value for name, value in observation.gradient.items() if name in matched},
        shown=observation.shown and {name: value for name, value in observation.shown.items() if name in matched},
        secrets=(*kept, *(replace(secret, optimised=True) for secret in optimised)),
    )


def _look(objective: MatchingObjective, unknowns: Unknowns) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the matching distance [T], the images and the label logits, of as many trials at a time as fit."""
    values, images, logits = [], [], []
    for some, own in objective.parts(unknowns):
        values.append(some.match(own, FINAL).detach())
        with torch.no_grad():
            image, logit = some.render(own)
        images.append(image)
        logits += [] if logit is None else [logit]
    return torch.cat(values), torch.cat(images), torch.cat(logits) if logits else None


def _check_unrolled(attack: GradientMatching, observation: Observation) -> None:
    """Raise Unsupported where an attack cannot repeat the client's steps: it lacks their rate, or seeks their draws."""
    if observation.threat.learning_rate is None and not attack.learns_rate:
        raise Unsupported(
            f"{attack.name} with local=unrolled repeats the client's steps, and the learning rate is neither known nor "
            "learned; use a threat model with rate=known, dlm, or local=summed"
        )
    drawn = [secret.group for secret in observation.secrets if secret.fresh]
    if drawn and attack.secrets == "optimise" and observation.threat.local_steps > 1:
        raise Unsupported(
            f"{attack.name} seeks one value of the secret {drawn[0]!r}, and each of the client's "
            f"{observation.threat.local_steps} steps has its own; use secrets=sample, or local=summed"
        )


def scaled(gradient: Mapping[str, Tensor], factor: Tensor | float | None) -> Gradient:
    """Return gradients [T, *shape] times a factor, one for all or [T]; as they are for None or 1."""
    if factor is None or (isinstance(factor, float) and factor == 1.0):
        return dict(gradient)
    if not isinstance(factor, Tensor):
        return {name: value * factor for name, value in gradient.items()}
    return {name: value * factor.view(-1, *[1] * (value.ndim - 1)) for name, value in gradient.items()}


def pack(gradient: Mapping[str, Tensor]) -> Gradient:
    """Return a gradient whose small tensors are one, [T, N] under the empty name: fewer and larger operations."""
    small = [name for name in sorted(gradient) if gradient[name][0].numel() <= SMALL]
    joined = {"": torch.cat([gradient[name].reshape(len(gradient[name]), -1) for name in small], 1)} if small else {}
    return joined | {name: tensor for name, tensor in gradient.items() if name not in small}


def total_variation(x: Tensor) -> Tensor:
    """Return [T]: mean |horizontal difference| + mean |vertical difference| of [T, C, H, W] (anisotropic)."""
    across = (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


def root(squared: Tensor) -> Tensor:
    """Return the square root of [T], whose derivative at zero is taken as zero."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def double(observation: Observation) -> Observation:
    """Return the observation with its floating-point tensors in float64."""

    def exact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}

    return replace(
        observation,
        weights=exact(observation.weights),
        gradient=exact(observation.gradient),
        targets=None if observation.targets is None else observation.targets.double(),
    )


def analytic_labels(observation: Observation) -> Tensor:
    """Return [T] int64, the row of the classifier's gradient with the smallest sum (Zhao et al. 2020, iDLG, section 3).

    Exact for one image, a hard label, cross-entropy and a classifier whose inputs are not negative, because only the
    true class has a negative derivative of the loss by its logit.
    """
    gradient = _classifier_gradient(observation)
    return gradient.flatten(2).sum(2).argmin(1) if gradient.ndim > 2 else gradient.argmin(1)


def _classifier_gradient(observation: Observation) -> Tensor:
    """Return the observed gradient of the classifier's weight [T, K, D] or, where withheld, its bias [T, K].

    The classifier is the last linear layer with one output a class whose gradient is not zero: a layer that is not
    in use has none.
    """
    for name, layer in reversed(linears(observation.model).items()):
        for tensor in ("weight", "bias"):
            gradient = observation.gradient.get(f"{name}.{tensor}")
            if gradient is not None and layer.out_features == observation.num_classes and bool(gradient.any()):
                return gradient
    raise Unsupported(
        "the label cannot be read off the gradient: no gradient of a linear classifier was sent, or one of zeros; "
        "use labels=joint, or a threat model with labels=known"
    )


def _draw(secret: Secret, like: Tensor, rng: Rng, purpose: str | Sequence[str], dtype: torch.dtype) -> Tensor:
    """Return the attacker's own draws [T, *shape] of a secret, shaped like the tensor of the architecture."""
    name = secret.name
    purposes = f"{purpose} {name}" if isinstance(purpose, str) else [f"{own} {name}" for own in purpose]
    rows = [secret.law.draw(tuple(like.shape), generator) for generator in rng.generators(purposes)]
    return torch.stack(rows).to(rng.device, dtype)
