"""``report.html``: a run as one page, with its worst case, matrix, galleries and every trial."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from leakbench.analysis.ensemble import RECOVERED, EnsembleResult, ensemble_results, floor_share
from leakbench.analysis.pareto import Study
from leakbench.analysis.reproduce import reproduction
from leakbench.analysis.summary import ANY, BLOCK, STATUSES, strongest, summarise, without_repeats
from leakbench.core.text import ABSENT, decimals, english, number, percent, plural, with_interval
from leakbench.plan.matrix import RECOVERY
from leakbench.report.about import MIXED, facts, mixed
from leakbench.report.markdown import MAIN, Run, notes
from leakbench.report.page import SCRIPTS, STYLES, embedded, picture, render
from leakbench.report.sprites import COLUMNS, LARGEST, ROWS, Sheet, png, sheets, tile
from leakbench.store.records import MetricInfo, Pictures, threshold_of

LIMIT = 9_500_000
"""So many bytes a page may have; pictures beyond it are left out."""

_CODE = 200_000
_BATCH = 512
_SMALLEST = 200
_AXES = ("dataset", "model", "threat", "defense", "attack")
_SHOWN = ("psnr_aligned", "ssim_aligned", "lpips_vgg", "psnr")
_RANKED = (RECOVERY, "psnr_aligned", "psnr")
_STEPS = 4
_PAPER = "paper_"
_LETTER, _LINE = 6.6, 14  # pixels of a letter and a line of the labels in a figure
_INFORMED = re.compile(r"\binformed=([\w-]+)")

PicturesOf = Callable[[Sequence[str]], Mapping[str, Pictures]]
"""From trials to their pictures (``Store.images``)."""


@dataclass(frozen=True)
class Defended:
    """What the page says of one defense in its first table.

    Attributes:
        standing: what the ensemble of attackers recovers.
        by: the attackers that recover most, and how many images.
        gain: of the strongest attacker over the best floor in ``psnr_aligned``, mean and interval; None without one.
        attacker: that attacker; empty where none beats the floor.
    """

    standing: EnsembleResult
    by: str
    gain: tuple[float, float, float] | None
    attacker: str


@dataclass(frozen=True)
class Scene:
    """The worst case behind each defense, for one dataset and model.

    Attributes:
        words: what a reader should take away.
        floor: the share of images that the best floor recovers; None without a floor.
        least: the lower end of the axis of gains, ``most`` the upper one.
    """

    dataset: str
    model: str
    words: tuple[str, ...]
    defenses: tuple[Defended, ...]
    floor: float | None
    least: float
    most: float


Curves = Mapping[str, Sequence[tuple[int, float]]]
"""By trial: the objective at some evaluations (``Store.curves``)."""


def html(
    run: Run,
    trials: pd.DataFrame,
    pictures: PicturesOf,
    studies: Sequence[Study] = (),
    curves: Curves | None = None,
) -> str:
    """Return the page of a run; it depends on nothing but its arguments.

    Args:
        run: all that the report says; its results have every trial that ended.
        trials: every planned trial in the order of planning (``Store.trials``).
        pictures: from the trials of ``run`` to their pictures.
        studies: utility and leakage, where trainings were studied beside.
        curves: how the objective of each trial fell, where that is known.
    """
    once = without_repeats(run.results)
    metrics = _metrics(run)
    own = threshold_of(run.sessions)
    threshold = RECOVERED if own is None else own
    summary = summarise(run.results, metrics)
    scenes = _scenes(trials, summary, metrics, threshold, own is not None, notes(run.components))
    axes = {axis: list(dict.fromkeys(once[axis].astype(str))) for axis in _AXES}
    ranked = next((name for name in _RANKED if any(m.name == name for m in metrics)), "")
    ranking = next((metric for metric in metrics if metric.name == ranked), metrics[0] if metrics else None)
    galleries = _galleries(once, axes, ranking, summary)
    data: dict[str, Any] = {
        "axes": axes,
        "words": [run.threats.get(threat, "") for threat in axes["threat"]],
        "options": _options(run, axes),
        "statements": _statements(run, axes),
        "metrics": _metric_data(metrics, summary),
        "ranked": None if ranking is None else metrics.index(ranking),
        "statuses": list(STATUSES),
        "cells": _cells(summary, metrics, axes),
        "galleries": galleries,
        "trials": {**_trials(once, metrics, axes, run), **_courses(once, curves or {})},
    }
    room = LIMIT - _CODE - len(embedded(data).encode())
    found, places = _sprites(once, galleries, pictures, room)
    data["sheets"] = [[sheet.width, sheet.height] for sheet in found]
    data["sheetColumns"] = COLUMNS
    data["trials"] |= places
    left_out = places["picture"].count(_LEFT_OUT)
    context = {
        "title": f"Leakage report: {run.name}",
        "name": run.name,
        "scenes": scenes,
        "threshold": threshold,
        "skips": own is not None,
        "recovery": any(metric.name == RECOVERY for metric in metrics),
        "ended": len(run.results),
        "planned": run.planned,
        "counts": {status: int((run.results["status"] == status).sum()) for status in STATUSES},
        "facts": facts(run.sessions, run.results, run.planned),
        "mixed": MIXED if mixed(run.sessions) else "",
        "threats": {threat: run.threats.get(threat, "") for threat in axes["threat"]},
        "metrics": metrics,
        "ranking": ranking,
        "left_out": left_out,
        "studies": [(study, scatter(study)) for study in studies],
        "sheets": [picture(sheet.png) for sheet in found],
        "ANY": ANY,
        "percent": percent,
        "plural": plural,
        "share": share,
        "gain": gain,
        "along": along,
        "number": number,
        "ABSENT": ABSENT,
    }
    return render("report.html.j2", context, data, (*STYLES, "report.css"), (*SCRIPTS, "report.js"))


def worst(run: Run, trials: pd.DataFrame) -> list[Scene]:
    """Return the worst case behind each defense, for each dataset and model; arguments are those of ``html``."""
    own = threshold_of(run.sessions)
    metrics = _metrics(run)
    summary = summarise(run.results, [metric for metric in metrics if metric.name == "psnr_aligned"])
    return _scenes(trials, summary, metrics, RECOVERED if own is None else own, own is not None, notes(run.components))


def share(one: EnsembleResult) -> str:
    """Return how much is recovered, in few words: a count of images, or with several seeds of each a share."""
    if math.isnan(one.share):
        return "not tried yet" if one.open else "no attacker has a score"
    counted = f"{one.share * one.images:.0f} of {one.images}" if one.targets == one.images else percent(one.share)
    return f"{counted} so far" if one.open else counted


def gain(value: tuple[float, float, float]) -> str:
    """Return a gain in dB with its interval."""
    return with_interval(*value, 1, sign=True)


def along(value: float, least: float, most: float) -> str:
    """Return where a value stands on an axis from ``least`` to ``most``, in per cent of its width, inside a margin."""
    inside = min(max(value, least), most) if math.isfinite(value) else most
    return f"{2 + 96 * (inside - least) / ((most - least) or 1):.2f}%"


def _metrics(run: Run) -> list[MetricInfo]:
    """Return the metrics with a value: those that the matrix shows first, the paper's last."""
    known = {m.name: m for m in run.metrics if m.name in run.results and run.results[m.name].notna().any()}
    plain = [name for name in known if not name.startswith(_PAPER)]
    order = dict.fromkeys([name for name in (*_SHOWN, *MAIN) if name in known] + plain + list(known))
    return [known[name] for name in order]


