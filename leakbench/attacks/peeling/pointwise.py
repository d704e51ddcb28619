"""What the weight gradient of a 1x1 convolution leaks of its input."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from leakbench.attacks.peeling.factors import NotFactorised
from leakbench.attacks.peeling.shifts import NOT_SENT, clear_rank
from leakbench.attacks.peeling.unmixing import unmix
from leakbench.errors import BadOption

MAX_POSITIONS = 64
"""The most positions (of all images) that are searched for; the time grows with the cube of their number."""


@dataclass(frozen=True)
class PointwiseFactors:
    """The inputs of a 1x1 convolution, each position of each image a vector of C values.

    Attributes:
        row_space: [r, C], orthonormal; the input of every position is a mixture of these rows, for any activation.
        inputs: [k, C], the inputs of k of the r positions, each with an unknown factor (root mean square 1, sum
            positive) and in unknown order; k < r if some have too few zeros.
        errors: [k, O], dL/d output there, in one over that unit; NaN if k < r.
        rank_gap: s_r / s_r+1 of the gradient; infinite if there are only r singular values.
    """

    row_space: Tensor
    inputs: Tensor
    errors: Tensor
    rank_gap: float


def factorise_pointwise(
    gradient: Tensor | None, positions: int, rng: torch.Generator, images: int = 1
) -> PointwiseFactors | NotFactorised:
    """Return the row space of a 1x1 convolution's input, and the inputs themselves as far as a ReLU's zeros show them.

    The gradient is dW = sum_p d_p h_p^T over all r = B P positions, so its row space is that of the inputs, if r is at
    most C and O. Among its vectors, ReLU outputs are the non-negative ones with many zeros.

    Args:
        gradient: dL/dw [O, C, 1, ...], without groups; None if it was not sent.
        positions: P, the number of positions at which the kernel is applied.
        rng: a generator on the CPU, for the search.
        images: B.

    Raises:
        BadOption: the kernel is larger than 1x1, or ``positions`` or ``images`` is not positive.
    """
    if gradient is None:
        return NOT_SENT
    if prod(gradient.shape[2:]) != 1 or min(positions, images) < 1:
        raise BadOption(
            f"a gradient {list(gradient.shape)}, {positions} positions, {images} images: expected [O, C, 1, 1], and "
            "positive numbers"
        )
    if not bool(torch.isfinite(gradient).all()):
        return NotFactorised("the gradient has values that are not finite")
    if not bool(gradient.any()):
        return NotFactorised("the gradient is zero")
    rank = positions * images
    matrix = gradient.detach().cpu().double().flatten(1)
    if rank > min(matrix.shape):
        outputs, channels = matrix.shape
        return NotFactorised(f"{rank} positions are more than {channels} channels or {outputs} output channels")
    _, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    found = clear_rank(singular, rank, gradient.dtype)
    if isinstance(found, NotFactorised):
        return found
    space = right[:rank]
    # noise of a value of the gradient, from the singular values that should be 0, moves the unit vectors of the space
    rest = float(singular[rank:].square().sum().sqrt()) / max(1, (len(matrix) - rank) * (matrix.shape[1] - rank)) ** 0.5
    spread = torch.full_like(space[0], rest / float(singular[rank - 1]))
    directions = unmix(space.mT, spread, rng) if rank <= MAX_POSITIONS else space.new_empty(0, rank)
    inputs = directions @ space
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt() * inputs.sum(1, keepdim=True).sign()
    if len(inputs) == rank:
        errors = torch.linalg.lstsq(inputs.mT, matrix.mT).solution
    else:
        errors = matrix.new_full((len(inputs), len(matrix)), torch.nan)
    return PointwiseFactors(space, inputs, errors, found)
