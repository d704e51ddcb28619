"""signSGD: only the signs of the gradient's entries are sent."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register

SOFTNESS = 0.1
"""The sign of a dummy gradient is smoothed where an entry is below this share of its tensor's mean magnitude."""


@register("signsgd")
@dataclass(frozen=True)
class Sign(Defense):
    """signSGD: send the sign of every entry of the gradient.

    Attributes:
        scaled: send the signs times the mean magnitude of their tensor, so that steps keep their size.
    """

    reference: ClassVar[str] = (
        "Bernstein et al. 2018, signSGD: Compressed Optimisation for Non-Convex Problems, ICML, arXiv 1802.04434; "
        "scaled as in Karimireddy et al. 2019, Error Feedback Fixes SignSGD, ICML, arXiv 1901.09847"
    )
    assumes: ClassVar[str] = "The attacker needs the sizes of the entries, as closed forms do."
    cost: ClassVar[str] = "One bit for each entry; the learning rate must be set anew without scaled=true."
    fails: ClassVar[str] = (
        "One bit of each of many entries suffices for searches whose dummy gradient is reduced to its signs too."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    scaled: bool = False

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the signs."""
        return {
            name: value.sign() * value.abs().mean() if self.scaled else value.sign()
            for name, value in step.gradient().items()
        }

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who reduces the dummy gradient to its signs, smoothly."""
        words = "reduces the dummy gradient to its signs too, smoothed near zero so that it has a slope"
        return {"default": AdaptiveAttacker(words, surrogate=self._signs, batched=True)}

    def _signs(self, gradient: Gradient, observed: Observed, weights: Weights) -> Gradient:
        found = {}
        for name, value in gradient.items():
            size = value.abs().flatten(1).mean(1).view(-1, *[1] * (value.ndim - 1))
            tiny = torch.finfo(value.dtype).tiny
            sign = value / (value.square() + (SOFTNESS * size).square()).clamp(min=tiny).sqrt()
            found[name] = sign * size if self.scaled else sign
        return found
