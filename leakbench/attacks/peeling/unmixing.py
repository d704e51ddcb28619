"""Non-negative vectors with many zeros, found in the space that mixtures of them span.

A ReLU's outputs are such vectors. With the mixtures X [n, m] as columns, the coefficients r for which X r has no
negative value form a cone. If each vector is zero where enough others are not, the cone's extreme rays are the true
vectors' coefficients. A linear function over a section of the cone is least at an extreme ray, so linear programs find
them; one that is zero at the rays found before finds another.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

MIN_NOISE = 3e-10
"""The least standard deviation that is assumed of a row, relative to its norm."""

ZERO, CLEAR = 3.0, 6.0
"""Up to the first number of standard deviations a value counts as zero; more than the second below 0 it is negative."""

SLACKS = (3.0, 6.0, 12.0)
"""How many standard deviations below 0 values may be in a linear program; the next is tried if none are feasible."""

WIDTHS = (3.0, 2.0, 1.5)
"""The widths of the Gaussian weights by which a direction is fitted to its zeros, in standard deviations."""

WIDEST, NARROWING = 0.1, 3.0
"""The first of ever narrower widths, relative to the norm of a row, and the ratio of one to the next."""

FITS = 4
"""How often it is fitted with each width."""

MIN_SIZE = 0.05
"""Smaller rows, relative to the median, are left out."""

MAX_NOISE = 3.0
"""Rows with more noise, relative to the median, are left out."""

TRIES = 6
"""The most linear programs for each vector; ``MAX_PROGRAMS`` for all."""

MAX_PROGRAMS = 200

EXTRA = 1.5
"""After a complete set was found, this multiple of its programs is solved: true vectors have more zeros than others."""

CONSTRAINTS = 40
"""The programs begin with this many rows for each vector; rows that their solution violates are added."""

SAME = 0.9999
"""The cosine from which on two directions count as one."""

MIN_ANGLE = 0.01
"""The least singular value of a set of independent directions."""

MIN_ZEROS = 0.04
"""The least share of zeros of a vector, above those that any extreme ray has."""

LIKE = 0.4
"""The least share of zeros of a vector, relative to the largest; a false one has a fourth of a true one's."""

MAX_NEGATIVE = 0.004
"""The largest share of negative values of a vector."""


@dataclass(frozen=True)
class Sparsity:
    """How few zeros a vector may have that counts as a true one.

    Attributes:
        zeros: the least share of zeros, above those that any extreme ray has.
        like: the least share, relative to the largest of all vectors.
        angle: the least singular value of a set of independent directions.
    """

    zeros: float = MIN_ZEROS
    like: float = LIKE
    angle: float = MIN_ANGLE


USUAL = Sparsity()


def unmix(mixed: Tensor, spread: Tensor, rng: torch.Generator, sparsity: Sparsity = USUAL) -> Tensor:
    """Return up to m directions [k, m], for which ``mixed @ direction`` is non-negative and has many zeros.

    Distinct directions form a pool, and the independent ones with the most zeros are returned.

    Args:
        mixed: [n, m], m linear mixtures of m non-negative vectors of n values.
        spread: [n], the standard deviation of a row's values by noise.
        rng: of the linear functions.
        sparsity: of the vectors; with few zeros asked for, false ones must be told by something else.
    """
    count = mixed.shape[1]
    if count == 1:
        return torch.ones_like(mixed[:1])
    sizes = mixed.norm(dim=1)
    noise = (spread / sizes).clamp(min=MIN_NOISE)
    live = (sizes > MIN_SIZE * sizes[sizes > 0].median()) & (noise <= MAX_NOISE * noise.nanmedian())
    rows, noise = mixed[live] / sizes[live, None], noise[live]
    if len(rows) < count:
        return rows[:0]
    pool: list[tuple[float, Tensor]] = []
    best: list[Tensor] = []
    done, last = 0, min(TRIES * count + 10, MAX_PROGRAMS)
    while done < last:
        done += 1
        start = _extreme_ray(rows, noise, torch.stack(best) if best else rows[:0], rng)
        found = _fitted(rows, noise, start, sparsity)
        if found is None or any(float(found[1] @ other) > SAME for _, other in pool):
            continue
        pool.append(found)
        complete = len(best) == count
        best = _independent(pool, count, sparsity)
        if len(best) == count and not complete:
            last = min(last, int(EXTRA * done))
    return torch.stack(best) if best else rows[:0]


