"""``report.html``: a run as one page, with its worst case, matrix, galleries and every trial."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from leakbench.analysis.ensemble import RECOVERED, informed_of
from leakbench.analysis.pareto import Study
from leakbench.analysis.reproduce import reproduction
from leakbench.analysis.summary import ANY, BLOCK, LABEL, STATUSES, without_repeats
from leakbench.core.text import ABSENT, decimals
from leakbench.metrics import NOT_LEAKAGE
from leakbench.plan.matrix import RECOVERY
from leakbench.plan.trial import split_label
from leakbench.report import figure, utility
from leakbench.report.charts import Chart
from leakbench.report.figures import CHARTS, all_charts
from leakbench.report.markdown import MAIN_METRICS, PAPER_PREFIX
from leakbench.report.page import SCRIPTS, STYLES, embedded, picture, render
from leakbench.report.public import public_tables
from leakbench.report.run import ObjectiveCurves, PicturesOf, RunData
from leakbench.report.scenes import along, worst_cases
from leakbench.report.sprites import SHEET_COLUMNS, SHEET_ROWS, TILE_SIDE, Sheet, png, sheets, tile
from leakbench.store.records import MetricInfo, Pictures, StoredMember

MAX_PAGE_BYTES = 9_500_000
"""The size that a page may have; pictures beyond it are left out."""

_CODE_BYTES = 200_000
_BATCH = 512
_SMALLEST_PICTURE = 200
_Drawn = tuple[bytes | None, bytes | None, int]
"""A truth and a reconstruction as they are drawn, and whether that is aligned."""
OF_CLIENT = "--images names every image of the client; leakbench show prints the command with all."
"""Beside a command of a client with several images: the page knows only the first one."""

_AXES = ("dataset", "model", "threat", "defense", "attack")
_SHOWN = ("psnr_aligned", "ssim_aligned", "lpips_vgg", "psnr")
_RANKED = (RECOVERY, "psnr_aligned", "psnr")
_STEPS = 4
_NO_PICTURE, _LEFT_OUT = -1, -2


_DRAWN = ("ssim", "threshold", "evaluations", "curves")
"""The charts of ``figures.CHARTS`` that a page has beside its own tables and heat maps."""

_MAX_DRAWN = 12
"""So many of these charts are on a page, the first ones; ``--figures`` writes all."""


def _drawn(chosen: Iterable[Chart]) -> list[tuple[str, str, str]]:
    """Return what each chart shows, of which scene, and the chart as the address of an image."""
    return [
        (CHARTS[one.kind], " · ".join(one.scene), picture(figure.saved(one.draw(), "svg"), "svg+xml")) for one in chosen
    ]


def html(
    run: RunData,
    pictures: PicturesOf,
    studies: Sequence[Study] = (),
    curves: ObjectiveCurves | None = None,
    members: Mapping[str, Sequence[StoredMember]] | None = None,
) -> str:
    """Return the page of a run; it depends on nothing but its arguments.

    Args:
        run: all that the report shows.
        pictures: from the trials of ``run`` to their pictures.
        studies: utility and leakage, if trainings were studied too.
        curves: how the objective of each trial fell, as far as it is known.
        members: the images of each batch of several, by trial.
    """
    once = without_repeats(run.results)
    metrics = _metrics(run)
    summary = run.summary
    axes = {axis: list(dict.fromkeys(once[axis].astype(str))) for axis in _AXES}
    ranked = next((name for name in _RANKED if any(m.name == name for m in metrics)), "")
    ranking = next((metric for metric in metrics if metric.name == ranked), metrics[0] if metrics else None)
    galleries = _galleries(once, axes, ranking, summary)
    options = {(one.kind, one.spec): {**one.options, "version": one.version} for one in run.components}
    data: dict[str, Any] = {
        "axes": axes,
        "words": [[run.threats.get((threat, one), "") for one in axes["dataset"]] for threat in axes["threat"]],
        "options": {kind: [options.get((kind, spec), {}) for spec in axes[kind]] for kind in _AXES if kind != "threat"},
        "statements": _statements(run, axes),
        "metrics": _metric_data(metrics, summary),
        "ranked": None if ranking is None else metrics.index(ranking),
        "statuses": list(STATUSES),
        "cells": _cells(summary, metrics, axes),
        "galleries": galleries,
        "trials": {**_trials(once, metrics, axes, run), **_courses(once, curves or {})},
    }
    every = list(all_charts(run))
    maps = _drawn(one for one in every if one.kind == "heatmap")
    drawn = _drawn([one for one in every if one.kind in _DRAWN][:_MAX_DRAWN])
    taken = sum(len(chart) for *_, chart in (*maps, *drawn))
    room = MAX_PAGE_BYTES - _CODE_BYTES - len(embedded(data).encode()) - taken
    found, places = _sprites(once, galleries, pictures, room, _members(once, metrics, members or {}))
    data["sheets"] = [[sheet.width, sheet.height] for sheet in found]
    data["sheetColumns"] = SHEET_COLUMNS
    data["trials"] |= places
    scenes = worst_cases(run)
    context = {
        "title": f"Leakage report: {run.name}",
        "name": run.name,
        "scenes": scenes,
        "complete": all(scene.complete for scene in scenes),
        "threshold": RECOVERED if run.threshold is None else run.threshold,
        "skips": run.threshold is not None,
        "recovery": any(metric.name == RECOVERY for metric in metrics),
        "ended": len(run.results),
        "planned": run.planned,
        "counts": {status: int((run.results["status"] == status).sum()) for status in STATUSES},
        "facts": run.facts(),
        "public": [(block, list(table), table.to_numpy().tolist()) for block, table in public_tables(run)],
        "mixed": run.mixed,
        "threats": {threat: run.grants.get(threat, {}) for threat in axes["threat"]},
        "metrics": metrics,
        "ranking": ranking,
        "left_out": places["picture"].count(_LEFT_OUT),
        "studies": [
            (study, picture(figure.saved(utility.figure(study), "svg"), "svg+xml"), study.front()) for study in studies
        ],
        "heatmaps": maps,
        "drawn": drawn,
        "sheets": [picture(sheet.png) for sheet in found],
        "ANY": ANY,
        "along": along,
        "ABSENT": ABSENT,
    }
    return render("report.html.j2", context, data, (*STYLES, "report.css"), (*SCRIPTS, "report.js"))


def _metrics(run: RunData) -> list[MetricInfo]:
    """Return the metrics with a value: those that the matrix shows first, the paper's last."""
    valued = (m for m in run.metrics if m.name in run.results and run.results[m.name].notna().any())
    known = {m.name: m for m in valued if m.name not in NOT_LEAKAGE}
    ranked = sorted(known, key=lambda name: name.startswith(PAPER_PREFIX))
    return [known[name] for name in dict.fromkeys((*_SHOWN, *MAIN_METRICS, *ranked)) if name in known]


