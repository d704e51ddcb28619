"""The update rule of a client's local training: that of ``torch.optim``, without side effects and differentiable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from leakbench.core.types import Gradient
from leakbench.errors import BadOption

BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's factors of the running means, and what its divisor has added: the defaults of ``torch.optim``."""


@dataclass(frozen=True)
class ClientState:
    """What an optimiser keeps between steps.

    Attributes:
        steps: how many were taken.
        first: by parameter, the momentum of SGD or the running mean of Adam's gradients.
        second: by parameter, the running mean of their squares.
    """

    steps: int = 0
    first: Mapping[str, Tensor] = field(default_factory=dict)
    second: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientOptimiser:
    """An optimiser of a client.

    Attributes:
        kind: ``sgd``, ``adam`` or ``adamw``.
        lr: the learning rate.
        momentum: of SGD, in [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: times the weights, is added to the gradient; AdamW subtracts it from the weights, times ``lr``.
        softness: of Adam, for one who differentiates its steps. Nearly all that a first step keeps of a gradient are
            its signs, whose derivative is 0. With a softness the derivative is that of a step whose divisor has this
            share of a tensor's root mean square added; the step itself stays as it is. Tensors are then [T, *shape].

    Raises:
        BadOption: a value is out of range, or momentum is given for Adam.
    """

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    softness: float = 0.0

    def __post_init__(self) -> None:
        inside = {
            "lr": 0 < self.lr < math.inf,
            "momentum": 0 <= self.momentum < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
        }
        if wrong := next((name for name, fine in inside.items() if not fine), None):
            value = getattr(self, wrong)
            raise BadOption(f"{wrong}={value:g} of a client's optimiser is out of range; give {_RANGES[wrong]}")
        if self.nesterov and not self.momentum:
            raise BadOption("nesterov=true of a client's optimiser needs momentum above 0; give momentum=0.9")
        if self.kind != "sgd" and self.momentum:
            raise BadOption(f"momentum={self.momentum:g} is of sgd, not of {self.kind}; leave it out")

    def moved(
        self, weights: Mapping[str, Tensor], gradient: Gradient, state: ClientState
    ) -> tuple[Gradient, ClientState]:
        """Return the weights after a step, and what the next one needs; nothing is changed in place.

        Args:
            weights: by name; those without a gradient stay.
            gradient: of the loss, by name.
            state: ``ClientState()`` before the first step.
        """
        plain = dict(gradient)
        if self.weight_decay and self.kind != "adamw":
            plain = {name: value + self.weight_decay * weights[name] for name, value in plain.items()}
        step, state = self._sgd(plain, state) if self.kind == "sgd" else self._adam(plain, state)
        shrunk = 1 - self.lr * self.weight_decay if self.kind == "adamw" else 1.0
        return {
            name: (value * shrunk if shrunk != 1 else value) - self.lr * step[name] if name in step else value
            for name, value in weights.items()
        }, state

    def unit(self, steps: int) -> float | None:
        """Return the multiple of a constant gradient that steps without decay add up to; None for Adam."""
        if self.kind != "sgd":
            return None
        weights, state = {"": torch.zeros((), dtype=torch.float64)}, ClientState()
        bare = ClientOptimiser(lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
        for _ in range(steps):
            weights, state = bare.moved(weights, {"": torch.ones((), dtype=torch.float64)}, state)
        return -float(weights[""])

    def decayed(self, steps: int) -> float:
        """Return the share of the weights that steps take away beside all gradients; 0 for Adam, where it depends."""
        if self.kind != "sgd" or not self.weight_decay:
            return 0.0
        weights, state = {"": torch.ones((), dtype=torch.float64)}, ClientState()
        for _ in range(steps):
            weights, state = self.moved(weights, {"": torch.zeros((), dtype=torch.float64)}, state)
        return 1 - float(weights[""])

    def _sgd(self, gradient: Gradient, state: ClientState) -> tuple[Gradient, ClientState]:
        if not self.momentum:
            return gradient, ClientState(state.steps + 1)
        before = state.first
        kept = {n: self.momentum * before[n] + value if n in before else value for n, value in gradient.items()}
        step = {n: value + self.momentum * kept[n] for n, value in gradient.items()} if self.nesterov else kept
        return step, ClientState(state.steps + 1, kept)

    def _adam(self, gradient: Gradient, state: ClientState) -> tuple[Gradient, ClientState]:
        steps = state.steps + 1
        first = _means(state.first, gradient, BETAS[0])
        second = _means(state.second, {name: value.square() for name, value in gradient.items()}, BETAS[1])
        scale = 1 - BETAS[0] ** steps, (1 - BETAS[1] ** steps) ** 0.5
        step = {name: value / scale[0] / (_root(second[name]) / scale[1] + EPS) for name, value in first.items()}
        if self.softness:
            for name, exact in step.items():
                square = second[name] / scale[1] ** 2
                typical = square.flatten(1).mean(1).view(-1, *[1] * (square.ndim - 1))
                smooth = first[name] / scale[0] / (_root(square + self.softness**2 * typical) + EPS)
                step[name] = smooth + (exact - smooth).detach()
        return step, ClientState(steps, first, second)


_RANGES = {
    "lr": "a finite number above 0",
    "momentum": "a number from 0 to below 1",
    "weight_decay": "a finite number from 0 on",
}


def _means(before: Mapping[str, Tensor], values: Gradient, beta: float) -> Gradient:
    return {
        name: beta * before[name] + (1 - beta) * value if name in before else (1 - beta) * value
        for name, value in values.items()
    }


def _root(values: Tensor) -> Tensor:
    """Return the square root, whose derivative at 0 is 0 instead of infinite."""
    return torch.where(values > 0, torch.where(values > 0, values, 1.0).sqrt(), 0.0)
