"""What a notebook shows: a run as HTML, one of its charts or grids, and reconstructions beside their truth."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from leakbench.analysis import pareto as utility
from leakbench.analysis.summary import ANY, BLOCK
from leakbench.core.text import name_of, number
from leakbench.core.types import Reconstruction
from leakbench.errors import BadOption, LeakbenchError
from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM, align
from leakbench.metrics.standard import PSNR
from leakbench.report import charts, grids
from leakbench.report.figure import GREY, INK, RED, Drawing, saved
from leakbench.report.figures import CHARTS, all_charts
from leakbench.report.page import fragment, picture
from leakbench.report.run import RunData
from leakbench.report.scenes import worst_cases
from leakbench.store.records import ALIGNED_GAIN
from leakbench.store.run_file import FILE, Store

MAX_SCENES = 4
"""A notebook shows the heat maps of no more datasets and models at once."""

MAX_SHOWN = 24
"""No more reconstructions are shown side by side: the first ones."""

_PER_LINE = 8
_DPI = 150


def run_html(out: Path) -> str:
    """Return what a notebook shows of a run: counts, and each dataset's and model's heat map and recovered shares.

    It loads nothing; pictures are inside. A folder without a run is told in one line.
    """
    try:
        with Store.open(out / FILE, readonly=True) as store:
            run, done, planned = RunData.of(store, out.resolve().name), len(store.done()), len(store.planned())
    except LeakbenchError as error:
        return f"<p>{html.escape(str(error))}</p>"
    crossings = charts.crossings(run)
    maps = {(one.dataset, one.model): _map(one) for one in crossings[:MAX_SCENES]}
    scenes = [scene for scene in worst_cases(run) if (scene.dataset, scene.model) in maps]
    return fragment(
        "notebook.html.j2",
        name=run.name,
        out=str(out),
        done=done,
        planned=planned,
        scenes=[(scene, *maps[scene.dataset, scene.model]) for scene in scenes],
        more=len(crossings) - len(maps),
    )


def _map(crossing: charts.Crossing) -> tuple[str, int]:
    """Return the heat map as the address of an image, and its width in pixels of a page."""
    drawn = charts.heatmap(crossing)
    drawn.set_dpi(_DPI)
    return picture(saved(drawn)), round(96 * drawn.get_figwidth())


def plot(out: Path, chart: str, dataset: str = "", model: str = "", threat: str = "") -> Figure:
    """Return one chart of a run; see ``leakbench.Run.plot``."""
    if chart not in CHARTS:
        raise BadOption(f"chart {chart!r} is unknown; known: {', '.join(CHARTS)}")
    with Store.open(out / FILE, readonly=True) as store:
        run, studies = RunData.of(store, out.resolve().name), utility.load(out / utility.FILE)
        every = list(all_charts(run, studies, store.curves()))
    own = [one for one in every if one.kind == chart]
    if not own:
        others = ", ".join(dict.fromkeys(one.kind for one in every)) or "none"
        raise BadOption(f"the run in {str(out)!r} has no chart {chart!r} ({CHARTS[chart]}); it has: {others}")
    asked = {"dataset": dataset, "model": model, "threat": threat}
    wanted = {axis: spec for axis, spec in asked.items() if spec}
    found = [one for one in own if all(_among(spec, one.scene) for spec in wanted.values())]
    if len(found) != 1:
        raise BadOption(_several(f"the chart {chart!r}", [one.scene for one in own], [one.scene for one in found]))
    return found[0].draw()


def grid(
    out: Path,
    dataset: str = "",
    model: str = "",
    threat: str = "",
    seed: int | None = None,
    attacks: Sequence[str] = (),
    defenses: Sequence[str] = (),
    images: int = grids.MAX_ROWS,
    page: int = 1,
) -> Figure:
    """Return one picture grid of a run; see ``leakbench.Run.grid``."""
    if images < 1:
        raise BadOption(f"images is {images}; give at least 1")
    with Store.open(out / FILE, readonly=True) as store:
        results = RunData.of(store, out.resolve().name).results
        if results.empty:
            raise BadOption(f"the run in {str(out)!r} has no finished trial")
        every = _scenes(results)
        for axis, spec in {"dataset": dataset, "model": model, "threat": threat}.items():
            results = results[[not spec or _among(spec, [str(value)]) for value in results[axis]]]
        scenes = _scenes(results)
        if len(scenes) != 1:
            raise BadOption(_several("the grid", every, scenes))
        for axis, specs in {"attack": attacks, "defense": defenses}.items():
            results = _chosen(results, axis, [specs] if isinstance(specs, str) else specs)
        seeds = sorted(int(one) for one in results["seed"].unique())
        if seed is not None and seed not in seeds:
            raise BadOption(f"seed {seed} is not in this grid; it has: {', '.join(map(str, seeds))}")
        results = results[results["seed"] == (seeds[0] if seed is None else seed)]
        found = grids.pages(grids.of_members(results, store.members(results["trial"])), images)
        if not 1 <= page <= len(found):
            raise BadOption(f"page {page} is not in this grid; it has pages 1 to {len(found)}")
        shown = found[page - 1]
        return grids.figure(shown, store.images(shown.trials))


def _scenes(results: pd.DataFrame) -> list[tuple[str, ...]]:
    names = results[list(BLOCK)].drop_duplicates().itertuples(index=False, name=None)
    return [tuple(map(str, scene)) for scene in names]


def _chosen(results: pd.DataFrame, axis: str, specs: Sequence[str]) -> pd.DataFrame:
    """Return the rows with one of some attacks or defenses, all without any; floors are of every defense.

    Raises:
        BadOption: the grid has none of a spec.
    """
    known = [str(one) for one in dict.fromkeys(results[axis]) if one != ANY]
    for spec in specs:
        if not any(_among(spec, [one]) for one in known):
            raise BadOption(f"{axis} {spec!r} is not in this grid; it has: {', '.join(known)}")
    kept = {one for one in known if not specs or any(_among(spec, [one]) for spec in specs)} | {ANY}
    return results[results[axis].isin(kept)]


def _among(spec: str, names: Iterable[str]) -> bool:
    """Return whether a spec is one of some, or the name of one of them without its options."""
    return any(spec in (name, name_of(name)) for name in names)


def _several(what: str, known: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> str:
    """Return the message on a choice that fits several scenes, or none."""
    words = "; ".join(" · ".join(scene) for scene in (found or known))
    count = f"{len(found)} scenes" if found else "none"
    return f"{what} is of one scene, and {count} fit; name one by dataset=, model= and threat=, of: {words}"


def beside(found: Reconstruction, truth: Tensor | None = None) -> Figure:
    """Return reconstructions side by side, the private images above them; see ``leakbench.Reconstruction.show``."""
    images = found.images.detach().cpu().double()
    count = min(len(images), MAX_SHOWN)
    images = images[:count]
    failed = [False] * count if found.failed is None else found.failed[:count].tolist()
    captions, rows = [""] * count, [images]
    if truth is not None:
        truth = truth[:count].double()
        rows, captions = [truth, images], _scores(images, truth)
        images = rows[1] = _visible(images, truth, captions)
    return _sheet(rows, _heads(found, count), captions, failed, len(found.images))


def _heads(found: Reconstruction, count: int) -> list[str]:
    if found.labels is None:
        return [f"{place}" for place in range(count)]
    return [f"{place}, label {label}" for place, label in enumerate(found.labels[:count].tolist())]


def _scores(images: Tensor, truth: Tensor) -> list[str]:
    """Return under each image PSNR and SSIM after alignment; SSIM only if the images are large enough for it."""
    ssim = AlignedSSIM()
    finite = images.flatten(1).isfinite().all(dim=1)
    images = torch.where(finite[:, None, None, None], images, torch.full_like(images, 0.5))
    psnrs = AlignedPSNR()(images, truth).tolist()
    ssims = ssim(images, truth).tolist() if min(images.shape[-2:]) >= ssim.smallest else [math.nan] * len(images)
    words = [f"{number(a, 1)} dB" + ("" if math.isnan(b) else f"\nSSIM {number(b, 2)}") for a, b in zip(psnrs, ssims)]
    return [one if good else "not finite" for one, good in zip(words, finite.tolist())]


def _visible(images: Tensor, truth: Tensor, captions: list[str]) -> Tensor:
    """Return the images, aligned where only brightness and contrast are lost (``Pictures.drawn``), and say so."""
    finite = images.nan_to_num(0.5, 0.5, 0.5)
    lost = (AlignedPSNR()(finite, truth) - PSNR()(finite, truth) >= ALIGNED_GAIN) & images.isfinite().flatten(1).all(1)
    for place in torch.nonzero(lost).flatten().tolist():
        captions[place] += "\naligned"
    return torch.where(lost[:, None, None, None], align(finite, truth), finite)


def _sheet(
    rows: Sequence[Tensor], heads: Sequence[str], captions: Sequence[str], failed: Sequence[bool], every: int
) -> Figure:
    """Draw lines of ``_PER_LINE`` images, each row of a line above the next, captions below the last row."""
    count, across = len(heads), min(len(heads), _PER_LINE)
    lines = math.ceil(count / _PER_LINE)
    side, below, above, gap = 1.15, 0.56, 0.22, 0.08  # inches
    step = above + len(rows) * (side + gap) + below
    left, top = (0.75 if len(rows) > 1 else 0.1), (0.3 if every > count else 0.05)
    width, height = left + across * (side + gap) + 0.05, top + lines * step
    drawn = Drawing(figsize=(width, height), dpi=_DPI, facecolor="white")
    if every > count:
        drawn.text(0.02, 1 - 0.06 / height, f"the first {count} of {every}", va="top", fontsize=8, color=GREY)
    for place in range(count):
        line, column = divmod(place, _PER_LINE)
        x, y = left + column * (side + gap), height - top - line * step - above
        middle = (x + side / 2) / width
        drawn.text(middle, (y + 0.05) / height, heads[place], ha="center", va="bottom", fontsize=7, color=INK)
        for row, images in enumerate(rows):
            low = y - (row + 1) * side - row * gap
            panel = drawn.add_axes((x / width, low / height, side / width, side / height))
            panel.imshow(_pixels(images[place]), interpolation="nearest", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
            wrong = failed[place] and row == len(rows) - 1
            panel.spines[:].set(color=RED if wrong else GREY, linewidth=2 if wrong else 0.5)
            if not column and len(rows) > 1:
                panel.set_ylabel(("private", "attack")[row], fontsize=8)
        words = "\n".join(filter(None, [captions[place], "diverged" if failed[place] else ""]))
        colour = RED if failed[place] else INK
        drawn.text(middle, (low - 0.05) / height, words, ha="center", va="top", fontsize=7, color=colour)
    return drawn


def _pixels(image: Tensor) -> npt.NDArray[np.float64]:
    """Return an image [C, H, W] as [H, W, 3] in [0, 1]; other than three channels are drawn as their mean, in grey."""
    shown = image.nan_to_num(0.5).clamp(0, 1)
    colours = shown[:3] if shown.shape[0] in (3, 4) else shown.mean(dim=0, keepdim=True).expand(3, -1, -1)
    return np.asarray(colours.movedim(0, -1).numpy(), dtype=np.float64)
