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
    """The best or the worst image of a batch in a metric.

    Attributes:
        of: the metric.
        best: whether the best one.
    """

    of: ClassVar[type[Metric]]
    best: ClassVar[bool]

    def of_batches(self, scored: ScoredBatches) -> Tensor:
        """Return the value of that image; NaN if the run does not have the metric."""
        values = scored.values.get(self.of.name)
        if values is None:
            return self(scored.images, scored.truth)
        return values.amax(1) if self.best == self.of.higher_is_better else values.amin(1)


@register("psnr_aligned_worst")
@dataclass(frozen=True)
class WorstAlignedPSNR(Extreme):
    """Aligned PSNR of the image of a batch that leaks least."""

    convention: ClassVar[str] = "dB, psnr_aligned of the image with the least"
    reference: ClassVar[str] = "psnr_aligned"
    of: ClassVar[type[Metric]] = AlignedPSNR
    best: ClassVar[bool] = False


@register("psnr_aligned_best")
@dataclass(frozen=True)
class BestAlignedPSNR(Extreme):
    """Aligned PSNR of the image of a batch that leaks most; the assignment lifts that of a floor, too."""

    convention: ClassVar[str] = "dB, psnr_aligned of the image with the most; to be read beside the floors'"
    reference: ClassVar[str] = "psnr_aligned"
    of: ClassVar[type[Metric]] = AlignedPSNR
    best: ClassVar[bool] = True


@register("ssim_aligned_worst")
@dataclass(frozen=True)
class WorstAlignedSSIM(Extreme):
    """Aligned SSIM of the image of a batch that leaks least."""

    convention: ClassVar[str] = "-1 to 1, ssim_aligned of the image with the least"
    reference: ClassVar[str] = "ssim_aligned"
    of: ClassVar[type[Metric]] = AlignedSSIM
    best: ClassVar[bool] = False


@register("ssim_aligned_best")
@dataclass(frozen=True)
class BestAlignedSSIM(Extreme):
    """Aligned SSIM of the image of a batch that leaks most; the assignment lifts that of a floor, too."""

    convention: ClassVar[str] = "-1 to 1, ssim_aligned of the image with the most; to be read beside the floors'"
    reference: ClassVar[str] = "ssim_aligned"
    of: ClassVar[type[Metric]] = AlignedSSIM
    best: ClassVar[bool] = True


@register("mse_worst")
@dataclass(frozen=True)
class WorstMSE(Extreme):
    """MSE of the image of a batch that leaks least."""

    higher_is_better: ClassVar[bool] = False
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "0 or more, mse of the image with the most"
    reference: ClassVar[str] = "mse"
    of: ClassVar[type[Metric]] = MSE
    best: ClassVar[bool] = False


@register("mse_best")
@dataclass(frozen=True)
class BestMSE(Extreme):
    """MSE of the image of a batch that leaks most; the assignment betters that of a floor, too."""

    higher_is_better: ClassVar[bool] = False
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "0 or more, mse of the image with the least; to be read beside the floors'"
    reference: ClassVar[str] = "mse"
    of: ClassVar[type[Metric]] = MSE
    best: ClassVar[bool] = True


@register("psnr_worst")
@dataclass(frozen=True)
class WorstPSNR(Extreme):
    """PSNR of the image of a batch that leaks least."""

    higher_is_better: ClassVar[bool] = True
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "dB, psnr of the image with the least"
    reference: ClassVar[str] = "psnr"
    of: ClassVar[type[Metric]] = PSNR
    best: ClassVar[bool] = False


@register("psnr_best")
@dataclass(frozen=True)
class BestPSNR(Extreme):
    """PSNR of the image of a batch that leaks most; the assignment betters that of a floor, too."""

    higher_is_better: ClassVar[bool] = True
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "dB, psnr of the image with the most; to be read beside the floors'"
    reference: ClassVar[str] = "psnr"
    of: ClassVar[type[Metric]] = PSNR
    best: ClassVar[bool] = True


@register("ssim_worst")
@dataclass(frozen=True)
class WorstSSIM(Extreme):
    """SSIM of the image of a batch that leaks least."""

    higher_is_better: ClassVar[bool] = True
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "-1 to 1, ssim of the image with the least"
    reference: ClassVar[str] = "ssim"
    of: ClassVar[type[Metric]] = SSIM
    best: ClassVar[bool] = False


@register("ssim_best")
@dataclass(frozen=True)
class BestSSIM(Extreme):
    """SSIM of the image of a batch that leaks most; the assignment betters that of a floor, too."""

    higher_is_better: ClassVar[bool] = True
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "-1 to 1, ssim of the image with the most; to be read beside the floors'"
    reference: ClassVar[str] = "ssim"
    of: ClassVar[type[Metric]] = SSIM
    best: ClassVar[bool] = True


@register("lpips_vgg_worst")
@dataclass(frozen=True)
class WorstLPIPSVGG(Extreme):
    """LPIPS (VGG) of the image of a batch that leaks least."""

    higher_is_better: ClassVar[bool] = False
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "0 or more, lpips_vgg of the image with the most"
    reference: ClassVar[str] = "lpips_vgg"
    of: ClassVar[type[Metric]] = LPIPSVGG
    best: ClassVar[bool] = False


@register("lpips_vgg_best")
@dataclass(frozen=True)
class BestLPIPSVGG(Extreme):
    """LPIPS (VGG) of the image of a batch that leaks most; the assignment betters that of a floor, too."""

    higher_is_better: ClassVar[bool] = False
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "0 or more, lpips_vgg of the image with the least; to be read beside the floors'"
    reference: ClassVar[str] = "lpips_vgg"
    of: ClassVar[type[Metric]] = LPIPSVGG
    best: ClassVar[bool] = True


@register("lpips_alex_worst")
@dataclass(frozen=True)
class WorstLPIPSAlex(Extreme):
    """LPIPS (AlexNet) of the image of a batch that leaks least."""

    higher_is_better: ClassVar[bool] = False
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "0 or more, lpips_alex of the image with the most"
    reference: ClassVar[str] = "lpips_alex"
    of: ClassVar[type[Metric]] = LPIPSAlex
    best: ClassVar[bool] = False


@register("lpips_alex_best")
@dataclass(frozen=True)
class BestLPIPSAlex(Extreme):
    """LPIPS (AlexNet) of the image of a batch that leaks most; the assignment betters that of a floor, too."""

    higher_is_better: ClassVar[bool] = False
    usual: ClassVar[bool] = False
    convention: ClassVar[str] = "0 or more, lpips_alex of the image with the least; to be read beside the floors'"
    reference: ClassVar[str] = "lpips_alex"
    of: ClassVar[type[Metric]] = LPIPSAlex
    best: ClassVar[bool] = True
