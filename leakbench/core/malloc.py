"""The C library's allocator: let a process keep freed memory for its next allocations.

An iteration of an attack allocates and frees the same buffers of megabytes again and again. By default glibc takes each
from the kernel and gives it back, and every page is then faulted in and cleared once an iteration.
"""

import ctypes
import os
import platform
from functools import cache

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
KEPT_BYTES = 2**30
"""Up to this many freed bytes at the end of the heap are kept."""
PADDING_BYTES = 2**26
"""The heap grows by this many bytes more than are needed."""
MAPPED_BYTES = 2**25
"""A buffer of this many bytes or more still comes from the kernel: the largest value that every glibc accepts."""


@cache
def keep_freed_memory() -> bool:
    """Have this process keep freed memory, and return whether it will.

    Only glibc has these settings; those in the environment (``MALLOC_...``, ``GLIBC_TUNABLES``) are respected.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    taken = [
        library.mallopt(name, value)
        for name, value in ((_MMAP_THRESHOLD, MAPPED_BYTES), (_TRIM_THRESHOLD, KEPT_BYTES), (_TOP_PAD, PADDING_BYTES))
    ]
    return taken == [1, 1, 1]


def release_freed_memory() -> None:
    """Give freed memory back to the kernel, so that the process takes no more than it holds."""
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)
