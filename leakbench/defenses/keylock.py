"""FedKL's key-lock: a private key and private layers produce the scale and shift of a normalisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from leakbench.defenses.base import Defense, register
from leakbench.errors import BadOption
from leakbench.gradients.linear import layer_input
from leakbench.models.surgery import Layers, plain_norm, replace_module, replace_norms
from leakbench.types import Gradient, Law, Normal, Secret, Uniform

Gate = Literal["relu", "sigmoid", "none"]

LOCK = tuple(f"{layer}.{tensor}" for layer in ("scale", "shift") for tensor in ("weight", "bias"))
"""The tensors of a lock's layers."""
START = 0.1
"""How far starts of free scales and shifts lie apart, relative to their mean."""

_GATES = {"relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda x: x}


class KeyLock(nn.Module):
    """gamma * BatchNorm(u) + beta with gamma = gate(W_g key + b_g) and beta = gate(W_b key + b_b).

    The key is a tensor of the module that no state dict holds. A lock with a ``previous`` one has no key of its own:
    it takes that lock's gamma and beta, one after the other.
    """

    key: Tensor

    def __init__(
        self,
        channels: int,
        length: int,
        gate: Gate,
        norm: nn.BatchNorm2d | None = None,
        previous: KeyLock | None = None,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.norm = norm or plain_norm(channels, None)
        self.scale = nn.Linear(length, channels)
        self.shift = nn.Linear(length, channels)
        self._previous = (previous,)  # in a tuple, so that it is no part of this module
        if previous is None:
            self.register_buffer("key", torch.zeros(length), persistent=False)

    @property
    def chained(self) -> bool:
        """Whether the key is another lock's gamma and beta."""
        return self._previous[0] is not None

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, [C] each ([T, C] for a key [T, S])."""
        previous = self._previous[0]
        key = self.key if previous is None else torch.cat(previous.coefficients(), -1)
        gate = _GATES[self.gate]
        return gate(self.scale(key)), gate(self.shift(key))

    def forward(self, u: Tensor) -> Tensor:
        """Return the scaled and shifted normalisation of u [B, C, H, W]."""
        gamma, beta = self.coefficients()
        return gamma[..., None, None] * self.norm(u) + beta[..., None, None]


class FreeAffine(nn.Module):
    """gamma * BatchNorm(u) + beta with gamma and beta [C] of one's own: a lock to someone without key and lock."""

    gamma: Tensor
    beta: Tensor

    def __init__(self, lock: KeyLock) -> None:
        super().__init__()
        self.norm = lock.norm
        for name in ("gamma", "beta"):
            self.register_buffer(name, torch.zeros_like(lock.shift.bias))

    def forward(self, u: Tensor) -> Tensor:
        """Return the scaled and shifted normalisation of u [B, C, H, W]."""
        return self.gamma[..., None, None] * self.norm(u) + self.beta[..., None, None]


@register("keylock")
@dataclass(frozen=True)
class KeyLockDefense(Defense):
    """FedKL's key-lock in the first convolution-normalisation block; key, lock weights and lock gradients stay private.

    Attributes:
        length: the key's length S.
        gate: the activation on scale and shift; the released code has ReLU or sigmoid, the paper's equation none.
        keys: ``uniform`` draws the key from U[0, 1) as released, ``normal`` from N(0, 1).
        lock_init: the lock weights' law: torch's ``default`` for linear layers, or ``uniform``: U(-0.5, 0.5).
        layers: ``first`` locks the first block, as published; ``all`` locks every block, each with the scale and
            shift of the block before as its key, as a variant in the released code does.
    """

    reference: ClassVar[str] = "Wei et al. 2023, FedKL, arXiv 2305.04095, section 3.3, equation 30 (and released code)"
    assumes: ClassVar[str] = "The attacker knows neither key nor lock, and does not model scale and shift."
    cost: ClassVar[str] = "Two linear layers a locked block; every client's model works with its own key alone."
    fails: ClassVar[str] = (
        "Closed forms and searches that treat scale and shift as unknown; the lock's gradients give the key. "
        "What remains is what shut ReLU gates lose, and the contrast that the normalisation takes."
    )
    informed: ClassVar[str] = (
        "works out the key from the lock's gradients where these are sent; otherwise searches for scale and shift"
    )
    length: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    gate: Gate = "relu"
    keys: Literal["uniform", "normal"] = "uniform"
    lock_init: Literal["default", "uniform"] = "default"
    layers: Layers = "first"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a copy whose normalisation is a key-lock, inserted where the network has none; the key is zero."""
        chain: list[KeyLock] = []

        def make(channels: int, old: nn.Module | None) -> nn.Module:
            previous = chain[-1] if chain else None
            length = self.length if previous is None else 2 * previous.scale.out_features
            chain.append(KeyLock(channels, length, self.gate, plain_norm(channels, old), previous))
            return chain[-1]

        return replace_norms(model, make, self.layers)

    def secrets(self, model: nn.Module) -> tuple[Secret, ...]:
        """Return the key (group ``key``) and the weights and biases of all lock layers (group ``lock``)."""
        law: Law = Uniform() if self.keys == "uniform" else Normal()
        found = []
        for name, lock in locks(model).items():
            width = 0.5 if self.lock_init == "uniform" else lock.scale.in_features**-0.5
            if not lock.chained:
                found.append(Secret(f"{name}.key", "key", law))
            for layer in ("scale", "shift"):
                found += [
                    Secret(f"{name}.{layer}.{tensor}", "lock", Uniform(-width, width)) for tensor in ("weight", "bias")
                ]
        start = Normal(self._mean_gate(), START * self._mean_gate())
        found += [
            Secret(f"{name}.{tensor}", "lock", start, sought=True)
            for name, module in model.named_modules()
            if isinstance(module, FreeAffine)
            for tensor in ("gamma", "beta")
        ]
        return tuple(found)

    def relax(self, model: nn.Module, hidden: Collection[str]) -> nn.Module:
        """Return the network with scale and shift of every lock free, unless key and locks are all known.

        They are 2 C numbers, whatever key and lock they come from.
        """
        private = [f"{name}.{tensor}" for name in locks(model) for tensor in ("key", *LOCK)]
        if not set(private) & set(hidden):
            return model
        model = copy.deepcopy(model)
        for name, lock in locks(model).items():
            replace_module(model, name, FreeAffine(lock))
        return model

    def _mean_gate(self) -> float:
        """Return the mean of gamma and beta over keys and locks; without a gate, where it is 0, of their size.

        W key + b is nearly normal, with mean 0 and variance (S E[key^2] + 1) w^2 / 3 for weights from U(-w, w).
        """
        width = 0.5 if self.lock_init == "uniform" else self.length**-0.5
        square = 1 / 3 if self.keys == "uniform" else 1.0
        deviation = width * math.sqrt((self.length * square + 1) / 3)
        if self.gate == "sigmoid":
            return 0.5
        return deviation * math.sqrt((1 if self.gate == "relu" else 4) / (2 * math.pi))

    def recover(self, model: nn.Module, observed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Gradient:
        """Return the key, the input of scale and shift, which their gradients give exactly where both were sent."""
        found = {}
        for name, lock in locks(model).items():
            rows = {
                tensor: [observed[f"{name}.{layer}.{tensor}"] for layer in ("scale", "shift")]
                for tensor in ("weight", "bias")
                if all(f"{name}.{layer}.{tensor}" in observed for layer in ("scale", "shift"))
            }
            if not lock.chained and len(rows) == 2:
                found[f"{name}.key"] = layer_input(torch.cat(rows["weight"], 1), torch.cat(rows["bias"], 1))
        return found


def locks(model: nn.Module) -> dict[str, KeyLock]:
    """Return every key-lock of a network by name, in order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KeyLock)}


