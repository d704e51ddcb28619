"""Tensors [T, *shape] in memory with the trials innermost, as [*shape, T]: elementwise operations of torch keep it."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from leakbench.core.compiled import SUFFIXES
from leakbench.gradients.lanes.library import kernels

JOINED_VALUES = 2**16
"""Gradients of up to this many values lie side by side in memory; a copy of larger ones costs more than it saves."""


def innermost(tensor: Tensor) -> Tensor:
    """Return a tensor [T, *shape] with the trials innermost; itself if it is so, or if all trials share it."""
    if len(tensor) == 1 or tensor.stride(0) == 0:
        return tensor
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def strides(tensor: Tensor) -> tuple[Tensor, int, int]:
    """Return a tensor [T, *shape], the distance of its trials in memory, and that of the elements of a trial.

    Elements that are not equally far apart are copied.
    """
    element = step = None
    for size, stride in zip(tensor.shape[:0:-1], tensor.stride()[:0:-1]):
        if size == 1:
            continue
        if step is not None and stride != step:
            return strides(tensor.contiguous())
        element = stride if element is None else element
        step = stride * size
    return tensor, tensor.stride(0), 1 if element is None else element


def views(rows: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return neighbouring parts of rows [T, N] as tensors [T, *shape], without a copy."""
    trial, element = rows.stride()
    found, begin = [], rows.storage_offset()
    for shape in shapes:
        steps = [element]
        for size in shape[:0:-1]:
            steps.append(steps[-1] * size)
        own = steps[::-1] if shape else ()
        found.append(rows.as_strided((len(rows), *shape), (trial, *own), begin))
        begin += element * math.prod(shape)
    return found


def are_innermost(*rows: Tensor) -> bool:
    """Return whether tensors [T, N] are dense with the trials innermost, and there are kernels for them."""
    first = rows[0]
    wanted = (1, len(first))
    return (
        first.device.type == "cpu"
        and len(first) > 1
        and all(row.stride() == wanted and row.shape == first.shape and row.dtype == first.dtype for row in rows)
        and first.dtype in SUFFIXES
        and kernels() is not None
    )


class Joined(Function):
    """Tensors [T, *shape] with the trials innermost as rows [T, N]: not copied where they lie side by side."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        """Join."""
        ctx.shapes = [part.shape for part in parts]
        trials = len(parts[0])
        sizes = [part[0].numel() for part in parts]
        first = parts[0]
        ends = [part.data_ptr() + part.element_size() * size * trials for part, size in zip(parts, sizes)]
        dense = all(strides(part)[1:] in ((1, trials), (1, 1)) for part in parts) and trials > 1
        if dense and all(end == part.data_ptr() for end, part in zip(ends, parts[1:])) and _one_storage(parts):
            return first.detach().as_strided((trials, sum(sizes)), (1, trials))
        return torch.cat([part.reshape(trials, -1).mT for part in parts]).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return each part's gradient, a view."""
        return tuple(views(grads[0], [shape[1:] for shape in ctx.shapes]))


def _one_storage(parts: Sequence[Tensor]) -> bool:
    places = [part.untyped_storage().data_ptr() for part in parts]
    return all(a == b for a, b in pairwise(places))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors [T, *shape] with the trials innermost as rows [T, N] with the trials innermost."""
    out: Tensor = Joined.apply(*parts)
    return out
