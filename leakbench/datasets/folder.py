"""Folders of the user's own images, one subfolder a class, and ImageNet in that form."""

import csv
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from leakbench.core.component import LATER
from leakbench.datasets.base import Dataset, register
from leakbench.datasets.images import Size, check_indices, sides
from leakbench.datasets.pixels import depth_note, read_image_file
from leakbench.errors import BadOption, CorruptAsset

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

ATTACKED = ("val", "valid", "validation", "test", "testing")
"""The names of subfolders whose images may be attacked, the first that exists; in any case, as the next."""
PUBLIC = ("train", "training")
"""The names of subfolders whose images are public."""

IGNORED = frozenset({"__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information"})
"""Folders, in lower case, that systems and archives leave behind; they and hidden ones are no classes."""

UNSORTED = frozenset({"images", "image", "imgs", "img"})
"""Folders, in lower case, that hold the images of all classes; a file beside them states the labels."""

LABEL_FILES = ("labels.csv", "labels.tsv", "labels.txt", "annotations.csv", "annotations.txt")
"""Files with a row FILE, CLASS for each image of a folder without class folders; or SPLIT_annotations.txt."""

_LABEL_COLUMNS = ("label", "labels", "class", "category", "target")

MEAN_IMAGES = 256
"""The mean is that of at most as many images of the training part, evenly spaced in the order of their names."""

_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Listing:
    """The contents of a folder.

    Attributes:
        classes: the names of the classes, sorted: those of the class folders, empty ones too, or of a label file.
        attacked: the images that may be attacked with their labels, in the order of their names.
        public: the images that the mean is taken of.
        split: the name of the subfolder of the attacked images; empty if the folder is not divided.
    """

    classes: tuple[str, ...]
    attacked: tuple[tuple[Path, int], ...]
    public: tuple[Path, ...]
    split: str = ""


@register("folder")
@dataclass(frozen=True)
class Folder(Dataset):
    """Images of your own, one subfolder a class: folder:PATH; scaled to cover the size, then the centre is cut out.

    The images are those of ``val``, ``valid``, ``validation``, ``test`` or ``testing``, the first of them that the
    folder has, or all. Every subfolder is a class, also an empty one; hidden folders and those that systems leave
    behind, such as ``__MACOSX``, are not. The label of an image is the index of its class among the sorted names of all
    classes. Folders within a class folder belong to the class. If the images are in no class folders, or all in
    ``images``, a file ``labels.csv`` (or ``val_annotations.txt``, as in TinyImageNet) states the file and the class of
    each.

    The mean is that of at most 256 images of ``train`` or ``training``, evenly spaced in the order of their names;
    without such a folder it is the grey image 0.5. A folder is listed once in a process. Each file is one
    group, unless ``groups`` is given.

    Grey pixels of 16 bits are divided by 65535, real numbers must be in [0, 1], and 16-bit colours keep their upper 8
    bits. Transparency is dropped and EXIF rotation is ignored, as by torchvision's ImageFolder.

    Attributes:
        zoom: the image is scaled to cover this many times the size before the centre is cut out.
        path: the folder; its images are in class folders, or these are within train, val or test.
        size: the side of the images, or HEIGHTxWIDTH.
        channels: 1 for grey, 3 for RGB, 4 for RGB with transparency.
        groups: files whose names agree up to the first of these characters are one group (``Dataset.group``), in any
            class: with "_", p7_1.png and p7_2.png are. A name without them is its own group; none: each file is.
    """

    reference: ClassVar[str] = "the layout of torchvision's ImageFolder"

    zoom: ClassVar[float] = 1.0
    whole: ClassVar[bool] = True
    """Whether the fingerprint hashes the contents of the files, or only their sizes."""

    path: str
    size: Size = 32
    channels: Literal[1, 3, 4] = 3
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
        return self.channels, *sides(self.size)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
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

    def note(self) -> str:
        """Return how images of more than 8 bits are read, if there are any."""
        listing = self.listing()
        return depth_note([*(file for file, _ in listing.attacked), *listing.public])

    def mean(self) -> Tensor:
        """Return [C, H, W], the mean of images of ``train``, or the grey image 0.5 if there is no ``train``."""
        public = self.listing().public
        if not public:
            return torch.full(self.image_shape, 0.5)
        total = torch.zeros(self.image_shape, dtype=torch.float64)
        for file in public:
            total += self._read(file)
        return (total / len(public)).float()

    def unattacked(self) -> Tensor:
        """Return the images of ``train`` of which the mean is, or the crops of photographs if there is no ``train``."""
        public = self.listing().public
        return torch.stack([self._read(file) for file in public]) if public else super().unattacked()

    def settings(self) -> dict[str, Any]:
        """Return name, version and options, and a fingerprint of the data: names and contents of the files."""
        self.listing()
        return {**super().settings(), "fingerprint": _fingerprint(self.folder, self.whole, Path.cwd())}

    def _read(self, file: Path) -> Tensor:
        return read_image_file(file, self.image_shape, self.zoom)