def get_key(model: nn.Module) -> Tensor:
    """Return a copy of the key [S] of a network with a key-lock; zeros where it was taken out.

    Raises:
        BadOption: the network has no key-lock.
    """
    return _keyed(model).key.detach().clone()


def set_key(model: nn.Module, key: Tensor | None) -> None:
    """Put a key [S] into a network with a key-lock, or take its key out (None): the network is changed.

    Without its key (with zeros in its place) the network runs, with the scale and shift of the lock's biases alone.

    Raises:
        BadOption: the network has no key-lock, or one of another length.
    """
    own = _keyed(model).key
    if key is not None and key.shape != own.shape:
        raise BadOption(
            f"the key has the shape {tuple(key.shape)}, and the lock takes {tuple(own.shape)}; give that key"
        )
    with torch.no_grad():
        own.copy_(torch.zeros_like(own) if key is None else key)


def shared_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict without the lock's layers: what a client may send; the key is in neither."""
    private = {f"{name}.{layer}.".lstrip(".") for name in locks(model) for layer in ("scale", "shift")}
    return {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(private))}


def _keyed(model: nn.Module) -> KeyLock:
    found = [lock for lock in locks(model).values() if not lock.chained]
    if not found:
        raise BadOption(f"{type(model).__name__} has no key-lock; put one in with leakbench.keylock(model)")
    return found[0]
