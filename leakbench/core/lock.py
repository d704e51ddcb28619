"""A lock, so that only one process works in a folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leakbench.errors import LeakbenchError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder that exists until the end of this process at the latest, however it ends.

    Raises:
        LeakbenchError: another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LeakbenchError(
                f"{folder} is being run by another process; wait for it, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
