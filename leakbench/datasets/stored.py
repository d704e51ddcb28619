"""Base of the datasets in the cache: two splits, read from the cached files."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leakbench import assets
from leakbench.datasets.base import Dataset
from leakbench.datasets.images import Channels, Size, check_indices, convert, shape

Split = Literal["test", "train"]

Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images [N, C, H, W] and labels [N] of one file, mapped into memory."""

_ROWS = 2048


@dataclass(frozen=True)
class Stored(Dataset):
    """A dataset of two splits in the cache.

    Attributes:
        size: the side of the images, resized bilinearly with antialiasing; none keeps their own size.
        channels: 1 for grey, 3 for RGB; none keeps their own.
        split: the split that is attacked. The mean is that of the other split.
    """

    native: ClassVar[tuple[int, int, int]]
    classes: ClassVar[int]
    counts: ClassVar[dict[str, int]]

    size: Size | None = None
    channels: Channels | None = None
    split: Split = "test"

    @classmethod
    @abstractmethod
    def parts(cls, split: Split) -> list[Part]:
        """Return the files of a split; each one's checksum is verified once in a process."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return shape(self.native, self.size, self.channels)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return self.classes

    def __len__(self) -> int:
        """How many images the split has."""
        return self.counts[self.split]

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1] and labels [N] at these indices; see ``Dataset.load``."""
        check_indices(self.name, len(self), indices)
        images = np.empty((len(indices), *self.native), dtype=np.uint8)
        labels = np.empty(len(indices), dtype=np.int64)
        parts = self.parts(self.split)
        each = len(parts[0][1])
        for row, index in enumerate(indices):
            pixels, classes = parts[index // each]
            images[row], labels[row] = pixels[index % each], classes[index % each]
        return convert(torch.from_numpy(images).float() / 255, self.size, self.channels), torch.from_numpy(labels)

    def mean(self) -> Tensor:
        """Return [C, H, W], the mean of the split that is not attacked."""
        native = _mean(self.parts, "train" if self.split == "test" else "test", assets.home())
        return convert(native[None], self.size, self.channels)[0]


@functools.cache
def _mean(parts: Callable[[Split], list[Part]], split: Split, home: Path) -> Tensor:
    """Return [C, H, W], the mean of a split in the cache ``home``, computed once in a process."""
    total, count = np.int64(0), 0
    for images, _ in parts(split):
        for start in range(0, len(images), _ROWS):  # sums of bytes are exact in 32 bits
            total = total + images[start : start + _ROWS].sum(0, dtype=np.uint32)
        count += len(images)
    return torch.from_numpy(total / (255 * count)).float()
