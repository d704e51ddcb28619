"""The run file: one SQLite file that holds every trial, result, picture and their provenance.

Any SQLite tool can read it. Every table, picture and page that leakbench makes is a pure function of this file.

- ``meta(key, value)``: ``schema`` (also ``PRAGMA user_version``), ``created_by``, ``created``; ``planned``, the first
  free position; ``checkpoint/SETTINGS`` (both JSON), what a model's file of trained weights states;
  ``defense/SETTINGS`` and ``dataset/SETTINGS`` (both JSON), what a defense or a dataset states of itself;
  ``groups/SETTINGS`` (both JSON), the group of each planned image of a dataset in which images share groups;
  ``plugin/KIND/NAME/SHA256`` (JSON), the file of a component that is not part of leakbench.
- ``sessions``: one row for every time the run was started or resumed: ``version``, git ``commit_id`` and ``dirty``
  if leakbench ran from a checkout, ``packages`` (JSON, name -> version), ``python``, ``device``, ``threads``,
  ``command``, ``matrix`` (JSON), ``started`` and ``ended`` (UTC; ``ended`` is NULL if the run was killed),
  ``shard`` (``i/n``, empty for the whole matrix), ``workers``, ``salt`` (of the keys of all draws; empty in runs of
  before there were salts).
- ``cells``: what the trials of a cell have in common. ``settings`` (JSON) is everything that identifies the cell;
  ``dataset``, ``model``, ``defense``, ``attack`` and ``threat`` are specs; ``threat_words`` describes the threat model;
  ``floor`` is 1 for attacks that use no gradient, and 2 for controls (``Attack.is_control``); ``chunk`` is how many of
  its trials run at a time.
- ``trials``: the planned trials: an ``image`` and a ``seed`` of a cell (``cell_id``), and the indices of the ``others``
  of a batch, separated by spaces. ``id`` is the hash of the cell's settings with these; ``position`` is the order of
  planning.
- ``results``: the outcome of a trial: ``status`` (ok, failed, unsupported, error), ``reason``, ``seconds``, ``label``
  (the true one; -1 if it is not known), ``objective``, ``evaluations``, ``path``, ``truth`` (-> ``truths``),
  ``session_id``, ``finished``, ``curve`` (the objective at some evaluations, see ``leakbench.core.loss_curve``; NULL if
  there is none).
- ``scores(trial_id, metric, value)``: one row per trial and metric; a metric that was not computed has no row.
- ``findings(trial_id, name, value)``: further numbers that an attack found (dlm's ``scale``).
- ``images(trial_id, png, aligned)``: the reconstruction, clamped to [0, 1]; and after the best fit of brightness and
  contrast to the private image, NULL unless the clamped and rounded picture no longer shows it (``Result.aligned``).
- ``members(trial_id, place, image, label, truth, png, aligned)``: of batches of several images, each image, and the
  reconstruction that was assigned to it, as in ``images``; NULL if none was left.
- ``member_scores(trial_id, place, metric, value)``: the scores of these; ``scores`` has their mean.
- ``truths(digest, png)``: the private images, each stored once, by the SHA-256 of the PNG; empty if the image is not
  known, because the server recorded an update.
- ``metrics``: the meaning of each metric: ``position``, ``name``, ``higher_is_better``, ``convention``, ``note``.

Results are written in chunks, one transaction each: a run that is killed loses only the chunk that it was running.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Self

import pandas as pd
from pydantic import TypeAdapter

from leakbench.attacks import Attack
from leakbench.core.loss_curve import decoded
from leakbench.errors import ForeignRun, LeakbenchError
from leakbench.metrics.base import Metric
from leakbench.models.base import with_mode
from leakbench.models.weights import Checkpoint
from leakbench.plan.trial import Cell, Result, Trial
from leakbench.store import connection, frames
from leakbench.store.connection import KEEP, decoding, insert, now
from leakbench.store.frames import AFTER, BEFORE, SPECS
from leakbench.store.provenance import Provenance
from leakbench.store.records import (
    MetricInfo,
    Pictures,
    PluginFile,
    RunSession,
    Statement,
    StoredComponent,
    StoredMember,
    TrialRecord,
)

FILE = "run.sqlite"
"""The name of the run file inside a run's folder."""


