"""Images of a dataset in memory, as bytes, for trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.datasets.base import Dataset

_CHUNK = 5000


@dataclass(frozen=True)
class ByteImages:
    """Images in memory.

    Attributes:
        pixels: [N, C, H, W] uint8; a dataset's images are rounded to 8 bits.
        labels: [N] int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> ByteImages:
        """Return the images at these rows."""
        return ByteImages(self.pixels[rows], self.labels[rows])


def read(dataset: Dataset, indices: Sequence[int]) -> ByteImages:
    """Return the images of a dataset at these indices."""
    pixels = torch.empty((len(indices), *dataset.image_shape), dtype=torch.uint8)
    labels = torch.empty(len(indices), dtype=torch.int64)
    for start in range(0, len(indices), _CHUNK):
        rows = slice(start, start + _CHUNK)
        images, labels[rows] = dataset.load(indices[rows])
        pixels[rows] = images.mul(255).round().to(torch.uint8)
    return ByteImages(pixels, labels)
