"""Output errors that are one value a channel times a mask, as below a ReLU followed by global average pooling."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakbench.attacks.peeling.factors import ConvolutionFactors, NotFactorised
from leakbench.attacks.peeling.krylov import lowest_eigenvectors
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.reduced import ReducedGradient, correlate, solve_errors, solve_inputs
from leakbench.attacks.peeling.shifts import NOT_SENT, refuse
from leakbench.errors import BadOption

DEAD = 6.0
"""A channel whose value is below this many times the noise has no active position."""

ROUNDS = 10
"""How often masks and inputs are solved in turn, at most."""

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest do not count."""

MAX_MISFIT = 0.3
"""The relative misfit of the gradient up to which masks are accepted; wrong masks leave one of about 1."""

SPLIT_ROUNDS = 30
"""How often masks and inputs are solved in turn, at most, if the number of open positions is not known."""

UNITS = tuple(10 ** (step / 40) for step in range(-40, 41))
"""The factors that are tried for errors that are known up to one."""

LEAST_MISFIT = 0.03
"""The misfit of a row, relative to the median row's, below which its weight grows no more."""

EXACT_MISFIT = 1e-4
"""The misfit of a gradient without noise below which all masks are right: one wrong entry leaves more."""

MIN_AGREEMENT = 0.8
"""The correlation, weighted by the squares of values, that masks by two halves of the gradient must have: noise alone
gives 0.63 to 0.72, as each half confirms what it was given."""


@dataclass(frozen=True)
class BinaryRows:
    """Errors as value times mask.

    Attributes:
        values: [B, O]; 0 for a channel without active positions.
        masks: [B, O, *output], bool.
        deviation: of the errors from value times mask, relative to the errors.
    """

    values: Tensor
    masks: Tensor
    deviation: float

    @property
    def errors(self) -> Tensor:
        """Value times mask, [B, O, *output]."""
        return self.values.reshape(self.values.shape + (1,) * (self.masks.dim() - 2)) * self.masks


def split_rows(errors: Tensor) -> BinaryRows:
    """Split the errors of each channel into one value and a mask.

    With global average pooling above, dL/d output of the last convolution is a_o m(o, p): m is the ReLU's mask, and a_o
    the same at all positions. Neither head, loss nor label is needed. A small deviation confirms it.

    Args:
        errors: [B, O, *output], of any scale.
    """
    rows = errors.flatten(2)
    sign = rows.sum(2, keepdim=True).sign()
    masks = rows * sign > 0.5 * (rows * sign).amax(2, keepdim=True)
    for _ in range(4):
        values = (rows * masks).sum(2) / masks.sum(2).clamp(min=1)
        masks = rows * values.sign()[..., None] > 0.5 * values.abs()[..., None]
    rest = (rows - values[..., None] * masks).square().mean(2).sqrt()
    alive = values.abs() > DEAD * rest.median(1, keepdim=True).values
    values, masks = values * alive, masks & alive[..., None]
    deviation = float((rows - values[..., None] * masks).norm() / rows.norm())
    return BinaryRows(values, masks.view(errors.shape), deviation)


def factorise_masked(
    gradient: Tensor | None, lattice: Lattice, values: Tensor, counts: Tensor, rng: torch.Generator
) -> ConvolutionFactors | NotFactorised:
    """Return inputs and errors for an input of low rank, from the values and mask counts of the errors' channels.

    The errors must be d(o, p) = a_o m(o, p) with known a_o and number n_o of positions with m = 1: by the head and, in
    eval mode, dL/dbeta_o / (dL/d output of one position). If the input has a rank r below P, r singular vectors give
    errors that are off by some per cent. The n_o largest of each channel are then the mask, and the input follows from
    the masks by least squares; both are repeated until no mask changes. The misfit says whether that is right.

    Args:
        gradient: dL/dw [O, C, *kernel] of one image, without groups; None if it was not sent.
        lattice: the convolution's geometry.
        values: a [O]; a channel with the value 0 (or no finite one) is left out.
        counts: n [O].
        rng: a generator on the CPU, for the start of the eigenvalue solver.

    Raises:
        BadOption: a shape contradicts the geometry.
    """
    refused = refuse(gradient, lattice, 1, low_rank=True)
    if refused is not None or gradient is None:
        return refused or NOT_SENT
    _check(gradient, lattice, values, counts)
    values, counts = values.detach().cpu().double(), counts.detach().cpu().double().round().long()
    alive = torch.isfinite(values) & (values != 0) & (counts > 0)
    if not bool(alive.any()) or not bool(gradient[alive].any()):
        return NotFactorised("no channel has active positions")
    scaled = gradient.detach().cpu().double()[alive] / values[alive].view(-1, *(1,) * (gradient.dim() - 1))
    reduced = ReducedGradient.of(scaled, lattice, 1, lattice.inputs, RANK_TOLERANCE)
    _, solutions = lowest_eigenvectors(reduced.product, lattice.inputs * reduced.rank, 1, rng)
    by_tap = scaled.flatten(2).permute(2, 0, 1)
    rows = reduced.expand(reduced.errors(solutions))[0]
    masks = torch.zeros_like(rows)
    for _ in range(ROUNDS):
        before, masks = masks, _largest(rows, counts[alive])
        inputs, variance = solve_inputs(by_tap, masks.mT[None], lattice)
        if torch.equal(masks, before):
            break
        rows = solve_errors(by_tap, inputs.nan_to_num(), lattice)[0][0].mT.nan_to_num()
    if not bool(torch.isfinite(inputs).all()):
        return NotFactorised(f"the masks of {int(alive.sum())} output channels do not determine the input")
    misfit = float((correlate(masks.mT[None], inputs, lattice) - by_tap).norm() / by_tap.norm())
    if not misfit < MAX_MISFIT:
        return NotFactorised(f"the masks leave {misfit:.2g} of the gradient unexplained", misfit)
    whole = masks.new_zeros(len(values), lattice.outputs)
    whole[alive] = masks
    errors = _errors(torch.where(alive, values, 0.0), whole)
    return replace(_factors(inputs, variance, errors, lattice, misfit), scale_misfit=0.0)


