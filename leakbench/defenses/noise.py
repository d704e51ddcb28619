"""Additive noise on the shared gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.core.component import NonNegative
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register

NoiseKind = Literal["gaussian", "laplace"]

SMOOTHING = 0.1
"""The absolute value of an error, in deviations of the noise, is smoothed within this distance of 0."""


@register("noise")
@dataclass(frozen=True)
class Noise(Defense):
    """Independent zero-mean noise on every gradient entry; ``scale`` is its standard deviation.

    Attributes:
        scale: the standard deviation, in the gradient's units, for both kinds (a Laplace distribution of scale b has
            standard deviation b * sqrt(2), so b = scale / sqrt(2)).
        kind: ``gaussian`` or ``laplace``.
        relative: ``scale`` counts in units of the root mean square of each parameter tensor's own gradient.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS, section 5.1 (states variances)"
    version: ClassVar[int] = 3  # 3: adaptive attackers weigh the prior with the likelihood
    assumes: ClassVar[str] = "The attacker does not model the noise."
    cost: ClassVar[str] = "Slower training; strong noise costs accuracy."
    fails: ClassVar[str] = "Weak noise is averaged out over the many entries of a gradient by adaptive attackers."
    scale: NonNegative = 0.01
    kind: NoiseKind = "gaussian"
    relative: bool = False

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the gradient plus noise."""
        size = 1 if self.kind == "gaussian" else 2**0.5  # the standard deviation of what is drawn
        return {
            name: value + self._deviation(value[None])[0] * (drawn(self.kind, value.shape, rng) / size)
            for name, value in step.gradient().items()
        }

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who models the noise."""
        words = "weighs an error by the noise's distribution: L2 for Gaussian noise, L1 for Laplace noise"
        if self.scale == 0:
            return {"default": AdaptiveAttacker(words, batched=True)}
        attacker = AdaptiveAttacker(words, likelihood=self._likelihood, spread=self._spread, batched=True)
        return {"default": attacker}

    def _spread(self, observed: Observed, weights: Weights) -> Gradient:
        """Return [T], the noise's standard deviation."""
        return {name: self._judged(value).flatten() for name, value in observed.items()}

    def _likelihood(self, gradient: Gradient, observed: Observed, weights: Weights) -> Tensor:
        """Return [T]: |g' - g|_2^2 / (2 scale^2) for Gaussian noise, |g' - g|_1 / b for Laplace noise.

        An absolute value is smoothed near 0 (SMOOTHING), for searches that need a slope.
        Of relative noise the scale is that of each tensor, judged by what was sent, whose mean square is expected to be
        1 + scale^2 times the gradient's.
        """
        errors = []
        for name, value in observed.items():
            deviation = self._judged(value)
            error = ((gradient[name] - value) / torch.where(deviation > 0, deviation, 1.0)).flatten(1)
            gaussian = self.kind == "gaussian"
            errors.append(error.square().sum(1) / 2 if gaussian else smooth_abs(error).sum(1) * 2**0.5)
        return torch.stack(errors).sum(0)

    def _judged(self, value: Tensor) -> Tensor:
        """Return the noise's standard deviation, [T, 1, ...], by what was sent of one parameter."""
        return self._deviation(value) / ((1 + self.scale**2) ** 0.5 if self.relative else 1)

    def _deviation(self, value: Tensor) -> Tensor:
        """Return the noise's standard deviation, [T, 1, ...], for gradients [T, *shape] of one parameter."""
        square = value.flatten(1).square().mean(1) if self.relative else value.new_ones(len(value))
        return self.scale * square.sqrt().view(-1, *[1] * (value.ndim - 1))


def drawn(kind: NoiseKind, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Return draws from N(0, 1), or from Laplace(0, 1), of standard deviation sqrt(2)."""
    if kind == "gaussian":
        return torch.randn(shape, generator=rng)
    # a difference of two exponentials of mean 1
    first, second = (torch.empty(shape).exponential_(generator=rng) for _ in range(2))
    return first - second


def smooth_abs(error: Tensor) -> Tensor:
    """Return the absolute value of errors, smoothed near 0 (SMOOTHING)."""
    return (error.square() + SMOOTHING**2).sqrt() - SMOOTHING
