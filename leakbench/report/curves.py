"""``curves.md``: what leaks as the gradient that is sent is made less exact, by relative noise or by fewer bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leakbench import defenses
from leakbench.analysis.summary import BLOCK, summarise
from leakbench.core.text import ABSENT, decimals, slug, with_interval
from leakbench.errors import BadOption
from leakbench.plan.matrix import Matrix
from leakbench.report.grids import COLOURS, plain
from leakbench.report.md import escape, table
from leakbench.store.records import MetricInfo, StoredComponent

FILE = "curves.md"
"""The name of the report in a run's folder."""

METRICS = ("psnr_aligned", "ssim_aligned")
"""What is drawn and listed."""

LEAST = 2
"""A run with fewer strengths of a kind has no curve."""

_MARKERS = "osD^vP"
_UNITS = {"psnr_aligned": "PSNR after alignment, dB", "ssim_aligned": "SSIM after alignment"}

Kind = Literal["noise", "precision"]
_TITLES: dict[Kind, str] = {
    "noise": "Gaussian noise, relative to the root mean square of each parameter's gradient",
    "precision": "precision of every entry that is sent",
}


@dataclass(frozen=True)
class Level:
    """How inexact a defense makes the gradient.

    Attributes:
        defense: its spec.
        kind: by ``noise``, or by the ``precision`` of transport.
        order: the place along the axis: the relative noise, or the bits.
        label: what stands at that place.
    """

    defense: str
    kind: Kind
    order: float
    label: str


def levels(components: Sequence[StoredComponent]) -> list[Level]:
    """Return every strength of relative noise and of precision among a run's defenses, from exact to inexact.

    ``none`` is on both axes: no noise, and float32.
    """
    found = []
    for one in components:
        if one.kind != "defense":
            continue
        name = one.spec.partition("(")[0]
        if name == "none":
            found += [Level(one.spec, "noise", 0.0, "0"), Level(one.spec, "precision", -32, "float32")]
        elif name == "noise" and one.options.get("relative") and one.options.get("kind") == "gaussian":
            scale = float(str(one.options["scale"]))
            mantissa, exponent = f"{scale:e}".split("e")
            found.append(Level(one.spec, "noise", scale, f"{float(mantissa):g}e{int(exponent)}" if scale else "0"))
        elif name == "quantise":
            bits = str(one.options["bits"])
            order = -16.5 if bits == "half" else -float(bits)
            found.append(Level(one.spec, "precision", order, bits if bits == "half" else f"{bits} bits"))
    return sorted(found, key=lambda level: (level.kind, level.order))


def kinds(components: Sequence[StoredComponent]) -> list[Kind]:
    """Return the axes of which a run has a curve: at least two strengths beside the exact gradient."""
    found = levels(components)
    return [kind for kind in _TITLES if sum(one.kind == kind and one.defense != "none" for one in found) >= LEAST]


def check(plans: Sequence[Matrix]) -> None:
    """Raise BadOption where matrices have no curve."""
    own = [defense for plan in plans for defense in plan.defenses]
    if not kinds([StoredComponent("defense", defenses.spec(one), one.version, one.options()) for one in own]):
        raise BadOption(
            f"the defenses hold fewer than {LEAST} strengths of relative noise or of precision; "
            'give for example --defense "noise(scale=1e-4, relative=true)" and --defense "quantise(bits=8)"'
        )
    if any(plan.threshold is not None for plan in plans):
        raise BadOption("the matrix has a threshold, and a curve needs every trial; leave the threshold out")


@dataclass(frozen=True)
class Page:
    """One figure: the curves of one dataset, model and threat model.

    Attributes:
        block: dataset, model and threat model.
        file: the figure's name.
        summary: the block's rows of ``summarise``.
    """

    block: tuple[str, str, str]
    file: str
    summary: pd.DataFrame


def pages(results: pd.DataFrame, metrics: Sequence[MetricInfo], components: Sequence[StoredComponent]) -> list[Page]:
    """Return one page for each dataset, model and threat model under which a curve's strengths were attacked."""
    shown = [metric for metric in metrics if metric.name in METRICS]
    summary = summarise(results, shown)
    found: list[Page] = []
    for key, block in summary.groupby(list(BLOCK), sort=False):
        dataset, model, threat = (str(part) for part in key)
        names = (dataset, model, threat)
        attacked = set(block.loc[~block["floor"].astype(bool), "defense"])
        if kinds([one for one in components if one.spec in attacked]):
            found.append(Page(names, f"curves-{len(found) + 1:03}-{slug(names)}.png", block))
    return found


def markdown(pages: Sequence[Page], components: Sequence[StoredComponent], metrics: Sequence[MetricInfo]) -> str:
    """Return the report; it depends on nothing but its arguments."""
    parts = ["# Leakage of inexact gradients", _WORDS]
    shown = [metric for metric in metrics if metric.name in METRICS]
    for page in pages:
        parts.append("## " + ", ".join(map(escape, page.block)))
        parts.append(f"![{escape(' · '.join(page.block))}](grids/{page.file})")
        parts += [_floors(page, shown)]
        for kind in kinds(components):
            parts += [f"**{_TITLES[kind].capitalize()}**:", _table(page, kind, components, shown)]
    return "\n\n".join(part for part in parts if part) + "\n"


_WORDS = """\
The same images, weights and starts in every row; only the gradient that is sent differs. Noise is Gaussian, its \
standard deviation so many times the root mean square of the gradient of each parameter tensor; 0 is the gradient in \
float32, whose own rounding is about 6e-8. Half precision and fewer bits round every entry that is sent. Attackers are \
what the threat model says: an oblivious one does not know that the gradient is inexact.

Means have 95 % bootstrap intervals over images (and over the seeds of each). Failed trials are scored as the grey \
image and stay in the means. The best floor, which uses no gradient, is the dashed line: there, nothing leaks."""


