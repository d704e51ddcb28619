"""The best and the worst image of a batch in each measure of likeness."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM
from leakbench.metrics.base import Metric, register
from leakbench.metrics.lpips import LPIPSVGG, LPIPSAlex
from leakbench.metrics.members import BatchMetric, ScoredBatches
from leakbench.metrics.standard import MSE, PSNR, SSIM


class Extreme(BatchMetric):
    """The best or the worst image of a batch in a metric; the class statement names it.

    Attributes:
        of: the metric.
        best: whether the best image: the one that leaks most.
    """

    of: ClassVar[type[Metric]]
    best: ClassVar[bool]

    def __init_subclass__(cls, *, of: type[Metric], best: bool, unit: str, usual: bool = False) -> None:
        """Set what follows from the metric.

        Args:
            of: see above.
            best: see above.
            unit: the units or the range of the metric.
            usual: see ``BatchMetric``.
        """
        super().__init_subclass__()
        cls.of, cls.best, cls.usual = of, best, usual
        cls.higher_is_better, cls.reference = of.higher_is_better, of.name
        beside = "; to be read beside the floors'" if best else ""
        cls.convention = f"{unit}, {of.name} of the image with the {'most' if cls._largest() else 'least'}{beside}"

    @classmethod
    def _largest(cls) -> bool:
        """Return whether the image is the one with the largest value."""
        return cls.best == cls.of.higher_is_better

    def of_batches(self, scored: ScoredBatches) -> Tensor:
        """Return the value of that image; NaN if the run does not have the metric."""
        values = scored.values.get(self.of.name)
        if values is None:
            return self(scored.images, scored.truth)
        return values.amax(1) if self._largest() else values.amin(1)


@register("psnr_aligned_worst")
@dataclass(frozen=True)
class WorstAlignedPSNR(Extreme, of=AlignedPSNR, best=False, unit="dB", usual=True):
    """Aligned PSNR of the image of a batch that leaks least."""


@register("psnr_aligned_best")
@dataclass(frozen=True)
class BestAlignedPSNR(Extreme, of=AlignedPSNR, best=True, unit="dB", usual=True):
    """Aligned PSNR of the image of a batch that leaks most; the assignment lifts that of a floor, too."""


@register("ssim_aligned_worst")
@dataclass(frozen=True)
class WorstAlignedSSIM(Extreme, of=AlignedSSIM, best=False, unit="-1 to 1", usual=True):
    """Aligned SSIM of the image of a batch that leaks least."""


@register("ssim_aligned_best")
@dataclass(frozen=True)
class BestAlignedSSIM(Extreme, of=AlignedSSIM, best=True, unit="-1 to 1", usual=True):
    """Aligned SSIM of the image of a batch that leaks most; the assignment lifts that of a floor, too."""


@register("mse_worst")
@dataclass(frozen=True)
class WorstMSE(Extreme, of=MSE, best=False, unit="0 or more"):
    """MSE of the image of a batch that leaks least."""


@register("mse_best")
@dataclass(frozen=True)
class BestMSE(Extreme, of=MSE, best=True, unit="0 or more"):
    """MSE of the image of a batch that leaks most; the assignment betters that of a floor, too."""


@register("psnr_worst")
@dataclass(frozen=True)
class WorstPSNR(Extreme, of=PSNR, best=False, unit="dB"):
    """PSNR of the image of a batch that leaks least."""


@register("psnr_best")
@dataclass(frozen=True)
class BestPSNR(Extreme, of=PSNR, best=True, unit="dB"):
    """PSNR of the image of a batch that leaks most; the assignment betters that of a floor, too."""


@register("ssim_worst")
@dataclass(frozen=True)
class WorstSSIM(Extreme, of=SSIM, best=False, unit="-1 to 1"):
    """SSIM of the image of a batch that leaks least."""


@register("ssim_best")
@dataclass(frozen=True)
class BestSSIM(Extreme, of=SSIM, best=True, unit="-1 to 1"):
    """SSIM of the image of a batch that leaks most; the assignment betters that of a floor, too."""


@register("lpips_vgg_worst")
@dataclass(frozen=True)
class WorstLPIPSVGG(Extreme, of=LPIPSVGG, best=False, unit="0 or more"):
    """LPIPS (VGG) of the image of a batch that leaks least."""


@register("lpips_vgg_best")
@dataclass(frozen=True)
class BestLPIPSVGG(Extreme, of=LPIPSVGG, best=True, unit="0 or more"):
    """LPIPS (VGG) of the image of a batch that leaks most; the assignment betters that of a floor, too."""


@register("lpips_alex_worst")
@dataclass(frozen=True)
class WorstLPIPSAlex(Extreme, of=LPIPSAlex, best=False, unit="0 or more"):
    """LPIPS (AlexNet) of the image of a batch that leaks least."""


@register("lpips_alex_best")
@dataclass(frozen=True)
class BestLPIPSAlex(Extreme, of=LPIPSAlex, best=True, unit="0 or more"):
    """LPIPS (AlexNet) of the image of a batch that leaks most; the assignment betters that of a floor, too."""
