"""A defense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from leakbench import Defense, Gradient, Step, defenses


@defenses.register("signs")
@dataclass(frozen=True)
class Signs(Defense):
    """Send nothing of each gradient entry but its sign."""

    reference: ClassVar[str] = "Bernstein et al. 2018, signSGD, ICML"
    scale: Annotated[float, Field(gt=0)] = 1.0

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return scale * sign(gradient)."""
        return {name: self.scale * value.sign() for name, value in step.gradient().items()}
