"""Which differences between two runs are statistically significant: the same trials in both, compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from leakbench.analysis.paired import METRICS, Pair
from leakbench.analysis.recovery import TARGET, judged
from leakbench.analysis.statistics import ALPHA, ROUNDING, holm, sign_flip_test
from leakbench.analysis.summary import rescored
from leakbench.core.text import ABSENT, in_groups, p_value, percent
from leakbench.errors import BadOption
from leakbench.metrics import NOT_LEAKAGE
from leakbench.plan.matrix import RECOVERY
from leakbench.report.differences import paired_table, too_few
from leakbench.report.display import to_markdown
from leakbench.report.page import render_markdown
from leakbench.store.records import MetricInfo, RunSession, TrialRecord, threshold_of
from leakbench.store.run_file import Store

CELL_AXES = ("attack", "defense", "model", "dataset", "threat")
"""The axes of a cell, in the order in which a difference names them."""


@dataclass(frozen=True)
class ComparedRun:
    """A run that is compared with another one.

    Attributes:
        name: its name on the page.
        trials: every planned trial (``Store.trials``), failed ones with the scores of a floor (``rescored``).
        records: what identifies each trial (``Store.records``).
        metrics: those of the run.
        sessions: its starts.
    """

    name: str
    trials: pd.DataFrame
    records: Mapping[str, TrialRecord]
    metrics: Sequence[MetricInfo]
    sessions: Sequence[RunSession]

    @classmethod
    def of(cls, name: str, store: Store) -> ComparedRun:
        """Return an open run under a name."""
        metrics = [metric for metric in store.metrics() if metric.name not in NOT_LEAKAGE]
        return cls(name, rescored(store.trials(), metrics), store.records(), metrics, store.sessions())


@dataclass(frozen=True)
class Comparison:
    """A comparison of two runs: the page in Markdown, and how many differences are statistically significant."""

    text: str
    significant: int


class _Cell(NamedTuple):
    """One cell of one run: its specs by axis, its settings but image and seed as JSON, its ended trials by TARGET."""

    specs: tuple[str, ...]
    settings: str
    trials: pd.DataFrame


class _Matched(NamedTuple):
    """A cell that both runs have: its specs, its settings in both, and its trials in both in the same order."""

    specs: tuple[str, ...]
    settings: tuple[str, str]
    before: pd.DataFrame
    after: pd.DataFrame

    @property
    def floor(self) -> bool:
        """Whether the cell is of a floor."""
        return bool(self.before["floor"].iloc[0])


def diff(first: ComparedRun, second: ComparedRun) -> Comparison:
    """Return what changed from the first run to the second, on the trials that both have.

    Two trials are a pair if image, seed and cell are the same. Cells are the same if all their settings are, or else if
    attack, defense, model, dataset and threat model have the same specs; settings that differ are then listed.
    Differences are the second run's score less the first's; Holm's correction is over all cells and metrics.

    Raises:
        BadOption: no trial of one run has a matching trial in the other.
    """
    pairs = list(_matched(list(_cells(first)), list(_cells(second))))
    if not pairs:
        raise BadOption(
            f"no trial of {first.name} has a matching trial in {second.name}: no cell, image and seed ended in both; "
            "compare runs of one matrix"
        )
    varying = [axis for axis in range(len(CELL_AXES)) if axis < 2 or len({pair.specs[axis] for pair in pairs}) > 1]
    names = [", ".join(pair.specs[axis] for axis in varying) for pair in pairs]
    attacked = [(name, pair) for name, pair in zip(names, pairs) if not pair.floor]
    known = {metric.name for metric in (*first.metrics, *second.metrics)}
    metrics = [name for name in METRICS if name in known]
    scores = [
        Pair(name, *(_by_group(pair, arm, metrics) for arm in (pair.after, pair.before))) for name, pair in attacked
    ]
    differences, significant = paired_table(scores, metrics)
    ensembles, moved = _ensembles(first, second)
    text = render_markdown(
        "diff.md.j2",
        first=first.name,
        second=second.name,
        significant=significant + moved,
        cells=len(attacked),
        trials=sum(len(pair.before) for _, pair in attacked),
        identical=sum(_identical(pair, metrics) for _, pair in attacked),
        **_versions(first, second),
        differences=differences,
        tested="\n" in differences,
        alpha=ALPHA,
        ensembles=ensembles,
        statuses=[[name, *row] for name, pair in zip(names, pairs) for row in _moves(pair)],
        floors=dict.fromkeys(
            pair.specs[0] for pair in pairs if pair.floor and _identical(pair, list(METRICS)) < len(pair.before)
        ),
        settings=[
            [name, *row] for name, pair in zip(names, pairs) for row in _changes(*map(json.loads, pair.settings))
        ],
        unmatched=[row for run in (first, second) for row in _unmatched(run, pairs)],
    )
    return Comparison(text, significant + moved)


def _cells(run: ComparedRun) -> Iterator[_Cell]:
    """Yield the cells of a run that have a result."""
    ended = run.trials[run.trials["status"] != ""]
    keys = {trial: record.cell for trial, record in run.records.items()}
    for settings, own in ended.groupby(ended["trial"].map(keys), sort=False):
        specs = run.records[str(own["trial"].iloc[0])].specs
        yield _Cell(tuple(specs[axis] for axis in CELL_AXES), str(settings), own.set_index(TARGET))


def _matched(first: Sequence[_Cell], second: Sequence[_Cell]) -> Iterator[_Matched]:
    """Yield the cells that both runs have: of the same settings, or else the only two of the same specs."""
    same = {cell.settings: cell for cell in second}
    own = {cell.settings for cell in first}
    for cell in first:
        alike = [other for other in second if other.specs == cell.specs and other.settings not in own]
        rivals = [other for other in first if other.specs == cell.specs and other.settings not in same]
        other = same.get(cell.settings) or (alike[0] if len(alike) == len(rivals) == 1 else None)
        if other is not None:
            both = cell.trials.index.intersection(other.trials.index)
            if len(both):
                settings = (cell.settings, other.settings)
                yield _Matched(cell.specs, settings, cell.trials.loc[both], other.trials.loc[both])


def _by_group(pair: _Matched, arm: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Return one side's scores by group, image and seed; the groups are those of the first run."""
    scores = arm.reindex(columns=list(metrics)).assign(group=pair.before["group"])
    return scores.set_index("group", append=True)


