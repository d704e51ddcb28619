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
from leakbench.optim import LineSearch, Solution, Unknowns, lbfgs
from leakbench.types import Gradient

QUEUE = 4
HISTORY = 100
HELD = 2 * HISTORY + 5
"""Steps and gradient differences, and what Adam holds too."""


def squared_distance(gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: the sum over parameters of |g' - g|^2; the difference is taken first, so that it stays exact."""
    return torch.stack([squared_norm(gradient[name] - target) for name, target in observed.items()]).sum(0)


@register("dlg")
@dataclass(frozen=True)
class DLG(GradientMatching):
    """Deep Leakage from Gradients: L-BFGS over image and soft label on the squared gradient distance.

    Start N(0, 1) for image and label logits; lr 1, history 100, 20 iterations a step, no clamping; the last iterate is
    returned. See GradientMatching for the other options.

    Attributes:
        line_search: ``none``, as published, or torch's ``strong-wolfe``, which costs up to 25 evaluations a step.
    """

    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS (released code)"
    queue: ClassVar[int] = QUEUE
    held: ClassVar[int] = HELD
    steps: Count = 300
    lr: Positive = 1.0
    line_search: LineSearch = "none"

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance."""
        return squared_distance(gradient, observed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run L-BFGS for ``steps`` outer steps."""
        return lbfgs(
            objective,
            start,
            steps=self.steps,
            lr=self.lr,
            history=HISTORY,
            line_search=self.line_search,
            slots=objective.observation.slots,
        )


@register("idlg")
@dataclass(frozen=True)
class IDLG(GradientMatching):
    """Improved DLG: the label is read off the last layer, then L-BFGS over the image alone.

    See GradientMatching for the other options.

    Attributes:
        stop: every tenth step a trial whose squared distance is below this is done.
        line_search: ``none``, as published, or torch's ``strong-wolfe``, which costs up to 25 evaluations a step.
    """

    reference: ClassVar[str] = "Zhao et al. 2020, iDLG, arXiv 2001.02610 (and the code of P. Zhao)"
    queue: ClassVar[int] = QUEUE
    held: ClassVar[int] = HELD
    steps: Count = 300
    lr: Positive = 1.0
    labels: Literal["joint", "analytic"] = "analytic"
    stop: NonNegative = 1e-6
    line_search: LineSearch = "none"

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance."""
        return squared_distance(gradient, observed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run L-BFGS for at most ``steps`` outer steps."""
        return lbfgs(
            objective,
            start,
            steps=self.steps,
            lr=self.lr,
            history=HISTORY,
            line_search=self.line_search,
            stop_below=self.stop,
            slots=objective.observation.slots,
        )
