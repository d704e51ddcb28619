"""Non-negative vectors with many zeros, found in the space that mixtures of them span.

A ReLU's outputs are such vectors. With the mixtures X [n, m] as columns, the coefficients r for which X r has no
negative value form a cone. If each vector is zero where enough others are not, the cone's extreme rays are the true
vectors' coefficients. A linear function over a section of the cone is least at an extreme ray, so linear programs find
them; one that is zero at the rays found before finds another.
"""

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

MIN_TOLERANCE = 1e-9
"""The least relative size that counts as zero."""

CLEAR = 6.0
"""Values of more than this many standard deviations are not zero."""

MIN_SIZE = 0.05
"""Smaller rows, relative to the median, are left out."""

MAX_NOISE = 10.0
"""Rows with more noise, relative to the median, are left out."""

TRIES = 3
"""The most linear programs for each vector."""

EXTRA = 1.5
"""After a complete set was found, this multiple of its programs is solved: true vectors have more zeros than others."""

CONSTRAINTS = 40
"""The programs begin with this many rows for each vector; rows that their solution violates are added."""

SAME = 0.9999
"""The cosine from which on two directions count as one."""

MIN_ZEROS = 0.04
"""The least share of zeros of a vector, above those that any extreme ray has."""

LIKE = 0.4
"""The least share of zeros of a vector, relative to the largest; a false one has a fourth of a true one's."""

MAX_NEGATIVE = 0.004
"""The largest share of negative values of a vector."""


def unmix(mixed: Tensor, spread: Tensor, rng: torch.Generator) -> Tensor:
    """Return up to m directions [k, m], for which ``mixed @ direction`` is non-negative and has many zeros.

    Distinct directions form a pool, and the independent ones with the most zeros are returned.

    Args:
        mixed: [n, m], m linear mixtures of m non-negative vectors of n values.
        spread: [n], the standard deviation of a row's values by noise.
        rng: of the linear functions.
    """
    count = mixed.shape[1]
    sizes = mixed.norm(dim=1)
    if count == 1:
        return torch.ones_like(mixed[:1])
    limit = (CLEAR * spread / sizes).clamp(min=MIN_TOLERANCE)
    live = (sizes > MIN_SIZE * sizes[sizes > 0].median()) & (limit <= MAX_NOISE * limit.nanmedian())
    rows, limit = mixed[live] / sizes[live, None], limit[live]
    pool: list[tuple[float, Tensor]] = []
    best: list[Tensor] = []
    done, last = 0, TRIES * count + 10
    while done < last:
        done += 1
        direction = _extreme_ray(rows, limit, torch.stack(best) if best else rows[:0], rng)
        found = None if direction is None else _fitted(rows, limit, direction)
        if found is None or any(float(found[1] @ other) > SAME for _, other in pool):
            continue
        pool.append(found)
        complete = len(best) == count
        best = _independent(pool, count)
        if len(best) == count and not complete:
            last = min(last, int(EXTRA * done))
    return torch.stack(best) if best else rows[:0]


def _extreme_ray(rows: Tensor, limit: Tensor, found: Tensor, rng: torch.Generator) -> Tensor | None:
    """Return a unit vector r with rows @ r >= -limit that minimises a random function, or None if there is none.

    The function is zero at the directions ``found`` [k, m], if they are fewer than m.
    """
    count = rows.shape[1]
    objective = torch.randn(count, dtype=rows.dtype, generator=rng)
    if 0 < len(found) < count:
        objective = objective - torch.linalg.lstsq(found.mT, objective[:, None]).solution[:, 0] @ found
    order = torch.randperm(len(rows), generator=rng)
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[order[: CONSTRAINTS * count]] = True
    middle = rows.mean(0, keepdim=True).numpy()
    while True:
        bounds = limit[chosen].numpy()
        program = linprog(
            objective.numpy(), -rows[chosen].numpy(), bounds, middle, np.ones(1), (None, None), method="highs-ds"
        )
        if program.status != 0:
            return None
        ray = torch.from_numpy(program.x)
        violated = (rows @ ray < -2 * limit) & ~chosen
        if not bool(violated.any()):
            return ray / ray.norm()
        chosen |= violated


def _fitted(rows: Tensor, limit: Tensor, direction: Tensor) -> tuple[float, Tensor] | None:
    """Return a direction fitted to its zeros, and their share; None if it is negative or has few zeros."""
    for widen in (3.0, 1.0):
        near = rows[(rows @ direction).abs() <= widen * limit]
        if len(near) < len(direction) - 1:
            return None
        direction = torch.linalg.eigh(near.mT @ near)[1][:, 0]
    values = rows @ direction
    sign = values.sum().sign()
    zero = values.abs() <= limit
    share = float(zero.double().mean())
    negative = float(((sign * values < 0) & ~zero).double().mean())
    few = share < MIN_ZEROS + len(direction) / len(rows)
    return None if few or negative > MAX_NEGATIVE else (share, sign * direction)


def _independent(pool: list[tuple[float, Tensor]], count: int) -> list[Tensor]:
    """Return the directions with the most zeros, up to ``count``, each independent of those before it."""
    chosen: list[Tensor] = []
    most = max(share for share, _ in pool)
    for share, direction in sorted(pool, key=lambda each: -each[0]):
        if share < LIKE * most:
            break
        if len(chosen) < count and float(torch.linalg.svdvals(torch.stack([*chosen, direction]))[-1]) > 1e-3:
            chosen.append(direction)
    return chosen
