"""Every image of a batch, or of a whole local training, from the change of the first linear layer before a ReLU.

The change of W x + b is E X, the errors [M, N] times the N inputs, and that of b is E 1 (``gradients.low_rank``). A
unit that a ReLU switches off for an image has no error there, so each column of E has many zeros. A vector in the space
of the columns is one of them if its zeros determine it, whichever few of them are left out, and if a half-space of
inputs separates the units that it switches on from the others, as x separates them by W x + b. With all columns the
inputs follow.

After SPEAR (Dimitrov et al. 2024, arXiv 2403.03945), which finds a column from random rows in which it is zero. Here
these are rows in which few images should be on: there are many if the inputs are positive, as pixels are. The columns
that were found leave a space for the other inputs, and hence better rows. A vector that mixes a few columns is zero
where all of these are; the problem of these few columns is solved by itself. A search for sparse vectors finds columns
if no rows are better than others. Columns that differ in nothing but their zeros follow directly (``shared_errors``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.attacks.shared_errors import columns_of
from leakbench.gradients.low_rank import LowRank, largest_rank

SAMPLES, MANY, FEWER_SAMPLES = 4096, 16, 2048
"""How many sets of rows are tried at a time; above this many images, fewer."""

ROW_SHARES = 0.1, 0.35
"""The least and the largest share of the rows of which the sets are drawn: those in which few images should be on."""

TURNS, TESTS = 300, 6000
"""The most turns of the search, and the most directions that are tested."""

FRUITLESS, PATIENCE, DOUBTED = 20, 20, 6
"""After this many turns without any column, none is expected: there are too few zeros. After this many without a better
set of columns, none better is expected; up to this many of the set, the worst separated, are looked for again."""

TESTED = 25
"""The most directions that are tested in a turn for each way of finding them."""

CONSIDERED = 512
"""The most directions, those with the most zeros, of which each is compared with all that are known."""

STARTS, STEPS = 96, 120
"""Starts of a search for sparse vectors, and its steps. Each has its own subset of the rows, hence its own optima."""

MIN_ROWS = 0.25
"""The least share of the rows in a subset."""

SPREAD = 0.3
"""The size of the noise on a start, relative to it."""

SHRINK, SHRINK_END = 0.8, 0.24
"""What a search subtracts from values of root mean square 1: at its first step and at its last."""

REWEIGHTINGS, MISSING_STARTS = 30, 24
"""Steps of the search for a missing column, and how many searches are made at a time."""

FREE_ROWS, ESSENTIAL = 3, 0.95
"""In the test of whether zeros determine a direction, this many rows are left out, and those of so high a leverage."""

EIGENVALUE_ROUNDING = 1e-14
"""The rounding of eigenvalues, relative to those of orthonormal columns."""

MORE_ZEROS = 8
"""A column has at least this many zeros more than any direction can be given."""

ROWS_EACH = 2
"""Several columns are looked for if there are at least this many rows for each."""

MAX_MIXED, MAX_FLATS, SPLITS = 6, 200, 64
"""Mixtures of up to this many columns are split; how many are remembered; sets of rows for each column in a split."""

SEPARATED, SEPARATED_TRAINED, LEAST_SEPARATED = 0.97, 0.8, 0.75
"""The share of units that a half-space separates: of a column in one step, and in several; below the last, of none."""

NEWTON_STEPS, RIDGE = 8, 1e-3
"""Steps of the logistic regression that looks for the half-space, and its penalty."""

CONSISTENT, CONSISTENT_TRAINED = 0.99, 0.97
"""The share of units that agree with their errors, for the search to end: in one step, and in several."""

SEARCHES, CONTRADICTED = 2, 0.75
"""The most searches, and the share of units that agree below which another one is made."""

SAME = 1 - 1e-3
"""The cosine from which on two directions count as one."""

MIN_ANGLE = 1e-3
"""The least singular value of a set of independent directions."""

ROUNDING_MARGIN, MAX_ZERO = 10.0, 0.02
"""A value counts as zero up to this many times its rounding error, at most this share of the column's largest."""

LOOSE, STRICT, RESOLVED = 30.0, 0.4, 100.0
"""Factors of the size of a zero: in a first test, in the last fit, and for a row to be large enough to tell one."""


