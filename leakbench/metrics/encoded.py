"""Metrics against the image that the client trained on, where a defense changes it before the step (ATS, MixUp).

Gradients leak that image. What it gives away of the private one is for the eye to say where a metric by pixel, which
takes a shift for protection, does not: so a reconstruction is scored against both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.types import Reconstruction
from leakbench.metrics.aligned import psnr_aligned, ssim_aligned
from leakbench.metrics.base import Metric, Truth, register
from leakbench.metrics.standard import PSNR_CAP, SSIM_WINDOW, ssim_note

_WHAT = "against the image that the client trained on; none where that is the private image itself"


def _none(images: Tensor) -> Tensor:
    return torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)


def _score(metric: Callable[[Tensor, Tensor], Tensor], guess: Reconstruction, truth: Truth) -> Tensor:
    return _none(guess.images) if truth.encoded is None else metric(guess.images, truth.encoded)


@register("psnr_encoded")
@dataclass(frozen=True)
class EncodedPSNR(Metric):
    """Aligned PSNR against the image that the client trained on, where its defense changes the image."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = f"dB, psnr_aligned {_WHAT}; capped at {PSNR_CAP:g}"
    reference: ClassVar[str] = "psnr_aligned, with another image to compare with"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: the private images do not say what was trained on."""
        return _none(images)

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values in dB, or NaN."""
        return _score(psnr_aligned, guess, truth)


@register("ssim_encoded")
@dataclass(frozen=True)
class EncodedSSIM(Metric):
    """Aligned SSIM against the image that the client trained on, where its defense changes the image."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = f"-1 to 1, ssim_aligned {_WHAT}"
    reference: ClassVar[str] = "ssim_aligned, with another image to compare with"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: the private images do not say what was trained on."""
        return _none(images)

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values in [-1, 1], or NaN."""
        return _score(ssim_aligned, guess, truth)

    def note(self, image_shape: tuple[int, int, int]) -> str:
        """Return that SSIM does not exist for images smaller than its window."""
        return ssim_note(image_shape, SSIM_WINDOW)
