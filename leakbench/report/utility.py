"""Utility against leakage, drawn: a point for each defense, its intervals, and the Pareto front as a line."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from leakbench.analysis.pareto import Interval, Study
from leakbench.report.figure import GREY, Drawing, bars, key_below, plain, style

_PLACES = [
    (round(reach * math.cos(math.radians(angle))), round(reach * math.sin(math.radians(angle))))
    for reach in (11, 19, 27)
    for angle in (40, 140, -40, -140, 90, -90, 0, 180)
]
"""Where the number of a point may be, in points from its middle; the first that is free is taken."""

_APART = 10
"""How far two numbers, or a number and the middle of another point, are apart at least, in points."""


def draw_points(
    panel: Any,
    labels: Sequence[str],
    utility: npt.ArrayLike,
    leakage: npt.ArrayLike,
    front: Collection[int],
    inverted: bool = False,
) -> None:
    """Draw numbered points with their intervals; those of the Pareto front are filled and joined by a line.

    Args:
        panel: Matplotlib's axes.
        labels: [N] the names of the points.
        utility: [N, 3] value, low and high, drawn to the right; a point with a NaN value is left out.
        leakage: [N, 3] the same, drawn upwards.
        front: the places of the points on the front.
        inverted: whether less leakage is a larger value, so that the axis falls.
    """
    across, along = (np.asarray(values, dtype=np.float64).reshape(-1, 3) for values in (utility, leakage))
    for place, (label, x, y) in enumerate(zip(labels, across, along)):
        if np.isnan(x[0]) or np.isnan(y[0]):
            continue
        face = {} if place in front else {"markerfacecolor": "white"}
        ends = {"xerr": bars(*x), "yerr": bars(*y)}
        look = {"linestyle": "", "markersize": 7, "capsize": 3, "linewidth": 1.2} | style(place) | face
        panel.errorbar(x[:1], y[:1], label=plain(f"{place + 1}  {label}", 60), **ends, **look)
    line = sorted((across[place, 0], along[place, 0]) for place in front)
    if len(line) > 1:
        panel.plot(*zip(*line), color=GREY, linewidth=1, zorder=0)
    panel.grid(alpha=0.3)
    panel.yaxis.set_inverted(inverted)
    _number(panel, across[:, 0], along[:, 0])


def _number(panel: Any, across: npt.NDArray[np.float64], along: npt.NDArray[np.float64]) -> None:
    """Draw the number of each point beside it, where no other number and no other point is."""
    panel.autoscale_view()
    scale = panel.figure.dpi / 72
    middles = panel.transData.transform(np.column_stack([across, along])) / scale
    known = np.flatnonzero(np.isfinite(middles).all(axis=1))
    taken: list[npt.NDArray[np.float64]] = []
    for place in known:
        others = np.array([*taken, *(middles[other] for other in known if other != place)]).reshape(-1, 2)
        free = [np.linalg.norm(others - (middles[place] + offset), axis=1).min(initial=np.inf) for offset in _PLACES]
        offset = _PLACES[next((index for index, room in enumerate(free) if room >= _APART), int(np.argmax(free)))]
        taken.append(middles[place] + offset)
        panel.annotate(
            str(place + 1),
            (across[place], along[place]),
            textcoords="offset points",
            xytext=offset,
            fontsize=8,
            ha="center",
            va="center",
        )


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