def factorise_valued(
    gradient: Tensor | None,
    lattice: Lattice,
    values: Tensor,
    counts: Tensor,
    rng: torch.Generator,
    exact: bool = False,
) -> ConvolutionFactors | NotFactorised:
    """Return inputs and errors behind noise, from the values of the errors' channels, and mask counts of some or none.

    As in ``factorise_masked`` the errors are d(o, p) = a_o m(o, p). The eigenvector gives rough errors whatever its gap
    is. Where the number of open positions of a channel is not known, a mask is open where an error is above a_o / 2;
    inputs follow from masks by least squares, rows from inputs without their negative values, and so on until no mask
    changes. On random weights (512 channels, 16 positions) that ends at the true masks, but for rows whose values are
    below the noise, with noise of up to the gradient's own size.

    Two halves of the input channels then decide the masks one after the other. What noise alone gives, they do not
    agree on. Without noise, rows count by how little of them is unexplained instead, until only right ones do: that
    finds the masks if the input's rank is low, too.

    Args:
        gradient: dL/dw [O, C, *kernel] of one image, without groups; None if it was not sent.
        lattice: the convolution's geometry.
        values: a [O], up to one factor.
        counts: n [O], the number of open positions; NaN where it is not known.
        rng: a generator on the CPU, for the start of the eigenvalue solver.
        exact: the gradient and the values have no noise but rounding.

    Returns:
        The factors, with errors in the unit of the values.

    Raises:
        BadOption: a shape contradicts the geometry.
    """
    refused = refuse(gradient, lattice, 1, low_rank=True)
    if refused is not None or gradient is None:
        return refused or NOT_SENT
    _check(gradient, lattice, values, counts)
    values, own = values.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0), gradient.detach().cpu().double()
    if not bool(values.any()) or not bool(own.any()):
        return NotFactorised("no channel has active positions")
    by_tap = own.flatten(2).permute(2, 0, 1)
    if len(by_tap) * len(values) < lattice.inputs:
        return NotFactorised(f"the masks of {len(values)} output channels do not determine the input")
    reduced = ReducedGradient.of(own, lattice, 1, lattice.inputs, RANK_TOLERANCE)
    _, solutions = lowest_eigenvectors(reduced.product, lattice.inputs * reduced.rank, 1, rng)
    rows = reduced.expand(reduced.errors(solutions))[0]
    # of the right sign, and as large as if half of the positions were open
    rows = rows * (rows.sum(1) @ values).sign()
    rows = rows * values.square().sum() * lattice.outputs / 2 / (values @ rows.clamp(min=0)).sum().clamp(min=1e-300)
    rows = _in_unit(rows, values) if exact else rows
    masks = torch.zeros_like(rows, dtype=torch.bool)
    for _ in range(SPLIT_ROUNDS):
        before, masks = masks, _open(rows, values, counts)
        if torch.equal(masks, before):
            break
        inputs, variance = solve_inputs(by_tap, _errors(values, masks), lattice)
        rows = solve_errors(by_tap, inputs.clamp(min=0), lattice)[0][0].mT
    if exact:
        masks, inputs, variance = _reweighted(by_tap, lattice, values, masks, counts)
        errors = _errors(values, masks)
        left = float((correlate(errors, inputs, lattice) - by_tap).norm() / by_tap.norm())
        if left < EXACT_MISFIT:
            return _factors(inputs, variance, errors, lattice, left)
    halves = by_tap[:, :, ::2], by_tap[:, :, 1::2]
    first = _open(solve_errors(halves[0], inputs[:, ::2].clamp(min=0), lattice)[0][0].mT, values, counts)
    other, _ = solve_inputs(halves[1], _errors(values, first), lattice)
    second = _open(solve_errors(halves[1], other.clamp(min=0), lattice)[0][0].mT, values, counts)
    agreed = _correlation(first.double(), second.double(), values.square()[:, None].expand_as(rows))
    if not agreed > MIN_AGREEMENT:
        return NotFactorised(f"masks by two halves of the input channels have a correlation of {agreed:.2g}", agreed)
    errors = _errors(values, masks)
    left = float((correlate(errors, inputs, lattice) - by_tap).norm() / by_tap.norm())
    return _factors(inputs, variance, errors, lattice, left)


