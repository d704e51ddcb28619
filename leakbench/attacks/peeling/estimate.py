"""Values that are known up to noise, and the topmost ones: a linear layer's input and the error there; T trials.

Every value is held with its variance, from which the weight of the equations that it enters follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
class GradientNoise:
    """How far the gradient that was sent is assumed to be from the exact one, [T] each.

    Attributes:
        relative: to a tensor's root mean square; rounding's share.
        absolute: the same for all tensors; the share of a client's own noise.
    """

    relative: Tensor
    absolute: Tensor

    def variance(self, gradient: Tensor) -> Tensor:
        """Return [T], the variance of the entries of a gradient [T, ...]."""
        size = gradient.flatten(1).square().mean(1)
        return torch.maximum(self.relative.square() * size, self.absolute.square())


@dataclass(frozen=True)
class Standardised:
    """What a normalisation y = gamma z + beta leaks of its input u = sigma z + m.

    Attributes:
        value: z [T, C, H, W].
        error: h = gamma (e - mean(e) - z mean(e z)) for the error e at y; that at u is h / sigma.
        alive: [T, C], the channels whose gamma exceeds its noise.
        eps: the constant that a public normalisation adds to a channel's variance; None of a secret one.
    """

    value: Estimate
    error: Estimate
    alive: Tensor
    eps: float | None


def undo_linear(
    weight: Tensor, by_weight: Tensor, by_bias: Tensor, precision: float, *, never_zero: bool
) -> tuple[Estimate, Estimate, GradientNoise]:
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
    # exact, dL/dW = d f^T has rank one: the rest measures the noise that the client added, or rounding
    rest = (by_weight - by_bias[..., None] * features[:, None]).square().mean((1, 2))
    measured = (rest / by_weight.square().mean((1, 2))).sqrt()
    absolute = torch.where(measured > precision, rest.sqrt(), torch.zeros_like(rest))
    noise = GradientNoise(measured.clamp(min=precision), absolute)
    power = features.square()
    variance = noise.relative.square()[:, None] * (power + power.mean(1, keepdim=True))
    each = torch.maximum((noise.relative[:, None] * by_bias).square(), noise.absolute.square()[:, None])
    error = Estimate((d @ weight)[:, 0], (each[:, None] @ weight.square())[:, 0])
    # a column of zeros is one that the client withheld: its value is guessed as the mean of the others
    hidden = (by_weight == 0).all(1) & never_zero
    middle = features.sum(1, keepdim=True) / (~hidden).sum(1, keepdim=True)
    value = Estimate(torch.where(hidden, middle, features), torch.where(hidden, torch.inf, variance))
    return value, error, noise
