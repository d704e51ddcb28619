"""The batched solvers against torch's own, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Self

import pytest
import torch
from conftest import rand, randn, watch
from torch import Tensor

from leakbench.attacks import dlg
from leakbench.core.rng import Rng
from leakbench.errors import BadOption
from leakbench.optim import Evaluation, LineSearch, Objective, Solution, Unknowns, descend, lbfgs
from leakbench.optim.client import ClientOptimiser, ClientState
from leakbench.optim.history import History
from leakbench.optim.solvers import serves

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Rows:
    """An objective made of one function of (row's parameter, row of x); counts evaluations and selections."""

    function: Callable[[Tensor, Tensor], Tensor]
    parameter: Tensor
    log: list[str] = field(default_factory=list)

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        self.log.append(f"evaluation {evaluation} of {len(self.parameter)}")
        return self.function(self.parameter, torch.cat([part.flatten(1) for part in unknowns.values()], 1))

    def select(self, rows: Sequence[int]) -> Self:
        self.log.append(f"select {len(rows)}")
        return type(self)(self.function, self.parameter[list(rows)], self.log)


def rosenbrock(a: Tensor, x: Tensor) -> Tensor:
    """A curved valley: nonconvex, badly scaled, row t with its own steepness."""
    return ((1 - x[:, :-1]).square() + a[:, None] * (x[:, 1:] - x[:, :-1].square()).square()).sum(1)


def waves(a: Tensor, x: Tensor) -> Tensor:
    """A bowl with ripples: many local minima."""
    return (x.square() / 4 + (a[:, None] * x + torch.arange(x.shape[1])).sin()).sum(1)


def quadratic(a: Tensor, x: Tensor) -> Tensor:
    return 0.5 * (a[:, None] * (1 + torch.arange(x.shape[1])) * x.square()).sum(1)


def starts(trials: int, size: int = 6) -> Unknowns:
    return {"u": 0.5 * randn(trials, size - 2, seed=1), "v": 0.5 * randn(trials, 2, 1, seed=2)}


def torch_lbfgs(
    objective: Objective, start: Unknowns, row: int, *, steps: int, **options: float | str
) -> tuple[Tensor, list[float]]:
    """Run torch.optim.LBFGS on one row, and return where it ends and the objective of every evaluation."""
    alone = objective.select([row])
    leaves = {name: tensor[row : row + 1].clone().requires_grad_() for name, tensor in start.items()}
    solver = torch.optim.LBFGS(list(leaves.values()), **options)
    seen: list[float] = []

    def closure() -> Tensor:
        solver.zero_grad()
        value = alone(leaves, len(seen)).sum()
        value.backward()
        seen.append(float(value.detach()))
        return value

    for _ in range(steps):
        solver.step(closure)
    return flat({name: leaf.detach() for name, leaf in leaves.items()})[0], seen


def flat(unknowns: Unknowns) -> Tensor:
    return torch.cat([part.flatten(1) for part in unknowns.values()], 1)


@pytest.mark.parametrize("history", [3, 100])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("function", "lr"), [(rosenbrock, 0.1), (waves, 0.2), (quadratic, 1.0)])
def test_lbfgs_is_torch_row_by_row(
    function: Callable[[Tensor, Tensor], Tensor], lr: float, steps: int, history: int
) -> None:
    trials = 5
    objective, start = Rows(function, torch.linspace(1.0, 3.0, trials)), starts(trials)
    options = {"lr": lr, "max_iter": 10, "history": history}
    solution = lbfgs(objective, start, steps=steps, **options)
    assert bool(solution.finite.all())
    assert set(solution.unknowns) == {"u", "v"}
    assert solution.unknowns["v"].shape == (trials, 2, 1)
    moved = 0.0
    for row in range(trials):
        end, _ = torch_lbfgs(objective, start, row, steps=steps, lr=lr, max_iter=10, history_size=history)
        torch.testing.assert_close(flat(solution.unknowns)[row], end, rtol=1e-9, atol=1e-9)
        moved += float((end - flat(start)[row]).norm())
    assert moved > 1
    torch.testing.assert_close(solution.value, objective(solution.unknowns, 0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", range(1, 4))
def test_lbfgs_iterates_are_torchs_at_every_number_of_iterations(steps: int) -> None:
    objective, start = Rows(rosenbrock, torch.tensor([1.0, 4.0])), starts(2)
    for max_iter in (1, 2, 3, 4, 7):
        solution = lbfgs(objective, start, steps=steps, lr=0.2, max_iter=max_iter, history=4)
        for row in range(2):
            end, _ = torch_lbfgs(objective, start, row, steps=steps, lr=0.2, max_iter=max_iter, history_size=4)
            torch.testing.assert_close(flat(solution.unknowns)[row], end, rtol=1e-9, atol=1e-12)
        # torch's limit of evaluations cuts steps of less than four iterations short
        assert solution.evaluations.tolist() == [steps * (max_iter - (max_iter in (2, 3))) + 1] * 2


def test_lbfgs_keeps_stopping_tests_per_row() -> None:
    """One row starts in its minimum, one gets there soon, one is still far: each as torch leaves it."""

    def bowl(a: Tensor, x: Tensor) -> Tensor:
        return (a[:, None] * (1 + torch.arange(4)) ** 2 * x.square()).sum(1)

    start = {"x": torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.2, 0.0, 0.0, 0.0], [3.0, -1.0, 2.0, 4.0]])}
    objective = Rows(bowl, torch.tensor([1.0, 2.0, 0.7]))
    solution = lbfgs(objective, start, steps=2, max_iter=5)
    first, second, third = solution.evaluations.tolist()
    assert first == 1
    assert 1 < second < third
    for row in range(3):
        end, _ = torch_lbfgs(objective, start, row, steps=2, max_iter=5, history_size=100)
        torch.testing.assert_close(solution.unknowns["x"][row], end, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not serves(torch.zeros(1, 1)), reason="no compiler")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("length", "size"), [(1, 5), (7, 103), (8, 64)])
