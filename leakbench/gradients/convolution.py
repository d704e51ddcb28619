"""Convolution with per-trial weights, with derivatives of every order made of fast kernels.

Convolution, its gradient by the input and its gradient by the weight are three bilinear maps, and the derivative of
each is made of the other two, so three kernels serve every order. Torch's own double backward of a grouped convolution
loops over the groups, which here are the trials. Weights that all trials share (an expanded tensor) take the dense
kernel; others one grouped convolution over all trials. A trial may have several images: T trials of B images are
[T * B, C, H, W], one trial's images after the other's. Where there is a compiler, a network that runs on a CPU takes
the kernels of ``lanes.maps`` instead.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from leakbench.gradients.bilinear import Form, shared
from leakbench.gradients.lanes import maps
from leakbench.gradients.lanes.geometry import Geometry

IM2COL_VALUES = 2**15
"""Up to this many values of a trial's im2col matrix, one matrix product is faster than the grouped weight gradient."""

BATCH_GAIN = 4
"""Of a batch, the matrix may have this many times as many values, or as many times as there are images."""

PHASE_CHANNELS = 4
"""Up to this many input channels, the gradient by the input of a strided convolution is faster by phases."""


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Return one number for both directions, or a number for each, as (vertical, horizontal)."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def convolve(x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """Return [T * B, O, h, w] for images [T * B, C, H, W] and weights [T, O, C / groups, kh, kw]."""
    if shared(weight):
        return torch.conv2d(x, weight[0], None, g.stride, g.padding, g.dilation, g.groups)
    # trials with their own weights are groups of one convolution: their images side by side are one of T * C channels
    trials = len(weight)
    out = torch.conv2d(_row(x, trials), weight.flatten(0, 1), None, g.stride, g.padding, g.dilation, trials * g.groups)
    return _trials(out, trials)


def input_gradient(grad: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """Return [T * B, C, H, W], the gradient of <grad, convolve(x, weight)> by x; grad is [T * B, O, h, w]."""
    step = g.stride[0]
    dense = g.dilation == (1, 1) and g.groups == 1
    if step > 1 and g.stride == (step, step) and dense and weight.shape[2] <= PHASE_CHANNELS:
        return _by_phases(grad, weight, g)
    if shared(weight):
        shape = (len(grad), weight.shape[2] * g.groups, *g.image)
        return conv2d_input(shape, weight[0], grad, g.stride, g.padding, g.dilation, g.groups)
    trials = len(weight)
    groups = trials * g.groups
    shape = (len(grad) // trials, weight.shape[2] * groups, *g.image)
    out = conv2d_input(shape, weight.flatten(0, 1), _row(grad, trials), g.stride, g.padding, g.dilation, groups)
    return _trials(out, trials)


def weight_gradient(x: Tensor, grad: Tensor, g: Geometry, trials: int) -> Tensor:
    """Return [T, O, C / groups, kh, kw], the gradient of <grad, convolve(x, weight)> by each trial's weight."""
    images, outputs, *size = grad.shape
    channels, batch = x.shape[1] // g.groups, images // trials
    values = channels * g.kernel[0] * g.kernel[1] * size[0] * size[1] * batch
    if g.groups == 1 and values <= IM2COL_VALUES * min(batch, BATCH_GAIN):
        # dL/dw[o, c, tap] = sum over windows of grad[o, window] x[c, window, tap]: a product of matrices for each trial
        left = grad.reshape(trials, batch, outputs, -1).transpose(1, 2).reshape(trials, outputs, -1)
        windows = _windows(x, g, (size[0], size[1])).view(trials, batch * size[0] * size[1], -1)
        out = torch.bmm(left, windows)
        return out.view(trials, outputs, *g.kernel, channels).permute(0, 1, 4, 2, 3)
    shape = (trials * outputs, channels, *g.kernel)
    rows, errors = _row(x, trials), _row(grad, trials)
    out = conv2d_weight(rows, shape, errors, g.stride, g.padding, g.dilation, trials * g.groups)
    return out.view(trials, outputs, *out.shape[1:])