def _identical(pair: _Matched, metrics: Sequence[str]) -> int:
    """Return how many trials have the same scores in both runs, but for rounding."""
    first, second = (trials.reindex(columns=list(metrics)).astype(float) for trials in (pair.before, pair.after))
    return int(np.isclose(first, second, rtol=0, atol=ROUNDING, equal_nan=True).all(axis=1).sum())


def _ensembles(first: ComparedRun, second: ComparedRun) -> tuple[str, int]:
    """Return the Markdown on the images that all attackers together recover, and how many differences are significant.

    The text is empty if neither run has a threshold.
    """
    limits = [threshold_of(run.sessions) for run in (first, second)]
    if limits[0] is None and limits[1] is None:
        return "", 0
    found = []
    if limits[0] is not None and limits[0] == limits[1]:
        before, after = (_recovered(run, limits[0]) for run in (first, second))
        for scene, old in before.items():
            both = old.index.intersection(after[scene].index if scene in after else [])
            if len(both):
                found.append((scene, old.loc[both], after[scene].loc[both]))
    rows, values, counts = [], [], [(0, 0)]
    for scene, old, now in found:
        changes = now["hit"].astype(int) - old["hit"].astype(int)
        shares = [percent(float(hits.mean())) for hits in (old["hit"], now["hit"])]
        counts.append((old.index.get_level_values("image").nunique(), old["group"].nunique()))
        moved = [str(int((changes == change).sum())) for change in (1, -1)]
        rows.append([", ".join(scene), in_groups(*counts[-1]), *shares, *moved])
        values.append(sign_flip_test(changes.tolist(), old["group"].tolist()))
    adjusted = holm(values)
    rows = [[*row, p_value(p), p_value(corrected)] for row, p, corrected in zip(rows, values, adjusted)]
    headings = ["behind", "images", "first run", "second run", "newly recovered", "no longer", "p", "p (Holm)"]
    bold = np.zeros((len(rows), len(headings)), dtype=bool)
    bold[:, -1] = [corrected <= ALPHA for corrected in adjusted]
    sentence = too_few(*max(counts, key=lambda count: count[1]), len(rows)) if rows else ""
    text = render_markdown(
        "diff_ensembles.md.j2",
        first=first.name,
        second=second.name,
        limits=[ABSENT if limit is None else f"{limit:g}" for limit in limits],
        same=limits[0] == limits[1],
        table=sentence or to_markdown(pd.DataFrame(rows, columns=headings, dtype=str), left=1, bold=bold),
        ABSENT=ABSENT,
    )
    return text.strip(), int(bold.sum())


