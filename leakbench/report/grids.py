"""``grids/*.png``: the private images beside what every attack made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from leakbench.analysis.summary import ANY, BLOCK, without_repeats
from leakbench.core.images import decoded
from leakbench.core.text import number
from leakbench.store.records import Pictures

ROWS = 12
"""At most so many images are shown: the first ones by index."""

COLUMNS = 7
"""At most so many reconstructions stand beside each other; more go to another page."""

BUDGET = 3_500_000
"""So many bytes of pixels (before enlarging and compressing) all grids of a report may show; they then fit 5 MB."""

PAGES = 60
"""About so many pages a report has; a run with many seeds shows its first ones, and at least one."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the lines of all figures: Okabe and Ito's, which all can tell apart."""

THUMBNAIL = 128
_UNDER = ("psnr", "psnr_aligned")
_DPI = 128
_GAP, _GROUP_GAP, _MARGIN, _LABELS = 10, 22, 14, 90
_NARROWEST_COLUMN, _NARROWEST_PAGE = 120, 640
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_RED, _GREY = "#c40000", "#666666"


@dataclass(frozen=True)
class Font:
    """A font that comes with Matplotlib, its height and the distance of its lines in pixels."""

    file: str
    height: int
    line: int

    @property
    def properties(self) -> FontProperties:
        """The font as Matplotlib knows it."""
        return FontProperties(fname=str(_FONTS / self.file), size=self.height * 72 / _DPI)


_REGULAR = Font("DejaVuSans.ttf", 14, 18)
_BOLD = Font("DejaVuSans-Bold.ttf", 14, 18)
_TITLE = Font("DejaVuSans-Bold.ttf", 17, 23)


@dataclass(frozen=True)
class Cell:
    """One reconstruction: its trial, its status and the numbers under it."""

    trial: str
    status: str
    caption: str


@dataclass(frozen=True)
class Column:
    """The reconstructions of one attack behind one defense, by image."""

    attack: str
    defense: str
    cells: Mapping[int, Cell]


@dataclass(frozen=True)
class Page:
    """One picture: some images of a block and seed in rows, some attacks and defenses in columns.

    Attributes:
        file: the file's name.
        title: what it shows.
        seed: whose trials these are.
        legend: what stands under each reconstruction.
        columns: neighbours of the same attack share a header.
    """

    block: tuple[str, str, str]
    file: str
    title: str
    seed: int
    legend: str
    images: tuple[int, ...]
    columns: tuple[Column, ...]

    @property
    def trials(self) -> list[str]:
        """The trials whose pictures are needed."""
        return [column.cells[i].trial for column in self.columns for i in self.images if i in column.cells]


def pages(results: pd.DataFrame, rows: int = ROWS) -> list[Page]:
    """Return what the grids show: one page or more for every dataset, model, threat model and seed.

    Where these are more than ``PAGES``, only the first seeds have pages, as many as fit and at least one.
    """
    once = _first_seeds(without_repeats(results))
    under = [name for name in _UNDER if name in once and once[name].notna().any()]
    numbers = f"Under each reconstruction: {' / '.join(under)} in dB. " if under else ""
    legend = f"{numbers}Red frame: the attack diverged."
    found: list[Page] = []
    for key, block in once.groupby([*BLOCK, "seed"], sort=False):
        dataset, model, threat, seed = (str(part) for part in key)
        images = tuple(sorted(int(i) for i in block["image"].unique())[:rows])
        columns = _columns(block, images, under)
        chunks = _chunks(columns)
        for index, chunk in enumerate(chunks):
            part = f", page {index + 1} of {len(chunks)}" if len(chunks) > 1 else ""
            slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{dataset[:30]} {model[:30]} {threat[:30]}").strip("-.")
            found.append(
                Page(
                    block=(dataset, model, threat),
                    file=f"{len(found) + 1:03}-{slug}-seed{seed}.png",
                    title=f"{dataset} · {model} · threat model {threat} · seed {seed}{part}",
                    seed=int(seed),
                    legend=legend,
                    images=images,
                    columns=chunk,
                )
            )
    return found


