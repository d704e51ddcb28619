"""The gradient-free search: each trial by itself, seeded, within its budget, and without touching global randomness."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from conftest import randn
from torch import Tensor

from leakbench.core.rng import Rng
from leakbench.errors import BadOption
from leakbench.optim import Evaluation, Solution, Unknowns
from leakbench.optim.evolve import check_optimiser, evolve

KEYS = ("a", "b", "c")
SEARCH = {"budget": 60, "popsize": 7}


@dataclass(frozen=True)
class Bowl:
    """|x - target|^2 plus |y - target_0|^2 for each trial; notes how it is called."""

    targets: Tensor
    largest: int = 10**9
    calls: list[int] = field(default_factory=list)
    numbers: list[list[int]] = field(default_factory=list)

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not isinstance(evaluation, int)
        x, y = unknowns["x"], unknowns["y"]
        assert x.shape[1:] == (3,)
        assert y.shape[1:] == (2, 1)
        if len(x) > self.largest:
            raise MemoryError
        self.calls.append(len(x))
        self.numbers.append(list(evaluation))
        return (x - self.targets).square().sum(1) + (y.flatten(1) - self.targets[:, :1]).square().sum(1)

    def select(self, rows: Sequence[int]) -> Bowl:
        return replace(self, targets=self.targets[list(rows)])


def bowl(**options: int) -> Bowl:
    return Bowl(randn(3, 3, seed=1).double(), **options)


def start(trials: int = 3) -> Unknowns:
    return {"x": torch.zeros(trials, 3).double(), "y": torch.zeros(trials, 2, 1).double()}


def same(one: Solution, other: Solution) -> None:
    for name in one.unknowns:
        torch.testing.assert_close(one.unknowns[name], other.unknowns[name], rtol=0, atol=0)
    torch.testing.assert_close(one.value, other.value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("optimizer", ["CMA", "DE", "TBPSA"])
def test_each_trial_comes_near_its_own_minimum(optimizer: str) -> None:
    objective = bowl()
    found = evolve(objective, start(), Rng(KEYS), optimizer=optimizer, budget=300, popsize=20)
    begun = objective.targets.square().sum(1) + 2 * objective.targets[:, 0].square()
    assert bool((found.value < 0.3 * begun).all())
    with torch.no_grad():
        value = objective(found.unknowns, [0, 0, 0])
    torch.testing.assert_close(value, found.value)  # the best candidate, not the last one
    assert bool(found.finite.all())


def test_the_budget_is_spent_and_no_more() -> None:
    objective = bowl()
    found = evolve(objective, start(), Rng(KEYS), **SEARCH)
    assert sum(objective.calls) == 3 * 60
    assert objective.calls == [21] * 8 + [12]  # the last round has what is left
    assert found.evaluations.tolist() == [60] * 3
    assert [number for call in objective.numbers for number in call[: len(call) // 3]] == list(range(60))


def test_a_seed_gives_the_same_search_and_another_another() -> None:
    one, again = (evolve(bowl(), start(), Rng(KEYS), **SEARCH) for _ in range(2))
    same(one, again)
    other = evolve(bowl(), start(), Rng(("d", "e", "f")), **SEARCH)
    assert not torch.equal(one.unknowns["x"], other.unknowns["x"])


def test_a_trial_does_not_depend_on_the_others() -> None:
    together = evolve(bowl(), start(), Rng(KEYS), **SEARCH)
    for row, key in enumerate(KEYS):
        alone = evolve(bowl().select([row]), start(1), Rng((key,)), **SEARCH)
        torch.testing.assert_close(alone.unknowns["x"][0], together.unknowns["x"][row], rtol=0, atol=0)


def test_pieces_do_not_change_the_search() -> None:
    whole = evolve(bowl(), start(), Rng(KEYS), **SEARCH)
    capped, cramped = bowl(), bowl(largest=4)
    same(whole, evolve(capped, start(), Rng(KEYS), batch=5, **SEARCH))
    assert max(capped.calls) == 5
    same(whole, evolve(cramped, start(), Rng(KEYS), **SEARCH))  # a piece that does not fit is halved
    assert max(cramped.calls) <= 4
    with pytest.raises(MemoryError):
        evolve(bowl(largest=0), start(), Rng(KEYS), **SEARCH)


def test_a_trial_without_a_finite_value_fails_alone() -> None:
    objective = bowl()
    objective.targets[1] = torch.nan
    found = evolve(objective, start(), Rng(KEYS), **SEARCH)
    assert found.finite.tolist() == [True, False, True]
    whole = evolve(bowl(), start(), Rng(KEYS), **SEARCH)
    for row in (0, 2):
        torch.testing.assert_close(found.unknowns["x"][row], whole.unknowns["x"][row], rtol=0, atol=0)
    assert found.unknowns["x"][1].tolist() == [0, 0, 0]  # its start
    assert bool(found.value[1].isnan())


def test_global_randomness_is_left_alone() -> None:
    def states() -> tuple[object, ...]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), kind, keys.tolist(), *rest, torch.get_rng_state().tolist()

    before = states()
    one = evolve(bowl(), start(), Rng(KEYS), optimizer="DE", **SEARCH)
    assert states() == before
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    same(one, evolve(bowl(), start(), Rng(KEYS), optimizer="DE", **SEARCH))


def test_an_unknown_optimiser_is_told_in_one_line() -> None:
    check_optimiser("CMA")
    with pytest.raises(BadOption, match="nevergrad has no optimizer 'TBSPA'; did you mean 'TBPSA'") as told:
        check_optimiser("TBSPA")
    assert "\n" not in str(told.value)
