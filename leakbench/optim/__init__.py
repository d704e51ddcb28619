"""Minimise a per-trial objective over [T, ...] unknowns; no trial's fate touches another's."""

from leakbench.optim.base import Objective, Solution, Unknowns
from leakbench.optim.descend import descend
from leakbench.optim.lbfgs import lbfgs

__all__ = ["Objective", "Solution", "Unknowns", "descend", "lbfgs"]
