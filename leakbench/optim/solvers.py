"""Steps of the solvers in compiled code (``solvers.cpp``), where there is a compiler."""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from leakbench.core.compiled import SUFFIXES, Absent, compiled, in_threads

SOURCE = Path(__file__).with_name("solvers.cpp")


def serves(x: Tensor, pairs: int = 0) -> bool:
    """Return whether there is compiled code for rows like x, and for this many pairs of L-BFGS."""
    if x.device.type != "cpu" or x.dtype not in SUFFIXES:
        return False
    found = compiled(SOURCE)
    return not isinstance(found, Absent) and pairs <= int(found.functions.max_pairs())


def all_finite(value: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
    """Return ``rows_finite`` of ``leakbench.optim.base``."""
    flags = torch.ones(len(value), dtype=torch.bool)
    for x in (value, *gradient.values()):
        call("finite", (x.contiguous(), flags), (x[0].numel(),), len(x))
    return flags


def call(name: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], rows: int) -> None:
    """Call a function of contiguous tensors and sizes on rows, which the threads share.

    The first tensor says the type of numbers.
    """
    found = compiled(SOURCE)
    assert not isinstance(found, Absent), "callers ask ``serves``"
    assert all(tensor.is_contiguous() for tensor in tensors)
    function = getattr(found.functions, f"{name}_{SUFFIXES[tensors[0].dtype]}")
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    own = [ctypes.c_int64(size) for size in sizes]
    in_threads(lambda begin, end: function(*pointers, *own, ctypes.c_int64(begin), ctypes.c_int64(end)), rows)