@dataclass(frozen=True)
class Disaggregation:
    """The inputs of which a change is made.

    Attributes:
        count: the number N of inputs.
        inputs: [N, S] float64, in no order; none if not all columns of the errors were found.
        errors: [M, k] float64, the columns that were found, summed over the steps; of a size of their own if k < N.
    """

    count: int
    inputs: Tensor
    errors: Tensor

    @property
    def found(self) -> int:
        """How many columns were found."""
        return self.errors.shape[1]

    @property
    def complete(self) -> bool:
        """Whether every column was found."""
        return self.found == self.count

    def agreement(self, *layers: tuple[Tensor, Tensor]) -> float:
        """Return the least share, of all inputs, of units that are on where, and only where, they have an error.

        It needs no truth: with a wrong column, inputs are wrong and contradict the errors. Units that the training may
        have switched on or off, as they moved by more than they are from 0, do not count.

        Args:
            layers: weight [M, S] and bias [M] before the training; and after it, if there were several steps.
        """
        values = torch.stack([self.inputs @ weight.T + bias for weight, bias in layers])
        return _agreements(values, self.errors.T != 0)[0]


def _agreements(values: Tensor, on: Tensor) -> list[float]:
    """Return the shares [N] of clear units that agree, the least first.

    Args:
        values: [layers, N, M], of units before the ReLU.
        on: [N, M], which units have an error.
    """
    clear = values.abs().amin(0) > values.amax(0) - values.amin(0)
    against = clear & ((values[0] > 0) != on)
    shares: list[float] = (1 - against.sum(1) / clear.sum(1).clamp(min=1)).sort().values.tolist()
    return shares


