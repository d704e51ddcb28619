"""Metrics against the image that the client trained on, if a defense changes it before the step (ATS, MixUp).

Gradients leak that image. Metrics by pixel count a mere shift as protection, so they cannot say how much of the private
image it shows: a reconstruction is scored against both, and the reader judges by eye.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.types import Reconstruction
from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM
from leakbench.metrics.base import Metric, Truth, register
from leakbench.metrics.standard import PSNR_CAP

_AGAINST = "against the image that the client trained on; none if that is the private image, or has nothing of it"


class EncodedMetric(Metric):
    """A metric that compares with the image that the client trained on.

    Attributes:
        base: the metric that compares the two images.
    """

    higher_is_better: ClassVar[bool] = True
    base: ClassVar[Metric]

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: the private images do not tell which images the clients trained on."""
        return torch.full((len(images),), torch.nan, dtype=torch.float64, device=images.device)

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values of ``base``, NaN for clients that trained on their private image, or on nothing of it.

        If a client trained on several images, the value is that of the nearest one. Images that leave [0, 1] are scaled
        to it, which no fit of brightness and contrast notices.
        """
        values = self(guess.images, truth.images)
        changed = (
            {} if truth.encoded is None else {row: own for row, own in enumerate(truth.encoded) if own is not None}
        )
        for number in range(max(map(len, changed.values()), default=0)):
            rows = [row for row, own in changed.items() if number < len(own)]
            own = self.base(guess.images[rows], torch.stack([_in_range(changed[row][number]) for row in rows]))
            values[rows] = torch.fmax(values[rows], own)
        return values


def _in_range(image: Tensor) -> Tensor:
    """Return an image [C, H, W] that leaves [0, 1] scaled to it."""
    low, high = float(image.min()), float(image.max())
    return image if 0 <= low <= high <= 1 else ((image - low) / ((high - low) or 1)).clamp(0, 1)


@register("psnr_encoded")
@dataclass(frozen=True)
class EncodedPSNR(EncodedMetric):
    """Aligned PSNR against the image that the client trained on, if its defense changes the image."""

    base: ClassVar[Metric] = AlignedPSNR()
    convention: ClassVar[str] = f"dB, psnr_aligned {_AGAINST}; capped at {PSNR_CAP:g}"
    reference: ClassVar[str] = "psnr_aligned, with another image to compare with"


@register("ssim_encoded")
@dataclass(frozen=True)
class EncodedSSIM(EncodedMetric):
    """Aligned SSIM against the image that the client trained on, if its defense changes the image."""

    base: ClassVar[Metric] = AlignedSSIM()
    smallest: ClassVar[int] = AlignedSSIM.smallest
    convention: ClassVar[str] = f"-1 to 1, ssim_aligned {_AGAINST}"
    reference: ClassVar[str] = "ssim_aligned, with another image to compare with"
