"""NVFlare's percentile privacy: small entries of the update are not sent, and large ones are clipped."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.core.component import Count, Positive
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.prune import percentile

AT_THE_LIMIT = 1 - 1e-6
"""An entry of at least this share of the limit counts as clipped."""


@register("percentile-privacy")
@dataclass(frozen=True)
class PercentilePrivacy(Defense):
    """Send zero for the entries of the update below a percentile of all magnitudes, and clip the others to +-gamma.

    u = update / steps; u_i becomes 0 where |u_i| < t, the percentile of all |u| of the whole network, and otherwise
    min(max(u_i, -gamma), gamma); steps * u is sent. There is no noise and no privacy guarantee.

    ``gamma`` counts in the units of what is shared: NVFlare filters updates of weights, so use a threat model with
    ``shares=weights``, or scale it for gradients.

    Attributes:
        percentile: of all magnitudes, below which nothing is sent.
        gamma: the largest magnitude of an entry of the update, for each local step.
        steps: the number of local steps, which NVFlare takes from the client's report.
    """

    reference: ClassVar[str] = (
        "NVIDIA FLARE, filter PercentilePrivacy (app_common/filters/percentile_privacy.py), after Shokri and Shmatikov "
        "2015, Privacy-Preserving Deep Learning, CCS"
    )
    assumes: ClassVar[str] = "The attacker needs the small entries, or the size of the large ones."
    cost: ClassVar[str] = "A small gamma slows training, as clipping does."
    fails: ClassVar[str] = (
        "With the default percentile nine in ten entries are sent. If gamma is above them, they are exact; if it is "
        "below, their signs are, and attackers filter the dummy update in the same way."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    percentile: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 10.0
    gamma: Positive = 0.01
    steps: Count = 1

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the update with zeros for its small entries, clipped."""
        return self._filtered(step.gradient())

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who filters the dummy update too, and one who matches only the entries that are exact."""
        exact = AdaptiveAttacker(
            "matches only the entries that were neither clipped nor sent as zero", undo=self._exact, batched=True
        )
        return {
            "default": AdaptiveAttacker("filters the dummy update too", surrogate=self._each, batched=True),
            "exact": exact,
        }

    def _filtered(self, update: Gradient) -> Gradient:
        cutoff = percentile(torch.cat([value.abs().flatten() for value in update.values()]), self.percentile / 100)
        limit = self.gamma * self.steps
        return {
            name: torch.where(value.abs() < cutoff, 0.0, value.clamp(-limit, limit)) for name, value in update.items()
        }

    def _each(self, gradient: Gradient, observed: Observed, weights: Weights) -> Gradient:
        trials = len(next(iter(gradient.values())))
        found = [self._filtered({name: value[t] for name, value in gradient.items()}) for t in range(trials)]
        return {name: torch.stack([one[name] for one in found]) for name in gradient}

    def _exact(self, observed: Observed, weights: Weights) -> Gradient:
        limit = self.gamma * self.steps * AT_THE_LIMIT
        return {name: hidden_unless((value != 0) & (value.abs() < limit), value) for name, value in observed.items()}


def hidden_unless(shown: Tensor, value: Tensor) -> Tensor:
    """Return a tensor with NaN where it is not shown."""
    return torch.where(shown, value, torch.nan)
