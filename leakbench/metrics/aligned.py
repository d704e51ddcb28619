"""PSNR and SSIM after the best global brightness and contrast: what is left of a reconstruction's structure.

A network with BatchNorm on a batch of one hardly sees the contrast of its input, so that no attack can recover it; the
raw metrics then punish a perfect structure. The fit uses the truth: it measures, and never selects.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.metrics.base import Metric, by_rows, check_pair, register
from leakbench.metrics.standard import ERROR_PIXELS, PSNR, PSNR_CAP, SSIM

_FIT = "after the least-squares fit a*x + b to the truth, two numbers per image, of any sign, then clipped to [0, 1]"


def align(images: Tensor, truth: Tensor) -> Tensor:
    """Return a*x + b clipped to [0, 1], with the a and b of each image that bring it closest to the truth.

    Both numbers are unconstrained, shared by all channels and pixels of the image, and found by least squares on the
    values as they are, before any clamping. A constant image becomes the truth's mean.

    Args:
        images: [T, C, H, W], of any finite range.
        truth: [T, C, H, W] in [0, 1].

    Returns:
        [T, C, H, W] float64 in [0, 1].
    """
    return by_rows(_align, images, truth, ERROR_PIXELS)


def _align(images: Tensor, truth: Tensor) -> Tensor:
    x, y = images.double().flatten(1), truth.double().flatten(1)
    x = x / _or_one(x.abs().amax(dim=1, keepdim=True))  # so that no square overflows
    x = x - x.mean(dim=1, keepdim=True)
    x = x / _or_one(x.abs().amax(dim=1, keepdim=True))  # so that no square underflows
    mean = y.mean(dim=1, keepdim=True)
    slope = (x * (y - mean)).sum(dim=1, keepdim=True) / _or_one(x.square().sum(dim=1, keepdim=True))
    return (mean + slope * x).clamp(0, 1).view_as(truth)


def _or_one(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))


@register("psnr_aligned")
@dataclass(frozen=True)
class AlignedPSNR(Metric):
    """PSNR after the best global fit of brightness and contrast to the truth."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = f"dB, psnr {_FIT}; capped at {PSNR_CAP:g}"
    reference: ClassVar[str] = "psnr, with a fit that is this package's own"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in dB, 0 to 100; see ``Metric``."""
        check_pair(self, images, truth)
        return PSNR()(align(images, truth), truth)


@register("ssim_aligned")
@dataclass(frozen=True)
class AlignedSSIM(Metric):
    """SSIM after the best global fit of brightness and contrast to the truth."""

    higher_is_better: ClassVar[bool] = True
    smallest: ClassVar[int] = SSIM.smallest
    convention: ClassVar[str] = f"-1 to 1, ssim {_FIT}"
    reference: ClassVar[str] = "ssim, with a fit that is this package's own"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [-1, 1]; see ``Metric``."""
        check_pair(self, images, truth)
        return SSIM()(align(images, truth), truth)


def centred(pixels: Tensor) -> Tensor:
    """Return pixels [M, N] less each row's mean; of a row that is not finite, 0."""
    pixels = torch.where(torch.isfinite(pixels).all(1, keepdim=True), pixels, 0.0)
    return pixels - pixels.mean(1, keepdim=True)


def nearness(guess: Tensor, candidates: Tensor) -> Tensor:
    """Return how near images are to others at any brightness and contrast.

    Args:
        guess: [M, C H W] float64, the pixels ``centred``.
        candidates: [P, C, H, W].

    Returns:
        [M, P] float64, squared correlations, up to a factor of each row of ``guess``; 0 for a constant image.
    """
    known = centred(candidates.double().flatten(1))
    return ((guess @ known.T) / known.norm(dim=1).clamp(min=torch.finfo(known.dtype).tiny)).square()
