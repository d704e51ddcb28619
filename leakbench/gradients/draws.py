"""The draws of a network's random layers: each trial from its own generator, however trials are run.

Dropout and stochastic depth would draw from torch's global generator, one mask for a whole batch. Here every value of
a trial comes from that trial's generator, in the order in which the network asks, so that it depends neither on the
trials beside it nor on the path by which gradients are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.errors import Unsupported

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
Generators = Callable[[], Sequence[torch.Generator]]
"""Makes one generator a trial; it is called when a network first draws, which most never do."""


class Draws:
    """The source of the random numbers of one forward pass.

    Args:
        generators: makes one generator a trial; None for a network that must not draw.
        known: by the number of a drawing call in the pass, what it keeps: [T, 1, *shape] of 0 and 1. The others draw.
        trial: the number of the one trial of the pass: an integer or, under ``vmap``, a scalar tensor. None for a pass
            whose leading axis holds the trials, several places for each if it was split further.
    """

    def __init__(
        self,
        generators: Generators | None,
        trial: int | Tensor | None = None,
        known: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        self._make = generators and cache(generators)
        self._trial = trial
        self._known = known
        self._calls = 0

    @property
    def in_place(self) -> bool:
        """Whether a tensor can be filled with draws.

        Under ``vmap`` a tensor that was made inside belongs to all trials and cannot; a network that uses what the
        filling returns is served, and ``choose_path`` finds out any other.
        """
        return not isinstance(self._trial, Tensor)

    def of(self, trial: int | Tensor) -> Draws:
        """Return the source of a pass of a single trial."""
        return Draws(self._make, trial, self._known)

    def take(self, shape: Sequence[int], draw: Draw) -> Tensor:
        """Return the results of ``draw`` on each trial's part of a tensor of this shape.

        Raises:
            Unsupported: there are no generators.
            ValueError: the leading axis does not hold the trials.
        """
        if self._make is None:
            raise Unsupported("the network draws random numbers, and no source of them was given")
        generators = self._make()
        if isinstance(self._trial, int):
            return draw(tuple(shape), generators[self._trial])
        if self._trial is not None:
            rows = torch.stack([draw(tuple(shape), generator) for generator in generators])
            return rows.to(self._trial.device).index_select(0, self._trial[None])[0]
        if not shape or shape[0] % len(generators):
            raise ValueError(f"random numbers of shape {tuple(shape)} have no axis of {len(generators)} trials")
        own = (shape[0] // len(generators), *shape[1:])
        return torch.cat([draw(own, generator) for generator in generators])

    def kept(self, x: Tensor, shape: Sequence[int], p: float) -> Tensor:
        """Return what dropout with probability ``p`` keeps: 0 and 1, of this shape."""
        known = self._next(shape)
        return self.uniform(x, shape) >= p if known is None else known

    def ones(self, x: Tensor, p: float | Tensor) -> Tensor:
        """Return draws shaped like a tensor that are 1 with probability ``p``, and else 0."""
        known = self._next(x.shape)
        return self.uniform(x) < p if known is None else known

    def skip(self) -> None:
        """Count a drawing call whose draws are never known."""
        self._calls += 1

    def _next(self, shape: Sequence[int]) -> Tensor | None:
        """Count a drawing call, and return its draws if they are known and of this shape."""
        value = self._known.get(self._calls)
        self._calls += 1
        if value is None:
            return None
        if isinstance(self._trial, int):
            value = value[self._trial]
        elif self._trial is not None:
            value = value.index_select(0, self._trial[None])[0]
        else:
            value = value.flatten(0, 1)
        return value if value.shape == tuple(shape) else None

    def uniform(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return U[0, 1) draws of this shape (by default that of ``like``)."""
        return self.take(like.shape if shape is None else shape, _uniform).to(like.device)

    def normal(self, like: Tensor) -> Tensor:
        """Return N(0, 1) draws shaped like a tensor."""
        return self.take(like.shape, _normal).to(like)


def random_operations(draws: Draws) -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return torch's drawing functions, and their replacements."""

    def drop(x: Tensor, shape: Sequence[int], p: float, training: bool, inplace: bool) -> Tensor:
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        if not training or p == 0:
            return x
        keep = draws.kept(x, shape, p).to(x.dtype)
        keep = keep / (1 - p) if p < 1 else keep
        return x.mul_(keep) if inplace else x * keep

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return drop(x, x.shape, p, training, inplace)

    def feature_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return drop(x, (*x.shape[:2], *[1] * (x.ndim - 2)), p, training, inplace)

    def bernoulli_(x: Tensor, p: float | Tensor = 0.5, *, generator: None = None) -> Tensor:
        filled = draws.ones(x, p).to(x.dtype)
        return x.copy_(filled) if draws.in_place else filled

    def bernoulli(x: Tensor, *, generator: None = None) -> Tensor:
        return draws.ones(x, x).to(x.dtype)

    def rand_like(x: Tensor) -> Tensor:
        draws.skip()
        return draws.uniform(x).to(x.dtype)

    def randn_like(x: Tensor) -> Tensor:
        draws.skip()
        return draws.normal(x)

    return {
        F.dropout: dropout,
        torch.dropout: dropout,
        F.dropout1d: feature_dropout,
        F.dropout2d: feature_dropout,
        F.dropout3d: feature_dropout,
        torch.feature_dropout: feature_dropout,
        torch.Tensor.bernoulli_: bernoulli_,
        torch.bernoulli: bernoulli,
        torch.rand_like: rand_like,
        torch.randn_like: randn_like,
    }


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)
