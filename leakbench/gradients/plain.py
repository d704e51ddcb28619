"""What a network does to save memory or time in its own ``forward``, turned off: checkpointing and autocast."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.amp.autocast_mode import autocast
from torch.utils import checkpoint


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """In this context ``torch.utils.checkpoint`` calls its function once, and keeps what the backward pass needs.

    The numbers are the same. The second computation would find a network whose parameters were given with a call
    without them, and one variant cannot be differentiated with ``torch.autograd.grad``.
    """
    own = vars(checkpoint)
    before = {name: own[name] for name in _PLAIN if name in own}
    own.update({name: _PLAIN[name] for name in before})
    try:
        yield
    finally:
        own.update(before)


@contextmanager
def without_autocast() -> Iterator[None]:
    """In this context ``torch.autocast`` does nothing: a network is computed in the types of its tensors.

    A client that computes in half precision sends numbers that a server need not compute as coarsely.
    """
    with noted_autocast():
        yield


@contextmanager
def noted_autocast() -> Iterator[list[autocast]]:
    """In this context every ``torch.autocast`` that is entered is kept in the list, and does nothing."""
    entered: list[autocast] = []
    enter, leave = autocast.__enter__, autocast.__exit__
    autocast.__enter__ = lambda self: entered.append(self) or self  # type: ignore[func-returns-value, method-assign]
    autocast.__exit__ = lambda self, *_: None  # type: ignore[method-assign]
    try:
        yield entered
    finally:
        autocast.__enter__, autocast.__exit__ = enter, leave  # type: ignore[method-assign]


def _called(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], **_: object) -> Any:
    return function(*args, **kwargs)


def _once(*_: object, **__: object) -> Iterator[None]:
    yield


class _Applied:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


_PLAIN: Mapping[str, Any] = {
    "_checkpoint_impl": _called,
    "_checkpoint_without_reentrant_generator": _once,
    "CheckpointFunction": _Applied,
}
"""Replacements for the functions of torch that do the work, by name: the first since 2.14, the others before it."""