def test_compiled_directions_are_those_of_torchs_operations(
    dtype: torch.dtype, tolerance: float, length: int, size: int
) -> None:
    torch.manual_seed(0)
    rows = 5
    curvature = 0.5 + torch.rand(rows, size, dtype=dtype)
    both = [History(curvature, length, compiled) for compiled in (False, True)]
    assert [own.compiled for own in both] == [False, True]
    assert not History(curvature, 257, True).compiled  # one pair more than solvers.cpp serves
    for step in range(2 * length + 3):
        s, gradient = (torch.randn(rows, size, dtype=dtype) for _ in range(2))
        y = curvature * s + 0.01 * torch.randn_like(s)
        keep = torch.rand(rows) < 0.8
        found, wanted = (own.direction(gradient, s, y, keep, min(length, step + 1)) for own in reversed(both))
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
        for one, other in zip(both[1].tensors(), both[0].tensors()):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    both[1].select(torch.tensor([True, False, True, True, False]))
    assert both[1].direction(gradient[:3], s[:3], y[:3], keep[:3], length).shape == (3, size)


def dlg_objective(trials: int) -> tuple[Objective, Unknowns]:
    observation = watch("lenet", trials=trials)
    rng = Rng(tuple(f"row {t}" for t in range(trials)))
    objective = dlg.DLG()._objective(observation, rng)
    start = {"image": rng.normal("image", observation.image_shape), "label": rng.normal("label", (4,))}
    return objective, start


def test_lbfgs_is_torch_on_gradient_matching() -> None:
    objective, start = dlg_objective(3)
    solution = lbfgs(objective, start, steps=3, max_iter=5)
    for row in range(3):
        end, seen = torch_lbfgs(objective, start, row, steps=3, max_iter=5, history_size=100)
        assert seen[-1] < 0.9 * seen[0]
        torch.testing.assert_close(flat(solution.unknowns)[row], end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [[0], [3], [3, 1, 0, 2, 4], [4, 4]])