_PLUGIN = TypeAdapter(PluginFile)


class Store:
    """An open run file; made by ``Store.create`` or ``Store.open``, closed by ``close`` or as a context manager."""

    def __init__(self, path: Path, db: sqlite3.Connection, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._db = db

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """Return a new, empty run file; see ``connection.create``."""
        return cls(Path(path), connection.create(Path(path)), readonly=False)

    @classmethod
    def open(cls, path: str | Path, readonly: bool = False) -> Store:
        """Return an existing run file; one of an older schema is migrated, in memory if it is only read.

        Raises:
            ForeignRun: there is no such file, it cannot be read, or leakbench did not write it.
        """
        return cls(Path(path), connection.connect(Path(path), readonly), readonly)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        connection.disconnect(self._db, self.readonly)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield the database; all that is executed inside is written, or nothing."""
        with connection.transaction(self._db, self.path):
            yield self._db

    def query(self, query: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """Return the rows of a query in SQL; the tables are described above."""
        with connection.sqlite_errors(self.path):
            return self._db.execute(query, values).fetchall()

    def each(self, query: str) -> Iterator[sqlite3.Row]:
        """Yield the rows of a query in SQL that are too many, or too large, to hold."""
        with connection.sqlite_errors(self.path):
            yield from self._db.execute(query)

    def start_session(self, provenance: Provenance) -> int:
        """Record that the run was started (or resumed) and return the session's number."""
        with self.transaction() as db:
            return insert(db, "sessions", [{**provenance.columns(), "started": now()}])

    def end_session(self, session: int) -> None:
        """Record that the session ended."""
        with self.transaction() as db:
            db.execute("UPDATE sessions SET ended = ? WHERE id = ?", (now(), session))

    def sessions(self) -> list[RunSession]:
        """Return every session, in order of start."""
        rows = self.query("SELECT * FROM sessions ORDER BY id")
        with decoding(self.path, "JSON in column packages of sessions"):
            return [RunSession(row["id"], Provenance.of(row), row["started"], row["ended"]) for row in rows]

    def salt(self) -> str | None:
        """Return the salt of the run, the same in all sessions; None before the first one.

        Raises:
            ForeignRun: the sessions have several salts.
        """
        found = [row["salt"] for row in self.query("SELECT DISTINCT salt FROM sessions")]
        if len(found) > 1:
            raise ForeignRun(f"{self.path} has sessions of {len(found)} salts, and a run has one; start a new run")
        return found[0] if found else None

    def add_trials(self, trials: Sequence[Trial], among: Sequence[Trial] | None = None) -> None:
        """Record what is planned; trials that are known already stay as and where they are.

        Args:
            trials: the trials.
            among: everything that is planned, in order, if ``trials`` are a part of it (a shard): each gets the
                position that it has there, so that merged shards are in the order of the whole.
        """
        with self.transaction():
            self._insert_trials(trials, among)

    def planned(self) -> set[str]:
        """Return the id of every planned trial."""
        return {row["id"] for row in self.query("SELECT id FROM trials")}

    def done(self) -> set[str]:
        """Return the id of every trial that needs no further run; one that ended in an error is tried again."""
        return {row["trial_id"] for row in self.query("SELECT trial_id FROM results WHERE status != 'error'")}

    def scored(self, metrics: Sequence[str]) -> pd.DataFrame:
        """Return the trials that ended with scores or diverged, in few columns, which is faster than ``trials``.

        Those of controls are left out. The columns are ``trial``, ``cell``, ``dataset`` and ``defense`` (their
        settings as JSON), ``image``, ``seed``, ``status``, ``floor`` and these metrics, NaN for one that was not
        computed.
        """
        values = "".join(", (SELECT value FROM scores WHERE trial_id = trials.id AND metric = ?)" for _ in metrics)
        rows = self.query(
            f"SELECT trials.id, settings, image, seed, status, floor{values} FROM results"
            " JOIN trials ON trials.id = trial_id JOIN cells ON cells.id = cell_id WHERE floor != 2 AND status IN"
            " ('ok', 'failed')",
            metrics,
        )
        columns = ["trial", "cell", "image", "seed", "status", "floor", *metrics]
        types = dict.fromkeys(metrics, "float64") | {"floor": "bool", "image": "int64", "seed": "int64"}
        found = pd.DataFrame([tuple(row) for row in rows], columns=columns).astype(types)
        with decoding(self.path, "JSON in column settings of cells"):
            cells = {text: json.loads(text) for text in found["cell"].unique()}
            parts = {
                part: {
                    text: json.dumps([own[part], *own.get(client, ())], sort_keys=True) for text, own in cells.items()
                }
                for part, client in (("dataset", "client"), ("defense", ""))
            }
        return found.assign(**{part: found["cell"].map(each) for part, each in parts.items()})

    def chunk(self, cell: str) -> int | None:
        """Return how many trials of a cell (``Cell.key``) run at a time, or None if that was not recorded."""
        rows = self.query("SELECT chunk FROM cells WHERE settings = ?", (cell,))
        return rows[0]["chunk"] if rows else None

    def record_chunk(self, cell: str, size: int) -> None:
        """Record how many trials of a planned cell run at a time."""
        with self.transaction() as db:
            db.execute("UPDATE cells SET chunk = ? WHERE settings = ?", (size, cell))

    def record_checkpoints(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        """Record what files of trained weights state, by their models' settings (JSON); what is known stays."""
        stated = {f"checkpoint/{settings}": json.dumps(asdict(own)) for settings, own in checkpoints.items()}
        with self.transaction() as db:
            insert(db, "meta", ({"key": key, "value": value} for key, value in stated.items()), KEEP)

    def record_statements(self, statements: Mapping[tuple[str, str], Statement]) -> None:
        """Record what components state of themselves, by kind and settings (JSON); what is known is replaced."""
        stated = {f"{kind}/{settings}": json.dumps(asdict(own)) for (kind, settings), own in statements.items()}
        with self.transaction() as db:
            for key, value in stated.items():
                self._set_meta(db, key, value)

    def record_groups(self, groups: Mapping[str, Mapping[int, int]]) -> None:
        """Record the group of images, by their dataset's settings (JSON), within a transaction.

        The groups that are known stay.
        """
        recorded = self.stated("groups")
        with decoding(self.path, "JSON in row 'groups' of meta"):
            known = {settings: json.loads(recorded.get(settings, "{}")) for settings in groups}
        for settings, own in groups.items():
            merged = {**{str(image): group for image, group in own.items()}, **known[settings]}
            self._set_meta(self._db, f"groups/{settings}", json.dumps(merged))

    def record_plugins(self, plugins: Iterable[PluginFile]) -> None:
        """Record the files of components that are not part of leakbench; what was recorded before stays."""
        stated = {f"plugin/{one.kind}/{one.name}/{one.sha256}": json.dumps(asdict(one)) for one in plugins}
        with self.transaction() as db:
            insert(db, "meta", ({"key": key, "value": value} for key, value in stated.items()), KEEP)

    def plugins(self) -> list[PluginFile]:
        """Return the files of components that are not part of leakbench, of all starts of the run."""
        with decoding(self.path, "JSON in a row 'plugin/...' of meta"):
            return [_PLUGIN.validate_json(text) for _, text in sorted(self.stated("plugin").items())]

    def record_metrics(self, metrics: Iterable[Metric], notes: Mapping[str, str] | None = None) -> None:
        """Record the meaning of the metrics, before their scores; the description of a known metric is replaced.

        Args:
            metrics: every metric of the run, those that cannot be computed on this machine included.
            notes: metric name -> what a reader must know of the column (``Metric.note``).
        """
        with self.transaction() as db:
            for metric in metrics:
                if metric.name in BEFORE + AFTER:
                    raise LeakbenchError(
                        f"metric {metric.name!r} has the name of a column of the results; rename the metric"
                    )
                row = {
                    "name": metric.name,
                    "position": db.execute("SELECT coalesce(max(position) + 1, 0) FROM metrics").fetchone()[0],
                    "higher_is_better": bool(metric.higher_is_better),
                    "convention": metric.convention,
                    "note": (notes or {}).get(metric.name, ""),
                }
                replaced = ", ".join(f"{name} = excluded.{name}" for name in ("higher_is_better", "convention", "note"))
                insert(db, "metrics", [row], f"ON CONFLICT (name) DO UPDATE SET {replaced}")

    def metrics(self) -> list[MetricInfo]:
        """Return the recorded metrics, in the order they were recorded."""
        return [
            MetricInfo(row["name"], bool(row["higher_is_better"]), row["convention"], row["note"])
            for row in self.query("SELECT * FROM metrics ORDER BY position")
        ]

    def threats(self) -> dict[tuple[str, str], str]:
        """Return what a threat model grants, in words, by its spec and the dataset's label, which names the clients."""
        rows = self.query("SELECT threat, dataset, threat_words FROM cells GROUP BY threat, dataset ORDER BY min(id)")
        return {(row["threat"], row["dataset"]): row["threat_words"] for row in rows}

    def cells(self) -> list[sqlite3.Row]:
        """Return the row of every cell of which a trial was planned, in the order of planning."""
        return self.query(
            "SELECT cells.* FROM cells JOIN (SELECT cell_id, min(position) AS first, min(rowid) AS row FROM trials"
            " GROUP BY cell_id) ON cells.id = cell_id ORDER BY first, row"
        )

    def stated(self, kind: str) -> dict[str, str]:
        """Return what was recorded of components of a kind (JSON), by their settings (JSON)."""
        rows = self.query("SELECT key, value FROM meta WHERE key LIKE ?", (f"{kind}/%",))
        return {row["key"].partition("/")[2]: row["value"] for row in rows}

    def components(self) -> list[StoredComponent]:
        """Return every dataset, model, defense and attack that was planned, with all its options."""
        with decoding(self.path, "JSON in column settings of cells, or value of meta"):
            return frames.components(self.cells(), self.stated)

    def write(self, results: Sequence[Result], session: int) -> None:
        """Write a chunk of results, all or none; the result of a trial replaces an earlier one."""
        with self.transaction() as db:
            self._insert_trials([result.trial for result in results])
            known = {row["name"] for row in db.execute("SELECT name FROM metrics")}
            for name in {name for result in results for name in result.scores} - known:
                raise LeakbenchError(
                    f"{self.path}: {name!r} of the scores is not a metric of this run; record the metric first"
                )
            forget(db, [result.trial.id for result in results])
            members = [(one.trial.id, place, own) for one in results for place, own in enumerate(one.members)]
            truths = {_digest(result.truth): result.truth or b"" for result in results}
            truths |= {_digest(own.truth): own.truth for _, _, own in members}
            insert(db, "truths", ({"digest": digest, "png": png} for digest, png in truths.items()), KEEP)
            insert(db, "results", (_columns(result, session) for result in results))
            insert(db, "scores", _values("metric", {result.trial.id: result.scores for result in results}))
            insert(db, "findings", _values("name", {result.trial.id: result.findings for result in results}))
            shown = [result for result in results if result.reconstruction is not None]
            insert(
                db,
                "images",
                ({"trial_id": one.trial.id, "png": one.reconstruction, "aligned": one.aligned} for one in shown),
            )
            insert(
                db,
                "members",
                (
                    {
                        "trial_id": trial,
                        "place": place,
                        "image": own.image,
                        "label": -1 if own.label is None else own.label,
                        "truth": _digest(own.truth),
                        "png": own.reconstruction,
                        "aligned": own.aligned,
                    }
                    for trial, place, own in members
                ),
            )
            insert(
                db,
                "member_scores",
                (
                    {"trial_id": trial, "place": place, "metric": metric, "value": float(value)}
                    for trial, place, own in members
                    for metric, value in own.scores.items()
                    if not math.isnan(value)
                ),
            )

    def results(self) -> pd.DataFrame:
        """Return one row per trial that has a result: ``BEFORE``, every recorded metric, ``AFTER``.

        Rows are in order of dataset, model, threat, defense and attack (each by its first planning), seed, image. A
        metric that was not computed is NaN. If one spec names components of different settings (a version was
        raised, or a default changed, between two sessions), the version or a hash of the settings is added to it.
        """
        return frames.ended(self.trials())

    def controls(self) -> pd.DataFrame:
        """Return the rows of ``trials`` for controls (``Attack.is_control``), which ``trials`` and ``results`` lack."""
        return self._frame(frames.CONTROLS)

    def trials(self) -> pd.DataFrame:
        """Return one row per planned trial in the order of planning, with the columns of ``results``.

        A trial without a result has an empty ``status``: it was not run yet, or need not be (``Matrix.threshold``).
        """
        return self._frame(frames.TRIALS)

    def _frame(self, query: str) -> pd.DataFrame:
        rows, scores = self.query(query), self.query("SELECT trial_id, metric, value FROM scores")
        with decoding(self.path, "JSON in column settings of cells"):
            metrics, groups = [metric.name for metric in self.metrics()], self.stated("groups")
            return frames.trials(rows, self.cells(), scores, metrics, groups)

    def records(self) -> dict[str, TrialRecord]:
        """Return what identifies every planned trial, by its id in the order of planning."""
        rows = self.query(
            "SELECT trials.id, settings, threat_words, label, session_id, coalesce(finished, '') AS finished, others,"
            " dataset, model, threat, defense, attack FROM trials JOIN cells ON cells.id = cell_id"
            " LEFT JOIN results ON trials.id = trial_id ORDER BY position"
        )
        with decoding(self.path, "JSON in column settings of cells"):
            models = {
                text: with_mode(spec, json.loads(text)["model"])
                for text, spec in {row["settings"]: row["model"] for row in rows}.items()
            }
        return {
            row["id"]: TrialRecord(
                cell=row["settings"],
                threat=row["threat_words"],
                label=None if row["label"] == -1 else row["label"],
                session=row["session_id"],
                finished=row["finished"],
                others=tuple(map(int, row["others"].split())),
                specs={axis: row[axis] for axis in SPECS} | {"model": models[row["settings"]]},
            )
            for row in rows
        }

    def findings(self) -> pd.DataFrame:
        """Return what attacks found beside images and labels: ``trial``, ``name`` and ``value``, one row each."""
        rows = self.query("SELECT trial_id, name, value FROM findings ORDER BY trial_id, name")
        return pd.DataFrame([tuple(row) for row in rows], columns=["trial", "name", "value"])

    def images(self, trials: Iterable[str]) -> dict[str, Pictures]:
        """Return the PNGs of these trials by id; trials without a result are left out.

        An image of a batch is named by its trial and its place: ``TRIAL/PLACE``.
        """
        pictures: dict[str, Pictures] = {}
        truths: dict[str, bytes] = {}
        for trial in trials:
            if "/" in trial:
                whole, _, place = trial.partition("/")
                own = self.members([whole]).get(whole, [])
                if int(place) < len(own):
                    pictures[trial] = own[int(place)].pictures
                continue
            rows = self.query(
                "SELECT truth, images.png, aligned FROM results LEFT JOIN images USING (trial_id) WHERE trial_id = ?",
                (trial,),
            )
            for digest, png, aligned in rows:
                if digest not in truths:
                    found = self.query("SELECT png FROM truths WHERE digest = ?", (digest,))
                    if not found:
                        raise ForeignRun(f"{self.path} lacks the private image of trial {trial}; start a new run")
                    truths[digest] = found[0]["png"]
                pictures[trial] = Pictures(truths[digest] or None, png, aligned)
        return pictures

    def members(self, trials: Iterable[str]) -> dict[str, list[StoredMember]]:
        """Return the images of batches by trial, in the clients' order; trials of one image are left out."""
        found: dict[str, list[StoredMember]] = {}
        for trial in trials:
            scores: dict[int, dict[str, float]] = {}
            query = "SELECT place, metric, value FROM member_scores WHERE trial_id = ?"
            for place, metric, value in self.query(query, (trial,)):
                scores.setdefault(place, {})[metric] = value
            rows = self.query(
                "SELECT place, image, label, members.png, aligned, truths.png AS truth FROM members JOIN truths ON"
                " truth = digest WHERE trial_id = ? ORDER BY place",
                (trial,),
            )
            if rows:
                found[trial] = [
                    StoredMember(
                        row["image"],
                        None if row["label"] == -1 else row["label"],
                        Pictures(row["truth"] or None, row["png"], row["aligned"]),
                        scores.get(row["place"], {}),
                    )
                    for row in rows
                ]
        return found

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return by trial the objective at some evaluations of its search; trials without are left out."""
        rows = self.query("SELECT trial_id, curve FROM results WHERE curve IS NOT NULL")
        with decoding(self.path, "curve in column curve of results"):
            return {row["trial_id"]: decoded(row["curve"]) for row in rows}

    def position(self) -> int:
        """Return the first position that no planned trial has."""
        largest = self.query("SELECT coalesce(max(position) + 1, 0) FROM trials")[0][0]
        with decoding(self.path, "number in row 'planned' of meta"):
            return max(largest, *(int(row["value"]) for row in self.query(_PLANNED)), 0)

    def record_position(self, position: int) -> None:
        """Record the first position that is free, within a transaction."""
        self._set_meta(self._db, "planned", str(position))

    @staticmethod
    def _set_meta(db: sqlite3.Connection, key: str, value: str) -> None:
        insert(db, "meta", [{"key": key, "value": value}], "ON CONFLICT (key) DO UPDATE SET value = excluded.value")

    def _insert_trials(self, trials: Sequence[Trial], among: Sequence[Trial] | None = None) -> None:
        begin = self.position()
        among = trials if among is None else among
        order = {trial.id: begin + place for place, trial in enumerate(among)}
        cells: dict[str, int] = {}
        for trial in trials:
            if trial.cell.key not in cells:
                cells[trial.cell.key] = self._insert_cell(trial.cell)
        before = self._db.total_changes
        self._db.executemany(
            "INSERT INTO trials (id, position, cell_id, image, seed, others) VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO NOTHING",
            (
                (one.id, order[one.id], cells[one.cell.key], one.image, one.seed, " ".join(map(str, one.others)))
                for one in trials
            ),
        )
        if self._db.total_changes > before:
            self.record_position(begin + len(among))

    def _insert_cell(self, cell: Cell) -> int:
        """Return the number of a cell; a new one gets one."""
        own = {"settings": cell.key, "threat_words": cell.threat_words, "floor": _kind(cell.attack)}
        insert(self._db, "cells", [{**cell.labels, **own}], KEEP)
        return int(self._db.execute("SELECT id FROM cells WHERE settings = ?", (cell.key,)).fetchone()["id"])


_PLANNED = "SELECT value FROM meta WHERE key = 'planned'"


OF_TRIALS = ("scores", "findings", "images", "members", "member_scores")
"""The tables whose rows belong to the result of a trial."""


def forget(db: sqlite3.Connection, trials: Iterable[str]) -> None:
    """Delete the results of trials, with all that belongs to them."""
    ids = [(trial,) for trial in trials]
    for table in (*OF_TRIALS, "results"):
        db.executemany(f"DELETE FROM {table} WHERE trial_id = ?", ids)


def _kind(attack: Attack) -> int:
    """Return the value of the column ``floor``: 1 for a floor, 2 for a control, 0 for any other attack."""
    return 2 if attack.is_control else int(attack.floor)


def _digest(truth: bytes | None) -> str:
    """Return the SHA-256 of a private image; that of nothing if it is not known."""
    return hashlib.sha256(truth or b"").hexdigest()


def _values(column: str, named: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, object]]:
    """Yield the rows of a table of named values of trials, by trial; NaN is left out."""
    for trial, values in named.items():
        for name, value in values.items():
            if not math.isnan(value):
                yield {"trial_id": trial, column: name, "value": float(value)}


def _columns(result: Result, session: int) -> dict[str, object]:
    """Return the row of the table ``results``."""
    return {
        "trial_id": result.trial.id,
        "status": result.status,
        "reason": result.reason,
        "seconds": float(result.seconds),
        "label": -1 if result.label is None else int(result.label),
        "objective": None if result.objective is None else float(result.objective),
        "evaluations": None if result.evaluations is None else int(result.evaluations),
        "path": result.path,
        "truth": _digest(result.truth),
        "session_id": session,
        "finished": now(),
        "curve": result.curve or None,
    }