def _scenes(
    trials: pd.DataFrame,
    summary: pd.DataFrame,
    metrics: Sequence[MetricInfo],
    threshold: float,
    skips: bool,
    images: Mapping[str, str],
) -> list[Scene]:
    """Return the worst case behind each defense; gains are left out where attackers skipped what others recovered."""
    if RECOVERY not in trials:
        trials = trials.assign(**{RECOVERY: math.nan})
    gains = _gains(summary) if not skips and any(m.name == "psnr_aligned" for m in metrics) else {}
    grouped: dict[tuple[str, str], list[EnsembleResult]] = {}
    for one in ensemble_results(trials, threshold):
        grouped.setdefault((one.dataset, one.model), []).append(one)
    found = []
    for (dataset, model), own in grouped.items():
        here = trials[(trials[["dataset", "model"]] == [dataset, model]).all(axis=1)]
        rows = [_defended(one, here, threshold, skips, gains.get((dataset, model, one.defense))) for one in own]
        rows.sort(key=lambda row: (_last(row.standing.share), -math.inf if row.gain is None else row.gain[0]))
        ends = [edge for row in rows if row.gain for edge in row.gain if math.isfinite(edge)]
        words = _words(rows) if any(m.name == RECOVERY for m in metrics) else ()
        words += (images[dataset],) if dataset in images else ()
        least, most = min([0.0, *ends]), max([1.0, *ends])
        floor = floor_share(here, threshold)
        found.append(Scene(dataset, model, words, tuple(rows), None if math.isnan(floor) else floor, least, most))
    return found


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _gains(summary: pd.DataFrame) -> dict[tuple[str, str, str], tuple[str, tuple[float, float, float]]]:
    """Return (dataset, model, defense) -> the attacker that gains most, under whatever threat model."""
    found: dict[tuple[str, str, str], tuple[str, tuple[float, float, float]]] = {}
    for row in strongest(summary, "psnr_aligned").to_dict("records"):
        key = (str(row["dataset"]), str(row["model"]), str(row["defense"]))
        value = (float(row["gain"]), float(row["low"]), float(row["high"]))
        if key not in found or value[0] > found[key][1][0]:
            found[key] = ("" if row["floor"] else f"{row['attack']}, {row['threat']}", value)
    return found


