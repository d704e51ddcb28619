"""FedKL's key-lock: a private key and private layers produce the scale and shift of the first normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from leakbench.defenses.base import Defense, register
from leakbench.models.surgery import replace_first_norm
from leakbench.types import Law, Normal, Secret, Uniform

_GATES = {"relu": torch.relu, "sigmoid": torch.sigmoid, "none": lambda x: x}


class KeyLock(nn.Module):
    """gamma * BatchNorm(u) + beta with gamma = gate(W_g key + b_g) and beta = gate(W_b key + b_b)."""

    key: Tensor

    def __init__(self, channels: int, length: int, gate: str) -> None:
        super().__init__()
        self.gate = gate
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Linear(length, channels)
        self.shift = nn.Linear(length, channels)
        self.register_buffer("key", torch.zeros(length))

    def forward(self, u: Tensor) -> Tensor:
        """Return the scaled and shifted normalisation of u [B, C, H, W]."""
        gate = _GATES[self.gate]
        gamma, beta = gate(self.scale(self.key)), gate(self.shift(self.key))
        return gamma[..., None, None] * self.norm(u) + beta[..., None, None]


@register("keylock")
@dataclass(frozen=True)
class KeyLockDefense(Defense):
    """FedKL's key-lock in the first convolution-normalisation block; key, lock weights and lock gradients stay private.

    Attributes:
        length: the key's length S.
        gate: the activation on scale and shift; the released code has ReLU or sigmoid, the paper's equation none.
        keys: ``uniform`` draws the key from U[0, 1) as released, ``normal`` from N(0, 1).
        lock_init: the lock weights' law: torch's ``default`` for linear layers, or ``uniform``: U(-0.5, 0.5).
    """

    reference: ClassVar[str] = "Wei et al. 2023, FedKL, arXiv 2305.04095, section 3.3, equation 30 (and released code)"
    length: Annotated[int, Field(ge=1, le=1_000_000)] = 1024
    gate: Literal["relu", "sigmoid", "none"] = "relu"
    keys: Literal["uniform", "normal"] = "uniform"
    lock_init: Literal["default", "uniform"] = "default"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a copy whose first normalisation is a key-lock, inserted where the network has none."""
        return replace_first_norm(model, lambda channels: KeyLock(channels, self.length, self.gate))

    def secrets(self, model: nn.Module) -> tuple[Secret, ...]:
        """Return the key (group ``key``) and the weights and biases of both lock layers (group ``lock``)."""
        width = 0.5 if self.lock_init == "uniform" else self.length**-0.5
        key: Law = Uniform() if self.keys == "uniform" else Normal()
        found = []
        for name, module in model.named_modules():
            if isinstance(module, KeyLock):
                found.append(Secret(f"{name}.key", "key", key))
                for layer in ("scale", "shift"):
                    found += [
                        Secret(f"{name}.{layer}.{tensor}", "lock", Uniform(-width, width))
                        for tensor in ("weight", "bias")
                    ]
        return tuple(found)
