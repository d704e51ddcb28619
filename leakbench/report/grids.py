"""``grids/*.png``: the private images beside the reconstructions of every attack."""

import itertools
import math
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import BboxImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox, TransformedBbox
from PIL import Image

from leakbench.analysis.summary import ANY, BLOCK, without_repeats
from leakbench.core.images import decoded
from leakbench.core.text import number, slug
from leakbench.metrics.members import LabelCounts
from leakbench.report.figure import GREY, RED, Drawing, spelled
from leakbench.store.records import Pictures, StoredMember

MAX_ROWS = 12
"""The number of images that are shown: the first ones by index."""

MAX_COLUMNS = 7
"""The number of reconstructions side by side; further ones go to another page."""

MAX_PIXEL_BYTES = 3_500_000
"""The size of all pixels (before enlarging and compressing) of a report's grids; the files then fit into 5 MB."""

MAX_PAGES = 60
"""About the number of pages of a report; a run with many seeds shows its first ones, and at least one."""

THUMBNAIL = 128
"""The longest side of a picture in pixels."""

_UNDER = ("psnr", "psnr_aligned")
LABEL_COUNTS = LabelCounts.name
"""Under the first image of a batch: the share of its labels that were inferred."""
_ALIGNED = (
    "Aligned: drawn after the best fit of brightness and contrast to the private image; as returned, the picture would "
    "show nothing."
)
_DPI = 128
_LETTER, _LINE = 7.3, 17  # the width of a letter and the height of a line in pixels, of the fixed-width font below
_FONT: Any = {"family": ["DejaVu Sans Mono", "DejaVu Sans"], "fontsize": 12 * 72 / _DPI, "parse_math": False}
_LABELS, _GAP, _GROUP_GAP, _MARGIN = 100, 10, 24, 14
_MIN_COLUMN, _MIN_PAGE = 120, 640


@dataclass(frozen=True)
class GridCell:
    """One reconstruction: its trial, its status, the numbers under it, and its scores in dB (``Pictures.drawn``)."""

    trial: str
    status: str
    caption: str
    scores: tuple[float, float]


@dataclass(frozen=True)
class Column:
    """The reconstructions of one attack behind one defense, by image."""

    attack: str
    defense: str
    cells: Mapping[int, GridCell]


@dataclass(frozen=True)
class GridPage:
    """One picture: some images of a block and seed in rows, some attacks and defenses in columns.

    Attributes:
        file: the file's name.
        title: the heading above the grid.
        seed: whose trials these are.
        legend: the meaning of the numbers under each reconstruction.
        firsts: the first images of batches of several, with the number of images that are shown of each.
        columns: neighbours of the same attack share a header.
    """

    block: tuple[str, str, str]
    file: str
    title: str
    seed: int
    legend: str
    images: tuple[int, ...]
    columns: tuple[Column, ...]
    firsts: Mapping[int, int] = field(default_factory=dict)

    @property
    def trials(self) -> list[str]:
        """The trials whose pictures are needed."""
        return [column.cells[i].trial for column in self.columns for i in self.images if i in column.cells]


BATCH = "batch"
"""The column of ``of_members`` with the first image of a batch; -1 for clients of one image."""


def of_members(results: pd.DataFrame, members: Mapping[str, Sequence[StoredMember]]) -> pd.DataFrame:
    """Return results in which each trial of a batch has a row for every image, with its own scores.

    The trials of these are named by the trial and the place of the image in the batch (``Store.images``).

    Args:
        results: of a run.
        members: of its batches, by trial.
    """
    if not members:
        return results
    rows: list[dict[Hashable, Any]] = []
    for row in results.to_dict("records"):
        own = members.get(str(row["trial"]))
        if own is None:
            rows.append({**row, BATCH: -1})
        for place, member in enumerate(own or ()):
            scores: dict[Hashable, Any] = {name: member.scores.get(name, math.nan) for name in _UNDER if name in row}
            named: dict[Hashable, Any] = {
                "trial": f"{row['trial']}/{place}",
                "image": member.image,
                BATCH: row["image"],
            }
            rows.append({**row, **scores, **named})
    return pd.DataFrame(rows)


