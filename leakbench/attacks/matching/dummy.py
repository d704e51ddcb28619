"""Dummy gradients: what the clients' steps would have been for images and labels of the attacker's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from leakbench.attacks.matching.problem import MatchingProblem
from leakbench.attacks.matching.tensors import scaled
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient, Secret
from leakbench.gradients import Evaluator, choose_path
from leakbench.gradients.evaluate import tensors_of
from leakbench.observation import Observation
from leakbench.optim import Evaluation, Unknowns, take_rows

SECRET_PREFIX = "secret:"
"""The beginning of the name of an unknown that is a secret."""


@dataclass(frozen=True)
class DummyGradient:
    """The gradients that clients would have had for other images and labels, of T trials.

    Attributes:
        attack: defines the unknowns, the distance and the prior.
        observation: the observation, with the labels if they are granted or were inferred from the gradient.
        evaluator: computes dummy gradients.
        tensors: every fixed tensor of the network: public weights, revealed and sampled secrets.
        rng: the source of draws at each evaluation (noise, the masks of dropout).
        restart: the index of the restart, from 0 on.
    """

    attack: MatchingProblem
    observation: Observation
    evaluator: Evaluator
    tensors: Mapping[str, Tensor]
    rng: Rng
    restart: int = 0

    @property
    def labels(self) -> Tensor | None:
        """[T] int64, or None if soft labels are optimised."""
        return self.observation.labels

    def parts(self, unknowns: Unknowns) -> Iterator[tuple[Self, Unknowns]]:
        """Yield the objective and the unknowns of as many trials at a time as fit into memory."""
        trials = self.observation.trials
        size = self.observation.slots or trials
        for begin in range(0, trials, size):
            part = range(begin, min(begin + size, trials))
            some = self if size >= trials else self.select(part)
            yield some, {name: value[begin : part.stop].detach() for name, value in unknowns.items()}

    def select(self, rows: Sequence[int]) -> Self:
        """Return the objective of only these trials."""
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
            SECRET_PREFIX + secret.name: draw(secret, self._own[secret.name], self.rng, "probe", observation.dtype)
            for secret in observation.secrets
            if secret.fresh or secret.optimised
        }
        tensors = self._filled(unknowns, 0)
        path = choose_path(self.evaluator, tensors, observation.image_shape, observation.num_classes)
        return replace(self, evaluator=replace(self.evaluator, path=path))

    def dummy(self, images: Tensor, labels: Tensor, unknowns: Unknowns, evaluation: Evaluation) -> Gradient:
        """Return the gradient [T, *shape] of images [T, C, H, W] and labels; under ``no_grad`` it has no graph.

        If local steps are unrolled, it is the mean of their gradients.
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

    def _filled(self, unknowns: Unknowns, evaluation: Evaluation) -> dict[str, Tensor]:
        """Return every tensor of the network: fixed, optimised, and drawn for this evaluation."""
        names = {secret.name: SECRET_PREFIX + secret.name for secret in self.observation.secrets}
        optimised = {name: unknowns[own] for name, own in names.items() if own in unknowns}
        return {**self.tensors, **optimised, **self._fresh(unknowns, evaluation)}

    def _fresh(self, unknowns: Unknowns, evaluation: Evaluation, step: int = 0) -> dict[str, Tensor]:
        """Return the secrets that are drawn for one of the local steps of this evaluation."""
        drawn = [
            secret
            for secret in self.observation.secrets
            if secret.fresh and SECRET_PREFIX + secret.name not in unknowns
        ]
        purposes = self._purposes("pass", evaluation, step) if drawn else []
        own, dtype = self._own, self.observation.dtype
        return {secret.name: draw(secret, own[secret.name], self.rng, purposes, dtype) for secret in drawn}

    def _purposes(self, of: str, evaluation: Evaluation, step: int = 0) -> list[str]:
        """Return the purpose of a draw by trial: the part that it is of, the evaluation, and the local step."""
        if self.attack.compares:
            evaluation = 0
        each = [evaluation] * len(self.rng.keys) if isinstance(evaluation, int) else evaluation
        return [f"{of} {number}" + (f" step {step}" if step else "") for number in each]

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return tensors_of(self.evaluator.model)


def draw(secret: Secret, like: Tensor, rng: Rng, purpose: str | Sequence[str], dtype: torch.dtype) -> Tensor:
    """Return the attacker's own draws [T, *shape] of a secret, shaped as in the architecture."""
    name = secret.name
    purposes = f"{purpose} {name}" if isinstance(purpose, str) else [f"{own} {name}" for own in purpose]
    rows = [secret.law.draw(tuple(like.shape), generator) for generator in rng.generators(purposes)]
    return torch.stack(rows).to(rng.device, dtype)
