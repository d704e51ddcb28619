"""What the gradient of a linear layer gives away."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_input(by_weight: Tensor, by_bias: Tensor) -> Tensor:
    """Return the input of a linear layer, which its gradient gives away.

    The layer is W x + b, so dL/dW = (dL/db) x^T: every row of dL/dW is the input times that row's dL/db. All rows are
    used, by least squares: x = (dL/dW)^T (dL/db) / |dL/db|^2.

    Args:
        by_weight: [T, C, S], dL/dW of a step that ran the layer on one x alone.
        by_bias: [T, C], dL/db.

    Returns:
        [T, S]; zero where dL/db is (no row of the layer matters to the loss).
    """
    largest = by_bias.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))  # no square of it may underflow
    rows, values = by_bias / largest, by_weight / largest[..., None]
    square = rows.square().sum(1, keepdim=True)
    return (rows[..., None] * values).sum(1) / torch.where(square > 0, square, torch.ones_like(square))


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