def pages(results: pd.DataFrame, rows: int = MAX_ROWS) -> list[GridPage]:
    """Return the pages of the grids: one or more for every dataset, model, threat model and seed.

    If these are more than ``MAX_PAGES``, only the first seeds have pages, as many as fit and at least one.
    """
    once = _first_seeds(without_repeats(results))
    under = [name for name in _UNDER if name in once and once[name].notna().any()]
    numbers = f"Under each reconstruction: {' / '.join(under)} in dB. " if under else ""
    if LABEL_COUNTS in once and once[LABEL_COUNTS].notna().any():
        numbers += "Labels: the share of the batch's labels that the attack names rightly. "
    legend = f"{numbers}Red frame: the attack diverged."
    found: list[GridPage] = []
    for key, block in once.groupby([*BLOCK, "seed"], sort=False):
        dataset, model, threat, seed = (str(part) for part in key)
        images, firsts = _rows(block, rows)
        columns = _columns(block, images, under)
        chunks = _chunks(columns)
        for index, chunk in enumerate(chunks):
            part = f", page {index + 1} of {len(chunks)}" if len(chunks) > 1 else ""
            found.append(
                GridPage(
                    block=(dataset, model, threat),
                    file=f"{len(found) + 1:03}-{slug((dataset, model, threat))}-seed{seed}.png",
                    title=f"{dataset} · {model} · threat model {threat} · seed {seed}{part}",
                    seed=int(seed),
                    legend=legend,
                    images=images,
                    columns=chunk,
                    firsts=firsts,
                )
            )
    return found


def _rows(block: pd.DataFrame, rows: int) -> tuple[tuple[int, ...], dict[int, int]]:
    """Return the images that are shown, whole batches first, and the first ones of batches (``GridPage.firsts``)."""
    every = tuple(sorted(int(i) for i in block["image"].unique()))
    if BATCH not in block or (block[BATCH] < 0).all():
        return every[:rows], {}
    shown: tuple[int, ...] = ()
    firsts: dict[int, int] = {}
    for _, own in block[block[BATCH] >= 0].groupby(BATCH):
        images = list(dict.fromkeys(own.sort_values("trial", kind="stable")["image"].astype(int)))
        if shown and len(shown) + len(images) > rows:
            break
        shown += tuple(images[:rows])
        firsts[images[0]] = len(images[:rows])
    return shown, firsts


