"""Folders of the user's own images, one subfolder a class, and ImageNet in that form."""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from leakbench.core.component import LATER
from leakbench.core.images import centre
from leakbench.datasets.base import Dataset, register
from leakbench.datasets.images import Channels, Size, check_indices, convert
from leakbench.errors import BadOption, CorruptAsset

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ATTACKED = ("val", "test")
PUBLIC = "train"

MEAN_IMAGES = 256
"""The mean is that of at most as many images of the training part, evenly spaced in the order of their names."""

_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Listing:
    """The contents of a folder.

    Attributes:
        classes: the names of the class folders, sorted.
        attacked: the images that may be attacked with their labels, in the order of their names.
        public: the images that the mean is taken of.
    """

    classes: tuple[str, ...]
    attacked: tuple[tuple[Path, int], ...]
    public: tuple[Path, ...]


@register("folder")
@dataclass(frozen=True)
class Folder(Dataset):
    """Images of your own, one subfolder a class: folder:PATH; scaled on the short side, then the centre square.

    The images are those of ``val`` or ``test`` if the folder has one of them, or all. The label of an image is the
    index of its folder's name among the sorted names of all class folders. The mean is that of at most 256 images of
    ``train``, evenly spaced in the order of their names; without a ``train`` folder it is the grey image 0.5. A folder
    is listed once in a process. Each file is one group, unless ``groups`` is given.

    Attributes:
        zoom: the shorter side is scaled to this many times the size before the centre square is cut out.
        path: the folder; its images are in class folders, or these are within train, val or test.
        size: the side of the images.
        channels: 1 for grey, 3 for RGB.
        groups: files whose names agree up to the first of these characters are one group (``Dataset.group``), in any
            class: with "_", p7_1.png and p7_2.png are. A name without them is its own group; none: each file is.
    """

    reference: ClassVar[str] = "the layout of torchvision's ImageFolder"

    zoom: ClassVar[float] = 1.0
    whole: ClassVar[bool] = True
    """Whether the fingerprint hashes the contents of the files, or only their sizes."""

    path: str
    size: Size = 32
    channels: Channels = 3
    groups: str = field(default="", metadata=LATER)

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return Path(self.path).expanduser()

    def listing(self) -> Listing:
        """Return the classes and images of the folder; raise BadOption if it has no image."""
        return _listing(self.folder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return self.channels, self.size, self.size

    @property
    def num_classes(self) -> int:
        """How many class folders there are."""
        return len(self.listing().classes)

    def __len__(self) -> int:
        """How many images may be attacked."""
        return len(self.listing().attacked)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] in [0, 1] and labels [N] at these indices; see ``Dataset.load``."""
        check_indices(f"{self.name}:{self.folder}", len(self), indices)
        chosen = [self.listing().attacked[index] for index in indices]
        images = torch.empty(len(chosen), *self.image_shape)
        for row, (file, _) in enumerate(chosen):
            images[row] = self._read(file)
        return images, torch.tensor([label for _, label in chosen], dtype=torch.int64)

    def group(self, index: int) -> int:
        """Return the index of the first image of the same group; raise BadOption if no file name has ``groups``."""
        check_indices(f"{self.name}:{self.folder}", len(self), [index])
        return _grouped(self.folder, self.groups)[index] if self.groups else index

    def mean(self) -> Tensor:
        """Return [C, H, W], the mean of images of ``train``, or the grey image 0.5 if there is no ``train``."""
        public = self.listing().public
        if not public:
            return torch.full(self.image_shape, 0.5)
        total = torch.zeros(self.image_shape, dtype=torch.float64)
        for file in public:
            total += self._read(file)
        return (total / len(public)).float()

    def settings(self) -> dict[str, Any]:
        """Return name, version and options, and a fingerprint of the data: names and contents of the files."""
        self.listing()
        return {**super().settings(), "fingerprint": _fingerprint(self.folder, self.whole)}

    def _read(self, file: Path) -> Tensor:
        try:
            pixels = np.array(centre(file, "RGB", (self.size, self.size), self.zoom))
        except Exception as error:  # a damaged or hostile file can make Pillow raise anything
            reason = type(error).__name__
            raise CorruptAsset(f"{file} cannot be read as an image ({reason}); repair or remove it") from None
        return convert(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, None, self.channels)[0]


@register("imagenet")
@dataclass(frozen=True)
class ImageNet(Folder):
    """ImageNet (ILSVRC 2012) from a folder of yours, which cannot be fetched: imagenet:PATH with class folders n*.

    The usual preparation: the short side is scaled to 256 for a size of 224 (in proportion for other sizes), then the
    centre square is cut out. Some of the classes suffice; labels then are indices among those.

    Attributes:
        path: the folder; class folders are named by WordNet ids (n01440764) and may be within train and val.
        size: the side of the images.
        channels: 1 for grey, 3 for RGB.
        groups: see ``folder``.
    """

    reference: ClassVar[str] = "Russakovsky et al. 2015, ImageNet Large Scale Visual Recognition Challenge, IJCV"

    zoom: ClassVar[float] = 256 / 224
    whole: ClassVar[bool] = False

    size: Size = 224

    def listing(self) -> Listing:
        """Return the classes and images of the folder; raise BadOption unless its class folders are ImageNet's."""
        listing = super().listing()
        for name in listing.classes:
            if not _WORDNET.fullmatch(name):
                raise BadOption(
                    f"the folder {str(self.folder)!r} holds {name!r}, which is not a WordNet id such as n01440764; "
                    f"sort ImageNet into class folders, or write folder:{self.path} for other images"
                )
        return listing


