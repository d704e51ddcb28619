"""L-BFGS for many trials at once, each by the rules of ``torch.optim.LBFGS``.

Every trial has its own history, step, counters and stopping tests, so that trials are at different points of the
algorithm at the same time. Trials occupy slots; one that is done makes room for the next.

The algorithm is Nocedal and Wright 2006, Numerical Optimization, algorithm 7.5: choose a direction p = -H g by
algorithm 7.4 (``history.History.direction``), go a step along it, save the pair s = x' - x, y = g' - g, and repeat. One
evaluation of the objective is one call of ``_advance``: with a line search a row needs several for a step of 7.5, and
masks [R] say which rows are at which line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from leakbench.core.device import accelerator
from leakbench.core.loss_curve import Curve, marks
from leakbench.optim.base import Objective, Solution, Unknowns, joined, largest
from leakbench.optim.graph import OTHER_NUMBERS, Replay, agree, capture, recorded, rehearsed, waits
from leakbench.optim.history import History, Rows
from leakbench.optim.wolfe import StrongWolfe

BUCKETS = (8, 16, 32, 64)
"""Numbers of ring slots for which a GPU's graph is recorded; the last one has all slots."""

LineSearch = Literal["none", "strong-wolfe"]


@dataclass(frozen=True)
class _Rules:
    """The options of ``lbfgs`` for a single trial."""

    steps: int
    lr: float
    max_iter: int
    tolerance_grad: float
    tolerance_change: float
    stop_below: float
    stop_every: int
    budget: int | None


class _State(Rows):
    """The state of each slot.

    Attributes:
        x: [R, N], the iterate; the last one at which objective and gradient were finite.
        at: [R, N], the point of the next evaluation.
        direction: [R, N], the direction that led, or is to lead, away from x.
        reach: [R], its largest entry.
        step: [R], how far it was followed.
        gradient: [R, N], the gradient from which the direction was made.
        loss: [R], the objective there.
        value: [R], the objective at the last evaluation; with a line search, at x.
        iterations: [R], of all outer steps together.
        inner: [R], iterations of this outer step.
        outer: [R], outer steps that have ended.
        spent: [R], evaluations of this outer step.
        evaluations: [R], of all outer steps together.
        done: [R] bool, nothing is left to do.
        broken: [R] bool, objective or gradient became non-finite.
        history: the memory.
        search: the line searches, or None.
    """

    def __init__(self, x: Tensor, history: int, search: StrongWolfe | None, compiled: bool) -> None:
        rows = len(x)
        self.x, self.at = x, x.clone()
        self.direction, self.gradient = torch.zeros_like(x), torch.zeros_like(x)
        self.reach, self.step, self.loss, self.value = (x.new_zeros(rows) for _ in range(4))
        counters = [torch.zeros(rows, dtype=torch.int64, device=x.device) for _ in range(5)]
        self.iterations, self.inner, self.outer, self.spent, self.evaluations = counters
        self.done, self.broken = (torch.zeros(rows, dtype=torch.bool, device=x.device) for _ in range(2))
        self.history = History(x, history, compiled)
        self.search = search

    def begin(self, rows: Tensor, x: Tensor) -> None:
        """Start new trials [rows, N] in these slots."""
        self.reset(rows)
        self.x[rows] = x
        self.at[rows] = x


