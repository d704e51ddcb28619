"""A line search for the strong Wolfe conditions, of many rows at once, by the rules of ``torch.optim.LBFGS``.

Each row first brackets a step (Nocedal and Wright 2006, Numerical Optimization, algorithm 3.5), then narrows the
bracket (algorithm 3.6) with cubic interpolation. Rows are in different phases at the same time: every evaluation tries
one step of each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leakbench.optim.history import Rows

DECREASE = 1e-4
CURVATURE = 0.9


class StrongWolfe(Rows):
    """The searches of R rows; all that concerns the ends of a bracket is [R, 2].

    Attributes:
        searching: [R] bool, a search is under way.
        t: [R], the step to be tried next.
    """

    def __init__(self, x: Tensor, tolerance_change: float) -> None:
        rows = len(x)
        self.tolerance_change = tolerance_change
        self.searching = torch.zeros(rows, dtype=torch.bool, device=x.device)
        self.t = x.new_zeros(rows)
        self._zooming = self.searching.clone()
        self._stalled = self.searching.clone()
        self._tried = torch.zeros(rows, dtype=torch.int64, device=x.device)
        self._limit = self._tried.clone()
        self._low = self._tried.clone()
        self._reach, self._begin_loss, self._begin_slope = (x.new_zeros(rows) for _ in range(3))
        self._end_t, self._end_loss, self._end_slope = (x.new_zeros(rows, 2) for _ in range(3))
        self._end_gradient = x.new_zeros(rows, 2, x.shape[1])

    def begin(
        self, rows: Tensor, t: Tensor, loss: Tensor, slope: Tensor, gradient: Tensor, reach: Tensor, limit: Tensor
    ) -> None:
        """Begin a search in some rows.

        Args:
            rows: [R] bool.
            t: [R], the first step to try.
            loss: [R], the objective at step 0.
            slope: [R], its derivative along the direction, below 0.
            gradient: [R, N], its gradient.
            reach: [R], the largest entry of the direction.
            limit: [R], steps that may be tried after the first.
        """
        begins = rows[:, None]
        self.searching = self.searching | rows
        self.t = torch.where(rows, t, self.t)
        self._zooming = self._zooming & ~rows
        self._stalled = self._stalled & ~rows
        self._tried = torch.where(rows, 0, self._tried)
        self._limit = torch.where(rows, limit, self._limit)
        self._low = torch.where(rows, 0, self._low)
        self._reach = torch.where(rows, reach, self._reach)
        self._begin_loss = torch.where(rows, loss, self._begin_loss)
        self._begin_slope = torch.where(rows, slope, self._begin_slope)
        self._end_t = torch.where(begins, 0.0, self._end_t)
        self._end_loss = torch.where(begins, loss[:, None], self._end_loss)
        self._end_slope = torch.where(begins, slope[:, None], self._end_slope)
        self._end_gradient = torch.where(begins[:, None], gradient[:, None], self._end_gradient)

    def chosen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the better end of each row's bracket: step [R], objective [R] and gradient [R, N]."""
        end = torch.arange(len(self._low), device=self._low.device), self._low
        return self._end_t[end], self._end_loss[end], self._end_gradient[end]

    def take(self, live: Tensor, loss: Tensor, slope: Tensor, gradient: Tensor, begin_gradient: Tensor) -> Tensor:
        """Take in what the step ``t`` of each row gave, set the next one, and return the rows [R] whose search ended.

        Args:
            live: [R] bool; the searches of other rows are given up.
            loss: [R], the objective.
            slope: [R], its derivative along the direction.
            gradient: [R, N], its gradient.
            begin_gradient: [R, N], the gradient at step 0.
        """
        self.searching = self.searching & live
        high_loss = loss > self._begin_loss + DECREASE * self.t * self._begin_slope
        flat = slope.abs() <= -CURVATURE * self._begin_slope
        spent = self._tried >= self._limit

        # while no bracket is known, its first end holds the previous step
        open_ended = self.searching & ~self._zooming
        exhausted = open_ended & spent
        tested = open_ended & ~spent
        rises = high_loss | ((self._tried > 1) & (loss >= self._end_loss[:, 0]))
        accepted = tested & ~rises & flat
        bracketed = tested & ~accepted & (rises | (slope >= 0))
        onward = tested & ~accepted & ~bracketed
        further = _cubic(
            (self._end_t[:, 0], self._end_loss[:, 0], self._end_slope[:, 0]),
            (self.t, loss, slope),
            self.t + 0.01 * (self.t - self._end_t[:, 0]),
            self.t * 10,
        )

        zooming = self.searching & self._zooming
        low = self._low[:, None]
        low_t, low_loss = self._end_t.gather(1, low)[:, 0], self._end_loss.gather(1, low)[:, 0]
        high_t = self._end_t.gather(1, 1 - low)[:, 0]
        worse = zooming & (high_loss | (loss >= low_loss))
        better = zooming & ~worse
        settled = better & flat
        crossed = better & ~flat & (slope * (high_t - low_t) >= 0)

        first = torch.arange(2, device=loss.device) == 0
        is_low = torch.stack([self._low == 0, self._low == 1], 1)
        new = (
            ((accepted | onward)[:, None] & first)
            | ((bracketed | exhausted)[:, None] & ~first)
            | (worse[:, None] & ~is_low)
            | (better[:, None] & is_low)
        )
        old_low = crossed[:, None] & ~is_low
        old_begin = exhausted[:, None] & first

        def place(ends: Tensor, value: Tensor, begin: Tensor | float) -> Tensor:
            """Return the ends [R, 2, ...] of the next bracket, made of new values, the old low end and the begin."""
            shape = (*new.shape, *[1] * (ends.ndim - 2))
            was_low = ends[torch.arange(len(ends), device=ends.device), self._low].unsqueeze(1)
            ends = torch.where(old_low.view(shape), was_low, ends)
            ends = torch.where(old_begin.view(shape), begin, ends)
            return torch.where(new.view(shape), value.unsqueeze(1), ends)

        self._end_gradient = place(self._end_gradient, gradient, begin_gradient.unsqueeze(1))
        self._end_slope = place(self._end_slope, slope, self._begin_slope[:, None])
        self._end_t = place(self._end_t, self.t, 0.0)
        self._end_loss = place(self._end_loss, loss, self._begin_loss[:, None])
        second_lower = (self._end_loss[:, 1] < self._end_loss[:, 0]).long()
        self._low = torch.where(bracketed | exhausted | worse, second_lower, self._low)

        left, right = self._end_t.amin(1), self._end_t.amax(1)
        narrow = (right - left) * self._reach < self.tolerance_change
        ended = accepted | exhausted | settled | ((bracketed | zooming) & (narrow | spent))
        self.searching = self.searching & ~ended
        self._zooming = self.searching & (bracketed | zooming)
        inside = self._inside(left, right)
        self.t = torch.where(onward, further, torch.where(self._zooming, inside, self.t))
        self._tried = self._tried + self.searching
        return ended

    def _inside(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the next step [R] within the brackets; kept off the ends where the steps before it were too near."""
        ends = (self._end_t.unbind(1), self._end_loss.unbind(1), self._end_slope.unbind(1))
        (t0, t1), (loss0, loss1), (slope0, slope1) = ends
        t = _cubic((t0, loss0, slope0), (t1, loss1, slope1), left, right)
        margin = 0.1 * (right - left)
        near = torch.minimum(right - t, t - left) < margin
        push = near & (self._stalled | (t >= right) | (t <= left))
        self._stalled = torch.where(self._zooming, near & ~push, self._stalled)
        off = torch.where((t - right).abs() < (t - left).abs(), right - margin, left + margin)
        return torch.where(push, off, t)


Point = tuple[Tensor, Tensor, Tensor]
"""Step, objective and slope, each [R]."""


def _cubic(one: Point, two: Point, low: Tensor, high: Tensor) -> Tensor:
    """Return the minimum [R] of the cubic through two points, clipped to [low, high]; the middle where it has none."""
    (t1, loss1, slope1), (t2, loss2, slope2) = one, two
    d1 = slope1 + slope2 - 3 * (loss1 - loss2) / (t1 - t2)
    square = d1.square() - slope1 * slope2
    d2 = square.sqrt()
    ahead = t2 - (t2 - t1) * ((slope2 + d2 - d1) / (slope2 - slope1 + 2 * d2))
    behind = t1 - (t1 - t2) * ((slope1 + d2 - d1) / (slope1 - slope2 + 2 * d2))
    found = torch.minimum(torch.maximum(torch.where(t1 <= t2, ahead, behind), low), high)
    return torch.where(square >= 0, found, (low + high) / 2)
