"""Clipping of the shared gradient's norm."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.component import Positive
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.gradients.bilinear import squared_norm


@register("clip")
@dataclass(frozen=True)
class Clip(Defense):
    """Scale the gradient down to a Euclidean norm of at most ``norm``, taken over all parameters.

    g * min(1, norm / |g|_2). The direction is kept, so that the cosine distance does not change.

    Attributes:
        norm: the largest norm of what is sent, in the gradient's units.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = "Li et al. 2022, GGL, arXiv 2203.15696, section 4 (gradient clipping)"
    assumes: ClassVar[str] = "The attacker relies on the gradient's size."
    cost: ClassVar[str] = "Smaller training steps."
    fails: ClassVar[str] = (
        "Attacks whose distance ignores the size (cosine), and attackers who also clip the dummy gradient."
    )
    norm: Positive = 1.0

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the clipped gradient."""
        rows = clipped({name: value[None] for name, value in step.gradient().items()}, self.norm)
        return {name: value[0] for name, value in rows.items()}

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who also clips the dummy gradient."""
        return {"default": AdaptiveAttacker("also clips the dummy gradient", surrogate=self._clipped, batched=True)}

    def _clipped(self, gradient: Gradient, observed: Observed, weights: Weights) -> Gradient:
        return clipped(gradient, self.norm)


def clipped(gradient: Mapping[str, Tensor], norm: float) -> Gradient:
    """Return gradients scaled by min(1, norm / |g|_2), each by the norm over all its own parameters.

    Args:
        gradient: [N, *shape] by name: N gradients.
        norm: > 0.
    """
    square = torch.stack([squared_norm(value) for value in gradient.values()]).sum(0)
    # the clamp comes before the root, whose derivative at 0 is infinite
    scale = (square / norm**2).clamp(min=1).rsqrt()
    return {name: value * scale.view(-1, *[1] * (value.ndim - 1)) for name, value in gradient.items()}