@functools.cache
def _listing(folder: Path) -> Listing:
    if not folder.is_dir():
        raise BadOption(
            f"the folder {str(folder)!r} does not exist; give a folder with one subfolder of images a class"
        )
    attacked = next((folder / name for name in ATTACKED if (folder / name).is_dir()), folder)
    public = folder / PUBLIC if attacked != folder and (folder / PUBLIC).is_dir() else None
    images = _images(attacked)
    others = _images(public) if public else []
    if not images:
        raise BadOption(f"the folder {str(attacked)!r} holds no image in a subfolder; make one subfolder a class")
    classes = tuple(sorted({file.parent.name for file in [*images, *others]}))
    labels = {name: label for label, name in enumerate(classes)}
    taken = min(len(others), MEAN_IMAGES)
    return Listing(
        classes=classes,
        attacked=tuple((file, labels[file.parent.name]) for file in images),
        public=tuple(others[number * len(others) // taken] for number in range(taken)),
    )


@functools.cache
def _grouped(folder: Path, end: str) -> list[int]:
    """Return for each attacked image the index of the first one whose name is the same up to ``end``."""
    files = [file for file, _ in _listing(folder).attacked]
    if not any(end in file.stem for file in files):
        raise BadOption(f"groups={end!r}: no image in {str(folder)!r} has {end!r} in its name; leave groups out")
    first: dict[str | Path, int] = {}
    names = [file.stem.partition(end)[0] if end in file.stem else file for file in files]
    return [first.setdefault(name, index) for index, name in enumerate(names)]


@functools.cache
def _fingerprint(folder: Path, whole: bool) -> str:
    """Return 16 hex digits: a hash of the names of a listing's files and of their contents, or else their sizes."""
    listing = _listing(folder)
    digest = hashlib.sha256("\n".join(listing.classes).encode("utf-8", "surrogateescape"))
    for file in dict.fromkeys([*(file for file, _ in listing.attacked), *listing.public]):
        digest.update(file.relative_to(folder).as_posix().encode("utf-8", "surrogateescape") + b"\t")
        try:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest() if whole else str(file.stat().st_size)
        except OSError as error:
            raise CorruptAsset(f"{file} cannot be read ({error.strerror}); repair or remove it") from None
        digest.update(content.encode() + b"\n")
    return digest.hexdigest()[:16]


def _images(folder: Path) -> list[Path]:
    """Return the image files in the subfolders of a folder, by class and then by name."""
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [
        file
        for entry in classes
        for file in sorted(entry.iterdir())
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
