"""Nearest public image: what an attacker that only remembers images would return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.attacks.base import register
from leakbench.attacks.ig import cosine_distance
from leakbench.attacks.matching import GradientMatching, MatchingObjective
from leakbench.attacks.matching.objective import evaluate
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient
from leakbench.datasets.samples import crops
from leakbench.errors import Unsupported
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns
from leakbench.optim.base import where_rows

CERTAIN = 30.0
"""The logit by which a tried label has a probability of 1."""


@register("nearest-public")
@dataclass(frozen=True)
class NearestPublic(GradientMatching):
    """Control: of the 64 images that ship with leakbench, the one whose gradient is nearest to the observed one.

    It reconstructs nothing. On ``samples`` the private image is one of the 64, and the control shows how little of a
    gradient an attack needs that has memorised the images. On other datasets it shows what the nearest of 64 foreign
    images scores. Nearest is by cosine distance over all parameters. If the label is neither granted nor inferred from
    the last layer's gradient, every class is tried: what noise hides first is the label, and a wrong label hides the
    image. See GradientMatching for ``secrets``.
    """

    reference: ClassVar[str] = "a control by definition; the distance of Geiping et al. 2020, arXiv 2003.14053"
    assumes: ClassVar[str] = "That the private image is public."
    cost: ClassVar[str] = "64 gradients, and as many for each class if the label cannot be inferred."
    fails: ClassVar[str] = "It returns one of 64 images, whatever was sent."
    is_control: ClassVar[bool] = True
    steps: ClassVar[int] = 1  # type: ignore[misc]  # nothing is optimised, so four options have no effect
    lr: ClassVar[float] = 1.0  # type: ignore[misc]
    tv: ClassVar[float] = 0.0  # type: ignore[misc]
    restarts: ClassVar[int] = 1  # type: ignore[misc]

    labels: Literal["joint", "analytic"] = "analytic"

    @property
    def compares(self) -> bool:
        """Whether evaluations are compared: all use the same draws."""
        return True

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the cosine distance."""
        return cosine_distance(gradient, observed)

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return grey images, and equal label logits if the label is not known."""
        like = observation.mean_image.new_zeros(observation.trials).to(observation.device, observation.dtype)
        start = {"image": like.new_full((observation.trials, *observation.image_shape), 0.5)}
        if observation.labels is None:
            start["label"] = like.new_zeros(observation.trials, observation.num_classes)
        return start

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Return the public image, and the label if it is not known, with the smallest distance."""
        image = start["image"]
        best, nearest = start, torch.full_like(image[:, 0, 0, 0], torch.inf)
        candidates = crops(objective.observation.image_shape).to(image)
        classes = start["label"].shape[1] if "label" in start else 1
        for one in candidates:
            for label in range(classes):
                tried = {**start, "image": one.expand_as(image)}
                if "label" in start:
                    tried["label"] = torch.zeros_like(start["label"])
                    tried["label"][:, label] = CERTAIN
                with torch.no_grad():
                    distance = evaluate(objective, tried)[0]
                nearer = distance < nearest
                nearest = torch.where(nearer, distance, nearest)
                best = {name: where_rows(nearer, tried[name], best[name]) for name in best}
        evaluations = torch.full_like(nearest, len(candidates) * classes, dtype=torch.int64)
        return Solution(best, nearest, torch.isfinite(nearest), evaluations)

    def _objective(self, observation: Observation, rng: Rng) -> MatchingObjective:
        try:
            return super()._objective(observation, rng)
        except Unsupported:
            if self.labels == "joint":
                raise
            return replace(self, labels="joint")._objective(observation, rng)
