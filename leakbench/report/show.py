"""One trial: its settings, how it ended, every metric, its cost, and the command that repeats it."""

import math
from dataclasses import dataclass

import pandas as pd
from rich.table import Table

from leakbench.analysis.reproduce import reproduction
from leakbench.core.text import ABSENT, decimals, english, number
from leakbench.errors import BadOption, one_line
from leakbench.report.display import to_console
from leakbench.report.markdown import options
from leakbench.report.run import UNSALTED
from leakbench.store.connection import decoding
from leakbench.store.records import MetricInfo, StoredComponent
from leakbench.store.run_file import Store

COMPONENT_AXES = ("dataset", "model", "defense", "attack")
_MAX_LISTED = 4


@dataclass(frozen=True)
class Shown:
    """A trial as it is shown.

    Attributes:
        trial: its id.
        facts: labels and words.
        metrics: every metric's value beside the best floor on the same image, with its convention; None without any.
        command: the command whose run has a trial of the same id.
        note: what else the command needs; may be empty.
    """

    trial: str
    facts: tuple[tuple[str, str], ...]
    metrics: Table | None
    command: str
    note: str


def find(store: Store, prefix: str) -> str:
    """Return the id of the one planned trial whose id begins with a prefix.

    Raises:
        BadOption: no id of the run begins so, or several do so.
    """
    known = sorted(store.planned())
    found = [trial for trial in known if trial.startswith(prefix.lower())] if prefix else []
    if len(found) == 1:
        return found[0]
    if not found:
        hint = f"such as {known[0]}; results.csv and trials of the run file list them" if known else "it has none"
        raise BadOption(f"no trial of {store.path} begins with {prefix!r}; give the first digits of an id, {hint}")
    some = ", ".join(found[:_MAX_LISTED]) + (", ..." if len(found) > _MAX_LISTED else "")
    raise BadOption(f"{len(found)} trials of {store.path} begin with {prefix!r} ({some}); give more digits")


def show(store: Store, prefix: str) -> Shown:
    """Return all about the trial whose id begins with a prefix.

    Raises:
        BadOption: see ``find``.
        ForeignRun: the run file lacks settings of the trial.
    """
    trial = find(store, prefix)
    with decoding(store.path):
        trials = pd.concat([store.trials(), store.controls()])
        row = trials[trials["trial"] == trial].iloc[0]
        record, components, sessions = store.records()[trial], store.components(), store.sessions()
        specs = {one.kind: one for one in components if one.spec == row[one.kind]}
        facts = [(axis, _component(specs[axis])) for axis in COMPONENT_AXES]
        facts.append(("threat model", f"{row['threat']}: {record.threat}"))
        label = "" if record.label is None else f", whose label is {record.label}"
        batch = f"with images {english(map(str, record.others))}; " if record.others else ""
        facts.append(("image", f"index {row['image']}{label}; {batch}seed {row['seed']}"))
        facts.append(("status", _status(str(row["status"]), str(row["reason"]))))
        if record.session is not None:
            session = {one.id: one for one in sessions}[record.session]
            words = [*session.provenance.describe().values(), f"finished {record.finished}"]
            facts += [("cost", _cost(row)), ("made by", "; ".join(words))]
            facts.append(("salt", session.provenance.salt or UNSALTED))
        metrics = store.metrics()
        scored = [metric for metric in metrics if not math.isnan(row[metric.name])]
        repeat = reproduction({axis: str(row[axis]) for axis in (*COMPONENT_AXES, "threat")}, components, sessions)
        return Shown(
            trial=trial,
            facts=tuple((label, "\n".join(map(one_line, words.split("\n")))) for label, words in facts),
            metrics=_metrics(row, trials, scored) if scored else None,
            command="".join(
                filter(str.isprintable, repeat.command(trial, (int(row["image"]), *record.others), int(row["seed"])))
            ),
            note=one_line(repeat.note),
        )


def _component(one: StoredComponent) -> str:
    every = options(one)
    return f"{one.spec}\nversion {one.version}{': ' if every else ''}{every}"


def _status(status: str, reason: str) -> str:
    words = {"": "planned, not run: it is still to run, or another trial had recovered its image", "ok": "ok"}
    return f"{words.get(status, status)}{': ' if reason else ''}{reason}"


def _cost(row: pd.Series) -> str:
    parts = [f"{number(float(row['seconds']), 3)} s (the time of its chunk, divided by the trials in it)"]
    if not pd.isna(row["evaluations"]):
        parts.append(f"{int(row['evaluations']):,} evaluations of the objective")
    if row["path"]:
        parts.append(f"gradients {row['path']}")
    if not math.isnan(row["objective"]):
        parts.append(f"final objective {row['objective']:.4g}")
    return ", ".join(parts)


def _metrics(row: pd.Series, trials: pd.DataFrame, metrics: list[MetricInfo]) -> Table:
    """Return the table of a trial's scores, each beside the best floor on the same image and seed."""
    same = [*COMPONENT_AXES[:2], "threat", "image", "seed"]
    own = (trials[same] == row[same].to_list()).all(axis=1) & (trials["trial"] != row["trial"])
    rows = []
    for metric in metrics:
        name, places = metric.name, decimals([row[metric.name]])
        floors = trials[own & trials["floor"]].sort_values(name, ascending=not metric.higher_is_better, kind="stable")
        best = [f"{number(value, places)} ({attack})" for value, attack in floors[[name, "attack"]].dropna().to_numpy()]
        more = "higher" if metric.higher_is_better else "lower"
        rows.append([name, number(row[name], places), best[0] if best else ABSENT, more, metric.convention])
    headings = ["metric", "value", "best floor", "more leakage is", "convention"]
    return to_console(pd.DataFrame(rows, columns=headings), left=5)
