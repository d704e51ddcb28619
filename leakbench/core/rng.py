"""Per-trial randomness that does not depend on batching, order, device or resume.

A draw is a pure function of the trial's key and a purpose: the same key and purpose always give the same numbers.
Draws are made on the CPU, one generator a trial, and moved to the device.

A run has a *salt*, which no attack is given. The key of every draw is a digest of the salt and of the purpose of the
draw, so that the keys that an attack is given name no image, and do not let it compute a client's keys.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from leakbench.core.device import accelerator
from leakbench.errors import BadOption


def new_salt() -> str:
    """Return a random salt: 32 hex digits."""
    return secrets.token_hex(16)


def check_salt(salt: str) -> None:
    """Raise BadOption unless a salt is 32 hex digits, or empty: the keys are then not salted."""
    if salt and not re.fullmatch("[0-9a-f]{32}", salt):
        raise BadOption(f"salt {salt!r} must be 32 hex digits (0-9, a-f); leave it out for a random one")


def salted(plain: str, side: Literal["attack", "client"], salt: str) -> str:
    """Return the key of a draw: 32 hex digits that say nothing of the plain key to anybody without the salt.

    Attackers and clients have different salts, derived from that of the run by keyed BLAKE2b (RFC 7693), so that no
    attacker's key is a client's.

    Args:
        plain: the purpose of the draw, with seed, dataset and image.
        side: for whom it is drawn; whatever follows from a private image is the client's.
        salt: the run's (``check_salt``); empty: the plain key itself, as in runs of before there were salts.
    """
    if not salt:
        return plain
    own = hashlib.blake2b(key=salt.encode(), person=side.encode()).digest()
    return hashlib.blake2b(plain.encode(), key=own, digest_size=16).hexdigest()


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the key's parts."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextmanager
def seeded(*key: object, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global CPU generator by a hash of the key, and give the caller's state back afterwards.

    Module initialisers and dropout draw only from the global generator; nothing else is drawn from it.

    Args:
        key: see above.
        device: seed the global generator of this device too, from which dropout on it draws.
    """
    seed = generator(*key).initial_seed()
    module = None if device is None else accelerator(device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if module is None:
            yield
            return
        before = module.get_rng_state(device)
        with module.device(device):
            module.manual_seed(seed)
        try:
            yield
        finally:
            module.set_rng_state(before, device)


class DrawsOnHost(TorchFunctionMode):
    """In this context what is drawn from a generator of the CPU is drawn there, and moved to a device.

    Code that is written for the CPU then draws the same numbers for tensors of any device. Tensors that it makes
    without naming a device are made on this one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._others = torch.device(device)

    def __enter__(self) -> DrawsOnHost:
        """Begin."""
        self._others.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._others.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        named = dict(kwargs or {})
        own = named.get("generator")
        if not isinstance(own, torch.Generator) or own.device.type != "cpu":
            return func(*args, **named)
        if not any(isinstance(value, Tensor) for value in args):
            return func(*args, **(named | {"device": "cpu"})).to(self._device)
        if func.__name__.endswith("_"):  # fills the tensor
            return args[0].copy_(func(torch.empty_like(args[0], device="cpu"), *args[1:], **named))
        return func(*(value.cpu() if isinstance(value, Tensor) else value for value in args), **named).to(self._device)


@dataclass(frozen=True)
class Rng:
    """The random source of an attack: one key a trial, which says nothing of the trial (``salted``).

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
