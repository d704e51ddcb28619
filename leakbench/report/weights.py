"""``weights.md``: what leaks from weights, without the learning rate and with it, and behind defenses of weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leakbench.analysis.statistics import Array, bootstrap_interval, wilson_interval
from leakbench.core.registry import split_spec
from leakbench.core.text import ABSENT, number, percent
from leakbench.plan.matrix import RECOVERY
from leakbench.report.grids import COLOURS, plain
from leakbench.report.md import escape, table
from leakbench.store.records import TrialRecord

FILE = "weights.md"
"""The name of the report in a run's folder."""

THRESHOLD = 0.6
"""An image whose SSIM after alignment is at least this counts as recovered, as in the suite ``worst-case``."""

SCALE = "grids/weights-scale.png"
CURVES = "grids/weights-defenses.png"

_MARKERS = "osD^vP"
_PLACE = ("dataset", "model", "rate", "steps")
_WHO = ("method", "known")


def rows(results: pd.DataFrame, records: Mapping[str, TrialRecord], findings: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each trial on shared weights that was run, floors left out.

    Beside the columns of the results: ``rate`` and ``steps`` of the local training, ``known`` (the rate was granted),
    ``method`` (the attack, and what else it was told), ``unaware`` (the method without knowledge of the defense),
    ``recovered``, ``scale`` (k, NaN without), ``family`` and ``strength`` of a defense of weights; the family is empty
    for none, and None for any other defense, which no table of the report has.
    """
    scales = findings[findings["name"] == "scale"].set_index("trial")["value"]
    found = []
    for row in results.to_dict("records"):
        settings = json.loads(records[row["trial"]].cell)
        threat = settings["threat"]
        if threat["shares"] != "weights" or row["floor"] or row["status"] not in ("ok", "failed"):
            continue
        family, strength = _strength(settings["defense"])
        informed, told = _told(threat)
        found.append(
            {str(name): value for name, value in row.items()}
            | {
                "rate": threat["learning_rate"],
                "steps": threat["local_steps"],
                "known": threat["rate"] == "known",
                "name": settings["attack"]["name"],
                "told": told,
                "informed": informed,
                "recovered": row["status"] == "ok" and row[RECOVERY] >= THRESHOLD,
                "scale": float(scales.get(row["trial"], math.nan)),
                "family": family,
                "strength": strength,
            }
        )
    return _labelled(pd.DataFrame(found)) if found else pd.DataFrame()


def _told(threat: Mapping[str, Any]) -> tuple[str, str]:
    """Return in a few words whether an attacker is informed of the defense, and what else but the rate it is told."""
    informed = threat.get("informed", False)
    variant = f", informed ({informed})" if isinstance(informed, str) else ", informed" if informed else ""
    told = ", label known" if threat.get("labels") == "known" else ""
    told += f", {'+'.join(threat['reveals'])} revealed" if threat.get("reveals") else ""
    return variant, told + (", secrets sought" if threat.get("optimises") else "")


def _labelled(trials: pd.DataFrame) -> pd.DataFrame:
    """Return trials with the columns ``method`` and ``unaware``: an attack's name, with what sets it apart."""
    short = {
        (*place, spec): label
        for place, group in trials.groupby(["dataset", "model", "name"], sort=False)
        for spec, label in _apart(str(place[2]), list(group["attack"].unique())).items()
    }
    keys = zip(trials["dataset"], trials["model"], trials["name"], trials["attack"])
    label = pd.Series([short[key] for key in keys], index=trials.index) + trials["told"]
    return trials.assign(unaware=label, method=label + trials["informed"])


def _apart(name: str, specs: Sequence[str]) -> dict[str, str]:
    """Return for each spec of one attack its name with the options that not all of them have."""
    options = {spec: split_spec(spec, "attack")[2] for spec in specs}
    shared = set.intersection(*(set(own.items()) for own in options.values()))
    words = {
        spec: ", ".join(f"{option}={value}" for option, value in own.items() if (option, value) not in shared)
        for spec, own in options.items()
    }
    return {spec: f"{name}({rest})" if rest else name for spec, rest in words.items()}


def _strength(defense: Mapping[str, Any]) -> tuple[str | None, float]:
    """Return the family of a defense of weights, all options but its strength, and the strength."""
    if defense["name"] == "none":
        return "", 0.0
    after = ", against the exact model before" if defense.get("snapshots") == "after" else ""
    if defense["name"] == "weight-sparsify":
        return f"weight-sparsify{after}", float(defense["ratio"])
    if defense["name"] == "weight-noise":
        clip = "no clipping" if defense["clip"] is None else f"clipped at {defense['clip']:g}"
        undone = ", as released" if defense["as_released"] and defense["clip"] is not None else ""
        return f"weight-noise, {defense['kind']}, {clip}{undone}{after}", float(defense["scale"])
    return None, math.nan


@dataclass(frozen=True)
class Share:
    """How many of the images were recovered, with the 95 % Wilson interval over images."""

    n: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, cell: pd.DataFrame) -> Share:
        """Return the share of a cell's trials."""
        share = float(cell["recovered"].mean())
        return cls(len(cell), share, *wilson_interval(share, cell["image"].nunique()))

    def text(self) -> str:
        """Return ``75 % [41 %, 93 %]``."""
        return f"{percent(self.value)} [{percent(self.low)}, {percent(self.high)}]"


