"""The gradient of each trial's loss with respect to that trial's parameters, differentiable in the image.

Two paths give the same numbers: ``batched`` runs all trials at once with intercepted calls, ``one-at-a-time`` runs them
in a loop. ``choose_path`` compares the two in float64, second derivative included, and falls back to the loop for a
network that holds an operation the interception does not cover.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakbench.errors import Unsupported
from leakbench.gradients.intercept import PerTrialParameters
from leakbench.rng import seeded
from leakbench.types import Gradient

Path = Literal["batched", "one-at-a-time"]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def full_precision() -> AbstractContextManager[None]:
    """Return a context in which CUDA convolutions are made in float32, not in TF32's ten bits of mantissa."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy [B] of logits model(x) with y: [B] int64, or [B, K] class probabilities."""
    return F.cross_entropy(model(x), y, reduction="none")


class _LossModule(nn.Module):
    """A module whose output is a loss, so that one ``functional_call`` covers both."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss [B]."""
        return self.loss(self.model, x, y)


@dataclass(frozen=True)
class Evaluator:
    """Per-trial gradients of one architecture.

    Attributes:
        model: the architecture; the values of its tensors are given with every call.
        names: the parameters to differentiate by.
        loss: (model, x [B, C, H, W], y) -> [B].
        path: ``batched`` or ``one-at-a-time``.
    """

    model: nn.Module
    names: tuple[str, ...]
    loss: Loss = plain_loss
    path: Path = "batched"

    def losses(self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return the loss [T] of images [T, C, H, W] and labels ([T] int64 or [T, K] probabilities)."""
        module = _LossModule(self.model, self.loss)
        if self.path == "batched":
            with PerTrialParameters():
                return functional_call(module, self._named(tensors), (x, y))
        rows = [
            functional_call(module, self._named(self._row(tensors, t)), (x[t : t + 1], y[t : t + 1]))
            for t in range(len(x))
        ]
        return torch.cat(rows)

    def gradient(self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, create_graph: bool = True) -> Gradient:
        """Return each trial's gradient by its own parameters, [T, *shape] per name.

        Args:
            tensors: every parameter and buffer of the model by name; parameters [T, *shape], buffers [*shape] or
                [T, *shape].
            x: [T, C, H, W].
            y: [T] int64 or [T, K] class probabilities.
            create_graph: keep the graph, so that the gradient can be differentiated by x, y and ``tensors``.
        """
        leaves = {}
        for name in self.names:
            value = tensors[name]
            leaves[name] = value if value.requires_grad else value.detach().requires_grad_()
        loss = self.losses({**tensors, **leaves}, x, y)
        grads = torch.autograd.grad(loss.sum(), list(leaves.values()), create_graph=create_graph, allow_unused=True)
        return {name: torch.zeros_like(leaves[name]) if grad is None else grad for name, grad in zip(self.names, grads)}

    def _row(self, tensors: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
        """Return trial t's own tensors."""
        own = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        row = {}
        for name, value in tensors.items():
            value = value[t] if value.ndim > own[name].ndim else value
            row[name] = value
        return row

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name tensors as ``_LossModule`` does; buffers are cloned, because modules write into them."""
        buffers = {name for name, _ in self.model.named_buffers()}
        return {
            f"model.{name}": value.clone() if name in buffers and not value.requires_grad else value
            for name, value in tensors.items()
        }


def choose_path(
    evaluator: Evaluator, tensors: Mapping[str, Tensor], image_shape: tuple[int, ...], classes: int
) -> Path:
    """Return ``batched`` where it agrees with one-at-a-time double backward in float64 to 1e-8, else the loop.

    The comparison takes two trials with different images and parameters, the gradient itself, and the derivative of a
    random projection of it by the image.

    Raises:
        Unsupported: the network cannot be differentiated twice even one trial at a time, or draws random numbers.
    """
    rng = torch.Generator().manual_seed(0)
    device = next(iter(tensors.values())).device
    own = {**dict(evaluator.model.named_parameters()), **dict(evaluator.model.named_buffers())}
    pair = {}
    for name, value in tensors.items():
        if value.is_floating_point():
            value = value.detach().double()
            if value.ndim > own[name].ndim:
                factor = torch.tensor([1.0, 0.9], dtype=torch.float64, device=device)
                value = value[:1] * factor.view(2, *[1] * (value.ndim - 1))
        pair[name] = value
    # the values are given with each call; the module itself only has to be of the same type
    x = torch.rand((2, *image_shape), generator=rng, dtype=torch.float64).to(device)
    y = torch.softmax(torch.randn((2, classes), generator=rng, dtype=torch.float64), 1).to(device)
    weights = {
        name: torch.randn(pair[name].shape, generator=rng, dtype=torch.float64).to(device) for name in evaluator.names
    }

    def second(path: Path) -> tuple[list[Tensor], Tensor]:
        probe = x.clone().requires_grad_()
        with seeded("choose path"):
            state = torch.get_rng_state()
            gradient = replace(evaluator, path=path).gradient(pair, probe, y)
            if not torch.equal(torch.get_rng_state(), state):
                raise Unsupported("the network draws random numbers (dropout?) as it runs; attack it in eval mode")
        projection = sum(((gradient[name] * weights[name]).sum() for name in evaluator.names), probe.new_zeros(()))
        (by_image,) = torch.autograd.grad(projection, probe, allow_unused=True)
        if by_image is None:
            raise Unsupported("the gradient does not depend on the image; there is nothing to match")
        return [gradient[name].detach() for name in evaluator.names], by_image

    try:
        slow_gradient, slow = second("one-at-a-time")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Unsupported(f"the network cannot be differentiated twice: {' '.join(str(error).split())}") from error
    try:
        fast_gradient, fast = second("batched")
    except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError):
        return "one-at-a-time"
    pairs = [*zip(fast_gradient, slow_gradient), (fast, slow)]
    agree = all(a.shape == b.shape and bool((a - b).norm() <= 1e-8 * b.norm() + 1e-12) for a, b in pairs)
    return "batched" if agree else "one-at-a-time"


def architecture(model: nn.Module) -> nn.Module:
    """Return a copy of a network without its values: every tensor is moved to the ``meta`` device."""
    return copy.deepcopy(model).to("meta")
