"""Integrity of a run file: every trial matches its id, and every result is complete."""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from leakbench import metrics
from leakbench.analysis.recovery import recovered_targets
from leakbench.analysis.summary import LABEL
from leakbench.core import loss_curve as curve
from leakbench.core.images import decoded
from leakbench.errors import LeakbenchError, one_line
from leakbench.metrics.members import BatchMetric
from leakbench.plan.trial import target, trial_id
from leakbench.store.connection import decoding
from leakbench.store.records import threshold_of
from leakbench.store.run_file import FILE, Store

MAX_LISTED = 10
"""How many lines of a kind are listed; the others are counted."""


@dataclass(frozen=True)
class RunCheck:
    """The contents of a run file, and what is wrong with it.

    Attributes:
        planned: how many trials.
        ended: how many of them have a result, by status.
        skipped: how many need no result, since another attack has recovered the image (``Matrix.threshold``).
        missing: how many have no result, by cell.
        errors: how many ended in an error, by reason.
        faults: a line on each fault of the file.
        remarks: lines on what is worth knowing and no fault.
    """

    planned: int
    ended: dict[str, int]
    skipped: int
    missing: dict[str, int]
    errors: dict[str, int]
    faults: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def code(self) -> int:
        """0: complete and valid; 1: trials are missing or ended in an error; 3: the file has faults."""
        return 3 if self.faults else 1 if self.missing or self.errors else 0


def check(run: Path) -> RunCheck:
    """Read a run (its folder or its file) in full and check it.

    Raises:
        ForeignRun: there is no run file, it cannot be read, or leakbench did not write it.
    """
    with Store.open(run / FILE if run.is_dir() else run, readonly=True) as store:
        try:
            with decoding(store.path):
                return _state(store)
        except (LeakbenchError, sqlite3.Error) as error:
            fault = f"the file cannot be read to its end: {one_line(error)}"
            return RunCheck(0, {}, 0, {}, {}, (fault,), ())


def _state(store: Store) -> RunCheck:
    faults = [*_structure(store), *_identities(store), *_results(store)]
    statuses = store.query("SELECT status, count(*) AS n FROM results GROUP BY status ORDER BY n DESC")
    errors = store.query(
        "SELECT reason, count(*) AS n FROM results WHERE status = 'error' GROUP BY reason ORDER BY n DESC"
    )
    missing, skipped = _missing(store)
    return RunCheck(
        planned=len(store.planned()),
        ended={row["status"]: row["n"] for row in statuses},
        skipped=skipped,
        missing=missing,
        errors={row["reason"]: row["n"] for row in errors},
        faults=tuple(faults),
        remarks=tuple(_remarks(store)),
    )


def _structure(store: Store) -> Iterator[str]:
    for row in store.query("PRAGMA integrity_check"):
        if row[0] != "ok":
            yield f"SQLite: {row[0]}"
    for row in store.query("PRAGMA foreign_key_check"):
        yield f"a row of {row['table']} refers to a missing row of {row['parent']}"


def _identities(store: Store) -> Iterator[str]:
    cells = {row["id"]: json.loads(row["settings"]) for row in store.query("SELECT id, settings FROM cells")}
    for row in store.query("SELECT id, cell_id, image, seed, others FROM trials"):
        own, others = cells.get(row["cell_id"]), tuple(map(int, row["others"].split()))
        if own is not None and trial_id(own, row["image"], row["seed"], others) != row["id"]:
            yield f"trial {row['id']}: its id does not match its settings"