def markdown(name: str, trials: pd.DataFrame, unfinished: int, errors: int) -> str:
    """Return the report; it depends on nothing but its arguments.

    Args:
        name: of the run.
        trials: what ``rows`` returned.
        unfinished: how many planned trials have no result yet.
        errors: how many trials ended in an error, and are in no table.
    """
    parts = [f"# Leakage from weights: {escape(name)}"]
    if unfinished:
        parts.append(f"**The run is not finished**: {unfinished} of its trials have no result yet.")
    if errors:
        parts.append(f"**{errors} trials ended in an error** and are in no table; report.md says why.")
    others = sorted(trials.loc[trials["family"].isna(), "defense"].unique())
    if others:
        names = ", ".join(map(escape, others))
        parts.append(f"Defenses that are none of weights are in report.md alone: {names}.")
    parts += [_WORDS, _attacks(trials), "## Without a defense", _undefended(trials)]
    if trials["scale"].notna().any():
        parts += ["## The learned scale", _SCALE_WORDS, f"![k times the learning rate]({SCALE})", _scales(trials)]
    if families(trials):
        parts += ["## Behind defenses of weights", _DEFENSE_WORDS, f"![Recovered images by strength]({CURVES})"]
        parts.append(_defended(trials))
    return "\n\n".join(part for part in parts if part) + "\n"


_WORDS = f"""\
A client takes local steps of SGD on one image and sends its weights; the server has the model before and after. \
*Known* says that the attacker is granted the learning rate, which *hidden* keeps from it. Weights are float32: the \
smaller the rate, the more of the update is lost in their rounding.

An image is recovered where its SSIM after alignment is at least {THRESHOLD:g}; a trial that failed has not recovered \
its image. Shares have 95 % Wilson intervals over images. *Short of* compares an attack without the rate with one \
that has it, on the same images: the difference of the shares with a 95 % bootstrap interval over images, and whether \
the two shares' own intervals overlap."""

_SCALE_WORDS = """\
`dlm` learns the factor k between update and gradient; for one step at a learning rate r it should end at 1/r, that is \
k r = 1. Of several steps that are matched by their mean none need: where the first gradient is much larger than the \
others, k r ends near the number of steps. Filled marks are recovered images, hollow ones are not; where k is not \
positive, or off the axis, the mark is at its edge."""

_DEFENSE_WORDS = """\
The same images, weights and starts at every strength; 0 is no defense, of which nobody is informed. The noise counts \
in the units of the weights. An attacker that is *informed* models what the defense states of itself. What each \
strength costs in test accuracy is measured by `leakbench run tradeoff` (`benchmarks/dlm-cost.toml`)."""


def _attacks(trials: pd.DataFrame) -> str:
    """Return what the attacks were, where their names alone do not say it."""
    short = trials[trials["name"] != trials["attack"]].drop_duplicates(["dataset", "model", "name", "attack"])
    lines = [[escape(row[name]) for name in ("dataset", "model", "attack")] for row in short.to_dict("records")]
    return table(["dataset", "model", "attack, with its options"], lines, left=3) if lines else ""


def _undefended(trials: pd.DataFrame) -> str:
    plain = trials[trials["family"] == ""]
    headers = ["dataset", "model", "learning rate", "local steps", "attack", "rate", "n", "failed", "recovered"]
    headers += ["psnr&#95;aligned", "short of", "difference", "intervals overlap"]
    lines = []
    for place, group in plain.groupby(list(_PLACE), sort=False):
        dataset, model, rate, steps = place
        cells = dict(list(group.groupby(list(_WHO), sort=False)))
        for (method, known), cell in sorted(cells.items(), key=lambda pair: not pair[0][1]):
            share = Share.of(cell)
            line = [escape(dataset), escape(model), f"{rate:g}", str(steps), escape(method)]
            line += ["known" if known else "hidden", str(share.n), str(int((cell["status"] == "failed").sum()))]
            line += [share.text(), number(float(cell["psnr_aligned"].mean()), 1)]
            others = [
                (str(name), other)
                for (name, granted), other in cells.items()
                if granted and not known and other["told"].iloc[0] == cell["told"].iloc[0]
            ]
            lines.append(line + (_short(cell, others[0][1], others[0][0]) if others else [ABSENT] * 3))
    return table(headers, lines, left=2)