def _first_seeds(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of the seeds that have pages."""
    columns = results[[*BLOCK, "attack", "defense"]].drop_duplicates().groupby(list(BLOCK)).size()
    each = int(np.ceil(columns / MAX_COLUMNS).sum())
    seeds = sorted(results["seed"].unique())[: max(1, MAX_PAGES // max(1, each))]
    return results[results["seed"].isin(seeds)]


def rows_within(found: Sequence[GridPage], truths: Sequence[bytes | None], budget: int = MAX_PIXEL_BYTES) -> int:
    """Return how many images each page may show, so that all pages together stay within the budget of bytes.

    Args:
        truths: one PNG for each page, of the size that its images have; None if it is unknown.
    """
    shown = [(page, image) for page, truth in zip(found, truths) if (image := picture(truth)) is not None]
    row = sum(3 * image.width * image.height * (len(page.columns) + 1) for page, image in shown)
    return max(1, min(MAX_ROWS, budget // max(1, row)))


def figure(page: GridPage, pictures: Mapping[str, Pictures]) -> Figure:
    """Return a page as a figure: a row for each image, the private one first; every label lies inside.

    Lengths are in pixels, from the top left.
    """
    # Matplotlib's own layouts were tried: they scale pictures by fractions, which blurs or drops pixels, and let long
    # names run into each other. A fixed-width font makes the room that a label needs known beforehand.
    cells = [(i, cell) for column in page.columns for i, cell in column.cells.items() if cell.trial in pictures]
    drawn_as = {cell.trial: pictures[cell.trial].drawn(*cell.scores) for _, cell in cells}
    shown = {trial: picture(png) for trial, (png, _) in drawn_as.items()}
    aligned = {trial for trial, (_, fitted) in drawn_as.items() if fitted}
    truths = {i: picture(pictures[cell.trial].truth) for i, cell in cells}
    sizes = [_enlarged(image) for image in (*shown.values(), *truths.values()) if image is not None]
    wide, high = (max(sides) for sides in zip(*sizes)) if sizes else (THUMBNAIL, THUMBNAIL)
    column = max(wide, _MIN_COLUMN)
    groups = [list(group) for _, group in groupby(page.columns, key=lambda column: column.attack)]
    lefts, left = [], _MARGIN + _LABELS + column
    for group in groups:
        lefts.append([left + _GROUP_GAP + place * (column + _GAP) for place in range(len(group))])
        left = lefts[-1][-1] + column
    width = max(left + _MARGIN, _MIN_PAGE)

    words = f"{page.legend} {_ALIGNED}" if aligned else page.legend
    title, legend = _wrapped(page.title, width - 2 * _MARGIN), _wrapped(words, width - 2 * _MARGIN)
    heads = [_wrapped(group[0].attack, len(group) * (column + _GAP) - _GAP) for group in groups]
    names = [_wrapped(shown.defense, column) for shown in page.columns]
    rule = _MARGIN + _LINE * (len(title) + len(legend) + 1 + max(map(len, heads), default=1))
    top = rule + 12 + _LINE * max(map(len, names), default=1)
    captions = [cell.caption for _, cell in cells]
    step = high + (2 + any("\n" in caption for caption in captions)) * _LINE + 12
    height = top + step * len(page.images) + _MARGIN

    drawn = Drawing(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    text: Any = partial(drawn.text, **_FONT)
    text(_MARGIN / width, 1 - _MARGIN / height, "\n".join(title), va="top", fontweight="bold")
    text(_MARGIN / width, 1 - (_MARGIN + _LINE * len(title)) / height, "\n".join(legend), va="top", color=GREY)
    for head, xs in zip([["private image"], *heads], [[_MARGIN + _LABELS], *lefts]):
        ends, level = (xs[0] / width, (xs[-1] + column) / width), 1 - rule / height
        text(sum(ends) / 2, 1 - (rule - 6) / height, "\n".join(head), ha="center", va="bottom", fontweight="bold")
        drawn.add_artist(Line2D(ends, [level, level], color=GREY, linewidth=0.8))
    for row, i in enumerate(page.images):
        level = top + row * step
        label = "\n".join(_wrapped(f"image {i}", _LABELS))
        if i in page.firsts:
            label = f"batch of\n{label}"
            ends = (_MARGIN / width, 1 - _MARGIN / width)
            high_up = 1 - (level - (6 if row else 0)) / height
            drawn.add_artist(Line2D(ends, [high_up, high_up], color=GREY, linewidth=0.8))
        text((_MARGIN + _LABELS - 6) / width, 1 - (level + high / 2) / height, label, ha="right", va="center")
        _panel(drawn, truths.get(i), (_MARGIN + _LABELS, level, column, high))
        for left, name, own in zip(itertools.chain(*lefts), names, page.columns):
            cell, middle = own.cells.get(i), (left + column / 2) / width
            image, failed = (None, False) if cell is None else (shown.get(cell.trial), cell.status == "failed")
            bottom = _panel(drawn, image, (left, level, column, high), failed)
            if image is None:
                status = "not run" if cell is None else cell.status
                word = status if status in ("not run", "unsupported", "error") else "no picture"
                text(middle, 1 - (level + high / 2) / height, word, ha="center", va="center", color=GREY)
            note = "\ndiverged" if failed else "\naligned" if cell is not None and cell.trial in aligned else ""
            caption = "" if cell is None else f"{cell.caption}{note}"
            if caption:
                ink = RED if failed else "black"
                text(middle, 1 - (bottom + 4) / height, caption, ha="center", va="top", color=ink)
            if not row:
                text(middle, 1 - (level - 6) / height, "\n".join(name), ha="center", va="bottom")
    return drawn


def _panel(drawn: Figure, image: Image.Image | None, place: tuple[int, int, int, int], failed: bool = False) -> int:
    """Draw an image, enlarged by a whole factor, in the middle of a column; a grey area without one.

    Args:
        place: left, top, width and height of the area in pixels.
        failed: whether it has a red frame.

    Returns:
        The bottom of what is drawn, in pixels from the top.
    """
    # Axes for each picture would be the plainer way; they take most of the time that a report does.
    left, top, column, high = place
    width, height = drawn.bbox.width, drawn.bbox.height
    across, along = (min(column, high), high) if image is None else _enlarged(image)
    left += (column - across) // 2
    box = Bbox.from_bounds(left / width, 1 - (top + along) / height, across / width, along / height)
    area: Any = partial(Rectangle, box.p0, box.width, box.height, transform=drawn.transFigure)
    if image is None:
        drawn.add_artist(area(facecolor="#dddddd"))
    else:
        pixels = BboxImage(TransformedBbox(box, drawn.transFigure), interpolation="nearest", origin="upper")
        pixels.set_data(np.asarray(image))
        drawn.add_artist(pixels)
    if failed:
        drawn.add_artist(area(fill=False, edgecolor=RED, linewidth=2.5))
    return top + along


def _columns(block: pd.DataFrame, images: Sequence[int], under: Sequence[str]) -> list[Column]:
    """Return the columns of a block, attack by attack."""
    shown = block[block["image"].isin(images)]
    cells: dict[tuple[str, str], dict[int, GridCell]] = {}
    for row in shown.to_dict("records"):
        attack = f"{row['attack']} (floor)" if row["defense"] == ANY else str(row["attack"])
        values = [number(row[name], None if abs(row[name]) >= 1e4 else 1) for name in under]
        labels = ""
        if row["image"] == row.get(BATCH, -1) and row.get(LABEL_COUNTS, math.nan) == row.get(LABEL_COUNTS):
            labels = f"\nlabels {number(float(row[LABEL_COUNTS]), 2)}"
        scored = row["status"] in ("ok", "failed")
        scores = (float(row.get(_UNDER[0], math.nan)), float(row.get(_UNDER[1], math.nan)))
        cell = GridCell(str(row["trial"]), str(row["status"]), " / ".join(values) + labels if scored else "", scores)
        cells.setdefault((attack, str(row["defense"])), {})[int(row["image"])] = cell
    attacks = list(dict.fromkeys(attack for attack, _ in cells))
    return [Column(*key, found) for a in attacks for key, found in cells.items() if key[0] == a]


def _chunks(columns: Sequence[Column]) -> list[tuple[Column, ...]]:
    """Return the columns page by page; an attack is split only if it is too wide for a page."""
    found: list[list[Column]] = [[]]
    for _, same in groupby(columns, key=lambda column: column.attack):
        group = list(same)
        if len(found[-1]) + len(group) > MAX_COLUMNS and found[-1]:
            found.append([])
        even = math.ceil(len(group) / math.ceil(len(group) / MAX_COLUMNS))
        for start in range(0, len(group), even):
            if start:
                found.append([])
            found[-1] += group[start : start + even]
    return [tuple(page) for page in found if page]


def picture(data: bytes | None) -> Image.Image | None:
    """Return a PNG as an image, reduced by a whole factor if it is too large; None if there is none to read."""
    image = None if data is None else decoded(data)
    if image is None:
        return None
    return image.convert("RGB").reduce(math.ceil(max(image.size) / THUMBNAIL))


def _enlarged(image: Image.Image) -> tuple[int, int]:
    """Return the size in pixels at which an image is shown: a whole multiple of its own, without smoothing."""
    factor = max(1, THUMBNAIL // max(image.size))
    return image.width * factor, image.height * factor


def _wrapped(text: str, width: float) -> list[str]:
    """Return the text in lines that are no wider than this many pixels."""
    return textwrap.wrap(spelled(text), int(width / _LETTER)) or [""]
