"""Run an ordinary module once for T trials, each with its own parameters.

At batch size 1 a network's batch axis is the trial axis. So the module runs on [T, C, H, W] with parameters that carry
a leading T axis, and only the calls in which parameters meet activations, or in which examples meet each other, are
replaced: convolution, linear map and normalisation. Everything else in a network acts on each example separately.

Whatever the path, operations without a second derivative are written out, and random layers draw from their trial.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from leakbench.errors import Unsupported
from leakbench.gradients.bilinear import LINEAR
from leakbench.gradients.convolution import convolution, pair
from leakbench.gradients.draws import Draws, random_operations
from leakbench.gradients.lanes import maps
from leakbench.gradients.lanes.geometry import Geometry
from leakbench.gradients.normalisation import normalise
from leakbench.gradients.twice import COMPOSITE, ELEMENTARY

Operations = Mapping[Callable[..., Any], Callable[..., Any]]


class Interception(TorchFunctionMode):
    """Inside this context a network can be differentiated twice, and draws each trial's random numbers by itself.

    Args:
        draws: the source of random layers.
        operations: further functions and their replacements: ``PER_TRIAL`` or ``UNDER_VMAP``.
    """

    def __init__(self, draws: Draws, operations: Operations = MappingProxyType({})) -> None:
        super().__init__()
        self._operations = {**ELEMENTARY, **random_operations(draws), **operations}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the replacement of ``func``, or ``func`` itself."""
        composite = COMPOSITE.get(func)
        if composite is not None:
            with self:
                return composite(*args, **(kwargs or {}))
        return self._operations.get(func, func)(*args, **(kwargs or {}))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve the images of trial t with weight[t]: [T * B, C, H, W] and [T, O, C/groups, kh, kw]."""
    if weight.ndim == 4:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    kernel, spread = (weight.shape[3], weight.shape[4]), pair(dilation)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(spread[::-1], kernel[::-1])]  # of zeros, by axis
        x = F.pad(x, [side for total in totals for side in (total // 2, total - total // 2)])
    around = (0, 0) if isinstance(padding, str) else pair(padding)
    geometry = Geometry(pair(stride), around, spread, groups, (x.shape[2], x.shape[3]), kernel)
    trials = len(weight)
    out = convolution(geometry, trials).output(x, weight)
    return out if bias is None else out + _each(bias, len(x) // trials)[..., None, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map trial t by weight[t]: [T, ..., I] and [T, O, I] give [T, ..., O]; the products are taken in row form.

    The leading axis of x may hold several places a trial, one trial after the other (as windows of an image do).
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    trials, outputs, inputs = weight.shape
    alone = Geometry((1, 1), (0, 0), (1, 1), 1, (1, 1), (1, 1))
    if x.shape == (trials, inputs) and maps.serve(x, weight, trials, alone):
        # a convolution of images of one pixel
        form = convolution(alone, trials)
        out = form.output(x[..., None, None], weight[..., None, None])[..., 0, 0]
        return out if bias is None else out + bias
    rows = x.reshape(trials, -1, inputs)
    out = LINEAR.output(rows, weight)
    if bias is not None:
        out = out + bias[:, None]
    return out.reshape(*x.shape[:-1], outputs)


def adaptive_avg_pool2d(x: Tensor, output_size: Any) -> Tensor:
    """Average as ``F.adaptive_avg_pool2d``; the gradient is laid out as the image is."""
    return F.adaptive_avg_pool2d(maps.settled(x), output_size)


def taken(x: Tensor, index: Any) -> Tensor:
    """Index as ``x[index]``; the gradient is laid out as x is."""
    return maps.settled(x)[index]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    batch: int = 1,
) -> Tensor:
    """Normalise each trial by the statistics of its own ``batch`` images (training) or by the running ones.

    The running statistics are not touched. A parameter that all trials share, or that is missing, is expanded.
    """
    trials, channels = x.shape[0] // batch, x.shape[1]
    gamma = x.new_ones(()) if weight is None else weight
    beta = x.new_zeros(()) if bias is None else bias
    gamma, beta = gamma.expand(trials, channels), beta.expand(trials, channels)
    own = training or running_mean is None or running_var is None
    if own and batch == 1 and x[0].numel() > channels and maps.are_served(x):
        return normalise(x.flatten(2), gamma, beta, eps).view_as(x)
    rows = x.reshape(trials, batch, channels, -1).transpose(1, 2).reshape(trials, channels, -1)
    if own:
        if rows.shape[2] == 1:
            raise Unsupported("batch normalisation needs more than one value per channel of a trial")
        out = normalise(rows.flatten(0, 1), gamma.flatten(), beta.flatten(), eps)
    else:
        assert running_mean is not None
        assert running_var is not None
        scale = gamma * torch.rsqrt(running_var + eps)
        out = torch.addcmul(beta[..., None], rows - running_mean[..., None], scale[..., None])
    return out.view(trials, channels, batch, -1).transpose(1, 2).reshape(x.shape)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    batch: int = 1,
) -> Tensor:
    """Normalise the last axes; weight and bias are [*shape], or [T, *shape] for x [T * B, ...]."""
    shape = list(normalized_shape)
    out = F.layer_norm(x, shape, None, None, eps)
    return _affine(out, *(_before(value, len(shape), x.ndim, batch) for value in (weight, bias)))


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    batch: int = 1,
) -> Tensor:
    """Normalise the channels of each example in groups; weight and bias are [C], or [T, C] for x [T * B, C, ...]."""
    out = F.group_norm(x, num_groups, None, None, eps)
    return _affine(out, _channels(weight, x.ndim, batch), _channels(bias, x.ndim, batch))


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    batch: int = 1,
) -> Tensor:
    """Normalise each channel of each example; weight and bias are [C], or [T, C] for x [T * B, C, ...]."""
    out = F.instance_norm(x, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _affine(out, _channels(weight, x.ndim, batch), _channels(bias, x.ndim, batch))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _each(value: Tensor, batch: int) -> Tensor:
    """Return a row of [T, ...] for each of the ``batch`` images of a trial: [T * B, ...]."""
    return value if batch == 1 else value.repeat_interleave(batch, 0)


def _before(value: Tensor | None, trailing: int, ndim: int, batch: int) -> Tensor | None:
    """Return [T * B, 1, ..., *shape] with ndim axes for [T, *shape]; one without a trial axis is left as it is."""
    if value is None or value.ndim == trailing:
        return value
    rows = _each(value, batch)
    return rows.view(len(rows), *[1] * (ndim - 1 - trailing), *value.shape[1:])


def _channels(value: Tensor | None, ndim: int, batch: int) -> Tensor | None:
    """Return [C, 1, ...] or [T * B, C, 1, ...], as it meets a tensor [T * B, C, ...] of ndim axes."""
    if value is None:
        return None
    return (value if value.ndim == 1 else _each(value, batch))[(..., *[None] * (ndim - 2))]


PER_TRIAL: Operations = {
    F.conv2d: conv2d,
    torch.conv2d: conv2d,
    F.linear: linear,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    Tensor.__getitem__: taken,
    F.batch_norm: batch_norm,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
}
"""For parameters [T, *shape] and a batch axis of T trials."""


def per_trial(batch: int) -> Operations:
    """Return the operations for parameters [T, *shape] and an axis of T trials of ``batch`` images each."""
    if batch == 1:
        return PER_TRIAL
    normalisations = (F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm)
    return {**PER_TRIAL, **{func: partial(PER_TRIAL[func], batch=batch) for func in normalisations}}


def _batch_norm_in_vmap(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise as ``F.batch_norm``, but leave the running statistics, which all trials share, as they are."""
    kept = (None, None) if training else (running_mean, running_var)
    return F.batch_norm(x, *kept, weight, bias, training, momentum, eps)


UNDER_VMAP: Operations = {F.batch_norm: _batch_norm_in_vmap}
"""For a single trial under ``vmap``."""
