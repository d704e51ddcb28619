"""What a run shows at a glance: recovered shares as a heat map, scores by image, shares by threshold and by work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from leakbench.analysis.ensemble import RECOVERED, SCENE, EnsembleResult, attacker_names
from leakbench.analysis.recovery import CLOSENESS, ENCODED, TARGET, judged
from leakbench.core.text import percent, slug
from leakbench.plan.matrix import RECOVERY
from leakbench.report.figure import GREY, INK, LETTER, RISE, RUN, SHARE_TICKS, Drawing, key_below, plain, style
from leakbench.report.run import RunData

ENSEMBLE = "any attacker"
"""The row of the heat map that counts an image if one of the attackers recovers it: the worst case."""

MAX_STRIP_IMAGES = 256
"""No more images have points of their own in the strips."""

_SHARES = colormaps["YlOrRd"].with_extremes(
    bad="#eeeeee"
)  # its lightness falls steadily, so that it reads the same in grey
_UNITS = {RECOVERY: "SSIM after alignment", CLOSENESS: "PSNR after alignment, dB"}


@dataclass(frozen=True)
class Chart:
    """One chart of a run, not drawn yet.

    Attributes:
        kind: what it shows, by its name in ``figures.CHARTS``.
        scene: dataset and model; the threat model too if the chart is of one.
        file: the name of its files, without an ending.
        draw: returns the figure.
    """

    kind: str
    scene: tuple[str, ...]
    file: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Crossing:
    """The attacked trials of one dataset and model, and what they recover.

    Attributes:
        trials: without floors and without the images that a floor recovers; ``attacker`` is a short name. The scores
            are the better ones of those against the private image and the image that the client trained on, as a
            recovered image is either (``recovery.judged``).
        results: the ensemble's result behind each defense, the one that leaks most first.
        threshold: the score from which an image counts as recovered.
    """

    dataset: str
    model: str
    trials: pd.DataFrame
    results: Sequence[EnsembleResult]
    threshold: float

    @property
    def title(self) -> str:
        """The dataset and the model."""
        return plain(f"{self.dataset} · {self.model}", 80)

    @property
    def defenses(self) -> list[str]:
        """The defenses, the one that leaks most first; failed ones come last."""
        return [one.defense for one in self.results]

    def scored(self, defense: str) -> pd.DataFrame:
        """Return the trials behind a defense that have a score."""
        return _scored(self.trials[self.trials["defense"] == defense])


def _scored(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that have the score that counts."""
    return trials[trials["status"].isin(("ok", "failed")) & trials[RECOVERY].notna()]


def crossings(run: RunData) -> list[Crossing]:
    """Return the trials of each dataset and model, judged; none if no trial has the score that counts."""
    if RECOVERY not in run.trials or run.trials[RECOVERY].isna().all():
        return []
    threshold = RECOVERED if run.threshold is None else run.threshold
    trials = judged(run.trials, threshold)
    trials = trials[~trials["floor"].to_numpy(dtype=bool)]
    names = attacker_names(trials)
    attackers = [names[str(a), str(t)] for a, t in trials[["attack", "threat"]].itertuples(index=False)]
    either = {
        one: np.fmax(trials[one], trials[other])
        for one, other in zip((RECOVERY, CLOSENESS), ENCODED)
        if one in trials and other in trials
    }
    trials = trials.assign(attacker=attackers, **either)
    found = []
    for (dataset, model), results in groupby(run.ensembles, SCENE):
        own = trials[(trials["dataset"] == dataset) & (trials["model"] == model) & ~trials["by_floor"]]
        if _scored(own).empty:
            continue
        known = sorted(results, key=lambda one: (one.broken > 0, math.isnan(one.share), -one.share))
        found.append(Crossing(dataset, model, own, known, threshold))
    return found


