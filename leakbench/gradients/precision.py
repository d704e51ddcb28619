"""Full precision: float32 is float32 in every product, whatever the caller or the environment has set."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import backends


@contextmanager
def full_precision(deterministic: bool = False) -> Iterator[None]:
    """Make products and convolutions in float32, not in the ten bits of mantissa of TF32 (or bfloat16 on a CPU).

    Torch has two interfaces for this, and raises if it reads one after the other was used. Both are set here, so that
    both can be read inside, and both are as before afterwards.

    Args:
        deterministic: only with those of cuDNN's algorithms that give the same numbers every time.
    """
    cudnn, mkldnn = _module(backends.cudnn), _module(backends.mkldnn)
    owners = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    precisions = [owner.fp32_precision for owner in owners]
    matmul, convolutions = _matmul(), _convolutions()
    flags = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic = True, False, deterministic
    _set(matmul="highest", convolutions=False)
    for owner in owners:
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags
        _set(matmul, convolutions)
        for owner, precision in zip(owners, precisions):
            owner.fp32_precision = precision


def _set(matmul: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    backends.cudnn.allow_tf32 = convolutions


def _matmul() -> str:
    """Return the precision of products by the older interface; it raises only if the newer one says otherwise."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest" if backends.cuda.matmul.fp32_precision == "tf32" else "high"


def _convolutions() -> bool:
    """Return whether convolutions may use TF32 by the older interface."""
    try:
        return bool(backends.cudnn.allow_tf32)
    except RuntimeError:
        return _module(backends.cudnn).conv.fp32_precision != "tf32"


def _module(backend: Any) -> Any:
    """Return a module of torch whose attributes its types do not list."""
    return backend
