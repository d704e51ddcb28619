"""A block of GRNN's generator, which doubles an image's side: compiled (``doubling.cpp``) where there is a compiler."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leakbench.core.compiled import call_on_rows, compiled_for
from leakbench.gradients.intercept import batch_norm

SOURCE = Path(__file__).with_suffix(".cpp")

EPS = 1e-5
"""The number that batch normalisation adds to a variance."""

PIXELS, CHANNELS = 16, 32
"""The compiled code takes multiples of these, which is what generators have."""


def doubled(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Convolve images whose pixels are repeated twice each way, normalise the channels, and gate half of them.

    Compiled code is differentiable once.

    Args:
        x: [T, C, H, W].
        weight: [T, 3, 3, 2 O, C], one a trial.
        scale: [T, 2 O], of the normalisation.
        shift: [T, 2 O].

    Returns:
        [T, O, 2 H, 2 W].
    """
    if compiled_for(SOURCE, x) is not None and x.shape[1] % CHANNELS == 0 and x.shape[2] * x.shape[3] % PIXELS == 0:
        out: Tensor = _Doubled.apply(x, weight, scale, shift)
        return out
    convolved = convolve_doubled(x, weight)
    return F.glu(batch_norm(convolved, None, None, scale, shift, training=True, eps=EPS), 1)


class _Doubled(Function):
    """See ``doubled``."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        """Run the block."""
        x, weight, scale, shift = (value.contiguous() for value in given)
        trials, outputs, (height, width) = len(x), scale.shape[1], x.shape[2:]
        z = x.new_empty(trials, outputs, 4 * height * width)
        gates, r = torch.empty_like(z[:, : outputs // 2]), torch.empty_like(scale)
        out = x.new_empty(trials, outputs // 2, 2 * height, 2 * width)
        eps = torch.tensor(EPS, dtype=torch.float64)
        sizes = (x.shape[1], outputs, height, width)
        call_on_rows(SOURCE, "forth", (x, weight, scale, shift, eps, z, r, gates, out), sizes, trials)
        ctx.save_for_backward(x, weight, scale, shift, z, r, gates)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients by the image and the block's tensors."""
        x, weight, scale, shift, *kept = ctx.saved_tensors
        by = tuple(torch.empty_like(value) for value in (x, weight, scale, shift))
        sizes = (x.shape[1], scale.shape[1], *x.shape[2:])
        call_on_rows(SOURCE, "back", (x, weight, scale, shift, *kept, grads[0].contiguous(), *by), sizes, len(x))
        return by


def convolve_doubled(x: Tensor, weight: Tensor) -> Tensor:
    """Return the 3 x 3 convolution, padded by 1, of images whose pixels are repeated twice each way.

    Equal pixels have equal products, so that each tap is multiplied with the image itself, in a quarter of the
    products; what remains is to add those of each tap at their places.

    Args:
        x: [T, C, H, W].
        weight: [T, 3, 3, O, C], one a trial.

    Returns:
        [T, O, 2 H, 2 W].
    """
    products = torch.bmm(weight.flatten(1, 3), x.flatten(2)).view(*weight.shape[:4], *x.shape[2:])
    # a pixel's first copy sees the pixel before it by the first tap, its second copy the one behind by the third
    first, middle, last = products.unbind(1)
    pairs = [F.pad(first, (0, 0, 1, -1)) + middle + last, first + middle + F.pad(last, (0, 0, -1, 1))]
    first, middle, last = torch.stack(pairs, 4).flatten(3, 4).unbind(1)
    pairs = [F.pad(first, (1, -1)) + middle + last, first + middle + F.pad(last, (-1, 1))]
    return torch.stack(pairs, 4).flatten(3, 4)
