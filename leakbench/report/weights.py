"""``weights.md``: what leaks from weights, without the learning rate and with it, and behind defenses of weights."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from leakbench.analysis.recovery import judged
from leakbench.analysis.statistics import UNIT, paired_difference
from leakbench.core.registry import split_spec
from leakbench.core.text import ABSENT, in_groups, number, percent, plural
from leakbench.report.display import to_markdown
from leakbench.report.figure import COLOURS, GREY, key_below, plain, style
from leakbench.report.run import RunData
from leakbench.report.study import Line, StudyPage, Value, draw_lines
from leakbench.store.records import TrialRecord
from leakbench.store.run_file import Store

FILE = "weights.md"
"""The name of the report in a run's folder."""

SSIM_THRESHOLD = 0.6
"""The threshold by which an image counts as recovered (``recovery.judged``), as in the suite ``worst-case``."""

SCALE_FILE = "grids/weights-scale.png"
DEFENSES_FILE = "grids/weights-defenses.png"

_PLACE = ["dataset", "model", "rate", "steps"]
_WHO = ["method", "known"]


def study(run: RunData, store: Store) -> StudyPage | None:
    """Return ``weights.md`` with its figures; None for a run whose clients share gradients."""
    every = rows(run.results, store.records(), store.findings())
    if every.empty:
        return None
    trials = every[~every["by_floor"]].reset_index(drop=True)
    left_out = every.loc[every["by_floor"], "image"].nunique()
    errors = int((run.results["status"] == "error").sum())
    return page(run.name, trials, run.planned - len(run.results), errors, left_out)


