"""Utility against leakage, drawn: a point for each defense, its intervals, and the Pareto front as a line."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from leakbench.analysis.pareto import Interval, Study
from leakbench.report.figure import GREY, Drawing, bars, key_below, plain, style

_OFFSETS = ((10, 7), (-10, 7), (10, -7), (-10, -7))
"""Where the number of a point is, in points from its middle: those of near points are apart."""


def draw_points(
    panel: Any, labels: Sequence[str], utility: npt.ArrayLike, leakage: npt.ArrayLike, front: Collection[int]
) -> None:
    """Draw numbered points with their intervals; those of the Pareto front are filled and joined by a line.

    Args:
        panel: Matplotlib's axes.
        labels: [N] the names of the points.
        utility: [N, 3] value, low and high, drawn to the right; a point with a NaN value is left out.
        leakage: [N, 3] the same, drawn upwards.
        front: the places of the points on the front.
    """
    across, along = (np.asarray(values, dtype=np.float64).reshape(-1, 3) for values in (utility, leakage))
    for place, (label, x, y) in enumerate(zip(labels, across, along)):
        if np.isnan(x[0]) or np.isnan(y[0]):
            continue
        face = {} if place in front else {"markerfacecolor": "white"}
        ends = {"xerr": bars(*x), "yerr": bars(*y)}
        look = {"linestyle": "", "markersize": 7, "capsize": 3, "linewidth": 1.2} | style(place) | face
        panel.errorbar(x[:1], y[:1], label=plain(f"{place + 1}  {label}", 60), **ends, **look)
        panel.annotate(
            str(place + 1),
            (x[0], y[0]),
            textcoords="offset points",
            xytext=_OFFSETS[place % len(_OFFSETS)],
            fontsize=8,
            ha="center",
            va="center",
        )
    line = sorted((across[place, 0], along[place, 0]) for place in front)
    if len(line) > 1:
        panel.plot(*zip(*line), color=GREY, linewidth=1, zorder=0)
    panel.grid(alpha=0.3)


def figure(study: Study) -> Figure:
    """Return a study's points as a figure, both axes in per cent."""
    drawn = Drawing(figsize=(6.4, 4.2 + 0.12 * len(study.points)), layout="constrained", facecolor="white")
    panel = drawn.subplots()
    front = study.front()
    places = [place for place, point in enumerate(study.points) if point in front]
    labels = [point.label for point in study.points]
    utility = [_per_cent(point.utility) for point in study.points]
    draw_points(panel, labels, utility, [_per_cent(point.leakage) for point in study.points], places)
    panel.set_xlabel(f"{plain(study.utility)}, %")
    panel.set_ylabel(f"{plain(study.leakage)}, %")
    panel.set_ylim(-3, 103)
    key_below(drawn, panel, columns=2)
    return drawn


def _per_cent(one: Interval) -> tuple[float, float, float]:
    return 100 * one.value, 100 * one.low, 100 * one.high
