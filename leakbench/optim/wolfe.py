"""A line search for the strong Wolfe conditions, of many rows at once, by the rules of ``torch.optim.LBFGS``.

Each row first brackets a step (Nocedal and Wright 2006, Numerical Optimization, algorithm 3.5), then narrows the
bracket (``zoom``, algorithm 3.6) with cubic interpolation. Rows are in different phases at the same time: every
evaluation tries one step of each row.

In the book's notation, phi(t) is the objective at step t along the direction, ``loss`` is phi(t), ``slope`` phi'(t),
``DECREASE`` c1 and ``CURVATURE`` c2. The comments below name the test of the algorithm that a mask stands for, in the
order of the book: algorithm 3.5 has three (too high, flat, rising), and so has ``zoom`` (too high, flat, wrong side).
"""

import torch
from torch import Tensor

from leakbench.optim.history import Rows

DECREASE = 1e-4
"""c1 of the condition of sufficient decrease (Nocedal and Wright, equation 3.7a)."""

CURVATURE = 0.9
"""c2 of the strong condition of curvature (equation 3.7b)."""


class StrongWolfe(Rows):
    """The line searches of R rows; the tensors of a bracket's two ends are [R, 2].

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
        """Use the evaluation at step ``t`` of each row, set the next step, and return the rows [R] whose search ended.

        Args:
            live: [R] bool; the other rows abandon their searches.
            loss: [R], the objective.
            slope: [R], its derivative along the direction.
            gradient: [R, N], its gradient.
            begin_gradient: [R, N], the gradient at step 0.
        """
        self.searching = self.searching & live
        # the two conditions of a step, (3.7a) violated and (3.7b) met; both algorithms test them
        high_loss = loss > self._begin_loss + DECREASE * self.t * self._begin_slope
        flat = slope.abs() <= -CURVATURE * self._begin_slope
        spent = self._tried >= self._limit

        # Algorithm 3.5. While no bracket is known, its first end holds the previous step.
        open_ended = self.searching & ~self._zooming
        # out of steps: torch takes the bracket [0, t], and its better end
        exhausted = open_ended & spent
        tested = open_ended & ~spent
        # first test; torch compares with the previous step from the third step on, the book from the second
        rises = high_loss | ((self._tried > 1) & (loss >= self._end_loss[:, 0]))
        # second test: both conditions hold, the search is over
        accepted = tested & ~rises & flat
        # first and third test: a minimum lies between the previous step and this one, which go to zoom
        bracketed = tested & ~accepted & (rises | (slope >= 0))
        # last line: no test applies, so a longer step is chosen, by extrapolation to at most ten times this one
        onward = tested & ~accepted & ~bracketed
        further = _cubic(
            (self._end_t[:, 0], self._end_loss[:, 0], self._end_slope[:, 0]),
            (self.t, loss, slope),
            self.t + 0.01 * (self.t - self._end_t[:, 0]),
            self.t * 10,
        )

        # Algorithm 3.6. ``low`` is the end with the least objective so far.
        zooming = self.searching & self._zooming
        low = self._low[:, None]
        low_t, low_loss = self._end_t.gather(1, low)[:, 0], self._end_loss.gather(1, low)[:, 0]
        high_t = self._end_t.gather(1, 1 - low)[:, 0]
        # first test: the high end moves here
        worse = zooming & (high_loss | (loss >= low_loss))
        # otherwise the low end does, and by the second test the search is over
        better = zooming & ~worse
        finished = better & flat
        # third test: phi rises towards the high end, so the minimum lies on the other side of this step, and the old
        # low end becomes the high one
        crossed = better & ~flat & (slope * (high_t - low_t) >= 0)

        # Write all of these moves of ends at once: [R, 2] masks of the ends that get this step, the old low end, or 0.
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
        # A high end that fails (3.7a) alone can be lower than the low end: torch then exchanges them.
        second_lower = (self._end_loss[:, 1] < self._end_loss[:, 0]).long()
        self._low = torch.where(bracketed | exhausted | worse, second_lower, self._low)

        # torch also ends a search in a bracket that no longer moves x by more than the tolerance
        left, right = self._end_t.amin(1), self._end_t.amax(1)
        narrow = (right - left) * self._reach < self.tolerance_change
        ended = accepted | exhausted | finished | ((bracketed | zooming) & (narrow | spent))
        self.searching = self.searching & ~ended
        self._zooming = self.searching & (bracketed | zooming)
        inside = self._inside(left, right)
        self.t = torch.where(onward, further, torch.where(self._zooming, inside, self.t))
        self._tried = self._tried + self.searching
        return ended

    def _inside(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the next step [R] within the brackets; kept away from the ends if the step before was too near."""
        ends = (self._end_t.unbind(1), self._end_loss.unbind(1), self._end_slope.unbind(1))
        (t0, t1), (loss0, loss1), (slope0, slope1) = ends
        t = _cubic((t0, loss0, slope0), (t1, loss1, slope1), left, right)
        # Torch's safeguard against a bracket that shrinks from one side by ever smaller amounts: a step within a tenth
        # of its width from an end is allowed once; the second time, or on an end, it is moved to that margin.
        margin = 0.1 * (right - left)
        near = torch.minimum(right - t, t - left) < margin
        push = near & (self._stalled | (t >= right) | (t <= left))
        self._stalled = torch.where(self._zooming, near & ~push, self._stalled)
        off = torch.where((t - right).abs() < (t - left).abs(), right - margin, left + margin)
        return torch.where(push, off, t)


End = tuple[Tensor, Tensor, Tensor]
"""Step, objective and slope at one end of each row's bracket, each [R]."""


def _cubic(one: End, two: End, low: Tensor, high: Tensor) -> Tensor:
    """Return the minimum [R] of the cubic through two ends, clipped to [low, high]; the middle if it has no minimum.

    Nocedal and Wright, equation 3.59; the sign of its d2 is the order of the two ends.
    """
    (t1, loss1, slope1), (t2, loss2, slope2) = one, two
    d1 = slope1 + slope2 - 3 * (loss1 - loss2) / (t1 - t2)
    square = d1.square() - slope1 * slope2
    d2 = square.sqrt()
    ahead = t2 - (t2 - t1) * ((slope2 + d2 - d1) / (slope2 - slope1 + 2 * d2))
    behind = t1 - (t1 - t2) * ((slope1 + d2 - d1) / (slope1 - slope2 + 2 * d2))
    found = torch.minimum(torch.maximum(torch.where(t1 <= t2, ahead, behind), low), high)
    return torch.where(square >= 0, found, (low + high) / 2)
