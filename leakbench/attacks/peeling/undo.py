"""What a layer gives away of its input when its output and the error there, dL/doutput, are known; T trials.

Every value is held with its variance, from which the weight of the equations that it enters follows. Convolutions are
in ``equations``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.attacks.peeling.layers import Activation, Normalisation, Scaling

DEAD = 9.0
"""A channel whose squared scale is less than this multiple of its noise tells nothing."""


@dataclass(frozen=True)
class Estimate:
    """Values [T, *shape] and their variances; infinite for a guess, which enters no equation as an observation."""

    mean: Tensor
    variance: Tensor

    def view(self, shape: Sequence[int]) -> Estimate:
        """Return the same values in another shape, [T, *shape]."""
        return Estimate(*(value.reshape(len(value), *shape) for value in (self.mean, self.variance)))

    def scaled(self, factor: Tensor, shift: Tensor | float = 0.0) -> Estimate:
        """Return factor * values + shift."""
        return Estimate(factor * self.mean + shift, factor.square() * self.variance)


@dataclass(frozen=True)
class Noise:
    """How far the gradient that was sent is assumed to be from the exact one, [T] each.

    Attributes:
        relative: to a tensor's root mean square; rounding's share.
        absolute: the same for all tensors; the share of what a client adds.
    """

    relative: Tensor
    absolute: Tensor

    def variance(self, gradient: Tensor) -> Tensor:
        """Return [T], the variance of the entries of a gradient [T, ...]."""
        size = gradient.flatten(1).square().mean(1)
        return torch.maximum(self.relative.square() * size, self.absolute.square())


def undo_linear(
    weight: Tensor, by_weight: Tensor, by_bias: Tensor, precision: float, *, never_zero: bool
) -> tuple[Estimate, Estimate, Noise]:
    """Return a linear layer's input f [T, D], the error dL/df there, and the noise of the gradient.

    With d = dL/db: dL/dW = d f^T, so f = (dL/dW)^T d / |d|^2, and dL/df = W^T d. What dL/dW - d f^T leaves is noise.

    Args:
        weight: W [T, K, D].
        by_weight: dL/dW [T, K, D].
        by_bias: dL/db [T, K].
        precision: the least relative noise that is assumed.
        never_zero: f has no zeros, so that a column of zeros in dL/dW was put there, and its value is a guess.
    """
    d = by_bias[:, None]
    features = (d @ by_weight)[:, 0] / d.square().sum((1, 2))[:, None]
    rest = (by_weight - by_bias[..., None] * features[:, None]).square().mean((1, 2))
    measured = (rest / by_weight.square().mean((1, 2))).sqrt()
    noise = Noise(measured.clamp(min=precision), torch.where(measured > precision, rest.sqrt(), torch.zeros_like(rest)))
    power = features.square()
    variance = noise.relative.square()[:, None] * (power + power.mean(1, keepdim=True))
    each = torch.maximum((noise.relative[:, None] * by_bias).square(), noise.absolute.square()[:, None])
    error = Estimate((d @ weight)[:, 0], (each[:, None] @ weight.square())[:, 0])
    hidden = (by_weight == 0).all(1) & never_zero
    middle = features.sum(1, keepdim=True) / (~hidden).sum(1, keepdim=True)
    value = Estimate(torch.where(hidden, middle, features), torch.where(hidden, torch.inf, variance))
    return value, error, noise


def undo_activation(layer: Activation, value: Estimate, error: Estimate) -> tuple[Estimate, Estimate]:
    """Return an activation's input, and the error there; a guess is taken for what it is worth."""
    variance = torch.where(value.variance.isinf(), 0.0, value.variance)
    inputs, slope, bend = layer.invert(value.mean, variance.sqrt())
    spread = slope.square() * error.variance + (error.mean * bend).square() * variance
    return Estimate(inputs, value.variance / slope.square()), Estimate(slope * error.mean, spread)


def undo_scaling(
    layer: Scaling, value: Estimate, error: Estimate, tensors: Mapping[str, Tensor]
) -> tuple[Estimate, Estimate]:
    """Return the input of a public scaling of channels, and the error there."""
    scale, shift = (c[..., None, None] for c in layer.coefficients(tensors, value.mean))
    return value.scaled(1 / scale, -shift / scale), error.scaled(scale)


@dataclass(frozen=True)
class Standardised:
    """What a normalisation y = gamma z + beta gives away of its input u = sigma z + m.

    Attributes:
        value: z [T, C, H, W].
        error: h = gamma (e - mean(e) - z mean(e z)) for the error e at y; that at u is h / sigma.
        alive: [T, C], the channels whose gamma tells z from noise.
    """

    value: Estimate
    error: Estimate
    alive: Tensor


def undo_normalisation(
    layer: Normalisation, value: Estimate, error: Estimate, tensors: Mapping[str, Tensor]
) -> Standardised:
    """Return what is known of a normalisation's input whatever the sigma and the m of each channel.

    A secret gamma and beta are the standard deviation and the mean of the channel, because z has mean 0 and variance 1
    (up to eps, and to gamma's sign, which sigma then takes over).
    """
    y = value.mean
    if layer.secret:
        beta, gamma = y.mean((2, 3)), y.flatten(2).std(2, unbiased=False)
    else:
        gamma, beta = layer.coefficients(tensors, y)
    seen = value.variance.isfinite()
    known = torch.where(seen, value.variance, 0.0)
    alive = gamma.square() * seen.sum((2, 3)) > DEAD * known.sum((2, 3))
    live = alive[..., None, None]
    gamma, beta = torch.where(alive, gamma, 1.0)[..., None, None], beta[..., None, None]
    z = torch.where(live, (y - beta) / gamma, 0.0)
    cross = (error.mean * z).mean((2, 3), keepdim=True)
    h = gamma * (error.mean - error.mean.mean((2, 3), keepdim=True) - z * cross)
    noise = value.variance / gamma.square()
    return Standardised(
        Estimate(z, noise),
        Estimate(torch.where(live, h, 0.0), gamma.square() * error.variance + cross.square() * known),
        alive,
    )
