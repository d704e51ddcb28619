"""Metrics against the image that the client trained on, if a defense changes it before the step (ATS, MixUp).

Gradients leak that image. Metrics by pixel count a mere shift as protection, so they cannot say how much of the private
image it shows: a reconstruction is scored against both, and the reader judges by eye.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from leakbench.core.types import Reconstruction
from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM
from leakbench.metrics.base import Metric, Truth, register
from leakbench.metrics.standard import PSNR_CAP

_AGAINST = "against the image that the client trained on; none if that is the private image, or has nothing of it"
_FLOOR = "the best of random, grey and mean in"
NARROW = 0.1
"""An image whose values span less than this is scaled to [0, 1], like one that leaves it."""


class _Scores(NamedTuple):
    """The scores against the image that a client trained on: those of a reconstruction, and the best of any floor."""

    ssim: float
    psnr: float
    floor_ssim: float
    floor_psnr: float


class EncodedMetric(Metric):
    """A metric that compares with the image that the client trained on.

    Attributes:
        part: which of the scores (``_Scores``) it is.
    """

    higher_is_better: ClassVar[bool] = True
    part: ClassVar[str]

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: the private images do not tell which images the clients trained on."""
        return torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values, NaN for clients that trained on their private image, or on nothing of it.

        If a client trained on several images, the values of all metrics are those of one of them: of the images on
        which the reconstruction is better than every floor, or else of all, the one with the highest SSIM. Images that
        leave [0, 1], or have little contrast, are scaled to it, which no fit of brightness and contrast notices.
        """
        values = self(guess.images, truth.images)
        for row, changed in enumerate(truth.encoded or ()):
            if changed is not None:
                own = [guess.images[row], *[images[row] for images in truth.floors]]
                values[row] = getattr(_scores(own, changed), self.part)
        return values


def _scores(images: Sequence[Tensor], changed: Tensor) -> _Scores:
    """Return the scores of a reconstruction, the first of the images, and of floors, the others."""
    ends = torch.stack([_in_range(image) for image in changed])
    own = torch.stack([image.to(ends) for image in images])
    pairs = own.repeat_interleave(len(ends), 0), ends.repeat(len(own), 1, 1, 1)
    wide = min(ends.shape[-2:]) >= AlignedSSIM.smallest
    psnr = AlignedPSNR()(*pairs).view(len(own), -1).cpu()
    ssim = AlignedSSIM()(*pairs).view(len(own), -1).cpu() if wide else torch.full_like(psnr, torch.nan)
    floors = [table[1:].amax(0) if len(own) > 1 else torch.full_like(table[0], torch.nan) for table in (ssim, psnr)]
    below = [table[0] <= floor for table, floor in zip((ssim, psnr), floors)]
    rank = (ssim[0] if wide else psnr[0]) - torch.where(below[0] | below[1], 2 * PSNR_CAP, 0.0)
    best = int(rank.argmax())
    return _Scores(*(float(table[best]) for table in (ssim[0], psnr[0], *floors)))


def _in_range(image: Tensor) -> Tensor:
    """Return an image [C, H, W] that leaves [0, 1], or spans little of it, scaled to it."""
    low, high = float(image.min()), float(image.max())
    if 0 <= low <= high <= 1 and (high - low >= NARROW or math.isclose(low, high)):
        return image
    return ((image - low) / ((high - low) or 1)).clamp(0, 1)


@register("psnr_encoded")
@dataclass(frozen=True)
class EncodedPSNR(EncodedMetric):
    """Aligned PSNR against the image that the client trained on, if its defense changes the image."""

    part: ClassVar[str] = "psnr"
    convention: ClassVar[str] = f"dB, psnr_aligned {_AGAINST}; capped at {PSNR_CAP:g}"
    reference: ClassVar[str] = "psnr_aligned, with another image to compare with"


@register("ssim_encoded")
@dataclass(frozen=True)
class EncodedSSIM(EncodedMetric):
    """Aligned SSIM against the image that the client trained on, if its defense changes the image."""

    part: ClassVar[str] = "ssim"
    smallest: ClassVar[int] = AlignedSSIM.smallest
    convention: ClassVar[str] = f"-1 to 1, ssim_aligned {_AGAINST}"
    reference: ClassVar[str] = "ssim_aligned, with another image to compare with"


@register("psnr_encoded_floor")
@dataclass(frozen=True)
class EncodedPSNRFloor(EncodedMetric):
    """Aligned PSNR of the best floor against the image that the client trained on, if its defense changes the image."""

    part: ClassVar[str] = "floor_psnr"
    convention: ClassVar[str] = f"dB, {_FLOOR} psnr_encoded; it measures no leakage: a reconstruction must exceed it"
    reference: ClassVar[str] = "psnr_encoded"


@register("ssim_encoded_floor")
@dataclass(frozen=True)
class EncodedSSIMFloor(EncodedMetric):
    """Aligned SSIM of the best floor against the image that the client trained on, if its defense changes the image."""

    part: ClassVar[str] = "floor_ssim"
    smallest: ClassVar[int] = AlignedSSIM.smallest
    convention: ClassVar[str] = (
        f"-1 to 1, {_FLOOR} ssim_encoded; it measures no leakage: a reconstruction must exceed it"
    )
    reference: ClassVar[str] = "ssim_encoded"