def _extreme_ray(rows: Tensor, noise: Tensor, found: Tensor, rng: torch.Generator) -> Tensor:
    """Return a unit vector r that minimises a random function where rows @ r is not negative, but for noise.

    The function is zero at the directions ``found`` [k, m], if they are fewer than m. If the noise leaves no such
    vector, one that is orthogonal to m - 1 random rows is returned.
    """
    count = rows.shape[1]
    objective = torch.randn(count, dtype=rows.dtype, generator=rng)
    if 0 < len(found) < count:
        objective = objective - torch.linalg.lstsq(found.mT, objective[:, None]).solution[:, 0] @ found
    order = torch.randperm(len(rows), generator=rng)
    middle = rows.mean(0, keepdim=True).numpy()
    for slack in SLACKS:
        limit = slack * noise
        chosen = torch.zeros(len(rows), dtype=torch.bool)
        chosen[order[: CONSTRAINTS * count]] = True
        violated = chosen
        while bool(violated.any()):
            chosen = chosen | violated
            bounds, ones = limit[chosen].numpy(), np.ones(1)
            program = linprog(
                objective.numpy(), -rows[chosen].numpy(), bounds, middle, ones, (None, None), method="highs-ds"
            )
            if program.status != 0:
                break
            ray = torch.from_numpy(program.x)
            violated = (rows @ ray < -2 * limit) & ~chosen
        else:
            return ray / ray.norm()
    return torch.linalg.svd(rows[order[: count - 1]], full_matrices=True)[2][-1]


def _fitted(rows: Tensor, noise: Tensor, start: Tensor, sparsity: Sparsity) -> tuple[float, Tensor] | None:
    """Return a direction fitted to its zeros, and their share; None if it is negative or has few zeros.

    An extreme ray is a true direction, or only near one. The first is fitted to the zeros that it has, the second by
    weights that fall from wide to narrow; what has more zeros counts.
    """
    narrow = [width for width in WIDTHS for _ in range(FITS)]
    steps = int(np.log(max(1.0, WIDEST / (WIDTHS[0] * float(noise.median())))) / np.log(NARROWING))
    wide = [WIDTHS[0] * NARROWING**step for step in range(steps, 0, -1)]
    best = None
    for widths in (narrow, wide + narrow):
        direction = start
        for width in widths:
            weights = torch.exp(-0.5 * (rows @ direction / (width * noise)).square()) / noise.square()
            direction = torch.linalg.eigh((rows * weights[:, None]).mT @ rows)[1][:, 0]
        values = rows @ direction / noise
        sign = values.sum().sign()
        share = float((values.abs() <= ZERO).double().mean())
        negative = float((sign * values < -CLEAR).double().mean())
        many = share >= sparsity.zeros + len(direction) / len(rows)
        if many and negative <= MAX_NEGATIVE and (best is None or share > best[0]):
            best = share, sign * direction
    return best


def _independent(pool: list[tuple[float, Tensor]], count: int, sparsity: Sparsity) -> list[Tensor]:
    """Return the directions with the most zeros, up to ``count``, each independent of those before it."""
    chosen: list[Tensor] = []
    most = max(share for share, _ in pool)
    for share, direction in sorted(pool, key=lambda each: -each[0]):
        if share < sparsity.like * most or len(chosen) == count:
            break
        if float(torch.linalg.svdvals(torch.stack([*chosen, direction]))[-1]) > sparsity.angle:
            chosen.append(direction)
    return chosen
