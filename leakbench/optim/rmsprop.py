"""RMSprop with momentum: on a CPU its passes over a tensor find it in the cache; on a GPU a kernel has all tensors."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from leakbench.optim.base import where_rows
from leakbench.optim.solvers import call

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
            alone = [x for x in group["params"] if x in self._gain or x.device.type == "cpu"]
            for tensor in alone:
                self._update(tensor, *self._moments[tensor], group["lr"])
            _update_all([x for x in group["params"] if not any(x is own for own in alone)], self._moments, group["lr"])

    def advance(
        self, best: Mapping[Tensor, Tensor], finite: Tensor, signed: Collection[Tensor], boxed: Collection[Tensor]
    ) -> None:
        """Update every tensor by its ``grad`` in one pass of compiled code, to the same values but for rounding.

        Args:
            best: for each tensor, the one into which its finite rows are copied before.
            finite: [T] bool.
            signed: must be empty, as ``boxed``: Adam has them.
            boxed: see ``signed``.
        """
        assert not signed
        assert not boxed
        numbers = torch.tensor((ALPHA, 1 - ALPHA, MOMENTUM, EPS, 0.0), dtype=torch.float64)
        for group in self.param_groups:
            numbers[4] = -group["lr"]
            for tensor in group["params"]:
                if tensor in self._gain:
                    best[tensor].copy_(where_rows(finite, tensor, best[tensor]))
                    self._update(tensor, *self._moments[tensor], group["lr"])
                    continue
                assert tensor.grad is not None
                rows = (tensor, tensor.grad.contiguous(), *self._moments[tensor], best[tensor], finite, numbers)
                call("rmsprop", rows, (tensor[0].numel(),), len(tensor))

    def _update(self, tensor: Tensor, square: Tensor, momentum: Tensor, lr: float) -> None:
        assert tensor.grad is not None
        gain = self._gain.get(tensor)
        if gain is not None:
            square.mul_(ALPHA).addcmul_(tensor.grad, tensor.grad, value=1 - ALPHA)
            momentum.mul_(MOMENTUM).addcmul_(tensor.grad, gain(square.sqrt()))
            tensor.add_(momentum, alpha=-lr)
            return
        parts = [whole.reshape(-1).split(CACHE_VALUES) for whole in (tensor, tensor.grad, square, momentum)]
        for x, grad, s, m in zip(*parts):
            s.mul_(ALPHA).addcmul_(grad, grad, value=1 - ALPHA)
            m.mul_(MOMENTUM).addcdiv_(grad, s.sqrt().add_(EPS))
            x.add_(m, alpha=-lr)


def _update_all(tensors: list[Tensor], moments: Mapping[Tensor, tuple[Tensor, Tensor]], lr: float) -> None:
    """Update tensors of a GPU, by one launch an operation for all of them."""
    if not tensors:
        return
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    squares, momenta = ([moments[tensor][part] for tensor in tensors] for part in (0, 1))
    torch._foreach_mul_(squares, ALPHA)
    torch._foreach_addcmul_(squares, grads, grads, 1 - ALPHA)
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, EPS)
    torch._foreach_mul_(momenta, MOMENTUM)
    torch._foreach_addcdiv_(momenta, grads, roots)
    torch._foreach_add_(tensors, momenta, alpha=-lr)
