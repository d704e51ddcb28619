"""Checks of the images that a metric compares, and batches that bound the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leakbench.metrics.base import Metric


def check_pair(metric: Metric, images: Tensor, truth: Tensor) -> None:
    """Raise ValueError unless a metric can compare the images.

    Args:
        metric: which; it states the smallest image.
        images: [T, C, H, W] reconstructions of any finite range, float32 or float64.
        truth: [T, C, H, W] in [0, 1], float32 or float64.
    """
    if images.dim() != 4 or images.shape != truth.shape:
        raise ValueError(
            f"reconstructions of shape {list(images.shape)} do not match a truth of shape {list(truth.shape)}; "
            "give two tensors [T, C, H, W]"
        )
    for name, values in (("reconstruction", images), ("truth", truth)):
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the {name} has dtype {values.dtype}; give torch.float32 or torch.float64")
        if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
            row = int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0, 0])
            raise ValueError(f"the {name} of row {row} is not finite; replace failed rows before they are scored")
    if truth.numel():
        low, high = (float(value) for value in truth.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"the truth ranges from {low:g} to {high:g}; give it in [0, 1]")
    height, width = images.shape[-2:]
    if min(height, width) < metric.smallest:
        raise ValueError(
            f"{metric.name} needs images of at least {metric.smallest} x {metric.smallest} pixels; {height} x {width} "
            "is too small"
        )


def rgb(images: Tensor) -> Tensor:
    """Return [T, 3, H, W]: grey images [T, 1, H, W] replicated, RGB as it is; raise ValueError for other channels."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images of {images.shape[1]} channels are neither grey nor RGB; give 1 or 3 channels")
    return images.expand(-1, 3, -1, -1)


def by_rows(metric: Callable[[Tensor, Tensor], Tensor], images: Tensor, truth: Tensor, pixels: int) -> Tensor:
    """Return the metric's values [T, ...], computed on as many rows at once as hold about this many pixels."""
    rows = max(1, pixels // (images.shape[-2] * images.shape[-1]))
    return torch.cat([metric(x, y) for x, y in zip(images.split(rows), truth.split(rows))])
