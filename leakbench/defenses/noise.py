"""Additive noise on the shared gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from leakbench.defenses.base import Defense, Step, register
from leakbench.types import Gradient


@register("noise")
@dataclass(frozen=True)
class Noise(Defense):
    """Independent zero-mean noise on every gradient entry; ``scale`` is its standard deviation.

    Attributes:
        scale: the standard deviation, in the gradient's units, for both kinds (a Laplace law of scale b has standard
            deviation b * sqrt(2), so b = scale / sqrt(2)).
        kind: ``gaussian`` or ``laplace``.
    """

    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS, section 5.1 (states variances)"
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    kind: Literal["gaussian", "laplace"] = "gaussian"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the gradient plus noise."""
        return {name: value + self.scale * self._draw(value.shape, rng) for name, value in step.gradient().items()}

    def _draw(self, shape: torch.Size, rng: torch.Generator) -> torch.Tensor:
        """Return noise of standard deviation 1."""
        if self.kind == "gaussian":
            return torch.randn(shape, generator=rng)
        # the difference of two exponentials of mean b is Laplace(b), of standard deviation b * sqrt(2)
        first, second = torch.empty(shape).exponential_(generator=rng), torch.empty(shape).exponential_(generator=rng)
        return (first - second) / 2**0.5
