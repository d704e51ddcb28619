"""DLG and iDLG: L-BFGS on the squared distance between gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.attacks.base import register
from leakbench.attacks.matching import Count, GradientMatching, MatchingObjective, NonNegative, Positive
from leakbench.gradients.bilinear import squared_norm
from leakbench.optim import Solution, Unknowns, lbfgs
from leakbench.types import Gradient


def squared_distance(gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: the sum over parameters of |g' - g|^2; the difference is taken first, so that it stays exact."""
    return torch.stack([squared_norm(gradient[name] - target) for name, target in observed.items()]).sum(0)


@register("dlg")
@dataclass(frozen=True)
class DLG(GradientMatching):
    """Deep Leakage from Gradients: L-BFGS over image and soft label on the squared gradient distance.

    Start N(0, 1) for image and label logits; lr 1, history 100, 20 iterations a step, no line search, no clamping;
    the last iterate is returned. See GradientMatching for the options.
    """

    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS (released code)"
    steps: Count = 300
    lr: Positive = 1.0

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance."""
        return squared_distance(gradient, observed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run L-BFGS for ``steps`` outer steps."""
        return lbfgs(objective, start, steps=self.steps, lr=self.lr)


@register("idlg")
@dataclass(frozen=True)
class IDLG(GradientMatching):
    """Improved DLG: the label is read off the last layer, then L-BFGS over the image alone.

    Every tenth step a trial whose squared distance is below ``stop`` is done. See GradientMatching for the options.
    """

    reference: ClassVar[str] = "Zhao et al. 2020, iDLG, arXiv 2001.02610 (and the code of P. Zhao)"
    steps: Count = 300
    lr: Positive = 1.0
    labels: Literal["joint", "analytic"] = "analytic"
    stop: NonNegative = 1e-6

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance."""
        return squared_distance(gradient, observed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run L-BFGS for at most ``steps`` outer steps."""
        return lbfgs(objective, start, steps=self.steps, lr=self.lr, stop_below=self.stop)
