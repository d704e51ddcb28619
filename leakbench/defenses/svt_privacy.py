"""NVFlare's SVT privacy: the sparse vector technique selects some entries of the update, and noise is added to them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakbench.core.component import Count, NonNegative, Positive
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.noise import drawn
from leakbench.defenses.percentile_privacy import AT_THE_LIMIT, hidden_unless

MAX_PASSES = 1000
"""How often the entries are asked again whether they are above the threshold; then the largest are taken."""


@register("svt-privacy")
@dataclass(frozen=True)
class SVTPrivacy(Defense):
    """The sparse vector technique: noise decides which entries of the update are sent, clipped and with noise.

    u = update / steps, of n entries, c = ceil(fraction * n). An entry is accepted once |clip(u_i)| + Laplace(4
    gamma c / e2) is at least tau + Laplace(2 gamma / epsilon), with e2 = epsilon (2 c)^(2/3); the others are asked
    again until c are accepted. Of all accepted ones, c are drawn; clip(u_i + Laplace(2 gamma / noise_var)) is sent
    of these, zero of the others, times steps. Laplace(b) has the scale b, and clip limits to +-gamma.

    ``gamma`` and ``tau`` count in the units of what is shared: NVFlare filters updates of weights.

    Attributes:
        fraction: c over n.
        epsilon: the budget of the selection.
        noise_var: the budget of the noise on what is sent, by the name that NVFlare gives it: larger is less noise.
        gamma: the largest magnitude of an entry of the update, for each local step.
        tau: the threshold.
        replace: the c entries are drawn with replacement, NVFlare's default: fewer than c are then sent.
        order: ``noise-clip``, clip after the noise (NVFlare up to 2.7), or ``clip-noise``, before it (later).
        unselected: what is sent of accepted entries that were not drawn: ``zero``, or ``raw``, the exact entries, as
            NVFlare did by mistake until March 2022 (its issue 343).
        steps: the number of local steps, which NVFlare takes from the client's report.
    """

    reference: ClassVar[str] = (
        "NVIDIA FLARE, filter SVTPrivacy (app_common/filters/svt_privacy.py), after Lyu, Su and Li 2017, Understanding "
        "the Sparse Vector Technique for Differential Privacy, PVLDB, arXiv 1603.01699; Li et al. 2019, "
        "Privacy-preserving Federated Brain Tumour Segmentation, arXiv 1910.00962"
    )
    assumes: ClassVar[str] = "The budgets are small, and the fraction is."
    cost: ClassVar[str] = "Accuracy: with the default budgets what is sent is nearly independent of the update."
    fails: ClassVar[str] = (
        "With unselected=raw, a large share of the entries is sent exactly. The budgets are for each entry that is "
        "sent; those of a whole update add up."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    fraction: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.1
    epsilon: Positive = 0.1
    noise_var: Positive = 0.1
    gamma: Positive = 1e-5
    tau: NonNegative = 1e-6
    replace: bool = True
    order: Literal["noise-clip", "clip-noise"] = "noise-clip"
    unselected: Literal["zero", "raw"] = "zero"
    steps: Count = 1

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the entries that were selected, with noise, and zeros."""
        update = step.gradient()
        names = sorted(update)
        flat = torch.cat([update[name].flatten() for name in names]) / self.steps
        accepted = self._accepted(flat, rng)
        count = self._count(len(flat))
        if self.replace:
            chosen = accepted[torch.randint(len(accepted), (count,), generator=rng)].unique()
        else:
            chosen = accepted[torch.randperm(len(accepted), generator=rng)[:count]]
        sent = torch.zeros_like(flat)
        if self.unselected == "raw":
            sent[accepted] = flat[accepted]
        noise = (drawn("laplace", chosen.shape, rng) * self._scale).to(flat)
        if self.order == "noise-clip":
            sent[chosen] = (flat[chosen] + noise).clamp(-self.gamma, self.gamma)
        else:
            sent[chosen] = flat[chosen].clamp(-self.gamma, self.gamma) + noise
        parts = (sent * self.steps).split([update[name].numel() for name in names])
        found = {name: part.view_as(update[name]) for name, part in zip(names, parts)}
        return {name: found[name] for name in update}

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who weighs what was sent by its likelihood or, behind ``raw``, knows what is exact."""
        likely = AdaptiveAttacker(
            "weighs each entry that was sent by its likelihood under clipping and Laplace noise",
            likelihood=self._likelihood,
            batched=True,
        )
        if self.unselected == "zero":
            return {"default": likely}
        exact = AdaptiveAttacker(
            "matches only the entries above gamma, which were sent exactly", undo=self._exact, batched=True
        )
        return {"default": exact, "likelihood": likely}

    @property
    def _scale(self) -> float:
        """The scale of the Laplace noise on what is sent."""
        return 2 * self.gamma / self.noise_var

    def _count(self, size: int) -> int:
        return min(size, math.ceil(self.fraction * size))

    def _accepted(self, flat: Tensor, rng: torch.Generator) -> Tensor:
        """Return the indices of the accepted entries, at least as many as are sent."""
        count = self._count(len(flat))
        threshold = self.tau + float(drawn("laplace", torch.Size(()), rng)) * 2 * self.gamma / self.epsilon
        scale = 4 * self.gamma * count / (self.epsilon * (2 * count) ** (2 / 3))
        sizes = flat.abs().clamp(max=self.gamma)
        open_, accepted = torch.ones(len(flat), dtype=torch.bool), torch.zeros(len(flat), dtype=torch.bool)
        for _ in range(MAX_PASSES):
            above = open_ & (sizes + (drawn("laplace", sizes.shape, rng) * scale).to(sizes) >= threshold)
            accepted, open_ = accepted | above, open_ & ~above
            if int(accepted.sum()) >= count:
                return accepted.nonzero()[:, 0]
        return sizes.topk(count).indices

    def _exact(self, observed: Observed, weights: Weights) -> Gradient:
        limit = self.gamma * self.steps / AT_THE_LIMIT
        return {name: hidden_unless(value.abs() > limit, value) for name, value in observed.items()}

    def _likelihood(self, gradient: Gradient, observed: Observed, weights: Weights) -> Tensor:
        """Return [T], the negative logarithm of the likelihood of the entries that were sent, without those of zero."""
        errors = []
        for name, value in observed.items():
            dummy, sent = gradient[name] / self.steps, value / self.steps
            if self.order == "clip-noise":
                dummy = dummy.clamp(-self.gamma, self.gamma)
            distance = (sent - dummy) / self._scale
            error = distance.abs()
            if self.order == "noise-clip":
                clipped = sent.abs() >= self.gamma * AT_THE_LIMIT
                error = torch.where(clipped, -log_tail(sent.sign() * distance), error)
            errors.append(torch.where(value != 0, error, 0.0).flatten(1).sum(1))
        return torch.stack(errors).sum(0)


def log_tail(value: Tensor) -> Tensor:
    """Return the logarithm of the chance that Laplace noise of scale 1 is at least ``value``."""
    above = -value.clamp(min=0) - math.log(2)
    below = torch.log1p(-torch.exp(value.clamp(max=0)) / 2)
    return torch.where(value > 0, above, below)
