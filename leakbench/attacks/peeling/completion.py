"""Shift factorisation of a weight gradient of which a client sent only some entries."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from leakbench.attacks.peeling.factors import ConvolutionFactors, NotFactorised
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.reduced import correlate, design, least_squares
from leakbench.attacks.peeling.shifts import NOT_SENT, factorise_mixed, refuse, separate
from leakbench.errors import BadOption

CORE_DENSITY = 0.97
"""The share of entries that were sent, which the core should have: with 0.9 the input has an error of 1e-3."""

CORE_RANKS = (4.0, 3.0, 2.0, 1.5)
"""How many times the rank the core has as channels: the first number that gives enough density, or the last."""

ROUNDS = 100
"""The most rounds of the completion."""

GAIN = 0.98
"""The completion ends when five rounds leave more than this share of the misfit, and the ridge is negligible."""

MARGIN = 1.5
"""A channel is solved if it has at least this many times as many equations as unknowns."""

MAX_DEVIATION = 0.1
"""A channel is left out if its standard deviation is larger than this share of its root mean square."""


def factorise_incomplete(
    gradient: Tensor | None, sent: Tensor, lattice: Lattice, rng: torch.Generator, images: int = 1
) -> ConvolutionFactors | NotFactorised:
    """Return inputs and errors from a gradient with missing entries, such as a pruned one.

    The few input and output channels of which nearly all entries were sent are the dense core. It is completed to the
    rank B P_in by alternating least squares with a ridge that falls to zero, and factorised. The other channels follow
    from the entries that were sent, by least squares for each channel.

    Args:
        gradient: dL/dw [O, C, *kernel], without groups, with anything in entries that were not sent; None if no
            entry was.
        sent: bool, shaped like the gradient.
        lattice: the convolution's geometry.
        rng: a generator on the CPU.
        images: B.

    Returns:
        The factors, NaN in channels of which too few entries were sent. ``rank_gap`` is that of the completed core, and
        ``misfit`` that of the sent entries.

    Raises:
        BadOption: a shape contradicts the geometry, or the convolution has groups.
    """
    if gradient is None:
        return NOT_SENT
    if lattice.groups > 1 or sent.shape != gradient.shape:
        shapes = f"a gradient {list(gradient.shape)}, sent {list(sent.shape)}, {lattice.groups} groups"
        raise BadOption(f"{shapes}: expected equal shapes, and no groups")
    known = sent.cpu()
    values = torch.where(known, gradient.detach().cpu().double(), 0.0)
    refused = refuse(values, lattice, images)
    if refused is not None:
        return refused
    rank = images * lattice.inputs
    outputs, inputs = dense_core(known, rank)
    by_tap, mask = values.flatten(2).permute(2, 0, 1), known.flatten(2).permute(2, 0, 1)
    core = by_tap[:, outputs][:, :, inputs]
    if min(len(by_tap) * len(outputs), len(inputs)) < rank:
        return NotFactorised(f"{len(by_tap)} taps x {len(outputs)} output channels are fewer than {rank} positions")
    filled = complete(core.flatten(0, 1), mask[:, outputs][:, :, inputs].flatten(0, 1), rank)
    own, count = lattice.undilated(), images * lattice.phases
    shape = (len(outputs), len(inputs), *lattice.kernel)
    filled = filled.view(core.shape).permute(1, 2, 0).reshape(shape)
    mixed = factorise_mixed(filled, own, rng, count, torch.float64)

    def solve(errors: Tensor) -> tuple[Tensor, Tensor]:
        equations = design(errors, own.readers())
        found = masked_least_squares(equations, by_tap[:, outputs].flatten(0, 1), mask[:, outputs].flatten(0, 1))
        return found[0].unflatten(0, (count, -1)).mT, found[1].unflatten(0, (count, -1)).mT

    parts = mixed if isinstance(mixed, NotFactorised) else separate(mixed.errors, solve, rng)
    if isinstance(parts, NotFactorised) or isinstance(mixed, NotFactorised):
        density = float(mask[:, outputs][:, :, inputs].double().mean())
        size = f"{len(outputs)} x {len(inputs)} channels, of which {density:.0%} was sent"
        assert isinstance(parts, NotFactorised)
        return replace(parts, reason=f"the dense core ({size}): {parts.reason}")
    h, variance, _ = parts
    good = torch.isfinite(h).all(0).all(1)
    d, _ = masked_least_squares(
        design(h[:, good].mT, own.taps()), by_tap[:, :, good].mT.flatten(0, 1), mask[:, :, good].mT.flatten(0, 1)
    )
    d = d.unflatten(0, (count, -1))
    made = correlate(d.nan_to_num(), h.nan_to_num(), own)
    usable = mask & torch.isfinite(d).all(1).all(0)[:, None] & good
    return ConvolutionFactors(
        inputs=h.unflatten(2, own.image),
        variance=variance.unflatten(2, own.image),
        errors=d.mT.unflatten(2, own.output),
        rank_gap=mixed.rank_gap,
        null_ratio=mixed.null_ratio,
        misfit=float(((made - by_tap) * usable).norm() / (by_tap * usable).norm()),
        phases=lattice.phases,
    )


def dense_core(sent: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the output and input channels of the largest core [O', C'] with enough density, ascending.

    Args:
        sent: bool [O, C, *kernel].
        rank: of the completed core.
    """
    counts = sent.flatten(2).double().mean(2)
    for ranks in CORE_RANKS:
        outputs = torch.arange(len(counts))
        for _ in range(4):
            size = max(rank, int(ranks * rank))
            inputs = _most(counts[outputs].sum(0), size)
            outputs = _most(counts[:, inputs].sum(1), size)
        if float(counts[outputs][:, inputs].mean()) >= CORE_DENSITY:
            break
    return outputs, inputs


