"""Every image of a batch, or of a whole local training, from the change of the first linear layer before a ReLU.

The change of W x + b is E X, the errors [M, N] times the N inputs, and that of b is E 1 (``gradients.low_rank``). A
unit that a ReLU switches off for an image has no error there, so each column of E has many zeros. Of all vectors in the
space of the change's columns, the columns of E are those with the most zeros; with them the inputs follow. After SPEAR
(Dimitrov et al. 2024, arXiv 2403.03945), which finds a column from rows in which it is zero. Above a dozen images, a
search for sparse vectors finds columns without such luck, and one that leaves out the columns that were found finds the
rest. A vector that mixes two columns shows itself by the rows where both are zero, and is split.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.gradients.low_rank import LowRank

MAX_SAMPLED = 12
"""Up to this many images, random sets of rows are tried too: about two to their number are needed."""

SAMPLES, SAMPLINGS = 4096, 16
"""How many sets of rows are tried at a time, and how often."""

STARTS, STEPS, SEARCHES = 96, 120, 80
"""Starts of a search, its steps, and the most searches. Each has its own subset of the rows, hence its own optima."""

FRUITLESS = 20
"""After this many searches without any column, none is expected: there are too few zeros."""

MIN_ROWS = 0.25
"""The least share of the rows in a subset."""

SPREAD = 0.3
"""The size of the noise on a start, relative to it."""

SHRINK, SHRINK_END = 0.8, 0.24
"""What a search subtracts from values of root mean square 1: at its first step and at its last."""

ROUNDINGS = 4
"""How often a direction is replaced by the one that is zero at its smallest values."""

REWEIGHTINGS, MISSING_STARTS = 30, 24
"""Steps of the search for a missing column, and how many searches are made at a time."""

FREE_ROWS = 3
"""The number of rows that are left out in the test of whether zeros determine a direction."""

EIGENVALUE_ROUNDING = 1e-14
"""The rounding of eigenvalues, relative to those of orthonormal columns."""

ANGLES, CANDIDATES = 2000, 4
"""The bins in which the directions of a plane are counted, and how many of the fullest are looked at."""

MIN_ZEROS = 0.25
"""The least share of zeros of a column. A sum of two columns has about a quarter."""

LIKE = 0.7
"""The least share of zeros of a column, relative to that of the column with the most."""

SAME = 1 - 1e-3
"""The cosine from which on two directions count as one."""

MIN_ANGLE = 1e-3
"""The least singular value of a set of independent directions."""

ROUNDING_MARGIN, MAX_ZERO = 10.0, 0.02
"""A value counts as zero up to this many times its rounding error, at most this share of the column's largest."""


@dataclass(frozen=True)
class Disaggregation:
    """The inputs of which a change is made.

    Attributes:
        inputs: [N, S] float64, in no order.
        errors: [M, N] float64, their errors, summed over the steps.
        found: how many of the N columns were found with as many zeros as a column has; the inputs are right only if
            all were.
        zeros: [N], the share of zeros of each column.
    """

    inputs: Tensor
    errors: Tensor
    found: int
    zeros: Tensor

    @property
    def complete(self) -> bool:
        """Whether every column was found."""
        return self.found == len(self.inputs)

    def agreement(self, *layers: tuple[Tensor, Tensor]) -> float:
        """Return the least share, of all inputs, of units that are on where, and only where, they have an error.

        It needs no truth: with a wrong column, inputs are wrong and contradict the errors. Units that the training may
        have switched on or off, as they moved by more than they are from 0, do not count.

        Args:
            layers: weight [M, S] and bias [M] before the training; and after it, if there were several steps.
        """
        values = torch.stack([self.inputs @ weight.T + bias for weight, bias in layers])
        clear = values.abs().amin(0) > values.amax(0) - values.amin(0)
        against = clear & ((values[0] > 0) != (self.errors.T != 0))
        return float(1 - (against.sum(1) / clear.sum(1).clamp(min=1)).max())


