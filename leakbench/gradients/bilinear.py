"""The linear map with per-trial weights, with derivatives of every order in fast, contiguous forms.

The map, its gradient by the input and its gradient by the weight are three bilinear maps, and the derivative of each is
made of the other two. Written out, every weight-sized result is contiguous and every product is taken in row form;
plain autograd yields transposed weight gradients, which cost several strided copies at each use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def needed(ctx: Any, index: int) -> bool:
    """Return whether the running backward pass will use the gradient by a Function's input.

    ``needs_input_grad`` only says that the input has a gradient; the first pass by parameters does not use the
    gradient by the image, and the second pass by the image does not use the gradient by the parameters. The engine
    can tell, except for leaves.
    """
    node = ctx.next_functions[index][0]
    if node is None or not ctx.needs_input_grad[index]:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True


def shared(tensor: Tensor) -> bool:
    """Return whether all trials have the same values of a tensor [T, *shape], judged by its layout."""
    return tensor.stride(0) == 0 or len(tensor) == 1


class Linear(Function):
    """x [T, R, I] and weight [T, O, I] give x weight^T [T, R, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients by x and weight."""
        x, weight = ctx.saved_tensors
        by_x = InputGradient.apply(grads[0], weight) if needed(ctx, 0) else None
        by_weight = WeightGradient.apply(grads[0], x) if needed(ctx, 1) else None
        return by_x, by_weight


class InputGradient(Function):
    """grad [T, R, O] and weight [T, O, I] give grad weight [T, R, I]."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(grad, weight)
        return torch.bmm(grad, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients by grad and weight."""
        grad, weight = ctx.saved_tensors
        by_grad = Linear.apply(grads[0], weight) if needed(ctx, 0) else None
        by_weight = WeightGradient.apply(grad, grads[0]) if needed(ctx, 1) else None
        return by_grad, by_weight


class WeightGradient(Function):
    """grad [T, R, O] and x [T, R, I] give grad^T x [T, O, I]."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        """Multiply; a single row is an outer product."""
        ctx.save_for_backward(grad, x)
        left = grad.transpose(1, 2)
        return left * x if x.shape[1] == 1 else torch.bmm(left, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients by grad and x."""
        grad, x = ctx.saved_tensors
        by_grad = Linear.apply(x, grads[0]) if needed(ctx, 0) else None
        by_x = InputGradient.apply(grad, grads[0]) if needed(ctx, 1) else None
        return by_grad, by_x


class SquaredNorm(Function):
    """rows [T, N] give the sums of their squares [T], in one pass each way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Multiply each row by itself."""
        ctx.save_for_backward(rows)
        return inner(rows, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return twice the rows, scaled."""
        (rows,) = ctx.saved_tensors
        return rows * (2 * grads[0])[:, None]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return [T], the inner products of the rows of a and b, both [T, *shape], without a product the size of either."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), 1, -1).transpose(1, 2))[:, 0, 0]


def squared_norm(a: Tensor) -> Tensor:
    """Return [T], the squared Euclidean norms of the rows of a [T, *shape]."""
    return SquaredNorm.apply(a.reshape(len(a), -1))


def squared_distance(gradient: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: the sum over the observed parameters, [T, *shape] by name, of |g' - g|^2.

    The difference is taken first, so that it stays exact.
    """
    return torch.stack([squared_norm(gradient[name] - target) for name, target in observed.items()]).sum(0)
