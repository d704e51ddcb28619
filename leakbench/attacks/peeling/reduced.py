"""A convolution's weight gradient, reduced to the ranks that its inputs and errors can have, and its linear algebra.

With S_k the 0/1 matrix of tap k, the gradient at the tap is D_k = sum_b d_b S_k h_b^T, d_b [O, P_out], h_b [C, P_in].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.peeling.lattice import Lattice
from leakbench.core.rng import generator

SPARE_COLUMNS, FEW_COLUMNS = 8, 2
"""How many random columns more than the expected rank ``leading`` takes, and how many times as many columns as that a
matrix must have."""

ROWS = 1024
"""How many rows of a residual are held at a time."""

NEGLIGIBLE = 1e-6
"""The part of the largest singular value below which the last one that was computed ends the list."""


@dataclass(frozen=True)
class ReducedGradient:
    """A gradient, reduced to the ranks that inputs and errors can have.

    Attributes:
        lattice: the geometry.
        outputs: [O, q], orthonormal.
        basis: [C, r], V / s: the right singular vectors over the singular values.
        system: N [K q, r], the gradient by tap, projected to ``outputs`` and ``basis``.
        singular: the singular values of the stacked gradient, down to those that are negligible.
    """

    lattice: Lattice
    outputs: Tensor
    basis: Tensor
    system: Tensor
    singular: Tensor

    @classmethod
    def of(cls, gradient: Tensor, lattice: Lattice, images: int, rank: int, cut: float = 1e-15) -> ReducedGradient:
        """Return the reduced form of a gradient [O, C, *kernel] of B images.

        Args:
            gradient: without groups and dilation.
            lattice: the geometry.
            images: B.
            rank: the largest rank, B P_in.
            cut: singular values below this share of the largest do not count to the rank.
        """
        by_tap = gradient.flatten(2).permute(2, 0, 1)
        stacked = by_tap.reshape(-1, by_tap.shape[2])
        singular, right = leading(stacked, rank)
        kept = max(1, min(rank, int((singular > cut * singular[0]).sum())))
        basis = right[:kept].mT / singular[:kept]
        system = by_tap @ basis
        # the errors have at most B P_out independent rows: the other directions of the output channels hold only noise
        rows = min(images * lattice.outputs, by_tap.shape[1])
        sizes, directions = leading(system.transpose(0, 1).flatten(1).mT, rows)
        rows = max(1, min(rows, int((sizes > cut * sizes[0]).sum())))
        left = torch.linalg.qr(directions[:rows].mT)[0]  # those of tiny singular values are not quite orthogonal
        return cls(lattice, left, basis, (left.mT @ system).flatten(0, 1), singular)

    @property
    def rank(self) -> int:
        """The number r of columns of N."""
        return self.basis.shape[1]

    @cached_property
    def _maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The taps [K, P_out], the readers [K, P_in], and how many taps of each output read the input [P_out]."""
        taps = self.lattice.taps()
        return taps, self.lattice.readers(), (taps < self.lattice.inputs).sum(0).clamp(min=1).double()

    def _seen(self, solutions: Tensor) -> tuple[Tensor, Tensor]:
        """Return N_k y_j [b, P_in, K, q], and its mean over the taps that read each output, d [b, P_out, q]."""
        taps, _, counts = self._maps
        places = self.lattice.inputs
        seen = (solutions.reshape(-1, self.rank) @ self.system.mT).view(-1, places, len(taps), self.outputs.shape[1])
        padded = F.pad(seen, (0, 0, 0, 0, 0, 1))
        total = sum(padded[:, :, k].index_select(1, tap) for k, tap in enumerate(taps))
        assert isinstance(total, Tensor)
        return seen, total / counts[:, None]

    def product(self, solutions: Tensor) -> Tensor:
        """Return [b, P_in r], sum_k N_k^T (N_k y_j - d_p) at the output p where tap k reads position j."""
        seen, errors = self._seen(solutions)
        padded = F.pad(errors, (0, 0, 0, 1))
        for k, reader in enumerate(self._maps[1]):
            seen[:, :, k] -= padded.index_select(1, reader)
        return (seen.view(-1, len(self.system)) @ self.system).view(len(solutions), -1)

    def errors(self, solutions: Tensor) -> Tensor:
        """Return d [b, P_out, q] of solutions [b, P_in r]."""
        return self._seen(solutions)[1]

    def expand(self, errors: Tensor) -> Tensor:
        """Return [b, O, P_out] of errors [b, P_out, q] in the reduced output channels."""
        return self.outputs @ errors.mT


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the singular values of a matrix [n, m], descending, and its right singular vectors as rows.

    If the matrix has about the expected rank, those beyond it are left out: its products with a few random columns have
    the space of the others to full precision, which is faster (Halko, Martinsson and Tropp 2011, SIAM Review).

    Args:
        matrix: of any rank.
        rank: the expected one.
    """
    count = rank + SPARE_COLUMNS
    if FEW_COLUMNS * count < min(matrix.shape):
        columns = torch.randn(matrix.shape[1], count, generator=generator("columns"), dtype=matrix.dtype).to(matrix)
        columns = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ columns)[0])[0]
        rows, triangle = torch.linalg.qr(matrix @ columns)
        left, singular, _ = torch.linalg.svd(triangle)
        if float(singular[-1]) <= NEGLIGIBLE * float(singular[0]):
            # once more by the matrix, for as little noise as a singular value decomposition leaves
            return singular, (rows @ left).mT @ matrix / singular.clamp(min=1e-300)[:, None]
    triangle = torch.linalg.qr(matrix, mode="r")[1] if len(matrix) > matrix.shape[1] else matrix
    _, singular, right = torch.linalg.svd(triangle, full_matrices=False)
    return singular, right


def correlate(errors: Tensor, inputs: Tensor, lattice: Lattice) -> Tensor:
    """Return the weight gradient [K, O, C] of errors [b, P_out, O] and inputs [b, C, P_in]."""
    made = design(errors, lattice.readers()) @ inputs.transpose(1, 2).flatten(0, 1)
    return made.unflatten(0, (-1, errors.shape[2]))


def misfit(gradient: Tensor, errors: Tensor, inputs: Tensor, lattice: Lattice) -> float:
    """Return how far a weight gradient [K, O, C] is from that of errors and inputs (``correlate``), relative to it."""
    padded, flat = F.pad(errors, (0, 0, 0, 1)), inputs.mT.flatten(0, 1)
    rest = gradient.new_zeros(())
    for own, reader in zip(gradient, lattice.readers()):
        rest = rest + (padded.index_select(1, reader).flatten(0, 1).mT @ flat - own).square().sum()
    return float(rest.sqrt() / gradient.norm())


def solve_inputs(gradient: Tensor, errors: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Return the inputs of known errors by least squares.

    Args:
        gradient: [K, O, C], by tap.
        errors: [b, P_out, O].
        lattice: the geometry; at least b P_in equations are needed, of the K O for each channel.

    Returns:
        Inputs [b, C, P_in] and their variances, if what a channel's equations leave is noise.
    """
    found, variance = least_squares(design(errors, lattice.readers()), gradient.flatten(0, 1), len(errors))
    return found.mT, variance.mT