def _most(counts: Tensor, size: int) -> Tensor:
    """Return the ``size`` indices of the largest counts, ascending."""
    return counts.argsort(descending=True, stable=True)[:size].sort()[0]


def complete(values: Tensor, sent: Tensor, rank: int) -> Tensor:
    """Return a matrix of a rank that has the sent entries, by alternating least squares with a falling ridge.

    Args:
        values: [n, m].
        sent: bool [n, m].
        rank: r.
    """
    mask = sent.to(values)
    values = values * mask
    left, sizes, right = torch.linalg.svd(values, full_matrices=False)
    rows, columns = left[:, :rank] * sizes[:rank].sqrt(), right[:rank].mT * sizes[:rank].sqrt()
    size = float(columns.square().sum(0).mean())
    eye = torch.eye(rank, dtype=values.dtype)

    def solve(others: Tensor, right: Tensor, weights: Tensor, ridge: float) -> Tensor:
        squares = (others[:, :, None] * others[:, None]).flatten(1)
        system = (weights @ squares).unflatten(1, (rank, rank)) + ridge * eye
        return torch.linalg.solve_ex(system, (right @ others)[..., None])[0][..., 0].nan_to_num(0.0, 0.0, 0.0)

    misfit = torch.inf
    for step in range(ROUNDS):
        ridge = size * max(1e-2 * 0.6**step, 1e-12)
        rows = solve(columns, values, mask, ridge)
        columns = solve(rows, values.mT, mask.mT, ridge)
        if step % 5 == 4:
            before, misfit = misfit, float((mask * (rows @ columns.mT) - values).norm())
            if misfit >= GAIN * before and ridge < 1e-8 * size:
                break
    return rows @ columns.mT


def masked_least_squares(matrix: Tensor, right: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [J, N] of least |matrix x - right| over the sent entries of each column, and its variance [J, N].

    Columns with too few equations or a large variance are NaN.

    Args:
        matrix: [R, J].
        right: [R, N].
        sent: bool [R, N].
    """
    unknowns = matrix.shape[1]
    found = right.new_full((unknowns, right.shape[1]), torch.nan)
    variance = found.clone()
    for column, own in enumerate(sent.mT):
        if int(own.sum()) >= MARGIN * unknowns:
            solved = least_squares(matrix[own], right[own, column, None])
            found[:, column], variance[:, column] = (each[0, :, 0] for each in solved)
    bad = ~(variance.mean(0) <= MAX_DEVIATION**2 * found.square().mean(0))
    return torch.where(bad, torch.nan, found), torch.where(bad, torch.nan, variance)