def _factors(inputs: Tensor, variance: Tensor, errors: Tensor, lattice: Lattice, misfit: float) -> ConvolutionFactors:
    """Return what was found: inputs and variances [1, C, P_in], errors [1, P_out, O], and the gradient's misfit."""
    return ConvolutionFactors(
        inputs=inputs.unflatten(2, lattice.image),
        variance=variance.unflatten(2, lattice.image),
        errors=errors.mT.unflatten(2, lattice.output),
        rank_gap=1.0,
        null_ratio=0.0,
        misfit=misfit,
    )


def _reweighted(
    by_tap: Tensor, lattice: Lattice, values: Tensor, masks: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks [O, P], and inputs [1, C, P] with their variances, of a gradient [K, O, C] without noise.

    Rows over their value count in inverse proportion to what their masks leave unexplained: the wrong ones less and
    less.
    """
    alive = (values != 0) & by_tap.any(2).any(0)
    rows = torch.where(alive[:, None], by_tap, 0.0) / torch.where(alive, values, 1.0)[:, None]
    ones, size = torch.ones_like(values), rows.norm(dim=(0, 2)).clamp(min=1e-300)
    weight = ones
    for _ in range(SPLIT_ROUNDS):
        inputs, variance = solve_inputs(weight[:, None] * rows, _errors(weight, masks), lattice)
        solved = solve_errors(rows, inputs.clamp(min=0), lattice)[0][0].mT
        before, masks = masks, _open(solved, alive.to(values), counts)
        if not bool(inputs.isfinite().all()) or torch.equal(masks, before):
            break
        left = (correlate(_errors(ones, masks), inputs.clamp(min=0), lattice) - rows).norm(dim=(0, 2)) / size
        usual = left[alive].median().clamp(min=1e-300)
        weight = torch.where(alive, usual / left.clamp(min=LEAST_MISFIT * usual), 0.0)
    return masks, inputs, variance


def _check(gradient: Tensor, lattice: Lattice, values: Tensor, counts: Tensor) -> None:
    """Raise BadOption if values or counts are not those of a gradient's output channels, or the geometry is wrong."""
    if lattice.groups > 1 or lattice.phases > 1 or {values.shape, counts.shape} != {gradient.shape[:1]}:
        raise BadOption(
            f"values {list(values.shape)}, counts {list(counts.shape)}, {lattice.groups} groups, {lattice.phases} "
            f"phases: expected two tensors [{len(gradient)}], and a convolution without groups and dilation"
        )


def _open(rows: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Return masks [O, P] of rows [O, P] that are nearer to the values [O] than to 0, or the largest if counted."""
    signed = rows * values.sign()[:, None]
    ranks = signed.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    near = signed > 0.5 * values.abs()[:, None]
    counted = counts.isfinite()[:, None]
    return torch.where(counted, ranks < counts.nan_to_num()[:, None], near) & (values != 0)[:, None]


def _in_unit(rows: Tensor, values: Tensor) -> Tensor:
    """Return rows [O, P] over the factor that brings them nearest to values [O] and 0; it is about 1."""
    signed, size = rows * values.sign()[:, None], values.abs()[:, None]
    found = []
    for factor in UNITS:
        made = torch.where(signed > 0.5 * factor * size, factor * size, 0.0)
        found.append(float((signed - made).square().sum()))
    return rows / UNITS[found.index(min(found))]


def _correlation(first: Tensor, second: Tensor, weights: Tensor) -> float:
    """Return the weighted correlation of two tensors, 0 if one is constant."""
    total = weights.sum()
    a, b = (each - (weights * each).sum() / total for each in (first, second))
    size = ((weights * a.square()).sum() * (weights * b.square()).sum()).sqrt()
    return float((weights * a * b).sum() / size.clamp(min=1e-300))


def _errors(values: Tensor, masks: Tensor) -> Tensor:
    """Return errors [1, P, O], values [O] times masks [O, P]."""
    return (values[:, None] * masks).mT[None]


def _largest(rows: Tensor, counts: Tensor) -> Tensor:
    """Return masks [O, P] of the largest entries of rows [O, P], as many as counted, after the best common sign."""
    sign = (rows.sum(1) * counts).sum().sign()
    order = (sign * rows).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1)
    return (ranks < counts[:, None]).to(rows)
