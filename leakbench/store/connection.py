"""Opening an SQLite file that may be old, foreign, damaged or hostile, and its errors in one line."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

from leakbench.errors import ForeignRun, LeakbenchError, one_line
from leakbench.store import schema


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turn what a file's own words make the readers raise into the one line that says what to do."""
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        cause = one_line(f"{type(error).__name__}: {error}")
        raise ForeignRun(
            f"{path} holds words of another form than leakbench writes ({cause}); start the run anew"
        ) from (error)


def _migrated(path: Path, db: sqlite3.Connection, readonly: bool) -> sqlite3.Connection:
    """Return a database of an older schema as one of this: the file itself, or where it is only read a copy of it."""
    with _one_line_errors(path):
        if readonly:
            copy = sqlite3.connect(":memory:", isolation_level=None)
            db.backup(copy)
            db.close()
            db = copy
        try:
            schema.migrate(db)
        except (KeyError, ValueError) as error:
            raise ForeignRun(f"{path} is damaged: {error!r}; restore a copy or start the run anew") from error
    return db


_NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")
"""How a journal ends that belongs to several files; a run is one file."""


def _tail(file: Path, size: int) -> bytes:
    """Return the last bytes of a file; nothing where there is none."""
    if not file.is_file():
        return b""
    with file.open("rb") as opened:
        opened.seek(-min(size, file.stat().st_size), os.SEEK_END)
        return opened.read()


def _check_file(path: Path) -> None:
    """Raise ForeignRun where the path is not a file that could be a database."""
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
        raise ForeignRun(f"{path} is empty: the run was killed before it began; remove the file and start anew")
    if tail == _NAMES_ANOTHER:
        raise ForeignRun(f"the journal of {path} names another file, which SQLite would delete; remove the journal")
    if head != b"SQLite format 3\0":
        raise ForeignRun(f"{path} is not an SQLite file; give the path of a run file")


def _connect(path: Path, readonly: bool) -> sqlite3.Connection:
    """Open a database; one in a folder that cannot be written is opened without a write-ahead log."""
    uri = path.resolve().as_uri()
    if not readonly:
        with _one_line_errors(path):
            return sqlite3.connect(f"{uri}?mode=rw", uri=True, timeout=30, isolation_level=None)
    log, journal = (path.with_name(f"{path.name}-{what}") for what in ("wal", "journal"))
    if journal.exists() and journal.stat().st_size:  # a migration was killed: who may write undoes its half
        with _one_line_errors(path), contextlib.closing(sqlite3.connect(f"{uri}?mode=rw", uri=True)) as db:
            db.execute("PRAGMA schema_version").fetchone()
    with _one_line_errors(path):
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
    sqlite3.SQLITE_BUSY: (LeakbenchError, "another process writes to it; wait for that one to end"),
    sqlite3.SQLITE_LOCKED: (LeakbenchError, "another process writes to it; wait for that one to end"),
    sqlite3.SQLITE_CANTOPEN: (ForeignRun, "check the path and the permissions of the file and of its folder"),
    sqlite3.SQLITE_PERM: (ForeignRun, "check the permissions of the file and of its folder"),
    sqlite3.SQLITE_CORRUPT: (ForeignRun, "the file is damaged; restore a copy or start the run anew"),
    sqlite3.SQLITE_NOTADB: (ForeignRun, "it is not an SQLite file, or damaged; give the path of a run file"),
}


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite raises into the one line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        kind, fix = _ERRORS.get((code or 0) & 0xFF, (LeakbenchError, "check that the file is a run file and is whole"))
        raise kind(f"{path}: {error}; {fix}") from error
    except UnicodeDecodeError as error:  # SQLite's own words on a file whose names are not UTF-8
        raise ForeignRun(f"{path}: it holds names that are no text; {_ERRORS[sqlite3.SQLITE_CORRUPT][1]}") from error
    except OverflowError:
        raise LeakbenchError(f"{path}: a whole number has more than 64 bits; choose a smaller seed") from None
