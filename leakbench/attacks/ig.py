"""Inverting Gradients: signed Adam on one global cosine distance plus total variation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.attacks.adam import AdamSearch, adam
from leakbench.attacks.base import register
from leakbench.attacks.matching import Count, MatchingObjective, NonNegative
from leakbench.core.types import Gradient
from leakbench.gradients.bilinear import FromProducts, squared_norm
from leakbench.optim import Solution, Unknowns


def cosine_distance(gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: 1 - <g', g> / (|g'| |g|), with inner product and norms over all parameters together."""
    return cosine_from(observed)(gradient)


def cosine_from(observed: Mapping[str, Tensor]) -> FromProducts:
    """Return ``cosine_distance`` from an observed gradient, whose norm is computed once."""
    other = torch.stack([squared_norm(target) for target in observed.values()]).sum(0).sqrt()

    def distance(dots: Tensor, squares: Tensor) -> Tensor:
        return 1 - dots.sum(0) / (squares.sum(0).sqrt() * other)

    def derived(dots: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        square = squares.sum(0)
        by_dot = -1 / (square.sqrt() * other)
        less = by_dot * dots.sum(0)  # the cosine, negative
        return 1 + less, by_dot, -0.5 * less / square

    return FromProducts(observed, distance, derived)


@register("ig")
@dataclass(frozen=True)
class IG(AdamSearch):
    """Inverting Gradients: signed Adam over an image in [0, 1], which minimises cosine distance plus total variation.

    The step size falls tenfold after 3/8, 5/8 and 7/8 of the steps. See GradientMatching for the options.

    Attributes:
        boxed: project the image to [0, 1] after every step.
        signed: update by the sign of the gradient; unsigned Adam otherwise.
    """

    reference: ClassVar[str] = "Geiping et al. 2020, Inverting Gradients, NeurIPS, equation 4 (and released code)"
    assumes: ClassVar[str] = "A hard label, inferred from the last layer; a network in the mode that the client used."
    cost: ClassVar[str] = "One evaluation a step: 4,000 by default."
    fails: ClassVar[str] = (
        "The cosine distance ignores the gradient's size; untrained ReLU networks and small budgets "
        "leave blurred images; noise."
    )
    steps: Count = 4000
    tv: NonNegative = 1e-4
    boxed: bool = True
    signed: bool = True

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the cosine distance."""
        return cosine_distance(gradient, observed)

    def distance_from(self, observed: Mapping[str, Tensor]) -> Callable[[Gradient], Tensor]:
        """Return the cosine distance, with the observed norm computed once."""
        return cosine_from(observed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run Adam."""
        return adam(objective, start, self.steps, self.lr, signed=self.signed, boxed=self.boxed)
