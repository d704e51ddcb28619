"""The smallest eigenvalues of a symmetric positive semidefinite map, without its matrix."""

from collections.abc import Callable

import torch
from torch import Tensor

DENSE = 400
"""Up to this many unknowns the matrix is built: that is faster."""

CHECK_EVERY = 8
"""After how many steps the convergence is checked."""

MAX_STEPS = 600
"""The number of steps at which the search ends in any case; a gap of 1e-3 of the largest eigenvalue needs as many."""


USUAL_STEPS = 192
"""About how many steps are held in memory: 80 to 160 are usual, and room for them is made twofold."""


def bytes_held(size: int, count: int) -> int:
    """Return about how many bytes ``lowest_eigenvectors`` holds for ``count`` vectors of n = ``size``."""
    return 8 * size * (size if size <= max(DENSE, 3 * count) else min(USUAL_STEPS * count, size))


def lowest_eigenvectors(
    product: Callable[[Tensor], Tensor], size: int, count: int, rng: torch.Generator, tolerance: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Return the ``count`` eigenvectors of smallest eigenvalue, by block Lanczos with full re-orthogonalisation.

    A block of ``count`` vectors finds an eigenvalue of that multiplicity. Each step costs a product with one block. The
    error of the vectors is at most the residual that is left over the distance to the next eigenvalue.

    Args:
        product: maps rows [b, n] to [b, n], symmetric and positive semidefinite.
        size: n.
        count: how many eigenvectors.
        rng: of the first block.
        tolerance: the residual at which the search ends, relative to the largest eigenvalue.

    Returns:
        Eigenvalues [count + 1], ascending: the last one approximates the next, from above (infinite if there is none);
        and the eigenvectors [count, n], orthonormal, in float64.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, section 10.3.
    """
    if size <= max(DENSE, 3 * count):
        values, vectors = torch.linalg.eigh(product(torch.eye(size, dtype=torch.float64)))
        none = values.new_full((max(0, count + 1 - size),), torch.inf)
        return torch.cat([values[: count + 1], none]), vectors[:, :count].mT
    steps = min(MAX_STEPS, size // count)
    basis = torch.empty(min(steps, 64) * count, size, dtype=torch.float64)
    block = _orthonormal(torch.randn(count, size, dtype=torch.float64, generator=rng))[0]
    small = torch.zeros(steps * count, steps * count, dtype=torch.float64)
    for step in range(steps):
        begin, end = step * count, (step + 1) * count
        if end > len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[begin:end] = block
        rest = product(block)
        small[begin:end, begin:end] = block @ rest.mT
        # against the last two blocks, of which the projection is made, and then against all, which rounding asks for
        near = basis[max(0, begin - count) : end]
        rest = rest - (rest @ near.mT) @ near
        rest = rest - (rest @ basis[:end].mT) @ basis[:end]
        block, link = _orthonormal(rest)
        final = step == steps - 1
        if final or step % CHECK_EVERY == CHECK_EVERY - 1:
            values, vectors = torch.linalg.eigh(small[:end, :end])
            residual = (link.mT @ vectors[begin:, :count]).norm(dim=0).amax()
            if final or float(residual) <= tolerance * float(values[-1]):
                break
        small[begin:end, end : end + count], small[end : end + count, begin:end] = link, link.mT
    return values[: count + 1], vectors[:, :count].mT @ basis[:end]


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal rows [b, n] and [b, b], with rows = the second @ the first."""
    columns, factor = torch.linalg.qr(rows.mT)
    return columns.mT, factor.mT