class _Slots:
    """Which trial each slot works on, which trials wait, and the results of those that are done.

    Attributes:
        trials: the trial in each slot.
        begun: the tick (evaluation of all slots) at which it began.
        waiting: the trials that have no slot yet.
        x: [T, N], the start of a trial; once it is done, its last iterate.
        value: [T], the last objective; NaN until the trial is done.
        finite: [T] bool.
        evaluations: [T].
    """

    def __init__(self, x: Tensor, count: int, limit: int) -> None:
        total = len(x)
        self.trials = list(range(min(total, count)))
        self.begun = [0] * len(self.trials)
        self.waiting = list(range(len(self.trials), total))
        self._few = max(1, len(self.trials) // 8)
        self._column = {mark: column for column, mark in enumerate(marks(limit))}
        self._seen: list[tuple[list[int], list[int], Tensor]] = []
        self.x, self.value = x, x.new_full((total,), torch.nan)
        self.finite = torch.ones(total, dtype=torch.bool, device=x.device)
        self.evaluations = torch.zeros(total, dtype=torch.int64, device=x.device)

    def record(self, tick: int, loss: Tensor, done: Tensor) -> None:
        """Keep the objective [R] of the slots whose trial has reached one of the marks of its curve."""
        own = [tick - first + 1 for first in self.begun]
        if any(number in self._column for number in own):
            rows = [trial if number in self._column else -1 for trial, number in zip(self.trials, own)]
            columns = [self._column.get(number, 0) for number in own]
            self._seen.append((rows, columns, torch.where(done, torch.nan, loss)))

    def curve(self) -> Tensor:
        """Return the curves [T, K] of ``record``; what was seen is read from the device only now, at once."""
        curve = torch.full((len(self.x), len(self._column)), torch.nan, dtype=self.x.dtype)
        if self._seen:
            rows, columns = (torch.tensor([one for seen in self._seen for one in seen[part]]) for part in (0, 1))
            values, known = torch.cat([seen[2] for seen in self._seen]).cpu(), rows >= 0
            curve[rows[known], columns[known]] = values[known]
        return curve.to(self.x.device)

    def exchange(self, state: _State, tick: int) -> bool:
        """Take the results of trials that are done, and give their slots to those that wait; True if any changed hands.

        Histories, weights and gradients are copied in an exchange, so it is put off until a few slots are idle.
        """
        idle = int(state.done.sum())
        if idle < len(self.trials) and idle < (self._few if self.waiting else max(1, len(self.trials) / 4)):
            return False
        free = state.done.nonzero()[:, 0]
        ended = torch.tensor(self.trials, device=free.device)[free]
        self.x[ended], self.value[ended] = state.x[free], state.value[free]
        self.evaluations[ended], self.finite[ended] = state.evaluations[free], ~state.broken[free]
        taken, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        for slot, trial in zip(free.tolist(), taken):
            self.trials[slot], self.begun[slot] = trial, tick
        state.begin(free[: len(taken)], self.x[taken])
        if len(taken) < len(free):
            state.select(keep := (~state.done).nonzero()[:, 0])
            self.trials, self.begun = ([own[slot] for slot in keep.tolist()] for own in (self.trials, self.begun))
        return True


def lbfgs(
    objective: Objective,
    start: Unknowns,
    *,
    steps: int,
    lr: float = 1.0,
    max_iter: int = 20,
    history: int = 100,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    line_search: LineSearch = "none",
    stop_below: float = -math.inf,
    stop_every: int = 10,
    budget: int | None = None,
    slots: int | None = None,
    compiled: bool = False,
    note: Callable[[str], None] | None = None,
) -> Solution:
    """Minimise each trial by L-BFGS; the parameters are those of ``torch.optim.LBFGS``.

    A trial is done when its objective or gradient becomes non-finite, when no further step can change it (the gradient
    is within ``tolerance_grad``, or the direction no longer descends), after ``steps``, or by ``stop_below``. Its
    result does not depend on ``slots`` or on the other trials.

    Args:
        objective: the per-trial objective.
        start: name -> [T, *shape].
        steps: outer steps, each of up to ``max_iter`` iterations and ``max_iter * 5 // 4`` evaluations.
        lr: the length of every step but the first, which is min(1, 1 / |g|_1) * lr; with a line search, the length
            that it tries first.
        max_iter: iterations per outer step.
        history: how many pairs of steps and gradient differences are kept.
        tolerance_grad: largest gradient entry at which an outer step ends.
        tolerance_change: an outer step ends when step or objective change by less.
        line_search: ``strong-wolfe`` searches along each direction (torch's ``strong_wolfe``).
        stop_below: a trial is done when its objective is below this at the end of every ``stop_every``-th outer step.
        stop_every: see ``stop_below``.
        budget: the evaluations after which a trial is done; any number by default.
        slots: how many trials are worked on at a time, all by default; a trial that is done makes room for the next.
        compiled: compiled code (``solvers``) finds the directions where there is any: the same but for rounding.
        note: called with a line if the objective cannot be recorded on a GPU.

    Raises:
        ValueError: ``slots`` is below 1.
    """
    if slots is not None and slots < 1:
        raise ValueError(f"slots={slots} must be at least 1")
    rules = _Rules(steps, lr, max_iter, tolerance_grad, tolerance_change, stop_below, stop_every, budget)
    x, unpack = joined(start)
    limit = steps * (max_iter * 5 // 4) if budget is None else budget
    work = _Slots(x, slots or len(x), limit)
    begun = x[: len(work.trials)]
    search = StrongWolfe(begun, tolerance_change) if line_search == "strong-wolfe" else None
    state = _State(begun.clone(), history, search, compiled)
    live = objective.select(work.trials) if work.waiting else objective
    evaluate, advance = recorded(live, unpack(state.at), note), _Advance(rules, history, note)
    poll = 1 if x.device.type == "cpu" else 8  # reading a value from another device waits for it
    tick = 0
    while work.trials:
        loss, gradients = evaluate(unpack(state.at), [tick - first for first in work.begun])
        gradient = torch.cat([gradients[name].flatten(1) for name in start], 1)
        work.record(tick, loss, state.done)
        # a trial has at most one pair an evaluation, the first excepted, so the oldest trial bounds the ring in use
        advance(state, loss, gradient, used=max(1, min(history, tick - min(work.begun))))
        tick += 1
        if tick % poll == 0 and work.exchange(state, tick) and work.trials:
            live = objective.select(work.trials)
            evaluate, advance = recorded(live, unpack(state.at), note), _Advance(rules, history, note)
    return Solution(unpack(work.x), work.value, work.finite, work.evaluations, Curve(limit, 1, work.curve()))


class _Advance:
    """``_advance`` for the same slots; on a GPU as recorded graphs, which write the state in place.

    There is one graph for each number of ring slots of ``BUCKETS``: those that are in use, and some that hold no pair.
    The first replay of a graph, which is at another point than its recording, is compared with ``_advance``.
    """

    def __init__(self, rules: _Rules, history: int, note: Callable[[str], None] | None) -> None:
        self._rules, self._note = rules, note
        self._buckets = [*(size for size in BUCKETS if size < history), history]
        self._recordable = True
        self._graphs: dict[int, Replay] = {}
        self._compared: set[int] = set()

    def __call__(self, state: _State, loss: Tensor, gradient: Tensor, used: int) -> None:
        """Use an evaluation; see ``_advance``."""
        module = accelerator(loss.device)
        if module is None or not self._recordable:
            return _advance(state, loss, gradient, self._rules, used)
        used = next(size for size in self._buckets if size >= used)
        if not self._graphs:
            self._loss, self._gradient = loss.clone(), gradient.clone()
        self._loss.copy_(loss)
        self._gradient.copy_(gradient)
        if used in self._compared:
            return self._graphs[used]()
        with module.device(loss.device):
            reason = self._first(state, used) if used in self._graphs else self._record(state, used, module)
        if reason:
            self._recordable = False
            self._graphs.clear()
            if self._note is not None:
                self._note(f"the steps of L-BFGS are not recorded as graphs, and so take longer: {reason}")
        return None

    def _record(self, state: _State, used: int, module: ModuleType) -> str:
        """Advance without a graph, and record one for the next time; return why that was not possible."""

        def rehearse() -> None:
            self._once(state.copied(deep=True), used)

        def work() -> None:
            next_state = state.copied(deep=False)
            self._once(next_state, used)
            state.take_over(next_state)

        reason = waits(rehearse, module)
        stream = None if reason else rehearsed(rehearse, module)
        after = state.copied(deep=True)
        self._once(after, used)
        try:
            if not reason:
                self._graphs[used], _ = capture(work, stream, module)
        except RuntimeError as error:  # memory that does not suffice
            module.synchronize()
            reason = str(error).splitlines()[0]
        state.take_over(after)
        return reason

    def _first(self, state: _State, used: int) -> str:
        """Advance by a graph and without it; return why the graph is of no use."""
        after = state.copied(deep=True)
        self._once(after, used)
        self._graphs[used]()
        if agree(state.tensors(), after.tensors()):
            self._compared.add(used)
            return ""
        state.take_over(after)
        return OTHER_NUMBERS

    def _once(self, state: _State, used: int) -> None:
        _advance(state, self._loss, self._gradient, self._rules, used)


def _advance(state: _State, loss: Tensor, gradient: Tensor, rules: _Rules, used: int) -> None:
    """Use the objective and its gradient at ``state.at``, and set the point of each trial's next evaluation."""
    search = state.search
    peak = largest(gradient)
    live = ~state.done
    ok = torch.isfinite(loss) & torch.isfinite(peak)
    state.evaluations = state.evaluations + live
    state.spent = state.spent + live
    state.value = torch.where(live & ~ok, loss, state.value)
    state.broken = state.broken | (live & ~ok)
    state.done = state.done | ~ok

    # Algorithm 7.5, x' = x + t p. Rows that arrived have x', its objective and its gradient g'; the others are still
    # in the line search for t. Without one, every evaluation is at x'.
    arrived = live & ok
    point = state.at
    if search is not None:
        searched = search.searching
        ended = search.take(arrived, loss, (gradient * state.direction).sum(1), gradient, state.gradient)
        step, best, best_gradient = search.chosen()
        state.step = torch.where(ended, step, state.step)
        loss = torch.where(ended, best, loss)
        gradient = torch.where(ended[:, None], best_gradient, gradient)
        peak = largest(gradient)
        point = torch.where(ended[:, None], state.x + state.step[:, None] * state.direction, point)
        arrived = arrived & (ended | ~searched)
    state.x = torch.where(arrived[:, None], point, state.x)
    state.value = torch.where(arrived, loss, state.value)

    over = _end_steps(state, arrived, loss, peak, rules)
    # Torch evaluates x' anew as an outer step begins. Without a line search, this evaluation serves and counts as that
    # one; with one, the row is evaluated again, at step 0 from x'.
    state.spent = torch.where(over, 0 if search is not None else 1, state.spent)
    # rows that begin the next iteration of 7.5
    goes = arrived & ~state.done
    if search is not None:
        goes = goes & ~over
    _turn(state, goes, loss, gradient, rules, used)

    stepped = goes & ~state.done
    if search is None:
        # torch does not evaluate after the last iteration of an outer step: it ends before x' is evaluated
        full = stepped & (state.inner >= rules.max_iter)
        state.outer = state.outer + full
        state.inner = torch.where(full, 0, state.inner)
        state.spent = torch.where(full, 0, state.spent)
        step = torch.where(stepped, state.step, 0.0)
    else:
        # what is left of the outer step's evaluations, and of the trial's, bounds the line search
        limit = rules.max_iter * 5 // 4 - state.spent
        if rules.budget is not None:
            limit = torch.minimum(limit, rules.budget - state.evaluations - 1)
        slope = (gradient * state.direction).sum(1)
        search.begin(stepped, state.step, loss, slope, gradient, state.reach, limit)
        step = torch.where(search.searching, search.t, 0.0)
    state.at = state.x + step[:, None] * state.direction


def _end_steps(state: _State, arrived: Tensor, loss: Tensor, peak: Tensor, rules: _Rules) -> Tensor:
    """End outer steps and trials by torch's tests, and return the rows [R] whose outer step ended."""
    # 7.5, "until convergence": torch's five tests after an iteration, in torch's order
    over = (state.inner > 0) & (
        (state.inner >= rules.max_iter)
        | (state.spent >= rules.max_iter * 5 // 4)
        | (peak <= rules.tolerance_grad)
        | (state.reach * state.step.abs() <= rules.tolerance_change)
        | ((loss - state.loss).abs() < rules.tolerance_change)
    )
    over = over & arrived
    state.outer = state.outer + over
    state.inner = torch.where(over, 0, state.inner)
    # ``steps`` and ``stop_below`` count outer steps and are tested between them; the budget ends a trial at any point
    between = arrived & (state.inner == 0)
    below = (state.outer > 0) & (state.outer % rules.stop_every == 0) & (loss < rules.stop_below)
    state.done = state.done | (between & ((peak <= rules.tolerance_grad) | (state.outer >= rules.steps) | below))
    if rules.budget is not None:
        state.done = state.done | (arrived & (state.evaluations >= rules.budget))
    return over


def _turn(state: _State, goes: Tensor, loss: Tensor, gradient: Tensor, rules: _Rules, used: int) -> None:
    """Begin an iteration in some rows: save the pair of the last one, and set direction and step."""
    # 7.5, "compute and save": s = t p and y = g' - g. Torch drops a pair for which s y > 0, the curvature condition
    # (6.7), barely holds: H stays positive definite only with it.
    s = state.direction * state.step[:, None]
    y = gradient - state.gradient
    keep = goes & ((s * y).sum(1) > 1e-10)
    direction = state.history.direction(gradient, s, y, keep, used)
    # before there is a pair, p = -g has no natural length: torch makes the first step at most lr long in the 1-norm
    first_step = torch.clamp(1 / gradient.abs().sum(1), max=1.0) * rules.lr
    state.step = torch.where(goes, torch.where(state.iterations == 0, first_step, rules.lr), state.step)
    state.direction = torch.where(goes[:, None], direction, state.direction)
    state.reach = largest(state.direction)
    state.gradient = torch.where(goes[:, None], gradient, state.gradient)
    state.loss = torch.where(goes, loss, state.loss)
    state.iterations = state.iterations + goes
    state.inner = state.inner + goes
    # a direction that does not descend ends this outer step, and would end every further one right here
    state.done = state.done | (goes & ((gradient * direction).sum(1) > -rules.tolerance_change))
