"""Locks on folders: only one process works in one, and a temporary one does not outlive the process that made it."""

import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from leakbench.errors import LeakbenchError


@contextmanager
def alone(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder that exists until the end of this process at the latest, however it ends.

    Args:
        folder: the folder.
        wait: until no other process holds it.

    Raises:
        LeakbenchError: another process holds it, and ``wait`` is not set.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LeakbenchError(
                f"{folder} is being run by another process; wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


PREFIX = ".leakbench-"
"""The beginning of the name of every temporary folder."""
_TEMPORARY = re.compile(re.escape(PREFIX) + r"(attack|check|ray)-[a-z0-9_]{8}")


@contextmanager
def temporary_folder(purpose: Literal["attack", "check", "ray"]) -> Iterator[Path]:
    """Yield a new empty folder of this process, which is deleted at the end.

    If the process is killed before, ``remove_abandoned`` of any later process deletes it.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
        handle = _held(folder, wait=True)
        if folder.exists():  # else another process deleted it before it was held
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_abandoned() -> None:
    """Delete this user's temporary folders whose processes have ended; those of living processes are locked."""
    if sys.platform == "win32":
        return
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and (handle := _held(Path(entry.path))) is not None:
                try:
                    found = os.fstat(handle)
                    if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == stat.S_IRWXU:
                        shutil.rmtree(entry.path, ignore_errors=True)
                finally:
                    os.close(handle)


def _held(folder: Path, *, wait: bool = False) -> int | None:
    """Return a handle that holds a folder; None if it is gone, or another process holds it, or it has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle
