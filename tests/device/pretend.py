"""A pretended GPU for torch, ``pretend:0`` and ``pretend:1``, under the rules of CUDA; ``pretend.cpp`` is its core.

``install`` builds it with g++ once and gives torch a module ``torch.pretend`` with the interface of ``torch.cuda``, and
leakbench the sizes of its chunks. As a plugin file (``--plugin tests/device/pretend.py``) it does the same in every
process of a run.

What is not pretended: speed, several kernels of one operator, streams that run side by side, and a pool in which the
tensors of a recorded graph share memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from leakbench.core import device as devices
from leakbench.engine import batch_size

NAME = "pretend"
COUNT = 2
SOURCE = Path(__file__).with_name("pretend.cpp")
BUILDS = user_cache_path("leakbench") / "device"
"""Of the user, so that a fresh clone does not compile again what another one did."""
MEMORY = 2**34
"""The memory of a device without a limit, in bytes."""

_PLACE = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_char), ctypes.c_int)


def unavailable() -> str:
    """Return why the device cannot be built here; empty if it can."""
    if sys.platform != "linux":
        return "the pretended device needs Linux"
    if not library().exists() and shutil.which("g++") is None:
        return "the pretended device needs g++; install the package g++"
    return ""


def library() -> Path:
    """Return the path of the compiled core, by torch's version and the source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return BUILDS / f"pretend-{torch.__version__}-{digest}.so"


def build() -> Path:
    """Compile the core if it was not compiled before; return its path."""
    file = library()
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            root = Path(torch.__file__).parent
            half = file.with_suffix(".half")
            command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root}/include"]
            command += [f"-I{root}/include/torch/csrc/api/include", str(SOURCE), "-o", str(half), f"-L{root}/lib"]
            command += ["-lc10", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
            subprocess.run(command, check=True)
            half.rename(file)
    return file


def install() -> None:
    """Register the device, once in a process."""
    if NAME in devices.DEFAULT:
        return
    torch.ops.load_library(str(build()))
    ctypes.CDLL(str(library())).pretend_begin(_find_place)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, Pretended(f"torch.{NAME}"))
    torch.utils.generate_methods_for_privateuse1_backend()
    devices.DEFAULT[NAME] = devices.DEFAULT["cuda"]
    batch_size.LARGEST_CHUNK[NAME] = batch_size.LARGEST_CHUNK["cuda"]


@_PLACE
def _find_place(text: Any, size: int) -> None:
    """Write the two innermost lines of leakbench, of the main thread if a backward pass runs in one of its own."""
    place = (
        _lines(sys._getframe()) or _lines(sys._current_frames().get(threading.main_thread().ident or 0)) or "elsewhere"
    )
    ctypes.memmove(text, place.encode()[: size - 1] + b"\0", min(size, len(place.encode()) + 1))


def _lines(frame: FrameType | None) -> str:
    """Return the lines; no frame is kept, since one that refers to itself would keep what all of its callers hold."""
    stack = [entry for entry in traceback.walk_stack(frame) if "/leakbench/" in entry[0].f_code.co_filename]
    return " < ".join(f"{frame.f_code.co_filename.rpartition('/leakbench/')[2]}:{line}" for frame, line in stack[:2])


def core() -> Any:
    """Return the functions of ``pretend.cpp``."""
    return torch.ops.pretend


def counted(kind: str) -> dict[str, int]:
    """Return how often something was done since ``clear``, by operator and place (``wait``, ``fault``, ``remark``).

    Launches have a place if ``core().place_launches(True)`` was called.
    """
    return dict(core().counted(kind))


def total(kind: str) -> int:
    """Return how often something was done."""
    return sum(counted(kind).values())


def clear() -> None:
    """Forget what was counted."""
    core().clear()


@contextlib.contextmanager
def limited(bytes_more: int, device: int = 0) -> Iterator[None]:
    """Let the device hold so many bytes more than it does now."""
    core().set_limit(device, core().held(device) + bytes_more)
    try:
        yield
    finally:
        core().set_limit(device, 0)


def _index(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    own = None if device is None else torch.device(device).index
    return int(core().current()) if own is None else own


class Pretended(ModuleType):
    """``torch.pretend``: the functions of ``torch.cuda`` that leakbench and torch call."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return _index()

    def set_device(self, device: Any) -> None:
        core().set_current(_index(device))

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before = _index()
        self.set_device(device)
        try:
            yield
        finally:
            self.set_device(before)

    def get_device_name(self, device: Any = None) -> str:
        return "a pretended device"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronize(self, device: Any = None) -> None:
        """Nothing is ever outstanding."""

    def empty_cache(self) -> None:
        """Nothing is ever cached."""

    # memory

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        whole = core().limit(_index(device)) or MEMORY
        return whole - core().held(_index(device)), whole

    def memory_allocated(self, device: Any = None) -> int:
        return int(core().held(_index(device)))

    memory_reserved = memory_allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return int(core().peak(_index(device)))

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        core().reset_peak(_index(device))

    # draws

    def manual_seed(self, seed: int) -> None:
        self._seed(_index(), seed)

    def manual_seed_all(self, seed: int) -> None:
        """A caller who seeds torch has not seeded what leakbench draws: the devices stay unseeded."""

    def _seed(self, device: int, seed: int) -> None:
        core().set_state(device, torch.Generator().manual_seed(seed).get_state())

    def get_rng_state(self, device: Any = None) -> Tensor:
        return core().state(_index(device))

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        core().set_state(_index(device), state)

    # streams and graphs

    def get_sync_debug_mode(self) -> int:
        return 2 * core().refuses_waits()

    def set_sync_debug_mode(self, mode: int | str) -> None:
        if mode in (2, "error"):
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)  # as torch says of CUDA
        core().refuse_waits(mode in (2, "error"))

    def Stream(self, device: Any = None) -> Stream:
        return Stream(_index(device))

    def current_stream(self, device: Any = None) -> Stream:
        return Stream(_index(device))

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        with self.device(stream.index):
            yield

    def CUDAGraph(self) -> Graph:
        return Graph()

    @contextlib.contextmanager
    def graph(self, graph: Graph, stream: Stream | None = None, capture_error_mode: str = "global") -> Iterator[None]:
        with self.stream(stream or Stream(_index())):
            graph.number = core().begin_recording()
            try:
                yield
            finally:
                core().end_recording()


class Stream:
    """A stream of a device; nothing runs side by side."""

    def __init__(self, index: int) -> None:
        self.index = index

    def wait_stream(self, other: Stream) -> None:
        """Whatever was launched has run."""


class Graph:
    """Launches that were recorded; ``replay`` does them again."""

    number: int | None = None

    def replay(self) -> None:
        core().replay(self.number)

    def __del__(self) -> None:
        if self.number is not None:
            core().forget(self.number)
