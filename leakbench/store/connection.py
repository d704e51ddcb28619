"""Creating, opening and writing an SQLite file that may be old, foreign, damaged or hostile; its errors in one line."""

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from leakbench.errors import ForeignRun, LeakbenchError, one_line
from leakbench.store import schema
from leakbench.version import __version__

KEEP = "ON CONFLICT DO NOTHING"
"""For ``insert``: a row that is there already stays as it is."""


def create(path: Path) -> sqlite3.Connection:
    """Return a new, empty run file; folders are made if they are missing.

    Raises:
        LeakbenchError: the file exists already, or cannot be written.
    """
    taken = LeakbenchError(f"{path} exists already; resume it, or choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        exists = path.exists() and (not path.is_file() or path.stat().st_size > 0)
    except OSError as error:
        raise LeakbenchError(f"{path} cannot be written: {error.strerror}; choose another folder") from None
    if exists:
        raise taken
    with sqlite_errors(path):
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        try:
            with transaction(db, path):
                if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise taken
                schema.create(db, {"created_by": f"leakbench {__version__}", "created": now()})
            _configure(db, readonly=False)
        except BaseException:
            db.close()
            raise
    return db


def connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """Return an existing run file that has been checked, of this schema: a copy in memory if an older one is only read.

    Raises:
        ForeignRun: there is no such file, it cannot be read, or leakbench did not write it.
    """
    _check_file(path)
    db = _connection(path, readonly)
    try:
        with sqlite_errors(path):
            db.execute("PRAGMA trusted_schema = OFF")  # no function in a foreign schema is run
            application = db.execute("PRAGMA application_id").fetchone()[0]
            found = db.execute("PRAGMA user_version").fetchone()[0]
        if application != schema.APPLICATION_ID:
            raise ForeignRun(f"{path} is an SQLite file that leakbench did not write; give the path of a run file")
        if found > schema.SCHEMA:
            raise ForeignRun(
                f"{path} has schema {found} and leakbench {__version__} reads up to {schema.SCHEMA}; upgrade leakbench"
            )
        if found < schema.SCHEMA:
            db = _migrated(path, db, readonly)
        with sqlite_errors(path):
            flaw = schema.flaw(db)
            if flaw:
                raise ForeignRun(f"{path}: {flaw}: it is damaged, or leakbench did not write it; start a new run")
            _configure(db, readonly)
    except BaseException:
        db.close()
        raise
    return db


def disconnect(db: sqlite3.Connection, readonly: bool) -> None:
    """Close a run file; if it was written, it is left as one file, without a write-ahead log beside it."""
    if not readonly:
        # if another process reads it, the log stays and is read with the file
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
            db.execute("PRAGMA busy_timeout = 0")
            db.execute("PRAGMA journal_mode = DELETE")
    db.close()


def insert(
    db: sqlite3.Connection, table: str, rows: Iterable[Mapping[str, object] | sqlite3.Row], conflict: str = ""
) -> int:
    """Insert rows of the same columns and return the number of the last one; ``conflict``: an ON CONFLICT clause.

    What UTF-8 cannot hold of a text (lone surrogates) is replaced.
    """
    rest = iter(rows)
    first = next(rest, None)
    if first is None:
        return 0
    columns = list(first.keys())
    stored = ([_storable(row[column]) for column in columns] for row in itertools.chain([first], rest))
    places = ", ".join("?" for _ in columns)
    db.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places}) {conflict}", stored)
    return int(db.execute("SELECT last_insert_rowid()").fetchone()[0])


def _storable(value: object) -> object:
    plain = not isinstance(value, str) or value.isascii()
    return value if plain else str(value).encode("utf-8", "replace").decode("utf-8")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, path: Path) -> Iterator[None]:
    """All that is executed inside is written, or nothing."""
    with sqlite_errors(path):
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def decoding(path: Path, what: str = "value") -> Iterator[None]:
    """Turn what a malformed value in a file raises into one line; ``what`` names it, as ``JSON in column settings``."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise ForeignRun(
            f"{path}: malformed {what} ({type(error).__name__}: {one_line(error)}); restore a copy or start a new run"
        ) from error


def now() -> str:
    """Return the time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _configure(db: sqlite3.Connection, readonly: bool) -> None:
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA foreign_keys = ON")
    if not readonly:
        db.execute("PRAGMA journal_mode = WAL").fetchone()


