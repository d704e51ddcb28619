"""MNIST and Fashion-MNIST, from the four idx files in the cache."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from leakbench import assets
from leakbench.datasets.base import register
from leakbench.datasets.stored import Part, Split, Stored
from leakbench.errors import CorruptAsset


def read_idx(file: Path) -> NDArray[np.uint8]:
    """Map an idx file of bytes into memory; raise CorruptAsset if its header and its size do not agree."""
    with file.open("rb") as opened:
        start = opened.read(16)
    dims = start[3] if len(start) >= 8 and start[:3] == b"\x00\x00\x08" else 0
    header = 4 + 4 * dims
    if dims in (1, 3) and len(start) >= header:
        sizes = struct.unpack(f">{dims}I", start[4:header])
        if file.stat().st_size == header + np.prod(sizes, dtype=np.int64):
            return np.memmap(file, np.uint8, "r", header, sizes)
    raise CorruptAsset(
        f"{file} is not an idx file of bytes; delete it and run `leakbench assets fetch {file.parent.name}`"
    )


@register("mnist")
@dataclass(frozen=True)
class MNIST(Stored):
    """Handwritten digits, 28 x 28 grey, 10 classes; attacked from the 10,000 test images by default."""

    reference: ClassVar[str] = "LeCun et al. 1998, Gradient-based learning applied to document recognition, Proc. IEEE"
    native: ClassVar[tuple[int, int, int]] = (1, 28, 28)
    classes: ClassVar[int] = 10
    counts: ClassVar[dict[str, int]] = {"train": 60000, "test": 10000}

    @classmethod
    def parts(cls, split: Split) -> list[Part]:
        """Return the split as its only part."""
        stem = "train" if split == "train" else "t10k"
        images = read_idx(assets.file(cls.name, f"{stem}-images-idx3-ubyte"))
        return [(images[:, None], read_idx(assets.file(cls.name, f"{stem}-labels-idx1-ubyte")))]


@register("fashion-mnist")
@dataclass(frozen=True)
class FashionMNIST(MNIST):
    """Articles of clothing, 28 x 28 grey, 10 classes; attacked from the 10,000 test images by default."""

    reference: ClassVar[str] = "Xiao, Rasul and Vollgraf 2017, Fashion-MNIST, arXiv 1708.07747"
