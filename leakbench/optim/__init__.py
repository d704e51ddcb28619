"""Minimise a per-trial objective over [T, ...] unknowns; no trial's fate touches another's."""

from leakbench.optim.base import (
    Evaluation,
    Explicit,
    Objective,
    Recordable,
    Solution,
    Unknowns,
    take_rows,
    value_and_gradient,
)
from leakbench.optim.descend import descend
from leakbench.optim.lbfgs import LineSearch, lbfgs

__all__ = [
    "Evaluation",
    "Explicit",
    "LineSearch",
    "Objective",
    "Recordable",
    "Solution",
    "Unknowns",
    "descend",
    "lbfgs",
    "take_rows",
    "value_and_gradient",
]
