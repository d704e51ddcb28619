"""The run file: one SQLite file that holds every trial, result, picture and where they came from.

Any SQLite tool can read it. Every table, picture and page that leakbench makes is a pure function of this file.

- ``meta(key, value)``: ``schema`` (also ``PRAGMA user_version``), ``created_by``, ``created``; ``planned``, the first
  position that is free; ``checkpoint/SETTINGS`` (both JSON), what a model's file of trained weights states;
  ``defense/SETTINGS`` (both JSON), what a defense states of itself.
- ``sessions``: one row for every time the run was started or resumed: ``version``, git ``commit_id`` and ``dirty``
  where leakbench ran from a checkout, ``packages`` (JSON, name -> version), ``python``, ``device``, ``threads``,
  ``command``, ``matrix`` (JSON), ``started`` and ``ended`` (UTC; ``ended`` is NULL where the run was killed),
  ``shard`` (``i/n``, empty for the whole matrix), ``workers``.
- ``cells``: what trials have in common. ``settings`` (JSON) is everything that identifies the cell; ``dataset``,
  ``model``, ``defense``, ``attack`` and ``threat`` are specs; ``threat_words`` says the threat model in words;
  ``floor`` is 1 for attacks that use no gradient; ``chunk`` is how many of its trials run at a time.
- ``trials``: what was planned: an ``image`` and a ``seed`` of a cell (``cell_id``). ``id`` is the hash of the cell's
  settings with these two; ``position`` is the order of planning.
- ``results``: what came of a trial: ``status`` (ok, failed, unsupported, error), ``reason``, ``seconds``, ``label``
  (the true one), ``objective``, ``evaluations``, ``path``, ``truth`` (-> ``truths``), ``session_id``, ``finished``,
  ``curve`` (the objective at some evaluations, see ``leakbench.core.loss_curve``; NULL where there is none).
- ``scores(trial_id, metric, value)``: one row per trial and metric; a metric that was not computed has no row.
- ``findings(trial_id, name, value)``: further numbers that an attack found (dlm's ``scale``).
- ``images(trial_id, png)``: the reconstruction, clamped to [0, 1].
- ``truths(digest, png)``: the private images, each stored once, by the SHA-256 of the PNG.
- ``metrics``: what each metric means: ``position``, ``name``, ``higher_is_better``, ``convention``, ``note``.

Results are written in chunks, one transaction each: a run that is killed loses the chunk it was in and no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import pandas as pd
from pydantic import TypeAdapter

from leakbench.core.loss_curve import decoded
from leakbench.errors import ForeignRun, LeakbenchError
from leakbench.metrics.base import Metric
from leakbench.models.weights import Checkpoint
from leakbench.plan.trial import Cell, Result, Trial, target
from leakbench.store import schema
from leakbench.store.connection import _check_file, _connect, _migrated, _one_line_errors, decoding
from leakbench.store.provenance import Provenance
from leakbench.store.records import MetricInfo, Pictures, RunSession, Statement, StoredComponent, TrialRecord
from leakbench.version import __version__

FILE = "run.sqlite"
"""The name of the run file inside a run's folder."""

BEFORE = ("trial", "dataset", "model", "defense", "attack", "threat", "image", "seed", "status", "seconds")
"""The columns of the results before the metrics."""
AFTER = ("reason", "objective", "evaluations", "floor", "path")
"""The columns of the results after the metrics."""

_SPECS = ("dataset", "model", "threat", "defense", "attack")