def _short(cell: pd.DataFrame, granted: pd.DataFrame, name: str) -> list[str]:
    """Return by how much an attack without the rate differs from one that has it."""
    keys = ["image", "seed"]
    pairs = cell[[*keys, "recovered"]].merge(granted[[*keys, "recovered"]], on=keys)
    gap: Array = pairs["recovered_x"].to_numpy(dtype=np.float64, copy=True)
    gap -= pairs["recovered_y"].to_numpy(dtype=np.float64)
    low, high = bootstrap_interval(gap, pairs["image"].to_numpy())
    own, other = Share.of(cell), Share.of(granted)
    overlap = own.low <= other.high and other.low <= own.high
    interval = f"[{_points(low)}, {_points(high)}]" if math.isfinite(low) else f"[{ABSENT}]"
    return [escape(name), f"{_points(float(gap.mean()))} {interval}", "yes" if overlap else "**no**"]


def _points(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−") + " %"


def _scales(trials: pd.DataFrame) -> str:
    learned = trials[trials["scale"].notna() & (trials["family"] == "")]
    headers = ["dataset", "model", "learning rate", "local steps", "attack", "rate", "recovered"]
    headers += ["median k r", "least", "largest"]
    lines = []
    for key, cell in learned.groupby([*_PLACE, *_WHO], sort=False):
        dataset, model, rate, steps, method, known = key
        own = (cell["scale"] * cell["rate"])[cell["recovered"].astype(bool)]
        line = [escape(dataset), escape(model), f"{rate:g}", str(steps), escape(method)]
        line += ["known" if known else "hidden", f"{len(own)} of {len(cell)}"]
        lines.append(line + [f"{value:.4g}" if len(own) else ABSENT for value in (own.median(), own.min(), own.max())])
    return table(headers, lines, left=2)


def families(trials: pd.DataFrame) -> list[str]:
    """Return the families of defenses of weights that were run."""
    return [str(family) for family in trials["family"].dropna().unique() if family]


def _levels(trials: pd.DataFrame, family: str) -> pd.DataFrame:
    """Return the trials of a family and, as its strength 0, those without a defense of the same places and attacks.

    Of an informed attack these are the trials of the one that is not: there is nothing to be informed of. A family that
    has a strength 0, or that clips whatever the strength is, is left as it is.
    """
    own = trials[trials["family"] == family]
    if ("clipped" in family and "as released" not in family) or (own["strength"] == 0).any():
        return own
    keys = [*_PLACE, "unaware", "known"]
    none = trials[(trials["family"] == "") & (trials["informed"] == "")].drop(columns="method")
    return pd.concat([none.merge(own[[*keys, "method"]].drop_duplicates(), on=keys), own])


def _defended(trials: pd.DataFrame) -> str:
    headers = ["defense", "strength", "dataset", "model", "learning rate", "local steps", "attack", "rate"]
    headers += ["n", "failed", "recovered"]
    lines = []
    for family in families(trials):
        group = _levels(trials, family).groupby([*_PLACE, "strength", *_WHO], sort=False)
        for key, cell in sorted(group, key=lambda pair: pair[0][:5]):
            dataset, model, rate, steps, strength, method, known = key
            share = Share.of(cell)
            line = [escape(family), f"{strength:g}", escape(dataset), escape(model), f"{rate:g}", str(steps)]
            line += [escape(method), "known" if known else "hidden", str(share.n)]
            lines.append([*line, str(int((cell["status"] == "failed").sum())), share.text()])
    return table(headers, lines, left=1)


def scale_png(trials: pd.DataFrame) -> bytes:
    """Return k times the learning rate of every trial that learned k, by network and local training, as a PNG."""
    learned = trials[trials["scale"].notna() & (trials["family"] == "")]
    learned = learned.assign(network=learned["model"] + " on " + learned["dataset"])
    models = learned["network"].drop_duplicates().tolist()
    figure = Figure(figsize=(1.5 + 4.4 * len(models), 3.8), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for panel, model in zip(panels, models):
        own = learned[learned["network"] == model]
        places = list(dict.fromkeys(zip(own["rate"], own["steps"], own["method"])))
        for index, (rate, steps, method) in enumerate(places):
            cell = own[(own["rate"] == rate) & (own["steps"] == steps) & (own["method"] == method)]
            value = (cell["scale"] * rate).clip(1e-2, 1e2).to_numpy(dtype=np.float64)
            x = index + np.linspace(-0.25, 0.25, len(cell))
            done = cell["recovered"].to_numpy(dtype=bool)
            panel.scatter(x[done], value[done], s=28, color=COLOURS[0], label="recovered", zorder=3)
            panel.scatter(x[~done], value[~done], s=28, facecolors="none", edgecolors=COLOURS[1], label="not recovered")
        panel.axhline(1, color="#5b5b5b", linestyle="--", linewidth=1)
        labels = [f"{method}\nrate {rate:g}\n{steps} step{'s' * (steps > 1)}" for rate, steps, method in places]
        panel.set_xticks(range(len(places)), labels, fontsize=8)
        panel.set_xlim(-0.6, len(places) - 0.4)
        panel.set_yscale("log")
        panel.set_ylim(8e-3, 1.25e2)
        panel.set_title(plain(model), fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("learned scale k × learning rate")
    handles, names = panels[0].get_legend_handles_labels()
    unique = dict(zip(names, handles))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, fontsize=9)
    return _png(canvas)


def defense_png(trials: pd.DataFrame) -> bytes:
    """Return the share of recovered images by the strength of each family of defenses of weights, as a PNG."""
    kinds = families(trials)
    places = list(dict.fromkeys(map(tuple, trials[trials["family"].isin(kinds)][list(_PLACE)].to_numpy())))
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(0.8 + 4.4 * columns, (0.5 + 3.1 * lines) * len(places) + 0.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(lines * len(places), columns, squeeze=False, sharey=True)
    drawn = trials[trials["family"].isin(kinds)]
    methods = drawn[[*_WHO, "unaware"]].drop_duplicates().sort_values(["known", "unaware"], ascending=[False, True])
    for index, place in enumerate(places):
        here = trials[(trials[list(_PLACE)] == list(place)).all(axis=1)]
        for number_, family in enumerate(kinds):
            panel = panels[index * lines + number_ // columns, number_ % columns]
            if not (here["family"] == family).any():
                panel.axis("off")
                continue
            _draw(panel, _levels(here, family), methods.to_records(index=False).tolist())
            steps = f"{place[3]} step{'s' * (place[3] > 1)}"
            title = plain(f"{place[1]} on {place[0]}, rate {place[2]:g}, {steps}")
            panel.set_title(f"{title}\n{plain(family)}", fontsize=8)
            if number_ % columns == 0:
                panel.set_ylabel("images recovered")
        for spare in range(len(kinds), lines * columns):
            panels[index * lines + spare // columns, spare % columns].axis("off")
    handles = {label: handle for panel in panels.flat for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return _png(canvas)


def _draw(panel: Any, trials: pd.DataFrame, methods: Sequence[tuple[str, bool, str]]) -> None:
    """Draw the shares of one family along its strengths, evenly spaced, a line for each attack; dashed: informed."""
    strengths = sorted(trials["strength"].unique())
    colours = list(dict.fromkeys((unaware, known) for _, known, unaware in methods))
    for index, (method, known, unaware) in enumerate(methods):
        own = trials[(trials["method"] == method) & (trials["known"] == known)]
        levels = [(place, own[own["strength"] == strength]) for place, strength in enumerate(strengths)]
        points = [(place, Share.of(cell)) for place, cell in levels if len(cell)]
        if not points:
            continue
        x = np.array([place for place, _ in points]) + 0.08 * (index - (len(methods) - 1) / 2)
        mean, low, high = (np.array([getattr(share, name) for _, share in points]) for name in ("value", "low", "high"))
        place = colours.index((unaware, known))
        style = {"color": COLOURS[place % len(COLOURS)], "marker": _MARKERS[place % len(_MARKERS)]}
        if method != unaware:
            style |= {"linestyle": "--", "markerfacecolor": "white"}
        bars = np.stack([mean - low, high - mean]).clip(min=0)
        label = f"{method}, rate {'known' if known else 'hidden'}"
        panel.errorbar(x, mean, bars, capsize=3, markersize=5, linewidth=1.4, label=plain(label), **style)
    panel.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths], fontsize=8)
    panel.set_xlim(-0.5, len(strengths) - 0.5)
    panel.set_ylim(-0.05, 1.05)
    panel.grid(alpha=0.3)


def _png(canvas: FigureCanvasAgg) -> bytes:
    stream = BytesIO()
    canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()
