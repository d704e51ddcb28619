"""The equations between a convolution's input, the error at its output and the gradient by its weight.

dL/dw[o, c, k] = sum over output positions p of error[o, p] * input[c, position that tap k reads at p]: linear in the
input if the error is known, and linear in the error if the input is known. Both are least-squares problems here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.gradients.lanes.geometry import Geometry

FLOOR = 3e-8
"""The standard deviation that is assumed of an equation's error at least, relative to the equations' root mean square:
what rounding to single precision leaves where the residual is zero by chance."""

MAX_CONDITION = 1e9
"""The condition above which a system counts as singular."""

MIN_SINGULAR = 1e-6
"""The part of the largest singular value below which equations leave a direction open."""

MARGIN = 1.5
"""An unknown's equations are solved without those that are missing if at least this many times as many are left."""

FILLS = 30
"""How often missing right-hand sides are filled in where fewer are left."""


@dataclass(frozen=True)
class Fitted:
    """The solution of a least-squares problem.

    Attributes:
        value: the unknowns.
        deviation: their standard deviations, from the residuals.
    """

    value: Tensor
    deviation: Tensor


def taps(geometry: Geometry, device: torch.device) -> Tensor:
    """Return [K, P], the input position that each of K taps reads at each of P output positions; H * W for none."""
    (height, width), g = geometry.image, geometry
    places = torch.arange(1, height * width + 1, dtype=torch.float64, device=device).view(1, 1, height, width)
    read = F.unfold(places, g.kernel, g.dilation, g.padding, g.stride)[0].long() - 1
    return torch.where(read < 0, height * width, read)


def design(error: Tensor, geometry: Geometry) -> Tensor:
    """Return [O * K, B * H * W], the equations for a channel of the inputs, from errors [B, O, h, w]."""
    (images, outputs), read = error.shape[:2], taps(geometry, error.device)
    size = geometry.image[0] * geometry.image[1]
    rows = error.new_zeros(outputs, len(read), images, size + 1)
    values = error.transpose(0, 1).flatten(2)[:, None].expand(-1, len(read), -1, -1)
    rows.scatter_(3, read[None, :, None].expand_as(values), values)
    return rows[..., :size].reshape(-1, images * size)


def windows(value: Tensor, geometry: Geometry) -> Tensor:
    """Return [C * K, B * P], the equations for a channel of the errors, from inputs [B, C, H, W]."""
    g = geometry
    return F.unfold(value, g.kernel, g.dilation, g.padding, g.stride).transpose(0, 1).flatten(1)


def by_channel(value: Tensor) -> Tensor:
    """Return [C, B * H * W], the values of each channel of all images, from [B, C, H, W]."""
    return value.transpose(0, 1).flatten(1)


def by_image(rows: Tensor, like: Tensor) -> Tensor:
    """Return [B, C, H, W], the shape of ``like``, from the values of each channel [C, B * H * W]."""
    images, channels, height, width = like.shape
    return rows.reshape(channels, images, height, width).transpose(0, 1)


def blocks(matrix: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows and the columns of the blocks [R, N] that a matrix falls apart into, none of which is empty.

    A tap of a convolution of stride 2 reads every other row and column of its input only, so that the equations are
    four problems of a quarter of the unknowns each. Rows and columns of zeros are in no block.
    """
    there = matrix != 0
    count = there.shape[1]
    label = torch.arange(count, dtype=torch.int32)
    while True:
        by_row = torch.where(there, label, count).amin(1)
        lower = torch.where(there, by_row[:, None], count).amin(0).minimum(label)
        if torch.equal(lower, label):
            break
        label = lower
    used = there.any(0)
    return [((by_row == each).nonzero()[:, 0], (label == each).nonzero()[:, 0]) for each in label[used].unique()]


def least_squares(matrix: Tensor, right: Tensor) -> Fitted | None:
    """Return the X [N, M] of least |matrix X - right|, or None if it is not determined: matrix is [R, N].

    Right-hand sides that are NaN are missing. They are left out; in a column with fewer than ``MARGIN`` N others, they
    are taken for smaller than those of the matrix that are there, as in a pruned gradient.
    """
    rows, unknowns = matrix.shape
    if rows <= unknowns:
        return None
    if not bool(right.isfinite().all()):
        q, r = torch.linalg.qr(matrix)
        return _incomplete(matrix, q, r, right) if _regular([r]) else None
    parts = blocks(matrix)
    if any(len(own) < len(columns) for own, columns in parts) or sum(len(columns) for _, columns in parts) < unknowns:
        return None
    factors = [torch.linalg.qr(_block(matrix, *part)) for part in parts]
    if not _regular([r for _, r in factors]):
        return None
    value, rest, spread = right.new_zeros(unknowns, right.shape[1]), right.clone(), right.new_zeros(unknowns)
    for (own, columns), (q, r) in zip(parts, factors):
        seen = q.T @ right[own]
        value[columns] = torch.linalg.solve_triangular(r, seen, upper=True)
        spread[columns] = torch.linalg.solve_triangular(r, torch.eye(len(r)).to(r), upper=True).norm(dim=1)
        rest[own] -= q @ seen
    return Fitted(value, spread[:, None] * _noise(rest, rows - unknowns, right).sqrt())


def _block(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return a block of a matrix, the matrix itself if it has no other."""
    return matrix if matrix.shape == (len(rows), len(columns)) else matrix[rows][:, columns]


def _regular(triangles: list[Tensor]) -> bool:
    """Return whether none of the unknowns of triangular systems is left open."""
    size = torch.cat([each.diagonal().abs() for each in triangles])
    return float(size.min()) * MAX_CONDITION > float(size.max())


def _incomplete(matrix: Tensor, q: Tensor, r: Tensor, right: Tensor) -> Fitted | None:
    """Return the solution for right-hand sides [R, M] of which some are NaN, and matrix = q r."""
    there = right.isfinite()
    if not bool(there.any()):
        return None
    least = right[there].abs().min()
    filled = right.nan_to_num(0.0)
    value = torch.linalg.solve_triangular(r, q.T @ filled, upper=True)
    for _ in range(FILLS):
        filled = torch.where(there, filled, (matrix @ value).clamp(-least, least))
        value = torch.linalg.solve_triangular(r, q.T @ filled, upper=True)
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r)).to(r), upper=True)
    # a value between -t and t has the variance t^2 / 3 if nothing more is known of it
    deviation = (least / 3**0.5) * inverse.norm(dim=1)[:, None].expand_as(value).clone()
    for column in (there.sum(0) >= MARGIN * len(r)).nonzero().flatten().tolist():
        own = there[:, column]
        rows, wanted = matrix[own], right[own, column, None]
        factor, failed = torch.linalg.cholesky_ex(rows.T @ rows)
        if int(failed):
            continue
        found = torch.cholesky_solve(rows.T @ wanted, factor)
        found += torch.cholesky_solve(rows.T @ (wanted - rows @ found), factor)
        spread = torch.cholesky_inverse(factor).diagonal().clamp(min=0).sqrt()
        noise = (wanted - rows @ found).square().sum() / (len(rows) - len(r)) + FLOOR**2 * wanted.square().mean()
        spread = spread * noise.sqrt()
        if float(spread.norm()) < float(deviation[:, column].norm()):
            value[:, column], deviation[:, column] = found[:, 0], spread
    return Fitted(value, deviation)


