"""What the gradient of a linear layer leaks."""

import torch
from torch import Tensor

POWERS = 30
"""Rounds of the power iteration of ``layer_direction``."""


def layer_input(by_weight: Tensor, by_bias: Tensor) -> Tensor:
    """Return the input of a linear layer, which its gradient leaks.

    The layer is W x + b, so dL/dW = (dL/db) x^T: every row of dL/dW is the input times that row's dL/db. All rows are
    used, by least squares: x = (dL/dW)^T (dL/db) / |dL/db|^2.

    Args:
        by_weight: [T, C, S], dL/dW of a step that ran the layer on a single x.
        by_bias: [T, C], dL/db.

    Returns:
        [T, S]; zero if dL/db is (no row of the layer matters to the loss).
    """
    largest = by_bias.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))  # no square of it may underflow
    rows, values = by_bias / largest, by_weight / largest[..., None]
    square = rows.square().sum(1, keepdim=True)
    return (rows[..., None] * values).sum(1) / torch.where(square > 0, square, torch.ones_like(square))


def layer_direction(by_weight: Tensor) -> Tensor:
    """Return the input of a linear layer up to a factor, without the gradient by its bias.

    dL/dW = (dL/db) x^T has rank one, and x is its right singular vector; found from the largest row by power iteration,
    which is exact at once if the rank is one.

    Args:
        by_weight: [T, C, S], dL/dW of a step that ran the layer on a single x.

    Returns:
        [T, S] of norm 1, of either sign; zero if dL/dW is.
    """
    largest = by_weight.flatten(1).abs().amax(1)[:, None, None]
    value = by_weight / torch.where(largest > 0, largest, torch.ones_like(largest))
    row = value.norm(dim=2).argmax(1)
    found = value[torch.arange(len(value), device=value.device), row]
    for _ in range(POWERS):
        size = found.norm(dim=1, keepdim=True)
        found = found / torch.where(size > 0, size, torch.ones_like(size))
        found = torch.einsum("tcs,tc->ts", value, torch.einsum("tcs,ts->tc", value, found))
    size = found.norm(dim=1, keepdim=True)
    return found / torch.where(size > 0, size, torch.ones_like(size))


def unexplained(by_weight: Tensor, by_bias: Tensor, taken: Tensor) -> Tensor:
    """Return [T], the part of the norm of dL/dW that is not (dL/db) x^T: 0 for one input, up to 1.

    Args:
        by_weight: [T, C, S], dL/dW.
        by_bias: [T, C], dL/db.
        taken: [T, S], x.
    """
    size = by_weight.flatten(1).norm(dim=1).clamp(min=torch.finfo(by_weight.dtype).tiny)
    return (by_weight - by_bias[..., None] * taken[:, None]).flatten(1).norm(dim=1) / size


def target_probabilities(by_weight: Tensor, by_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the class probabilities that a classifier was trained towards on one example, which its gradient gives.

    The derivative of the cross-entropy by the logits is softmax(W h + b) - y, and it is that by the bias; the input h
    is known (``layer_input``), so that y = softmax(W h + b) - dL/db. In float64.

    Args:
        by_weight: [T, K, D], dL/dW.
        by_bias: [T, K], dL/db.
        weight: [T, K, D], W.
        bias: [T, K], b.

    Returns:
        y [T, K], in the type of ``by_bias``; exact but for rounding.
    """
    features = layer_input(by_weight.double(), by_bias.double())
    logits = torch.einsum("tkd,td->tk", weight.double(), features) + bias.double()
    return (torch.softmax(logits, 1) - by_bias.double()).to(by_bias.dtype)