def solve_errors(gradient: Tensor, inputs: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Return the errors of known inputs by least squares: the other direction of ``solve_inputs``.

    Args:
        gradient: [K, O, C], by tap.
        inputs: [b, C, P_in].
        lattice: the geometry; at least b P_out equations are needed, of the K C for each output channel.

    Returns:
        Errors [b, P_out, O] and their variances, if what a channel's equations leave is noise.
    """
    return least_squares(design(inputs.mT, lattice.taps()), gradient.mT.flatten(0, 1), len(inputs))


def design(values: Tensor, places: Tensor) -> Tensor:
    """Return [K N, b P] of values [b, Q, N] at places [K, P], from 0 to Q, where Q stands for zeros.

    Errors at a lattice's readers make the matrix that maps inputs to the gradient; inputs at its taps that of errors.
    """
    padded = F.pad(values, (0, 0, 0, 1))
    by_tap = torch.stack([padded.index_select(1, place) for place in places])
    return by_tap.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)


def least_squares(matrix: Tensor, right: Tensor, images: int = 1) -> tuple[Tensor, Tensor]:
    """Return x [b, P, N] of least |matrix x - right|, and its variance by each column's residual.

    Both are NaN if the matrix has fewer rows than columns.
    """
    if len(matrix) < matrix.shape[1]:
        missing = right.new_full((images, matrix.shape[1] // images, right.shape[1]), torch.nan)
        return missing, missing
    columns, triangle = torch.linalg.qr(matrix)
    projected = columns.mT @ right
    found = torch.linalg.solve_triangular(triangle, projected, upper=True)
    inverse = torch.linalg.solve_triangular(triangle, torch.eye(len(triangle), dtype=right.dtype), upper=True)
    parts = zip(right.split(ROWS), columns.split(ROWS))
    rest = torch.stack([(own - part @ projected).square().sum(0) for own, part in parts]).sum(0)
    noise = rest / max(1, len(matrix) - len(triangle))
    variance = inverse.square().sum(1)[:, None] * noise
    return found.unflatten(0, (images, -1)), variance.unflatten(0, (images, -1))
