"""L-BFGS for many trials at once, each by the rules of ``torch.optim.LBFGS`` without line search.

Every trial has its own history, step, counters and stopping tests. The two-loop recursion is written in its compact
form (Byrd, Nocedal, Schnabel 1994, "Representations of quasi-Newton matrices", section 2): with S and Y the steps and
gradient differences in order of age and R the upper triangle of S Y^T,

    R a = -S g,    q = -g - Y^T a,    R^T c = diag(R) a - h Y q,    d = h q + S^T c,

which gives the direction of the recursion from two triangular solves and four passes over the history.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench.optim.base import Objective, Solution, Unknowns, value_and_gradient


class _State:
    """What each live trial carries; every attribute has one row a live trial."""

    def __init__(self, x: Tensor, history: int) -> None:
        trials, size = x.shape
        self.x = x
        self.finite_x = x
        self.direction = torch.zeros_like(x)
        self.step = x.new_zeros(trials)
        self.gradient = torch.zeros_like(x)
        self.loss = x.new_zeros(trials)
        self.s = x.new_zeros(trials, history, size)
        self.y = x.new_zeros(trials, history, size)
        self.sy = x.new_zeros(trials, history, history)
        self.yy = x.new_zeros(trials, history, history)
        self.scale = x.new_ones(trials)
        self.pairs = torch.zeros(trials, dtype=torch.int64, device=x.device)
        self.inner = torch.zeros_like(self.pairs)
        self.outer = torch.zeros_like(self.pairs)
        self.iterations = torch.zeros_like(self.pairs)

    def select(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


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
    stop_below: float = 0.0,
    stop_every: int = 10,
) -> Solution:
    """Minimise each trial by L-BFGS; the parameters mean what they mean in ``torch.optim.LBFGS``.

    A trial leaves the batch when its objective or gradient becomes non-finite, when no further step can change it
    (the gradient is within ``tolerance_grad``, or the direction no longer descends), or when it is done.

    Args:
        objective: the per-trial objective.
        start: name -> [T, *shape].
        steps: outer steps, each of up to ``max_iter`` iterations.
        lr: the length of every step but the first, which is min(1, 1 / |g|_1) * lr.
        max_iter: iterations per outer step, from 4 on (below, torch's limit of max_iter * 5 / 4 evaluations bites).
        history: how many pairs of steps and gradient differences are kept.
        tolerance_grad: largest gradient entry at which an outer step ends.
        tolerance_change: an outer step ends when step or objective change by less.
        stop_below: a trial is done when its objective is below this at the end of every ``stop_every``-th outer step.
        stop_every: see ``stop_below``.
    """
    shapes = {name: tensor.shape[1:] for name, tensor in start.items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def unpack(flat: Tensor) -> Unknowns:
        parts = flat.split(sizes, dim=1)
        return {name: part.view(len(flat), *shape) for (name, shape), part in zip(shapes.items(), parts)}

    x = torch.cat([tensor.detach().flatten(1) for tensor in start.values()], 1)
    trials, device = len(x), x.device
    result = x.clone()
    value = x.new_full((trials,), torch.nan)
    finite = torch.ones(trials, dtype=torch.bool, device=device)
    evaluations = torch.zeros(trials, dtype=torch.int64, device=device)
    rows = torch.arange(trials, device=device)  # which trial each row of the state is
    state = _State(x, history)
    done = torch.zeros(trials, dtype=torch.bool, device=device)
    tick = 0
    while True:
        if bool(done.any()):
            live = (~done).nonzero()[:, 0]
            result[rows[done]] = state.finite_x[done]
            # compacting copies the history, so rows that are done wait until they are many
            if len(live) == 0:
                break
            if len(live) <= 0.75 * len(rows):
                objective = objective.select(live.tolist())
                rows, done = rows[live], done[live]
                state.select(live)
        loss, gradients = value_and_gradient(objective, unpack(state.x), tick)
        gradient = torch.cat([gradients[name].flatten(1) for name in shapes], 1)
        live_rows = ~done
        evaluations[rows] += live_rows
        ok = torch.isfinite(loss) & torch.isfinite(gradient).all(1)
        finite[rows] &= ok | done
        value[rows] = torch.where(done, value[rows], loss)
        done = done | ~ok
        state.finite_x = torch.where(done[:, None], state.finite_x, state.x)
        loss = torch.where(ok, loss, 0.0)
        gradient = torch.where(ok[:, None], gradient, 0.0)

        # the tests that torch makes after the evaluation inside an iteration; a passed one ends the outer step
        largest = gradient.abs().amax(1)
        moved = (state.direction * state.step[:, None]).abs().amax(1)
        ended = (state.inner > 0) & (
            (largest <= tolerance_grad) | (moved <= tolerance_change) | ((loss - state.loss).abs() < tolerance_change)
        )
        state.outer = state.outer + ended
        state.inner = torch.where(ended, 0, state.inner)
        boundary = state.inner == 0
        done = done | (boundary & ((largest <= tolerance_grad) | (state.outer >= steps)))
        done = done | (boundary & (state.outer > 0) & (state.outer % stop_every == 0) & (loss < stop_below))

        _iterate(state, loss, gradient, lr, tolerance_change, done)
        # the direction no longer descends: torch would end every further outer step right here
        done = done | (_descent(state) > -tolerance_change)
        move = torch.where(done, 0.0, state.step)
        state.x = torch.where(done[:, None], state.x, state.x + move[:, None] * state.direction)
        full = state.inner >= max_iter
        state.outer = state.outer + full
        state.inner = torch.where(full, 0, state.inner)
        tick += 1
    return Solution(unpack(result), value, finite, evaluations)


def _descent(state: _State) -> Tensor:
    """Return [T], the directional derivative along the current direction."""
    return (state.gradient * state.direction).sum(1)


def _iterate(state: _State, loss: Tensor, gradient: Tensor, lr: float, tolerance_change: float, done: Tensor) -> None:
    """Take in the new gradient, and set each trial's next direction and step."""
    history = state.s.shape[1]
    begun = state.iterations > 0
    s = state.direction * state.step[:, None]
    y = gradient - state.gradient
    curvature = (s * y).sum(1)
    update = (begun & ~done & (curvature > 1e-10)).nonzero()[:, 0]
    slot = state.pairs[update] % history
    state.s[update, slot] = s[update]
    state.y[update, slot] = y[update]
    state.scale[update] = curvature[update] / y[update].square().sum(1)
    state.pairs[update] += 1

    used = min(history, int(state.pairs.max()))
    direction = -gradient
    if used:
        past_s, past_y = state.s[:, :used], state.y[:, :used]
        s_dot = torch.bmm(torch.stack([y, gradient], 1), past_s.transpose(1, 2))
        y_dot = torch.bmm(torch.stack([y, s, gradient], 1), past_y.transpose(1, 2))
        state.sy[update, slot, :used] = y_dot[update, 1]
        state.sy[update, :used, slot] = s_dot[update, 0]
        state.yy[update, slot, :used] = y_dot[update, 0]
        state.yy[update, :used, slot] = y_dot[update, 0]
        # ring slots in order of age: the oldest first, unused ones last
        start = torch.where(state.pairs > history, state.pairs % history, 0)
        order = (start[:, None] + torch.arange(used, device=s.device)) % used
        valid = torch.arange(used, device=s.device) < state.pairs[:, None]
        sy = _reorder(state.sy[:, :used, :used], order)
        yy = _reorder(state.yy[:, :used, :used], order)
        both = valid[:, :, None] & valid[:, None, :]
        eye = torch.eye(used, dtype=s.dtype, device=s.device)
        upper = torch.where(both, sy.triu(), eye)
        yy = torch.where(both, yy, 0.0)
        sg = torch.where(valid, s_dot[:, 1].gather(1, order), 0.0)
        yg = torch.where(valid, y_dot[:, 2].gather(1, order), 0.0)
        a = torch.linalg.solve_triangular(upper, -sg[..., None], upper=True)[..., 0]
        yq = -yg - (yy @ a[..., None])[..., 0]
        right = upper.diagonal(dim1=1, dim2=2) * a - state.scale[:, None] * yq
        c = torch.linalg.solve_triangular(upper.transpose(1, 2), right[..., None], upper=False)[..., 0]
        a = torch.zeros_like(a).scatter(1, order, torch.where(valid, a, 0.0))
        c = torch.zeros_like(c).scatter(1, order, torch.where(valid, c, 0.0))
        q = -gradient - torch.bmm(a[:, None], past_y)[:, 0]
        direction = state.scale[:, None] * q + torch.bmm(c[:, None], past_s)[:, 0]
    state.direction = torch.where(done[:, None], state.direction, direction)
    first_step = torch.minimum(torch.ones_like(loss), 1.0 / gradient.abs().sum(1)) * lr
    state.step = torch.where(begun, torch.full_like(loss, lr), first_step)
    state.gradient = gradient
    state.loss = loss
    state.iterations = state.iterations + ~done
    state.inner = state.inner + ~done


def _reorder(square: Tensor, order: Tensor) -> Tensor:
    """Return [T, H, H] with rows and columns in the given order [T, H]."""
    size = order.shape[1]
    square = square.gather(1, order[:, :, None].expand(-1, -1, size))
    return square.gather(2, order[:, None, :].expand(-1, size, -1))
