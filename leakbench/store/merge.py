"""Merging several runs of one matrix, such as its shards, into one."""

import contextlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from leakbench.core.lock import alone
from leakbench.errors import BadOption, LeakbenchError
from leakbench.store.connection import KEEP, decoding, insert
from leakbench.store.run_file import FILE, OF_TRIALS, Store, forget


@dataclass(frozen=True)
class MergeResult:
    """The outcome of a merge.

    Attributes:
        added: results that the merged run did not have before.
        finished: results that it has now, without errors.
        planned: trials that it has now.
    """

    added: int
    finished: int
    planned: int


def merge(runs: Sequence[Path], out: Path, *, force: bool = False) -> MergeResult:
    """Add the trials and results of runs to the run in ``out``, which is created if there is none.

    A trial that has a result keeps it, unless it is an error and another run has a result without one. Merging again
    changes nothing. After a merge was killed, start it again.

    Args:
        runs: folders of runs, or run files.
        out: the folder of the merged run.
        force: merge runs of different matrices, or of different versions of packages that the numbers depend on, too.

    Raises:
        LeakbenchError: one line on the difference, or another process works in ``out``; nothing was written then. Runs
            of different salts are refused even with ``force``, since a run has one.
    """
    if not runs:
        raise BadOption("no run is given; give the folder of at least one run")
    target = out / FILE
    with contextlib.ExitStack() as stack:
        files = [run / FILE if run.is_dir() else run for run in runs]
        sources = [stack.enter_context(Store.open(file, readonly=True)) for file in files]
        exists = target.exists()
        if exists:
            stack.enter_context(alone(out))
        before = [stack.enter_context(Store.open(target, readonly=True))] if exists else []
        _check_salts([*before, *sources])
        if not force:
            _check([*before, *sources])
        merged = stack.enter_context(Store.open(target) if exists else Store.create(target))
        if not exists:
            stack.enter_context(alone(out))
        others = [source for source in sources if not (exists and source.path.samefile(target))]
        added = sum(absorb(merged, source) for source in others)
        return MergeResult(added, len(merged.done()), len(merged.planned()))


def absorb(store: Store, other: Store) -> int:
    """Add what another run file holds, all or nothing, and return how many results were added.

    A trial that has a result keeps it, unless it is an error and the other one is none. Sessions that are the same
    in both are kept once; the descriptions of metrics, cells and components stay as they are in ``store``.
    """
    with decoding(other.path), store.transaction() as db:
        sessions = {row["id"]: _session(db, row) for row in other.query("SELECT * FROM sessions")}
        cells = {row["id"]: _cell(db, row) for row in other.query("SELECT * FROM cells ORDER BY id")}
        trials = other.query("SELECT * FROM trials ORDER BY position, rowid")
        insert(db, "trials", ({**row, "cell_id": cells[row["cell_id"]]} for row in trials), KEEP)
        for row in other.query("SELECT * FROM metrics ORDER BY position"):
            place = db.execute("SELECT coalesce(max(position) + 1, 0) FROM metrics").fetchone()[0]
            insert(db, "metrics", [{**row, "position": place}], KEEP)
        insert(db, "meta", other.query("SELECT key, value FROM meta WHERE key LIKE '%/%'"), KEEP)
        store.record_groups({settings: json.loads(groups) for settings, groups in other.stated("groups").items()})
        store.record_position(max(store.position(), other.position()))
        return _results(db, other, sessions)


def _session(db: sqlite3.Connection, row: sqlite3.Row) -> int:
    """Return the number of a session of another run, which is added unless the same one is there."""
    own = {name: row[name] for name in row.keys() if name not in ("id", "ended")}  # noqa: SIM118
    same = " AND ".join(f"{name} IS ?" for name in own)
    known = db.execute(f"SELECT id FROM sessions WHERE {same}", list(own.values())).fetchone()
    number = int(known["id"]) if known else insert(db, "sessions", [own])
    db.execute("UPDATE sessions SET ended = coalesce(ended, ?) WHERE id = ?", (row["ended"], number))
    return number


