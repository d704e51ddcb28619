"""Symmetric positive definite systems of T trials: by Cholesky factors, or by conjugate gradients without a matrix."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from leakbench.gradients.lanes.fused import Products
from leakbench.gradients.lanes.layout import are_innermost

JITTERS = (1e-14, 1e-12, 1e-10)
"""The amounts added in turn to the diagonal, which is 1, of a system that rounding has made indefinite."""

REFINEMENTS = 3
"""How often a factored system is solved; each time but the first for the remainder that rounding left."""

PRECISION = 1e-11
"""Conjugate gradients end when the remainder is this share of the first one, in the scaled system."""

RESTART = 1e-3
"""They are restarted from the exact remainder when the one that they update has fallen to this share: float32 holds no
more."""

MAX_STEPS = 3000
"""The most steps of all restarts together, for one trial. For T it is the root of T times as many, since a step costs
each less. LeNet's systems take 80 to 9,300. They end as soon as more are expected of each trial that is not solved."""

MAX_DESCENT = 1000
"""The most steps between two restarts."""

CHECKED = 10
"""After how many steps the remainders are looked at, which waits for the device."""


def factor_and_solve(
    matrix: Tensor, rest: Callable[[Tensor], Tensor], start: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Solve by Cholesky factors and iterative refinement.

    Args:
        matrix: [T, n, n]; overwritten.
        rest: returns the remainder of the right-hand sides [T, n] at a solution [T, n], more precisely than the matrix.
        start: [T, n], the first approximation.
        inverse: return the inverse's diagonal, which takes twice as long as the factors.

    Returns:
        The solution [T, n], NaN if no factor was found, and the inverse's diagonal [T, n]; without ``inverse`` one over
        the matrix's diagonal, which is a lower bound of it.
    """
    # scaled to a unit diagonal, which conditions equations whose weights differ by many orders of magnitude
    scale = torch.rsqrt(matrix.diagonal(dim1=1, dim2=2))
    matrix *= scale[:, :, None]
    matrix *= scale[:, None, :]
    factor, info = torch.linalg.cholesky_ex(matrix)
    for jitter in JITTERS:
        if not bool((info > 0).any()):
            break
        matrix.diagonal(dim1=1, dim2=2).add_(jitter)
        again, status = torch.linalg.cholesky_ex(matrix)
        factor = torch.where((info > 0)[:, None, None], again, factor)
        info = torch.where(info > 0, status, info)
    found = start
    for _ in range(REFINEMENTS):
        found = found + scale * torch.cholesky_solve((scale * rest(found))[..., None], factor)[..., 0]
    found = torch.where((info > 0)[:, None], torch.nan, found)
    if not inverse:
        return found, scale.square()
    return found, scale.square() * torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor], diagonal: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve by conjugate gradients in float32, restarted from the exact remainder in float64.

    Args:
        product: returns the scaled matrix times [T, n], both in float32. The scaled matrix has a diagonal of ones: it
            is D M D, with D one over the root of the diagonal.
        rest: returns the remainder of the right-hand sides [T, n] at a solution [T, n], in float64.
        diagonal: of M, [T, n], positive.

    Returns:
        The solution [T, n], and bool [T], whether it was found to PRECISION.
    """
    scale = diagonal.rsqrt()
    found = torch.zeros_like(diagonal)
    remainder = scale * rest(found)
    first = left = remainder.norm(dim=1)
    goal, steps, most = PRECISION * first, 0, MAX_STEPS * math.sqrt(len(diagonal))
    while True:
        done = left <= goal
        # at the rate so far; equations that contradict each other take more steps than factors are worth
        expected = steps * math.log(PRECISION) / (left / first).clamp(1e-300, 0.999).log()
        if bool(done.all()) or (steps > 0 and bool((done | ~(expected <= most)).all())):
            return found, done
        size = left.clamp(min=torch.finfo(left.dtype).tiny)
        share = (goal / size / 2).clamp(RESTART, 1)
        own = (remainder / size[:, None]).float()
        change, taken = _descend(product, own, share.float().square())
        found = found + scale * change.double() * size[:, None]
        steps += taken
        remainder = scale * rest(found)
        left = remainder.norm(dim=1)


def _descend(product: Callable[[Tensor], Tensor], remainder: Tensor, goal: Tensor) -> tuple[Tensor, int]:
    """Return the solution for a right-hand side [T, n] and the steps taken, until its square falls below ``goal`` [T].

    Trials that are there stay as they are.
    """
    found, direction = torch.zeros_like(remainder), remainder
    square = inner(remainder, remainder)
    for step in range(MAX_DESCENT):
        ahead = product(direction)
        live = square > goal
        length = torch.where(live, square / inner(direction, ahead), 0.0)[:, None]
        found = torch.addcmul(found, length, direction)
        remainder = torch.addcmul(remainder, length, ahead, value=-1)
        now = inner(remainder, remainder)
        direction = torch.addcmul(remainder, torch.where(live, now / square, 0.0)[:, None], direction)
        square = torch.where(live, now, square)
        if step % CHECKED == CHECKED - 1 and not bool((square > goal).any()):
            break
    return found, step + 1


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner products [T] of rows [T, N]: in one pass if the trials are innermost in memory."""
    if are_innermost(x, y):
        dot: Tensor = Products.apply(x, y)[0]
        return dot
    return (x * y).sum(1)