def _windows(x: Tensor, g: Geometry, size: tuple[int, int]) -> Tensor:
    """Return [T, h * w, kh * kw * C], the windows of x under the kernel (im2col), copied in runs of C values."""
    (top, left), (sh, sw), (dh, dw) = g.padding, g.stride, g.dilation
    # channels last, so that the strided view below is copied in contiguous runs of C values
    image = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).contiguous()
    trial, row, column, channel = image.stride()
    shape = (len(x), *size, *g.kernel, x.shape[1])
    view = image.as_strided(shape, (trial, row * sh, column * sw, row * dh, column * dw, channel))
    return view.reshape(len(x), size[0] * size[1], -1)


def _by_phases(grad: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """Return ``input_gradient`` for stride s: a convolution of stride 1 with the s * s phases as channels.

    A pixel at place p gets grad[q] weight[p - s q] for all q. With p = s i + r that is grad[q] weight[s (i - q) + r]:
    for each phase r a convolution of stride 1 with the kernel's taps r, r + s, r + 2 s, ..., whose results interleave.
    """
    step = g.stride[0]
    outputs, channels = weight.shape[1:3]
    taps = [-(-k // step) for k in g.kernel]
    source = weight[:1] if shared(weight) else weight
    index = _phase_index(outputs, channels, g.kernel, step, weight.device)
    kernels = F.pad(source.flatten(1), (0, 1)).index_select(1, index)
    kernels = kernels.view(-1, outputs, *taps)
    around = [t - 1 for t in taps]
    if shared(weight):
        out = torch.conv2d(grad, kernels, None, 1, around)
    else:
        trials = len(weight)
        out = _trials(torch.conv2d(_row(grad, trials), kernels, None, 1, around, 1, trials), trials)
    # interleave the phases, then cut off the padding that the forward convolution had added
    out = F.pixel_shuffle(out, step)
    (height, width), (top, left) = g.image, g.padding
    return F.pad(out, (-left, width + left - out.shape[3], -top, height + top - out.shape[2]))


@cache
def _phase_index(outputs: int, channels: int, kernel: tuple[int, int], step: int, device: torch.device) -> Tensor:
    """Return, for the kernels [C * s * s, O, taps, taps] of ``_by_phases``, the place of each value in a weight.

    A flattened weight [O, C, kh, kw] is followed by one zero, for the taps beyond the kernel's edge.
    """
    size = outputs * channels * kernel[0] * kernel[1]
    rows, columns = (-(-k // step) for k in kernel)
    index = torch.arange(size, device=device).view(outputs, channels, *kernel)
    index = F.pad(index, (0, columns * step - kernel[1], 0, rows * step - kernel[0]), value=size)
    # tap = s * row + phase; flipped, because conv2d correlates where the formula convolves
    index = index.view(outputs, channels, rows, step, columns, step).flip(2, 4)
    return index.permute(1, 3, 5, 0, 2, 4).flatten()


def _row(x: Tensor, trials: int) -> Tensor:
    """Return [T * B, C, H, W] as images [B, T * C, H, W], each with one image of every trial side by side."""
    apart = x.reshape(trials, len(x) // trials, *x.shape[1:])
    return apart.transpose(0, 1).reshape(len(x) // trials, -1, *x.shape[2:])


def _trials(x: Tensor, trials: int) -> Tensor:
    """Return [B, T * C, H, W] as [T * B, C, H, W]."""
    apart = x.reshape(len(x), trials, -1, *x.shape[2:])
    return apart.transpose(0, 1).reshape(trials * len(x), *apart.shape[2:])


def convolution(geometry: Geometry, trials: int) -> Form:
    """Return the form whose map is ``convolve``, of this many trials; by compiled kernels where they serve."""

    def by_input(weight: Tensor, y: Tensor) -> Tensor:
        if maps.serve(y, weight, trials, geometry):
            return maps.input_gradient(y, weight, geometry)
        return input_gradient(y, weight, geometry)

    def by_weight(x: Tensor, y: Tensor) -> Tensor:
        if maps.serve(x, y, trials, geometry):
            return maps.weight_gradient(x, y, geometry, trials)
        return weight_gradient(x, y, geometry, trials)

    def by_output(x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[1] == weight.shape[2] * geometry.groups and maps.serve(x, weight, trials, geometry):
            return maps.convolve(x, weight, geometry)
        return convolve(x, weight, geometry)

    return Form(by_input, by_weight, by_output)
