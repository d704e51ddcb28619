"""One trial: what it was, how it ended, every metric, what it cost, and the command that makes it again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from leakbench.analysis.reproduce import reproduction
from leakbench.core.text import ABSENT, decimals, number
from leakbench.errors import BadOption, one_line
from leakbench.store.connection import decoding
from leakbench.store.records import MetricInfo, RunSession, TrialRecord
from leakbench.store.run_file import Store

AXES = ("dataset", "model", "defense", "attack")
_LISTED = 4


@dataclass(frozen=True)
class Shown:
    """What is shown of a trial.

    Attributes:
        trial: its id.
        facts: labels and words.
        metrics: every metric's value beside the best floor on the same image, with its convention; None without any.
        command: the command whose run has a trial of the same id.
        note: what else that takes; empty where nothing does.
    """

    trial: str
    facts: tuple[tuple[str, str], ...]
    metrics: Table | None
    command: str
    note: str


def find(store: Store, prefix: str) -> str:
    """Return the id of the one planned trial whose id begins with a prefix.

    Raises:
        BadOption: no id of the run begins so, or several do.
    """
    known = sorted(store.planned())
    found = [trial for trial in known if trial.startswith(prefix.lower())] if prefix else []
    if len(found) == 1:
        return found[0]
    if not found:
        hint = f"such as {known[0]}; results.csv and trials of the run file list them" if known else "it has none"
        raise BadOption(f"no trial of {store.path} begins with {prefix!r}; give the first digits of an id, {hint}")
    some = ", ".join(found[:_LISTED]) + (", ..." if len(found) > _LISTED else "")
    raise BadOption(f"{len(found)} trials of {store.path} begin with {prefix!r} ({some}); give more digits")


def show(store: Store, prefix: str) -> Shown:
    """Return what there is to know of the trial whose id begins with a prefix.

    Raises:
        BadOption: see ``find``.
        ForeignRun: the run does not say what it should of the trial.
    """
    trial = find(store, prefix)
    with decoding(store.path):
        trials = store.trials()
        row = trials[trials["trial"] == trial].iloc[0]
        record, components, sessions = store.records()[trial], store.components(), store.sessions()
        specs = {one.kind: one for one in components if one.spec == row[one.kind]}
        facts = [(axis, _component(specs[axis].spec, specs[axis].version, specs[axis].options)) for axis in AXES]
        facts.append(("threat model", f"{row['threat']}: {record.threat}"))
        label = "" if record.label is None else f", whose label is {record.label}"
        facts.append(("image", f"index {row['image']}{label}; seed {row['seed']}"))
        facts.append(("status", _status(str(row["status"]), str(row["reason"]))))
        if record.session is not None:
            facts += [("cost", _cost(row)), ("made by", _source(record, sessions))]
        metrics = store.metrics()
        scored = [metric for metric in metrics if not math.isnan(row[metric.name])]
        repeat = reproduction({axis: str(row[axis]) for axis in (*AXES, "threat")}, components, sessions)
        return Shown(
            trial=trial,
            facts=tuple((label, "\n".join(map(one_line, words.split("\n")))) for label, words in facts),
            metrics=_metrics(row, trials, scored) if scored else None,
            command="".join(filter(str.isprintable, repeat.command(trial, int(row["image"]), int(row["seed"])))),
            note=one_line(repeat.note),
        )


def _component(spec: str, version: int, options: Mapping[str, object]) -> str:
    every = ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())
    return f"{spec}\nversion {version}{': ' if every else ''}{every}"


def _status(status: str, reason: str) -> str:
    words = {"": "planned, not run: it waits, or another trial had settled its image", "ok": "ok"}
    return f"{words.get(status, status)}{': ' if reason else ''}{reason}"


def _cost(row: pd.Series) -> str:
    parts = [f"{number(float(row['seconds']), 3)} s (its chunk's time over the trials in it)"]
    if not pd.isna(row["evaluations"]):
        parts.append(f"{int(row['evaluations']):,} evaluations of the objective")
    if row["path"]:
        parts.append(f"gradients {row['path']}")
    if not math.isnan(row["objective"]):
        parts.append(f"final objective {row['objective']:.4g}")
    return ", ".join(parts)


def _source(record: TrialRecord, sessions: list[RunSession]) -> str:
    (session,) = [one for one in sessions if one.id == record.session]
    source = session.provenance
    commit = "" if source.commit is None else f", commit {source.commit[:12]}"
    dirty = " with uncommitted changes" if source.dirty else ""
    packages = ", ".join(f"{name} {version}" for name, version in source.packages.items())
    return f"leakbench {source.version}{commit}{dirty}; {packages}; on {source.device}; finished {record.finished}"


def _metrics(row: pd.Series, trials: pd.DataFrame, metrics: list[MetricInfo]) -> Table:
    """Return the table of a trial's scores, each beside the best floor on the same image and seed."""
    same = [*AXES[:2], "threat", "image", "seed"]
    floors = trials[
        (trials[same] == row[same].to_list()).all(axis=1) & trials["floor"] & (trials["trial"] != row["trial"])
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in ("metric", "value", "best floor", "leaks more", "convention"):
        table.add_column(header, justify="right" if header in ("value", "best floor") else "left", overflow="fold")
    for metric in metrics:
        value = float(row[metric.name])
        others = floors[floors[metric.name].notna()]
        floor = ABSENT
        places = decimals([value])
        if len(others):
            ordered = others.sort_values(metric.name, ascending=not metric.higher_is_better, kind="stable")
            best = ordered.iloc[0]
            floor = f"{number(float(best[metric.name]), places)} ({best['attack']})"
        more = "higher" if metric.higher_is_better else "lower"
        cells = (metric.name, number(value, places), floor, more, metric.convention)
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    return table
