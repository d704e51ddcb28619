"""Outpost: pruning, and noise on the entries with the most Fisher information, by the spread of a layer's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.core.component import NonNegative
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.prune import percentile, sparse

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]

ROUNDING = 1e-3
"""The least standard deviation of the likelihood, relative to a tensor's largest entry, where there is little noise."""


@register("outpost")
@dataclass(frozen=True)
class Outpost(Defense):
    """Prune each tensor of the gradient, and add noise to the entries with the largest squares of the whole network.

    The noise of a tensor has the standard deviation ``noise`` times the variance of the tensor's weights, at most 1:
    widely spread weights count as a high risk of leakage. The squared gradient stands for the Fisher information. The
    method perturbs ever fewer steps of a training; the attacked step is one that it perturbs.

    Attributes:
        noise: the factor of the noise's standard deviation.
        share: of the entries of the whole network, in per cent: those with the largest squares get noise.
        prune: the percentile of each tensor's magnitudes below which entries are sent as zero, before the noise.
    """

    reference: ClassVar[str] = (
        "Wang, Hugh and Li 2023, More than Enough is Too Much: Adaptive Defenses against Gradient Leakage in "
        "Production Federated Learning, IEEE INFOCOM (released code, Plato)"
    )
    assumes: ClassVar[str] = "Wide weights, as of LeNet's uniform(0.5); torch's default weights have a small variance."
    cost: ClassVar[str] = "Pruning and noise slow training; the paper lets both decay."
    fails: ClassVar[str] = (
        "Networks with small weights get hardly any noise: it is then a pruning, which an attacker repeats."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    noise: NonNegative = 0.8
    share: Percent = 40.0
    prune: Percent = 80.0

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the pruned gradient with noise."""
        gradient, weights = step.gradient(), step.weights()
        squares = torch.cat([value.square().flatten() for value in gradient.values()])
        cutoff = percentile(squares, 1 - self.share / 100)
        sent = {}
        for name, value in gradient.items():
            noise = self._deviation(weights[name][None])[0] * torch.randn(value.shape, generator=rng)
            sent[name] = sparse(value, self.prune / 100) + torch.where(value.square() >= cutoff, noise, 0.0)
        return sent

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who prunes the dummy gradient too, and one who also weighs errors by the noise."""
        return {
            "default": AdaptiveAttacker("prunes the dummy gradient too", surrogate=self._pruned, batched=True),
            "likelihood": AdaptiveAttacker(
                "prunes the dummy gradient too, and weighs an error by the noise of its layer (L2)",
                surrogate=self._pruned,
                likelihood=self._likelihood,
                batched=True,
            ),
        }

    def _pruned(self, gradient: Gradient, observed: Observed, weights: Weights) -> Gradient:
        return {name: torch.stack([sparse(row, self.prune / 100) for row in value]) for name, value in gradient.items()}

    def _deviation(self, weight: Tensor) -> Tensor:
        """Return the noise's standard deviation [T, 1, ...] for weights [T, *shape] of one parameter."""
        rows = weight.flatten(1)
        spread = rows.var(1) if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])
        return self.noise * spread.clamp(max=1).view(-1, *[1] * (weight.ndim - 1))

    def _likelihood(self, gradient: Gradient, observed: Observed, weights: Weights) -> Tensor:
        """Return [T], the sum of (g' - g)^2 / (2 s^2), s being the layer's noise."""
        errors = []
        for name, value in observed.items():
            least = ROUNDING * value.flatten(1).abs().amax(1).view(-1, *[1] * (value.ndim - 1))
            deviation = torch.maximum(self._deviation(weights[name]), least).clamp(min=torch.finfo(value.dtype).tiny)
            errors.append(((gradient[name] - value) / deviation).square().flatten(1).sum(1) / 2)
        return torch.stack(errors).sum(0)
