"""What the update of a linear layer shows by itself: its weight decay, and how many inputs it is made of.

A layer W x + b that takes the same inputs x_1 .. x_N in every step changes, by SGD of any momentum, weight decay,
number of steps and order of batches, by W_0 - W_T = sum_i e_i x_i^T + decay W_0: the rule is linear, and its factors
are numbers. So the change has rank N once the right multiple of W_0 is removed. Adam and its kind divide each entry by
a number of its own, and leave no low rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS, MAX_COLUMNS = 1024, 4096
"""Of a larger matrix, this many rows and columns are taken: they have its rank, up to the rank that can be seen."""

SMALL = 32
"""A matrix with at most this many rows (or columns) may have any rank below their number; a larger one, half of it."""

ROUNDING_SPREAD = 30.0
"""The rounding of many steps adds up to at most this many times that of one: that of 900 steps."""

CLEAR_OF_NOISE = 3.0
"""Singular values count if they exceed this many times the largest one that rounding by itself would have."""

FITTED_ROWS = 256
"""The decay is fitted on this many rows first, and on all of them if those do not show it."""

ROUNDS = 40
"""The most rounds in which the decay is fitted."""


@dataclass(frozen=True)
class LowRank:
    """The rank of a change of weights after the removal of ``decay`` times the weights before.

    Attributes:
        rank: how many singular values exceed the rounding; the full rank if rounding does not explain the others.
        limit: the largest rank that can be told from a full one.
        decay: the share of the weights before that the change contains beside the gradients; 0 if there is none.
        noise: the size up to which singular values are rounding.
    """

    rank: int
    limit: int
    decay: float
    noise: float

    @property
    def low(self) -> bool:
        """Whether the change has a low rank, as SGD leaves it."""
        return self.rank <= self.limit


def rounding_error(before: Tensor, change: Tensor, eps: float) -> float:
    """Return the root mean square of the rounding error of an entry of a change, recorded as two sets of weights.

    Args:
        before: the weights before, of any shape; zeros if the change itself was recorded.
        change: the weights before less those after.
        eps: of the number type of the record (``torch.finfo``).
    """
    root = math.sqrt(max(1, change.numel()))
    return eps * (0.25 * float(before.norm()) + float(change.norm())) / root


def low_rank(change: Tensor, before: Tensor, error: float) -> LowRank:
    """Return the rank of a change of weights, and the weight decay with which it is lowest.

    Args:
        change: [M, N], the weights before a client's training less those after; finite.
        before: [M, N], the weights before.
        error: the rounding error of an entry (``rounding_error``).
    """
    change, before = (_sample(one.detach().double()) for one in (change, before))
    rows, columns = change.shape
    limit = _limit(rows)
    best, decay = _spectrum(change, error), 0.0
    if best[1] > 2 * error and before.any():
        few = torch.linspace(0, rows - 1, min(rows, FITTED_ROWS)).round().long()
        parts = [(change[few], before[few])] + [(change, before)] * (rows > FITTED_ROWS)
        for part in parts:
            other = _refined(change, before, _fitted(*part, error), limit)
            found = _spectrum(change - other * before, error)
            if 2 * found[1] < best[1]:
                best, decay = found, other
            if best[1] <= ROUNDING_SPREAD * error:
                break
    sizes, level = best
    noise = CLEAR_OF_NOISE * max(level, error) * (math.sqrt(rows) + math.sqrt(columns))
    rank = int((sizes > noise).sum())
    if level > ROUNDING_SPREAD * error or rank > limit or not _clear(change - decay * before, rank, error):
        return LowRank(rows, limit, 0.0, noise)
    return LowRank(rank, limit, decay, noise)


def _clear(matrix: Tensor, rank: int, error: float) -> bool:
    """Return whether the rank is a low one of the rows and columns that are more than rounding, too.

    A unit that no image switches on has none, nor has a pixel that is black in all images: a matrix that has a full
    rank apart from many of them looks like one of low rank.
    """
    part = _changed(matrix, error)
    rows = len(part)
    if rows in (0, len(matrix)):
        return True
    return (
        rank <= max(math.ceil(0.75 * min(rows, SMALL)), rows // 2)
        and _spectrum(part, error)[1] <= ROUNDING_SPREAD * error
    )


def _changed(matrix: Tensor, error: float) -> Tensor:
    """Return the rows and columns that are more than rounding, with at most as many rows as columns."""
    for axis in (0, 1):
        size = matrix.norm(dim=1 - axis)
        matrix = matrix.index_select(
            axis, (size > CLEAR_OF_NOISE * error * matrix.shape[1 - axis] ** 0.5).nonzero()[:, 0]
        )
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _sample(matrix: Tensor) -> Tensor:
    """Return the matrix with at most as many rows as columns, and at most ``MAX_ROWS`` and ``MAX_COLUMNS`` of them."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    for axis, most in enumerate((MAX_ROWS, MAX_COLUMNS)):
        size = matrix.shape[axis]
        if size > most:
            matrix = matrix.index_select(axis, torch.linspace(0, size - 1, most).round().long())
    return matrix


