"""DLG and iDLG: L-BFGS on the squared distance between gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from leakbench.attacks.base import register
from leakbench.attacks.matching import NonNegative
from leakbench.attacks.quasi_newton import QuasiNewton
from leakbench.gradients.bilinear import squared_distance
from leakbench.types import Gradient


@register("dlg")
@dataclass(frozen=True)
class DLG(QuasiNewton):
    """Deep Leakage from Gradients: L-BFGS over image and soft label on the squared gradient distance.

    Start N(0, 1) for image and label logits; lr 1, history 100, 20 iterations a step, no clamping; the last iterate is
    returned. See QuasiNewton and GradientMatching for the options.
    """

    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS (released code)"

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance."""
        return squared_distance(gradient, observed)


@register("idlg")
@dataclass(frozen=True)
class IDLG(QuasiNewton):
    """Improved DLG: the label is read off the last layer, then L-BFGS over the image alone.

    See QuasiNewton and GradientMatching for the other options.

    Attributes:
        stop: every tenth step a trial whose squared distance is below this is done.
    """

    reference: ClassVar[str] = "Zhao et al. 2020, iDLG, arXiv 2001.02610 (and the code of P. Zhao)"
    labels: Literal["joint", "analytic"] = "analytic"
    stop: NonNegative = 1e-6

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance."""
        return squared_distance(gradient, observed)

    def done_below(self) -> float:
        """Return ``stop``."""
        return self.stop
