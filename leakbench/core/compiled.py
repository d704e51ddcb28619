"""C++ sources of the package: each built once for a user, a processor and a compiler, if there is a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pooch
import torch
from torch import Tensor

from leakbench.core.files import draft
from leakbench.core.lock import alone
from leakbench.errors import one_line

COMPILERS = ("g++", "c++", "clang++")
OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
HEADER = Path(__file__).with_name("vectors.h")
"""What every source may include."""

MAX_SECONDS = 300
SWITCH = "LEAKBENCH_KERNELS"
"""The environment variable that switches compiled code off (``off``)."""

SHARED_NUMBERS = 2**14
"""Fewer numbers are worked on sooner than another thread begins."""

SUFFIXES = {torch.float32: "float", torch.float64: "double"}
"""The ends of the names of functions for numbers of a type."""


@dataclass(frozen=True)
class Library:
    """A source that was built.

    Attributes:
        functions: what it has.
        compiler: what built it, in words.
    """

    functions: ctypes.CDLL
    compiler: str


@dataclass(frozen=True)
class Absent:
    """Why there is no compiled code, so that torch's operations serve."""

    reason: str


def compiled(source: Path, *options: str) -> Library | Absent:
    """Return the library of a source, which the first call of a user builds in some ten seconds, or why there is none.

    Args:
        source: a C++ file.
        options: further options of the compiler.
    """
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        return Absent(f"{SWITCH} switches them off")
    return _built(source, *options)


@cache
def _built(source: Path, *options: str) -> Library | Absent:
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return Absent(f"no C++ compiler is installed ({', '.join(COMPILERS)})")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        command = [*OPTIONS, f"-I{HEADER.parent}", *options]
        code = source.read_bytes() + HEADER.read_bytes()
        known = (code, version.encode(), " ".join((*OPTIONS, *options)).encode(), _processor().encode())
        digest = hashlib.sha256(b"\0".join(known)).hexdigest()[:16]
        # not in LEAKBENCH_HOME, which the process of an isolated attack is not told, since the true images are there
        folder = Path(pooch.os_cache("leakbench")) / "kernels" / f"{source.stem}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{source.stem}.so"
        with alone(folder, wait=True):  # of workers that start together, one builds it
            if not _is_whole(file):
                with draft(file) as own:
                    _compile([compiler, *command, str(source), "-o", str(own)])
                with draft(_sum(file)) as own:
                    own.write_text(hashlib.sha256(file.read_bytes()).hexdigest(), encoding="utf-8")
        return Library(ctypes.CDLL(str(file)), version.splitlines()[0])
    except subprocess.CalledProcessError as error:
        said = one_line(error.stderr)[:200] or f"it ended with {error.returncode}, and said nothing"  # it was killed
        return Absent(f"{compiler} cannot build them: {said}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Absent(f"they cannot be built: {one_line(error)}")


def _sum(file: Path) -> Path:
    """Return where the SHA-256 of a library is written once it is built."""
    return file.with_suffix(".sha256")


def _is_whole(file: Path) -> bool:
    """Return whether a library was built, and is as it was built; to load a part of one kills the process."""
    try:
        return _sum(file).read_text(encoding="utf-8") == hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _compile(call: Sequence[str]) -> None:
    """Run a compiler, and end it with all that it started if it takes too long or this process is interrupted.

    Raises:
        CalledProcessError: it failed.
        TimeoutExpired: it took longer than ``MAX_SECONDS``.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(call, stdout=pipe, stderr=pipe, text=True, errors="replace", process_group=0) as process:
        try:
            _, said = process.communicate(timeout=MAX_SECONDS)
        except BaseException:
            if sys.platform == "win32":
                process.kill()
            else:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, call, stderr=said)


def _processor() -> str:
    """Return what the code depends on: the processor's kind and its instructions."""
    lines = [platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        lines += [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))]
    return "\n".join(lines)


def compiled_for(source: Path, x: Tensor) -> Library | None:
    """Return the library of a source if there is one, and it serves tensors like x."""
    if x.device.type != "cpu" or x.dtype not in SUFFIXES:
        return None
    found = compiled(source)
    return found if isinstance(found, Library) else None


def call_on_rows(source: Path, name: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], rows: int) -> None:
    """Call a function of contiguous tensors and sizes on rows, which the threads share if there is work for them.

    The first tensor says the type of numbers. Callers ask ``compiled_for``.

    Raises:
        MemoryError: there is not enough memory for what the function keeps meanwhile.
    """
    found = compiled_for(source, tensors[0])
    assert found is not None
    assert all(tensor.is_contiguous() for tensor in tensors)
    function = getattr(found.functions, f"{name}_{SUFFIXES[tensors[0].dtype]}")
    threads = torch.get_num_threads() if tensors[0].numel() >= SHARED_NUMBERS else 1
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    checked(function(*pointers, *(ctypes.c_int64(size) for size in (*sizes, rows, threads))))


def checked(status: int) -> None:
    """Raise the error that the status of a compiled function stands for, if any.

    Raises:
        MemoryError: there was not enough memory.
    """
    if status:
        raise MemoryError("not enough memory for compiled code; take fewer trials at a time")