def _defended(
    one: EnsembleResult,
    trials: pd.DataFrame,
    threshold: float,
    skips: bool,
    best: tuple[str, tuple[float, float, float]] | None,
) -> Defended:
    """Return one defense's row: where attackers skipped, by whom an image was first recovered; else who got most."""
    if skips:
        by = ", ".join(f"{effort.attacker}: {effort.recovered}" for effort in one.attackers if effort.recovered)
    else:
        own = trials[(trials["defense"] == one.defense) & ~trials["floor"].to_numpy(dtype=bool)]
        hit = own[(own["status"] == "ok") & (own[RECOVERY] >= threshold)]
        counts = hit.groupby(["attack", "threat"], sort=False).size().sort_values(ascending=False, kind="stable")
        several = own["threat"].nunique() > 1
        by = ", ".join(
            f"{attack}{f' ({threat})' if several else ''}: {count}"
            for attack, threat, count in counts.head(3).reset_index(name="count").itertuples(index=False, name=None)
        )
    attacker, value = ("", None) if best is None else best
    return Defended(one, by, value, attacker)


def _words(rows: Sequence[Defended]) -> tuple[str, ...]:
    """Return in words which defenses give away least and which most, and whether they are told apart."""
    known = [row.standing for row in rows if not math.isnan(row.standing.share)]
    if not known:
        return ("No attacker has a score yet: nothing can be said of these defenses.",)
    least, most = _equal(known[0], known), _equal(known[-1], known)
    if len(known) == 1:
        return (f"Behind “{known[0].defense}”, {_of(known[0])}.",)
    if len(least) == len(known):
        return (f"Behind each of the {len(known)} defenses, {_of(known[0])}: the share does not tell them apart.",)
    words = (
        f"{_named(least)} away least: {_of(least[0])}.",
        f"{_named(most)} away most: {_of(most[0])}.",
    )
    if least[0].high >= most[0].low:
        return (*words, "These intervals overlap: so few images do not tell them apart.")
    near = [one for one in known if one not in least and one.low <= least[0].high]
    if not near:
        return words
    return (*words, f"{plural(len(near), 'other defense')} cannot be told apart from the least by so few images.")


def _equal(one: EnsembleResult, others: Sequence[EnsembleResult]) -> list[EnsembleResult]:
    return [other for other in others if (other.share, other.images) == (one.share, one.images)]


def _named(group: Sequence[EnsembleResult]) -> str:
    if len(group) > 4:
        return f"{len(group)} defenses give"
    return f"{english(f'“{one.defense}”' for one in group)} give{'s' * (len(group) == 1)}"


def _of(one: EnsembleResult) -> str:
    if one.share == 0:
        interval = f"95 % interval up to {percent(one.high)}"
        return f"none of {plural(one.images, 'image')} recovered ({interval})".replace(" %", "\u00a0%")
    found = share(one) if " of " in share(one) else f"{share(one)} of {one.images}"
    interval = f"95 % interval {100 * one.low:.0f} to {percent(one.high)}"
    return f"{found} image{'s' * (one.images != 1)} recovered ({interval})".replace(" %", "\u00a0%")


