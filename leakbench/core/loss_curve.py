"""The course of an optimisation: the objective at a few of its evaluations, small enough for every trial to keep."""

import math
import struct
from dataclasses import dataclass

import numpy as np
from torch import Tensor

MAX_POINTS = 20
"""The most points of a curve."""

_HEAD = struct.Struct("<II")
_LARGEST = 2**32 - 1


def marks(limit: int, every: int = 1) -> tuple[int, ...]:
    """Return the numbers of up to ``MAX_POINTS`` evaluations, evenly spaced by their logarithms, the last one included.

    Args:
        limit: the most evaluations of a search, from 1 on.
        every: how many are made at a time; the numbers are multiples of this, or the limit.
    """
    even = {round(limit ** (point / (MAX_POINTS - 1))) for point in range(MAX_POINTS)}
    return tuple(sorted({min(limit, -(-mark // every) * every) for mark in even}))


@dataclass(frozen=True)
class Curve:
    """The objective of T searches at ``marks(limit, every)``.

    Attributes:
        limit: see ``marks``.
        every: see ``marks``.
        values: [T, K], one for each of K marks; not finite once a search had ended or diverged.
    """

    limit: int
    every: int
    values: Tensor

    def rows(self) -> list[bytes]:
        """Return each search's curve as a run file keeps it; empty if nothing of it is finite."""
        return [_encoded(self.limit, self.every, row) for row in self.values.detach().float().cpu().numpy()]


def _encoded(limit: int, every: int, values: np.ndarray) -> bytes:
    known = np.flatnonzero(np.isfinite(values))
    if not len(known) or limit > _LARGEST:
        return b""
    return _HEAD.pack(limit, every) + values[: known[-1] + 1].astype("<f4").tobytes()


def decoded(data: bytes) -> list[tuple[int, float]]:
    """Return the points of a curve that a run file keeps: the number of an evaluation, and the objective there.

    Raises:
        ValueError: these are no such bytes.
    """
    if len(data) < _HEAD.size or (len(data) - _HEAD.size) % 4:
        raise ValueError(f"a loss curve of {len(data)} bytes")
    limit, every = _HEAD.unpack_from(data)
    if not 1 <= every <= limit:
        raise ValueError(f"a loss curve of {limit} evaluations, {every} at a time")
    values = np.frombuffer(data, "<f4", offset=_HEAD.size).tolist()
    places = marks(limit, every)
    if len(values) > len(places):
        raise ValueError(f"a loss curve of {len(values)} points")
    return [(place, value) for place, value in zip(places, values) if math.isfinite(value)]
