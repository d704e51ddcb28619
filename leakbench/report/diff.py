"""What changed between two runs beyond chance: the same trials in both, compared in pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from scipy import stats

from leakbench.analysis.paired import METRICS, Pair
from leakbench.analysis.statistics import ALPHA, holm
from leakbench.core.text import ABSENT, p_value, percent
from leakbench.errors import BadOption
from leakbench.plan.matrix import RECOVERY
from leakbench.report.differences import WORDS, paired_table, too_few
from leakbench.report.md import escape, table
from leakbench.store.records import MetricInfo, RunSession, TrialRecord, threshold_of
from leakbench.store.run_file import Store

AXES = ("attack", "defense", "model", "dataset", "threat")
_TARGET = ["image", "seed"]


@dataclass(frozen=True)
class Arm:
    """What is compared of a run.

    Attributes:
        name: what the page calls it.
        trials: every planned trial (``Store.trials``).
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
    def of(cls, name: str, store: Store) -> Arm:
        """Return what is compared of an open run."""
        return cls(name, store.trials(), store.records(), store.metrics(), store.sessions())


@dataclass(frozen=True)
class Comparison:
    """What sets two runs apart.

    Attributes:
        text: the page, in Markdown.
        shown: how many differences are shown beyond chance.
    """

    text: str
    shown: int


@dataclass(frozen=True)
class _Cell:
    """The trials of one cell of one run.

    Attributes:
        specs: by axis, without what sets a spec apart from others of its run.
        settings: every setting but image and seed, as JSON.
        trials: those that ended, by (image, seed).
    """

    specs: tuple[str, ...]
    settings: str
    floor: bool
    trials: pd.DataFrame


def diff(first: Arm, second: Arm) -> Comparison:
    """Return what changed from the first run to the second, on the trials that both have.

    Two trials are a pair where image, seed and cell are the same. Cells are the same where all their settings are, or
    else where attack, defense, model, dataset and threat model are written the same; what differs then is named.
    Differences are the second run's score less the first's; Holm's correction is over all cells and metrics.

    Raises:
        BadOption: no trial of one run has its like in the other.
    """
    cells = _cells(first), _cells(second)
    matched = list(_matched(*cells))
    pairs = [(one, other) for one, other in matched if len(one.trials.index.intersection(other.trials.index))]
    if not pairs:
        raise BadOption(
            f"no trial of {first.name} has its like in {second.name}: no cell, image and seed that ended in both; "
            "compare runs of one matrix"
        )
    varying = [axis for axis in range(len(AXES)) if axis < 2 or len({one.specs[axis] for one, _ in pairs}) > 1]
    attacked = [(one, other) for one, other in pairs if not one.floor]
    known = {metric.name for metric in (*first.metrics, *second.metrics)}
    compared = [name for name in METRICS if name in known]
    rows: list[Pair] = [
        (_name(one, varying), _scores(other.trials, compared), _scores(one.trials, compared)) for one, other in attacked
    ]
    differences, shown = paired_table(rows, compared)
    ensembles, moved = _ensembles(first, second)
    shown += moved
    parts = [
        f"# {escape(first.name)} → {escape(second.name)}",
        _verdict(pairs, attacked, compared, shown, second.name),
        _versions(first, second),
    ]
    if differences:
        parts += [WORDS, f"Second run less first, by cell; above 0, more leaks in {escape(second.name)}:", differences]
    parts += [
        ensembles,
        _statuses(pairs, varying),
        _floors(pairs),
        _settings(pairs, varying),
        _alone(first, second, pairs),
    ]
    return Comparison("\n\n".join(part for part in parts if part) + "\n", shown)


_SKIPPED = (
    "**What the ensemble of attackers recovers.** A run with a threshold attacks no image again that one attacker has "
    "recovered, so a cell above holds the images alone that those before it left over in both runs. Here an image "
    "(each of its seeds) counts as recovered where any attacker recovered it; **p** is McNemar's exact one, **(Holm)** "
    "corrected for all rows:"
)


