"""The draws of several evaluations on the device, where a recorded evaluation finds them without the host."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor

from leakbench.gradients.draws import Draw, MadeDraws
from leakbench.optim import Evaluation

EVALUATIONS = 32
"""Evaluations whose draws are made at a time, and moved to the device in one copy."""


class DrawBuffer:
    """The draws of consecutive evaluations, which an evaluation finds by a counter that lies on the device too.

    A recording reads the memory that it has seen, so that draws and counter are written in place.
    """

    def __init__(self, device: torch.device) -> None:
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._first = 0
        self._offsets: tuple[int, ...] | None = None
        self._draws: dict[str, tuple[Callable[[Evaluation], Tensor], Tensor]] = {}
        self._layers: dict[int, LayerDraws] = {}

    def layers(
        self, step: int, trials: int, generators: Callable[[Evaluation], Sequence[torch.Generator]]
    ) -> MadeDraws:
        """Return the draws of the network's random layers in one of the local steps, of the prepared evaluation.

        Args:
            step: the local step.
            trials: T.
            generators: makes the T generators of any evaluation.
        """
        return self._layers.setdefault(step, LayerDraws(self, f"layers {step}", trials, generators))

    def take(self, name: str, draw: Callable[[Evaluation], Tensor]) -> Tensor:
        """Return the draws of this name for the prepared evaluation; ``draw`` makes those of any, on the CPU."""
        if name not in self._draws:
            self._draws[name] = draw, self._drawn(draw).to(self._counter.device)
        return self._draws[name][1].index_select(0, self._counter)[0]

    def prepare(self, evaluation: Evaluation) -> None:
        """Set the counter to an evaluation, and draw for it and the next ones if that was not done yet."""
        if not self._draws:
            return
        number = evaluation if isinstance(evaluation, int) else evaluation[0]
        offsets = None if isinstance(evaluation, int) else tuple(own - number for own in evaluation)
        first = number - number % EVALUATIONS
        if (first, offsets) != (self._first, self._offsets):
            self._first, self._offsets = first, offsets
            for draw, rows in self._draws.values():
                rows.copy_(self._drawn(draw))
        self._counter.fill_(number - first)

    def _drawn(self, draw: Callable[[Evaluation], Tensor]) -> Tensor:
        """Return the draws [EVALUATIONS, T, *shape] of the present evaluations, whose numbers grow together."""
        numbers = range(self._first, self._first + EVALUATIONS)
        if self._offsets is None:
            return torch.stack([draw(number) for number in numbers])
        return torch.stack([draw([number + offset for offset in self._offsets]) for number in numbers])


class LayerDraws:
    """The draws of random layers in a buffer; each trial's come from one generator, in the order of the calls."""

    def __init__(
        self,
        buffer: DrawBuffer,
        name: str,
        trials: int,
        generators: Callable[[Evaluation], Sequence[torch.Generator]],
    ) -> None:
        self.trials = trials
        self._buffer = buffer
        self._name = name
        self._make = generators
        self._calls: list[tuple[tuple[int, ...], Draw]] = []
        self._open: dict[Hashable, tuple[Sequence[torch.Generator], int]] = {}

    def rows(self, call: int, shape: tuple[int, ...], draw: Draw) -> Tensor:
        """Return the draws [T, *shape] of a call for the prepared evaluation."""
        if call == len(self._calls):
            self._calls.append((shape, draw))
        return self._buffer.take(f"{self._name} {call}", partial(self._drawn, call))

    def _drawn(self, call: int, evaluation: Evaluation) -> Tensor:
        """Return the draws [T, *shape] of a call for any evaluation, on the CPU."""
        key = evaluation if isinstance(evaluation, int) else tuple(evaluation)
        generators, done = self._open.pop(key, (None, 0))
        if generators is None or done != call:
            generators = self._make(evaluation)
            for shape, draw in self._calls[:call]:
                for generator in generators:
                    draw(shape, generator)
        if len(self._open) > EVALUATIONS:
            self._open.clear()  # of evaluations that are over
        self._open[key] = generators, call + 1
        shape, draw = self._calls[call]
        return torch.stack([draw(shape, generator) for generator in generators])
