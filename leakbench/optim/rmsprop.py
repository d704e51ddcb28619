"""RMSprop with momentum, whose several passes over a large tensor find it in the cache."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ALPHA, MOMENTUM, EPS = 0.99, 0.99, 1e-8

CACHE_VALUES = 2**16
"""Values that are updated at a time on a CPU, so that the passes of one update share the cache."""

GainFunction = Callable[[Tensor], Tensor]
"""From the root of the mean squared gradient [T, *shape] to the factor of the gradient."""


class RMSprop:
    """``torch.optim.RMSprop`` with alpha 0.99, eps 1e-8 and momentum 0.99, to the same values.

    Args:
        groups: ``params`` and their ``lr``, as torch's optimisers take them; tensors are contiguous.
        gain: replaces 1 / (root + eps), for some tensors.
    """

    def __init__(self, groups: list[dict[str, Any]], gain: Mapping[Tensor, GainFunction]) -> None:
        self.param_groups = groups
        self._gain = gain
        tensors = [tensor for group in groups for tensor in group["params"]]
        self._moments = {tensor: (torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in tensors}

    def step(self) -> None:
        """Update every tensor by its ``grad``."""
        for group in self.param_groups:
            for tensor in group["params"]:
                self._update(tensor, *self._moments[tensor], group["lr"])

    def _update(self, tensor: Tensor, square: Tensor, momentum: Tensor, lr: float) -> None:
        assert tensor.grad is not None
        gain = self._gain.get(tensor)
        if gain is not None:
            square.mul_(ALPHA).addcmul_(tensor.grad, tensor.grad, value=1 - ALPHA)
            momentum.mul_(MOMENTUM).addcmul_(tensor.grad, gain(square.sqrt()))
            tensor.add_(momentum, alpha=-lr)
            return
        size = CACHE_VALUES if tensor.device.type == "cpu" else tensor.numel()
        parts = [whole.reshape(-1).split(size) for whole in (tensor, tensor.grad, square, momentum)]
        for x, grad, s, m in zip(*parts):
            s.mul_(ALPHA).addcmul_(grad, grad, value=1 - ALPHA)
            m.mul_(MOMENTUM).addcdiv_(grad, s.sqrt().add_(EPS))
            x.add_(m, alpha=-lr)