def _migrated(path: Path, db: sqlite3.Connection, readonly: bool) -> sqlite3.Connection:
    """Return a database of an older schema as one of this: the file itself, or a copy in memory if it is only read."""
    with sqlite_errors(path):
        if readonly:
            copy = sqlite3.connect(":memory:", isolation_level=None)
            db.backup(copy)
            db.close()
            db = copy
        try:
            schema.migrate(db)
        except (KeyError, ValueError) as error:
            raise ForeignRun(f"{path} is damaged: {error!r}; restore a copy or start a new run") from error
    return db


_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")
"""The end of a journal of several files; a run is one file."""


def _tail(file: Path, size: int) -> bytes:
    """Return the last bytes of a file, which may be large; nothing if there is none."""
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        opened.seek(-min(size, file.stat().st_size), os.SEEK_END)
        return opened.read()


def _check_file(path: Path) -> None:
    """Raise ForeignRun if the path is not a file that could be a database."""
    try:
        if not path.exists():
            raise ForeignRun(f"there is no run file {path}; give the folder of a run, or start one")
        if not path.is_file():
            raise ForeignRun(f"{path} is not a file; give the path of a run file")
        with path.open("rb") as file:
            head = file.read(16)
        tail = _tail(path.with_name(f"{path.name}-journal"), len(_NAMES_ANOTHER))
    except OSError as error:
        raise ForeignRun(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None
    if not head:
        raise ForeignRun(f"{path} is empty: the run was killed at its start; remove the file and start again")
    if tail == _NAMES_ANOTHER:
        raise ForeignRun(f"the journal of {path} names another file, which SQLite would delete; remove the journal")
    if head != b"SQLite format 3\0":
        raise ForeignRun(f"{path} is not an SQLite file; give the path of a run file")


def _connection(path: Path, readonly: bool) -> sqlite3.Connection:
    """Open a database; one in a folder that cannot be written is opened without a write-ahead log."""
    uri = path.resolve().as_uri()
    if not readonly:
        with sqlite_errors(path):
            return sqlite3.connect(f"{uri}?mode=rw", uri=True, timeout=30, isolation_level=None)
    log, journal = (path.with_name(f"{path.name}-{what}") for what in ("wal", "journal"))
    if journal.exists() and journal.stat().st_size:  # a killed migration: opening it for writing undoes it
        with sqlite_errors(path), contextlib.closing(sqlite3.connect(f"{uri}?mode=rw", uri=True)) as db:
            db.execute("PRAGMA schema_version").fetchone()
    with sqlite_errors(path):
        db = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=30, isolation_level=None)
        try:
            db.execute("PRAGMA schema_version").fetchone()
        except sqlite3.OperationalError:
            db.close()
            if log.exists() and log.stat().st_size:
                raise
            db = sqlite3.connect(f"{uri}?immutable=1", uri=True, isolation_level=None)
        except sqlite3.DatabaseError:
            db.close()
            raise
    return db


_ERRORS: Mapping[int, tuple[type[LeakbenchError], str]] = {
    sqlite3.SQLITE_FULL: (LeakbenchError, "free space on its disk and resume: everything written before is kept"),
    sqlite3.SQLITE_READONLY: (LeakbenchError, "make the file and its folder writable, or copy the folder"),
    sqlite3.SQLITE_IOERR: (LeakbenchError, "check its disk and resume: everything written before is kept"),
    sqlite3.SQLITE_BUSY: (LeakbenchError, "another process writes to it; wait for it to end"),
    sqlite3.SQLITE_LOCKED: (LeakbenchError, "another process writes to it; wait for it to end"),
    sqlite3.SQLITE_CANTOPEN: (ForeignRun, "check the path and the permissions of the file and of its folder"),
    sqlite3.SQLITE_PERM: (ForeignRun, "check the permissions of the file and of its folder"),
    sqlite3.SQLITE_CORRUPT: (ForeignRun, "the file is damaged; restore a copy or start a new run"),
    sqlite3.SQLITE_NOTADB: (ForeignRun, "it is not an SQLite file, or damaged; give the path of a run file"),
}


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn an error of SQLite into one line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        kind, fix = _ERRORS.get((code or 0) & 0xFF, (LeakbenchError, "check that the file is a run file and is whole"))
        raise kind(f"{path}: {error}; {fix}") from error
    except UnicodeDecodeError as error:  # SQLite raises it for a file whose names are not UTF-8
        raise ForeignRun(f"{path}: it holds names that are not text; {_ERRORS[sqlite3.SQLITE_CORRUPT][1]}") from error
    except OverflowError:
        raise LeakbenchError(f"{path}: a whole number has more than 64 bits; choose a smaller seed") from None
