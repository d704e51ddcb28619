"""How near a reconstruction is to a public image: what an attacker returns that has memorised images."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.types import Reconstruction
from leakbench.metrics.aligned import AlignedSSIM, centred, nearness
from leakbench.metrics.base import Metric, Truth, register


@register("ssim_public")
@dataclass(frozen=True)
class PublicSSIM(Metric):
    """Aligned SSIM to the nearest public image of the dataset, instead of the private one."""

    higher_is_better: ClassVar[bool] = True
    default: ClassVar[bool] = False
    smallest: ClassVar[int] = AlignedSSIM.smallest
    convention: ClassVar[str] = (
        "-1 to 1, ssim_aligned to the public image whose pixels correlate most with the reconstruction's; it measures "
        "no leakage: an image that is recovered and has a high value may come from memory"
    )
    reference: ClassVar[str] = "this package's own"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [-1, 1] for each image and the public image [T, C, H, W] that is its nearest."""
        return AlignedSSIM()(images, truth)

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values, NaN without public images."""
        if truth.public is None:
            return torch.full((len(guess.images),), torch.nan, dtype=torch.float64)
        public = truth.public().to(guess.images)
        return self(guess.images, public[nearness(centred(guess.images.double().flatten(1)), public).argmax(1)])
