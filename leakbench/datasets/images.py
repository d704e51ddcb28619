"""Size and channels of images: the options of datasets, and the conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from leakbench.errors import BadOption

Size = Annotated[int, Field(ge=8, le=1024)]
"""The side of a square image, in pixels."""

Channels = Literal[1, 3]
"""1 is grey, 3 is RGB."""

_LUMA = (0.299, 0.587, 0.114)


def check_indices(name: str, length: int, indices: Sequence[int]) -> None:
    """Raise BadOption at the first index that is not one of the dataset's ``length`` images."""
    for index in indices:
        if not 0 <= index < length:
            raise BadOption(
                f"image index {index} is out of range for dataset {name!r} ({length} images); "
                f"give indices from 0 to {length - 1}"
            )


def shape(native: tuple[int, int, int], size: int | None, channels: int | None) -> tuple[int, int, int]:
    """Return (C, H, W) after ``convert``; ``native`` is (C, H, W) as stored."""
    return channels or native[0], size or native[1], size or native[2]


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
