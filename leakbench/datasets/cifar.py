"""CIFAR-10 and CIFAR-100, from the binary versions in the cache."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from leakbench import assets
from leakbench.datasets.base import register
from leakbench.datasets.stored import Part, Split, Stored

PIXELS = 3 * 32 * 32

_REFERENCE = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images, technical report, Toronto"


def read_records(file: Path, labels: int) -> Part:
    """Map records of ``labels`` label bytes and 3072 pixel bytes into memory; the last label is the class."""
    records = np.memmap(file, np.uint8, "r").reshape(-1, labels + PIXELS)
    return records[:, labels:].reshape(-1, 3, 32, 32), records[:, labels - 1]


@register("cifar10")
@dataclass(frozen=True)
class CIFAR10(Stored):
    """Photographs, 32 x 32 colour, 10 classes; attacked from the 10,000 test images by default."""

    reference: ClassVar[str] = _REFERENCE
    native: ClassVar[tuple[int, int, int]] = (3, 32, 32)
    classes: ClassVar[int] = 10
    counts: ClassVar[dict[str, int]] = {"train": 50000, "test": 10000}

    @classmethod
    def parts(cls, split: Split) -> list[Part]:
        """Return the one batch of the test split, or the five of the training split."""
        names = ["test_batch"] if split == "test" else [f"data_batch_{number}" for number in range(1, 6)]
        return [read_records(assets.file("cifar10", f"{name}.bin"), labels=1) for name in names]


@register("cifar100")
@dataclass(frozen=True)
class CIFAR100(CIFAR10):
    """Photographs, 32 x 32 colour, 100 classes (the fine labels); from the 10,000 test images by default."""

    reference: ClassVar[str] = _REFERENCE
    classes: ClassVar[int] = 100

    @classmethod
    def parts(cls, split: Split) -> list[Part]:
        """Return the split as its only part."""
        return [read_records(assets.file("cifar100", f"{split}.bin"), labels=2)]
