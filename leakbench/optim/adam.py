"""Adam on a CPU: torch's values, without what its class does beside them at every step."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from leakbench.optim.solvers import call

BETAS, EPS = (0.9, 0.999), 1e-8

CACHE_VALUES = 2**16
"""Values that are updated at a time, so that the passes of one update share the cache."""


class Adam:
    """``torch.optim.Adam`` with its default options, to the same values.

    Args:
        groups: ``params`` and their ``lr``, as torch's optimisers take them; tensors are contiguous.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self._steps = 0
        tensors = [tensor for group in groups for tensor in group["params"]]
        self._moments = {tensor: (torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in tensors}

    def advance(
        self, best: Mapping[Tensor, Tensor], finite: Tensor, signed: Collection[Tensor], boxed: Collection[Tensor]
    ) -> None:
        """Update every tensor by its ``grad`` in one pass of compiled code, to torch's values but for rounding.

        Args:
            best: for each tensor, the one into which its finite rows are copied before.
            finite: [T] bool.
            signed: the tensors that follow the sign of their gradient.
            boxed: the tensors that are kept in [0, 1].
        """
        self._steps += 1
        size, root = (1 - beta**self._steps for beta in BETAS)
        for group in self.param_groups:
            numbers = (1 - BETAS[0], BETAS[1], 1 - BETAS[1], root**0.5, EPS, -group["lr"] / size)
            given = torch.tensor(numbers, dtype=torch.float64)
            for tensor in group["params"]:
                assert tensor.grad is not None
                rows = (tensor, tensor.grad.contiguous(), *self._moments[tensor], best[tensor], finite, given)
                flags = any(tensor is own for own in signed), any(tensor is own for own in boxed)
                call("adam", rows, (tensor[0].numel(), *flags), len(tensor))

    @torch.no_grad()
    def step(self) -> None:
        """Update every tensor by its ``grad``."""
        self._steps += 1
        size, root = (1 - beta**self._steps for beta in BETAS)
        for group in self.param_groups:
            for tensor in group["params"]:
                assert tensor.grad is not None
                wholes: tuple[Tensor, ...] = (tensor, tensor.grad, *self._moments[tensor])
                for x, grad, mean, square in zip(*(whole.reshape(-1).split(CACHE_VALUES) for whole in wholes)):
                    mean.lerp_(grad, 1 - BETAS[0])
                    square.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
                    x.addcdiv_(mean, (square.sqrt() / root**0.5).add_(EPS), value=-group["lr"] / size)