def disaggregate(change: Tensor, bias: Tensor, found: LowRank, rng: torch.Generator) -> Disaggregation | None:
    """Return the inputs of a linear layer before a ReLU; None if the columns found do not span the change.

    Args:
        change: [M, S], the weights before less those after, without decay; or the gradient.
        bias: [M], likewise.
        found: the rank of the change (``low_rank``): the number of the inputs.
        rng: of rows and starts.
    """
    change, bias = change.double(), bias.double()
    count = found.rank
    triangle = torch.linalg.qr(change.T, mode="r")[1]
    left, sizes, _ = torch.linalg.svd(triangle.T)
    left = left[:, :count]
    rest = left.T @ change
    error = found.noise / (change.shape[0] ** 0.5 + change.shape[1] ** 0.5)
    live = left[change.norm(dim=1) > found.noise]
    if count == 1:
        basis, complete = torch.ones(1, 1, dtype=change.dtype), 1
    elif len(live) < 2 * count:
        return None
    else:
        columns = _Columns(live, ROUNDING_MARGIN * error / float(sizes[count - 1]))
        basis, complete = _search(columns, rng)
    if len(basis) < count:
        return None
    mixing = basis.T  # column i of the errors is left @ mixing[:, i]
    scale = torch.linalg.solve(mixing, left.T @ bias)
    errors = left @ mixing
    size = errors.abs().amax(0)
    zero = errors.abs() <= (ROUNDING_MARGIN * error / sizes[count - 1]).clamp(max=MAX_ZERO * size)
    errors = torch.where(zero, 0.0, errors) * scale
    inputs = torch.linalg.solve(mixing, rest) / scale[:, None]
    return Disaggregation(inputs, errors, complete, zero.double().mean(0))


@dataclass(frozen=True)
class _Columns:
    """The space of the columns.

    Attributes:
        rows: [m, N], an orthonormal basis of it, without the rows that no input changes.
        tolerance: up to which a value of ``rows @ direction`` is zero.
    """

    rows: Tensor
    tolerance: float

    def zeros(self, directions: Tensor) -> Tensor:
        """Return the share of zeros of the vector of each direction [k, N]."""
        values = (directions @ self.rows.T).abs()
        return (values <= (MAX_ZERO * values.amax(1, keepdim=True)).clamp(max=self.tolerance)).double().mean(1)

    def rounded(self, directions: Tensor) -> Tensor:
        """Return directions [k, N] that are exactly zero in N - 1 rows: those of the smallest values."""
        for _ in range(ROUNDINGS):
            small = (directions @ self.rows.T).abs().topk(self.rows.shape[1] - 1, 1, largest=False).indices
            directions = _orthogonal(self.rows[small], directions)
        return directions

    def free(self, direction: Tensor) -> Tensor:
        """Return a basis [N, k] of the directions that are zero in nearly all rows in which this one [N] is.

        k is 1 if its zeros determine it. The zeros of a mixture are those that its columns have in common, and one for
        each free factor: without these few rows, k is at least 2.
        """
        values = (self.rows @ direction).abs()
        zero = self.rows[values <= min(self.tolerance, MAX_ZERO * float(values.max()))]
        for _ in range(FREE_ROWS + 1):
            found, vectors = torch.linalg.eigh(zero.T @ zero)
            flat = vectors[:, found <= len(zero) * self.tolerance**2 + EIGENVALUE_ROUNDING]
            if flat.shape[1] > 1 or len(zero) < len(direction):
                return flat
            largest = (zero @ vectors[:, 1]).abs().argmax()
            zero = torch.cat([zero[:largest], zero[largest + 1 :]])
        return vectors[:, :1]

    def split(self, direction: Tensor) -> Tensor:
        """Return the columns [k, N] of which a direction [N] mixes two; none if it does not.

        A mixture of two is zero where both are, so that the rows where it is zero leave a plane of directions. Each
        other row is zero for one direction of the plane; the two for which most rows are, are the columns.
        """
        flat = self.free(direction)
        if flat.shape[1] != 2:
            return self.rows[:0]
        first, second = (self.rows @ flat).T
        size = torch.hypot(first, second)
        angles = torch.atan2(-first, second)[size > self.tolerance].remainder(torch.pi)
        counts = torch.histc(angles, ANGLES, 0.0, torch.pi)
        middle = (counts.topk(CANDIDATES).indices + 0.5) * torch.pi / ANGLES
        near = (
            angles[:, None] - middle
        ).abs() <= torch.pi / ANGLES  # the median of a peak's angles is that of its rows
        peaks = torch.stack([angles[one].median() for one in near.T])
        return self.rounded(torch.stack([peaks.cos(), peaks.sin()], 1) @ flat.T)

    def fitted(self, direction: Tensor) -> Tensor:
        """Return the direction [N] that is nearest to zero in all rows in which this one is."""
        values = (self.rows @ direction).abs()
        zero = self.rows[values <= min(self.tolerance, MAX_ZERO * float(values.max()))]
        if len(zero) < len(direction):
            return direction
        new = torch.linalg.eigh(zero.T @ zero)[1][:, 0]
        return new if float(self.zeros(new[None])) >= float(self.zeros(direction[None])) else direction


