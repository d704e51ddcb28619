"""LB: L-BFGS with a line search on the layer-normalised distance, the general strong optimiser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.attacks.base import register
from leakbench.attacks.batch_labels import classifiers
from leakbench.attacks.ig import cosine_distance, cosine_from
from leakbench.attacks.matching import Count, NonNegative
from leakbench.attacks.matching.problem import SIGN_LOSSES
from leakbench.attacks.quasi_newton import QuasiNewton
from leakbench.core.component import LATER
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient
from leakbench.gradients.bilinear import FromGaps, squared_norm
from leakbench.gradients.losses import head_of
from leakbench.observation import Observation
from leakbench.optim import LineSearch, Unknowns

MIN_RELATIVE_SIZE = 1e-4
"""A parameter whose gradient is smaller, relative to the largest, is weighted as if it were of this size.

The bias of a convolution before a normalisation has no gradient but rounding, which must not be magnified.
"""


def layer_normalised_distance(gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: the sum over parameters of |g' - g|^2 / s, over the sum of |g|^2 / s, with s = |g|.

    Between the squared distance (s = 1), in which the largest parameters are all that counts, and relative errors
    (s = |g|^2), in which the smallest count as much. A gradient of zeros is at 1.
    """
    return layer_normalised_from(observed)(gradient)


def layer_normalised_from(observed: Mapping[str, Tensor]) -> FromGaps:
    """Return ``layer_normalised_distance`` from an observed gradient, with its sizes and weights computed once."""
    squares = torch.stack([squared_norm(target) for target in observed.values()])
    sizes, tiny = squares.sqrt(), torch.finfo(torch.float32).tiny
    weights = 1 / torch.maximum(sizes, (MIN_RELATIVE_SIZE * sizes.amax(0)).clamp(min=tiny))
    whole = (weights * squares).sum(0).clamp(min=tiny)

    return FromGaps(observed, lambda squares: (weights * squares).sum(0) / whole)


def rank_one_labels(observation: Observation) -> Tensor | None:
    """Return [T] int64: the class whose logit the loss falls with; None where weight or bias of no classifier was sent.

    For one image the gradient of the classifier's weight and bias is d (f, 1)^T, with d the derivative of the loss by
    the logits and f the features. The leading left singular vector of what was sent gives d up to its sign, and the
    bias the sign. Unlike the rule of iDLG this asks nothing of the sign of f, and noise averages out over the rows.
    """
    head = head_of(observation.model)
    if head.single or head.loss not in SIGN_LOSSES:
        return None
    for name in classifiers(observation, observation.num_classes):
        weight, bias = (observation.gradient.get(f"{name}.{tensor}") for tensor in ("weight", "bias"))
        if weight is None or bias is None or not bool(bias.any()):
            continue
        rows = torch.cat([weight, bias[..., None]], 2).nan_to_num().double()
        error = torch.linalg.eigh(rows @ rows.mT).eigenvectors[..., -1]
        return (error * (error * bias).sum(1, keepdim=True)).argmin(1)
    return None


@register("lb")
@dataclass(frozen=True)
class LB(QuasiNewton):
    """L-BFGS with a line search, in float64, on the layer-normalised distance plus total variation, from grey.

    An attack that fails by its optimiser says nothing about a defense; this one is to fail by the defense. A step is
    one evaluation of the gradient, as for ``ig``: however many of them a line search takes, the budget is ``steps``.
    See QuasiNewton and GradientMatching for the other options.

    Attributes:
        spread: the deviation of the start around grey; far from grey, saturated activations hide the image.
        matching: the distance: ``layers`` is normalised for each layer, ``cosine`` is that of IG, for ReLU networks,
            with which a solver other than L-BFGS works in float32.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "Liu and Nocedal 1989, Math. Programming 45 (the optimiser); the objective is our own"
    assumes: ClassVar[str] = "A network that can be differentiated twice; works in float64."
    cost: ClassVar[str] = "Up to 25 evaluations a step with the line search, each at twice the cost of float32."
    fails: ClassVar[str] = "Local minima: several starts help; noise and pruning, unless the attacker is adaptive."
    per_tensor: ClassVar[bool] = True
    tolerance_grad: ClassVar[float] = 1e-12
    tolerance_change: ClassVar[float] = 1e-16

    steps: Count = 1200
    tv: NonNegative = 1e-3
    labels: Literal["joint", "analytic"] = "analytic"
    line_search: LineSearch = "strong-wolfe"
    spread: NonNegative = 0.01
    matching: Literal["layers", "cosine"] = field(default="layers", metadata=LATER)

    @property
    def exact(self) -> bool:
        """Whether it works in float64: but for a first-order solver on the cosine distance, always."""
        return self.solver == "lbfgs" or self.matching == "layers"

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of ``matching``."""
        return (cosine_distance if self.matching == "cosine" else layer_normalised_distance)(gradient, observed)

    def distance_from(self, observed: Mapping[str, Tensor]) -> Callable[[Gradient], Tensor]:
        """Return the distance of ``matching``, whose weights are computed once."""
        return (cosine_from if self.matching == "cosine" else layer_normalised_from)(observed)

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return an image from N(0.5, spread^2), and label logits from N(0, 1) if labels are optimised."""
        start = super().start(observation, rng)
        return start | {"image": 0.5 + self.spread * start["image"]}

    def read_labels(self, observation: Observation) -> Tensor:
        """Return the labels [T] by ``rank_one_labels``, or else by the published rule."""
        found = rank_one_labels(observation)
        return super().read_labels(observation) if found is None else found

    def budget(self) -> int:
        """Return ``steps``."""
        return self.steps