def _statements(run: RunData, axes: Mapping[str, Sequence[str]]) -> list[list[list[str]]]:
    """Return what each defense states, once for each threat model: its note, and what the adaptive attacker does."""
    known = {one.spec: one.statement for one in run.components if one.kind == "defense"}
    found = []
    for own in map(known.get, axes["defense"]):
        said = ["" if own is None else own.informed.get(informed_of(threat), "") for threat in axes["threat"]]
        found.append([[text for text in ("" if own is None else own.note, word) if text] for word in said])
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
    columns = []
    for name in (metric.name for metric in metrics):
        gains = summary[f"{name} gain"].to_numpy(dtype=np.float64)
        whole = _whole(name)
        for part in ("", " low", " high", " n", " gain", " gain low", " gain high"):
            columns.append([_rounded(value) for value in summary[f"{name}{part}"]])
        columns.append([_step(value, whole) for value in gains])
    heads = [_codes(summary[axis], axes[axis]) for axis in _AXES]
    counts = [summary[name].astype(int).tolist() for name in ("floor", "n", *STATUSES)]
    return [list(row) for row in zip(*heads, *counts, *columns)]


def _whole(metric: str) -> float:
    """Return the gain in a metric that has the strongest colour, in every run; infinity for a metric without colours.

    It is 1 on scales that end there. In dB it is 40: floors have 10 to 20 dB, and with 40 dB more the mean error is
    below one level of 255.
    """
    if "psnr" in metric:
        return 40.0
    return 1.0 if any(scale in metric for scale in ("ssim", "lpips", LABEL)) else math.inf


def _step(value: float, whole: float) -> int:
    """Return the step of a gain's colour: quarters of a gain of ``whole``, -1 below the floor."""
    if math.isnan(value) or value == 0 or math.isinf(whole):
        return 0
    if value < 0:
        return -1
    return _STEPS if not value < whole else 1 + int(_STEPS * value / whole)


def _rounded(value: object) -> object:
    """Return a number with six digits, so that the data stay small."""
    if isinstance(value, (int, np.integer)):
        return int(value)
    if not isinstance(value, (float, np.floating)) or not math.isfinite(value):
        return None if isinstance(value, (float, np.floating)) and math.isnan(value) else value
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _codes(values: Iterable[object], known: Sequence[str]) -> list[int]:
    """Return the place of each value in a list without repeats."""
    places = {value: place for place, value in enumerate(known)}
    return [places[str(value)] for value in values]