def _options(run: Run, axes: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, object]]]:
    """Return every option of each component, in the order of its axis."""
    known = {(one.kind, one.spec): {**one.options, "version": one.version} for one in run.components}
    found = {kind: [known.get((kind, spec), {}) for spec in axes[kind]] for kind in _AXES if kind != "threat"}
    return found


def _statements(run: Run, axes: Mapping[str, Sequence[str]]) -> list[list[list[str]]]:
    """Return what each defense states of itself, once for each threat model: its note, and what the informed do."""
    known = {one.spec: one.statement for one in run.components if one.kind == "defense"}
    found = []
    for defense in axes["defense"]:
        own = known.get(defense)
        informed = {} if own is None else own.informed
        ways = [_INFORMED.search(threat) for threat in axes["threat"]]
        words = [informed.get(way[1], "") if way is not None else "" for way in ways]
        found.append([[text for text in ("" if own is None else own.note, word) if text] for word in words])
    return found


def _metric_data(metrics: Sequence[MetricInfo], summary: pd.DataFrame) -> list[dict[str, object]]:
    shown = [name for name in _SHOWN if any(m.name == name for m in metrics)] or [m.name for m in metrics[:3]]
    return [
        {
            "name": metric.name,
            "higher": metric.higher_is_better,
            "convention": metric.convention,
            "note": metric.note,
            "places": decimals(summary[metric.name]),
            "shown": metric.name in shown,
        }
        for metric in metrics
    ]


def _cells(
    summary: pd.DataFrame, metrics: Sequence[MetricInfo], axes: Mapping[str, Sequence[str]]
) -> list[list[object]]:
    """Return one row per cell: axes, floor, n and statuses, then eight values for each metric.

    They are its mean, low, high and n, its gain, low and high, and the step of the gain's colour.
    """
    place = _places(axes)
    columns = []
    for metric in metrics:
        name = metric.name
        gains = summary[f"{name} gain"].to_numpy(dtype=np.float64)
        for part in ("", " low", " high", " n", " gain", " gain low", " gain high"):
            columns.append([_short(value) for value in summary[f"{name}{part}"]])
        columns.append([_step(value, _largest(gains)) for value in gains])
    heads = [[place[axis][str(value)] for value in summary[axis]] for axis in _AXES]
    counts = [summary[name].astype(int).tolist() for name in ("floor", "n", *STATUSES)]
    return [list(row) for row in zip(*heads, *counts, *columns)]


def _largest(gains: Iterable[float]) -> float:
    return max((value for value in gains if math.isfinite(value) and value > 0), default=0.0)


def _step(value: float, largest: float) -> int:
    """Return the step of a gain's colour: quarters of the largest gain in the metric, -1 below the floor."""
    if math.isnan(value):
        return 0
    if value <= 0:
        return -1 if value < 0 else 0
    return _STEPS if not value < largest else 1 + int(_STEPS * value / largest)


def _short(value: object) -> object:
    """Return a number with six digits, so that data stay small."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    if not isinstance(value, (float, np.floating)) or not math.isfinite(value):
        return None if isinstance(value, (float, np.floating)) and math.isnan(value) else value
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _places(axes: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    return {axis: {value: index for index, value in enumerate(values)} for axis, values in axes.items()}


def chosen(cell: pd.DataFrame, metric: MetricInfo) -> list[int]:
    """Return the rows (labels) of the best, the median and the worst reconstruction of a cell, by leakage.

    Trials with a value in the metric are ordered from most to least leakage, ties by image and seed; the median is the
    lower one of an even number. Of two trials there is no median, of one there is the best alone.
    """
    scored = cell[cell[metric.name].notna()].assign(
        leak=lambda frame: -frame[metric.name] if metric.higher_is_better else frame[metric.name]
    )
    order = scored.sort_values(["leak", "image", "seed"], kind="stable").index.tolist()
    if len(order) < 3:
        return order
    return [order[0], order[(len(order) - 1) // 2], order[-1]]


def _galleries(
    once: pd.DataFrame, axes: Mapping[str, Sequence[str]], metric: MetricInfo | None, summary: pd.DataFrame
) -> list[list[object]]:
    """Return, for every cell, its axes, its trials by ``chosen``, and whether its attack is the strongest there."""
    if metric is None:
        return []
    place = _places(axes)
    best = {
        tuple(str(row[axis]) for axis in (*BLOCK, "defense")): str(row["attack"])
        for row in strongest(_led(summary, metric.name), metric.name).to_dict("records")
    }
    found: list[list[object]] = []
    rows = {label: index for index, label in enumerate(once.index)}
    for key, cell in once.groupby([*BLOCK, "defense", "attack"], sort=False):
        names = [str(part) for part in key]
        first = best.get(tuple(names[:4])) == names[4]
        trials = [rows[label] for label in chosen(cell, metric)]
        if trials:
            found.append([*(place[axis][name] for axis, name in zip(_AXES, names)), trials, int(first)])
    return found


def _led(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the summary such that ``strongest`` names an attack for every defense, also where none beats the floor."""
    shifted = summary.copy()
    values = shifted[f"{metric} gain"]
    missing = values.isna() & ~shifted["floor"].astype(bool) & shifted[metric].notna()
    shifted.loc[missing, f"{metric} gain"] = 0.0
    finite = shifted[f"{metric} gain"].replace([math.inf, -math.inf], math.nan)
    shifted[f"{metric} gain"] = shifted[f"{metric} gain"] - min(0.0, float(finite.min() if len(finite) else 0)) + 1
    return shifted


