"""The distances between gradients [T, N] whose trials are innermost, and total variation, in one pass each way."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from leakbench.gradients.lanes.library import Kernels, kernels


def _kernels() -> Kernels:
    found = kernels()
    assert found is not None, "callers test for kernels"
    return found


def _combined(x: Tensor, a: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """Return x a + y b for rows x and y [T, N] and numbers a and b [T]."""
    out = torch.empty_like(x)
    _kernels().call("combine", x, a.contiguous(), y, b.contiguous(), out, sizes=(x.shape[1], len(x)))
    return out


class Products(Function):
    """Rows x and y [T, N] give <x, y> and <x, x> [T], differentiable once, and in x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply and add."""
        ctx.save_for_backward(x, y)
        dot, square = x.new_empty(len(x)), x.new_empty(len(x))
        _kernels().call("products", x, y, dot, square, sizes=(x.shape[1], len(x)))
        return dot, square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient by x."""
        x, y = ctx.saved_tensors
        return _combined(x, 2 * grads[1], y, grads[0]), None


class SquaredGap(Function):
    """Rows x and y [T, N] give |x - y|^2 [T], differentiable once, in x only; the difference is taken first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """Subtract, multiply and add."""
        ctx.save_for_backward(x, y)
        square = x.new_empty(len(x))
        _kernels().call("gap", x, y, square, sizes=(x.shape[1], len(x)))
        return square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient by x."""
        x, y = ctx.saved_tensors
        scale = 2 * grads[0]
        return _combined(x, scale, y, -scale), None


def add_variation(images: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``variation`` [T] of images [T, ..., H, W], and add ``weight`` [T] times its derivative to ``gradient``.

    ``gradient`` is contiguous.
    """
    x, value = images.detach().contiguous(), images.new_empty(len(images))
    height, width = x.shape[-2:]
    sizes = x[0, ..., 0, 0].numel(), height, width, len(x)
    _kernels().call("variation", x, weight.contiguous(), value, gradient, sizes=sizes)
    return value


class Variation(Function):
    """Images [T, ..., H, W] give the total variation [T] of ``total_variation``, differentiable once."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        """Add up the absolute differences, and their signs."""
        by_image = torch.zeros_like(images, memory_format=torch.contiguous_format)
        value = add_variation(images, images.new_ones(len(images)), by_image)
        ctx.save_for_backward(by_image)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradient by the images."""
        (by_image,) = ctx.saved_tensors
        return by_image * grads[0].view(-1, *[1] * (by_image.ndim - 1))


def variation(images: Tensor) -> Tensor:
    """Return [T]: mean |horizontal difference| + mean |vertical difference| of [T, ..., C, H, W]."""
    out: Tensor = Variation.apply(images)
    return out