def test_lbfgs_rows_do_not_depend_on_their_neighbours(order: list[int]) -> None:
    objective, start = Rows(waves, torch.linspace(1.0, 3.0, 5)), starts(5)
    together = lbfgs(objective, start, steps=3, lr=0.7, max_iter=8, history=5)
    some = lbfgs(
        objective.select(order),
        {name: tensor[order] for name, tensor in start.items()},
        steps=3,
        lr=0.7,
        max_iter=8,
        history=5,
    )
    torch.testing.assert_close(flat(some.unknowns), flat(together.unknowns)[order], rtol=1e-10, atol=1e-10)
    assert torch.equal(some.evaluations, together.evaluations[order])


def broken(a: Tensor, x: Tensor) -> Tensor:
    """A function that is not finite in the rows of negative parameter once x has left the start far enough."""
    inside = quadratic(a.abs(), x)
    hole = torch.where((a < 0) & (inside < 0.9), torch.nan, 0.0)
    return inside + hole


def test_lbfgs_flags_a_row_that_becomes_non_finite_and_keeps_its_last_finite_iterate() -> None:
    parameter = torch.tensor([1.0, -1.0, 2.0, 3.0])
    start = {"x": 1 + 0.1 * randn(4, 3, seed=3)}
    solution = lbfgs(Rows(broken, parameter), start, steps=3, lr=0.1, max_iter=6)
    assert solution.finite.tolist() == [True, False, True, True]
    assert bool(torch.isnan(solution.value[1]))
    kept = solution.unknowns["x"][1]
    assert bool(torch.isfinite(broken(parameter[1:2], kept[None])).all())
    assert not torch.equal(kept, start["x"][1])
    # the very next iterate of torch's is the one with a hole
    _, seen = torch_lbfgs(Rows(broken, parameter.abs()), start, 1, steps=3, lr=0.1, max_iter=6)
    assert int(solution.evaluations[1]) == next(i for i, value in enumerate(seen) if value < 0.9) + 1
    keep = [0, 2, 3]
    alone = lbfgs(Rows(broken, parameter[keep]), {"x": start["x"][keep]}, steps=3, lr=0.1, max_iter=6)
    torch.testing.assert_close(solution.unknowns["x"][keep], alone.unknowns["x"], rtol=1e-10, atol=1e-12)


def test_lbfgs_with_a_row_that_is_never_finite() -> None:
    start = {"x": torch.ones(2, 3)}
    start["x"][0, 0] = torch.nan
    solution = lbfgs(Rows(quadratic, torch.ones(2)), start, steps=2)
    assert solution.finite.tolist() == [False, True]
    assert solution.evaluations.tolist()[0] == 1
    assert float(solution.value[1]) < 1e-8
    dead = lbfgs(Rows(quadratic, torch.tensor([torch.nan])), {"x": torch.ones(1, 3)}, steps=2)
    assert dead.finite.tolist() == [False]
    assert torch.equal(dead.unknowns["x"], torch.ones(1, 3))


def test_lbfgs_with_infinite_gradient_but_finite_value() -> None:
    def root(a: Tensor, x: Tensor) -> Tensor:
        return x.abs().sqrt().sum(1)

    start = {"x": torch.tensor([[0.0, 1.0], [1.0, 2.0]])}
    solution = lbfgs(Rows(root, torch.ones(2)), start, steps=1, lr=0.1, max_iter=3)
    assert solution.finite.tolist() == [False, True]