def _recovered(run: ComparedRun, threshold: float) -> dict[tuple[str, ...], pd.DataFrame]:
    """Return by dataset, model and defense whether any attacker recovered (``hit``) each (image, seed) with a score.

    Images that a floor recovers are left out. Each has its ``group``.
    """
    trials = judged(run.trials, threshold)
    scored = trials[~trials["floor"].to_numpy(dtype=bool) & trials["status"].isin(("ok", "failed"))]
    scored = scored[scored[RECOVERY].notna() & ~scored["by_floor"]]
    specs = [run.records[trial].specs for trial in scored["trial"]]
    axes = [pd.Series([one[axis] for one in specs], scored.index) for axis in ("dataset", "model", "defense")]
    return {
        tuple(map(str, scene)): own.groupby(TARGET).agg(hit=("recovered", "any"), group=("group", "first"))
        for scene, own in scored.groupby(axes, sort=False)
    }


def _versions(first: ComparedRun, second: ComparedRun) -> dict[str, object]:
    """Return the versions, packages and devices of both runs, and whether they differ."""
    sources = [[session.provenance for session in run.sessions] for run in (first, second)]
    made = [
        dict.fromkeys((one.code, one.describe()["packages"], f"Python {one.python}", one.device) for one in own)
        for own in sources
    ]
    codes = [{one[0] for one in own} for own in made]
    return {
        "made_with": [[run.name, ", ".join(one)] for run, own in zip((first, second), made) for one in own],
        "uncommitted": any(one.dirty for own in sources for one in own),
        "same_code": codes[0] == codes[1],
        "several": len(codes[0]) > 1,
        "same_place": len({one[1:] for own in made for one in own}) <= 1,
    }


def _moves(pair: _Matched) -> list[list[str]]:
    """Return which trials of a cell ended with another status, and how many."""
    moves = pair.before["status"] + " → " + pair.after["status"]
    changed = moves[pair.before["status"] != pair.after["status"]].value_counts(sort=False)
    return [[str(move), str(count)] for move, count in changed.items()]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield which settings differ between cells of the same specs."""
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name), after.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other, f"{path}{name}.")
        elif one != other:
            words = [json.dumps(values[name]) if name in values else ABSENT for values in (before, after)]
            yield f"{path}{name}", words[0], words[1]


def _unmatched(run: ComparedRun, pairs: Sequence[_Matched]) -> list[list[str]]:
    """Return how many trials of a run have no matching trial in the other, by cell."""
    both = {trial for pair in pairs for trials in (pair.before, pair.after) for trial in trials["trial"]}
    own = run.trials[~run.trials["trial"].isin(both)]
    return [
        [run.name, ", ".join(map(str, key)), str((statuses != "").sum()), str((statuses == "").sum())]
        for key, statuses in own.groupby(list(CELL_AXES), sort=False)["status"]
    ]