class Store:
    """An open run file; made by ``Store.create`` or ``Store.open``, closed by ``close`` or as a context manager."""

    def __init__(self, path: Path, connection: sqlite3.Connection, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._db = connection

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """Return a new, empty run file; folders are made where needed.

        Raises:
            LeakbenchError: the file exists already, or cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            taken = path.exists() and (not path.is_file() or path.stat().st_size > 0)
        except OSError as error:
            raise LeakbenchError(f"{path} cannot be written: {error.strerror}; choose another folder") from None
        if taken:
            raise LeakbenchError(f"{path} exists already; resume it, or choose another folder")
        with _one_line_errors(path):
            db = sqlite3.connect(path, timeout=30, isolation_level=None)
        store = cls(path, db, readonly=False)
        try:
            with store._transaction():
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise LeakbenchError(f"{path} exists already; resume it, or choose another folder")
                schema.create(db, {"created_by": f"leakbench {__version__}", "created": _now()})
            store._configure()
        except BaseException:
            db.close()
            raise
        return store

    @classmethod
    def open(cls, path: str | Path, readonly: bool = False) -> Store:
        """Return an existing run file; one of an older schema is migrated, in memory where it is only read.

        Raises:
            ForeignRun: there is no such file, it cannot be read, or leakbench did not write it.
        """
        path = Path(path)
        _check_file(path)
        db = _connect(path, readonly)
        store = cls(path, db, readonly)
        try:
            with _one_line_errors(path):
                db.execute("PRAGMA trusted_schema = OFF")  # nothing in somebody else's schema runs a function
                application = db.execute("PRAGMA application_id").fetchone()[0]
                found = db.execute("PRAGMA user_version").fetchone()[0]
            if application != schema.APPLICATION_ID:
                raise ForeignRun(f"{path} is an SQLite file that leakbench did not write; give the path of a run file")
            if found > schema.SCHEMA:
                raise ForeignRun(
                    f"{path} has schema {found} and leakbench {__version__} reads up to {schema.SCHEMA}; "
                    f"upgrade leakbench"
                )
            if found < schema.SCHEMA:
                store._db = db = _migrated(path, db, readonly)
            with _one_line_errors(path):
                flaw = schema.flaw(db)
            if flaw:
                raise ForeignRun(f"{path}: {flaw}: it is damaged, or leakbench did not write it; start the run anew")
            store._configure()
        except BaseException:
            db.close()
            raise
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a file that was written is left as one file, without a write-ahead log beside it."""
        if not self.readonly:
            # somebody else reads it: the log stays, and is read with it
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                self._db.execute("PRAGMA busy_timeout = 0")
                self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    def start_session(self, provenance: Provenance) -> int:
        """Record that the run was started (or resumed) and return the session's number."""
        row = (
            provenance.version,
            provenance.commit,
            provenance.dirty,
            json.dumps(dict(provenance.packages), sort_keys=True),
            provenance.python,
            _text(provenance.device),
            provenance.threads,
            _text(provenance.command),
            _text(provenance.matrix),
            _now(),
            provenance.shard,
            provenance.workers,
        )
        with self._transaction():
            cursor = self._db.execute(
                "INSERT INTO sessions (version, commit_id, dirty, packages, python, device, threads, command, matrix,"
                " started, shard, workers) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        return int(cursor.lastrowid or 0)

    def end_session(self, session: int) -> None:
        """Record that the session came to its end."""
        with self._transaction():
            self._db.execute("UPDATE sessions SET ended = ? WHERE id = ?", (_now(), session))

    def sessions(self) -> list[RunSession]:
        """Return every session, in order of start."""
        with decoding(self.path):
            return [
                RunSession(
                    id=row["id"],
                    provenance=Provenance(
                        version=row["version"],
                        commit=row["commit_id"],
                        dirty=None if row["dirty"] is None else bool(row["dirty"]),
                        packages=_PACKAGES.validate_json(row["packages"]),
                        python=row["python"],
                        device=row["device"],
                        threads=row["threads"],
                        command=row["command"],
                        matrix=row["matrix"],
                        shard=row["shard"],
                        workers=row["workers"],
                    ),
                    started=row["started"],
                    ended=row["ended"],
                )
                for row in self.query("SELECT * FROM sessions ORDER BY id")
            ]

    def add_trials(self, trials: Sequence[Trial], among: Sequence[Trial] | None = None) -> None:
        """Record what is planned; trials that are known already stay as and where they are.

        Args:
            trials: the trials.
            among: everything that is planned, in order, where ``trials`` are a part of it (a shard): each gets the
                position that it has there, so that shards that are merged are in the order of the whole.
        """
        with self._transaction():
            self._insert_trials(trials, among)

    def planned(self) -> set[str]:
        """Return the id of every trial that was planned."""
        return {row["id"] for row in self.query("SELECT id FROM trials")}

    def done(self) -> set[str]:
        """Return the id of every trial whose result stands; one that ended in an error is worth another try."""
        return {row["trial_id"] for row in self.query("SELECT trial_id FROM results WHERE status != 'error'")}

    def recovered(self, metric: str, threshold: float) -> dict[str, set[str]]:
        """Return what attacks (floors are none) have recovered: ``Trial.target`` -> the trials that did it.

        A trial has recovered its image where it did not fail and its score in the metric is at least the threshold.
        """
        rows = self.query(
            "SELECT trials.id, image, seed, settings FROM scores JOIN results USING (trial_id)"
            " JOIN trials ON trials.id = trial_id JOIN cells ON cells.id = cell_id"
            " WHERE metric = ? AND value >= ? AND status = 'ok' AND NOT floor",
            (metric, threshold),
        )
        found: dict[str, set[str]] = {}
        with decoding(self.path):
            for row in rows:
                attacked = target(json.loads(row["settings"]), row["image"], row["seed"])
                found.setdefault(attacked, set()).add(row["id"])
        return found

    def chunk(self, cell: str) -> int | None:
        """Return how many trials of a cell (``Cell.key``) run at a time, or None where that was not recorded."""
        rows = self.query("SELECT chunk FROM cells WHERE settings = ?", (cell,))
        return rows[0]["chunk"] if rows else None

    def record_chunk(self, cell: str, size: int) -> None:
        """Record how many trials of a cell that was planned run at a time."""
        with self._transaction():
            self._db.execute("UPDATE cells SET chunk = ? WHERE settings = ?", (size, cell))

    def record_checkpoints(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        """Record what files of trained weights state, by their models' settings (JSON); what is known stays."""
        rows = [(f"checkpoint/{settings}", json.dumps(asdict(stated))) for settings, stated in checkpoints.items()]
        with self._transaction():
            self._db.executemany("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO NOTHING", rows)

    def record_statements(self, statements: Mapping[tuple[str, str], Statement]) -> None:
        """Record what components state of themselves, by kind and settings (JSON); what is known is stated anew."""
        rows = [(f"{kind}/{own}", _text(json.dumps(asdict(stated)))) for (kind, own), stated in statements.items()]
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def record_metrics(self, metrics: Iterable[Metric], notes: Mapping[str, str] | None = None) -> None:
        """Record what the metrics mean, before their scores; a metric that is known already is described anew.

        Args:
            metrics: every metric of the run, those that cannot be computed on this machine included.
            notes: metric name -> what a reader must know of the column (``Metric.note``).
        """
        notes = notes or {}
        with self._transaction():
            for metric in metrics:
                if metric.name in BEFORE + AFTER:
                    raise LeakbenchError(
                        f"metric {metric.name!r} has the name of a column of the results; rename the metric"
                    )
                self._db.execute(
                    "INSERT INTO metrics (name, position, higher_is_better, convention, note)"
                    " VALUES (?, (SELECT coalesce(max(position) + 1, 0) FROM metrics), ?, ?, ?)"
                    " ON CONFLICT (name) DO UPDATE SET higher_is_better = excluded.higher_is_better,"
                    " convention = excluded.convention, note = excluded.note",
                    (
                        metric.name,
                        bool(metric.higher_is_better),
                        _text(metric.convention),
                        _text(notes.get(metric.name, "")),
                    ),
                )

    def metrics(self) -> list[MetricInfo]:
        """Return what is known of every metric, in the order they were recorded."""
        return [
            MetricInfo(row["name"], bool(row["higher_is_better"]), row["convention"], row["note"])
            for row in self.query("SELECT * FROM metrics ORDER BY position")
        ]

    def threats(self) -> dict[str, str]:
        """Return every threat model: its spec and what it grants in words."""
        rows = self.query("SELECT threat, threat_words FROM cells GROUP BY threat ORDER BY min(id)")
        return {row["threat"]: row["threat_words"] for row in rows}

    def components(self) -> list[StoredComponent]:
        """Return every dataset, model, defense and attack that was planned, with all its options."""
        with decoding(self.path):
            rows = self._cells()
            settings = [json.loads(row["settings"]) for row in rows]
            checkpoints = {
                settings: _CHECKPOINT.validate_json(text) for settings, text in self._stated("checkpoint").items()
            }
            statements = {
                (kind, settings): _STATEMENT.validate_json(text)
                for kind in ("dataset", "defense")
                for settings, text in self._stated(kind).items()
            }
            found = []
            for kind in ("dataset", "model", "defense", "attack"):
                pairs = [(row[kind], json.dumps(setting[kind], sort_keys=True)) for row, setting in zip(rows, settings)]
                for (spec, text), variant in _variants(dict.fromkeys(pairs)).items():
                    own = json.loads(text)
                    options = {name: value for name, value in own.items() if name not in ("name", "version")}
                    checkpoint = checkpoints.get(text) if kind == "model" else None
                    statement = statements.get((kind, text))
                    label, version = _labelled(spec, variant), int(own["version"])
                    found.append(StoredComponent(kind, label, version, options, checkpoint, statement, variant))
        return found

    def absorb(self, other: Store) -> int:
        """Add what another run file holds, all or nothing, and return how many results were added.

        A trial that has a result keeps it, unless it is an error and the other one is none. Sessions that are the same
        in both are kept once, and what the cells, metrics and files mean stays as it is here.
        """
        with decoding(other.path), self._transaction():
            sessions = {row["id"]: self._absorb_session(row) for row in other.query("SELECT * FROM sessions")}
            cells = {row["id"]: self._absorb_cell(row) for row in other.query("SELECT * FROM cells ORDER BY id")}
            trials = other.query("SELECT * FROM trials ORDER BY position, rowid")
            self._db.executemany(
                "INSERT INTO trials (id, position, cell_id, image, seed) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO NOTHING",
                ((row["id"], row["position"], cells[row["cell_id"]], row["image"], row["seed"]) for row in trials),
            )
            for row in other.query("SELECT * FROM metrics ORDER BY position"):
                self._db.execute(
                    "INSERT INTO metrics SELECT ?, coalesce(max(position) + 1, 0), ?, ?, ? FROM metrics WHERE true"
                    " ON CONFLICT (name) DO NOTHING",
                    (row["name"], row["higher_is_better"], row["convention"], row["note"]),
                )
            self._db.executemany(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO NOTHING",
                (tuple(row) for row in other.query("SELECT key, value FROM meta WHERE key LIKE '%/%'")),
            )
            self._absorb_planned(other)
            return self._absorb_results(other, sessions)

    def _absorb_session(self, row: sqlite3.Row) -> int:
        columns = [name for name in row.keys() if name not in ("id", "ended")]  # noqa: SIM118
        same = " AND ".join(f"{name} IS ?" for name in columns)
        values = [row[name] for name in columns]
        known = self._db.execute(f"SELECT id FROM sessions WHERE {same}", values).fetchone()
        if known is None:
            places = ", ".join("?" for _ in columns)
            known_id = self._db.execute(
                f"INSERT INTO sessions ({', '.join(columns)}) VALUES ({places})", values
            ).lastrowid
        else:
            known_id = known["id"]
        self._db.execute("UPDATE sessions SET ended = coalesce(ended, ?) WHERE id = ?", (row["ended"], known_id))
        return int(known_id or 0)

    def _absorb_cell(self, row: sqlite3.Row) -> int:
        columns = [name for name in row.keys() if name != "id"]  # noqa: SIM118
        self._db.execute(
            f"INSERT INTO cells ({', '.join(columns)}) VALUES ({', '.join('?' for _ in columns)})"
            " ON CONFLICT (settings) DO UPDATE SET chunk = coalesce(chunk, excluded.chunk)",
            [row[name] for name in columns],
        )
        return int(self._db.execute("SELECT id FROM cells WHERE settings = ?", (row["settings"],)).fetchone()["id"])

    def _absorb_planned(self, other: Store) -> None:
        values = [int(row["value"]) for row in other.query("SELECT value FROM meta WHERE key = 'planned'")]
        own = self._db.execute("SELECT value FROM meta WHERE key = 'planned'").fetchone()
        values += [] if own is None else [int(own["value"])]
        if values:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('planned', ?)", (str(max(values)),))

    def _absorb_results(self, other: Store, sessions: Mapping[int, int]) -> int:
        own = {row["trial_id"]: row["status"] for row in self._db.execute("SELECT trial_id, status FROM results")}
        offered = other.query("SELECT * FROM results")
        wanted = {
            row["trial_id"]: row
            for row in offered
            if own.get(row["trial_id"]) is None or (own[row["trial_id"]] == "error" and row["status"] != "error")
        }
        if not wanted:
            return 0
        for table in ("scores", "findings", "images", "results"):
            self._db.executemany(f"DELETE FROM {table} WHERE trial_id = ?", ((trial,) for trial in wanted))
        truths = {row["truth"] for row in wanted.values()}
        self._db.executemany(
            "INSERT INTO truths VALUES (?, ?) ON CONFLICT (digest) DO NOTHING",
            (tuple(row) for row in other.each("SELECT digest, png FROM truths") if row["digest"] in truths),
        )
        columns = [name for name in offered[0].keys() if name != "session_id"]  # noqa: SIM118
        self._db.executemany(
            f"INSERT INTO results ({', '.join(columns)}, session_id) VALUES ({', '.join('?' for _ in columns)}, ?)",
            ([*(row[name] for name in columns), sessions[row["session_id"]]] for row in wanted.values()),
        )
        for table, names in (
            ("scores", ("trial_id", "metric", "value")),
            ("findings", ("trial_id", "name", "value")),
            ("images", ("trial_id", "png")),
        ):
            rows = other.each(f"SELECT {', '.join(names)} FROM {table}")
            self._db.executemany(
                f"INSERT INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' for _ in names)})",
                (tuple(row) for row in rows if row["trial_id"] in wanted),
            )
        return len(wanted)

    def write(self, results: Sequence[Result], session: int) -> None:
        """Write a chunk of results, all or none; a result of a trial that has one already replaces it."""
        with self._transaction():
            self._insert_trials([result.trial for result in results])
            for result in results:
                self._write(result, session)

    def results(self, planned: pd.DataFrame | None = None) -> pd.DataFrame:
        """Return one row per trial that has a result: ``BEFORE``, every recorded metric, ``AFTER``.

        Rows are in order of dataset, model, threat, defense and attack (each by its first planning), seed, image. A
        metric that was not computed is NaN. Where one spec stands for components of different settings (a version was
        raised, or a default changed, between two sessions), the version or a hash of the settings is added to it.

        Args:
            planned: what ``trials`` has returned, for who has asked already.
        """
        planned = self.trials() if planned is None else planned
        ranks = {f"{name} rank": pd.factorize(planned[name])[0] for name in _SPECS}
        ended = planned.assign(**ranks)[planned["status"] != ""]
        return ended.sort_values([*ranks, "seed", "image", "trial"], ignore_index=True)[list(planned.columns)]

    def trials(self) -> pd.DataFrame:
        """Return one row per planned trial in the order of planning, with the columns of ``results``.

        A trial without a result has an empty ``status``: it was not run yet, or need not be (``Matrix.threshold``).
        """
        rows = self.query(
            "SELECT trials.id AS trial, image, seed, coalesce(status, '') AS status, seconds, coalesce(reason, '') AS"
            " reason, objective, evaluations, floor, coalesce(path, '') AS path, cell_id FROM trials"
            " JOIN cells ON cells.id = cell_id LEFT JOIN results ON trials.id = trial_id"
            " ORDER BY position, trials.rowid"
        )
        scores = self.query("SELECT trial_id, metric, value FROM scores")
        with decoding(self.path):
            names = [metric.name for metric in self.metrics()]
            own = [column for column in (*BEFORE, *AFTER) if column not in _SPECS]
            planned = {column: [row[column] for row in rows] for column in own}
            cells = self._cells()
            for name in _SPECS:
                texts = [json.dumps(json.loads(cell["settings"])[name], sort_keys=True) for cell in cells]
                pairs = [(cell[name], text) for cell, text in zip(cells, texts)]
                variants = _variants(dict.fromkeys(pairs))
                by_cell = {cell["id"]: _labelled(pair[0], variants[pair]) for cell, pair in zip(cells, pairs)}
                planned[name] = [by_cell[row["cell_id"]] for row in rows]
            frame = pd.DataFrame(planned).astype(
                dict.fromkeys(("trial", *_SPECS, "status", "reason", "path"), "str")
                | dict.fromkeys(("image", "seed"), "int64")
                | {"seconds": "float64", "objective": "float64", "evaluations": "Int64", "floor": "bool"}
            )
            values = pd.DataFrame([tuple(row) for row in scores], columns=["trial", "metric", "value"])
            wide = values.pivot(index="trial", columns="metric", values="value").reindex(
                index=frame["trial"], columns=names
            )
            for name in names:
                frame[name] = wide[name].to_numpy(dtype="float64")
        return frame[[*BEFORE, *names, *AFTER]]

    def records(self) -> dict[str, TrialRecord]:
        """Return what identifies every planned trial, by its id in the order of planning."""
        rows = self.query(
            "SELECT trials.id, settings, threat_words, label, session_id, coalesce(finished, '') AS finished,"
            " dataset, model, threat, defense, attack FROM trials JOIN cells ON cells.id = cell_id"
            " LEFT JOIN results ON trials.id = trial_id ORDER BY position"
        )
        return {
            row["id"]: TrialRecord(
                cell=row["settings"],
                threat=row["threat_words"],
                label=row["label"],
                session=row["session_id"],
                finished=row["finished"],
                specs={axis: row[axis] for axis in _SPECS},
            )
            for row in rows
        }

    def findings(self) -> pd.DataFrame:
        """Return what attacks found beside images and labels: ``trial``, ``name`` and ``value``, one row each."""
        rows = self.query("SELECT trial_id, name, value FROM findings ORDER BY trial_id, name")
        return pd.DataFrame([tuple(row) for row in rows], columns=["trial", "name", "value"])

    def images(self, trials: Iterable[str]) -> dict[str, Pictures]:
        """Return the PNGs of these trials by id; trials without a result are left out."""
        pictures: dict[str, Pictures] = {}
        truths: dict[str, bytes] = {}
        for trial in trials:
            rows = self.query(
                "SELECT truth, images.png FROM results LEFT JOIN images USING (trial_id) WHERE trial_id = ?", (trial,)
            )
            for digest, png in rows:
                if digest not in truths:
                    found = self.query("SELECT png FROM truths WHERE digest = ?", (digest,))
                    if not found:
                        raise ForeignRun(f"{self.path} lacks the private image of trial {trial}; start the run anew")
                    truths[digest] = found[0]["png"]
                pictures[trial] = Pictures(truths[digest], png)
        return pictures

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return by trial the objective at some evaluations of its search; trials without are left out."""
        rows = self.query("SELECT trial_id, curve FROM results WHERE curve IS NOT NULL")
        with decoding(self.path):
            return {row["trial_id"]: decoded(row["curve"]) for row in rows}

    def _stated(self, kind: str) -> dict[str, str]:
        """Return what was recorded of components of a kind, by their settings (JSON)."""
        rows = self.query("SELECT key, value FROM meta WHERE key LIKE ?", (f"{kind}/%",))
        return {row["key"].partition("/")[2]: row["value"] for row in rows}

    def query(self, query: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """Return the rows of a query in SQL; the tables are described above."""
        with _one_line_errors(self.path):
            return self._db.execute(query, values).fetchall()

    def each(self, query: str) -> Iterator[sqlite3.Row]:
        """Yield the rows of a query in SQL that are too many, or too large, to hold."""
        with _one_line_errors(self.path):
            yield from self._db.execute(query)

    def _configure(self) -> None:
        with _one_line_errors(self.path):
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA foreign_keys = ON")
            if not self.readonly:
                self._db.execute("PRAGMA journal_mode = WAL").fetchone()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that is executed inside is written, or nothing."""
        with _one_line_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _cells(self) -> list[sqlite3.Row]:
        """Return every cell of which a trial was planned, in the order of planning."""
        return self.query(
            "SELECT cells.* FROM cells JOIN (SELECT cell_id, min(position) AS first, min(rowid) AS row FROM trials"
            " GROUP BY cell_id) ON cells.id = cell_id ORDER BY first, row"
        )

    def _insert_trials(self, trials: Sequence[Trial], among: Sequence[Trial] | None = None) -> None:
        known = self._db.execute("SELECT value FROM meta WHERE key = 'planned'").fetchone()
        largest = self._db.execute("SELECT coalesce(max(position) + 1, 0) FROM trials").fetchone()[0]
        with decoding(self.path):
            begin = max(largest, int(known["value"]) if known else 0)
        among = trials if among is None else among
        order = {trial.id: begin + place for place, trial in enumerate(among)}
        cells: dict[str, int] = {}
        added = 0
        for trial in trials:
            if trial.cell.key not in cells:
                cells[trial.cell.key] = self._insert_cell(trial.cell)
            added += self._db.execute(
                "INSERT INTO trials (id, position, cell_id, image, seed) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (id) DO NOTHING",
                (trial.id, order[trial.id], cells[trial.cell.key], trial.image, trial.seed),
            ).rowcount
        if added:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('planned', ?)", (str(begin + len(among)),))

    def _insert_cell(self, cell: Cell) -> int:
        """Return the number of a cell, which it gets where it has none."""
        specs = cell.specs
        self._db.execute(
            "INSERT INTO cells (settings, dataset, model, defense, attack, threat, threat_words, floor)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (settings) DO NOTHING",
            (
                cell.key,
                _text(specs["dataset"]),
                _text(specs["model"]),
                _text(specs["defense"]),
                _text(specs["attack"]),
                _text(specs["threat"]),
                _text(cell.threat.describe()),
                bool(cell.attack.floor),
            ),
        )
        return int(self._db.execute("SELECT id FROM cells WHERE settings = ?", (cell.key,)).fetchone()["id"])

    def _write(self, result: Result, session: int) -> None:
        trial = result.trial.id
        digest = hashlib.sha256(result.truth).hexdigest()
        self._db.execute("INSERT INTO truths VALUES (?, ?) ON CONFLICT (digest) DO NOTHING", (digest, result.truth))
        self._db.execute("DELETE FROM scores WHERE trial_id = ?", (trial,))
        self._db.execute("DELETE FROM images WHERE trial_id = ?", (trial,))
        self._db.execute("DELETE FROM findings WHERE trial_id = ?", (trial,))
        self._db.execute(
            "INSERT OR REPLACE INTO results (trial_id, status, reason, seconds, label, objective, evaluations, path,"
            " truth, session_id, finished, curve) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                trial,
                result.status,
                _text(result.reason),
                float(result.seconds),
                int(result.label),
                None if result.objective is None else float(result.objective),
                None if result.evaluations is None else int(result.evaluations),
                _text(result.path),
                digest,
                session,
                _now(),
                result.curve or None,
            ),
        )
        scores = [(trial, name, float(value)) for name, value in result.scores.items() if not math.isnan(value)]
        known = {row["name"] for row in self._db.execute("SELECT name FROM metrics")}
        for _, name, _ in scores:
            if name not in known:
                raise LeakbenchError(
                    f"{self.path}: the scores hold {name!r}, which is no metric of this run; record the metric first"
                )
        self._db.executemany("INSERT INTO scores VALUES (?, ?, ?)", scores)
        found = [(trial, name, float(value)) for name, value in result.findings.items()]
        self._db.executemany("INSERT INTO findings VALUES (?, ?, ?)", found)
        if result.reconstruction is not None:
            self._db.execute("INSERT INTO images VALUES (?, ?)", (trial, result.reconstruction))


_PACKAGES = TypeAdapter(dict[str, str])
_CHECKPOINT = TypeAdapter(Checkpoint)
_STATEMENT = TypeAdapter(Statement)


def _variants(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return (spec, settings) -> what sets it apart from others of its spec: a version, or a hash; empty if alone."""
    by_spec: dict[str, list[str]] = {}
    for spec, settings in pairs:
        by_spec.setdefault(spec, []).append(settings)
    found = {}
    for spec, group in by_spec.items():
        versions = [json.loads(settings).get("version") for settings in group]
        for settings, version in zip(group, versions):
            digest = hashlib.sha256(settings.encode()).hexdigest()[:6]
            apart = f"version {version}" if versions.count(version) == 1 else f"settings {digest}"
            found[spec, settings] = "" if len(group) == 1 else apart
    return found


def _labelled(spec: str, variant: str) -> str:
    """Return the name of a spec in the results, which no other component of the run has."""
    return f"{spec} [{variant}]" if variant else spec


def _text(value: str) -> str:
    """Return the text with what UTF-8 cannot hold (lone surrogates) replaced."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