@dataclass(frozen=True)
class _Pool:
    """Directions [k, N] of norm 1 that have many zeros, those with the most first, and the shares of these [k]."""

    directions: Tensor
    zeros: Tensor

    def joined(self, columns: _Columns, others: Tensor) -> "_Pool":
        """Return the pool with those of other directions that have enough zeros and are not in it."""
        shares = columns.zeros(others)
        kept = torch.isfinite(others).all(1) & (shares >= MIN_ZEROS)
        every = torch.cat([self.directions, others[kept]])
        order = torch.cat([self.zeros, shares[kept]]).argsort(descending=True, stable=True)
        every, shares = every[order], torch.cat([self.zeros, shares[kept]])[order]
        alike = (every @ every.T).abs() > SAME
        new = ~alike.tril(-1).any(1)
        return _Pool(every[new], shares[new])

    def basis(self) -> tuple[Tensor, Tensor]:
        """Return independent directions, those with the most zeros first, and their shares of zeros."""
        count = self.directions.shape[1]
        chosen: list[int] = []
        for place in range(len(self.directions)):
            trial = self.directions[[*chosen, place]]
            if float(torch.linalg.svdvals(trial)[-1]) > MIN_ANGLE:
                chosen.append(place)
            if len(chosen) == count:
                break
        return self.directions[chosen], self.zeros[chosen]


def _search(columns: _Columns, rng: torch.Generator) -> tuple[Tensor, int]:
    """Return independent directions, as many as there are columns if possible, and how many have a column's zeros."""
    count = columns.rows.shape[1]
    pool = _Pool(columns.rows[:0], columns.rows[:0, 0])
    basis, right = columns.rows[:0], torch.zeros(0, dtype=torch.bool)
    for turn in range(SEARCHES):
        new = columns.rounded(_sparse(columns.rows, rng))
        if count <= MAX_SAMPLED and turn < SAMPLINGS:
            new = torch.cat([new, _sampled(columns, rng)])
        pool = pool.joined(columns, new)
        basis, right = _basis(columns, pool)
        if turn == FRUITLESS and not bool(right.any()):
            break
        if 0 < int(right.sum()) < count:
            further = columns.rounded(_missing(columns.rows, basis[right], rng))
            mixed = [columns.split(one) for one in basis[~right]]
            pool = pool.joined(columns, torch.cat([further, *mixed]))
            basis, right = _basis(columns, pool)
        if int(right.sum()) == count:
            break
    return (torch.stack([columns.fitted(one) for one in basis]) if len(basis) else basis), int(right.sum())


def _basis(columns: _Columns, pool: _Pool) -> tuple[Tensor, Tensor]:
    """Return independent directions [k, N], and which of them [k] are columns.

    A column has as many zeros as others, and these determine it.
    """
    basis, zeros = pool.basis()
    alone = torch.tensor([columns.free(one).shape[1] == 1 for one in basis], dtype=torch.bool)
    return basis, alone & (zeros >= LIKE * zeros[:1].sum())


