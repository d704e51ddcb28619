"""``figures/``: a run's figures for a paper, each as PDF and SVG, the same bytes each time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from leakbench.analysis.ensemble import EnsembleResult
from leakbench.analysis.pareto import Study
from leakbench.core.text import slug
from leakbench.report import curves, descent, grids
from leakbench.report.html import Curves, PicturesOf, Scene, worst
from leakbench.report.markdown import Run

FORMATS = ("pdf", "svg")

_INK, _GREY, _ORANGE = "#1a1c20", "#6b7280", "#d55e00"
_SETTINGS: Any = {"svg.hashsalt": "leakbench", "svg.fonttype": "path", "pdf.fonttype": 42, "font.family": "DejaVu Sans"}


def figures(
    run: Run,
    trials: pd.DataFrame,
    pages: Sequence[grids.Page],
    pictures: PicturesOf,
    studies: Sequence[Study] = (),
    courses: Curves | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of every figure.

    They are the worst case behind each defense, for each dataset and model; the grids of ``report.md``; what leaks as
    the gradient becomes less exact, for a run that varies it; how the objective of each attack falls over its
    evaluations; utility against leakage, one for each study that is given.

    Args:
        run: all that the report says; its results have every trial that ended.
        trials: every planned trial in the order of planning (``Store.trials``).
        pages: of ``grids.pages``.
        pictures: from trials to their pictures (``Store.images``).
        studies: utility and leakage.
        courses: by trial, the objective at some evaluations (``Store.curves``).
    """
    scored = [scene for scene in worst(run, trials) if _known(scene)]
    for index, scene in enumerate(scored):
        yield from _both(f"worst-case-{index + 1:03}-{slug((scene.dataset, scene.model))}", _worst(scene))
    for page in pages:
        yield from _both(f"grid-{page.file.removesuffix('.png')}", grids.figure(page, pictures(page.trials)))
    for shown in curves.pages(run.results, run.metrics, run.components):
        yield from _both(shown.file.removesuffix(".png"), curves.figure(shown))
    for index, (names, drawn) in enumerate(descent.pages(run.results, courses or {}), 1):
        yield from _both(f"objective-{index:03}-{slug(names)}", drawn)
    for index, study in enumerate(studies, 1):
        name = slug(study.title.split(" · "))
        yield from _both(f"utility-{index:02}-{name}", _utility(study))


def _both(name: str, drawn: Figure) -> Iterator[tuple[str, bytes]]:
    for kind in FORMATS:
        stream = BytesIO()
        with matplotlib.rc_context(_SETTINGS):
            metadata = {"CreationDate": None} if kind == "pdf" else {"Date": None}
            drawn.savefig(stream, format=kind, metadata=metadata, dpi=drawn.dpi)
        yield f"{name}.{kind}", stream.getvalue()


def _known(scene: Scene) -> list[EnsembleResult]:
    return [row.standing for row in scene.defenses if not math.isnan(row.standing.share)]


def _worst(scene: Scene) -> Figure:
    """Draw the share of images recovered behind each defense with its interval, the least recovered at the top."""
    rows = _known(scene)
    names = [_plain(one.defense, 32) for one in rows]
    drawn = Figure(figsize=(6.4, 1.2 + sum(0.3 + 0.14 * name.count("\n") for name in names)), layout="constrained")
    panel = drawn.subplots()
    for place, one in enumerate(rows):
        panel.plot([one.low, one.high], [place, place], color=_INK, linewidth=1.2, solid_capstyle="butt")
        panel.plot([one.share], [place], "o", color=_ORANGE, markersize=6)
    if scene.floor is not None:
        panel.axvline(scene.floor, color=_GREY, linestyle="--", linewidth=1, label="best floor")
        drawn.legend(loc="outside upper right", fontsize=8, frameon=False)
    panel.set_yticks(range(len(rows)), names, fontsize=8)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(-0.02, 1.02)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    panel.set_xlabel("images recovered by at least one attacker, with 95 % intervals", fontsize=9)
    panel.set_title(_plain(f"{scene.dataset} · {scene.model}", 70), fontsize=10)
    panel.grid(axis="x", alpha=0.3)
    return drawn


def _utility(study: Study) -> Figure:
    """Draw every point with its intervals, and the Pareto front as a line."""
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = drawn.subplots()
    best = study.front()
    for point in study.points:
        x, y = point.utility, point.leakage
        panel.plot([x.low, x.high], [y.value, y.value], color=_GREY, linewidth=1)
        panel.plot([x.value, x.value], [y.low, y.high], color=_GREY, linewidth=1)
        filled = _ORANGE if point in best else "white"
        panel.plot([x.value], [y.value], "o", color=_ORANGE, markerfacecolor=filled, markersize=7)
        panel.annotate(_plain(point.label, 32), (x.value, y.value), (5, 5), textcoords="offset points", fontsize=8)
    line = [(one.utility.value, one.leakage.value) for one in best]
    if line:
        panel.plot(*zip(*line), color=_ORANGE, linestyle="--", linewidth=1, label="Pareto front")
        panel.legend(fontsize=8, frameon=False)
    panel.set_xlabel(_plain(study.utility, 70))
    panel.set_ylabel(_plain(study.leakage, 50))
    panel.set_ylim(-0.03, 1.03)
    panel.grid(alpha=0.3)
    return drawn


def _plain(text: str, width: int) -> str:
    """Return text that is no formula to Matplotlib, with what its font lacks written out, in up to three lines."""
    lines = textwrap.wrap(grids.spelled(text), width, max_lines=3, placeholder=" …")
    return "\n".join(lines).replace("$", r"\$")
