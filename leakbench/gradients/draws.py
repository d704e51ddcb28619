"""The draws of a network's random layers: each trial from its own generator, however trials are run.

Dropout and stochastic depth would draw from torch's global generator, one mask for a whole batch. Here every value of
a trial comes from that trial's generator, in the order in which the network asks, so that it depends neither on the
trials beside it nor on the path by which gradients are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.errors import Unsupported

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
Generators = Callable[[], Sequence[torch.Generator]]
"""Makes one generator a trial; it is called when a network first draws, which most never do."""


class MadeDraws(Protocol):
    """Draws that were made before the pass that takes them, so that it can be recorded."""

    trials: int

    def rows(self, call: int, shape: tuple[int, ...], draw: Draw) -> Tensor:
        """Return the results [T, *shape] of the ``call``-th draw of a pass, the others not counted, on the device."""
        ...


class Draws:
    """The source of the random numbers of one forward pass.

    Args:
        source: makes one generator a trial, or has draws that were made before; None for a network that must not draw.
        known: by the number of a drawing call in the pass, what it keeps: [T, 1, *shape] of 0 and 1. The others draw.
        trial: the number of the one trial of the pass: an integer or, under ``vmap``, a scalar tensor. None for a pass
            whose leading axis holds the trials, several places for each if it was split further.
        native: draw what torch's own functions would draw on the CPU from a global generator in the same state: those
            of a client's network.
    """

    def __init__(
        self,
        source: Generators | MadeDraws | None,
        trial: int | Tensor | None = None,
        known: Mapping[int, Tensor] = MappingProxyType({}),
        native: bool = False,
    ) -> None:
        self._source = cache(source) if callable(source) else source
        self._trial = trial
        self._known = known
        self._native = native
        self._calls = 0
        self._taken = 0

    @property
    def in_place(self) -> bool:
        """Whether a tensor can be filled with draws.

        Under ``vmap`` a tensor that was made inside belongs to all trials and cannot; a network that uses what the
        filling returns is served, and ``choose_path`` finds out any other.
        """
        return not isinstance(self._trial, Tensor)

    def of(self, trial: int | Tensor) -> Draws:
        """Return the source of a pass of a single trial."""
        return Draws(self._source, trial, self._known, self._native)

    def take(self, shape: Sequence[int], draw: Draw) -> Tensor:
        """Return the results of ``draw`` on each trial's part of a tensor of this shape.

        Raises:
            Unsupported: there are no generators.
            ValueError: the leading axis does not hold the trials.
        """
        if self._source is None:
            raise Unsupported("the network draws random numbers, and no source of them was given")
        if not callable(self._source):
            return self._made(self._source, tuple(shape), draw)
        generators = self._source()
        if isinstance(self._trial, int):
            return draw(tuple(shape), generators[self._trial])
        if self._trial is not None:
            rows = torch.stack([draw(tuple(shape), generator) for generator in generators])
            return rows.to(self._trial.device).index_select(0, self._trial[None])[0]
        own = _part(shape, len(generators))
        return torch.cat([draw(own, generator) for generator in generators])

    def _made(self, source: MadeDraws, shape: tuple[int, ...], draw: Draw) -> Tensor:
        """Return draws that were made before, as ``take`` does."""
        self._taken += 1
        own = _part(shape, source.trials) if self._trial is None else shape
        rows = source.rows(self._taken - 1, own, draw)
        if isinstance(self._trial, int):
            return rows[self._trial]
        return rows.flatten(0, 1) if self._trial is None else rows.index_select(0, self._trial[None])[0]

    def kept(self, x: Tensor, shape: Sequence[int], p: float) -> Tensor:
        """Return what dropout with probability ``p`` keeps: 0 and 1, of this shape."""
        known = self._next(shape)
        if known is not None:
            return known
        if self._native:
            return self.take(shape, partial(_bernoulli, 1 - p, x.dtype)).to(x.device)
        return self.uniform(x, shape) >= p

    def ones(self, x: Tensor, p: float | Tensor) -> Tensor:
        """Return draws shaped like a tensor that are 1 with probability ``p``, and else 0."""
        known = self._next(x.shape)
        if known is not None:
            return known
        if self._native and isinstance(p, float):
            return self.take(x.shape, partial(_bernoulli, p, x.dtype)).to(x.device)
        return self.uniform(x) < p

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
        draw = partial(_uniform, self._kind(like))
        return self.take(like.shape if shape is None else shape, draw).to(like.device)

    def normal(self, like: Tensor) -> Tensor:
        """Return N(0, 1) draws shaped like a tensor."""
        return self.take(like.shape, partial(_normal, self._kind(like))).to(like)

    def _kind(self, like: Tensor) -> torch.dtype:
        """Return the type of draws: float32, so that a trial has the same in float64, or as torch draws them."""
        return like.dtype if self._native else torch.float32


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


def _part(shape: Sequence[int], trials: int) -> tuple[int, ...]:
    """Return the shape of one trial's part; raise ValueError if the leading axis does not hold the trials."""
    if not shape or shape[0] % trials:
        raise ValueError(f"random numbers of shape {tuple(shape)} have no axis of {trials} trials")
    return (shape[0] // trials, *shape[1:])


def _uniform(kind: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=kind)


def _normal(kind: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=kind)


def _bernoulli(p: float, kind: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=kind).bernoulli_(p, generator=generator)
