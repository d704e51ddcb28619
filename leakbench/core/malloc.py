"""The C library's allocator: let a process keep the memory that it frees, for what it allocates next.

An iteration of an attack allocates and frees the same buffers of megabytes again and again. By default glibc takes each
from the kernel and gives it back, and every page is then faulted in and cleared once an iteration.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
KEPT = 2**30
"""Up to this many freed bytes at the end of the heap are kept."""
PADDING = 2**26
"""By how many bytes more than are needed the heap grows."""
MAPPED = 2**25
"""From this many bytes on, a buffer is the kernel's matter all the same: the largest value that every glibc takes."""


@cache
def keep_freed_memory() -> bool:
    """Have this process keep freed memory, and return whether it will.

    Only glibc can be told so; settings of one's own in the environment (``MALLOC_...``, ``GLIBC_TUNABLES``) stand.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    taken = [
        library.mallopt(name, value)
        for name, value in ((_MMAP_THRESHOLD, MAPPED), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, PADDING))
    ]
    return taken == [1, 1, 1]


def release_freed_memory() -> None:
    """Give freed memory back to the kernel, so that the process is as large as what it holds."""
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)
