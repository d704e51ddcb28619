"""The draws of several evaluations on the device, where a recorded evaluation finds them without the host."""

from collections.abc import Callable

import torch
from torch import Tensor

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