def charts(run: RunData) -> Iterator[Chart]:
    """Yield every chart of a run that this module draws."""
    for index, one in enumerate(crossings(run), 1):
        scene, place = (one.dataset, one.model), f"{index:03}-{slug((one.dataset, one.model))}"
        yield Chart("heatmap", scene, f"heatmap-{place}", partial(heatmap, one))
        for kind, metric in (("ssim", RECOVERY), ("psnr", CLOSENESS)):
            if metric in one.trials and one.trials[metric].notna().any():
                name = f"images-{metric.replace('_', '-')}-{place}"
                yield Chart(kind, scene, name, partial(strips, one, metric))
        yield Chart("threshold", scene, f"threshold-{place}", partial(by_threshold, one))
        if one.trials["evaluations"].notna().any():
            yield Chart("evaluations", scene, f"evaluations-{place}", partial(by_evaluations, one))


def heatmap(crossing: Crossing) -> Figure:
    """Return attackers x defenses, coloured by the share of images recovered: absolute colours, from 0 to 100 %.

    A number is recovered / attacked. The strongest attacker behind each defense has a frame; the last row is the worst
    case. An image that an earlier attacker recovered is not attacked again in a run with a threshold; attackers that
    had nothing left to attack have no row.
    """
    attackers = list(dict.fromkeys(_scored(crossing.trials)["attacker"]))
    shares, words = _cells(crossing, attackers)
    rows, columns = shares.shape
    names = [plain(name, 40) for name in [*attackers, ENSEMBLE]]
    heads = [plain(name, 34) for name in crossing.defenses]
    # Matplotlib's constrained layout draws the figure several times to find the room that labels need: the lengths of
    # the names tell it, and a report has many of these
    turned = max((LETTER * len(head) for head in heads), default=0.0)
    left = max(LETTER * max(map(len, names)) + 0.15, RUN * turned - 0.2)
    below, across, along = RISE * turned + 0.2, 0.72 * columns, 0.3 * rows
    width, height = left + across + 0.75, below + along + 0.35
    drawn = Drawing(figsize=(width, height), facecolor="white")
    panel = drawn.add_axes((left / width, below / height, across / width, along / height))
    image = panel.imshow(shares, cmap=_SHARES, vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(shares.shape):
        dark = shares[row, column] > 0.6
        panel.text(
            column, row, words[row][column], ha="center", va="center", fontsize=7, color="white" if dark else INK
        )
    for column in range(columns):
        best = np.nanmax(shares[:-1, column], initial=0.0)
        for row in np.flatnonzero(shares[:-1, column] == best) if best > 0 else ():
            panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.8))
    panel.axhline(rows - 1.5, color=INK, linewidth=1)
    panel.set_yticks(range(rows), names, fontsize=8)
    panel.set_xticks(range(columns), heads, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    panel.tick_params(length=0)
    drawn.text(0.5, 1 - 0.08 / height, f"Images recovered, {crossing.title}", ha="center", va="top", fontsize=9)
    scale = drawn.add_axes(((left + across + 0.12) / width, below / height, 0.1 / width, along / height))
    bar = drawn.colorbar(image, cax=scale, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"], fontsize=7)
    return drawn


def _cells(crossing: Crossing, attackers: Sequence[str]) -> tuple[npt.NDArray[np.float64], list[list[str]]]:
    """Return the shares [attackers + 1, defenses], NaN where nothing was attacked, and the text of each cell."""
    shares = np.full((len(attackers) + 1, len(crossing.defenses)), math.nan)
    words = [["–"] * shares.shape[1] for _ in range(shares.shape[0])]
    for column, result in enumerate(crossing.results):
        scored = crossing.scored(result.defense)
        for row, attacker in enumerate(attackers):
            own = scored[scored["attacker"] == attacker]
            stats = next((one for one in result.attackers if one.attacker == attacker), None)
            if len(own):
                shares[row, column] = own["recovered"].mean()
                words[row][column] = f"{int(own['recovered'].sum())}/{len(own)}"
            elif stats is not None and stats.skipped:
                words[row][column] = "skipped"
        if result.broken:
            words[-1][column] = "failed"
        elif not math.isnan(result.share):
            shares[-1, column], words[-1][column] = result.share, percent(result.share)
    return shares, words


def strips(crossing: Crossing, metric: str) -> Figure:
    """Return the best score of any attacker on each image behind each defense, a point an image; lines join images."""
    best = {
        plain(defense, 34): crossing.scored(defense).groupby(TARGET)[metric].max().dropna()
        for defense in crossing.defenses
    }
    title = f"Each image, {crossing.title}; bars are medians"
    width = max(2.2 + 0.8 * len(best), LETTER * 1.2 * len(title) + 1.2)
    drawn = Drawing(figsize=(width, 4.4), layout="constrained", facecolor="white")
    panel = drawn.subplots()
    table = pd.DataFrame(best).head(MAX_STRIP_IMAGES)
    places = np.arange(table.shape[1])
    for _, row in table.iterrows():
        panel.plot(places, row.to_numpy(dtype=float), color=GREY, linewidth=0.5, alpha=0.35, zorder=1)
    rows = np.arange(len(table)) / max(1, len(table) - 1) - 0.5
    for place, defense in enumerate(table):
        look = {**style(place), "linestyle": "", "markersize": 4, "alpha": 0.8}
        panel.plot(place + 0.24 * rows, table[defense].to_numpy(dtype=float), **look)
        middle = table[defense].median()
        panel.plot([place - 0.3, place + 0.3], [middle, middle], color=INK, linewidth=2)
    if metric == RECOVERY:
        panel.axhline(crossing.threshold, color=GREY, linestyle="--", linewidth=1)
    panel.set_xticks(places, list(best), rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    panel.set_ylabel(f"best {_UNITS[metric]}", fontsize=9)
    panel.set_title(title, fontsize=10)
    panel.grid(axis="y", alpha=0.3)
    return drawn


def by_threshold(crossing: Crossing) -> Figure:
    """Return the share of images whose best score reaches a threshold, for every threshold from 0 to 1.

    The score alone counts here; a recovered image must be better than every floor as well (``recovery.judged``).
    """
    marks = np.linspace(0, 1, 201)
    drawn, panel = _panel(crossing)
    for place, defense in enumerate(crossing.defenses):
        best = crossing.scored(defense).groupby(TARGET)[RECOVERY].max().dropna().to_numpy(dtype=float)
        if len(best):
            shares = (best[:, None] >= marks).mean(axis=0)
            panel.plot(marks, shares, label=plain(defense, 44), markevery=25, markersize=4, **style(place))
    panel.axvline(crossing.threshold, color=GREY, linestyle="--", linewidth=1)
    panel.set_xlabel(f"threshold of {_UNITS[RECOVERY]}", fontsize=9)
    panel.set_ylabel("images whose best score reaches it", fontsize=9)
    key_below(drawn, panel, columns=2)
    return drawn


def by_evaluations(crossing: Crossing) -> Figure:
    """Return the share of images recovered within some evaluations of an attack's objective.

    An image counts from the evaluations of the cheapest attack that recovers it; a closed form needs one.
    """
    drawn, panel = _panel(crossing)
    for place, defense in enumerate(crossing.defenses):
        own = crossing.scored(defense)
        hits = own[own["recovered"]].assign(work=lambda rows: rows["evaluations"].fillna(1).clip(lower=1))
        images = len(own.drop_duplicates(TARGET))
        work = np.sort(hits.groupby(TARGET)["work"].min().to_numpy(dtype=float))
        if images:
            most = max(1.0, float(own["evaluations"].fillna(1).max()))
            x, y = np.array([1.0, *work, most]), np.array([*range(len(work) + 1), len(work)]) / images
            look = {**style(place), "markersize": 4, "markevery": max(1, len(x) // 8)}
            panel.plot(x, y, drawstyle="steps-post", label=plain(defense, 44), **look)
    panel.set_xscale("log")
    panel.set_xlabel("evaluations of the objective and its gradient (1: a closed form)", fontsize=9)
    panel.set_ylabel("images recovered", fontsize=9)
    key_below(drawn, panel, columns=2)
    return drawn


def _panel(crossing: Crossing) -> tuple[Figure, Any]:
    """Return a figure with room for a key below, and its panel, whose vertical axis is a share."""
    height = 3.6 + 0.2 * math.ceil(len(crossing.defenses) / 2)
    drawn = Drawing(figsize=(6.4, height), layout="constrained", facecolor="white")
    panel = drawn.subplots()
    panel.set_ylim(-0.03, 1.03)
    panel.set_yticks(*SHARE_TICKS)
    panel.grid(alpha=0.3)
    panel.set_title(crossing.title, fontsize=10)
    return drawn, panel
