"""The shared gradient in fewer bits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register

HALF_MAX = 65504.0
"""The largest number in half precision."""
HALF_MANTISSA = 10
"""The bits of half precision's mantissa."""
HALF_STEP = 2.0**-24
"""The distance of half precision's neighbours around 0."""


@register("quantise")
@dataclass(frozen=True)
class Quantise(Defense):
    """Send each gradient tensor on a grid of 2^bits values between its least and largest entry, or in half precision.

    With step = (max - min) / (2^bits - 1), an entry g becomes min + step * round((g - min) / step), halves to even.
    ``bits=half`` rounds to IEEE 754 half precision instead; beyond its range to its largest number.

    Attributes:
        bits: bits an entry, or ``half``.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    version: ClassVar[int] = 4  # 4: half precision's step at 0 is that at 0, not that at 1/2
    reference: ClassVar[str] = (
        "Suresh et al. 2017, Distributed Mean Estimation with Limited Communication, ICML, section 2.2 (its levels, "
        "rounded to the nearest and not at random); IEEE 754-2008, binary16"
    )
    assumes: ClassVar[str] = "The attack needs an exact gradient, as closed forms do."
    cost: ClassVar[str] = "Less to send; few bits cost accuracy."
    fails: ClassVar[str] = "Attackers who model the rounding as noise."
    bits: Annotated[int, Field(ge=1, le=16)] | Literal["half"] = 8

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the rounded gradient."""
        return {name: self._rounded(value) for name, value in step.gradient().items()}

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who models the rounding as noise."""
        words = "models the rounding as noise of the same width, and weighs an error by it (L2)"
        return {
            "default": AdaptiveAttacker(words, likelihood=self._likelihood, spread=self._spread, batched=True),
        }

    def _spread(self, observed: Observed, weights: Weights) -> Gradient:
        """Return [T], w / sqrt(12) as in the likelihood."""
        return {name: (self._square(value) / 12).sqrt() for name, value in observed.items()}

    def _square(self, value: Tensor) -> Tensor:
        """Return the mean square [T] of the distance of neighbours on the grid."""
        return self._width(value).flatten(1).square().mean(1).clamp(min=HALF_STEP**2)

    def _likelihood(self, gradient: Gradient, observed: Observed, weights: Weights) -> Tensor:
        """Return [T], the sum of (g' - g)^2 / (2 w^2 / 12) over all entries.

        w is the distance of an entry's neighbours on the grid, and w^2 / 12 the variance of a rounding error that is
        uniform between them. In half precision it is the root mean square over a tensor: entries that are small by
        chance would outweigh all others, and a search far from the truth would follow only them. It is no less than
        2^-24, so that a tensor of equal entries has one.
        """
        errors = []
        for name, value in observed.items():
            errors.append(6 * (gradient[name] - value).flatten(1).square().sum(1) / self._square(value))
        return torch.stack(errors).sum(0)

    def _rounded(self, value: Tensor) -> Tensor:
        if self.bits == "half":
            return value.clamp(-HALF_MAX, HALF_MAX).half().to(value.dtype)
        low, step = value.min(), self._width(value[None])[0]
        return torch.where(step > 0, low + step * ((value - low) / step).round(), value)

    def _width(self, value: Tensor) -> Tensor:
        """Return [T, 1, ...] or, in half precision, [T, *shape]: how far an entry of [T, *shape] is from the next."""
        if self.bits == "half":
            exponent = torch.frexp(value).exponent - 1  # |value| lies in [2^exponent, 2^(exponent + 1))
            step = torch.ldexp(torch.ones_like(value), exponent - HALF_MANTISSA).clamp(min=HALF_STEP)
            return step.where(value != 0, HALF_STEP)  # frexp's exponent of 0 is 0, as if 0 were in [1/2, 1)
        entries = value.flatten(1)
        span = entries.amax(1) - entries.amin(1)
        return (span / (2**self.bits - 1)).view(-1, *[1] * (value.ndim - 1))
