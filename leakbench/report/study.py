"""A study: a page with its figures on what one kind of run shows; values with intervals, tables of rows, and lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from leakbench.analysis.statistics import share_interval, unit_means
from leakbench.report.figure import bars, plain, saved
from leakbench.report.page import render_markdown


@dataclass(frozen=True)
class StudyPage:
    """A page of a run, with its figures; the template ``FILE.j2`` has all of its prose.

    Attributes:
        file: the page's name in the run's folder.
        facts: what the template shows, by the name that it has there: text, numbers and rendered tables.
        figures: the page's figures by path in the run's folder, such as ``grids/curves-001.png``.
    """

    file: str
    facts: Mapping[str, object]
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def markdown(self) -> str:
        """The page; it depends on nothing but the facts."""
        return render_markdown(f"{self.file}.j2", **self.facts)

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield the names and contents of the figures and of the page."""
        for name, drawn in self.figures.items():
            yield name, saved(drawn)
        yield self.file, self.markdown.encode()


class Value(NamedTuple):
    """A number with its 95 % interval; NaN where it is unknown."""

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of_share(cls, hits: pd.Series) -> Value:
        """Return the share of hits in [0, 1], the mean over images, with its interval (``share_interval``).

        Args:
            hits: whether each was one; its index has the levels ``image`` and ``group``.
        """
        if hits.empty:
            return cls()
        images, groups = (hits.index.get_level_values(level).to_numpy() for level in ("image", "group"))
        means = unit_means(hits.to_numpy(dtype=float), images)
        return cls(float(means.mean()), *share_interval(means, unit_means(groups.astype(float), images).astype(int)))

    def overlaps(self, other: Value) -> bool:
        """Return whether the intervals have a point in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Line:
    """A line of a figure.

    Attributes:
        label: its name in the key.
        points: [N, 4] the place along the axis, the value, and the low and high end of its 95 % interval.
        look: Matplotlib's options, such as those of ``figure.style``.
    """

    label: str
    points: Sequence[tuple[float, float, float, float]]
    look: Mapping[str, Any]


def draw_lines(panel: Any, lines: Sequence[Line], ticks: Mapping[float, str]) -> None:
    """Draw lines with intervals into a panel, next to each other where they have the same place.

    Args:
        panel: Matplotlib's axes.
        lines: those without a point are left out.
        ticks: what the places along the axis are called.
    """
    places = sorted(ticks)
    apart = 0.06 * (places[-1] - places[0] or 1) / max(1, len(places) - 1)
    for index, line in enumerate(lines):
        if len(line.points):
            x, value, low, high = np.array(line.points, dtype=np.float64).T
            x = x + apart * (index - (len(lines) - 1) / 2)
            look = {"capsize": 3, "markersize": 5, "linewidth": 1.4} | dict(line.look)
            panel.errorbar(x, value, bars(value, low, high), label=plain(line.label), **look)
    panel.set_xticks(places, [ticks[place] for place in places], fontsize=8)
    if len(places) == 1:  # else its lines would be as far apart as the panel is wide
        panel.set_xlim(places[0] - 0.5, places[0] + 0.5)
    panel.grid(alpha=0.3)