def _trials(
    once: pd.DataFrame, metrics: Sequence[MetricInfo], axes: Mapping[str, Sequence[str]], run: Run
) -> dict[str, Any]:
    """Return the trials by column."""
    place = _places(axes)
    raw = run.results.set_index("trial")[list(_AXES)].loc[once["trial"]]
    own = {
        key: reproduction(dict(zip(_AXES, key)), run.components, run.sessions)
        for key in dict.fromkeys(raw.itertuples(index=False, name=None))
    }
    cells = {key: index for index, key in enumerate(own)}
    reasons = list(dict.fromkeys(once["reason"].astype(str)))
    paths = list(dict.fromkeys(once["path"].astype(str)))
    return {
        "id": once["trial"].tolist(),
        **{axis: [place[axis][str(value)] for value in once[axis]] for axis in _AXES},
        "image": once["image"].tolist(),
        "seed": once["seed"].tolist(),
        "status": [STATUSES.index(status) for status in once["status"]],
        "reason": [reasons.index(str(reason)) for reason in once["reason"]],
        "reasons": reasons,
        "path": [paths.index(str(path)) for path in once["path"]],
        "paths": paths,
        "seconds": [_short(value) for value in once["seconds"]],
        "objective": [_short(value) for value in once["objective"]],
        "evaluations": [None if pd.isna(value) else int(value) for value in once["evaluations"]],
        "scores": [[_short(value) for value in once[metric.name]] for metric in metrics],
        "again": [cells[key] for key in raw.itertuples(index=False, name=None)],
        "commands": [[one.head, one.tail, one.note] for one in own.values()],
    }


def _courses(once: pd.DataFrame, curves: Curves) -> dict[str, Any]:
    """Return the lists of evaluations, and of each trial the number of its list and its objective there, or None."""
    marks: dict[tuple[int, ...], int] = {}
    found: list[list[object] | None] = []
    for trial in once["trial"]:
        points = curves.get(trial, ())
        if len(points) < 2:
            found.append(None)
            continue
        at = marks.setdefault(tuple(place for place, _ in points), len(marks))
        found.append([at, *(float(f"{value:.3g}") for _, value in points)])
    return {"marks": [list(places) for places in marks], "curve": found}


_NONE, _LEFT_OUT = -1, -2


def _sprites(
    once: pd.DataFrame, galleries: Sequence[Sequence[object]], pictures: PicturesOf, room: int
) -> tuple[list[Sheet], dict[str, list[int]]]:
    """Return the sheets, and the place of every trial's truth and reconstruction in them.

    A place is sheet x 256 + tile; ``_NONE`` where there is no picture, ``_LEFT_OUT`` where it does not fit into so many
    bytes. The galleries' pictures come first, then those of the first images by index.
    """
    first = dict.fromkeys(row for gallery in galleries for row in gallery[len(_AXES)])  # type: ignore[attr-defined]
    images, seeds, ids = once["image"].tolist(), once["seed"].tolist(), once["trial"].tolist()
    by_index = sorted(range(len(ids)), key=lambda row: (images[row], seeds[row], row))
    left = room * 3 // 4  # base64 takes four bytes for three
    kept: dict[int, Pictures] = {}
    seen: set[bytes] = set()
    order = list(dict.fromkeys([*first, *by_index]))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        loaded = pictures([ids[row] for row in batch])
        for row in batch:
            found = loaded.get(ids[row])
            if found is None:
                continue
            new = {data for data in (found.truth, found.reconstruction) if data is not None} - seen
            cost = sum(_cost(data) for data in new)
            if cost <= left:
                left -= cost
                seen |= new
                kept[row] = found
        if left < _SMALLEST:
            break
    rows = sorted(kept)
    truths = [kept[row].truth or b"" for row in rows]
    shown = [(row, data) for row in rows if (data := kept[row].reconstruction) is not None]
    made, places = sheets([*truths, *(data for _, data in shown)])
    numbers = [_NONE if place is None else place[0] * COLUMNS * ROWS + place[1] for place in places]
    truth, picture = [_LEFT_OUT] * len(ids), [_LEFT_OUT] * len(ids)
    for row, at in zip(rows, numbers):
        truth[row], picture[row] = at, _NONE
    for (row, _), at in zip(shown, numbers[len(rows) :]):
        picture[row] = at
    return made, {"truth": truth, "picture": picture}