def _floors(page: Page, metrics: Sequence[MetricInfo]) -> str:
    floors = page.summary[page.summary["floor"].astype(bool)]
    lines = []
    for metric in metrics:
        if floors[metric.name].notna().any():
            best = floors.iloc[int(np.nanargmax(floors[metric.name].to_numpy(dtype=np.float64)))]
            text = with_interval(*_interval(best, metric.name), decimals([best[metric.name]]))
            lines.append(f"{escape(metric.name)} {text} ({escape(best['attack'])})")
    return f"Best floors: {'; '.join(lines)}." if lines else ""


def _interval(row: pd.Series, name: str) -> tuple[float, float, float]:
    return float(row[name]), float(row[f"{name} low"]), float(row[f"{name} high"])


def _rows(page: Page, kind: Kind, components: Sequence[StoredComponent]) -> list[tuple[Level, dict[str, pd.Series]]]:
    """Return every level of an axis that was run, with the rows of the summary by attack."""
    attacks = page.summary[~page.summary["floor"].astype(bool)]
    found = []
    for level in levels(components):
        own = attacks[attacks["defense"] == level.defense]
        if level.kind == kind and len(own):
            found.append((level, {str(row["attack"]): row for _, row in own.iterrows()}))
    return found


def _table(page: Page, kind: Kind, components: Sequence[StoredComponent], metrics: Sequence[MetricInfo]) -> str:
    places = {metric.name: decimals(page.summary[metric.name]) for metric in metrics}
    headers = ["noise" if kind == "noise" else "precision", "attack", "n", "failed", "no score"]
    for metric in metrics:
        headers += [f"{escape(metric.name)} {'↑' if metric.higher_is_better else '↓'}", "gain over floor"]
    lines = []
    for level, rows in _rows(page, kind, components):
        for attack, row in rows.items():
            missing = row["unsupported"] + row["error"]
            line = [level.label, escape(attack), str(row["n"]), str(row["failed"]), str(missing)]
            for metric in metrics:
                name = metric.name
                gain = (row[f"{name} gain"], row[f"{name} gain low"], row[f"{name} gain high"])
                line.append(with_interval(*_interval(row, name), places[name]) or ABSENT)
                line.append(with_interval(*gain, places[name], sign=True))
            lines.append(line)
    return table(headers, lines, left=2)


def png(page: Page, components: Sequence[StoredComponent]) -> bytes:
    """Return a page's curves as a PNG."""
    stream = BytesIO()
    FigureCanvasAgg(figure(page, components)).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def figure(page: Page, components: Sequence[StoredComponent]) -> Figure:
    """Return a page's curves: a column for each axis, a row for each metric, a line for each attack."""
    axes = kinds(components)
    drawn = Figure(figsize=(5.6 * len(axes), 3.3 * len(METRICS) + 0.9), layout="constrained")
    panels = drawn.subplots(len(METRICS), len(axes), squeeze=False, sharey="row")
    attacks = page.summary[~page.summary["floor"].astype(bool)]["attack"].drop_duplicates().tolist()
    for column, kind in enumerate(axes):
        rows = _rows(page, kind, components)
        for metric, panel in zip(METRICS, panels[:, column]):
            _draw(panel, page, kind, rows, attacks, metric)
            if column == 0:
                panel.set_ylabel(_UNITS[metric])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))), fontsize=9)
    drawn.suptitle(plain(" · ".join(page.block)), fontsize=11)
    return drawn


def _draw(
    panel: Any,
    page: Page,
    kind: Kind,
    rows: Sequence[tuple[Level, dict[str, pd.Series]]],
    attacks: Sequence[str],
    metric: str,
) -> None:
    """Draw one metric along one axis, with intervals, and the best floor as a dashed line."""
    places = _places([level for level, _ in rows], kind)
    apart = 0.06 * (max(places, default=0) - min(places, default=0)) / max(1, len(places) - 1)
    for index, attack in enumerate(attacks):
        points = [
            (place + apart * (index - (len(attacks) - 1) / 2), *_interval(by[attack], metric))
            for place, (_, by) in zip(places, rows)
            if attack in by and math.isfinite(by[attack][metric])
        ]
        if not points:
            continue
        x, mean, low, high = np.array(points).T
        bars = np.nan_to_num(np.stack([mean - low, high - mean])).clip(min=0)
        style = {"color": COLOURS[index % len(COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        panel.errorbar(x, mean, bars, capsize=3, markersize=5, linewidth=1.4, label=plain(attack), **style)
    floors = page.summary[page.summary["floor"].astype(bool)][metric].dropna()
    if len(floors):
        panel.axhline(floors.max(), color="#5b5b5b", linestyle="--", linewidth=1, label="best floor")
    panel.set_xticks(places, [level.label for level, _ in rows], fontsize=8)
    panel.set_xlabel("relative noise" if kind == "noise" else "precision")
    panel.grid(alpha=0.3)


def _places(found: Sequence[Level], kind: Kind) -> list[float]:
    """Return where levels stand: by the logarithm of the noise, with 0 a decade below the least; precision evenly."""
    if kind == "precision":
        return [float(index) for index in range(len(found))]
    logs = [math.log10(level.order) for level in found if level.order > 0]
    return [math.log10(level.order) if level.order > 0 else min(logs, default=0.0) - 1 for level in found]