def chosen(cell: pd.DataFrame, metric: MetricInfo) -> list[int]:
    """Return the rows (labels) of the best, the median and the worst reconstruction of a cell, by leakage.

    Trials with a value in the metric are ordered from most to least leakage, ties by image and seed; the median is the
    lower one of an even number. Of two trials there is no median, of one there is only the best.
    """
    ascending = [not metric.higher_is_better, True, True]
    order = (
        cell.dropna(subset=metric.name).sort_values([metric.name, "image", "seed"], ascending=ascending).index.tolist()
    )
    if len(order) < 3:
        return order
    return [order[0], order[(len(order) - 1) // 2], order[-1]]


def _galleries(
    once: pd.DataFrame, axes: Mapping[str, Sequence[str]], metric: MetricInfo | None, summary: pd.DataFrame
) -> list[list[object]]:
    """Return, for every cell, its axes, its trials by ``chosen``, and whether its attack is the strongest there."""
    if metric is None:
        return []
    gains = summary[~summary["floor"].astype(bool) & summary[metric.name].notna()][f"{metric.name} gain"].fillna(0.0)
    first = gains.groupby([summary[axis] for axis in (*BLOCK, "defense")], sort=False).idxmax()
    strongest = {tuple(map(str, row)) for row in summary.loc[first, [*BLOCK, "defense", "attack"]].values}
    found: list[list[object]] = []
    rows = {label: index for index, label in enumerate(once.index)}
    for key, cell in once.groupby([*BLOCK, "defense", "attack"], sort=False):
        names = [str(part) for part in key]
        trials = [rows[label] for label in chosen(cell, metric)]
        if trials:
            places = [axes[axis].index(name) for axis, name in zip(_AXES, names)]
            found.append([*places, trials, int(tuple(names) in strongest)])
    return found


def _trials(
    once: pd.DataFrame, metrics: Sequence[MetricInfo], axes: Mapping[str, Sequence[str]], run: RunData
) -> dict[str, Any]:
    """Return the trials by column."""
    raw = run.results.set_index("trial")[list(_AXES)].loc[once["trial"]]
    own = {
        key: reproduction(dict(zip(_AXES, key)), run.components, run.sessions)
        for key in dict.fromkeys(raw.itertuples(index=False, name=None))
    }
    cells = {key: place for place, key in enumerate(own)}
    reasons = list(dict.fromkeys(once["reason"].astype(str)))
    paths = list(dict.fromkeys(once["path"].astype(str)))
    return {
        "id": once["trial"].tolist(),
        **{axis: _codes(once[axis], axes[axis]) for axis in _AXES},
        "image": once["image"].tolist(),
        "seed": once["seed"].tolist(),
        "status": _codes(once["status"], STATUSES),
        "reason": _codes(once["reason"], reasons),
        "reasons": reasons,
        "path": _codes(once["path"], paths),
        "paths": paths,
        "seconds": [_rounded(value) for value in once["seconds"]],
        "objective": [_rounded(value) for value in once["objective"]],
        "evaluations": [None if pd.isna(value) else int(value) for value in once["evaluations"]],
        "scores": [[_rounded(value) for value in once[metric.name]] for metric in metrics],
        "again": [cells[key] for key in raw.itertuples(index=False, name=None)],
        "commands": [
            [one.head, one.tail, f"{OF_CLIENT if split_label(str(key[0]))[1] else ''} {one.note}".strip()]
            for key, one in own.items()
        ],
    }


def _courses(once: pd.DataFrame, curves: ObjectiveCurves) -> dict[str, Any]:
    """Return the lists of evaluations, and of each trial the number of its list and its objective there, or None."""
    marks: dict[tuple[int, ...], int] = {}
    found: list[list[object] | None] = []
    for points in (curves.get(trial, ()) for trial in once["trial"]):
        at = marks.setdefault(tuple(place for place, _ in points), len(marks)) if len(points) > 1 else None
        found.append(None if at is None else [at, *(float(f"{value:.3g}") for _, value in points)])
    return {"marks": [list(places) for places in marks], "curve": found}


@dataclass(frozen=True)
class _Member:
    """An image of a batch: its index, its label (-1 if it is not known), its scores by metric, and its pictures."""

    image: int
    label: int
    scores: Sequence[object]
    pictures: Pictures
    levels: tuple[float, float]


def _members(
    once: pd.DataFrame, metrics: Sequence[MetricInfo], members: Mapping[str, Sequence[StoredMember]]
) -> dict[int, list[_Member]]:
    """Return the images of batches by the place of their trial."""
    nan = math.nan
    return {
        row: [
            _Member(
                own.image,
                -1 if own.label is None else own.label,
                [_rounded(own.scores.get(metric.name, nan)) for metric in metrics],
                own.pictures,
                (own.scores.get("psnr", nan), own.scores.get("psnr_aligned", nan)),
            )
            for own in members[trial]
        ]
        for row, trial in enumerate(once["trial"])
        if trial in members
    }


def _sprites(
    once: pd.DataFrame,
    galleries: Sequence[Sequence[object]],
    pictures: PicturesOf,
    room: int,
    members: Mapping[int, Sequence[_Member]],
) -> tuple[list[Sheet], dict[str, Any]]:
    """Return the sheets, and the place of every trial's truth and reconstruction in them, and of those of its batch.

    A place is sheet x 256 + tile; ``_NO_PICTURE`` where there is no picture, ``_LEFT_OUT`` where it does not fit into
    ``room`` bytes. The galleries' pictures come first, those of their batches next, then the others by index, and those
    of their batches last. ``aligned`` has 1 for a reconstruction that is drawn aligned (``Pictures.drawn``), else 0.
    ``members`` has for each trial of a batch one row for an image: index, label, places of truth and reconstruction,
    whether it is drawn aligned, and its scores; None for others.
    """
    first = dict.fromkeys(row for gallery in galleries for row in gallery[len(_AXES)])  # type: ignore[attr-defined]
    images, seeds, ids = once["image"].tolist(), once["seed"].tolist(), once["trial"].tolist()
    by_index = sorted(range(len(ids)), key=lambda row: (images[row], seeds[row], row))
    left = room * 3 // 4  # base64 takes four bytes for three
    levels = list(zip(*once.reindex(columns=["psnr", "psnr_aligned"]).to_numpy(dtype=float).T.tolist()))
    seen: set[bytes] = set()

    def fitting(found: Pictures, psnr: float, aligned: float, spare: int = 0) -> _Drawn | None:
        """Return the pictures to draw, if there is room for them beside ``spare`` bytes."""
        nonlocal left
        drawn, fitted = found.drawn(psnr, aligned)
        new = {data for data in (found.truth, drawn) if data is not None} - seen
        cost = sum(_picture_bytes(data) for data in new)
        if cost > left - spare:
            return None
        left -= cost
        seen.update(new)
        return found.truth, drawn, int(fitted)

    kept: dict[int, _Drawn] = {}
    of_batches: dict[tuple[int, int], _Drawn] = {}
    # the batches of the galleries leave half of the room to other trials
    for order, share in ((list(first), 0.5), ([row for row in by_index if row not in first], 0)):
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            loaded = pictures([ids[row] for row in batch])
            for row in batch:
                if ids[row] in loaded and (found := fitting(loaded[ids[row]], *levels[row])):
                    kept[row] = found
            if left < _SMALLEST_PICTURE:
                break
        spare = int(share * left)
        for row in order:
            for place, own in enumerate(members.get(row, ())):
                if found := fitting(own.pictures, *own.levels, spare):
                    of_batches[row, place] = found
    rows = sorted(kept)
    truths = [kept[row][0] or b"" for row in rows]
    shown = [(row, data) for row in rows if (data := kept[row][1]) is not None]
    further = [data or b"" for truth, drawn, _ in of_batches.values() for data in (truth, drawn)]
    made, places = sheets([*truths, *(data for _, data in shown), *further])
    numbers = [_NO_PICTURE if place is None else place[0] * SHEET_COLUMNS * SHEET_ROWS + place[1] for place in places]
    truth, picture = [_LEFT_OUT] * len(ids), [_LEFT_OUT] * len(ids)
    aligned = [kept[row][2] if row in kept else 0 for row in range(len(ids))]
    for row, at in zip(rows, numbers):
        truth[row], picture[row] = at, _NO_PICTURE
    for (row, _), at in zip(shown, numbers[len(rows) :]):
        picture[row] = at
    last = numbers[len(rows) + len(shown) :]
    pairs = {key: (last[2 * k], last[2 * k + 1], one[2]) for k, (key, one) in enumerate(of_batches.items())}
    none = (_LEFT_OUT, _LEFT_OUT, 0)
    listed = [
        [[own.image, own.label, *pairs.get((row, at), none), list(own.scores)] for at, own in enumerate(members[row])]
        if row in members
        else None
        for row in range(len(ids))
    ]
    return made, {"truth": truth, "picture": picture, "aligned": aligned, "members": listed}


def _picture_bytes(data: bytes) -> int:
    """Return about how many bytes a picture takes in a sheet."""
    if len(data) < TILE_SIDE * TILE_SIDE:  # so small a file is taken as it is, or its picture has few details
        return len(data)
    image = tile(data)
    return 0 if image is None else len(png(image))
