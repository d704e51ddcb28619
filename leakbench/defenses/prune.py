"""Gradient pruning: the small entries are not sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register

Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@register("prune")
@dataclass(frozen=True)
class Prune(Defense):
    """Send zero for the entries of a gradient tensor whose magnitude is below a percentile of the tensor.

    An entry g_i is sent where |g_i| >= t, with t the percentile 100 * ratio of the tensor's |g|, and 0 elsewhere.

    Attributes:
        ratio: the share of each tensor's entries that becomes zero; at 0 everything is sent, at 1 only the largest.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS, section 5.2"
    assumes: ClassVar[str] = "The attacker also matches the zeros."
    cost: ClassVar[str] = "Less to send; strong pruning slows training."
    fails: ClassVar[str] = (
        "Attackers who match only the entries that were sent: the largest ones carry most of the image."
    )
    ratio: Ratio = 0.9

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the gradient without its small entries."""
        return {name: sparse(value, self.ratio) for name, value in step.gradient().items()}

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who leaves out the zeros."""
        words = "matches only the entries that were not sent as zero"
        return {"default": AdaptiveAttacker(words, undo=without_zeros, batched=True)}


def without_zeros(observed: Observed, weights: Weights) -> Gradient:
    """Return what was sent, with NaN in place of zeros."""
    return {name: torch.where(value != 0, value, torch.nan) for name, value in observed.items()}


def sparse(value: Tensor, ratio: float) -> Tensor:
    """Return a tensor with zeros where a magnitude is below the percentile 100 * ratio of all."""
    return torch.where(value.abs() < percentile(value.abs(), ratio), 0.0, value)


def percentile(values: Tensor, ratio: float) -> float:
    """Return the percentile 100 * ratio of all values, interpolated linearly between neighbours (``numpy.quantile``).

    Args:
        values: of any shape.
        ratio: in [0, 1].
    """
    return float(np.quantile(values.detach().cpu().numpy(), ratio))
