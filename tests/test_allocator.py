"""The allocator keeps what is freed, and gives it back when asked."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import psutil
import pytest
import torch

from leakbench.core.malloc import keep_freed_memory, release_freed_memory

BUFFER = 2**22  # floats: 16 MiB, of which several are below what is kept

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@glibc
def test_freed_memory_is_kept_until_it_is_released() -> None:
    assert keep_freed_memory()
    release_freed_memory()
    before = resident()
    buffers = [torch.ones(BUFFER) for _ in range(8)]
    size = 4 * BUFFER * len(buffers)
    assert resident() - before > 0.9 * size
    del buffers
    assert resident() - before > 0.5 * size, "kept"
    release_freed_memory()
    assert resident() - before < 0.25 * size, "released"


@glibc
def test_settings_of_ones_own_stand() -> None:
    code = "from leakbench.core.malloc import keep_freed_memory; print(keep_freed_memory())"
    for own, kept in (({}, "True"), ({"MALLOC_TOP_PAD_": "1"}, "False"), ({"GLIBC_TUNABLES": "x"}, "False")):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run([sys.executable, "-c", code], env=clean | own, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == kept
