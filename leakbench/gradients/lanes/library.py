"""The compiled kernels, if there is a compiler."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from leakbench.core.compiled import SUFFIXES, Absent, checked, compiled

SOURCE = Path(__file__).with_name("kernels.cpp")


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
        self.run(name, tensors[0].dtype, *pointers, *map(ctypes.c_int64, sizes))

    def run(self, name: str, dtype: torch.dtype, *arguments: object, lanes: int | None = None) -> None:
        """Call a function for numbers of this type in torch's threads; other Python threads run meanwhile.

        Args:
            name: of the function, without its type.
            dtype: the type.
            arguments: all but the number of threads.
            lanes: how many trials share a register (``lanes``); None: as many as the largest one takes.

        Raises:
            MemoryError: there is not enough memory for what the function keeps meanwhile.
        """
        wide = lanes is None or lanes * dtype.itemsize == self.vector_bytes
        function = getattr(self.wide if wide else self.narrow, f"{name}_{SUFFIXES[dtype]}")
        checked(function(*arguments, ctypes.c_int64(torch.get_num_threads())))


def kernels() -> Kernels | None:
    """Return the kernels; None if they are switched off, or cannot be built or loaded."""
    found = found_or_reason()
    return found if isinstance(found, Kernels) else None


def found_or_reason() -> Kernels | Absent:
    """Return the kernels, or why there are none."""
    wide = compiled(SOURCE)
    return wide if isinstance(wide, Absent) else _both(wide.functions, wide.compiler)


@cache
def _both(wide: ctypes.CDLL, compiler: str) -> Kernels | Absent:
    size = int(wide.lanes_bytes())
    narrow = compiled(SOURCE, f"-DLANE_BYTES={size // 2}")
    if isinstance(narrow, Absent):
        return narrow
    return Kernels(wide, narrow.functions, size, f"registers of {size} bytes, built by {compiler}")
