"""Per-trial randomness that does not depend on batching, order, device or resume.

A draw is a pure function of the trial's key and a purpose: the same key and purpose always give the same numbers.
Draws are made on the CPU, one generator a trial, and moved to the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the key's parts."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Seed torch's global CPU generator by a hash of the key, and give the caller's state back afterwards.

    Module initialisers and dropout draw only from the global generator; nothing else is drawn from it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator(*key).initial_seed())
        yield


@dataclass(frozen=True)
class Rng:
    """The random source of an attack: one key a trial.

    Example:
        >>> rng = Rng(("image 0", "image 1"))
        >>> start = rng.normal("start", (3, 32, 32))
        >>> bool((start == rng.normal("start", (3, 32, 32))).all()), tuple(start.shape)
        (True, (2, 3, 32, 32))
    """

    keys: tuple[str, ...]
    device: torch.device = torch.device("cpu")

    def generators(self, purpose: str | Sequence[str]) -> list[torch.Generator]:
        """Return one generator a trial for this purpose, or for each trial's own."""
        purposes = [purpose] * len(self.keys) if isinstance(purpose, str) else purpose
        return [generator(key, own) for key, own in zip(self.keys, purposes, strict=True)]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return [T, *shape] of independent N(0, 1) draws."""
        return self._stack([torch.randn(tuple(shape), generator=rng) for rng in self.generators(purpose)])

    def uniform(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return [T, *shape] of independent U[0, 1) draws."""
        return self._stack([torch.rand(tuple(shape), generator=rng) for rng in self.generators(purpose)])

    def select(self, rows: Sequence[int]) -> Rng:
        """Return the source of only these trials; each gets the same numbers as before."""
        return Rng(tuple(self.keys[row] for row in rows), self.device)

    def fork(self, purpose: str) -> Rng:
        """Return an independent source for a sub-task, such as one restart."""
        return Rng(tuple(f"{key}/{purpose}" for key in self.keys), self.device)

    def _stack(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).to(self.device)