def _cost(data: bytes) -> int:
    """Return about how many bytes a picture takes in a sheet."""
    if len(data) < LARGEST * LARGEST:  # so small a file is taken as it is, or its picture has few details
        return len(data)
    image = tile(data)
    return 0 if image is None else len(png(image))


@dataclass(frozen=True)
class Mark:
    """A point of the figure of utility and leakage, in pixels of its 640 x 380; ``front`` where none beats it.

    The label begins at ``at`` (``anchor`` start) or ends there; ``away`` where a line has to lead to it.
    """

    label: str
    x: float
    y: float
    left: float
    right: float
    top: float
    bottom: float
    front: bool
    at: tuple[float, float] = (0.0, 0.0)
    anchor: str = "start"
    away: bool = False


@dataclass(frozen=True)
class Scatter:
    """Utility against leakage, ready to be drawn: marks, the line of the front, and the ticks of both axes."""

    marks: tuple[Mark, ...]
    line: str
    xticks: tuple[tuple[float, str], ...]
    yticks: tuple[tuple[float, str], ...]


def scatter(study: Study) -> Scatter:
    """Return where the points of a study stand: utility to the right, leakage upwards, both in whole tenths."""
    lows = [point.utility.low for point in study.points]
    highs = [point.utility.high for point in study.points]
    least = math.floor(10 * min(lows, default=0)) / 10
    most = max(math.ceil(10 * max(highs, default=1)) / 10, least + 0.1)

    def x(value: float) -> float:
        return round(60 + 560 * (value - least) / (most - least), 1)

    def y(value: float) -> float:
        return round(330 - 290 * value, 1)

    best = study.front()
    marks = [
        Mark(
            one.label,
            *(x(one.utility.value), y(one.leakage.value), x(one.utility.low), x(one.utility.high)),
            *(y(one.leakage.high), y(one.leakage.low)),
            one in best,
        )
        for one in study.points
    ]
    ticks = [round(least + step / 10, 1) for step in range(round(10 * (most - least)) + 1)]
    return Scatter(
        _labelled(marks),
        " ".join(f"{x(one.utility.value)},{y(one.leakage.value)}" for one in best),
        tuple((x(value), percent(value)) for value in ticks),
        tuple((y(value), percent(value)) for value in (0.0, 0.25, 0.5, 0.75, 1.0)),
    )


def _labelled(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Return marks with places for labels that meet neither each other nor a mark, where there are such places."""
    taken = [(mark.x - 7, mark.y - 7, mark.x + 7, mark.y + 7) for mark in marks]
    placed = []
    for mark in marks:
        width = _LETTER * len(mark.label)
        right = mark.x < 340
        for step in sorted(range(-20, 21), key=lambda step: (abs(step), step)):
            x, y = mark.x + (10 if right else -10), mark.y + 4 + _LINE * step
            box = (x if right else x - width, y - 10, x + width if right else x, y + 3)
            if 40 <= y <= 326 and not any(_meet(box, other) for other in taken):
                break
        else:
            x, y, box = mark.x, mark.y - 8, (mark.x, mark.y, mark.x, mark.y)
        taken.append(box)
        anchor = "start" if right else "end"
        placed.append(replace(mark, at=(round(x, 1), round(y, 1)), anchor=anchor, away=abs(step) > 1))
    return tuple(placed)


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two boxes (left, top, right, bottom) meet."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
