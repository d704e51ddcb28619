"""Curves over iterations: how the objective of each attack falls behind each defense."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from leakbench.analysis.summary import blocks
from leakbench.report.figure import COLOURS, Drawing, plain
from leakbench.report.run import ObjectiveCurves

_LINES = ("-", "--", ":", "-.")
_MIN_POINTS = 2


def pages(
    results: pd.DataFrame, curves: ObjectiveCurves
) -> Iterator[tuple[tuple[str, str, str], Callable[[], Figure]]]:
    """Yield for each dataset, model and threat model what draws its figure: a panel an attack, a line a defense.

    A line is the median over images and seeds at each evaluation that at least half of the trials reached, its band
    goes from the lower to the upper quartile. Objectives of different attacks have different units.

    Args:
        results: one row per trial with a result (``Store.results``).
        curves: by trial, the objective at some evaluations (``Store.curves``).
    """
    known = results[results["trial"].isin({trial for trial, points in curves.items() if len(points) >= _MIN_POINTS})]
    for names, block in blocks(known):
        yield names, partial(_figure, block, curves, names)


def _figure(block: pd.DataFrame, curves: ObjectiveCurves, names: tuple[str, str, str]) -> Figure:
    attacks = list(dict.fromkeys(block["attack"].astype(str)))
    defenses = list(dict.fromkeys(block["defense"].astype(str)))
    drawn = Drawing(figsize=(5.6, 2.9 * len(attacks) + 0.6 + 0.2 * len(defenses)), layout="constrained")
    panels = drawn.subplots(len(attacks), 1, squeeze=False)[:, 0]
    for attack, panel in zip(attacks, panels):
        positive = True
        for place, defense in enumerate(defenses):
            own = block[(block["attack"] == attack) & (block["defense"] == defense)]
            at, low, middle, high = _quartiles([curves[trial] for trial in own["trial"]])
            if not len(at):
                continue
            positive &= bool((low > 0).all())
            colour, line = COLOURS[place % len(COLOURS)], _LINES[place // len(COLOURS) % len(_LINES)]
            panel.plot(at, middle, line, color=colour, label=plain(defense, 60))
            panel.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_xscale("log")
        panel.set_yscale("log" if positive else "linear")
        panel.set_title(plain(attack, 60), fontsize=9)
        panel.set_ylabel("objective", fontsize=9)
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("evaluations of the objective and its gradient", fontsize=9)
    drawn.suptitle(plain(" · ".join(names), 80), fontsize=10)
    found = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}
    drawn.legend(found.values(), found.keys(), loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    return drawn


def _quartiles(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[np.ndarray, ...]:
    """Return evaluations, and the quartiles of the objective at those that at least half of the curves have."""
    values = pd.DataFrame([dict(curve) for curve in curves]).dropna(axis=1, thresh=math.ceil(len(curves) / 2))
    quartiles = values.sort_index(axis=1).quantile([0.25, 0.5, 0.75])
    return quartiles.columns.to_numpy(), *quartiles.to_numpy()