def rows(results: pd.DataFrame, records: Mapping[str, TrialRecord], findings: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each trial on shared weights that ended with a score, floors left out.

    Beside the columns of the results: ``rate`` and ``steps`` of the local training; ``known``, whether the attacker
    knows the rate; ``method``, the attack with what else it knows; ``oblivious``, the method without knowledge of the
    defense; ``told``, what it knows but the rate and the defense; those of ``judged``; ``scale``, k (NaN without one);
    ``family`` and ``strength`` of a defense of weights. The family is empty for no defense, and None for a defense that
    is not one of weights.
    """
    settings = {trial: json.loads(record.cell) for trial, record in records.items()}
    of_weights = {trial for trial, own in settings.items() if own["threat"]["shares"] == "weights"}
    scored = results["trial"].isin(of_weights) & results["status"].isin(["ok", "failed"])
    trials = judged(results, SSIM_THRESHOLD)[scored & ~results["floor"].astype(bool)].reset_index(drop=True)
    if trials.empty:
        return pd.DataFrame()
    own = [settings[trial] for trial in trials["trial"]]
    threats = [one["threat"] for one in own]
    adaptive, told = zip(*map(_knowledge, threats))
    family, strength = zip(*(_strength(one["defense"]) for one in own))
    return _labelled(
        trials.assign(
            rate=[threat["learning_rate"] for threat in threats],
            steps=[threat["local_steps"] for threat in threats],
            known=[threat["rate"] == "known" for threat in threats],
            name=[one["attack"]["name"] for one in own],
            told=told,
            adaptive=adaptive,
            scale=trials["trial"].map(findings[findings["name"] == "scale"].set_index("trial")["value"]).astype(float),
            family=family,
            strength=strength,
        )
    )


def _knowledge(threat: Mapping[str, Any]) -> tuple[str, str]:
    """Return in a few words whether an attacker is adaptive, and what else but the rate it knows."""
    informed = threat.get("informed", False)
    adaptive = f", adaptive ({informed})" if isinstance(informed, str) else ", adaptive" if informed else ""
    told = ", label known" if threat.get("labels") == "known" else ""
    told += f", {'+'.join(threat['reveals'])} revealed" if threat.get("reveals") else ""
    return adaptive, told + (", secrets optimised" if threat.get("optimises") else "")


def _labelled(trials: pd.DataFrame) -> pd.DataFrame:
    """Return trials with the columns ``method`` and ``oblivious``: an attack's name with the options that vary."""
    label = trials["name"].copy()
    for (*_, name), group in trials.groupby(["dataset", "model", "name"], sort=False):
        options = {spec: split_spec(spec, "attack")[2].items() for spec in group["attack"].unique()}
        shared = set.intersection(*map(set, options.values()))
        varying = {spec: ", ".join(f"{k}={v}" for k, v in own if (k, v) not in shared) for spec, own in options.items()}
        names = {spec: f"{name}({own})" if own else str(name) for spec, own in varying.items()}
        label.loc[group.index] = group["attack"].map(names)
    label += trials["told"]
    return trials.assign(oblivious=label, method=label + trials["adaptive"])


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


def recovered(cell: pd.DataFrame) -> Value:
    """Return the share of a cell's images that were recovered, with its 95 % interval."""
    return Value.of_share(cell.set_index(UNIT)["recovered"])


def page(name: str, trials: pd.DataFrame, unfinished: int, errors: int, left_out: int) -> StudyPage:
    """Return the page, with figures if an attack learned the scale and if there was a defense of weights.

    Args:
        name: of the run.
        trials: the rows of ``rows``.
        unfinished: how many planned trials have no result yet.
        errors: how many trials ended in an error, and are in no table.
        left_out: how many images are in no table because a floor recovers them.
    """
    short = trials[trials["name"] != trials["attack"]].drop_duplicates(["dataset", "model", "name", "attack"])
    attacks = short[["dataset", "model", "attack"]].rename(columns={"attack": "attack, with its options"})
    facts = {
        "name": name,
        "unfinished": unfinished,
        "errors": errors,
        "left_out": left_out,
        "threshold": SSIM_THRESHOLD,
        "others": sorted(trials.loc[trials["family"].isna(), "defense"].unique()),
        "attacks": to_markdown(attacks, left=3),
        "undefended": _undefended(trials),
        "scales": _scales(trials),
        "defended": _defended(trials),
        "scale_file": SCALE_FILE,
        "defense_file": DEFENSES_FILE,
    }
    figures = {SCALE_FILE: scale_figure(trials)} if len(_learned(trials)) else {}
    return StudyPage(FILE, facts, figures | ({DEFENSES_FILE: defense_figure(trials)} if families(trials) else {}))


def _row(cell: pd.DataFrame) -> dict[str, object]:
    """Return the names and counts of a cell, whose trials have the same place, attack and knowledge."""
    one = cell.iloc[0]
    share, low, high = map(percent, recovered(cell))
    images, groups = cell["image"].nunique(), cell["group"].nunique()
    return {
        "dataset": one["dataset"],
        "model": one["model"],
        "learning rate": f"{one['rate']:g}",
        "local steps": one["steps"],
        "attack": one["method"],
        "rate": "known" if one["known"] else "hidden",
        "n": in_groups(len(cell), len(cell) if groups == images else groups),
        "failed": int((cell["status"] == "failed").sum()),
        "recovered": f"{share} [{low}, {high}]",
    }


def _undefended(trials: pd.DataFrame) -> list[dict[str, object]]:
    """Return the rows without a defense: those with the rate known first, in each place."""
    found = []
    for _, group in trials[trials["family"] == ""].groupby(_PLACE, sort=False):
        ranked = group.sort_values("known", ascending=False, kind="stable")
        for (_, known), cell in ranked.groupby(_WHO, sort=False):
            twins = group[group["known"] & (group["told"] == cell["told"].iloc[0])]
            gap: dict[str, object] = dict.fromkeys(("compared with", "difference", "intervals overlap"), ABSENT)
            if len(twins) and not known:
                gap = _gap(cell, twins[twins["method"] == twins["method"].iloc[0]])
            found.append(_row(cell) | {"psnr_aligned": number(float(cell["psnr_aligned"].mean()), 1)} | gap)
    return found


def _gap(cell: pd.DataFrame, with_rate: pd.DataFrame) -> dict[str, object]:
    """Return by how much the share of an attack without the rate differs from that of an attack that knows it."""
    gap = paired_difference(*(arm.set_index(UNIT)["recovered"] for arm in (cell, with_rate)))
    interval = f"{_points(gap.low)}, {_points(gap.high)}" if math.isfinite(gap.low) else ABSENT
    return {
        "compared with": with_rate["method"].iloc[0],
        "difference": f"{_points(gap.mean)} [{interval}]",
        "intervals overlap": "yes" if recovered(cell).overlaps(recovered(with_rate)) else "no",
    }


def _points(share: float) -> str:
    return f"{number(100 * share, 0, sign=True)} %"


def _learned(trials: pd.DataFrame) -> pd.DataFrame:
    """Return the trials without a defense that learned the scale k."""
    return trials[trials["scale"].notna() & (trials["family"] == "")]


def _scales(trials: pd.DataFrame) -> list[dict[str, object]]:
    found = []
    for _, cell in _learned(trials).groupby([*_PLACE, *_WHO], sort=False):
        own = (cell["scale"] * cell["rate"])[cell["recovered"].astype(bool)]
        values = {"median k r": own.median(), "least": own.min(), "largest": own.max()}
        texts = {name: f"{value:.4g}" if len(own) else ABSENT for name, value in values.items()}
        names = {key: text for key, text in _row(cell).items() if key not in ("n", "failed")}
        found.append(names | {"recovered": f"{len(own)} of {len(cell)}"} | texts)
    return found


def families(trials: pd.DataFrame) -> list[str]:
    """Return the families of defenses of weights that were run."""
    return [str(family) for family in trials["family"].dropna().unique() if family]


def _levels(trials: pd.DataFrame, family: str) -> pd.DataFrame:
    """Return the trials of a family and, as its strength 0, those without a defense of the same places and attacks.

    For an adaptive attack these are the trials of the oblivious one: without a defense, both are the same. A family
    that has a strength 0, or that clips whatever the strength is, is left as it is.
    """
    own = trials[trials["family"] == family]
    if ("clipped" in family and "as released" not in family) or (own["strength"] == 0).any():
        return own
    keys = [*_PLACE, "oblivious", "known"]
    none = trials[(trials["family"] == "") & (trials["adaptive"] == "")].drop(columns="method")
    return pd.concat([none.merge(own[[*keys, "method"]].drop_duplicates(), on=keys), own])


def _defended(trials: pd.DataFrame) -> list[dict[str, object]]:
    return [
        {"defense": family, "strength": f"{key[4]:g}"} | _row(cell)
        for family in families(trials)
        for key, cell in sorted(
            _levels(trials, family).groupby([*_PLACE, "strength", *_WHO], sort=False), key=lambda pair: pair[0][:5]
        )
    ]


def scale_figure(trials: pd.DataFrame) -> Figure:
    """Return k times the learning rate of every trial that learned k, by network and local training."""
    networks = list(_learned(trials).groupby(["model", "dataset"], sort=False))
    drawn = Figure(figsize=(1.5 + 4.4 * len(networks), 3.8), layout="constrained")
    panels = drawn.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    for panel, ((model, dataset), own) in zip(panels, networks):
        labels = []
        for index, (_, cell) in enumerate(own.groupby(["rate", "steps", "method"], sort=False)):
            one = cell.iloc[0]
            labels.append(f"{one['method']}\nrate {one['rate']:g}\n{plural(int(one['steps']), 'step')}")
            value = (cell["scale"] * cell["rate"]).clip(1e-2, 1e2).to_numpy(dtype=np.float64)
            x = index + np.linspace(-0.25, 0.25, len(cell))
            done = cell["recovered"].to_numpy(dtype=bool)
            panel.scatter(x[done], value[done], s=28, color=COLOURS[0], label="recovered", zorder=3)
            panel.scatter(x[~done], value[~done], s=28, facecolors="none", edgecolors=COLOURS[1], label="not recovered")
        panel.axhline(1, color=GREY, linestyle="--", linewidth=1)
        panel.set_xticks(range(len(labels)), labels, fontsize=8)
        panel.set_xlim(-0.6, len(labels) - 0.4)
        panel.set_yscale("log")
        panel.set_ylim(8e-3, 1.25e2)
        panel.set_title(plain(f"{model} on {dataset}"), fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("learned scale k × learning rate")
    key_below(drawn, panels)
    return drawn


def defense_figure(trials: pd.DataFrame) -> Figure:
    """Return the share of recovered images by the strength of a defense, a panel for each place and family."""
    blocks = [
        (family, _levels(here, family)) for _, here in trials.groupby(_PLACE, sort=False) for family in families(here)
    ]
    columns = min(3, len(blocks))
    lines = math.ceil(len(blocks) / columns)
    drawn = Figure(figsize=(0.8 + 4.4 * columns, 0.6 + 3.2 * lines), layout="constrained")
    panels = drawn.subplots(lines, columns, squeeze=False, sharey=True)
    attacks = trials.loc[trials["family"].isin(families(trials)), [*_WHO, "oblivious"]].drop_duplicates()
    attacks = attacks.sort_values(["known", "oblivious"], ascending=[False, True])
    for panel, (family, levels) in zip(panels.flat, blocks):
        _draw_family(panel, levels, [tuple(row) for row in attacks.to_numpy()])
        one = levels.iloc[0]
        place = f"{one['model']} on {one['dataset']}, rate {one['rate']:g}, {plural(int(one['steps']), 'step')}"
        panel.set_title(f"{plain(place)}\n{plain(family)}", fontsize=8)
    for spare in panels.flat[len(blocks) :]:
        spare.axis("off")
    for line in panels:
        line[0].set_ylabel("images recovered")
    key_below(drawn, panels)
    return drawn


def _draw_family(panel: Any, trials: pd.DataFrame, attacks: Sequence[tuple[str, bool, str]]) -> None:
    """Draw the shares along a family's strengths, evenly spaced, a line for each attack; dashed if it is adaptive."""
    strengths = sorted(trials["strength"].unique())
    looks = list(dict.fromkeys((oblivious, known) for _, known, oblivious in attacks))
    lines = []
    for method, known, oblivious in attacks:
        own = trials[(trials["method"] == method) & (trials["known"] == known)]
        cells = own.groupby("strength")
        points = [(float(strengths.index(strength)), *recovered(cell)) for strength, cell in cells]
        dashed = {} if method == oblivious else {"linestyle": "--", "markerfacecolor": "white"}
        label = f"{method}, rate {'known' if known else 'hidden'}"
        lines.append(Line(label, points, style(looks.index((oblivious, known))) | dashed))
    draw_lines(panel, lines, {float(place): f"{strength:g}" for place, strength in enumerate(strengths)})
    panel.set_xlim(-0.5, len(strengths) - 0.5)
    panel.set_ylim(-0.05, 1.05)
