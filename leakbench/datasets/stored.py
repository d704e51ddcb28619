"""Base of the datasets in the cache: two splits, read from the cached files."""

import functools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leakbench import assets
from leakbench.datasets.images import Resizable, check_indices, convert

Split = Literal["test", "train"]

Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images [N, C, H, W] and labels [N] of one file, mapped into memory."""

_ROWS = 2048

UNATTACKED = 2000
"""The most images of the other split that a malicious server has."""


@dataclass(frozen=True)
class Stored(Resizable):
    """A dataset of two splits in the cache.

    Attributes:
        counts: number of images of each split.
        split: the split that is attacked. The mean is that of the other split.
    """

    counts: ClassVar[dict[str, int]]

    split: Split = "test"

    @classmethod
    @abstractmethod
    def parts(cls, split: Split) -> list[Part]:
        """Return the files of a split; each one's checksum is verified once in a process."""

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

    def unattacked(self) -> Tensor:
        """Return the first images of the split that is not attacked; see ``Dataset.unattacked``."""
        other = replace(self, split="train" if self.split == "test" else "test")
        return other.load(range(min(UNATTACKED, len(other))))[0]

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
