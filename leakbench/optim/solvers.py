"""Steps of the solvers in compiled code (``solvers.cpp``), where there is a compiler."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from leakbench.core.compiled import call_on_rows, compiled_for

SOURCE = Path(__file__).with_name("solvers.cpp")


def serves(x: Tensor, pairs: int = 0) -> bool:
    """Return whether there is compiled code for rows like x, and for this many pairs of L-BFGS."""
    found = compiled_for(SOURCE, x)
    return found is not None and pairs <= int(found.functions.max_pairs())


def all_finite(value: Tensor, gradient: Mapping[str, Tensor]) -> Tensor:
    """Return ``rows_finite`` of ``leakbench.optim.base``."""
    flags = torch.ones(len(value), dtype=torch.bool)
    for x in (value, *gradient.values()):
        call("finite", (x.contiguous(), flags), (x[0].numel(),), len(x))
    return flags


def call(name: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...], rows: int) -> None:
    """Call a function of ``solvers.cpp``; see ``call_on_rows``."""
    call_on_rows(SOURCE, name, tensors, sizes, rows)