def _cell(db: sqlite3.Connection, row: sqlite3.Row) -> int:
    """Return the number of a cell of another run, which is added unless it is there."""
    own = {name: row[name] for name in row.keys() if name != "id"}  # noqa: SIM118
    insert(db, "cells", [own], "ON CONFLICT (settings) DO UPDATE SET chunk = coalesce(chunk, excluded.chunk)")
    return int(db.execute("SELECT id FROM cells WHERE settings = ?", (row["settings"],)).fetchone()["id"])


def _results(db: sqlite3.Connection, other: Store, sessions: Mapping[int, int]) -> int:
    """Add the results of trials that have none, or an error; return how many were added."""
    own = {row["trial_id"]: row["status"] for row in db.execute("SELECT trial_id, status FROM results")}
    wanted = {
        row["trial_id"]: row
        for row in other.query("SELECT * FROM results")
        if row["trial_id"] not in own or (own[row["trial_id"]] == "error" and row["status"] != "error")
    }
    forget(db, wanted)
    truths = {row["truth"] for row in wanted.values()}
    truths |= {row["truth"] for row in other.each("SELECT trial_id, truth FROM members") if row["trial_id"] in wanted}
    insert(db, "truths", (row for row in other.each("SELECT * FROM truths") if row["digest"] in truths), KEEP)
    insert(db, "results", ({**row, "session_id": sessions[row["session_id"]]} for row in wanted.values()))
    for table in OF_TRIALS:
        insert(db, table, (row for row in other.each(f"SELECT * FROM {table}") if row["trial_id"] in wanted))
    return len(wanted)


def _check_salts(stores: Sequence[Store]) -> None:
    """Raise LeakbenchError if runs have different salts."""
    known = [(store.path, salt) for store in stores if (salt := store.salt()) is not None]
    for path, salt in known[1:]:
        first, other = known[0]
        if salt != other:
            raise LeakbenchError(
                f"{first} has the salt {other!r} and {path} has {salt!r}, and a run has one; run one of them again "
                "with the --salt of the other"
            )


def _check(stores: Sequence[Store]) -> None:
    """Raise LeakbenchError if runs differ in matrix or version."""
    matrices = [_matrices(store) for store in stores]
    most = max(matrices, key=len)
    for store, own in zip(stores, matrices):
        if not own <= most:
            other = stores[matrices.index(most)]
            raise LeakbenchError(
                f"{store.path} and {other.path} are runs of different matrices ({_difference(own, most)}); "
                "give --force to merge them anyway"
            )
    versions: dict[str, tuple[Path, str]] = {}
    for store in stores:
        for session in store.sessions():
            for name, version in {"leakbench": session.provenance.version, **session.provenance.packages}.items():
                path, first = versions.setdefault(name, (store.path, version))
                if version != first:
                    raise LeakbenchError(
                        f"{path} was made with {name} {first} and {store.path} with {name} {version}; "
                        "give --force to merge them anyway"
                    )


def _matrices(store: Store) -> set[str]:
    """Return the matrices of a run as JSON, without the run's name."""
    with decoding(store.path, "JSON in column matrix of sessions"):
        found = [json.loads(session.provenance.matrix).items() for session in store.sessions()]
    return {json.dumps({key: value for key, value in axes if key != "name"}, sort_keys=True) for axes in found}


def _difference(first: set[str], second: set[str]) -> str:
    """Say in which axis two runs differ."""
    one, other = json.loads(min(first - second)), json.loads(min(second - first or second))
    for axis in {**one, **other}:
        if one.get(axis) != other.get(axis):
            return f"{axis}: {json.dumps(one.get(axis))} and {json.dumps(other.get(axis))}"
    return "one has more of them"