def most_inputs(rows: int, columns: int) -> int:
    """Return how many inputs ``disaggregate`` finds at the most in a change [rows, columns], by these numbers alone.

    More are no low rank, or have too few rows for the zeros of several columns.
    """
    return min(largest_rank(rows, columns), max(1, min(rows // ROWS_EACH, rows - MORE_ZEROS)))


def disaggregate(
    change: Tensor,
    bias: Tensor,
    found: LowRank,
    layers: Sequence[tuple[Tensor, Tensor]],
    rng: torch.Generator,
    shared: Tensor | None = None,
) -> Disaggregation:
    """Return the inputs of a linear layer before a ReLU, if the columns of their errors can be found.

    A search that ends without them, or with ones that contradict the layer, is made again with other rows and starts.

    Args:
        change: [M, S], the weights before less those after, without decay; or the gradient.
        bias: [M], likewise.
        found: the rank of the change (``low_rank``): the number of the inputs.
        layers: weight [M, S] and bias [M] before the training; and after it, if there were several steps.
        rng: of rows and starts.
        shared: [M], the errors that all images share up to factors (``shared_errors``); None if they do not.
    """
    best, agreement = None, -1.0
    for _ in range(SEARCHES):
        one = _searched(change.double(), bias.double(), found, layers, rng, shared)
        agrees = one.agreement(*((weight.double(), own.double()) for weight, own in layers)) if one.complete else -1.0
        if best is None or (one.found, agrees) > (best.found, agreement):
            best, agreement = one, agrees
        if agreement >= CONTRADICTED or found.rank == 1:
            break
    assert best is not None
    return best


def _searched(
    change: Tensor,
    bias: Tensor,
    found: LowRank,
    layers: Sequence[tuple[Tensor, Tensor]],
    rng: torch.Generator,
    shared: Tensor | None,
) -> Disaggregation:
    """Return what one search finds (``disaggregate``)."""
    count = found.rank
    triangle = torch.linalg.qr(change.T, mode="r")[1]
    left, sizes, _ = torch.linalg.svd(triangle.T)
    left = left[:, :count]
    rest = left.T @ change
    error = found.noise / (change.shape[0] ** 0.5 + change.shape[1] ** 0.5)
    tolerance = ROUNDING_MARGIN * error / float(sizes[count - 1])
    basis = torch.ones(1, 1, dtype=change.dtype)
    if count > 1:
        gates = torch.stack([weight.double() @ rest.T for weight, _ in layers])
        columns = _Columns(left, tolerance, gates, torch.stack([one.double() for _, one in layers]), left.T @ bias)
        first = left[:0] if shared is None else columns_of(left, shared, rng)
        basis = _Search(columns, rng).run(first) if len(columns.rows) >= ROWS_EACH * count else left[:0]
        if len(basis) < count:
            return Disaggregation(count, rest[:0], left @ basis.T)
    mixing = basis.T  # column i of the errors is left @ mixing[:, i]
    scale = torch.linalg.solve(mixing, left.T @ bias)
    errors = left @ mixing
    zero = errors.abs() <= (MAX_ZERO * errors.abs().amax(0)).clamp(max=tolerance)
    errors = torch.where(zero, 0.0, errors) * scale
    inputs = torch.linalg.solve(mixing, rest) / scale[:, None]
    return Disaggregation(count, inputs, errors)


class _Columns:
    """The space of the columns.

    Attributes:
        left: [M, N], an orthonormal basis of it.
        rows: [m, N], those rows of it that are large enough to tell a zero.
        tolerance: up to which a value of ``rows @ direction`` is zero.
        gates: [layers, M, N] and ``offsets`` [layers, M]: an input a @ rest has the values gates @ a + offsets.
        total: [N], the change of the bias is left @ total, so that a @ total is 1 for each input.
    """

    def __init__(self, left: Tensor, tolerance: float, gates: Tensor, offsets: Tensor, total: Tensor) -> None:
        """Keep what the layer shows; see the class."""
        self.left, self.tolerance, self.gates, self.offsets, self.total = left, tolerance, gates, offsets, total
        self.live = left.norm(dim=1) > RESOLVED * tolerance
        self.rows = left[self.live]
        features = torch.cat([gates.mean(0), offsets.mean(0)[:, None]], 1)
        self.features = features / features.norm(dim=0).clamp(min=1e-300) * len(features) ** 0.5

    @property
    def count(self) -> int:
        """The number of columns."""
        return self.left.shape[1]

    @property
    def least(self) -> int:
        """The least number of zeros of a column."""
        return self.count - 1 + MORE_ZEROS

    def zeros(self, directions: Tensor, looser: float = 1.0) -> Tensor:
        """Return which values of ``rows`` are zero for each direction [k, N]: [k, m]."""
        values = (directions @ self.rows.T).abs()
        return values <= (MAX_ZERO * values.amax(1, keepdim=True)).clamp(max=looser * self.tolerance)

    def fitted(self, direction: Tensor, looser: float = 1.0) -> Tensor:
        """Return the direction [N] that is nearest to zero in all rows in which this one is."""
        zero = self.rows[self.zeros(direction[None], looser)[0]]
        return torch.linalg.eigh(zero.T @ zero)[1][:, 0] if len(zero) >= self.count - 1 else direction

    def refined(self, direction: Tensor) -> Tensor:
        """Return the direction [N] that is fitted to ever stricter zeros of this one."""
        for looser in (LOOSE, LOOSE**0.5, 1.0, STRICT):
            direction = self.fitted(direction, looser)
        return direction

    def free(self, direction: Tensor) -> Tensor:
        """Return a basis [N, k] of the directions that are zero in nearly all rows in which this one [N] is.

        k is 1 if its zeros determine it. The zeros of a mixture of k columns are those that they have in common, and
        k - 1 others by chance, each of which alone determines a factor: its leverage is 1, and it is left out.
        """
        zero = self.rows[self.zeros(direction[None])[0]]
        for turn in range(FREE_ROWS + 2):
            found, vectors = torch.linalg.eigh(zero.T @ zero)
            null = found <= len(zero) * self.tolerance**2 + EIGENVALUE_ROUNDING
            flat = vectors[:, null]
            if flat.shape[1] > 1 or len(zero) < self.count or turn > FREE_ROWS:
                break
            leverage = ((zero @ vectors[:, ~null]).square() / found[~null]).sum(1)
            kept = leverage < ESSENTIAL
            if bool(kept.all()):
                kept[leverage.argmax()] = False
            zero = zero[kept]
        return flat

    def split(self, flat: Tensor, rng: torch.Generator) -> Tensor:
        """Return directions [k, N] with many zeros among those of a basis [N, n], which mixes n columns."""
        mixed = flat.shape[1]
        rows = self.rows @ flat
        rows = rows[rows.norm(dim=1) > LOOSE * self.tolerance]
        found = _sampled(rows, SPLITS * mixed, rng) if len(rows) >= mixed else rows[:0]
        many = ((found @ rows.T).abs() <= LOOSE * self.tolerance).sum(1)
        order = many.argsort(descending=True)
        left = found[order[many[order] >= mixed - 1 + MORE_ZEROS]]
        chosen: list[Tensor] = []
        while len(left) and len(chosen) < 2 * mixed:
            chosen.append(left[0])
            left = left[(left @ left[0]).abs() < SAME]
        return torch.stack(chosen) @ flat.T if chosen else self.rows[:0]

    def purer(self, direction: Tensor, others: Tensor) -> Tensor:
        """Return a direction [N] without small multiples of ``others`` [k, N] whose removal leaves more zeros.

        A column plus a small multiple of another one is nearly in its direction, and the few values that happen to
        cancel may determine it. Where the column is zero and the other one is not, their quotient is that multiple.
        """
        for other in others:
            zero, on = self.zeros(direction[None], LOOSE)[0], ~self.zeros(other[None])[0]
            quotients = ((self.rows[on] @ direction) / (self.rows[on] @ other)).sort().values
            more = int((zero & on).sum()) + MORE_ZEROS
            if len(quotients) <= more:
                continue
            begin = int((quotients[more:] - quotients[:-more]).argmin())
            new = direction - quotients[begin + more // 2] * other
            if int(self.zeros(new[None], LOOSE).sum()) < int(zero.sum()) + MORE_ZEROS:
                continue
            new = self.refined(new / new.norm())
            many, before = self.zeros(torch.stack([new, direction])).sum(1).tolist()
            if many > before and float((new @ direction).abs()) > SAME:
                direction = new
        return direction

    def separated(self, direction: Tensor) -> float:
        """Return the share of units for which a half-space of inputs tells whether a direction [N] is zero there.

        The inputs are those in the space that the change shows, seen by the weights before and after the training, in
        the mean.
        """
        values = (self.left @ direction).abs()
        on = (values > min(self.tolerance, MAX_ZERO * float(values.max()))).double()
        features = self.features
        penalty = RIDGE * torch.eye(features.shape[1], dtype=features.dtype)
        plane = torch.linalg.solve(features.T @ features + penalty, features.T @ (2 * on - 1))
        for _ in range(NEWTON_STEPS):
            chance = torch.sigmoid((features @ plane).clamp(-30, 30))
            curvature = (features.T * (chance * (1 - chance)).clamp(min=1e-6)) @ features + penalty
            plane = plane - torch.linalg.solve(curvature, features.T @ (chance - on) + RIDGE * plane)
        return float(((features @ plane > 0) == (on > 0)).double().mean())

    def agreement(self, basis: Tensor) -> float:
        """Return the agreement (``Disaggregation.agreement``) of the inputs that follow from columns [N, N]."""
        return self.agreements(basis)[0]

    def agreements(self, basis: Tensor) -> list[float]:
        """Return how well each of the inputs that follow from columns [N, N] agrees, the worst first."""
        inputs = torch.linalg.inv(basis.T) / torch.linalg.solve(basis.T, self.total)[:, None]
        values = self.left @ basis.T
        on = values.abs() > (MAX_ZERO * values.abs().amax(0)).clamp(max=self.tolerance)
        return _agreements((self.gates @ inputs.T + self.offsets[..., None]).transpose(1, 2), on.T)


class _Search:
    """The columns that were found so far, and the mixtures.

    Attributes:
        columns: their space.
        found: [k, N], directions that may be columns, and ``shares``, how well a half-space separates each.
        rejected: [k, N], directions that look like columns, but no half-space separates them.
        rest: [k, N], an orthonormal basis of the directions that are orthogonal to the columns found.
        flats: bases [N, n] of mixtures of n columns, and how many rows are zero in all of each.
    """

    def __init__(self, columns: _Columns, rng: torch.Generator) -> None:
        """Begin with nothing."""
        self.columns, self.rng = columns, rng
        self.found = self.rejected = columns.rows[:0]
        self.shares: list[float] = []
        self.rest = torch.eye(columns.count, dtype=columns.rows.dtype)
        self.flats: list[tuple[Tensor, int]] = []
        self.tests = 0
        several = len(columns.gates) > 1
        self.clear = SEPARATED_TRAINED if several else SEPARATED
        self.consistent = CONSISTENT_TRAINED if several else CONSISTENT

    def run(self, first: Tensor) -> Tensor:
        """Return independent columns [k, N], as many as there are if all are found.

        Args:
            first: [k, N], directions that may be columns, to begin with; there may be none.
        """
        count = self.columns.count
        best, agreement, last = self.columns.rows[:0], 0.0, 0
        for turn in range(TURNS):
            before = len(self.shares)
            if turn == 0 and len(first):
                self._begin(first)
            else:
                self._turn(turn)
            if len(self.shares) > before:
                basis = self._basis()
                if len(basis) < count:
                    best = basis
                else:
                    basis, agrees = self._purified(*self._exchanged(basis))
                    if agrees > agreement:
                        best, agreement, last = basis, agrees, turn
            fruitless = turn + 1 >= FRUITLESS and not self.shares
            if (
                fruitless
                or self.tests > TESTS
                or agreement >= self.consistent
                or (agreement and turn > last + PATIENCE)
            ):
                break
        return best

    def _begin(self, directions: Tensor) -> None:
        """Take those of directions [k, N] that have enough zeros for a column."""
        for one in map(self.columns.refined, directions):
            zeros = self.columns.zeros(one[None]).sum(1)
            if int(zeros) >= self.columns.least and not bool(self._known(one[None], zeros)):
                self._take(one)

    def _turn(self, turn: int) -> None:
        """Look for columns, by one way in each turn."""
        columns, count = self.columns, self.columns.count
        basis = self._basis(self.clear)
        if len(basis) == count:  # but not all are right
            basis = basis[: count - 1 - turn % min(DOUBTED, count - 1)]
        if len(basis):
            self.rest = torch.linalg.svd(basis, full_matrices=True)[2][len(basis) :]
        rest = self.rest
        if len(rest) == 1:
            self._test(self._last(rest[0]))
        if turn % 3 < 2:
            self._test(_sampled(self._rows(rest, turn % 3 == 1), SAMPLES if count <= MANY else FEWER_SAMPLES, self.rng))
        elif turn % 6 == 2 or not 0 < len(basis) < count:
            self._test(_sparse(columns.rows, self.rng))
        else:
            self._test(_missing(columns.rows, basis, self.rng))

    def _rows(self, rest: Tensor, other: bool) -> Tensor:
        """Return rows in which few of the inputs that are missing should be on.

        The mean input is estimated from the changes of weights and bias, which are sums over the inputs that are on.

        Args:
            rest: [k, N], an orthonormal basis of the space of the missing inputs, orthogonal to the columns found.
            other: whether to take, instead of the mean, a point between it and the inputs of one unit.
        """
        columns = self.columns
        rows = columns.rows
        offsets = rows @ columns.total
        point = rows.T @ offsets / offsets.square().sum()
        if other:
            place = int(torch.randint(len(rows), (), generator=self.rng))
            part = 0.5 * float(torch.rand((), generator=self.rng))
            point = point + part * (rows[place] / offsets[place] - point)
        point = rest.T @ (rest @ point)
        values = (columns.gates[0] @ (point / (point @ columns.total)) + columns.offsets[0])[columns.live]
        least, most = ROW_SHARES
        share = least + (most - least) * float(torch.rand((), generator=self.rng))
        return rows[values.argsort()[: max(3 * columns.count, int(share * len(rows)))]]

    def _last(self, input: Tensor) -> Tensor:
        """Return the last column [1, N]: its input [N] is known up to its size, and so are its zeros."""
        columns = self.columns
        values = (columns.gates[0] @ (input / (input @ columns.total)) + columns.offsets[0])[columns.live]
        off = columns.rows[values < -0.1 * values.abs().median()]
        return torch.linalg.eigh(off.T @ off)[1][:, :1].T

    def _known(self, directions: Tensor, zeros: Tensor) -> Tensor:
        """Return which directions [k, N], with their numbers of zeros [k], were tested before."""
        known = torch.zeros(len(directions), dtype=torch.bool)
        for one in (self.found, self.rejected):
            known |= ((directions @ one.T).abs() > SAME).any(1)
        for flat, base in self.flats:
            known |= self._within(flat, base, directions, zeros)
        return known

    @staticmethod
    def _within(flat: Tensor, base: int, directions: Tensor, zeros: Tensor) -> Tensor:
        """Return which directions [k, N] are mixtures of the columns of a flat, with no more zeros than any."""
        return ((directions @ flat).norm(dim=1) > SAME) & (zeros < base + flat.shape[1] + MORE_ZEROS)

    def _news(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return those directions [k, N] that may be new columns, with their numbers of zeros, the largest first."""
        directions = directions[torch.isfinite(directions).all(1)]
        directions = directions[(directions @ self.rest.T).norm(dim=1) > MIN_ANGLE]
        zeros = self.columns.zeros(directions, LOOSE).sum(1)
        order = zeros.argsort(descending=True, stable=True)
        order = order[zeros[order] >= self.columns.least][:CONSIDERED]
        order = order[~self._known(directions[order], zeros[order])]
        return directions[order], zeros[order]

    def _test(self, directions: Tensor) -> None:
        """Take the columns among directions [k, N], and split the mixtures."""
        columns = self.columns
        left, zeros = self._news(directions)
        for _ in range(TESTED):
            if not len(left):
                break
            self.tests += 1
            one = left[0]
            kept = (left @ one).abs() < SAME
            one = columns.refined(one)
            left, zeros = left[kept], zeros[kept]
            many = columns.zeros(one[None]).sum(1)
            if int(many) < columns.least or bool(self._known(one[None], many)):
                continue
            flat = columns.free(one)
            if flat.shape[1] == 1:
                self._take(one)
                kept = (left @ one).abs() < SAME
                left, zeros = left[kept], zeros[kept]
            elif flat.shape[1] <= MAX_MIXED:
                base = int(((columns.rows @ flat).norm(dim=1) <= LOOSE * columns.tolerance).sum())
                self.flats = [*self.flats[1 - MAX_FLATS :], (flat, base)]
                kept = ~self._within(flat, base, left, zeros)
                parts, many = self._news(columns.split(flat, self.rng))
                left, zeros = torch.cat([parts, left[kept]]), torch.cat([many, zeros[kept]])

    def _take(self, direction: Tensor) -> None:
        """Keep a direction [N] that its zeros determine."""
        share = self.columns.separated(direction)
        if share < LEAST_SEPARATED:
            self.rejected = torch.cat([self.rejected, direction[None]])
            return
        self.found = torch.cat([self.found, direction[None]])
        self.shares.append(share)

    def _basis(self, least: float = 0.0) -> Tensor:
        """Return independent directions, the best separated first, of those separated at least so well."""
        chosen: list[int] = []
        for place in sorted(range(len(self.shares)), key=lambda one: -self.shares[one]):
            if self.shares[place] < least or len(chosen) == self.columns.count:
                break
            if float(torch.linalg.svdvals(self.found[[*chosen, place]])[-1]) > MIN_ANGLE:
                chosen.append(place)
        return self.found[chosen]

    def _purified(self, basis: Tensor, agreement: float) -> tuple[Tensor, float]:
        """Return a complete basis without what is in a column of others, if its inputs agree better; and how well.

        What is in a column spoils the inputs of the others. If several columns hold something, the worst input can
        stay as it is until the last of them is freed: the next worst counts then.
        """
        each = self.columns.agreements(basis) if agreement < self.consistent else [agreement]
        for place in range(len(basis)):
            if each[0] >= self.consistent:
                break
            new = basis.clone()
            new[place] = self.columns.purer(basis[place], torch.cat([basis[:place], basis[place + 1 :]]))
            if not torch.equal(new, basis) and (agrees := self.columns.agreements(new)) > each:
                basis, each = new, agrees
        return basis, each[0]

    def _exchanged(self, basis: Tensor) -> tuple[Tensor, float]:
        """Return a complete basis whose inputs agree best, with columns exchanged for others found; and how well."""
        agreement = self.columns.agreement(basis)
        others = self.found[((self.found @ basis.T).abs() < SAME).all(1)]
        for other in others:
            if agreement >= self.consistent:
                break
            for place in range(len(basis)):
                new = basis.clone()
                new[place] = other
                if (
                    float(torch.linalg.svdvals(new)[-1]) > MIN_ANGLE
                    and (agrees := self.columns.agreement(new)) > agreement
                ):
                    basis, agreement = new, agrees
        return basis, agreement


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


def _sampled(rows: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return directions [count, N] that are zero in N - 1 random rows each of these [m, N]."""
    size = rows.shape[1]
    chosen = torch.rand(count, len(rows), generator=rng).topk(size - 1, 1).indices
    start = torch.randn(count, size, generator=rng, dtype=rows.dtype)
    return _orthogonal(rows[chosen], start / start.norm(dim=1, keepdim=True))


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
