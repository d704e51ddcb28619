"""Pixels that dropout hid, filled in from their neighbours."""

from collections.abc import Callable

import torch
from torch import Tensor

COLOUR = 0.15
"""How much less the differences between colours change from pixel to pixel than their mean (as ``peel`` assumes)."""

STEPS = 500
"""The most steps of conjugate gradients."""

NEAR = 1e-8
"""The squared residual, relative to the first one, at which these end."""


def fill_in(images: Tensor, known: Tensor, mean: Tensor, colour: float = COLOUR) -> Tensor:
    """Return images in which unknown values make the changes between neighbouring pixels least, as squares.

    Args:
        images: [T, C, H, W]; unknown values do not count.
        known: [T, C, H, W] bool.
        mean: [C, H, W], the public mean, from which the search starts.
        colour: how much less the differences between colours change than their mean.
    """
    if bool(known.all()):
        return images
    channels, hidden = images.shape[1], (~known).double()
    common = torch.full((channels, channels), 1 / channels, dtype=torch.float64, device=images.device)
    mixing = common / channels + (torch.eye(channels, dtype=torch.float64, device=images.device) - common) / colour**2

    def energy(x: Tensor) -> Tensor:
        """Return half the derivative of the weighted sum of squared changes by x."""
        down, across = x.diff(dim=2), x.diff(dim=3)
        pad = torch.nn.functional.pad
        out = pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1)) + pad(across, (1, 0)) - pad(across, (0, 1))
        return torch.einsum("cd,tdhw->tchw", mixing, out)

    start = torch.where(known, images.double(), mean.double().to(images.device))
    return torch.where(known, images, _solved(lambda x: hidden * energy(x), start).to(images))


def _solved(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return x [T, ...], moved to where ``energy``, which is affine and zero at fixed entries, is zero everywhere."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1))

    rest = -energy(x)
    way, size = rest, dot(rest, rest)
    first = size
    for _ in range(STEPS):
        if bool((size <= NEAR * first).all()):
            break
        image = energy(way)
        step = size / dot(way, image).clamp(min=torch.finfo(x.dtype).tiny)
        x, rest = x + step * way, rest - step * image
        size, before = dot(rest, rest), size
        way = rest + size / before.clamp(min=torch.finfo(x.dtype).tiny) * way
    return x
