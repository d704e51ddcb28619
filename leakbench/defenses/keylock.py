"""FedKL's key-lock: a private key and private layers produce the scale and shift of a normalisation."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from leakbench.core.component import NonNegative
from leakbench.core.text import FEDKL
from leakbench.core.types import Distribution, Gradient, Normal, Secret, Uniform
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, register
from leakbench.errors import BadOption
from leakbench.gradients.linear import layer_input
from leakbench.models.surgery import Layers, plain_norm, replace_module, replace_norms

LockGate = Literal["relu", "sigmoid", "none"]

LOCK_TENSORS = tuple(f"{layer}.{tensor}" for layer in ("scale", "shift") for tensor in ("weight", "bias"))
"""The tensors of a lock's layers."""
DRIFT_TENSORS = ("scale_drift", "shift_drift")
"""What training has added to them, in a lock that has it."""
START_SPREAD = 0.1
"""The standard deviation of the starts of free scales and shifts, relative to their mean."""

_GATES = {"relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda x: x}


class KeyLock(nn.Module):
    """gamma * BatchNorm(u) + beta with gamma = gate(W_g key + b_g) and beta = gate(W_b key + b_b).

    The key is a tensor of the module that no state dict holds. A lock with a ``previous`` one has no key of its own:
    it takes that lock's gamma and beta, one after the other.

    A lock with ``drift`` has been trained since its layers were drawn: ``scale_drift`` and ``shift_drift`` [C] are what
    this added before the gates.
    """

    key: Tensor
    scale_drift: Tensor
    shift_drift: Tensor
    gamma: Tensor
    beta: Tensor

    def __init__(
        self,
        channels: int,
        length: int,
        gate: LockGate,
        norm: nn.BatchNorm2d | None = None,
        previous: KeyLock | None = None,
        drift: bool = False,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.drift = drift
        self.displaced = False
        self.mean: float | None = None
        self.norm = norm or plain_norm(channels, None)
        self.scale = nn.Linear(length, channels)
        self.shift = nn.Linear(length, channels)
        self._previous = (previous,)  # in a tuple, so that it is no part of this module
        if previous is None:
            self.register_buffer("key", torch.zeros(length), persistent=False)
        if drift:
            for name in ("scale_drift", "shift_drift"):
                self.register_buffer(name, torch.zeros(channels), persistent=False)

    def displace(self, mean: float | None) -> None:
        """Take the drift out, and put numbers of one's own in: gamma and beta [C] are added behind the gates.

        Args:
            mean: of the key's entries, which then takes the key's place; None to keep the key.
        """
        if mean is not None and self.previous is None:
            del self.key
            self.mean = mean
        if self.drift:
            del self.scale_drift, self.shift_drift
        self.drift, self.displaced = False, True
        for name in ("gamma", "beta"):
            self.register_buffer(name, torch.zeros_like(self.shift.bias), persistent=False)
        for layer in (self.scale, self.shift):
            layer.requires_grad_(False)  # behind another gate than the client's, their gradients are others

    @property
    def previous(self) -> KeyLock | None:
        """The lock whose gamma and beta are the key, or None."""
        return self._previous[0]

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, [C] each ([T, C] for a key [T, S])."""
        gate = _GATES[self.gate]
        if self.mean is None:
            key = self.key if self.previous is None else torch.cat(self.previous.coefficients(), -1)
            scale, shift = self.scale(key), self.shift(key)
        else:
            scale, shift = (self.mean * layer.weight.sum(-1) + layer.bias for layer in (self.scale, self.shift))
        if self.drift:
            scale, shift = scale + self.scale_drift, shift + self.shift_drift
        gamma, beta = gate(scale), gate(shift)
        return (gamma + self.gamma, beta + self.beta) if self.displaced else (gamma, beta)

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
        lock_init: the distribution of the lock weights: torch's ``default`` for linear layers, or ``uniform``: U(-0.5,
            0.5).
        layers: ``first`` locks the first block, as published; ``all`` locks every block, each with the scale and
            shift of the block before as its key, as a variant in the released code does.
        drift: how far training has moved the client's lock from the initial one, which the server handed out: the
            standard deviation of what it added to scale and shift before the gates, in units of their own. 0 is the
            lock of an untrained network. A step of SGD adds a multiple of the key to every row of W, and the same
            multiple to b, so that what training does to a lock with one key is one number a channel; it is a secret
            of its own (group ``drift``), and ``lock-weights`` are then those of the initial lock, which is stale.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = f"{FEDKL}, section 3.3, equation 30 (and released code)"
    assumes: ClassVar[str] = "The attacker knows neither key nor lock, and does not model scale and shift."
    cost: ClassVar[str] = "Two linear layers for each locked block; every client's model works only with its own key."
    fails: ClassVar[str] = (
        "Closed forms, and attacks that optimise scale and shift; the key follows from the lock's gradients. Only the "
        "contrast (removed by the normalisation) and the channels behind closed ReLU gates stay hidden."
    )
    version: ClassVar[int] = 2  # 2: adaptive attackers start from a known lock
    length: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    gate: LockGate = "relu"
    keys: Literal["uniform", "normal"] = "uniform"
    lock_init: Literal["default", "uniform"] = "default"
    layers: Layers = "first"
    drift: NonNegative = 0.0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a copy whose normalisation is a key-lock, inserted where the network has none; the key is zero."""
        chain: list[KeyLock] = []

        def make(channels: int, old: nn.Module | None) -> nn.Module:
            previous = chain[-1] if chain else None
            length = self.length if previous is None else 2 * previous.scale.out_features
            chain.append(KeyLock(channels, length, self.gate, plain_norm(channels, old), previous, self.drift > 0))
            return chain[-1]

        return replace_norms(model, make, self.layers)

    def secrets(self, model: nn.Module) -> tuple[Secret, ...]:
        """Return the key (group ``key``), the weights and biases of all lock layers (``lock``), and their ``drift``."""
        law: Distribution = Uniform() if self.keys == "uniform" else Normal()
        found = []
        for name, lock in locks(model).items():
            width = 0.5 if self.lock_init == "uniform" else lock.scale.in_features**-0.5
            if lock.previous is None:
                found.append(Secret(f"{name}.key", "key", law))
            for layer in ("scale", "shift"):
                found += [
                    Secret(f"{name}.{layer}.{tensor}", "lock", Uniform(-width, width)) for tensor in ("weight", "bias")
                ]
            if lock.drift:
                moved = Normal(0, self.drift * self._deviation(lock))
                found += [Secret(f"{name}.{layer}_drift", "drift", moved) for layer in ("scale", "shift")]
        return tuple(found)

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who uses what is known of the lock, and ``free``, who uses no lock."""
        aided = AdaptiveAttacker(
            "recovers the key from given lock gradients; else optimises scale and shift, starting at a given lock's",
            relax=partial(self._relaxed, aided=True),
            recover=recovered_keys,
            scale_free=True,
            summed=True,
            batched=True,
        )
        words = "optimises scale and shift, starting at their mean over keys and locks"
        return {"default": aided, "free": replace(aided, description=words, relax=partial(self._relaxed, aided=False))}

    def _relaxed(self, model: nn.Module, hidden: Collection[str], aided: bool) -> tuple[nn.Module, tuple[Secret, ...]]:
        """Return the network with scale and shift of every lock free, unless key and locks are all known.

        They are 2 C numbers, whatever key and lock they come from. If the attacker is ``aided``, and knows a lock but
        not the key, or not what training has added to the lock, they start at what that lock makes of the key, or of
        the mean key; else at their mean.
        """
        private = {f"{name}.{tensor}" for name in locks(model) for tensor in ("key", *LOCK_TENSORS, *DRIFT_TENSORS)}
        if private.isdisjoint(hidden):
            return model, ()
        known = aided and not {f"{name}.{tensor}" for name in locks(model) for tensor in LOCK_TENSORS} & set(hidden)
        model = copy.deepcopy(model)
        optimised = []
        for name, lock in locks(model).items():
            size = self._mean_gate(lock)
            if known:
                lock.displace((0.5 if self.keys == "uniform" else 0.0) if f"{name}.key" in hidden else None)
            else:
                replace_module(model, name, FreeAffine(lock))
            start = Normal(0 if known else size, START_SPREAD * size)
            optimised += [Secret(f"{name}.{tensor}", "lock", start) for tensor in ("gamma", "beta")]
        return model, tuple(optimised)

    def _deviation(self, lock: KeyLock) -> float:
        """Return the standard deviation of W key + b over keys and initial locks.

        The sum is nearly normal, with mean 0 and variance (S E[key^2] + 1) w^2 / 3 for weights from U(-w, w).
        """
        length = lock.scale.in_features
        width = 0.5 if self.lock_init == "uniform" else length**-0.5
        square = 1 / 3 if self.keys == "uniform" else 1.0
        if lock.previous is not None:
            variance = self._moved(lock.previous) ** 2
            square = {"relu": variance / 2, "sigmoid": 0.25 + variance / 16, "none": variance}[self.gate]
        return width * math.sqrt((length * square + 1) / 3)

    def _moved(self, lock: KeyLock) -> float:
        """Return the standard deviation of what goes through the gates, drift included."""
        return self._deviation(lock) * math.hypot(1, self.drift)

    def _mean_gate(self, lock: KeyLock) -> float:
        """Return the mean of gamma and beta over keys and locks; without a gate, where it is 0, of their size."""
        if self.gate == "sigmoid":
            return 0.5
        return self._moved(lock) * math.sqrt((1 if self.gate == "relu" else 4) / (2 * math.pi))


def recovered_keys(model: nn.Module, observed: Observed, weights: Weights) -> Gradient:
    """Return the key [T, S] by name: the input of scale and shift, which their gradients give if both were sent."""
    found = {}
    for name, lock in locks(model).items():
        sent = [observed.get(f"{name}.{tensor}") for tensor in LOCK_TENSORS]
        rows = [value for value in sent if value is not None]
        if lock.previous is None and len(rows) == len(LOCK_TENSORS):
            found[f"{name}.key"] = layer_input(torch.cat(rows[::2], 1), torch.cat(rows[1::2], 1))
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

    Without its key (with zeros in its place) the network runs, with the scale and shift of the lock's biases.

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
    """Return a network's state dict without the lock's layers and the key: what a client may send."""
    private = {f"{name}.{layer}.".lstrip(".") for name in locks(model) for layer in ("scale", "shift")}
    return {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(private))}


def _keyed(model: nn.Module) -> KeyLock:
    found = [lock for lock in locks(model).values() if lock.previous is None]
    if not found:
        raise BadOption(f"{type(model).__name__} has no key-lock; put one in with leakbench.keylock(model)")
    return found[0]
