"""Gradient matching: search for an image whose gradient is the observed one. The engine behind most attacks.

An attack is a choice of distance, prior, labels, secrets and solver; everything here acts on all trials at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.base import Attack
from leakbench.errors import Unsupported
from leakbench.gradients import Evaluator, choose_path, plain_loss
from leakbench.models.surgery import linears
from leakbench.optim import Solution, Unknowns
from leakbench.rng import Rng
from leakbench.types import Gradient, Observation, Reconstruction, Secret

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

SECRET = "secret:"
FINAL = -1
"""The evaluation at which start and end of a search are compared; what is drawn anew is the same for both."""


@dataclass(frozen=True)
class GradientMatching(Attack):
    """Minimise a distance between the dummy and the observed gradient, plus total variation, over the image.

    Attributes:
        steps: the solver's steps.
        lr: the solver's step size.
        tv: the weight of the image's total variation.
        restarts: independent starts; the one with the smallest matching distance is returned.
        labels: where the threat model does not grant the label: ``joint`` optimises soft labels with the image,
            ``analytic`` reads the label off the last layer's gradient.
        secrets: the defense's secrets that are not revealed: ``sample`` draws them by their law (a key once, noise at
            every evaluation, as the network itself would); ``optimise`` searches for those that are inputs of the
            network (a key, noise), starting from such a draw, and samples those that are weights.
    """

    steps: Count = 300
    lr: Positive = 1.0
    tv: NonNegative = 0.0
    restarts: Count = 1
    labels: Literal["joint", "analytic"] = "joint"
    secrets: Literal["sample", "optimise"] = "sample"

    @abstractmethod
    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return [T], how far each dummy gradient [T, *shape] is from the observed one."""

    @abstractmethod
    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Minimise the objective from this start."""

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where the label cannot be had or the network cannot be differentiated twice."""
        objective = self._objective(observation, Rng(tuple(map(str, range(observation.trials))), observation.device))
        objective.with_path(observation)

    def __call__(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the best of ``restarts`` searches by the matching distance, for every trial."""
        path = self._objective(observation, rng).with_path(observation).evaluator.path
        runs = [
            self._search(observation, rng if index == 0 else rng.fork(f"restart {index}"), path)
            for index in range(self.restarts)
        ]
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
            path=path,
        )

    def _objective(self, observation: Observation, rng: Rng) -> MatchingObjective:
        defense = observation.defense
        model = observation.model if defense is None else defense.relax(observation.model)
        evaluator = Evaluator(
            model, tuple(observation.gradient), plain_loss if defense is None else defense.loss, "batched"
        )
        labels = observation.labels
        if labels is None and self.labels == "analytic":
            labels = analytic_labels(observation)
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        fixed = {
            secret.name: _draw(secret, own[secret.name], rng, "secret", observation.dtype)
            for secret in observation.secrets
            if not secret.fresh
        }
        return MatchingObjective(
            attack=self,
            observation=observation,
            evaluator=evaluator,
            tensors={**observation.weights, **fixed},
            labels=labels,
            rng=rng,
        )

    def _search(self, observation: Observation, rng: Rng, path: Literal["batched", "one-at-a-time"]) -> _Run:
        objective = self._objective(observation, rng)
        objective = replace(objective, evaluator=replace(objective.evaluator, path=path))
        start: Unknowns = {"image": self.start(observation, rng)}
        if objective.labels is None:
            start["label"] = rng.normal("label", (observation.num_classes,)).to(observation.dtype)
        if self.secrets == "optimise":
            buffers = dict(objective.evaluator.model.named_buffers())
            for secret in observation.secrets:
                if secret.name in buffers:
                    start[SECRET + secret.name] = _draw(secret, buffers[secret.name], rng, "secret", observation.dtype)
        solution = self.solve(objective, start)
        with torch.no_grad():
            finite = solution.finite & torch.isfinite(solution.unknowns["image"].flatten(1)).all(1)
        begun = objective.match(start, FINAL).detach()
        match = objective.match(solution.unknowns, FINAL).detach()
        labels = objective.labels if objective.labels is not None else solution.unknowns["label"].argmax(1)
        # a search that ends no closer than it began has diverged, whatever it returns
        failed = ~finite | ~torch.isfinite(match) | (match >= begun)
        return _Run(solution.unknowns["image"], labels, match, failed, solution.evaluations + 2)

    def start(self, observation: Observation, rng: Rng) -> Tensor:
        """Return the images [T, C, H, W] that the search starts from: N(0, 1)."""
        return rng.normal("image", observation.image_shape).to(observation.dtype)


@dataclass(frozen=True)
class _Run:
    """One search: see Reconstruction, with nothing missing."""

    images: Tensor
    labels: Tensor
    objective: Tensor
    failed: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class MatchingObjective:
    """The matching objective of T trials, a function of image, and of label logits and secrets where these are sought.

    Attributes:
        attack: whose distance and prior are used.
        observation: what was seen.
        evaluator: how dummy gradients are computed.
        tensors: every tensor of the network that is fixed: public weights, revealed and sampled secrets.
        labels: [T] int64, or None where soft labels are among the unknowns.
        rng: what noise that is drawn anew at each evaluation comes from.
    """

    attack: GradientMatching
    observation: Observation
    evaluator: Evaluator
    tensors: Mapping[str, Tensor]
    labels: Tensor | None
    rng: Rng

    def __call__(self, unknowns: Unknowns, evaluation: int) -> Tensor:
        """Return [T], the matching distance plus the priors."""
        value = self.match(unknowns, evaluation)
        if self.attack.tv:
            value = value + self.attack.tv * total_variation(unknowns["image"])
        return value

    def match(self, unknowns: Unknowns, evaluation: int) -> Tensor:
        """Return [T], the matching distance alone."""
        observed = self.observation.gradient
        gradient = self.dummy(unknowns, evaluation)
        if self.observation.defense is not None:
            gradient = self.observation.defense.surrogate(gradient, observed)
        return self.attack.distance(gradient, observed)

    def dummy(self, unknowns: Unknowns, evaluation: int) -> Gradient:
        """Return the gradient [T, *shape] that clients with these unknowns would have had."""
        labels = torch.softmax(unknowns["label"], 1) if self.labels is None else self.labels
        return self.evaluator.gradient(self._filled(unknowns, evaluation), unknowns["image"], labels)

    def select(self, rows: Sequence[int]) -> Self:
        """Return the objective of these trials alone."""
        own = self._own
        index = torch.tensor(list(rows), device=self.observation.device)

        def take(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index] if value.ndim > own[name].ndim else value for name, value in tensors.items()}

        observation = replace(
            self.observation, weights=take(self.observation.weights), gradient=take(self.observation.gradient)
        )
        return replace(
            self,
            observation=observation,
            tensors=take(self.tensors),
            labels=None if self.labels is None else self.labels[index],
            rng=self.rng.select(rows),
        )

    def with_path(self, observation: Observation) -> Self:
        """Return the objective with the evaluation path that serves its network; raises Unsupported."""
        unknowns = {
            SECRET + secret.name: _draw(secret, self._own[secret.name], self.rng, "probe", observation.dtype)
            for secret in observation.secrets
            if secret.fresh
        }
        tensors = self._filled(unknowns, 0)
        path = choose_path(self.evaluator, tensors, observation.image_shape, observation.num_classes)
        return replace(self, evaluator=replace(self.evaluator, path=path))

    def _filled(self, unknowns: Unknowns, evaluation: int) -> dict[str, Tensor]:
        """Return every tensor of the network: fixed, sought, and drawn for this evaluation."""
        tensors, own, dtype = dict(self.tensors), self._own, self.observation.dtype
        for secret in self.observation.secrets:
            if SECRET + secret.name in unknowns:
                tensors[secret.name] = unknowns[SECRET + secret.name]
            elif secret.fresh:
                tensors[secret.name] = _draw(secret, own[secret.name], self.rng, f"pass {evaluation}", dtype)
        return tensors

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        model = self.evaluator.model
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def total_variation(x: Tensor) -> Tensor:
    """Return [T]: mean |horizontal difference| + mean |vertical difference| of [T, C, H, W] (anisotropic)."""
    across = (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


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
        "the label cannot be read off the gradient: no gradient of a linear classifier was sent; "
        "use labels=joint, or a threat model with labels=known"
    )


def _draw(secret: Secret, like: Tensor, rng: Rng, purpose: str, dtype: torch.dtype) -> Tensor:
    """Return the attacker's own draws [T, *shape] of a secret, shaped like the tensor of the architecture."""
    rows = [secret.law.draw(tuple(like.shape), generator) for generator in rng.generators(f"{purpose} {secret.name}")]
    return torch.stack(rows).to(rng.device, dtype)
