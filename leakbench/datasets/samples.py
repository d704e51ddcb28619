"""The images that ship with leakbench."""

import csv
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from leakbench.datasets.base import register
from leakbench.datasets.images import Resizable, check_indices, convert
from leakbench.errors import CorruptAsset

FOLDER = Path(__file__).parent / "samples"
SIDE = 32
COUNT = 64


@register("samples")
@dataclass(frozen=True)
class Samples(Resizable):
    """64 crops, 32 x 32 colour, of 7 photographs in the public domain; they ship with leakbench.

    The class of an image is its photograph. The mean is that of 32 other crops of the same photographs, which do not
    overlap the 64.

    Attributes:
        size: the side of the images, resized bilinearly with antialiasing; none keeps 32.
        channels: 1 for grey, 3 for RGB; none keeps RGB.
    """

    reference: ClassVar[str] = "photographs of scikit-image; authors and licences in samples/CREDITS.md of the package"
    native: ClassVar[tuple[int, int, int]] = (3, SIDE, SIDE)
    classes: ClassVar[int] = 7

    def __len__(self) -> int:
        """How many images there are."""
        return COUNT

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1] and labels [N] at these indices; see ``Dataset.load``."""
        check_indices(self.name, len(self), indices)
        images, labels = _sheet("images")
        rows = torch.tensor(list(indices), dtype=torch.int64)
        return convert(images[rows], self.size, self.channels), labels[rows]

    def group(self, index: int) -> int:
        """Return the number of the photograph that a crop is from, which is its label."""
        check_indices(self.name, len(self), [index])
        return _labels("images")[index]

    def note(self) -> str:
        """Return that the crops are not independent."""
        return (
            f"These images are crops of {self.classes} photographs, and crops of one photograph are alike. Each "
            "photograph is a group: intervals and tests count groups as independent, not images. CIFAR-10 has no such "
            "groups."
        )

    def mean(self) -> Tensor:
        """Return [C, H, W], the mean of the public crops."""
        images, _ = _sheet("public")
        return convert(images.mean(0, keepdim=True), self.size, self.channels)[0]


def public_crops(image_shape: tuple[int, int, int]) -> Tensor:
    """Return the 32 images [32, C, H, W] in [0, 1] that no dataset has, at another size and with other channels."""
    return _resized(_sheet("public")[0], image_shape)


def crops(image_shape: tuple[int, int, int]) -> Tensor:
    """Return the 64 images [64, C, H, W] in [0, 1] at another size, square or not, and with other channels."""
    return _resized(_sheet("images")[0], image_shape)


def _resized(images: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Return images [N, C, H, W] in [0, 1] at another size and with other channels."""
    channels, *size = image_shape
    images = convert(images, None, channels)
    if size != list(images.shape[2:]):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(0, 1)


@functools.cache
def _labels(name: Literal["images", "public"]) -> list[int]:
    """Return the labels of a sheet's crops."""
    try:
        with (FOLDER / "index.csv").open(newline="") as file:
            return [int(row["label"]) for row in csv.DictReader(file) if row["sheet"] == name]
    except (OSError, ValueError, KeyError) as error:
        raise CorruptAsset(f"{FOLDER} is damaged ({error}); install leakbench anew") from None


@functools.cache
def _sheet(name: Literal["images", "public"]) -> tuple[Tensor, Tensor]:
    """Return a sheet's crops [N, 3, 32, 32] in [0, 1] and their labels [N]."""
    labels = _labels(name)
    try:
        with Image.open(FOLDER / f"{name}.png") as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise CorruptAsset(f"{FOLDER} is damaged ({error}); install leakbench anew") from None
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    crops = pixels.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, *Samples.native)
    return torch.from_numpy(crops[: len(labels)]).float() / 255, torch.tensor(labels)
