"""LB: L-BFGS with a line search on the layer-normalised distance, the general strong optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.attacks.base import register
from leakbench.attacks.matching import Count, NonNegative, double
from leakbench.attacks.quasi_newton import QuasiNewton
from leakbench.gradients.bilinear import squared_norm
from leakbench.optim import LineSearch
from leakbench.rng import Rng
from leakbench.types import Gradient, Observation, Reconstruction

SMALLEST = 1e-4
"""A parameter whose gradient is smaller, relative to all of them, is weighted as if it were of this size.

The bias of a convolution before a normalisation has no gradient but rounding, which must not be magnified.
"""


def layer_normalised_distance(gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: the mean over parameters of |g' - g|^2 / max(|g|, SMALLEST |all of g|)^2."""
    sizes = {name: squared_norm(target) for name, target in observed.items()}
    floor = (SMALLEST**2 * torch.stack(list(sizes.values())).sum(0)).clamp(min=torch.finfo(torch.float32).tiny)
    terms = [
        squared_norm(gradient[name] - target) / torch.maximum(sizes[name], floor) for name, target in observed.items()
    ]
    return torch.stack(terms).mean(0)


@register("lb")
@dataclass(frozen=True)
class LB(QuasiNewton):
    """L-BFGS with a line search, in float64, on the layer-normalised distance plus total variation.

    Every parameter's gradient counts alike, whatever its size. An attack that fails by its optimiser says nothing about
    a defense; this one is to fail by the defense. See QuasiNewton and GradientMatching for the options.
    """

    reference: ClassVar[str] = "Liu and Nocedal 1989, Math. Programming 45 (the optimiser); the objective is our own"
    assumes: ClassVar[str] = "A network that can be differentiated twice; works in float64."
    cost: ClassVar[str] = "Up to 25 evaluations a step with the line search, each at twice the cost of float32."
    fails: ClassVar[str] = "Local minima: several starts help; noise and pruning, unless informed of them."
    per_tensor: ClassVar[bool] = True
    tolerance_grad: ClassVar[float] = 1e-12
    tolerance_change: ClassVar[float] = 1e-16

    steps: Count = 60
    tv: NonNegative = 1e-6
    labels: Literal["joint", "analytic"] = "analytic"
    line_search: LineSearch = "strong-wolfe"

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the layer-normalised distance."""
        return layer_normalised_distance(gradient, observed)

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Evaluate the objective and its gradient once, in float64."""
        return super().probe(double(observation), rng)

    def __call__(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the best of ``restarts`` searches by the matching distance, for every trial."""
        found = super().__call__(double(observation), rng)
        return replace(found, images=found.images.to(observation.dtype))
