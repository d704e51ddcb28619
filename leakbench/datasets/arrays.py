"""Images in a NumPy file: ``.npz`` with images and labels, as MedMNIST distributes its datasets."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leakbench.core.component import Count
from leakbench.datasets.base import Dataset, register
from leakbench.datasets.folder import ATTACKED, MEAN_IMAGES, PUBLIC
from leakbench.datasets.images import Size, check_indices, convert, sides
from leakbench.errors import BadOption, CorruptAsset

SUFFIXES = (".npz", ".npy")

_NAMES = (("images", "labels"), ("x", "y"), ("data", "labels"), ("arr_0", "arr_1"))
"""The names of the two arrays, without those of a split before (``test_images``) or behind (``x_test``) them."""


@dataclass(frozen=True)
class Arrays:
    """The content of a file.

    Attributes:
        images: [N, C, H, W] as stored; they may be attacked.
        labels: [N] int64.
        public: [M, C, H, W] as stored, or none.
        white: the stored value that is 1.
        classes: one more than the largest label of all splits.
    """

    images: NDArray[Any]
    labels: NDArray[np.int64]
    public: NDArray[Any]
    white: float
    classes: int


@register("npz")
@dataclass(frozen=True)
class Npz(Dataset):
    """Images and labels in a NumPy file: npz:FILE; arrays images and labels, with or without the name of a split.

    The arrays are ``images`` and ``labels`` (or ``x`` and ``y``), or those of ``val`` or ``test`` as MedMNIST names
    them: ``val_images`` and ``val_labels``. Images are [N, H, W], [N, H, W, C] or [N, C, H, W]: whole numbers of 8 or
    16 bits from 0, or real numbers in [0, 1]. Labels are [N] or [N, 1], whole numbers from 0. The mean is that of at
    most 256 evenly spaced images of ``train``; without them it is the grey image 0.5. Pickled objects are not read.

    Attributes:
        path: the file.
        size: the side of the images, or HEIGHTxWIDTH, covered bilinearly with antialiasing and cut at the centre; none
            keeps their own.
        channels: 1 for grey, 3 for RGB; none keeps their own.
    """

    reference: ClassVar[str] = "Yang et al. 2023, MedMNIST v2, Scientific Data 10, 41 (the names of the arrays)"

    path: str
    size: Size | None = None
    channels: Count | None = None

    @property
    def _arrays(self) -> Arrays:
        return _read(Path(self.path).expanduser())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, *native = self._arrays.images.shape[1:]
        height, width = native if self.size is None else sides(self.size)
        wanted = self.channels or channels
        if wanted != channels and not {wanted, channels} <= {1, 3}:
            raise BadOption(
                f"{self.path!r} has images of {channels} channels, and {wanted} are wanted; save it with these"
            )
        return wanted, height, width

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return self._arrays.classes

    def __len__(self) -> int:
        """How many images may be attacked."""
        return len(self._arrays.labels)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1] and labels [N] at these indices; see ``Dataset.load``."""
        check_indices(f"{self.name}:{self.path}", len(self), indices)
        rows = list(indices)
        return self._converted(self._arrays.images[rows]), torch.from_numpy(self._arrays.labels[rows])

    def mean(self) -> Tensor:
        """Return [C, H, W], the mean of images of ``train``, or the grey image 0.5 if there are none."""
        public = self._public()
        return public.mean(0) if len(public) else torch.full(self.image_shape, 0.5)

    def unattacked(self) -> Tensor:
        """Return the images of ``train`` of which the mean is, or the crops of photographs if there are none."""
        public = self._public()
        return public if len(public) else super().unattacked()

    def settings(self) -> dict[str, Any]:
        """Return name, version and options, and the SHA-256 of the file."""
        return {**super().settings(), "fingerprint": _fingerprint(Path(self.path).expanduser())}

    def _public(self) -> Tensor:
        """Return [P, C, H, W], evenly spaced images of ``train``."""
        public = self._arrays.public
        taken = min(len(public), MEAN_IMAGES)
        return self._converted(public[[number * len(public) // taken for number in range(taken)]])

    def _converted(self, stored: NDArray[Any]) -> Tensor:
        shape = self.image_shape
        images = torch.from_numpy(stored.astype(np.float32) / np.float32(self._arrays.white))
        return convert(images, None if self.size is None else self.size, shape[0])


@functools.cache
def _fingerprint(file: Path) -> str:
    _check_exists(file)
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise BadOption(f"the file {str(file)!r} does not exist; give an .npz file with images and labels")


@functools.cache
def _read(file: Path) -> Arrays:
    """Return the content of a file.

    Raises:
        BadOption: the file does not exist, or has no such arrays.
        CorruptAsset: it cannot be read as plain arrays.
    """
    _check_exists(file)
    try:
        opened = np.load(file, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise BadOption(
                f"{str(file)!r} holds one array and no labels; save both: numpy.savez('a.npz', images=x, labels=y)"
            )
        with opened:
            stored = {name: np.array(opened[name]) for name in opened.files}
    except BadOption:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        raise CorruptAsset(
            f"{str(file)!r} cannot be read as plain arrays ({type(error).__name__}); save it with numpy.savez"
        ) from None
    pairs = {split: pair for split in ("", *ATTACKED, *PUBLIC) if (pair := _pair(stored, split))}
    attacked = next((pairs[split] for split in ("", *ATTACKED) if split in pairs), None)
    if attacked is None:
        found = ", ".join(sorted(stored)[:6]) or "none"
        raise BadOption(
            f"{str(file)!r} has no arrays of images and labels (found: {found}); name them images and labels, or "
            "test_images and test_labels"
        )
    public = next((pairs[split] for split in PUBLIC if split in pairs), None)
    images, white = _images(attacked[0], file)
    labels = [_labels(own, file) for _, own in pairs.values()]
    if len(images) != len(attacked[1]) or not len(images):
        raise BadOption(
            f"{str(file)!r} has {len(images)} images and {len(attacked[1])} labels; give one for each, of one"
        )
    return Arrays(
        images,
        _labels(attacked[1], file),
        images[:0] if public is None else _images(public[0], file)[0],
        white,
        1 + max(int(own.max()) for own in labels if len(own)),
    )


def _pair(stored: Mapping[str, NDArray[Any]], split: str) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Return images and labels of a split, by their names; None if there are none."""
    by_name = {name.lower(): value for name, value in stored.items()}
    for images, labels in _NAMES:
        for shape in ("{0}_{1}", "{1}_{0}") if split else ("{1}",):
            names = shape.format(split, images), shape.format(split, labels)
            if all(name in by_name for name in names):
                return by_name[names[0]], by_name[names[1]]
    return None


def _images(stored: NDArray[Any], file: Path) -> tuple[NDArray[Any], float]:
    """Return images [N, C, H, W] as stored, and the value that is 1."""
    if stored.ndim == 3:
        stored = stored[:, None]
    elif stored.ndim == 4 and stored.shape[3] < min(stored.shape[1:3]):
        stored = np.moveaxis(stored, 3, 1)
    elif stored.ndim != 4 or stored.shape[1] >= min(stored.shape[2:]):
        raise BadOption(
            f"{str(file)!r} has images of shape {stored.shape}; give [N, H, W], [N, H, W, C] or [N, C, H, W] with "
            "fewer channels than pixels a side"
        )
    if stored.dtype in (np.uint8, np.uint16):
        return stored, float(np.iinfo(stored.dtype).max)
    if stored.dtype == np.bool_:
        return stored, 1.0
    if not np.issubdtype(stored.dtype, np.floating):
        raise BadOption(
            f"{str(file)!r} has images of type {stored.dtype}; give uint8, uint16, or real numbers in [0, 1]"
        )
    low, high = (float(stored.min()), float(stored.max())) if stored.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise BadOption(f"{str(file)!r} has images of real numbers from {low:g} to {high:g}; scale them to [0, 1]")
    return stored, 1.0


def _labels(stored: NDArray[Any], file: Path) -> NDArray[np.int64]:
    """Return labels [N], which are whole numbers from 0."""
    flat = stored[:, 0] if stored.ndim == 2 and stored.shape[1] == 1 else stored
    if flat.ndim != 1:
        raise BadOption(
            f"{str(file)!r} has labels of shape {stored.shape}; give one label for each image, [N]: several labels an "
            "image are not served"
        )
    numeric = np.issubdtype(flat.dtype, np.number) and not np.issubdtype(flat.dtype, np.complexfloating)
    if not numeric or bool((flat != np.floor(flat)).any()) or bool((flat < 0).any()):
        raise BadOption(f"{str(file)!r} has labels that are no whole numbers from 0 ({flat.dtype}); number the classes")
    return flat.astype(np.int64)