def _first_seeds(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of the seeds that have pages."""
    each = 0
    for _, block in results.groupby(list(BLOCK), sort=False):
        columns = block[["attack", "defense"]].drop_duplicates()
        each += -(-len(columns) // COLUMNS)
    most = max(1, PAGES // max(1, each))
    seeds = sorted(results["seed"].unique())[:most]
    return results[results["seed"].isin(seeds)]


def rows_within(found: Sequence[Page], truths: Sequence[bytes | None], budget: int = BUDGET) -> int:
    """Return how many images each page may show, so that all pages together stay within the budget of bytes.

    Args:
        truths: one PNG for each page, of the size that its images have.
    """
    row = 0
    for page, truth in zip(found, truths):
        image = picture(truth)
        row += 3 * image.width * image.height * (len(page.columns) + 1) if image is not None else 0
    return max(1, min(ROWS, budget // max(1, row)))


def png(page: Page, pictures: Mapping[str, Pictures]) -> bytes:
    """Return a page as PNG."""
    drawn = figure(page, pictures)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    out = BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(out, "png")
    return out.getvalue()


def figure(page: Page, pictures: Mapping[str, Pictures]) -> Figure:
    """Return a page as a figure whose every label lies inside; sizes are in pixels, y downwards."""
    thumbnails = {trial: _thumbnail(found.reconstruction) for trial, found in pictures.items()}
    truths = {i: _thumbnail(truth) for i, truth in _truths(page, pictures).items()}
    sizes = [image.size for image in (*thumbnails.values(), *truths.values()) if image is not None]
    wide = max((size[0] for size in sizes), default=THUMBNAIL)
    high = max((size[1] for size in sizes), default=THUMBNAIL)
    column = max(wide, _NARROWEST_COLUMN)

    groups = _groups(page.columns)
    truth_x = _MARGIN + _LABELS
    xs: list[int] = []
    x = truth_x + column + _GROUP_GAP
    for group in groups:
        for _ in group:
            xs.append(x)
            x += column + _GAP
        x += _GROUP_GAP - _GAP
    width = max(x - _GROUP_GAP + _MARGIN, _NARROWEST_PAGE)
    heads = [_wrap(_shorten(g[0].attack), len(g) * (column + _GAP) - _GAP, _BOLD) for g in groups]
    names = [_wrap(_shorten(c.defense), column, _REGULAR) for c in page.columns]
    title = _wrap(page.title, width - 2 * _MARGIN, _TITLE)
    legend = _wrap(page.legend, width - 2 * _MARGIN, _REGULAR)

    title_y = _MARGIN
    legend_y = title_y + len(title) * _TITLE.line + 2
    head_y = legend_y + len(legend) * _REGULAR.line + 12
    rule_y = head_y + max((len(head) for head in heads), default=1) * _BOLD.line + 3
    name_y = rule_y + 4
    top = name_y + max((len(name) for name in names), default=1) * _REGULAR.line + 6
    step = high + 2 * _REGULAR.line + 8
    height = top + len(page.images) * step + _MARGIN - 8

    drawn = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = _Sheet(drawn, width, height)
    canvas.lines(title, _MARGIN, title_y, _TITLE)
    canvas.lines(legend, _MARGIN, legend_y, _REGULAR, _GREY)
    canvas.lines(["private image"], truth_x + column / 2, rule_y - _BOLD.line - 3, _BOLD, align="center")
    start = 0
    for group, head in zip(groups, heads):
        left, right = xs[start], xs[start + len(group) - 1] + column
        canvas.lines(head, (left + right) / 2, rule_y - 3 - len(head) * _BOLD.line, _BOLD, align="center")
        canvas.rule(left, right, rule_y)
        start += len(group)
    for x, name in zip(xs, names):
        canvas.lines(name, x + column / 2, name_y, _REGULAR, align="center")
    for row, i in enumerate(page.images):
        y = top + row * step
        canvas.lines(_wrap(f"image {i}", _LABELS - 8, _REGULAR), _MARGIN, y + high / 2 - 8, _REGULAR)
        canvas.image(truths.get(i), truth_x, y, column, high)
        for x, shown in zip(xs, page.columns):
            _cell(canvas, shown.cells.get(i), thumbnails, (x, y, column, high))
    return drawn


class _Sheet:
    """A figure that is drawn on in pixels from the top left."""

    def __init__(self, drawn: Figure, width: int, height: int) -> None:
        self.figure, self.width, self.height = drawn, width, height

    def lines(
        self,
        texts: Sequence[str],
        x: float,
        y: float,
        font: Font,
        color: str = "black",
        align: str = "left",
    ) -> None:
        for index, text in enumerate(texts):
            self.figure.text(
                x / self.width,
                1 - (y + (index + 0.78) * font.line) / self.height,
                text,
                fontproperties=font.properties,
                color=color,
                horizontalalignment=align,
                verticalalignment="baseline",
                parse_math=False,
            )

    def rule(self, left: float, right: float, y: float) -> None:
        level = 1 - y / self.height
        line = Line2D([left / self.width, right / self.width], [level, level], color=_GREY, linewidth=0.8)
        self.figure.add_artist(line)

    def image(self, image: Image.Image | None, x: int, y: int, width: int, height: int) -> None:
        if image is None:
            self.frame(x + (width - min(width, height)) / 2, y, min(width, height), height, "#dddddd", fill=True)
            return
        left = x + (width - image.size[0]) // 2
        self.figure.figimage(np.asarray(image), left, self.height - y - image.size[1], origin="upper")

    def frame(self, x: float, y: float, width: float, height: float, color: str, fill: bool = False) -> None:
        corner = (x / self.width, 1 - (y + height) / self.height)
        size = (width / self.width, height / self.height)
        self.figure.add_artist(
            Rectangle(corner, *size, facecolor=color if fill else "none", edgecolor=color, linewidth=0 if fill else 2.5)
        )


def _cell(
    sheet: _Sheet, cell: Cell | None, thumbnails: Mapping[str, Image.Image | None], box: tuple[int, int, int, int]
) -> None:
    """Draw one reconstruction with the numbers under it, or say why there is none."""
    x, y, width, height = box
    middle, line = x + width / 2, _REGULAR.line
    image = None if cell is None else thumbnails.get(cell.trial)
    sheet.image(image, x, y, width, height)
    if cell is None or image is None:
        word = "not run" if cell is None else cell.status if cell.status in ("unsupported", "error") else "no picture"
        sheet.lines([word], middle, y + height / 2 - line / 2, _REGULAR, _GREY, align="center")
    if cell is None:
        return
    sheet.lines([cell.caption], middle, y + height + 2, _REGULAR, align="center")
    if cell.status == "failed":
        side = min(width, height) if image is None else image.size[0]
        sheet.frame(x + (width - side) // 2 + 1, y + 1, side - 2, height - 2, _RED)
        sheet.lines(["diverged"], middle, y + height + 2 + line, _BOLD, _RED, align="center")


def _columns(block: pd.DataFrame, images: Sequence[int], under: Sequence[str]) -> list[Column]:
    """Return the columns of a block, attack by attack."""
    shown = block[block["image"].isin(images)]
    cells: dict[tuple[str, str], dict[int, Cell]] = {}
    for row in shown.to_dict("records"):
        attack = f"{row['attack']} (floor)" if row["defense"] == ANY else str(row["attack"])
        values = [number(row[name], None if abs(row[name]) >= 1e4 else 1) for name in under]
        scored = row["status"] in ("ok", "failed")
        cell = Cell(str(row["trial"]), str(row["status"]), " / ".join(values) if scored else "")
        cells.setdefault((attack, str(row["defense"])), {})[int(row["image"])] = cell
    attacks = list(dict.fromkeys(attack for attack, _ in cells))
    return [Column(*key, found) for a in attacks for key, found in cells.items() if key[0] == a]


def _groups(columns: Sequence[Column]) -> list[list[Column]]:
    """Return neighbouring columns of the same attack together."""
    groups: list[list[Column]] = []
    for column in columns:
        if groups and groups[-1][0].attack == column.attack:
            groups[-1].append(column)
        else:
            groups.append([column])
    return groups


def _chunks(columns: Sequence[Column]) -> list[tuple[Column, ...]]:
    """Return the columns page by page; an attack is split only where it alone is too wide for a page."""
    found: list[list[Column]] = [[]]
    for group in _groups(columns):
        if len(found[-1]) + len(group) > COLUMNS and found[-1]:
            found.append([])
        even = math.ceil(len(group) / math.ceil(len(group) / COLUMNS))
        for start in range(0, len(group), even):
            if start:
                found.append([])
            found[-1] += group[start : start + even]
    return [tuple(page) for page in found if page]


def _truths(page: Page, pictures: Mapping[str, Pictures]) -> dict[int, bytes | None]:
    """Return the private image of each row, None where it is not known."""
    return {
        i: pictures[cell.trial].truth
        for column in page.columns
        for i, cell in column.cells.items()
        if cell.trial in pictures
    }


def picture(data: bytes | None) -> Image.Image | None:
    """Return a PNG as an image, reduced by a whole factor where it is too large; None where there is none."""
    if data is None:
        return None
    image = decoded(data)
    if image is None:
        return None
    image = image.convert("RGB")
    return image.reduce(math.ceil(max(image.size) / THUMBNAIL))


def _thumbnail(data: bytes | None) -> Image.Image | None:
    """Return the picture as it is shown: enlarged by a whole factor, without smoothing."""
    image = picture(data)
    if image is None:
        return None
    factor = max(1, THUMBNAIL // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def plain(text: str) -> str:
    """Return text as Matplotlib's own labels show it: no formula, and what the font lacks written out."""
    return spelled(text).replace("$", r"\$")


def spelled(text: str, font: Font = _REGULAR) -> str:
    """Return text with the characters that a font lacks written as escapes."""
    return "".join(c if c.isprintable() and drawable(c, font) else c.encode("unicode_escape").decode() for c in text)


def drawable(char: str, font: Font = _REGULAR) -> bool:
    """Return whether a font has a character."""
    return bool(get_font(str(_FONTS / font.file)).get_char_index(ord(char)))


def _shorten(text: str, most: int = 240) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _wrap(text: str, width: float, font: Font) -> list[str]:
    """Return the text in lines that are no wider than this; characters that the font lacks are written as escapes."""
    measure = _measure(font)
    shown = spelled(text, font)
    lines, line = [], ""
    for piece in re.findall(r"[^ ,(=_/\-]*[ ,(=_/\-]?", shown):
        if line and measure((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        for char in piece:
            if line and measure(line + char.rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += char
    return [*lines, line.rstrip()]


@lru_cache(maxsize=8)
def _measure(font: Font) -> Callable[[str], float]:
    """Return a function from a text to its width in pixels."""
    renderer = FigureCanvasAgg(Figure(dpi=_DPI)).get_renderer()
    properties = font.properties
    return cache(lambda text: renderer.get_text_width_height_descent(text, properties, ismath=False)[0])
