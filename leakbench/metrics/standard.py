"""MSE, PSNR and SSIM in the standard convention: pixels in [0, 1], the reconstruction clamped to that range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.metrics.base import Metric, register
from leakbench.metrics.checks import by_rows, check_pair, check_size

PSNR_CAP = 100.0
"""dB; the PSNR of equal images, which would be infinite."""

SSIM_WINDOW = 11
"""Pixels; no image may be narrower."""

SSIM_SIGMA = 1.5
"""Pixels; the standard deviation of the window."""

SSIM_PIXELS = 2**14
"""How many pixels are compared at a time."""

_PIXELS = 2**16


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error over channels and pixels.

    Args:
        images: [T, C, H, W], of any finite range; clamped to [0, 1].
        truth: [T, C, H, W] in [0, 1].

    Returns:
        [T] float64 in [0, 1].

    Raises:
        ValueError: shapes differ, a value is not finite, or the truth leaves [0, 1].
    """
    check_pair(images, truth)

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (x.double().clamp(0, 1) - y.double()).square().flatten(1).mean(dim=1)

    return by_rows(error, images, truth, _PIXELS)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio, 10 log10(1 / MSE), capped at ``PSNR_CAP``.

    Args:
        images: [T, C, H, W], of any finite range; clamped to [0, 1].
        truth: [T, C, H, W] in [0, 1].

    Returns:
        [T] float64 in dB, 0 to 100.

    Raises:
        ValueError: as ``mse``.
    """
    return (10 * torch.log10(1 / mse(images, truth))).clamp(max=PSNR_CAP)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity, averaged over the positions of the window and the channels.

    The window is Gaussian (11 x 11, sigma 1.5) and stays inside the image; K1 = 0.01, K2 = 0.03, data range 1,
    weighted covariances without Bessel's correction, no downsampling. Computed in float64: the variances are
    differences of nearly equal numbers, and a GPU's TF32 convolutions would spoil them.

    Args:
        images: [T, C, H, W], of any finite range; clamped to [0, 1].
        truth: [T, C, H, W] in [0, 1].

    Returns:
        [T] float64 in [-1, 1]; 1 for equal images.

    Raises:
        ValueError: as ``mse``, or the images are narrower than 11 pixels.
    """
    check_pair(images, truth)
    check_size(images, SSIM_WINDOW, "ssim")
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=images.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        return windowed_ssim(x.double().clamp(0, 1), y.double(), window / window.sum())

    return by_rows(similarity, images, truth, SSIM_PIXELS)


def windowed_ssim(
    images: Tensor, truth: Tensor, window: Tensor, *, data_range: float = 1.0, bessel: float = 1.0
) -> Tensor:
    """Return the structural similarity in a separable window, averaged over its positions and the channels.

    Args:
        images: [T, C, H, W] float64.
        truth: [T, C, H, W] float64.
        window: [K] float64 of sum 1, K no larger than H and W; the weights are its products with itself.
        data_range: the largest value less the smallest one.
        bessel: what variances and covariances are multiplied by.

    Returns:
        [T] float64 in [-1, 1].
    """
    down, across = (_band(window, size) for size in images.shape[-2:])
    moments = torch.stack([images, truth, images.square(), truth.square(), images * truth])
    x, y, xx, yy, xy = (down @ moments @ across.T).unbind()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = 2 * bessel * (xy - x * y) + c2
    variance = bessel * ((xx - x.square()) + (yy - y.square())) + c2
    means = (2 * x * y + c1) / (x.square() + y.square() + c1)
    return (means * covariance / variance).flatten(1).mean(1)


def _band(window: Tensor, size: int) -> Tensor:
    """Return the matrix [size - K + 1, size] that slides a window [K] along an axis."""
    rows = torch.arange(size - len(window) + 1, device=window.device)[:, None]
    band = window.new_zeros(len(rows), size)
    return band.scatter_(1, rows + torch.arange(len(window), device=window.device), window.expand(len(rows), -1))


def ssim_note(image_shape: tuple[int, int, int], window: int) -> str:
    """Return that SSIM does not exist for images (C, H, W) narrower than its window, or an empty string."""
    _, height, width = image_shape
    if min(height, width) >= window:
        return ""
    return f"not defined for {height} x {width} images, which are smaller than the {window} x {window} window"


@register("mse")
@dataclass(frozen=True)
class MSE(Metric):
    """Mean squared error of the pixels."""

    higher_is_better: ClassVar[bool] = False
    convention: ClassVar[str] = "mean over channels and pixels in [0, 1], reconstruction clamped; 0 to 1"
    reference: ClassVar[str] = "definition"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [0, 1]; see ``mse``."""
        return mse(images, truth)


@register("psnr")
@dataclass(frozen=True)
class PSNR(Metric):
    """Peak signal-to-noise ratio."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = (
        f"dB, 10 log10(1/MSE) of pixels in [0, 1], reconstruction clamped; 0 to {PSNR_CAP:g}, capped there"
    )
    reference: ClassVar[str] = "definition"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in dB; see ``psnr``."""
        return psnr(images, truth)


@register("ssim")
@dataclass(frozen=True)
class SSIM(Metric):
    """Structural similarity in an 11 x 11 Gaussian window."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = (
        "-1 to 1; pixels in [0, 1], reconstruction clamped; Gaussian 11x11 window of sigma 1.5 inside the image, "
        "K1 0.01, K2 0.03, data range 1, population covariance, mean over channels, no downsampling"
    )
    reference: ClassVar[str] = "Wang et al. 2004, Image quality assessment, IEEE TIP 13(4)"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [-1, 1]; see ``ssim``."""
        return ssim(images, truth)

    def note(self, image_shape: tuple[int, int, int]) -> str:
        """Return that SSIM does not exist for images smaller than its window."""
        return ssim_note(image_shape, SSIM_WINDOW)
