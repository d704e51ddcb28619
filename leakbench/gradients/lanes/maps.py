"""Convolution and its gradients, and normalisation, by the compiled kernels: of networks that they cannot trace whole.

Where tensors are [C, H, W, T] in memory, elementwise operations of torch keep it so, and nothing is copied in between.
Others are copied on their way, block by block.
"""

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from leakbench.core.compiled import SUFFIXES
from leakbench.gradients.lanes.evaluation import Op
from leakbench.gradients.lanes.geometry import Geometry
from leakbench.gradients.lanes.layout import innermost, strides
from leakbench.gradients.lanes.library import kernels
from leakbench.gradients.lanes.trace import MAX_TAPS, Kind


class _Operand(ctypes.Structure):
    """``Operand`` of ``kernels.cpp``."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("trial", "image", "element", "size"))]


def enough(trials: int, like: Tensor) -> bool:
    """Return whether there are kernels for tensors like this one, and trials for half of a smaller register."""
    if like.device.type != "cpu" or like.dtype not in SUFFIXES:
        return False
    found = kernels()
    return found is not None and 2 * trials >= found.lanes(like.dtype, 1)


def serve(a: Tensor, b: Tensor, trials: int, geometry: Geometry) -> bool:
    """Return whether there are kernels for these operands of a map; of two types they have none, and torch says so."""
    return a.dtype == b.dtype and math.prod(geometry.kernel) <= MAX_TAPS and enough(trials, a)


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return [T * B, O, h, w] for images [T * B, C, H, W] and weights [T, O, C / groups, kh, kw]."""
    out = innermost_empty(x, len(x), (weight.shape[1], *geometry.outputs))
    _run(2, x, weight, out, geometry)
    return out


def input_gradient(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return [T * B, C, H, W], the gradient of <grad, convolve(x, weight)> by x; grad is [T * B, O, h, w]."""
    out = innermost_empty(grad, len(grad), (weight.shape[2] * geometry.groups, *geometry.image))
    _run(0, out, weight, grad, geometry)
    return out


def weight_gradient(x: Tensor, grad: Tensor, geometry: Geometry, trials: int) -> Tensor:
    """Return [T, O, C / groups, kh, kw], the gradient of <grad, convolve(x, weight)> by each trial's weight."""
    out = innermost_empty(x, trials, (grad.shape[1], x.shape[1] // geometry.groups, *geometry.kernel))
    _run(1, x, out, grad, geometry)
    return out


def are_served(x: Tensor) -> bool:
    """Return whether a tensor [T, *shape] has the trials innermost, and there are kernels for such tensors."""
    return x.ndim > 1 and len(x) > 1 and _is_innermost(x) and enough(len(x), x)


class _Settled(Function):
    """A tensor as it is, whose gradient gets the trials innermost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return a view."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient, copied if need be."""
        return _innermost(grads[0])


def settled(x: Tensor) -> Tensor:
    """Return a tensor, whose gradient gets the trials innermost if the tensor has them so.

    It stands before operations whose derivatives have a layout of their own, such as pools and slices.
    """
    if not are_served(x):
        return x
    out: Tensor = _Settled.apply(x)
    return out


def standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x - mean) r [T, C, N] and r = 1 / sqrt(variance + eps) [T, C] of rows x [T, C, N]."""
    own, r = _innermost(x), innermost_empty(x, len(x), (x.shape[1],))
    z = torch.empty_like(own)
    _on_channels("standardise", own, z, r, torch.tensor(eps, dtype=torch.float64))
    return z, r


def project(u: Tensor, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return r (u - mean(u) - z mean(u z)) [T, C, N], sum(u z) [T, C] and sum(u) [T, C] of rows [T, C, N]."""
    own = _innermost(u)
    out, dot, total = torch.empty_like(own), torch.empty_like(r), torch.empty_like(r)
    _on_channels("project", own, z, r, out, dot, total)
    return out, dot, total


def _is_innermost(x: Tensor) -> bool:
    step = len(x)
    for size, stride in zip(x.shape[:0:-1], x.stride()[:0:-1]):
        if size > 1 and stride != step:
            return False
        step *= size
    return x.stride(0) == 1


def _innermost(x: Tensor) -> Tensor:
    return x if _is_innermost(x) else innermost(x.contiguous())


def _on_channels(name: str, *tensors: Tensor) -> None:
    """Call a function of rows [T, C, N], and numbers, on channels that the threads share."""
    found, first = kernels(), tensors[0]
    assert found is not None, "callers ask ``are_served``"
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    sizes = (ctypes.c_long(size) for size in (first.shape[2], len(first), first.shape[1]))
    found.run(name, first.dtype, *pointers, *sizes)


def innermost_empty(like: Tensor, trials: int, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor [T, *shape] with the trials innermost, without values."""
    return like.new_empty(*shape, trials).movedim(-1, 0)


def _run(which: int, x: Tensor, weight: Tensor, y: Tensor, geometry: Geometry) -> None:
    found = kernels()
    assert found is not None, "callers ask ``serve``"
    trials, dtype = len(weight), x.dtype
    if weight.stride(0) == 0:  # shared: held once, and read in order
        weight = weight[:1].contiguous().expand_as(weight)
    op = _op(geometry, x.shape[1], y.shape[1])
    images = len(x) // trials
    kept, given = [], []
    for tensor, count in ((x, images), (weight, 1), (y, images)):
        own, trial, element = strides(tensor)
        kept.append(own)  # copies live until the kernels have read them
        given.append(_Operand(own.data_ptr(), trial * count, trial, element, own[0].numel()))
    lanes = found.lanes(dtype, trials, torch.get_num_threads())
    operands = [ctypes.byref(operand) for operand in given]
    sizes = (ctypes.c_long(size) for size in (images, trials, -(-trials // lanes)))
    found.run("map", dtype, ctypes.byref(op), ctypes.c_long(which), *operands, *sizes, lanes=lanes)


@cache
def _op(geometry: Geometry, channels: int, outputs: int) -> Op:
    pairs = {
        name: (ctypes.c_int32 * 2)(*getattr(geometry, name)) for name in ("kernel", "stride", "padding", "dilation")
    }
    (height, width), (rows, columns) = geometry.image, geometry.outputs
    sizes = {
        "channels": channels,
        "height": height,
        "width": width,
        "outputs": outputs,
        "rows": rows,
        "columns": columns,
    }
    return Op(kind=Kind.CONVOLUTION, groups=geometry.groups, **sizes, **pairs)
