"""What every metric asks of its images, and how large batches are cut to bound the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def check_pair(images: Tensor, truth: Tensor) -> None:
    """Raise ValueError unless the images can be compared: equal shapes, finite values, truth in [0, 1].

    Args:
        images: [T, C, H, W] reconstructions of any finite range, float32 or float64.
        truth: [T, C, H, W] in [0, 1], float32 or float64.
    """
    if images.dim() != 4 or images.shape != truth.shape:
        raise ValueError(
            f"reconstructions of shape {list(images.shape)} do not fit a truth of shape {list(truth.shape)}; "
            "give two tensors [T, C, H, W]"
        )
    for what, values in (("reconstruction", images), ("truth", truth)):
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the {what} is of {values.dtype}; give torch.float32 or torch.float64")
        if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
            row = int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0, 0])
            raise ValueError(f"the {what} of row {row} is not finite; replace failed rows before they are scored")
    if truth.numel():
        low, high = (float(value) for value in truth.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"the truth ranges from {low:g} to {high:g}; give it in [0, 1]")


def check_size(images: Tensor, pixels: int, metric: str) -> None:
    """Raise ValueError where images [T, C, H, W] are narrower than the metric's window."""
    height, width = images.shape[-2:]
    if min(height, width) < pixels:
        raise ValueError(
            f"{metric} needs images of at least {pixels} x {pixels} pixels; {height} x {width} is too small for it"
        )


def by_rows(metric: Callable[[Tensor, Tensor], Tensor], images: Tensor, truth: Tensor, pixels: int) -> Tensor:
    """Return the metric's values [T, ...], computed on as many rows at once as hold about this many pixels."""
    rows = max(1, pixels // (images.shape[-2] * images.shape[-1]))
    return torch.cat([metric(x, y) for x, y in zip(images.split(rows), truth.split(rows))])
