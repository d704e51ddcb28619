"""The memory of many L-BFGS searches, and the direction that each gives.

The two-loop recursion (Nocedal and Wright 2006, Numerical Optimization, algorithm 7.4) is written in its compact form
(Byrd, Nocedal, Schnabel 1994, "Representations of quasi-Newton matrices", section 2): with S and Y the steps and
gradient differences of a row, R the upper triangle of S Y^T in the order of age, D its diagonal and h the scale of the
first inverse Hessian (s y / y y of the newest pair, equation 7.20 of the book),

    a = -R^-1 S g,    c = R^-T (D a + h Y (g + Y^T a)),    d = -h (g + Y^T a) + S^T c,

which reads the history twice, once for the products with the gradient and once for the sum. R^-1 is kept instead of R:
a new pair appends a column to it, and the oldest pair leaves by its row and column, at any place. So pairs stay
in the ring slot that they were written to, and a slot that holds none is a row and column of zeros.
"""

import copy
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from leakbench.optim.solvers import call, serves


class Rows:
    """Tensors (or further Rows) with one row a search, all of which start at zero."""

    def reset(self, rows: Tensor) -> None:
        """Start these rows anew, in place."""
        for value in vars(self).values():
            if isinstance(value, Rows):
                value.reset(rows)
            elif isinstance(value, Tensor):
                value[rows] = 0

    def copied(self, deep: bool) -> Self:
        """Return another object with the same tensors, or with copies of them."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Rows):
                setattr(other, name, value.copied(deep))
            elif isinstance(value, Tensor) and deep:
                setattr(other, name, value.clone())
        return other

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor, those of further Rows included."""
        for value in vars(self).values():
            if isinstance(value, Rows):
                yield from value.tensors()
            elif isinstance(value, Tensor):
                yield value

    def take_over(self, other: Self) -> None:
        """Write the values of another object into the tensors of this one that are not the same."""
        for name, value in vars(self).items():
            new = vars(other)[name]
            if isinstance(value, Rows):
                value.take_over(new)
            elif isinstance(value, Tensor) and new is not value:
                value.copy_(new)

    def select(self, rows: Tensor) -> Self:
        """Keep only these rows."""
        for name, value in vars(self).items():
            if isinstance(value, Rows):
                value.select(rows)
            elif isinstance(value, Tensor):
                setattr(self, name, value[rows])
        return self


class History(Rows):
    """The last ``length`` pairs of every row.

    Attributes:
        s: [R, H, N], the steps.
        y: [R, H, N], the gradient differences.
        inverse: [R, H, H], the inverse of R.
        yy: [R, H, H], the products of Y with itself.
        sy: [R, H], the diagonal D.
        scale: [R], h, once there is a pair.
        pairs: [R], how many pairs were ever added.
        compiled: whether compiled code takes the place of torch's operations.
    """

    def __init__(self, x: Tensor, length: int, compiled: bool = False) -> None:
        rows, size = x.shape
        self.s = x.new_zeros(rows, length, size)
        self.y = x.new_zeros(rows, length, size)
        self.inverse = x.new_zeros(rows, length, length)
        self.yy = x.new_zeros(rows, length, length)
        self.sy = x.new_zeros(rows, length)
        self.scale = x.new_zeros(rows)
        self.pairs = torch.zeros(rows, dtype=torch.int64, device=x.device)
        self.compiled = compiled and serves(x, length)

    def direction(self, gradient: Tensor, s: Tensor, y: Tensor, keep: Tensor, used: int) -> Tensor:
        """Add a pair to some rows, and return the direction [R, N] of every row.

        Args:
            gradient: [R, N].
            s: [R, N], the step that led to this gradient.
            y: [R, N], how the gradient changed over it.
            keep: [R] bool, the rows that add the pair (s, y).
            used: how many ring slots may hold a pair in any row once these are added; the others are not read.
        """
        if self.compiled:
            out = torch.empty_like(gradient, memory_format=torch.contiguous_format)
            own = (self.s, self.y, self.inverse, self.yy, self.sy, self.scale, self.pairs)
            given = (gradient.contiguous(), s.contiguous(), y.contiguous(), keep, out)
            call("directions", (*own, *given), (*self.s.shape[1:], used), len(out))
            return out
        ring = torch.arange(len(s), device=s.device), self.pairs % self.s.shape[1]
        _put(self.s, ring, s, keep)
        _put(self.y, ring, y, keep)
        pair = torch.stack([y, gradient], 1)
        s_y, s_g = torch.bmm(pair, self.s[:, :used].transpose(1, 2)).unbind(1)
        y_y, y_g = torch.bmm(pair, self.y[:, :used].transpose(1, 2)).unbind(1)
        self._append(ring, s_y, y_y, keep, used)

        # the formulas of the module's docstring: a, c, and d as ``past`` - h g
        inverse, yy = self.inverse[:, :used, :used], self.yy[:, :used, :used]
        scale = torch.where(self.pairs > 0, self.scale, 1.0)[:, None]
        a = -_times(inverse, s_g)
        c = _times(inverse.mT, self.sy[:, :used] * a + scale * (y_g + _times(yy, a)))
        past = torch.bmm(c[:, None], self.s[:, :used]) - torch.bmm((scale * a)[:, None], self.y[:, :used])
        return past[:, 0].sub_(scale * gradient)

    def _append(self, ring: tuple[Tensor, Tensor], s_y: Tensor, y_y: Tensor, keep: Tensor, used: int) -> None:
        """Bring the small matrices up to date with the pair in each row's ring slot."""
        inverse, yy = self.inverse[:, :used, :used], self.yy[:, :used, :used]
        curvature, square = s_y[ring], y_y[ring]
        _put(inverse, ring, torch.zeros_like(s_y), keep)
        # R gets the column (S y, s y): its inverse gets -R^-1 S y / s y, with 1 / s y on the diagonal
        others = s_y.clone()
        others[ring] = 0
        column = -_times(inverse, others) / curvature[:, None]
        column[ring] = 1 / curvature
        _put(inverse.mT, ring, column, keep)
        _put(yy, ring, y_y, keep)
        _put(yy.mT, ring, y_y, keep)
        _put(self.sy, ring, curvature, keep)
        self.scale = torch.where(keep, curvature / square, self.scale)
        self.pairs = self.pairs + keep


def _put(into: Tensor, at: tuple[Tensor, Tensor], values: Tensor, keep: Tensor) -> None:
    """Write values [R, ...] to one place of each row of [R, H, ...], in place, where ``keep`` holds."""
    into[at] = torch.where(keep.view(-1, *[1] * (values.ndim - 1)), values, into[at])


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the products [R, H] of matrices [R, H, H] with vectors [R, H]."""
    return torch.bmm(vector[:, None], matrix.mT)[:, 0]
