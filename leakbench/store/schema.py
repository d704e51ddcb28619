"""The tables of the run file, and how a file of an older schema becomes one of this.

A schema is never changed once it was released: a change raises ``SCHEMA`` and adds a migration to ``_MIGRATIONS``. The
tests keep a file of each.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Mapping

from leakbench.plan.trial import cell_key

SCHEMA = 7
APPLICATION_ID = 0x6C6B6268
TABLES = (
    *("meta", "sessions", "cells", "trials", "truths", "results", "metrics", "scores", "findings", "images"),
    *("members", "member_scores"),
)

_CELLS = """
CREATE TABLE cells (
    id INTEGER PRIMARY KEY, settings TEXT NOT NULL UNIQUE, dataset TEXT NOT NULL, model TEXT NOT NULL,
    defense TEXT NOT NULL, attack TEXT NOT NULL, threat TEXT NOT NULL, threat_words TEXT NOT NULL,
    floor INTEGER NOT NULL, chunk INTEGER)"""
_TRIALS = """
CREATE TABLE trials (
    id TEXT PRIMARY KEY, position INTEGER NOT NULL, cell_id INTEGER NOT NULL REFERENCES cells (id),
    image INTEGER NOT NULL, seed INTEGER NOT NULL)"""
_FINDINGS = """
CREATE TABLE findings (
    trial_id TEXT NOT NULL REFERENCES results (trial_id), name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (trial_id, name)) WITHOUT ROWID"""
_BATCHES = (
    "ALTER TABLE trials ADD COLUMN others TEXT NOT NULL DEFAULT ''",
    """
CREATE TABLE members (
    trial_id TEXT NOT NULL REFERENCES results (trial_id), place INTEGER NOT NULL, image INTEGER NOT NULL,
    label INTEGER NOT NULL, truth TEXT NOT NULL REFERENCES truths (digest), png BLOB, aligned BLOB,
    PRIMARY KEY (trial_id, place)) WITHOUT ROWID""",
    """
CREATE TABLE member_scores (
    trial_id TEXT NOT NULL REFERENCES results (trial_id), place INTEGER NOT NULL,
    metric TEXT NOT NULL REFERENCES metrics (name), value REAL NOT NULL,
    PRIMARY KEY (trial_id, place, metric)) WITHOUT ROWID""",
)
_STATEMENTS = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY, version TEXT NOT NULL, commit_id TEXT, dirty INTEGER, packages TEXT NOT NULL,
    python TEXT NOT NULL, device TEXT NOT NULL, threads INTEGER NOT NULL, command TEXT NOT NULL, matrix TEXT NOT NULL,
    started TEXT NOT NULL, ended TEXT, shard TEXT NOT NULL DEFAULT '', workers INTEGER NOT NULL DEFAULT 1,
    salt TEXT NOT NULL DEFAULT '')""",
    _CELLS,
    _TRIALS,
    "CREATE TABLE truths (digest TEXT PRIMARY KEY, png BLOB NOT NULL)",
    """
CREATE TABLE results (
    trial_id TEXT PRIMARY KEY REFERENCES trials (id),
    status TEXT NOT NULL CHECK (status IN ('ok', 'failed', 'unsupported', 'error')), reason TEXT NOT NULL,
    seconds REAL NOT NULL, label INTEGER NOT NULL, objective REAL, evaluations INTEGER, path TEXT NOT NULL,
    truth TEXT NOT NULL REFERENCES truths (digest), session_id INTEGER NOT NULL REFERENCES sessions (id),
    finished TEXT NOT NULL, curve BLOB)""",
    """
CREATE TABLE metrics (
    name TEXT PRIMARY KEY, position INTEGER NOT NULL UNIQUE, higher_is_better INTEGER NOT NULL,
    convention TEXT NOT NULL, note TEXT NOT NULL)""",
    """
CREATE TABLE scores (
    trial_id TEXT NOT NULL REFERENCES results (trial_id), metric TEXT NOT NULL REFERENCES metrics (name),
    value REAL NOT NULL, PRIMARY KEY (trial_id, metric)) WITHOUT ROWID""",
    _FINDINGS,
    "CREATE TABLE images (trial_id TEXT PRIMARY KEY REFERENCES results (trial_id), png BLOB NOT NULL, aligned BLOB)",
    *_BATCHES,
)


def create(db: sqlite3.Connection, about: Mapping[str, str]) -> None:
    """Make the tables in an empty database, inside the caller's transaction; ``about`` goes to ``meta``."""
    for statement in _STATEMENTS:
        db.execute(statement)
    db.executemany("INSERT INTO meta VALUES (?, ?)", {"schema": str(SCHEMA), **about}.items())
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA}")


