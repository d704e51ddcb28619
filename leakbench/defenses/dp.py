"""DP-SGD: clipped per example, with Gaussian noise; and what that guarantees."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.core.component import NonNegative, Positive
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.clip import clipped
from leakbench.gradients.bilinear import squared_distance

WEAK_EPSILON = 10
"""An epsilon above which Ponomareva et al. 2023 (How to DP-fy ML, section 5.2) call a guarantee weak, or none."""


@register("dp")
@dataclass(frozen=True)
class DP(Defense):
    """DP-SGD: clip each example's gradient, add Gaussian noise of ``noise_multiplier * clip`` to the sum, average.

    (sum_i g_i min(1, clip / |g_i|_2) + noise) / B for a batch of B, with noise from N(0, (noise_multiplier * clip)^2)
    for every entry; norms are taken over all parameters.

    The last three options say of which training the step is a part. What is sent does not depend on them; the
    guarantee (``epsilon``) does.

    Attributes:
        clip: the largest norm of an example's gradient, in the gradient's units.
        noise_multiplier: the noise's standard deviation over ``clip``.
        steps: how many such steps the client's training takes.
        sampling_rate: the probability with which each example takes part in a step (Poisson sampling).
        delta: the guarantee's delta.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    version: ClassVar[int] = 3  # 3: adaptive attackers weigh the prior with the likelihood
    reference: ClassVar[str] = (
        "Abadi et al. 2016, Deep Learning with Differential Privacy, CCS, algorithm 1; epsilon as in Mironov et al. "
        "2019, arXiv 1908.10530"
    )
    assumes: ClassVar[str] = "Nothing: its guarantee holds against every attacker, for the epsilon that it states."
    cost: ClassVar[str] = "Accuracy; a smaller epsilon costs more."
    fails: ClassVar[str] = "A large epsilon guarantees little; the report states it."
    clip: Positive = 1.0
    noise_multiplier: NonNegative = 1.1
    steps: Annotated[int, Field(ge=1, le=10**9)] = 1000
    sampling_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.01
    delta: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the noisy mean of the clipped gradients."""
        deviation = self.noise_multiplier * self.clip
        return {
            name: (value.sum(0) + deviation * torch.randn(value.shape[1:], generator=rng)) / len(value)
            for name, value in clipped(step.per_example(), self.clip).items()
        }

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who models clipping and noise."""
        attacker = AdaptiveAttacker(
            "also clips the dummy gradient, and weighs an error by the noise's distribution (L2)",
            surrogate=self._clipped,
            likelihood=self._likelihood if self.noise_multiplier > 0 else None,
            spread=self._spread if self.noise_multiplier > 0 else None,
        )
        return {"default": attacker}

    def _clipped(self, gradient: Gradient, observed: Observed, weights: Weights) -> Gradient:
        return clipped(gradient, self.clip)

    def _likelihood(self, gradient: Gradient, observed: Observed, weights: Weights) -> Tensor:
        """Return [T], |g' - g|_2^2 / (2 (noise_multiplier * clip)^2) for a batch of one."""
        return squared_distance(gradient, observed) / (2 * (self.noise_multiplier * self.clip) ** 2)

    def _spread(self, observed: Observed, weights: Weights) -> Gradient:
        """Return [T], the noise's standard deviation for a batch of one."""
        deviation = self.noise_multiplier * self.clip
        return {name: value.new_full((len(value),), deviation) for name, value in observed.items()}

    def epsilon(self) -> float:
        """Return the epsilon of the whole training, infinite without noise; needs the extra ``dp``.

        The accountant is that of Google's dp-accounting by Renyi differential privacy, for data sets that differ by
        one example more or less.
        """
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.rdp import RdpAccountant

        event = PoissonSampledDpEvent(self.sampling_rate, GaussianDpEvent(self.noise_multiplier))
        return float(RdpAccountant().compose(event, self.steps).get_epsilon(self.delta))

    def note(self) -> str:
        """Return the guarantee and its conditions."""
        training = (
            f"{self.steps} steps, in each of which every example takes part with probability {self.sampling_rate:g}"
        )
        try:
            epsilon = self.epsilon()
        except ImportError:
            return f"epsilon is not known: it needs dp-accounting; pip install dp-accounting. It is for {training}."
        words = "epsilon is infinite" if math.isinf(epsilon) else f"epsilon = {epsilon:.3g} at delta = {self.delta:g}"
        weak = (
            f" Above {WEAK_EPSILON} that is weak or no protection (Ponomareva et al. 2023)."
            if epsilon > WEAK_EPSILON
            else ""
        )
        return f"{words} after {training} (Renyi accountant of dp-accounting; one example more or less).{weak}"