def _results(store: Store) -> Iterator[str]:
    sizes: dict[str, tuple[int, int] | None] = {}
    for row in store.each("SELECT digest, png FROM truths"):
        if row["png"]:  # otherwise the private image is not known
            sizes[row["digest"]] = _size(row["png"])
        if sizes.get(row["digest"], 0) is None:
            yield f"private image {row['digest'][:16]}: it is not a PNG"
        if hashlib.sha256(row["png"]).hexdigest() != row["digest"]:
            yield f"private image {row['digest'][:16]}: its content does not match its SHA-256"
    infinite = {
        row["trial_id"]: row["metric"]
        for row in store.query("SELECT trial_id, metric FROM scores WHERE NOT abs(value) < 9e999")
    }
    # images are read one by one: a run may have more of them than fit into memory
    ended = store.each(
        "SELECT trial_id, status, reason, truth, png, curve,"
        " EXISTS (SELECT 1 FROM scores WHERE scores.trial_id = results.trial_id) AS scored"
        " FROM results LEFT JOIN images USING (trial_id)"
    )
    for row in ended:
        trial, scored = row["trial_id"], row["status"] in ("ok", "failed")
        size = None if row["png"] is None else _size(row["png"])
        if scored and row["png"] is None:
            yield f"trial {trial}: it is {row['status']} and has no image"
        elif scored and (size is None or size != sizes.get(row["truth"], size)):
            yield f"trial {trial}: its image is not a PNG of the size of the private image"
        if scored and not row["scored"] and row["truth"] in sizes:
            yield f"trial {trial}: it is {row['status']} and has no scores"
        if row["curve"] is not None and not _curved(row["curve"]):
            yield f"trial {trial}: malformed curve in column curve"
        if trial in infinite:
            yield f"trial {trial}: its {infinite[trial]} is not finite"
        if not scored and (row["scored"] or row["png"] is not None):
            yield f"trial {trial}: it is {row['status']} and has scores or an image"
        if row["status"] != "ok" and not row["reason"]:
            yield f"trial {trial}: it is {row['status']} without a reason"


def _size(png: bytes) -> tuple[int, int] | None:
    """Return width and height of a PNG that can be read to its end, or None."""
    image = decoded(png)
    return None if image is None else image.size


def _curved(data: bytes) -> bool:
    """Return whether bytes are a curve that can be read."""
    try:
        curve.decoded(data)
    except ValueError:
        return False
    return True


def _missing(store: Store) -> tuple[dict[str, int], int]:
    """Return how many trials of each cell are missing, and how many need no result."""
    threshold = threshold_of(store.sessions())
    recovered = {} if threshold is None else recovered_targets(store, threshold)
    missing: Counter[str] = Counter()
    skipped = 0
    rows = store.query(
        "SELECT image, seed, settings, floor, attack, defense, threat, model, dataset FROM trials"
        " JOIN cells ON cells.id = cell_id LEFT JOIN results ON trials.id = trial_id WHERE status IS NULL"
        " ORDER BY position"
    )
    for row in rows:
        if (
            not row["floor"]
            and recovered
            and target(json.loads(row["settings"]), row["image"], row["seed"]) in recovered
        ):
            skipped += 1
            continue
        missing[f"{row['attack']} against {row['defense']} ({row['threat']}), {row['model']} on {row['dataset']}"] += 1
    return dict(missing), skipped


def _remarks(store: Store) -> Iterator[str]:
    sessions = store.sessions()
    killed = sum(session.ended is None for session in sessions)
    if killed:
        yield f"{killed} of {len(sessions)} sessions did not end: they were stopped, or are still running"
    shards = sorted({session.provenance.shard for session in sessions if session.provenance.shard})
    if shards:
        yield f"shards: {', '.join(shards)}"
    ended: dict[bool, int] = {}  # by whether the clients have several images
    for row in store.query(
        "SELECT others != '' AS batch, count(*) AS n FROM results JOIN trials ON trials.id = trial_id"
        " WHERE status IN ('ok', 'failed') GROUP BY batch"
    ):
        ended[bool(row["batch"])] = row["n"]
    for row in store.query("SELECT metric, count(*) AS n FROM scores GROUP BY metric"):
        expected = sum(count for batch, count in ended.items() if _has(row["metric"], batch))
        if row["n"] < expected:
            yield f"{expected - row['n']} trials have no value of {row['metric']}: it could not be computed"


def _has(metric: str, batch: bool) -> bool:
    """Return whether clients of several images, or those of one, have a metric; of a plugin's, both may."""
    if metric == LABEL:
        return not batch
    return batch or metric not in metrics.names() or not issubclass(metrics.get(metric), BatchMetric)