def _ensembles(first: Arm, second: Arm) -> tuple[str, int]:
    """Return by dataset, model and defense what all attackers together recover, and how many differences are shown.

    Empty where neither run skipped what was settled.
    """
    limits = threshold_of(first.sessions), threshold_of(second.sessions)
    if limits == (None, None):
        return "", 0
    if limits[0] != limits[1]:
        words = [ABSENT if limit is None else f"{limit:g}" for limit in limits]
        return (
            f"**Other trials were skipped**: an image was settled from {words[0]} on in {escape(first.name)}, and from "
            f"{words[1]} in {escape(second.name)} ({ABSENT}: every trial was run). Attackers met other images there.",
            0,
        )
    arms = [_recovered(arm, float(str(limits[0]))) for arm in (first, second)]
    found = []
    for scene, before in arms[0].items():
        after = arms[1].get(scene, pd.Series(dtype=bool))
        both = before.index.intersection(after.index)
        if len(both):
            more, less = int((after[both] & ~before[both]).sum()), int((before[both] & ~after[both]).sum())
            p = float(stats.binomtest(more, more + less).pvalue) if more + less else 1.0
            found.append((scene, len(both), before[both].mean(), after[both].mean(), more, less, p))
    adjusted = holm([row[-1] for row in found])
    rows = [
        [
            ", ".join(map(escape, scene)),
            str(count),
            percent(float(one)),
            percent(float(other)),
            str(more),
            str(less),
            p_value(p),
            f"**{p_value(corrected)}**" if corrected <= ALPHA else p_value(corrected),
        ]
        for (scene, count, one, other, more, less, p), corrected in zip(found, adjusted)
    ]
    if not rows:
        return "", 0
    headers = ["behind", "images", "first run", "second run", "newly recovered", "no longer", "p", "p (Holm)"]
    text = f"{_SKIPPED}\n\n{table(headers, rows, left=1)}{too_few(min(row[1] for row in found), len(found))}"
    return text, sum(corrected <= ALPHA for corrected in adjusted)


def _recovered(arm: Arm, threshold: float) -> dict[tuple[str, ...], pd.Series]:
    """Return by dataset, model and defense whether any attacker recovered each (image, seed) that has a score."""
    trials = arm.trials
    scored = trials[~trials["floor"].to_numpy(dtype=bool) & trials["status"].isin(("ok", "failed"))]
    scored = scored[scored[RECOVERY].notna()]
    scored = scored.assign(hit=(scored["status"] == "ok") & (scored[RECOVERY] >= threshold))
    specs = [arm.records[trial].specs for trial in scored["trial"]]
    axes = [pd.Series([one[axis] for one in specs], scored.index) for axis in ("dataset", "model", "defense")]
    return {
        tuple(map(str, scene)): own.groupby(_TARGET)["hit"].any() for scene, own in scored.groupby(axes, sort=False)
    }


def _cells(arm: Arm) -> list[_Cell]:
    """Return the cells of a run that have a result."""
    ended = arm.trials[arm.trials["status"] != ""]
    keys = {trial: record.cell for trial, record in arm.records.items()}
    found = []
    for settings, own in ended.groupby(ended["trial"].map(keys), sort=False):
        specs = tuple(arm.records[str(own["trial"].iloc[0])].specs[axis] for axis in AXES)
        found.append(_Cell(specs, str(settings), bool(own["floor"].iloc[0]), own.set_index(_TARGET)))
    return found


def _matched(first: Sequence[_Cell], second: Sequence[_Cell]) -> Iterator[tuple[_Cell, _Cell]]:
    """Yield the cells that both runs have: of the same settings, or else the only two that are written the same."""
    same = {cell.settings: cell for cell in second}
    own = {cell.settings for cell in first}
    for cell in first:
        alike = [other for other in second if other.specs == cell.specs and other.settings not in own]
        rivals = [other for other in first if other.specs == cell.specs and other.settings not in same]
        if cell.settings in same:
            yield cell, same[cell.settings]
        elif len(alike) == len(rivals) == 1:
            yield cell, alike[0]


