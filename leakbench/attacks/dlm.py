"""DLM and DLM+: leakage from the weights before and after local training of unknown learning rate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.base import register
from leakbench.attacks.matching import Count, MatchingObjective, root, scaled
from leakbench.attacks.quasi_newton import QuasiNewton
from leakbench.core.types import Gradient
from leakbench.gradients.bilinear import squared_distance, squared_norm
from leakbench.optim import Unknowns

SCALE = "scale"
"""The unknown that the update is multiplied by, or its logarithm."""

Factor = Annotated[float, Field(ge=1e-12, le=1e12)]
"""A factor that stays finite in float32 whatever it is multiplied by here."""


@dataclass(frozen=True)
class Updates(QuasiNewton):
    """Matching of an update of unknown learning rate; see QuasiNewton and GradientMatching for the options.

    The released code takes L-BFGS, and for fully connected networks 5000 steps of Adam at lr 0.1 (DLM) or 0.01 (DLM+).
    """

    updates: ClassVar[bool] = True
    tolerance_grad: ClassVar[float] = 1e-9
    tolerance_change: ClassVar[float] = 1e-12
    steps: Count = 200


@register("dlm")
@dataclass(frozen=True)
class DLM(Updates):
    """Deep Leakage from Model: matches the dummy gradient to the update times a scale k, which is learned.

    |g' - k u|^2 over image, soft label and k, for the update u of one local step (the mean of several); k is 1 /
    learning rate where it matches. If soft labels are optimised, others with a smaller gradient of the same direction
    match too, with a smaller k. Starts of k are compared, and a search's end with its start, by 1 - cos(g', u), in
    which k has no part: neither a small nor a large k wins by itself. An adaptive attacker also uses k as the rate that
    turns a dummy gradient into the update that a defense acts on. See Updates, QuasiNewton and GradientMatching for the
    other options.

    Attributes:
        scale: ``log`` learns log k, and has the distance relative to |k u|^2, so that neither k nor the gradient can
            collapse to zero; ``plain`` is the released code's k itself.
        k0: the middle of the first ks; none: |g'| / |u| at the start.
        spread: the first k of each of the ``restarts`` is k0 times a power of this, with exponents from -1 to 1 at
            equal distances, or 0 for a single one. The released code's 60 to 240, at a rate of 0.01, is k0=120,
            spread=2.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Zhao et al. 2022, Deep Leakage from Model in Federated Learning, arXiv 2206.04887 (code)"
    )
    version: ClassVar[int] = 2  # 2: the starts of k, and how they are compared
    assumes: ClassVar[str] = (
        "A network that can be differentiated twice; the weights before and after local training of one image."
    )
    cost: ClassVar[str] = "As dlg, once for every starting value of k."
    fails: ClassVar[str] = (
        "Several local steps, which are matched by their mean; clipped or sparsified weights, unless the attacker is "
        "adaptive; noise stronger than the update."
    )
    learns_rate: ClassVar[bool] = True
    restarts: Count = 3
    scale: Literal["log", "plain"] = "log"
    k0: Factor | None = None
    spread: Factor = 4.0

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance, relative to the scaled update for ``log``."""
        distance = squared_distance(gradient, observed)
        if self.scale == "plain":
            return distance
        return distance / torch.stack([squared_norm(value) for value in observed.values()]).sum(0)

    def judge(self, gradient: Gradient, observed: Mapping[str, Tensor], factor: Tensor | None) -> Tensor:
        """Return 1 - cos(g', u), as half the squared distance of the two at length 1, exact near 0; 1 for zeros."""
        sizes = [torch.stack([squared_norm(value) for value in x.values()]).sum(0) for x in (gradient, observed)]
        own, other = (scaled(x, 1 / root(size)) for x, size in zip((gradient, observed), sizes))
        return torch.where((sizes[0] > 0) & (sizes[1] > 0), squared_distance(own, other) / 2, 1.0)

    def factor(self, unknowns: Unknowns) -> Tensor | None:
        """Return k [T]."""
        value = unknowns[SCALE][:, 0]
        return value.exp() if self.scale == "log" else value

    def findings(self, unknowns: Unknowns) -> Mapping[str, Tensor]:
        """Return k."""
        factor = self.factor(unknowns)
        assert factor is not None
        return {SCALE: factor}

    def _begin(self, objective: MatchingObjective) -> Unknowns:
        """Return the start of the search, k included."""
        start = super()._begin(objective)
        exponent = 2 * objective.restart / (self.restarts - 1) - 1 if self.restarts > 1 else 0.0
        k = torch.full_like(start["image"].flatten(1)[:, 0], self.k0) if self.k0 else objective.ratio(start)
        k = k * self.spread**exponent
        return start | {SCALE: (k.log() if self.scale == "log" else k)[:, None]}


@register("dlm+")
@dataclass(frozen=True)
class DLMPlus(Updates):
    """DLM+: matches the normalised dummy gradient to the normalised update; the learning rate does not matter.

    With n(u) = mean_l |u_l| over the parameter tensors l: sum_l |g'_l / n(g') - u_l / n(u)|^2 over the image, and the
    label inferred from the update (the released code is given it). See Updates, QuasiNewton and GradientMatching for
    the other options.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Zhao et al. 2022, Deep Leakage from Model in Federated Learning, arXiv 2206.04887 (code)"
    )
    assumes: ClassVar[str] = (
        "A network that can be differentiated twice; the weights before and after local training of one image; and a "
        "hard label with a classifier whose inputs are not negative, from which the label is inferred."
    )
    cost: ClassVar[str] = "As dlg."
    fails: ClassVar[str] = (
        "Several local steps, which are matched by their mean; without the learning rate, clipping and noise of a "
        "given size cannot be modelled."
    )
    per_tensor: ClassVar[bool] = True
    labels: Literal["joint", "analytic"] = "analytic"

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance after both are divided by their mean norm."""
        return self.distance_from(observed)(gradient)

    def distance_from(self, observed: Mapping[str, Tensor]) -> Callable[[Gradient], Tensor]:
        """Return the distance from an update, which is normalised once."""
        other = normalised(observed, observed)
        return lambda gradient: squared_distance(normalised(gradient, other), other)


def normalised(gradient: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> Gradient:
    """Return gradients [T, *shape] of these names, divided by the mean over the names of their Euclidean norms."""
    norm = torch.stack([root(squared_norm(gradient[name])) for name in names]).mean(0)
    return {name: gradient[name] / norm.view(-1, *[1] * (gradient[name].ndim - 1)) for name in names}
