"""The draws of several evaluations on the device, where a recorded evaluation finds them without the host."""

from collections.abc import Callable

import torch
from torch import Tensor

EVALUATIONS = 32
"""Evaluations whose draws are made at a time, and moved to the device in one copy."""


class DrawBuffer:
    """The draws of consecutive evaluations, which an evaluation finds by a counter that lies on the device too.

    A recording reads the memory that it has seen, so that draws and counter are written in place.
    """

    def __init__(self, device: torch.device) -> None:
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._first = 0
        self._draws: dict[str, tuple[Callable[[int], Tensor], Tensor]] = {}

    def take(self, name: str, draw: Callable[[int], Tensor]) -> Tensor:
        """Return the draws of this name for the prepared evaluation; ``draw`` makes those of any, on the CPU."""
        if name not in self._draws:
            self._draws[name] = draw, self._drawn(draw).to(self._counter.device)
        return self._draws[name][1].index_select(0, self._counter)[0]

    def prepare(self, evaluation: int) -> None:
        """Set the counter to an evaluation, and draw for it and the next ones if that was not done yet."""
        first = evaluation - evaluation % EVALUATIONS
        if first != self._first:
            self._first = first
            for draw, rows in self._draws.values():
                rows.copy_(self._drawn(draw))
        self._counter.fill_(evaluation - first)

    def _drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([draw(self._first + number) for number in range(EVALUATIONS)])
