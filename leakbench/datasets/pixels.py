"""Image files as numbers in [0, 1]: the one conversion of every image that a user gives as a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from leakbench.core.images import IMAGE_FORMATS, centre
from leakbench.datasets.images import convert
from leakbench.errors import CorruptAsset

NOTED, BRIGHTEST = 256, 8
"""The most files whose depth a note looks at, and the most in which it looks for the brightest pixel."""

_PHOTOMETRIC, _BITS = 262, 258
"""The tags of a TIFF file that say which end of the scale is black, and how many bits a value has."""


@dataclass(frozen=True)
class Depth:
    """How the pixels of a file are stored.

    Attributes:
        words: in words; empty for at most 8 bits.
        white: the value that becomes 1.
        inverted: whether 0 is white.
        reduced: whether the file is read at 8 bits although it has more.
    """

    words: str = ""
    white: float = 255.0
    inverted: bool = False
    reduced: bool = False

    @property
    def deep(self) -> bool:
        """Whether the values are read as real numbers, because 8 bits would not hold them."""
        return bool(self.words) and not self.reduced


def read_image_file(file: Path, image_shape: tuple[int, int, int], zoom: float = 1.0, words: str = "") -> Tensor:
    """Return [C, H, W] in [0, 1]: an image, scaled until it covers H x W, its centre cut out.

    Grey pixels of 16 bits are divided by the largest value of their type, and real numbers are taken as they are.
    Colours of 16 bits keep their upper 8 bits. As torchvision's ``ImageFolder`` does, transparency is dropped (C = 4
    keeps it), and a rotation that EXIF data asks for is not made.

    Args:
        file: the image.
        image_shape: (C, H, W), C = 1, 3 or 4.
        zoom: the image is scaled to cover this many times H x W.
        words: what errors call the file; its path by default.

    Raises:
        CorruptAsset: the file is no image, or the range of its pixels is not known.
    """
    channels, height, width = image_shape
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as opened:
            depth = depth_of(opened)
            image = opened.convert("F" if depth.deep else "RGBA" if channels == 4 else "RGB")
        if depth.white == 1:
            _check_range(image)
        values = np.array(centre(image, (width, height), zoom))
    except CorruptAsset as error:
        raise CorruptAsset(f"{words or file} {error}") from None
    except Exception as error:  # a damaged or hostile file can make Pillow raise anything
        raise CorruptAsset(
            f"{words or file} cannot be read as an image ({type(error).__name__}); repair or remove it"
        ) from None
    pixels = torch.from_numpy(values).float() / depth.white
    pixels = 1 - pixels if depth.inverted else pixels
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if channels == 4 and len(pixels) == 1:
        return torch.cat([pixels.expand(3, -1, -1), torch.ones_like(pixels)])
    return convert(pixels[None], None, channels)[0]


def depth_of(image: Image.Image) -> Depth:
    """Return how the pixels of an opened image are stored.

    Raises:
        CorruptAsset: the range of their values is not known; the message is a predicate of the file.
    """
    raw = str(image.tile[0].args) if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    inverted = tags.get(_PHOTOMETRIC) == 0
    if image.mode.startswith("I;16"):
        bits = int(np.ravel(tags.get(_BITS, 16))[0])
        return Depth(f"{bits}-bit grey", 2.0**bits - 1, inverted)
    if image.mode == "I":
        if image.format in ("PNG", "PPM"):  # Pillow scales these to 16 bits
            return Depth("16-bit grey", 2.0**16 - 1)
        raise CorruptAsset(
            "holds integers that are signed or have 32 bits, of unknown range; save it as 8 or 16-bit PNG"
        )
    if image.mode == "F":
        return Depth("real-valued grey", 1.0, inverted)
    if "16" in raw:
        return Depth("16-bit colour", reduced=True)
    return Depth()


def _check_range(image: Image.Image) -> None:
    """Raise CorruptAsset unless the values of a real-valued image are in [0, 1]."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise CorruptAsset(f"holds real values from {low:g} to {high:g}; scale them to [0, 1], or save it as 8-bit PNG")


def depth_note(files: Sequence[Path]) -> str:
    """Return a line on files whose pixels have more than 8 bits; empty if there is none among those looked at.

    Args:
        files: the images of a dataset; at most ``NOTED`` of them, evenly spaced, are looked at.
    """
    found: dict[str, list[Path]] = {}
    depths: dict[str, Depth] = {}
    taken = min(len(files), NOTED)
    for file in (files[number * len(files) // taken] for number in range(taken)):
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as opened:
                depth = depth_of(opened)
        except Exception:  # whoever reads the image is told
            continue
        if depth.words:
            found.setdefault(depth.words, []).append(file)
            depths[depth.words] = depth
    return " ".join(_depth_line(depths[words], deep, taken) for words, deep in found.items())


def _depth_line(depth: Depth, files: Sequence[Path], looked: int) -> str:
    """Return what is done with the files of a depth."""
    count = f"{len(files)} of the {looked} image files that were looked at hold {depth.words} pixels"
    if depth.reduced:
        return f"{count}: their upper 8 bits are read."
    if depth.white == 1:
        return f"{count}: the values are taken as they are, 0 as black and 1 as white."
    brightest = 0.0
    for file in files[:: max(1, len(files) // BRIGHTEST)][:BRIGHTEST]:
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as opened:
                brightest = max(brightest, float(np.asarray(opened.convert("F")).max()))
        except Exception:  # as above
            continue
    dark = "; rescale the files if the network was trained on brighter images" if brightest < depth.white / 2 else ""
    return (
        f"{count}, read as value / {depth.white:.0f}: the largest value found is {brightest:.0f}, which becomes "
        f"{brightest / depth.white:.2g} of 1{dark}."
    )
