"""DLG and iDLG: L-BFGS on the squared distance between gradients."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from leakbench.attacks.base import register
from leakbench.attacks.matching import NonNegative
from leakbench.attacks.quasi_newton import QuasiNewton


@register("dlg")
@dataclass(frozen=True)
class DLG(QuasiNewton):
    """Deep Leakage from Gradients: L-BFGS over image and soft label on the squared gradient distance.

    Start N(0, 1) for image and label logits; lr 1, history 100, 20 iterations a step, no clamping; the last iterate is
    returned. See QuasiNewton and GradientMatching for the options.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS (released code)"
    assumes: ClassVar[str] = (
        "A network that can be differentiated twice with useful second derivatives (sigmoid, tanh)."
    )
    cost: ClassVar[str] = (
        "Up to 20 evaluations of the gradient and its derivative a step: 6,000 by default; 100 pairs of "
        "images in memory."
    )
    fails: ClassVar[str] = (
        "Diverges on some images; their number depends on the initial weights. Recovers nothing from ReLU networks, "
        "and no contrast behind a normalisation."
    )


@register("idlg")
@dataclass(frozen=True)
class IDLG(QuasiNewton):
    """Improved DLG: the label is inferred from the last layer, then L-BFGS only over the image.

    See QuasiNewton and GradientMatching for the other options.

    Attributes:
        stop: every tenth step a trial whose squared distance is below this is done.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "Zhao et al. 2020, iDLG, arXiv 2001.02610 (and the code of B. Zhao)"
    assumes: ClassVar[str] = (
        "A network that can be differentiated twice with useful second derivatives (sigmoid, tanh), and a hard label "
        "with a classifier whose inputs are not negative, from which the label is inferred."
    )
    cost: ClassVar[str] = "As dlg; a trial ends early once its gradient matches."
    fails: ClassVar[str] = (
        "As dlg, it diverges on some images and recovers nothing from ReLU networks; a wrong label (classifier inputs "
        "of any sign, as behind PRECODE; mixed labels) spoils the search."
    )
    labels: Literal["joint", "analytic"] = "analytic"
    stop: NonNegative = 1e-6

    def done_below(self) -> float:
        """Return ``stop``."""
        return self.stop
