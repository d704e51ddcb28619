"""Run an ordinary module once for T trials, each with its own parameters.

At batch size 1 a network's batch axis is the trial axis. So the module runs on [T, C, H, W] with parameters that carry
a leading T axis, and only the calls in which parameters meet activations, or in which examples meet each other, are
replaced: convolution, linear map and batch normalisation. Everything else in a network acts on each example alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from leakbench.gradients.bilinear import Linear


class PerTrialParameters(TorchFunctionMode):
    """Inside this context conv2d, linear and batch_norm treat the batch axis as trials with parameters of their own."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the per-trial version of ``func`` where there is one."""
        return _PER_TRIAL.get(func, func)(*args, **(kwargs or {}))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve trial t with weight[t]: [T, C, H, W] and [T, O, C/groups, kh, kw] give [T, O, H', W']."""
    if weight.ndim == 4:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    trials, channels = weight.shape[:2]
    out = torch.conv2d(
        x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), None, stride, padding, dilation, trials * groups
    )
    out = out.view(trials, channels, *out.shape[2:])
    return out if bias is None else out + bias[..., None, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map trial t by weight[t]: [T, ..., I] and [T, O, I] give [T, ..., O]; the products are taken in row form."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out: Tensor = Linear.apply(rows, weight)
    if bias is not None:
        out = out + bias[:, None]
    return out.reshape(*x.shape[:-1], weight.shape[1])


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each trial by the statistics of its own single image (training) or by the running ones.

    Mean and variance are written out because the second derivative of the native kernel is silently wrong under some
    transforms; the running statistics are not touched.
    """
    trials, channels = x.shape[:2]
    rows = x.reshape(trials, channels, -1)
    if training or running_mean is None or running_var is None:
        if rows.shape[2] == 1:
            raise ValueError("batch normalisation needs more than one value per channel of a single image")
        mean = rows.mean(2, keepdim=True)
        centred = rows - mean
        variance = centred.square().mean(2, keepdim=True)
    else:
        centred = rows - running_mean[..., None]
        variance = running_var[..., None]
    out = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        out = out * weight[..., None]
    if bias is not None:
        out = out + bias[..., None]
    return out.view(x.shape)


_PER_TRIAL: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.conv2d: conv2d,
    torch.conv2d: conv2d,
    F.linear: linear,
    F.batch_norm: batch_norm,
}
