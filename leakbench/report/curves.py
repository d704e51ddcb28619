"""``curves.md``: what leaks as the gradient that is sent is made less exact, by relative noise or by fewer bits."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from leakbench import defenses
from leakbench.analysis.summary import blocks
from leakbench.core.text import decimals, slug
from leakbench.errors import BadOption
from leakbench.plan.matrix import Matrix
from leakbench.report.display import leakage_table, mean_text, to_markdown
from leakbench.report.figure import GREY, Drawing, key_below, plain, style
from leakbench.report.run import RunData
from leakbench.report.study import Line, StudyPage, draw_lines
from leakbench.store.records import MetricInfo, StoredComponent

FILE = "curves.md"
"""The name of the report in a run's folder."""

CURVE_METRICS = ("psnr_aligned", "ssim_aligned")
"""What is drawn and listed."""

MIN_STRENGTHS = 2
"""A run with fewer strengths of a kind has no curve."""

_UNITS = {"psnr_aligned": "PSNR after alignment, dB", "ssim_aligned": "SSIM after alignment"}

Kind = Literal["noise", "precision"]
_TITLES: dict[Kind, str] = {
    "noise": "Gaussian noise, relative to the root mean square of each parameter's gradient",
    "precision": "Precision of every entry that is sent",
}


@dataclass(frozen=True)
class Level:
    """How inexact a defense makes the gradient.

    Attributes:
        defense: its spec.
        kind: by ``noise``, or by the ``precision`` of transport.
        order: the place along the axis: the relative noise, or the bits.
        label: the strength in words.
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
        name = one.name
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
    """Return the axes along which a run has a curve: those with at least two strengths beside the exact gradient."""
    strengths = [level.kind for level in levels(components) if level.defense != "none"]
    return [kind for kind in _TITLES if strengths.count(kind) >= MIN_STRENGTHS]


def check(plans: Sequence[Matrix]) -> None:
    """Raise BadOption if matrices have no curve."""
    own = [defense for plan in plans for defense in plan.defenses]
    if not kinds([StoredComponent("defense", defenses.spec(one), one.version, one.options()) for one in own]):
        raise BadOption(
            f"the defenses hold fewer than {MIN_STRENGTHS} strengths of relative noise or of precision; "
            'give for example --defense "noise(scale=1e-4, relative=true)" and --defense "quantise(bits=8)"'
        )
    if any(plan.threshold is not None for plan in plans):
        raise BadOption("the matrix has a threshold, and a curve needs every trial; leave the threshold out")


@dataclass(frozen=True)
class CurvesPage:
    """The curves of one dataset, model and threat model.

    Attributes:
        block: dataset, model and threat model.
        file: the figure's name.
        summary: the block's rows of ``summarise``.
        levels: the strengths that were attacked, for each axis that has a curve.
    """

    block: tuple[str, str, str]
    file: str
    summary: pd.DataFrame
    levels: dict[Kind, list[Level]]

    @property
    def attacked(self) -> pd.DataFrame:
        """The rows of attacks, without floors."""
        return self.summary[~self.summary["floor"].astype(bool)]

    def best_floor(self, metric: str) -> dict[Hashable, Any] | None:
        """Return the row of the floor with the highest mean; None if no floor has one."""
        floors = self.summary[self.summary["floor"].astype(bool) & self.summary[metric].notna()]
        return max(floors.to_dict("records"), key=lambda row: float(row[metric]), default=None)


def pages(summary: pd.DataFrame, components: Sequence[StoredComponent]) -> list[CurvesPage]:
    """Return one page for each dataset, model and threat model under which the strengths of a curve were attacked."""
    found: list[CurvesPage] = []
    for names, block in blocks(summary):
        attacked = set(block.loc[~block["floor"].astype(bool), "defense"])
        own = [one for one in components if one.spec in attacked]
        axes = {kind: [level for level in levels(own) if level.kind == kind] for kind in kinds(own)}
        if axes:
            found.append(CurvesPage(names, f"curves-{len(found) + 1:03}-{slug(names)}.png", block, axes))
    return found


def study(run: RunData) -> StudyPage | None:
    """Return ``curves.md`` with its figures; None for a run without curves."""
    found = pages(run.summary, run.components)
    if not found or run.threshold is not None:
        return None
    shown, blocks = _shown(run.metrics), []
    for page in found:
        best = [(metric.name, page.best_floor(metric.name)) for metric in shown]
        floors = [
            f"{name} {mean_text(row, name, decimals([row[name]]))} ({row['attack']})" for name, row in best if row
        ]
        blocks.append((page, floors, [(_TITLES[kind], _table(page, kind, shown)) for kind in page.levels]))
    return StudyPage(FILE, {"pages": blocks}, {f"grids/{page.file}": figure(page) for page in found})


def _shown(metrics: Sequence[MetricInfo]) -> list[MetricInfo]:
    return [metric for metric in metrics if metric.name in CURVE_METRICS]


def _table(page: CurvesPage, kind: Kind, metrics: Sequence[MetricInfo]) -> str:
    """Return the leakage table of an axis, by strength and attack."""
    by_level = [
        page.attacked[page.attacked["defense"] == level.defense].assign(defense=level.label)
        for level in page.levels[kind]
    ]
    shown = leakage_table(pd.concat(by_level), metrics, CURVE_METRICS).rename(columns={"defense": kind})
    return to_markdown(shown[[kind, *shown.columns.drop(kind)]])


def figure(page: CurvesPage) -> Figure:
    """Return a page's curves: a column for each axis, a row for each metric, a line for each attack."""
    drawn = Drawing(figsize=(5.6 * len(page.levels), 3.3 * len(CURVE_METRICS) + 0.9), layout="constrained")
    panels = drawn.subplots(len(CURVE_METRICS), len(page.levels), squeeze=False, sharey="row")
    attacks = page.attacked["attack"].drop_duplicates().tolist()
    for column, (kind, own) in enumerate(page.levels.items()):
        places = dict(zip((level.defense for level in own), _places(own)))
        ticks = {places[level.defense]: level.label for level in own}
        for metric, panel in zip(CURVE_METRICS, panels[:, column]):
            rows = page.attacked[page.attacked["defense"].isin(places) & page.attacked[metric].notna()]
            rows = rows.assign(place=rows["defense"].map(places)).sort_values("place")
            numbers = ["place", metric, f"{metric} low", f"{metric} high"]
            lines = [
                Line(attack, rows.loc[rows["attack"] == attack, numbers].to_numpy().tolist(), style(index))
                for index, attack in enumerate(attacks)
            ]
            draw_lines(panel, lines, ticks)
            if (floor := page.best_floor(metric)) is not None:
                panel.axhline(floor[metric], color=GREY, linestyle="--", linewidth=1, label="best floor")
            panel.set_xlabel("relative noise" if kind == "noise" else "precision")
            if column == 0:
                panel.set_ylabel(_UNITS[metric])
    key_below(drawn, panels[0, 0])
    drawn.suptitle(plain(" · ".join(page.block)), fontsize=11)
    return drawn


def _places(own: Sequence[Level]) -> list[float]:
    """Return the places along the axis: log10 of the noise, with 0 a decade below the least; precision evenly."""
    if own[0].kind == "precision":
        return [float(index) for index in range(len(own))]
    logs = [math.log10(level.order) for level in own if level.order > 0]
    return [math.log10(level.order) if level.order > 0 else min(logs, default=0.0) - 1 for level in own]