def _spectrum(matrix: Tensor, error: float) -> tuple[Tensor, float]:
    """Return the singular values, and the error of an entry that the smallest of them show.

    Random entries of deviation s give singular values from about s (sqrt(N) - sqrt(M)) to s (sqrt(N) + sqrt(M)).
    """
    rows, columns = matrix.shape
    sizes = torch.linalg.svdvals(torch.linalg.qr(matrix.T, mode="r")[1])
    place, part = (rows - 1, 0.9) if rows <= SMALL else (3 * rows // 4, 0.6)
    return sizes, float(sizes[place]) / (math.sqrt(columns) - part * math.sqrt(rows))


def _fitted(change: Tensor, before: Tensor, error: float) -> float:
    """Return the multiple of ``before`` without which the smallest singular values are smallest."""
    best, decay = math.inf, 0.0
    for other in _decays(change, before):
        level = _spectrum(change - other * before, error)[1]
        if level < best:
            best, decay = level, other
        if best <= CLEAR_OF_NOISE * error:
            break
    return decay


def _refined(change: Tensor, before: Tensor, decay: float, kept: int) -> float:
    """Return the multiple again, from the matrices themselves: their squares lose half of the digits."""
    for _ in range(2):
        vectors = _unused(change - decay * before, kept)
        own = vectors.T @ before
        decay = float((own * (vectors.T @ change)).sum() / own.square().sum())
    return decay


def _unused(rest: Tensor, kept: int) -> Tensor:
    """Return the directions [M, M - kept] of the rows outside of the ``kept`` leading ones."""
    return torch.linalg.eigh(rest @ rest.T)[1][:, : len(rest) - kept]


def decay_error(change: Tensor, before: Tensor, error: float, found: LowRank) -> float:
    """Return the standard error of the decay of a change of weights, from the rounding that its low rank leaves.

    Args:
        change, before, error: as for ``low_rank``.
        found: what ``low_rank`` found; the error is infinite if that is no low rank.
    """
    if not found.low:
        return math.inf
    change, before = (_sample(one.detach().double()) for one in (change, before))
    rest = change - found.decay * before
    own = _unused(rest, found.limit).T @ before
    size = float(own.norm())
    return max(_spectrum(rest, error)[1], error) / size if size else math.inf


@dataclass(frozen=True)
class BiasChange:
    """How the change of a bias fits to that of its weight.

    Attributes:
        decays: whether it contains the weight's decay, too; None if that makes no difference.
        outside: the share of it, without its decay, that is outside of the directions of the weight's change, beyond
            rounding. By SGD it is the sum of the columns e_i of which the change of the weight is made.
    """

    decays: bool | None
    outside: float


def bias_change(weight: Tensor, bias: Tensor, before: Tensor, found: LowRank, eps: float) -> BiasChange:
    """Return how the change of a bias fits to that of its weight.

    Args:
        weight: [M, N], the change of the weight without its decay.
        bias: [M], that of the bias, with what it contains.
        before: [M], the bias before.
        found: the rank and the decay of the weight's change.
        eps: of the number type of the record.
    """
    weight, bias, before = weight.double(), bias.double(), before.double()
    kept = torch.linalg.svd(torch.linalg.qr(weight.T, mode="r")[1].T, full_matrices=False)[0][:, : found.rank]

    def outside(value: Tensor) -> float:
        rest, size = float((value - kept @ (kept.T @ value)).norm()), float(value.norm())
        return max(0.0, rest - ROUNDING_SPREAD * eps * (float(before.norm()) + size)) / size if size else 0.0

    without = outside(bias)
    with_decay = outside(bias - found.decay * before) if found.decay else without
    return BiasChange(None if with_decay == without else with_decay < without, min(with_decay, without))


def largest_rank(rows: int, columns: int) -> int:
    """Return the largest rank of a change [rows, columns] that ``low_rank`` tells from a full one."""
    return _limit(min(rows, columns, MAX_ROWS))


def _limit(rows: int) -> int:
    """Return the largest rank of a matrix of few rows that can be told from a full one."""
    return rows - 1 if rows <= SMALL else rows // 2


def _decays(change: Tensor, before: Tensor) -> Iterator[float]:
    """Yield multiples of ``before`` that leave the least of the change outside of some leading directions.

    The rows of the gradient of a classifier by the cross-entropy sum to zero, whatever the batch; the decay follows
    from the sum of its rows directly.
    """
    limit, total = _limit(len(change)), before.sum(0)
    if bool(total.any()):
        yield float(total @ change.sum(0) / (total @ total))
    own, cross, changed = before @ before.T, before @ change.T, change @ change.T
    for kept in dict.fromkeys(max(1, one) for one in (limit // 4, limit, limit // 16)):
        decay = 0.0
        for _ in range(ROUNDS):
            values, vectors = torch.linalg.eigh(changed - decay * (cross + cross.T) + decay**2 * own)
            rest = vectors[:, : len(values) - kept]
            size = float((rest * (own @ rest)).sum())
            new = float((rest * (cross @ rest)).sum()) / size if size > 0 else 0.0
            near = abs(new - decay) <= 1e-12 * abs(new)
            decay = new
            if near:
                break
        yield decay
