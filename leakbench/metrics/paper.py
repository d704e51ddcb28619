"""The convention of the FedKL paper's code, kept apart from the standard one and never mixed with it.

The paper's images pass through PNG files that are written without clamping, so that values outside [0, 1] wrap around;
its "MSE" is a root, and its "PSNR" is computed from that root. For pixels that do not wrap, and before any cap,
``psnr = 2 * paper_psnr - 10 log10(255**2)`` (48.131 dB).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.text import FEDKL
from leakbench.metrics.base import Metric, by_rows, check_pair, register, rgb
from leakbench.metrics.lpips import Net, TrunkMetric, trunk_distance
from leakbench.metrics.standard import ERROR_PIXELS, windowed_ssim

PAPER_PSNR_CAP = 100.0
"""dB; the paper's "PSNR" of equal images, for which its code divides by zero."""

_PIXELS = "both images cast to bytes without clamping (values wrap mod 256), 0 to 255, grey replicated"
_REFERENCE = f"{FEDKL}, table 6 (as the released code computes it)"


def quantise(images: Tensor) -> Tensor:
    """Return x * 255 cut towards zero to an integer, modulo 256: what torchvision's ToPILImage writes.

    -0.5 becomes 129 and 1.2 becomes 50. The remainder is taken of the integer that the float stands for: the cast
    itself is undefined for values out of range and differs between machines.

    Args:
        images: [T, C, H, W], C = 1 or 3, of any finite range.

    Returns:
        [T, 3, H, W] uint8, grey images replicated.

    Raises:
        ValueError: C is neither 1 nor 3.
    """
    scaled = (images * 255).nan_to_num().trunc()  # overflow: the largest float, a multiple of 256
    return rgb((scaled - 256 * (scaled / 256).floor()).to(torch.uint8))  # every step is exact


@register("paper_mse")
@dataclass(frozen=True)
class PaperMSE(Metric):
    """The FedKL paper's "MSE", which is the RMSE on 0 to 255."""

    convention: ClassVar[str] = f"root of the mean squared error; {_PIXELS}"
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] root mean squared errors of the bytes, 0 to 255; see ``Metric`` and ``quantise``."""
        check_pair(self, images, truth)

        def error(x: Tensor, y: Tensor) -> Tensor:
            return (quantise(x).double() - quantise(y).double()).square().flatten(1).mean(dim=1).sqrt()

        return by_rows(error, images, truth, ERROR_PIXELS)


@register("paper_psnr")
@dataclass(frozen=True)
class PaperPSNR(Metric):
    """The FedKL paper's "PSNR", computed from the RMSE instead of the MSE."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = f"10 log10(255^2/RMSE), 24.07 to {PAPER_PSNR_CAP:g}, capped there; {_PIXELS}"
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in the paper's dB, 24.07 (white against black) to 100; see ``Metric``."""
        return (10 * torch.log10(255**2 / PaperMSE()(images, truth))).clamp(max=PAPER_PSNR_CAP)


@register("paper_ssim")
@dataclass(frozen=True)
class PaperSSIM(Metric):
    """The FedKL paper's SSIM, on bytes in a uniform 7 x 7 window: what scikit-image computes by default."""

    higher_is_better: ClassVar[bool] = True
    smallest: ClassVar[int] = 7
    convention: ClassVar[str] = (
        f"-1 to 1; uniform 7x7 window, K1 0.01, K2 0.03, data range 255, sample covariance; {_PIXELS}"
    )
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [-1, 1]; see ``Metric`` and ``quantise``."""
        check_pair(self, images, truth)
        sample = self.smallest**2 / (self.smallest**2 - 1)  # Bessel's correction, which divides K2 squared instead
        k2 = 0.03 / math.sqrt(sample)
        return windowed_ssim(quantise(images), quantise(truth), self.smallest, math.inf, data_range=255, k2=k2)


class PaperLPIPS(TrunkMetric):
    """LPIPS as the paper's code feeds it: bytes from 0 to 255 in BGR order, not RGB in [-1, 1]."""

    convention: ClassVar[str] = f"0 or more, lower is closer; values fed raw and in BGR order; {_PIXELS}"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] distances, 0 or more; see ``Metric`` and ``quantise``."""
        check_pair(self, images, truth)
        return trunk_distance(quantise(images).flip(1), quantise(truth).flip(1), self.net)


@register("paper_lpips_vgg")
@dataclass(frozen=True)
class PaperLPIPSVGG(PaperLPIPS):
    """The FedKL paper's LPIPS on VGG16, fed bytes in BGR order."""

    net: ClassVar[Net] = "vgg"
    reference: ClassVar[str] = _REFERENCE


@register("paper_lpips_alex")
@dataclass(frozen=True)
class PaperLPIPSAlex(PaperLPIPS):
    """The FedKL paper's LPIPS on AlexNet, fed bytes in BGR order."""

    net: ClassVar[Net] = "alex"
    reference: ClassVar[str] = _REFERENCE
