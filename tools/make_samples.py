"""Make the sheets of leakbench/datasets/samples from photographs that ship with scikit-image.

``images.png`` holds the images that may be attacked, ``public.png`` the crops whose mean is public knowledge: no
public crop overlaps an attacked one. ``index.csv`` says where in its photograph each crop lies. Run it again with
``python tools/make_samples.py``; the choice depends on nothing but the photographs.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
from PIL import Image

SIDE = 32
COLUMNS = 8
TARGET = Path(__file__).parent.parent / "leakbench" / "datasets" / "samples"


class Box(NamedTuple):
    """A square of a photograph, in pixels."""

    x: int
    y: int
    side: int

    def meets(self, other: Box) -> bool:
        """Return whether two squares share a pixel."""
        return (
            self.x < other.x + other.side
            and other.x < self.x + self.side
            and self.y < other.y + other.side
            and other.y < self.y + self.side
        )


class Photo(NamedTuple):
    """A photograph: its file, the squares chosen by eye, and how many more, of what side, are chosen by contrast.

    The first square shows the subject; squares after it may lie within it. ``more`` and ``public`` are (count, side).
    """

    name: str
    file: str
    chosen: tuple[Box, ...]
    more: tuple[int, int]
    public: tuple[int, int]


PHOTOS = (
    Photo(
        "astronaut",
        "astronaut.png",
        (
            Box(150, 8, 144),  # the face
            Box(352, 8, 140),  # the shuttle
            Box(310, 335, 160),  # the helmet
            Box(120, 335, 100),  # the mission patch
            Box(130, 152, 140),  # the collar
            Box(0, 10, 100),  # the flag
            Box(270, 320, 64),  # the name tag
        ),
        (6, 64),
        (6, 56),
    ),
    Photo(
        "chelsea",
        "chelsea.png",
        (
            Box(105, 35, 260),  # the face
            Box(135, 80, 72),  # an eye
            Box(285, 95, 72),  # the other eye
            Box(222, 200, 84),  # the nose
        ),
        (4, 64),
        (4, 40),
    ),
    Photo(
        "coffee",
        "coffee.png",
        (
            Box(85, 5, 390),  # the cup on its saucer
            Box(170, 10, 240),  # the cup
            Box(310, 220, 120),  # the spoon
            Box(175, 210, 110),  # the handle
        ),
        (5, 80),
        (5, 64),
    ),
    Photo(
        "rocket",
        "rocket.jpg",
        (
            Box(210, 110, 290),  # the rocket between its masts
            Box(275, 120, 90),  # the tip
            Box(270, 270, 100),  # the foot
            Box(0, 150, 100),  # a mast
            Box(330, 320, 100),  # lights
        ),
        (2, 84),
        (4, 84),
    ),
    Photo(
        "retina",
        "retina.jpg",
        (
            Box(10, 380, 520),  # the optic disc and its vessels
            Box(120, 540, 220),  # the optic disc
        ),
        (6, 200),
        (4, 200),
    ),
    Photo(
        "camera",
        "camera.png",
        (
            Box(110, 35, 240),  # the photographer
            Box(150, 50, 110),  # the head
            Box(250, 120, 90),  # the camera
            Box(380, 100, 110),  # a tower
            Box(230, 290, 150),  # the tripod
        ),
        (4, 72),
        (4, 64),
    ),
    Photo(
        "hubble_deep_field",
        "hubble_deep_field.jpg",
        (),
        (10, 90),
        (5, 90),
    ),
)
"""The photographs, in the order of their class labels."""


def crop(photo: Image.Image, box: Box) -> Image.Image:
    """Return a square of a photograph, scaled down to the size of a sample."""
    bounds = (box.x, box.y, box.x + box.side, box.y + box.side)
    return photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=bounds)


def by_contrast(photo: Image.Image, count: int, side: int, taken: list[Box]) -> list[Box]:
    """Return the squares with the highest contrast that meet neither each other nor a taken one."""
    step = side // 6
    grid = [
        Box(x, y, side) for y in range(0, photo.height - side + 1, step) for x in range(0, photo.width - side + 1, step)
    ]
    free = [box for box in grid if not any(box.meets(other) for other in taken)]
    free.sort(key=lambda box: (-round(float(np.asarray(crop(photo, box), dtype=float).std()), 3), box))
    found: list[Box] = []
    for box in free:
        if len(found) < count and not any(box.meets(other) for other in found):
            found.append(box)
    if len(found) < count:
        raise SystemExit(
            f"{photo} has room for {len(found)} squares of side {side}, not {count}; choose a smaller side"
        )
    return found


def sheet(crops: list[Image.Image]) -> Image.Image:
    """Return crops in rows of eight."""
    rows = -(-len(crops) // COLUMNS)
    out = Image.new("RGB", (COLUMNS * SIDE, rows * SIDE))
    for number, image in enumerate(crops):
        out.paste(image, (number % COLUMNS * SIDE, number // COLUMNS * SIDE))
    return out


def main() -> None:
    """Write the two sheets and their index."""
    folder = Path(skimage.__file__).parent / "data"
    photos = [Image.open(folder / photo.file).convert("RGB") for photo in PHOTOS]
    attacked, public = [], []
    for known, photo in zip(PHOTOS, photos):
        chosen = [*known.chosen, *by_contrast(photo, *known.more, list(known.chosen))]
        attacked.append(chosen)
        public.append(by_contrast(photo, *known.public, chosen))
    rows = []
    for name, boxes in (("images", attacked), ("public", public)):
        # the first of each photograph, then the second of each, and so on
        turns = [(turn, label) for turn in range(max(map(len, boxes))) for label in range(len(boxes))]
        order = [(label, boxes[label][turn]) for turn, label in turns if turn < len(boxes[label])]
        sheet([crop(photos[label], box) for label, box in order]).save(TARGET / f"{name}.png", optimize=True)
        rows += [[name, number, label, PHOTOS[label].name, *box] for number, (label, box) in enumerate(order)]
    with (TARGET / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["sheet", "number", "label", "photograph", "x", "y", "side"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
