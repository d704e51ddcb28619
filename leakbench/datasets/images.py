"""Images of datasets: their size and channels, which are options, and images in memory, as bytes, for trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torch.nn import functional as F

from leakbench.datasets.base import Dataset
from leakbench.errors import BadOption

MIN_SIDE, MAX_SIDE = 8, 1024


def _check_size(size: int | str) -> int | str:
    height, width = sides(size)
    if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
        raise ValueError(f"give sides from {MIN_SIDE} to {MAX_SIDE}")
    return height if height == width else f"{height}x{width}"


def sides(size: int | str) -> tuple[int, int]:
    """Return height and width of a size such as 32, or 48x32 for a height of 48 and a width of 32.

    Raises:
        ValueError: it is neither.
    """
    try:
        numbers = [int(side) for side in str(size).lower().split("x")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2 or isinstance(size, bool):
        raise ValueError(f"{size!r} is no size; write one side, as 32, or HEIGHTxWIDTH, as 48x32")
    return numbers[0], numbers[-1]


Size = Annotated[
    int | str, AfterValidator(_check_size), Field(description=f"SIDE or HEIGHTxWIDTH, {MIN_SIDE} to {MAX_SIDE}")
]
"""The side of a square image, or height and width, in pixels."""

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
        size: the side of the images, or HEIGHTxWIDTH: resized bilinearly with antialiasing until it is covered, and cut
            at the centre; none keeps their own size.
        channels: 1 for grey, 3 for RGB; none keeps their own.
    """

    native: ClassVar[tuple[int, int, int]]
    classes: ClassVar[int]

    size: Size | None = None
    channels: Channels | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, *native = self.native
        height, width = native if self.size is None else sides(self.size)
        return self.channels or channels, height, width

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


def convert(images: Tensor, size: int | str | None, channels: int | None) -> Tensor:
    """Return images [N, C, H, W] in [0, 1] at another size and with other channels; None keeps what is stored.

    Sizes change bilinearly with antialiasing, and images are cut at the centre if the proportions differ; RGB becomes
    grey as the luma of ITU-R BT.601; grey is repeated for any other number of channels.

    Args:
        images: [N, C, H, W] float32 in [0, 1]; C = 1 or 3, unless the channels are kept.
        size: the side of the result, or its height and width (``sides``).
        channels: the channels of the result.
    """
    if channels is not None and channels != images.shape[1]:
        if images.shape[1] == 3:
            images = (images * torch.tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
        if channels != 1:
            images = images.repeat(1, channels, 1, 1)
    if size is not None and (wanted := sides(size)) != images.shape[-2:]:
        own = images.shape[-2:]
        scale = max(new / old for new, old in zip(wanted, own))
        covering = [max(new, round(old * scale)) for new, old in zip(wanted, own)]
        images = F.interpolate(images, size=covering, mode="bilinear", antialias=True, align_corners=False)
        top, left = ((side - new) // 2 for side, new in zip(covering, wanted))
        images = images[..., top : top + wanted[0], left : left + wanted[1]]
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