def flaw(db: sqlite3.Connection) -> str:
    """Return the first flaw of a database of this schema, which may be hostile; empty if there is none.

    Its tables must be tables with the columns of the schema, and every value of the type that its column states:
    SQLite itself holds neither against a file. Nothing may be in it that runs when it is read or written.
    """
    kinds = dict(db.execute("SELECT name, type FROM sqlite_master WHERE type != 'index'").fetchall())
    for name, kind in kinds.items():
        if kind in ("view", "trigger"):
            return f"it holds the {kind} {name!r}, which leakbench never makes"
    with contextlib.closing(sqlite3.connect(":memory:")) as sound:
        create(sound, {})
        for table in TABLES:
            if table not in kinds:
                return f"it has no table {table!r}"
            if db.execute("SELECT 1 FROM pragma_table_xinfo(?) WHERE hidden", (table,)).fetchone():
                return f"its table {table!r} has a computed column, which leakbench never makes"
            columns = _columns(sound, table)
            if _columns(db, table) != columns:
                return f"the columns of its table {table!r} are not those of schema {SCHEMA}"
            wrong = [f"typeof({name}) NOT IN ({_admitted(*column)})" for name, column in columns.items()]
            if db.execute(f"SELECT 1 FROM {table} WHERE {' OR '.join(wrong)} LIMIT 1").fetchone():
                return f"its table {table!r} holds a value of another type than the column's"
    return ""


def _columns(db: sqlite3.Connection, table: str) -> dict[str, tuple[str, bool, bool]]:
    """Return by column: its type, whether it must have a value, and whether it is part of the primary key."""
    return {
        name: (kind, bool(needed), bool(key))
        for _, name, kind, needed, _, key in map(tuple, db.execute(f"PRAGMA table_info({table})"))
    }


def _admitted(kind: str, needed: bool, key: bool) -> str:
    """Return the names that ``typeof`` may give for the values of a column, as SQL."""
    names = [kind.lower()] if needed or key else [kind.lower(), "null"]
    return ", ".join(f"'{name}'" for name in names)


def migrate(db: sqlite3.Connection) -> None:
    """Bring a database of an older schema to this one, all or nothing; one of this schema stays as it is.

    Foreign keys must be off, and no transaction open. Another process may do the same at the same time.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        for schema in range(found, SCHEMA):
            _MIGRATIONS[schema](db)
        db.execute("UPDATE meta SET value = ? WHERE key = 'schema'", (str(SCHEMA),))
        db.execute(f"PRAGMA user_version = {SCHEMA}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _to_2(db: sqlite3.Connection) -> None:
    """What the trials of a cell share is stored once, in ``cells``; sessions know their shard and their workers."""
    db.execute(_CELLS)
    db.execute(_TRIALS.replace("TABLE trials", "TABLE trials_2"))
    names = ("dataset", "model", "defense", "attack", "threat", "threat_words", "floor")
    chunks = {
        str(key).partition("/")[2]: int(value)
        for key, value in db.execute("SELECT key, value FROM meta WHERE key LIKE 'chunk/%'")
    }
    cells: dict[str, int] = {}
    trials = db.execute(f"SELECT id, position, image, seed, settings, {', '.join(names)} FROM trials ORDER BY position")
    for trial, position, image, seed, settings, *words in trials:
        key = cell_key(json.loads(settings))
        if key not in cells:
            cells[key] = len(cells) + 1
            row = (cells[key], key, *words, chunks.get(key))
            db.execute("INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        db.execute("INSERT INTO trials_2 VALUES (?, ?, ?, ?, ?)", (trial, position, cells[key], image, seed))
    db.execute("DELETE FROM meta WHERE key LIKE 'chunk/%'")
    db.execute("DROP TABLE trials")
    db.execute("ALTER TABLE trials_2 RENAME TO trials")
    db.execute("ALTER TABLE sessions ADD COLUMN shard TEXT NOT NULL DEFAULT ''")
    db.execute("ALTER TABLE sessions ADD COLUMN workers INTEGER NOT NULL DEFAULT 1")


def _to_3(db: sqlite3.Connection) -> None:
    """What attacks found beside images and labels is kept."""
    db.execute(_FINDINGS)


def _to_4(db: sqlite3.Connection) -> None:
    """How the objective fell is kept."""
    db.execute("ALTER TABLE results ADD COLUMN curve BLOB")


def _to_5(db: sqlite3.Connection) -> None:
    """Sessions have the salt of the run's keys; those of before have none."""
    db.execute("ALTER TABLE sessions ADD COLUMN salt TEXT NOT NULL DEFAULT ''")


def _to_6(db: sqlite3.Connection) -> None:
    """Reconstructions that eight bits cannot show are kept aligned as well."""
    db.execute("ALTER TABLE images ADD COLUMN aligned BLOB")


def _to_7(db: sqlite3.Connection) -> None:
    """Trials may be of batches, whose images and scores are kept one by one."""
    for statement in _BATCHES:
        db.execute(statement)


_MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {
    1: _to_2,
    2: _to_3,
    3: _to_4,
    4: _to_5,
    5: _to_6,
    6: _to_7,
}
"""Schema -> the function that migrates it to the next one."""