def test_lbfgs_stops_below_at_every_so_many_outer_steps() -> None:
    objective, start = Rows(quadratic, torch.tensor([1.0, 1.0])), {"x": torch.tensor([[1.0, 1.0], [200.0, 200.0]])}
    options = {"lr": 0.05, "max_iter": 5}
    free = lbfgs(objective, start, steps=20, **options)
    stopped = lbfgs(objective, start, steps=20, stop_below=0.5, stop_every=2, **options)
    assert free.evaluations.tolist() == [101, 101]
    first, second = stopped.evaluations.tolist()
    assert first < second <= 101
    assert first % 10 == 1, "the test stands after every second outer step of five evaluations"
    assert float(stopped.value[0]) < 0.5
    before = lbfgs(objective, start, steps=first // 5 - 2, **options)
    assert float(before.value[0]) >= 0.5, "it did not run two outer steps too long"
    torch.testing.assert_close(
        stopped.unknowns["x"][0], lbfgs(objective, start, steps=first // 5, **options).unknowns["x"][0]
    )


def test_lbfgs_compacts_when_a_quarter_of_the_rows_is_done() -> None:
    trials = 8
    start = {"x": rand(trials, 4, seed=4)}
    start["x"][[1, 4, 6]] = 0.0  # in their minimum from the start
    objective = Rows(waves, torch.linspace(1.0, 2.0, trials))
    quiet = Rows(lambda a, x: torch.where(x.abs().amax(1) == 0, 0 * x.sum(1), waves(a, x)), objective.parameter)
    solution = lbfgs(quiet, start, steps=2, max_iter=6)
    assert "select 5" in quiet.log
    assert any(line.endswith("of 5") for line in quiet.log)
    assert solution.evaluations[[1, 4, 6]].tolist() == [1, 1, 1]
    for row in (0, 2, 3, 5, 7):
        end, _ = torch_lbfgs(objective, start, row, steps=2, max_iter=6, history_size=100)
        torch.testing.assert_close(solution.unknowns["x"][row], end, rtol=1e-9, atol=1e-9)


def test_lbfgs_leaves_its_start_alone_and_tells_the_evaluation() -> None:
    objective, start = Rows(rosenbrock, torch.ones(2)), starts(2)
    before = {name: tensor.clone() for name, tensor in start.items()}
    lbfgs(objective, start, steps=1, max_iter=4, lr=0.1)
    assert all(torch.equal(start[name], before[name]) for name in start)
    assert objective.log == [f"evaluation {[index] * 2} of 2" for index in range(len(objective.log))]


@pytest.mark.parametrize("history", [3, 100])
@pytest.mark.parametrize("max_iter", [1, 3, 20])
@pytest.mark.parametrize(("function", "lr"), [(rosenbrock, 1.0), (rosenbrock, 30.0), (waves, 0.2), (waves, 0.003)])
def test_strong_wolfe_is_torchs_row_by_row(
    function: Callable[[Tensor, Tensor], Tensor], lr: float, max_iter: int, history: int
) -> None:
    """Steps that are far too long or too short make the search bracket, narrow and extrapolate."""
    objective, start, steps = Rows(function, torch.linspace(1.0, 9.0, 5)), starts(5), max(1, 12 // max_iter)
    options = {"lr": lr, "max_iter": max_iter}
    solution = lbfgs(objective, start, steps=steps, history=history, line_search="strong-wolfe", **options)
    for row in range(5):
        end, seen = torch_lbfgs(
            objective, start, row, steps=steps, history_size=history, line_search_fn="strong_wolfe", **options
        )
        assert int(solution.evaluations[row]) == len(seen)
        assert len(seen) > steps
        torch.testing.assert_close(flat(solution.unknowns)[row], end, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.value, objective(solution.unknowns, 0), rtol=1e-12, atol=1e-15)


def test_strong_wolfe_converges_in_rows_of_different_length() -> None:
    start = {"x": torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0], [3.0, -1.0, 2.0], [30.0, 10.0, -40.0]])}
    objective = Rows(rosenbrock, torch.tensor([1.0, 2.0, 5.0, 10.0]))
    solution = lbfgs(objective, start, steps=30, line_search="strong-wolfe", slots=2)
    torch.testing.assert_close(solution.unknowns["x"], torch.ones(4, 3), rtol=1e-4, atol=1e-4)
    assert len(set(solution.evaluations.tolist())) == 4
    for row in range(4):
        end, seen = torch_lbfgs(objective, start, row, steps=30, line_search_fn="strong_wolfe")
        torch.testing.assert_close(solution.unknowns["x"][row], end, rtol=1e-8, atol=1e-8)
        # torch goes on to look once in each step that is left
        assert len(seen) - 30 < int(solution.evaluations[row]) <= len(seen)


