"""The compiled kernels: built once for a user, a processor and a compiler, if there is a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pooch
import torch
from torch import Tensor

from leakbench.core.files import draft
from leakbench.errors import one_line

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("g++", "c++", "clang++")
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
MAX_SECONDS = 300
SWITCH = "LEAKBENCH_KERNELS"
"""The environment variable that switches the kernels off (``off``)."""

SUFFIXES = {torch.float32: "float", torch.float64: "double"}


@dataclass(frozen=True)
class Kernels:
    """The functions of ``kernels.cpp``, built for registers of two sizes.

    Attributes:
        wide: the library for the largest registers, of 64 bytes with AVX-512 and else of 32.
        narrow: that for half of it: few trials fill it, or it gives every thread a block of trials.
        vector_bytes: the size of the largest registers.
        words: what they are, for ``leakbench doctor``.
    """

    wide: ctypes.CDLL
    narrow: ctypes.CDLL
    vector_bytes: int
    words: str

    def lanes(self, dtype: torch.dtype, trials: int, threads: int = 1) -> int:
        """Return how many trials are to share a register."""
        wide = self.vector_bytes // dtype.itemsize
        return wide // 2 if trials <= wide // 2 or -(-trials // wide) < threads else wide

    def call(self, name: str, *tensors: Tensor, sizes: tuple[int, ...]) -> None:
        """Call a function of dense tensors, all of one type, and sizes."""
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        self.run(name, tensors[0].dtype, True, *pointers, *map(ctypes.c_int64, sizes))

    def run(self, name: str, dtype: torch.dtype, wide: bool, *arguments: object) -> None:
        """Call a function for numbers of this type; other Python threads run meanwhile."""
        getattr(self.wide if wide else self.narrow, f"{name}_{SUFFIXES[dtype]}")(*arguments)


@dataclass(frozen=True)
class Absent:
    """Why there are no kernels, so that evaluations take another path."""

    reason: str


def kernels() -> Kernels | None:
    """Return the kernels; None if they are switched off, or cannot be built or loaded."""
    found = found_or_reason()
    return found if isinstance(found, Kernels) else None


def found_or_reason() -> Kernels | Absent:
    """Return the kernels, which the first call of a user builds in some ten seconds, or why there are none."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        return Absent(f"{SWITCH} switches them off")
    return _built()


@cache
def _built() -> Kernels | Absent:
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return Absent(f"no C++ compiler is installed ({', '.join(COMPILERS)})")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        known = (SOURCE.read_bytes(), version.encode(), " ".join(OPTIONS).encode(), _processor().encode())
        digest = hashlib.sha256(b"\0".join(known)).hexdigest()[:16]
        folder = Path(pooch.os_cache("leakbench")) / "kernels"
        wide = _loaded(compiler, folder / f"{digest}.so")
        size = int(wide.lanes_bytes())
        narrow = _loaded(compiler, folder / f"{digest}-{size // 2}.so", f"-DLANE_BYTES={size // 2}")
    except subprocess.CalledProcessError as error:
        return Absent(f"{compiler} cannot build them: {one_line(error.stderr)[:200]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Absent(f"they cannot be built: {one_line(error)}")
    return Kernels(wide, narrow, size, f"registers of {size} bytes, built by {version.splitlines()[0]}")


def _loaded(compiler: str, file: Path, *options: str) -> ctypes.CDLL:
    """Return a library, built if it is not there."""
    if not file.exists():
        with draft(file) as own:
            command = [compiler, *OPTIONS, *options, str(SOURCE), "-o", str(own)]
            subprocess.run(command, capture_output=True, text=True, timeout=MAX_SECONDS, check=True)
    return ctypes.CDLL(str(file))


def _processor() -> str:
    """Return what the code depends on: the processor's kind and its instructions."""
    lines = [platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        lines += [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(lines)
