"""The objective of gradient matching, of T trials at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from leakbench.attacks.matching.dummy import DummyGradient
from leakbench.attacks.matching.tensors import pack, scaled
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker
from leakbench.gradients.bilinear import squared_norm
from leakbench.optim import Evaluation, Unknowns

ROUGHNESS = 0.05
"""The expected absolute difference of neighbouring pixels of an image in [0, 1]: that of 32 photographs.

Beside a likelihood, total variation is the prior of a Laplace distribution of this scale.
"""

FINAL_EVALUATION = -1
"""The number of the evaluation by which start and end of an optimisation are compared, on the same draws."""


@dataclass(frozen=True)
class MatchingObjective(DummyGradient):
    """The matching objective of T trials, a function of the attack's unknowns and of the secrets that it optimises."""

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [T], the matching distance plus the prior."""
        images, logits = self.render(unknowns)
        return self._distance(images, logits, unknowns, evaluation) + self.attack.prior(images)

    def match(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return the match [T] of these unknowns by ``judge``, the less the better; infinite for a negative rate.

        The prior is added only to a likelihood, which needs it: under strong noise, the most likely image is noise.
        """
        images, logits = self.render(unknowns)
        match = self._distance(images, logits, unknowns, evaluation, judge=True)
        if self.null_likelihood is not None:
            match = match + self.attack.prior(images)
        factor = self.attack.factor(unknowns)
        return match if factor is None else torch.where(factor > 0, match, torch.inf)

    def render(self, unknowns: Unknowns) -> tuple[Tensor, Tensor | None]:
        """Return the images [T, C, H, W] of these unknowns, and the label logits [T, K] if labels are optimised."""
        return self.attack.render(unknowns, self.observation)

    def cap_by_null(self, match: Tensor) -> Tensor:
        """Return ``match`` [T], but no more than a gradient of zeros has, if it is a likelihood.

        A rate that is learned can turn any gradient into an update of zero, so a start may not count as worse.
        """
        likelihood = self.null_likelihood
        return match if likelihood is None else torch.minimum(match, likelihood / self.likelihood_scale)

    def _distance(
        self, images: Tensor, logits: Tensor | None, unknowns: Unknowns, evaluation: Evaluation, judge: bool = False
    ) -> Tensor:
        gradient = self._masked(self.dummy(images, self._labels(logits), unknowns, evaluation))
        factor, adaptive = self.attack.factor(unknowns), self.observation.adaptive
        if adaptive is not None and adaptive.models_release:
            unit = self._unit(factor)
            gradient = self._released(adaptive, scaled(gradient, unit))
            if adaptive.likelihood is not None:
                return adaptive.likelihood(gradient, self._sent, self.observation.weights) / self.likelihood_scale
            gradient = scaled(gradient, 1 / unit)
        observed: Mapping[str, Tensor] = self.observation.gradient
        if not self.attack.per_tensor:
            gradient, observed = pack(gradient), self._packed
        if judge:
            return self.attack.judge(gradient, observed, factor)
        return self.attack.distance(gradient, scaled(observed, factor))

    def ratio(self, unknowns: Unknowns) -> Tensor:
        """Return [T], |g'| / |g| for the dummy and the observed gradient."""
        found = []
        for some, own in self.parts(unknowns):
            images, logits = some.render(own)
            with torch.no_grad():
                labels = some._labels(logits)
                gradient = some._masked(some._gradient(some._filled(own, 0), images, labels, 0))
            observed = some.observation.gradient
            sizes = [torch.stack([squared_norm(x[name]) for name in observed]).sum(0) for x in (gradient, observed)]
            found.append((sizes[0] / sizes[1]).sqrt())
        return torch.cat(found)

    def _labels(self, logits: Tensor | None) -> Tensor:
        """Return the labels [T], or class probabilities [T, K], of the dummy gradient."""
        if self.observation.targets is not None:
            return self.observation.targets
        if self.labels is not None:
            return self.labels
        assert logits is not None, "an attack that optimises labels renders their logits"
        return torch.softmax(logits, 1)

    def _masked(self, gradient: Gradient) -> Gradient:
        """Return the dummy gradient, with zeros at the entries that are unknown of the observed one."""
        shown = self.observation.shown
        if shown is None:
            return gradient
        return {name: torch.where(shown[name], value, 0.0) for name, value in gradient.items()}

    def _unit(self, factor: Tensor | None) -> Tensor | float:
        """Return the factor from the mean gradient to the update that was sent, by a known or learned rate."""
        unit = self.observation.threat.unit
        if unit is not None:
            return unit
        assert factor is not None, "``prepare`` refuses to model a release in its own units without a rate"
        return self.observation.unit / factor

    @cached_property
    def _packed(self) -> Gradient:
        return pack(self.observation.gradient)

    @cached_property
    def _sent(self) -> Mapping[str, Tensor]:
        """The gradient or update in the units in which it was sent."""
        return scaled(self.observation.gradient, self.observation.unit)

    @cached_property
    def likelihood_scale(self) -> Tensor:
        """The divisor [T] of a likelihood, by which it becomes comparable to the weighted total variation.

        It is the negative log-likelihood of a gradient of zeros, which makes it relative as a distance is; or more, if
        the noise is so strong that the total variation must get its weight in the posterior (maximum a posteriori): an
        image of N values and total variation v has the negative log-density N v / ROUGHNESS.
        """
        unlikely, tv = self.null_likelihood, self.attack.tv
        assert unlikely is not None
        least = math.prod(self.observation.image_shape) / (ROUGHNESS * tv) if tv else torch.finfo(unlikely.dtype).tiny
        return unlikely.clamp(min=least)

    @cached_property
    def null_likelihood(self) -> Tensor | None:
        """The negative log-likelihood [T] of a gradient of zeros; None if there is no likelihood."""
        adaptive = self.observation.adaptive
        if adaptive is None or adaptive.likelihood is None:
            return None
        zeros = self._released(adaptive, {name: torch.zeros_like(value) for name, value in self._sent.items()})
        return adaptive.likelihood(zeros, self._sent, self.observation.weights)

    def _released(self, adaptive: AdaptiveAttacker, gradient: Gradient) -> Gradient:
        """Return a gradient, in the units in which it is sent, as the adaptive attacker has it released."""
        if adaptive.surrogate is None:
            return gradient
        return adaptive.surrogate(gradient, self._sent, self.observation.weights)


def evaluate(objective: MatchingObjective, unknowns: Unknowns) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the match [T], the images and the label logits of these unknowns, in parts that fit into memory."""
    values, images, logits = [], [], []
    for some, own in objective.parts(unknowns):
        values.append(some.match(own, FINAL_EVALUATION).detach())
        with torch.no_grad():
            image, logit = some.render(own)
        images.append(image)
        logits += [] if logit is None else [logit]
    return torch.cat(values), torch.cat(images), torch.cat(logits) if logits else None
