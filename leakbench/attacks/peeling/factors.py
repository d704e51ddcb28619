"""The factors of a convolution's weight gradient, its inputs and output errors, and the unit that they are in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.peeling.lattice import Lattice
from leakbench.errors import BadOption

CLEAR = (3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
"""How many standard deviations above 0 an input counts as positive; the number with the least misfit is taken."""

OUTLIER = 6.0
"""Equations whose misfit is larger than this many times the median are left out; a wrong mask makes such a one."""

ROUNDS = 4
"""How often outliers are looked for."""


@dataclass(frozen=True)
class ConvolutionFactors:
    """The inputs and output errors of a convolution; their correlations, added over the images, are the gradient.

    All tensors are float64 on the CPU. Each image (with groups: each group of each image) has a factor of its own that
    is unknown until ``scale_by_bias`` or ``scale_by_shift`` determines it: the root mean square of the inputs is 1, and
    their sum positive. The order of the images is unknown; with groups, each group has its own.

    Attributes:
        inputs: h [B, C, *image].
        variance: of the inputs [B, C, *image], as far as noise of the gradient is its cause.
        errors: d = dL/d output [B, O, *output]; 0 at outputs that read only padding.
        rank_gap: s_r / s_r+1 of the stacked gradient, r = B P_in; infinite if there are only r singular values.
        null_ratio: the largest of the B vanishing eigenvalues over the next one: 0 if exact, and below 0.2.
        misfit: of the gradient, relative to its norm: its noise, and what is neither input nor error.
        phases: the number of sub-lattices that a dilation, or a kernel with one tap in some dimension, divides an image
            into. Each is then returned as an image of its own, B * phases in all, and neither its image nor its place
            there is known.
        groups: the convolution's.
        scale_misfit: the median misfit of the equations that determined the factors, relative to the root mean square
            of their right-hand sides; None if the factors are unknown.
    """

    inputs: Tensor
    variance: Tensor
    errors: Tensor
    rank_gap: float
    null_ratio: float
    misfit: float
    phases: int = 1
    groups: int = 1
    scale_misfit: float | None = None


@dataclass(frozen=True)
class NotFactorised:
    """The reason why a weight gradient does not determine the input of its convolution.

    Attributes:
        reason: one line.
        gap: the measured number that the reason names: a ratio of singular values or of eigenvalues; NaN if none was.
    """

    reason: str
    gap: float = float("nan")


def scale_by_bias(factors: ConvolutionFactors, bias_gradient: Tensor) -> ConvolutionFactors:
    """Return the factors in the gradient's own unit: the errors of a channel add up to dL/db.

    Linear least squares for one factor of each image. Behind a convolution without a bias, a batch normalisation in
    eval mode gives the same sums: gamma / sqrt(running variance + eps) * dL/dbeta. One in train mode makes them 0.

    Args:
        factors: of one convolution.
        bias_gradient: dL/db [O].

    Raises:
        BadOption: the bias gradient has another shape.
    """
    sums = factors.errors.flatten(2).sum(2)
    return _scaled(factors, sums, bias_gradient, "bias gradient")


def scale_by_shift(
    factors: ConvolutionFactors, weight: Tensor, lattice: Lattice, shift_gradient: Tensor, slope: float = 0.0
) -> ConvolutionFactors:
    """Return the factors in the gradient's own unit, by the shift beta of the normalisation below the activation.

    The input is f(beta + ...), with f a ReLU or leaky ReLU, so dL/dbeta is the sum of f' times the error at the input,
    which is the transposed convolution of the errors. The mode of the normalisation does not matter; a convolution with
    a bias in place of it gives the same equation.

    Args:
        factors: of one convolution.
        weight: w [O, C / groups, *kernel].
        lattice: the convolution's geometry.
        shift_gradient: dL/dbeta [C], of the normalisation below.
        slope: f' at negative values.

    Raises:
        BadOption: the weight or the shift gradient has another shape.
    """
    below = input_errors(factors.errors, weight, lattice)
    found = []
    for clear in CLEAR:
        on = factors.inputs > clear * factors.variance.sqrt()
        sums = torch.where(on, below, slope * below).flatten(2).sum(2)
        found.append(_scaled(factors, sums, shift_gradient, "shift gradient"))
    return min(found, key=lambda each: torch.inf if each.scale_misfit is None else each.scale_misfit)


def input_errors(errors: Tensor, weight: Tensor, lattice: Lattice) -> Tensor:
    """Return dL/d input [B, C, *image] for output errors [B, O, *output], the transposed convolution.

    Args:
        errors: [B, O, *output], or of the sub-lattices of a dilated convolution.
        weight: w [O, C / groups, *kernel].
        lattice: the convolution's geometry.

    Raises:
        BadOption: the weight has another shape.
    """
    own = lattice.undilated()
    if weight.shape[0] != errors.shape[1] or weight.shape[2:] != lattice.kernel:
        raise BadOption(f"a weight {list(weight.shape)} is none of {lattice}; expected [{errors.shape[1]}, C, *kernel]")
    kernels = weight.detach().cpu().double().flatten(2).chunk(lattice.groups)
    padded = F.pad(errors.flatten(2), (0, 1))
    found = []
    for kernel, part in zip(kernels, padded.chunk(lattice.groups, 1)):
        read = torch.stack([part.index_select(2, reader) for reader in own.readers()], 2)
        found.append(torch.einsum("ock,bokp->bcp", kernel, read))
    return torch.cat(found, 1).unflatten(2, own.image)


def _scaled(factors: ConvolutionFactors, sums: Tensor, sent: Tensor, name: str) -> ConvolutionFactors:
    """Return the factors times those of which the sums [B, N], added over the images, are the gradient [N]."""
    if sent.shape != sums.shape[1:]:
        raise BadOption(f"a {name} {list(sent.shape)} does not have the layer's {sums.shape[1]} channels")
    right = sent.detach().cpu().double()
    found = [_robust(own.mT, part) for own, part in zip(sums.chunk(factors.groups, 1), right.chunk(factors.groups))]
    scales = torch.stack([scale for scale, _ in found], 1)

    def each(values: Tensor) -> Tensor:
        wide = scales.repeat_interleave(values.shape[1] // factors.groups, 1)
        return wide.reshape(wide.shape + (1,) * (values.dim() - 2))

    return replace(
        factors,
        inputs=factors.inputs / each(factors.inputs),
        variance=factors.variance / each(factors.inputs).square(),
        errors=factors.errors * each(factors.errors),
        scale_misfit=max(misfit for _, misfit in found),
    )


def _robust(matrix: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """Return the x of least |matrix x - right| without outliers and NaN, and the relative median misfit."""
    kept = torch.isfinite(matrix).all(1) & torch.isfinite(right)
    unknowns = matrix.shape[1]
    for _ in range(ROUNDS):
        found = torch.linalg.lstsq(matrix[kept], right[kept, None]).solution[:, 0]
        misfit = (matrix @ found - right).abs()
        median = float(misfit[kept].median())
        near = kept & (misfit <= OUTLIER * median)
        if int(near.sum()) < 2 * unknowns or torch.equal(near, kept):
            break
        kept = near
    return found, median / float(right.square().mean().sqrt())
