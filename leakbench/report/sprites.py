"""Many small pictures in few large ones, so that a page with a thousand of them stays small."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from leakbench.core.images import decoded

TILE_SIDE = 128
"""A picture with a longer side is reduced by a whole factor."""

SHEET_COLUMNS = SHEET_ROWS = 16


@dataclass(frozen=True)
class Sheet:
    """A picture of tiles of one size, in rows of ``SHEET_COLUMNS`` from the top left.

    Attributes:
        width: of a tile in pixels, as ``height``.
        png: the sheet.
    """

    width: int
    height: int
    png: bytes


def sheets(pictures: Iterable[bytes]) -> tuple[list[Sheet], list[tuple[int, int] | None]]:
    """Return the sheets, and for each picture its sheet and its place there; None for one that cannot be read.

    Args:
        pictures: PNGs; equal ones share a place.
    """
    order: list[bytes] = list(pictures)
    groups: dict[tuple[str, int, int], list[tuple[bytes, Image.Image]]] = {}
    for data in dict.fromkeys(order):
        image = tile(data)
        if image is not None:
            groups.setdefault((image.mode, *image.size), []).append((data, image))
    made: list[Sheet] = []
    places: dict[bytes, tuple[int, int]] = {}
    for (mode, width, height), group in groups.items():
        for start in range(0, len(group), SHEET_COLUMNS * SHEET_ROWS):
            block = group[start : start + SHEET_COLUMNS * SHEET_ROWS]
            rows = -(-len(block) // SHEET_COLUMNS)
            sheet = Image.new(mode, (min(len(block), SHEET_COLUMNS) * width, rows * height))
            for index, (data, image) in enumerate(block):
                sheet.paste(image, (index % SHEET_COLUMNS * width, index // SHEET_COLUMNS * height))
                places[data] = (len(made), index)
            made.append(Sheet(width, height, png(sheet)))
    return made, [places.get(data) for data in order]


def tile(data: bytes) -> Image.Image | None:
    """Return a picture as it is in a sheet: reduced if it is large, grey if it has no colour."""
    image = decoded(data)
    if image is None:
        return None
    image = image.convert("RGB")
    factor = -(-max(image.size) // TILE_SIDE)
    image = image.reduce(factor) if factor > 1 else image
    red, green, blue = (channel.tobytes() for channel in image.split())
    return image.convert("L") if red == green == blue else image


def png(image: Image.Image) -> bytes:
    """Return an image as PNG."""
    out = BytesIO()
    image.save(out, "png", optimize=True)
    return out.getvalue()