def test_strong_wolfe_is_torchs_on_gradient_matching() -> None:
    objective, start = dlg_objective(3)
    solution = lbfgs(objective, start, steps=2, max_iter=6, line_search="strong-wolfe")
    for row in range(3):
        end, seen = torch_lbfgs(objective, start, row, steps=2, max_iter=6, line_search_fn="strong_wolfe")
        assert int(solution.evaluations[row]) == len(seen)
        assert min(seen) < 0.9 * seen[0]
        torch.testing.assert_close(flat(solution.unknowns)[row], end, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("attack", [dlg.DLG, dlg.IDLG])
def test_attacks_by_lbfgs_search_along_the_line_where_asked(attack: type[dlg.DLG] | type[dlg.IDLG]) -> None:
    observation = watch("lenet", trials=2)
    rng = Rng(("row 0", "row 1"))
    plain, searched = attack(steps=2)(observation, rng), attack(steps=2, line_search="strong-wolfe")(observation, rng)
    assert plain.objective is not None
    assert searched.objective is not None
    assert not torch.equal(plain.objective, searched.objective)
    assert plain.evaluations is not None
    assert plain.evaluations.tolist() != searched.evaluations.tolist()


def test_strong_wolfe_keeps_a_non_finite_row_to_itself() -> None:
    parameter = torch.tensor([1.0, -1.0, 2.0, 3.0])
    start = {"x": 1 + 0.1 * randn(4, 3, seed=3)}
    options = {"steps": 2, "lr": 0.1, "max_iter": 6, "line_search": "strong-wolfe"}
    solution = lbfgs(Rows(broken, parameter), start, **options)
    assert solution.finite.tolist() == [True, False, True, True]
    assert bool(torch.isnan(solution.value[1]))
    assert bool(torch.isfinite(broken(parameter[1:2], solution.unknowns["x"][1][None])).all())
    keep = [0, 2, 3]
    alone = lbfgs(Rows(broken, parameter[keep]), {"x": start["x"][keep]}, **options)
    torch.testing.assert_close(solution.unknowns["x"][keep], alone.unknowns["x"], rtol=1e-12, atol=1e-12)
    assert torch.equal(solution.evaluations[keep], alone.evaluations)


@pytest.mark.parametrize("line_search", ["none", "strong-wolfe"])
def test_lbfgs_does_not_depend_on_slots(line_search: LineSearch) -> None:
    """Rows end early, break and go on, while what each evaluation draws depends on the row's own count."""
    trials = 9

    @dataclass(frozen=True)
    class Noisy(Rows):
        def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
            numbers = torch.tensor(evaluation, dtype=torch.float64)
            self.log.append(f"{len(self.parameter)}")
            tilt = 1e-3 * (numbers + self.parameter).sin()[:, None] * torch.ones(1, 6)
            x = torch.cat([part.flatten(1) for part in unknowns.values()], 1)
            return broken(self.parameter, x) + (tilt * x).sum(1)

    parameter = torch.linspace(0.2, 3.0, trials)
    parameter[[2, 5]] *= -1
    start = starts(trials)
    start = {name: 1.5 + tensor for name, tensor in start.items()}
    start["u"][4], start["v"][4] = torch.nan, 0
    options = {"steps": 8, "lr": 0.3, "max_iter": 5, "history": 4, "stop_below": 0.2, "stop_every": 1}

    def solved(slots: int | None) -> tuple[Solution, list[str]]:
        objective = Noisy(rosenbrock, parameter)
        return lbfgs(objective, start, slots=slots, line_search=line_search, **options), objective.log

    every, _ = solved(None)
    assert every.finite.tolist() == [row not in (2, 4, 5) for row in range(trials)]
    assert len(set(every.evaluations.tolist())) > 2
    for slots in (1, 3, trials, 50):
        some, log = solved(slots)
        assert torch.equal(some.evaluations, every.evaluations)
        assert torch.equal(some.finite, every.finite)
        torch.testing.assert_close(some.value, every.value, rtol=1e-12, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(flat(some.unknowns), flat(every.unknowns), rtol=1e-12, atol=1e-12, equal_nan=True)
        assert max(int(line) for line in log if line.isdigit()) == min(slots, trials)
        if slots == 1:
            assert len([line for line in log if line.isdigit()]) == int(every.evaluations.sum())


def test_lbfgs_refills_slots_in_the_order_of_trials_and_selects_seldom() -> None:
    trials = 40
    objective = Rows(quadratic, torch.ones(trials))
    start = {"x": rand(trials, 3, seed=5) * torch.arange(trials)[:, None]}
    solution = lbfgs(objective, start, steps=40, max_iter=5, lr=0.5, slots=16)
    assert bool((solution.value < 1e-6).all())
    selections = [line for line in objective.log if line.startswith("select")]
    assert len(selections) < trials / 2
    assert selections[0] == "select 16"
    with pytest.raises(ValueError, match="slots=0"):
        lbfgs(objective, start, steps=1, slots=0)


def torch_descend(
    objective: Objective,
    start: Unknowns,
    row: int,
    *,
    steps: int,
    lr: dict[str, float],
    rule: str,
    sign: Sequence[str] = (),
    milestones: Sequence[int] = (),
    box: bool = False,
) -> Unknowns:
    leaves = {name: tensor[row : row + 1].clone().requires_grad_() for name, tensor in start.items()}
    groups = [{"params": [leaf], "lr": lr[name]} for name, leaf in leaves.items()]
    solver: torch.optim.Optimizer
    if rule == "adam":
        solver = torch.optim.Adam(groups)
    else:
        solver = torch.optim.RMSprop(groups, alpha=0.99, momentum=0.99)
    schedule = torch.optim.lr_scheduler.MultiStepLR(solver, list(milestones), gamma=0.1)
    alone = objective.select([row])
    for step in range(steps):
        solver.zero_grad()
        alone(leaves, step).sum().backward()
        for name in sign:
            leaves[name].grad = leaves[name].grad.sign()
        solver.step()
        schedule.step()
        if box:
            with torch.no_grad():
                leaves["u"].clamp_(0, 1)
    return {name: leaf.detach() for name, leaf in leaves.items()}


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("milestones", [(), (3, 5, 7)])
@pytest.mark.parametrize("sign", [(), ("u",)])
@pytest.mark.parametrize("rule", ["adam", "rmsprop"])
def test_descend_is_torch_row_by_row(
    rule: Literal["adam", "rmsprop"], sign: tuple[str, ...], milestones: tuple[int, ...], box: bool
) -> None:
    objective, start = Rows(waves, torch.linspace(1.0, 3.0, 3)), starts(3)
    lr = {"u": 0.1, "v": 0.02}
    solution = descend(
        objective,
        start,
        steps=9,
        lr=lr,
        rule=rule,
        sign=sign,
        milestones=milestones,
        boxed=("u",) if box else (),
    )
    assert solution.evaluations.tolist() == [9] * 3
    assert bool(solution.finite.all())
    for row in range(3):
        expected = torch_descend(
            objective, start, row, steps=9, lr=lr, rule=rule, sign=sign, milestones=milestones, box=box
        )
        for name in start:
            torch.testing.assert_close(solution.unknowns[name][row], expected[name][0], rtol=1e-10, atol=1e-12)


def test_descend_flags_a_dead_row_and_leaves_the_others_alone() -> None:
    parameter = torch.tensor([1.0, -1.0, 2.0])
    start = {"x": 1 + 0.1 * randn(3, 3, seed=3)}
    solution = descend(Rows(broken, parameter), start, steps=30, lr={"x": 0.05})
    assert solution.finite.tolist() == [True, False, True]
    assert bool(torch.isnan(solution.value[1]))
    assert bool(torch.isfinite(solution.unknowns["x"]).all())
    assert 1 < int(solution.evaluations[1]) < 30
    alone = descend(Rows(broken, parameter[[0, 2]]), {"x": start["x"][[0, 2]]}, steps=30, lr={"x": 0.05})
    torch.testing.assert_close(solution.unknowns["x"][[0, 2]], alone.unknowns["x"], rtol=1e-12, atol=1e-14)


def test_descend_gives_up_when_every_row_is_dead() -> None:
    objective = Rows(quadratic, torch.tensor([torch.nan, torch.nan]))
    start = {"x": torch.ones(2, 3)}
    solution = descend(objective, start, steps=1000, lr={"x": 0.1})
    assert torch.equal(solution.unknowns["x"], start["x"])
    assert not bool(solution.finite.any())
    assert len(objective.log) < 1000


@pytest.mark.parametrize("solver", [lbfgs, descend])
def test_an_unknown_that_does_not_matter_stays(solver: Callable[..., Solution]) -> None:
    class First(Rows):
        def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
            return quadratic(self.parameter, unknowns["u"])

    start = starts(2)
    options = {"lr": dict.fromkeys(start, 0.1)} if solver is descend else {}
    solution = solver(First(quadratic, torch.ones(2)), start, steps=3, **options)
    assert torch.equal(solution.unknowns["v"], start["v"])
    assert float(solution.value.sum()) < float(First(quadratic, torch.ones(2))(start, 0).sum())


def test_descend_returns_the_last_iterate_at_which_the_objective_was_finite() -> None:
    parameter = torch.tensor([1.0, -1.0])
    solution = descend(Rows(broken, parameter), {"x": 1 + 0 * torch.rand(2, 3)}, steps=30, lr={"x": 0.05})
    assert solution.finite.tolist() == [True, False]
    assert bool(torch.isfinite(broken(parameter, solution.unknowns["x"])).all())


CLIENTS = {
    "sgd": (ClientOptimiser(lr=0.1), partial(torch.optim.SGD, lr=0.1)),
    "momentum": (
        ClientOptimiser(lr=0.1, momentum=0.9, weight_decay=1e-2),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    ),
    "nesterov": (
        ClientOptimiser(lr=0.1, momentum=0.8, nesterov=True, weight_decay=1e-2),
        partial(torch.optim.SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=1e-2),
    ),
    "adam": (ClientOptimiser("adam", 0.01, weight_decay=1e-2), partial(torch.optim.Adam, lr=0.01, weight_decay=1e-2)),
    "adamw": (ClientOptimiser("adamw", 0.01, weight_decay=0.1), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_clients_optimiser_is_that_of_torch(name: str) -> None:
    """Over ten steps on a loss whose gradient is 0 in one entry; and it has a derivative everywhere."""
    own, theirs = CLIENTS[name]
    start = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = start.clone().requires_grad_()
    optimiser = theirs([weight])
    factor = torch.tensor([3.0, 1.0, 0.5, 2.0, -1.0, 0.0]).double()
    moved, state = {"w": start.clone().requires_grad_(), "still": start}, ClientState()
    first = moved["w"]
    for _ in range(10):
        optimiser.zero_grad()
        (factor * weight.sin()).sum().backward()
        optimiser.step()
        moved, state = own.moved(moved, {"w": factor * moved["w"].cos()}, state)
    assert float((moved["w"] - weight).detach().abs().max()) < 1e-12
    assert moved["still"] is start
    (slope,) = torch.autograd.grad(moved["w"].sum(), first)
    assert bool(torch.isfinite(slope).all())


def test_the_unit_of_a_clients_steps_is_the_sum_of_their_factors() -> None:
    assert ClientOptimiser(lr=0.1).unit(4) == pytest.approx(0.4)
    assert ClientOptimiser("adam").unit(4) is None
    rate, momentum, steps = 0.1, 0.9, 5
    closed = rate * (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
    assert ClientOptimiser(lr=rate, momentum=momentum, weight_decay=0.5).unit(steps) == pytest.approx(closed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "lr=0 of a client's optimiser is out of range; give a finite number above 0"),
        ({"momentum": 1.0}, "momentum=1"),
        ({"weight_decay": -1.0}, "weight_decay=-1"),
        ({"nesterov": True}, "needs momentum"),
        ({"kind": "adam", "momentum": 0.9}, "is of sgd, not of adam"),
    ],
)
def test_a_clients_optimiser_that_cannot_be_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(BadOption, match=words):
        ClientOptimiser(**options)  # type: ignore[arg-type]