@dataclass(frozen=True)
class Directions:
    """The singular directions of a least-squares problem of N unknowns, from the best to the worst determined.

    Attributes:
        basis: [N, N], orthonormal rows.
        size: [N], the singular values; 0 for what the equations leave open.
        value: [N, M], the coordinates of the solution; 0 where the size is.
        noise: [M], the variance of an equation.
    """

    basis: Tensor
    size: Tensor
    value: Tensor
    noise: Tensor

    def solution(self, count: int) -> Fitted:
        """Return the solution in the first directions, and 0 in the others."""
        inverse = self.basis[:count].T / self.size[:count]
        spread = inverse.square().sum(1)
        return Fitted(self.basis[:count].T @ self.value[:count], (spread[:, None] * self.noise).sqrt())


def joined(base: Fitted, weak: Tensor, matrix: Tensor, right: Tensor) -> Fitted | None:
    """Return a solution [J, M] with weak directions of it that further equations determine; None if they do not.

    Args:
        base: the solution without them.
        weak: [n, J], orthonormal.
        matrix: [R, n * M], the equations of the coordinates in these directions, each of variance 1.
        right: [R].
    """
    solved = least_squares(matrix, right[:, None])
    if solved is None:
        return None
    value, spread = (each.view(len(weak), -1) for each in (solved.value, solved.deviation))
    variance = base.deviation.square() + weak.T.square() @ spread.square()
    return Fitted(base.value + weak.T @ value, variance.sqrt())


def directions(matrix: Tensor, right: Tensor) -> Directions:
    """Return the singular directions of |matrix X - right|, for a matrix [R, N] and [R, M]."""
    rows, unknowns = matrix.shape
    parts = blocks(matrix)
    factors = [torch.linalg.qr(_block(matrix, *part)) for part in parts]
    singular = [torch.linalg.svd(r, full_matrices=True) for _, r in factors]
    least = MIN_SINGULAR * max((float(size[0]) for _, size, _ in singular), default=0.0)
    basis, size = matrix.new_zeros(unknowns, unknowns), matrix.new_zeros(unknowns)
    value, rest, begin = right.new_zeros(unknowns, right.shape[1]), right.clone(), 0
    unread = torch.ones(unknowns, dtype=torch.bool)
    for (own, columns), (q, _), (left, sizes, others) in zip(parts, factors, singular):
        rank = int((sizes > least).sum())
        seen = left.T[:rank] @ (q.T @ right[own])
        rest[own] -= q @ (left[:, :rank] @ seen)
        basis[begin : begin + len(columns), columns] = others
        size[begin : begin + rank] = sizes[:rank]
        value[begin : begin + rank] = seen / sizes[:rank, None]
        begin += len(columns)
        unread[columns] = False
    basis[begin:, unread] = torch.eye(unknowns - begin).to(basis)
    order = size.argsort(descending=True, stable=True)
    noise = _noise(rest, rows - int((size > 0).sum()), right)
    return Directions(basis[order], size[order], value[order], noise)


def _noise(rest: Tensor, freedom: int, right: Tensor) -> Tensor:
    """Return [M], the variance of an equation, by what is left of right-hand sides [R, M]."""
    return rest.square().sum(0) / max(freedom, 1) + FLOOR**2 * right.square().mean()
