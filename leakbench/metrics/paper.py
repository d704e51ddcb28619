"""The convention of the FedKL paper's code, kept apart from the standard one and never mixed with it.

The paper's images pass through PNG files that are written without clamping, so that values outside [0, 1] wrap around;
its "MSE" is a root, and its "PSNR" is computed from that root. For pixels that do not wrap, and before any cap,
``psnr = 2 * paper_psnr - 10 log10(255**2)`` (48.131 dB).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.metrics.base import Metric, register
from leakbench.metrics.checks import by_rows, check_pair, check_size
from leakbench.metrics.lpips import Net, TrunkMetric, rgb, trunk_distance
from leakbench.metrics.standard import SSIM_PIXELS, ssim_note, windowed_ssim

PAPER_PSNR_CAP = 100.0
"""dB; the paper's "PSNR" of equal images, where its code divides by zero."""

PAPER_SSIM_WINDOW = 7
"""Pixels; no image may be narrower."""

_ERROR_PIXELS = 2**16

_PIXELS = "both images cast to bytes without clamping (values wrap mod 256), 0 to 255, grey replicated"
_REFERENCE = "Wei et al. 2023, FedKL, arXiv 2305.04095, table 6 (as the released code computes it)"


def quantise(images: Tensor) -> Tensor:
    """Return x * 255 cut towards zero to an integer, modulo 256: what torchvision's ToPILImage writes.

    -0.5 becomes 129 and 1.2 becomes 50. The remainder is taken of the integer that the float stands for, where the
    cast itself is undefined for values out of range and differs between machines.

    Args:
        images: [T, C, H, W], C = 1 or 3, of any finite range.

    Returns:
        [T, 3, H, W] uint8, grey images replicated.

    Raises:
        ValueError: C is neither 1 nor 3.
    """
    scaled = (images * 255).nan_to_num().trunc()  # overflow: the largest float, a multiple of 256
    return rgb((scaled - 256 * (scaled / 256).floor()).to(torch.uint8))  # every step is exact


def paper_mse(images: Tensor, truth: Tensor) -> Tensor:
    """Return what the paper lists as "MSE": the root of the mean squared error of the bytes.

    Args:
        images: [T, C, H, W], C = 1 or 3, of any finite range; wrapped by ``quantise``.
        truth: [T, C, H, W] in [0, 1].

    Returns:
        [T] float64, 0 to 255.

    Raises:
        ValueError: shapes differ, a value is not finite, the truth leaves [0, 1], or C is neither 1 nor 3.
    """
    check_pair(images, truth)

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (quantise(x).double() - quantise(y).double()).square().flatten(1).mean(dim=1).sqrt()

    return by_rows(error, images, truth, _ERROR_PIXELS)


def paper_psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return what the paper lists as "PSNR": 10 log10(255^2 / RMSE), capped at ``PAPER_PSNR_CAP``.

    Args:
        images: [T, C, H, W], C = 1 or 3, of any finite range; wrapped by ``quantise``.
        truth: [T, C, H, W] in [0, 1].

    Returns:
        [T] float64 in the paper's dB, 24.07 (white against black) to 100.

    Raises:
        ValueError: as ``paper_mse``.
    """
    return (10 * torch.log10(255**2 / paper_mse(images, truth))).clamp(max=PAPER_PSNR_CAP)


def paper_ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the SSIM of the bytes as scikit-image does by default: uniform 7 x 7 window, sample covariance, range 255.

    Args:
        images: [T, C, H, W], C = 1 or 3, of any finite range; wrapped by ``quantise``.
        truth: [T, C, H, W] in [0, 1].

    Returns:
        [T] float64 in [-1, 1].

    Raises:
        ValueError: as ``paper_mse``, or the images are narrower than 7 pixels.
    """
    check_pair(images, truth)
    check_size(images, PAPER_SSIM_WINDOW, "paper_ssim")
    pixels = PAPER_SSIM_WINDOW**2
    window = torch.full((PAPER_SSIM_WINDOW,), 1 / PAPER_SSIM_WINDOW, dtype=torch.float64, device=images.device)

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        levels = quantise(x).double(), quantise(y).double()
        return windowed_ssim(*levels, window, data_range=255, bessel=pixels / (pixels - 1))

    return by_rows(similarity, images, truth, SSIM_PIXELS)


def paper_lpips(images: Tensor, truth: Tensor, net: Net) -> Tensor:
    """Return LPIPS as the paper's code feeds it: bytes from 0 to 255 in BGR order, not RGB in [-1, 1].

    Args:
        images: [T, C, H, W], C = 1 or 3, of any finite range; wrapped by ``quantise``.
        truth: [T, C, H, W] in [0, 1].
        net: the trunk.

    Returns:
        [T] float64, 0 or more.

    Raises:
        ValueError: as ``paper_mse``.
        MissingAsset: the trunk is not in the cache.
    """
    check_pair(images, truth)
    return trunk_distance(quantise(images).flip(1), quantise(truth).flip(1), net)


@register("paper_mse")
@dataclass(frozen=True)
class PaperMSE(Metric):
    """The FedKL paper's "MSE", which is the RMSE on 0 to 255."""

    higher_is_better: ClassVar[bool] = False
    convention: ClassVar[str] = f"root of the mean squared error; {_PIXELS}"
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values, 0 to 255; see ``paper_mse``."""
        return paper_mse(images, truth)


@register("paper_psnr")
@dataclass(frozen=True)
class PaperPSNR(Metric):
    """The FedKL paper's "PSNR", computed from the RMSE instead of the MSE."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = f"10 log10(255^2/RMSE), 24.07 to {PAPER_PSNR_CAP:g}, capped there; {_PIXELS}"
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in the paper's dB; see ``paper_psnr``."""
        return paper_psnr(images, truth)


@register("paper_ssim")
@dataclass(frozen=True)
class PaperSSIM(Metric):
    """The FedKL paper's SSIM, on bytes in a uniform 7 x 7 window."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = (
        f"-1 to 1; uniform 7x7 window, K1 0.01, K2 0.03, data range 255, sample covariance; {_PIXELS}"
    )
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [-1, 1]; see ``paper_ssim``."""
        return paper_ssim(images, truth)

    def note(self, image_shape: tuple[int, int, int]) -> str:
        """Return that SSIM does not exist for images smaller than its window."""
        return ssim_note(image_shape, PAPER_SSIM_WINDOW)


@register("paper_lpips_vgg")
@dataclass(frozen=True)
class PaperLPIPSVGG(TrunkMetric):
    """The FedKL paper's LPIPS on VGG16, fed bytes in BGR order."""

    net: ClassVar[Net] = "vgg"
    convention: ClassVar[str] = f"0 or more, lower is closer; values fed raw and in BGR order; {_PIXELS}"
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] distances; see ``paper_lpips``."""
        return paper_lpips(images, truth, self.net)


@register("paper_lpips_alex")
@dataclass(frozen=True)
class PaperLPIPSAlex(TrunkMetric):
    """The FedKL paper's LPIPS on AlexNet, fed bytes in BGR order."""

    net: ClassVar[Net] = "alex"
    convention: ClassVar[str] = f"0 or more, lower is closer; values fed raw and in BGR order; {_PIXELS}"
    reference: ClassVar[str] = _REFERENCE

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] distances; see ``paper_lpips``."""
        return paper_lpips(images, truth, self.net)