def _scores(trials: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    return trials.reindex(columns=list(metrics))


def _name(cell: _Cell, varying: Sequence[int]) -> str:
    return ", ".join(cell.specs[axis] for axis in varying)


def _verdict(
    pairs: Sequence[tuple[_Cell, _Cell]],
    attacked: Sequence[tuple[_Cell, _Cell]],
    metrics: Sequence[str],
    shown: int,
    second: str,
) -> str:
    """Return the first sentence: whether anything changed, of how many trials."""
    trials = sum(len(one.trials.index.intersection(other.trials.index)) for one, other in attacked)
    same = sum(_identical(one, other, metrics) for one, other in attacked)
    cells = f"{len(attacked)} cell{'s' * (len(attacked) != 1)}"
    head = (
        f"**{shown} difference{'s' * (shown != 1)} shown beyond chance**"
        if shown
        else "**No difference is shown beyond chance**"
    )
    return (
        f"{head}, in {cells} with {trials} trials of attacks that both runs have; the scores of {same} of these are "
        f"the same to the last digit. Floors are not tested."
    )


def _identical(one: _Cell, other: _Cell, metrics: Sequence[str]) -> int:
    both = one.trials.index.intersection(other.trials.index)
    first, second = (_scores(cell.trials.loc[both], metrics) for cell in (one, other))
    return int(((first == second) | (first.isna() & second.isna())).all(axis=1).sum())


def _versions(first: Arm, second: Arm) -> str:
    """Return what each run was made with, and whether that is the same code."""
    rows = []
    sources = [[_source(session) for session in arm.sessions] for arm in (first, second)]
    for arm, own in zip((first, second), sources):
        rows += [[escape(arm.name), escape(", ".join(source))] for source in dict.fromkeys(own)]
    codes = [{source[0] for source in own} for own in sources]
    if any("uncommitted" in code for group in codes for code in group):
        verdict = "**Uncommitted changes**: which code a run with these had is not recorded."
    elif codes[0] != codes[1]:
        verdict = "**Different code**: the runs were made by different versions of leakbench."
    elif len(codes[0]) > 1:
        verdict = "**Several versions**: each run mixes versions of leakbench."
    else:
        verdict = "Both were made by the same version of leakbench."
    places = {source[1:] for own in sources for source in own}
    if len(places) > 1:
        verdict += " Packages, Python or device differ."
    return f"{verdict}\n\n{table(['run', 'made with'], rows, left=2)}"


def _source(session: RunSession) -> tuple[str, str, str, str]:
    source = session.provenance
    commit = "" if source.commit is None else f" at commit {source.commit[:12]}"
    dirty = " with uncommitted changes" if source.dirty else ""
    packages = ", ".join(f"{name} {version}" for name, version in source.packages.items())
    return f"leakbench {source.version}{commit}{dirty}", packages, f"Python {source.python}", source.device


def _statuses(pairs: Sequence[tuple[_Cell, _Cell]], varying: Sequence[int]) -> str:
    """Return which cells have trials that ended otherwise."""
    rows = []
    for one, other in pairs:
        both = one.trials.index.intersection(other.trials.index)
        moves = one.trials.loc[both, "status"] + " → " + other.trials.loc[both, "status"]
        changed = moves[one.trials.loc[both, "status"] != other.trials.loc[both, "status"]].value_counts(sort=False)
        rows += [[escape(_name(one, varying)), str(move), str(count)] for move, count in changed.items()]
    if not rows:
        return ""
    return f"**Trials that ended otherwise**:\n\n{table(['cell', 'status', 'trials'], rows, left=2)}"


def _floors(pairs: Sequence[tuple[_Cell, _Cell]]) -> str:
    """Return a warning where floors, which use no gradient and draw the same, have other scores."""
    moved = [
        one.specs[0]
        for one, other in pairs
        if one.floor and _identical(one, other, list(METRICS)) < len(one.trials.index.intersection(other.trials.index))
    ]
    if not moved:
        return ""
    names = ", ".join(map(escape, dict.fromkeys(moved)))
    return f"**The floors {names} differ**: images or metrics are not the same in both runs, whatever their names."


def _settings(pairs: Sequence[tuple[_Cell, _Cell]], varying: Sequence[int]) -> str:
    """Return which settings differ between cells that are written the same."""
    rows = []
    for one, other in pairs:
        before, after = json.loads(one.settings), json.loads(other.settings)
        rows += [
            [escape(_name(one, varying)), escape(name), escape(a), escape(b)] for name, a, b in _changes(before, after)
        ]
    if not rows:
        return ""
    title = "**Settings that differ between cells of one name**, so that their trials have other ids:"
    return f"{title}\n\n{table(['cell', 'setting', 'first run', 'second run'], rows, left=4)}"


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name), after.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _changes(one, other, f"{path}{name}.")
        elif one != other:
            words = [json.dumps(values[name]) if name in values else ABSENT for values in (before, after)]
            yield f"{path}{name}", words[0], words[1]


def _alone(first: Arm, second: Arm, pairs: Sequence[tuple[_Cell, _Cell]]) -> str:
    """Return how many trials of each run have no like in the other, by cell."""
    both: set[str] = set()
    for one, other in pairs:
        common = one.trials.index.intersection(other.trials.index)
        both |= set(one.trials.loc[common, "trial"]) | set(other.trials.loc[common, "trial"])
    rows = []
    for arm in (first, second):
        own = arm.trials[~arm.trials["trial"].isin(both)]
        for key, cell in own.groupby(list(AXES), sort=False):
            ended = int((cell["status"] != "").sum())
            names = ", ".join(map(escape, key))
            rows.append([escape(arm.name), names, str(ended), str(len(cell) - ended)])
    if not rows:
        return ""
    return f"**Trials of one run alone**:\n\n{table(['run', 'cell', 'ended', 'not run'], rows, left=2)}"
