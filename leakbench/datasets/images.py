"""Images of datasets: their size and channels, which are options, and images in memory, as bytes, for trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from leakbench.datasets.base import Dataset
from leakbench.errors import BadOption

Size = Annotated[int, Field(ge=8, le=1024)]
"""The side of a square image, in pixels."""

Channels = Literal[1, 3]
"""1 is grey, 3 is RGB."""

_LUMA = (0.299, 0.587, 0.114)

READ_AT_ONCE = 5000
"""Number of images that are read at a time, as floats."""


@dataclass(frozen=True)
class Resizable(Dataset):
    """A dataset whose images all have the shape ``native``, unless the options ask for another.

    Attributes:
        native: (C, H, W) as stored.
        classes: number of classes.
        size: the side of the images, resized bilinearly with antialiasing; none keeps their own size.
        channels: 1 for grey, 3 for RGB; none keeps their own.
    """

    native: ClassVar[tuple[int, int, int]]
    classes: ClassVar[int]

    size: Size | None = None
    channels: Channels | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.native
        return self.channels or channels, self.size or height, self.size or width

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.classes


def check_indices(name: str, length: int, indices: Sequence[int]) -> None:
    """Raise BadOption at the first index that is not one of the dataset's ``length`` images."""
    for index in indices:
        if not 0 <= index < length:
            raise BadOption(
                f"image index {index} is out of range for dataset {name!r} ({length} images); "
                f"give indices from 0 to {length - 1}"
            )


def convert(images: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Return images [N, C, H, W] in [0, 1] at another size and with other channels; None keeps what is stored.

    Sizes change bilinearly with antialiasing; RGB becomes grey as the luma of ITU-R BT.601; grey becomes RGB by
    repetition.

    Args:
        images: [N, C, H, W] float32 in [0, 1], C = 1 or 3.
        size: the side of the result.
        channels: the channels of the result.
    """
    if channels == 1 and images.shape[1] == 3:
        images = (images * torch.tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
    elif channels == 3 and images.shape[1] == 1:
        images = images.repeat(1, 3, 1, 1)
    if size is not None and images.shape[-2:] != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(0, 1)


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
    for start in range(0, len(indices), READ_AT_ONCE):
        rows = slice(start, start + READ_AT_ONCE)
        images, labels[rows] = dataset.load(indices[rows])
        pixels[rows] = images.mul(255).round().to(torch.uint8)
    return ByteImages(pixels, labels)