@register("imagenet")
@dataclass(frozen=True)
class ImageNet(Folder):
    """ImageNet (ILSVRC 2012) from a folder of yours, which cannot be fetched: imagenet:PATH with class folders n*.

    The usual preparation: the short side is scaled to 256 for a size of 224 (in proportion for other sizes), then the
    centre square is cut out. Some of the classes suffice; labels then are indices among those.

    Attributes:
        path: the folder; class folders are named by WordNet ids (n01440764) and may be within train and val.
        size: the side of the images, or HEIGHTxWIDTH.
        channels: 1 for grey, 3 for RGB, 4 for RGB with transparency.
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


def _listing(folder: Path) -> Listing:
    return _listed(folder, Path.cwd())


@functools.cache
def _listed(folder: Path, place: Path) -> Listing:
    """Return the listing of a folder, which is relative to the current folder ``place``."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        arrays = f", or write npz:{folder}" if folder.suffix == ".npz" else ""
        raise BadOption(
            f"the folder {str(folder)!r} {what}; give a folder with one subfolder of images a class{arrays}"
        )
    attacked, public = _divided(folder)
    images, classes = _labelled(attacked)
    others, more = _labelled(public) if public else ([], set())
    if not images:
        raise BadOption(
            f"the folder {str(attacked)!r} holds no image in a subfolder ({', '.join(SUFFIXES)}); make one subfolder a "
            "class"
        )
    names = tuple(sorted(classes | more))
    labels = {name: label for label, name in enumerate(names)}
    taken = min(len(others), MEAN_IMAGES)
    return Listing(
        classes=names,
        attacked=tuple((file, labels[name]) for file, name in images),
        public=tuple(others[number * len(others) // taken][0] for number in range(taken)),
        split=attacked.name if attacked != folder else "",
    )


def _divided(folder: Path) -> tuple[Path, Path | None]:
    """Return the folders of the attacked and of the public images: its splits, or the folder itself and none.

    Raises:
        BadOption: the only split is that of the public images.
    """
    named = {entry.name.lower(): entry for entry in reversed(_folders(folder))}
    public = next((named[name] for name in PUBLIC if name in named), None)
    attacked = next((named[name] for name in ATTACKED if name in named), None)
    only_splits = named.keys() <= {*ATTACKED, *PUBLIC}
    if attacked is not None and (only_splits or _folders(attacked) or _label_file(attacked)):
        return attacked, public
    if public is not None and only_splits:
        raise BadOption(
            f"the folder {str(folder)!r} has only the split {public.name!r}; write folder:{public} to attack its "
            f"images, or add one of {', '.join(ATTACKED)}"
        )
    return folder, None


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in IGNORED


def _folders(folder: Path) -> list[Path]:
    """Return the visible subfolders of a folder, by name."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and _visible(entry.name))
    except OSError as error:
        raise BadOption(f"the folder {str(folder)!r} cannot be listed ({error.strerror}); make it readable") from None


def _images(folder: Path) -> list[Path]:
    """Return the visible image files in a folder and in the folders within it, by name."""
    found, walked = [], {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True):
        new = {name: os.path.realpath(os.path.join(root, name)) for name in folders if _visible(name)}
        folders[:] = [name for name, real in new.items() if real not in walked]
        walked.update(new.values())
        found += [Path(root, name) for name in files if _visible(name) and Path(name).suffix.lower() in SUFFIXES]
    return sorted(file for file in found if file.is_file())


def _labelled(part: Path) -> tuple[list[tuple[Path, str]], set[str]]:
    """Return the images of a folder with their classes, by class and then by name, and all classes."""
    classes = _folders(part)
    if any(entry.name.lower() not in UNSORTED for entry in classes):
        return [(file, entry.name) for entry in classes for file in _images(entry)], {entry.name for entry in classes}
    images = _images(part)
    file = _label_file(part)
    if file is None and images:
        named = f", the split {part.name!r}," if part.name.lower() in (*ATTACKED, *PUBLIC) else ""
        raise BadOption(
            f"the folder {str(part)!r}{named} holds images that are in no class folder; make one subfolder a class, or "
            "add labels.csv with a row FILE,CLASS for each image"
        )
    if file is None:
        return [], {entry.name for entry in classes}
    labels = _stated_labels(file, images)
    return sorted(labels.items(), key=lambda one: (one[1], one[0])), set(labels.values())


def _label_file(part: Path) -> Path | None:
    """Return the file that states the classes of the images in a folder."""
    names = (f"{part.name.lower()}_annotations.txt", *LABEL_FILES)
    return next((part / name for name in names if (part / name).is_file()), None)


def _stated_labels(file: Path, images: Sequence[Path]) -> dict[Path, str]:
    """Return the class that a label file states for each image; it may state more.

    Raises:
        BadOption: the file cannot be read, or states no class or two classes for an image.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        split = "\t" if any("\t" in line for line in lines) else "," if any("," in line for line in lines) else " "
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=split) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadOption(
            f"the label file {str(file)!r} cannot be read ({type(error).__name__}); write rows FILE,CLASS in UTF-8"
        ) from None
    head = [cell.lower() for cell in rows[0]] if rows else []
    column = next((head.index(name) for name in _LABEL_COLUMNS if name in head[1:]), 1)
    known: dict[str, set[str]] = {}
    for row in rows:
        if len(row) > column and row[column]:
            known.setdefault(row[0], set()).add(row[column])
    labels = {}
    for image in images:
        names = (image.relative_to(file.parent).as_posix(), image.name, image.stem)
        stated = next((known[name] for name in names if name in known), set())
        if len(stated) != 1:
            problem = f"{len(stated)} classes for" if stated else "no class for"
            raise BadOption(f"{str(file)!r} states {problem} {image.name!r}; write one row FILE,CLASS for each image")
        labels[image] = stated.pop()
    return labels


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
def _fingerprint(folder: Path, whole: bool, place: Path) -> str:
    """Return 16 hex digits: a hash of the names of a listing's files and of their contents, or else their sizes.

    The folder is relative to the current folder ``place``.
    """
    listing = _listing(folder)
    digest = hashlib.sha256("\n".join(listing.classes).encode("utf-8", "surrogateescape"))
    labels = {file: listing.classes[label] for file, label in listing.attacked}
    for file in dict.fromkeys([*labels, *listing.public]):
        name = file.relative_to(folder)
        if labels.get(file, name.parts[0]) not in name.parts[:-1]:  # the label is not in the path: a file states it
            digest.update(labels[file].encode("utf-8", "surrogateescape") + b"\t")
        digest.update(name.as_posix().encode("utf-8", "surrogateescape") + b"\t")
        try:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest() if whole else str(file.stat().st_size)
        except OSError as error:
            raise CorruptAsset(f"{file} cannot be read ({error.strerror}); repair or remove it") from None
        digest.update(content.encode() + b"\n")
    return digest.hexdigest()[:16]