def _orthogonal(rows: Tensor, start: Tensor) -> Tensor:
    """Return directions [k, N] of norm 1 orthogonal to N - 1 rows each [k, N - 1, N], NaN where the rows depend.

    ``start`` [k, N] are vectors that the directions are not orthogonal to.
    """
    wanted = torch.zeros(len(rows), rows.shape[2], 1, dtype=rows.dtype)
    wanted[:, -1] = 1
    found, failed = torch.linalg.solve_ex(torch.cat([rows, start[:, None]], 1), wanted)
    found = found[..., 0]
    size = found.norm(dim=1, keepdim=True)
    return torch.where((failed == 0)[:, None] & torch.isfinite(size), found / size, start)


def _sampled(columns: _Columns, rng: torch.Generator) -> Tensor:
    """Return directions that are zero in random sets of rows, those that may be columns."""
    rows, count = columns.rows, columns.rows.shape[1]
    chosen = torch.randint(len(rows), (SAMPLES, count - 1), generator=rng)
    start = torch.randn(SAMPLES, count, generator=rng, dtype=rows.dtype)
    found = _orthogonal(rows[chosen], start / start.norm(dim=1, keepdim=True))
    return found[columns.zeros(found) >= MIN_ZEROS]


def _sparse(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Return directions that a search for sparse vectors in the columns of a random subset of the rows ends at.

    It alternates between shrinking the values towards zero and projecting them on the space of the columns (Qu, Sun
    and Wright 2014, arXiv 1412.4659).
    """
    count = rows.shape[1]
    share = MIN_ROWS + (1 - MIN_ROWS) * float(torch.rand((), generator=rng))
    size = min(len(rows), max(3 * count, int(share * len(rows))))
    part, triangle = torch.linalg.qr(rows[torch.randperm(len(rows), generator=rng)[:size]])
    noise = SPREAD * torch.randn(STARTS, count, generator=rng, dtype=rows.dtype) / size**0.5
    found = part[torch.randint(size, (STARTS,), generator=rng)] + noise
    found = found / found.norm(dim=1, keepdim=True)
    for step in range(STEPS):
        level = SHRINK + (SHRINK_END - SHRINK) * step / STEPS
        new = torch.nn.functional.softshrink(found @ part.T, level / size**0.5) @ part
        length = new.norm(dim=1, keepdim=True)
        found = torch.where(length > 0, new / length, found)
    whole = torch.linalg.solve_triangular(triangle, found.T, upper=True).T
    return whole / whole.norm(dim=1, keepdim=True)


def _missing(rows: Tensor, known: Tensor, rng: torch.Generator) -> Tensor:
    """Return directions with many values near zero, among those with a part outside of the known ones.

    Each has its own random subset of the rows. The sum of log(value^2 + least^2) is made small by reweighted least
    squares, with an ever smaller ``least``; the known directions, which have no such part, cannot be the answer.

    Args:
        rows: [m, N].
        known: [k, N], the directions that were found.
        rng: of the parts and subsets.
    """
    rest = torch.linalg.svd(known, full_matrices=True)[2][len(known) :]
    part = torch.randn(MISSING_STARTS, len(rest), generator=rng, dtype=rows.dtype) @ rest
    part = part / part.norm(dim=1, keepdim=True)
    share = MIN_ROWS + (1 - MIN_ROWS) * torch.rand(MISSING_STARTS, 1, generator=rng, dtype=rows.dtype)
    weights = (torch.rand(MISSING_STARTS, len(rows), generator=rng, dtype=rows.dtype) < share).to(rows)
    subset, found = weights, part
    for step in range(REWEIGHTINGS):
        square = torch.einsum("km,mi,mj->kij", weights, rows, rows)
        solved = torch.linalg.solve_ex(square, part[..., None])[0][..., 0]
        found = solved / (solved * part).sum(1, keepdim=True)
        values = found @ rows.T
        least = values.square().mean(1, keepdim=True) * 10.0 ** (-8.0 * step / REWEIGHTINGS)
        weights = subset / (values.square() + least)
        weights = weights / weights.mean(1, keepdim=True)
    return found / found.norm(dim=1, keepdim=True)
