"""Gradient-free search of many trials at once, each with an optimiser of its own from nevergrad."""

import importlib
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leakbench.core.device import empty_cache, out_of_memory
from leakbench.core.loss_curve import Curve, marks
from leakbench.core.rng import Rng
from leakbench.errors import BadOption
from leakbench.optim.base import Objective, Solution, Unknowns, joined

NON_FINITE_COST = 1e20
"""Cost reported to the optimiser for a non-finite candidate, and the largest one reported for any."""


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Restore the global random states of Python and numpy afterwards: importing nevergrad draws from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state is what is saved)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def nevergrad() -> Any:
    """Return the package nevergrad, imported on first use, which takes seconds."""
    with _own_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("nevergrad")


def check_optimiser(name: str) -> None:
    """Raise BadOption, with a suggestion, if nevergrad has no optimiser of this name."""
    known = nevergrad().optimizers.registry
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "known are, among others, CMA, DE, TBPSA, PSO and OnePlusOne"
        raise BadOption(f"nevergrad has no optimizer {name!r}; {hint}")


def evolve(
    objective: Objective,
    start: Unknowns,
    rng: Rng,
    *,
    optimizer: str = "CMA",
    budget: int,
    popsize: int = 50,
    batch: int | None = None,
) -> Solution:
    """Optimise each trial by its own optimiser, in rounds: ask for ``popsize`` candidates, and report their costs.

    The candidates of all trials are evaluated together, in pieces of up to ``batch``; a piece that does not fit into
    memory is halved. The candidates of a trial depend only on its own seed and objective.

    Args:
        objective: the per-trial objective; it is evaluated under ``no_grad``.
        start: name -> [T, *shape], the starting point.
        rng: seeds the optimisers.
        optimizer: the name of one of nevergrad's optimisers.
        budget: evaluations of each trial's objective; the last round gets the rest of it.
        popsize: candidates a round.
        batch: the most candidates evaluated at a time, all trials together; None for no limit.

    Returns:
        The candidate of each trial with the smallest objective; a trial is finite if any candidate's objective was.
    """
    origin, unpack = joined(start)
    trials = len(origin)
    places = marks(budget, popsize)
    seen: list[Tensor] = []
    evaluate = _Pieces(objective, batch or trials * popsize)

    best = origin.clone()
    value = torch.full((trials,), torch.inf, dtype=origin.dtype, device=origin.device)
    with _own_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nevergrad and cma warn of their own internals
        searches = [
            _optimiser(optimizer, row.double().cpu().numpy(), budget, generator.initial_seed())
            for row, generator in zip(origin, rng.generators("evolve"))
        ]
        done = 0
        while done < budget:
            count = min(popsize, budget - done)
            asked = [[search.ask() for _ in range(count)] for search in searches]
            points = np.array([[candidate.value for candidate in row] for row in asked])
            flat = torch.from_numpy(points).to(origin).flatten(0, 1)
            rows = [trial for trial in range(trials) for _ in range(count)]
            numbers = [done + number for _ in range(trials) for number in range(count)]
            costs = evaluate(unpack(flat), rows, numbers).view(trials, count)
            reported = (
                torch.nan_to_num(costs.double(), nan=NON_FINITE_COST, posinf=NON_FINITE_COST, neginf=NON_FINITE_COST)
                .clamp(max=NON_FINITE_COST)
                .cpu()
            )
            for search, candidates, losses in zip(searches, asked, reported.tolist()):
                for candidate, loss in zip(candidates, losses):
                    search.tell(candidate, loss)
            lowest, place = torch.where(torch.isfinite(costs), costs, torch.inf).min(1)
            candidates_flat = flat.view(trials, count, -1)[torch.arange(trials, device=place.device), place]
            better = lowest < value
            best = torch.where(better[:, None], candidates_flat, best)
            value = torch.where(better, lowest, value)
            done += count
            if done in places:
                seen.append(value)
    finite = torch.isfinite(value)
    evaluations = torch.full((trials,), budget, dtype=torch.int64, device=origin.device)
    curve = Curve(budget, popsize, torch.stack(seen, 1))
    return Solution(unpack(best), torch.where(finite, value, torch.nan), finite, evaluations, curve)


class _Pieces:
    """The objective of candidates, evaluated in pieces that fit into memory; a size that failed is not tried again."""

    def __init__(self, objective: Objective, size: int) -> None:
        self.objective = objective
        self.size = size

    @torch.no_grad()
    def __call__(self, unknowns: Unknowns, rows: list[int], numbers: list[int]) -> Tensor:
        """Return [N], the objective of each candidate for its own trial ``rows[n]``."""
        values: list[Tensor] = []
        begin = 0
        while begin < len(rows):
            part = slice(begin, min(begin + self.size, len(rows)))
            try:
                own = {name: tensor[part] for name, tensor in unknowns.items()}
                values.append(self.objective.select(rows[part])(own, numbers[part]))
            except Exception as error:
                if not out_of_memory(error) or self.size == 1:
                    raise
                self.size = max(1, min(self.size, len(rows[part])) // 2)
                empty_cache(next(iter(unknowns.values())).device)
                continue
            begin = part.stop
        return torch.cat(values)


def _optimiser(name: str, start: np.ndarray[Any, np.dtype[np.float64]], budget: int, seed: int) -> Any:
    """Return an optimiser of nevergrad over points of the start's shape, with a random state of its own."""
    package = nevergrad()
    parametrization = package.p.Array(init=start)
    parametrization.random_state = np.random.RandomState(seed % 2**32)
    return package.optimizers.registry[name](parametrization=parametrization, budget=budget)
