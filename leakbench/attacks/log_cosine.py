"""LogCosine: signed Adam on the logarithm of the cosine distance, the search for ReLU networks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.adam import AdamSearch, adam, logarithm
from leakbench.attacks.base import register
from leakbench.attacks.ig import cosine_from
from leakbench.attacks.matching import Count, Found, MatchingObjective, NonNegative
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient
from leakbench.gradients.bilinear import FromProducts
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns

WEIGHT = "tv"
"""The finding that is the weight of the total variation."""
LAST_STEP = 0.01
"""The last step size, relative to the first."""


@register("log-cosine")
@dataclass(frozen=True)
class LogCosine(AdamSearch):
    """The search for ReLU networks: signed Adam on the logarithm of the cosine distance, plus total variation.

    Beside a logarithm, the weight of the total variation is relative to the distance that is left: what counts falls
    with the distance, and one weight serves networks whose distances end orders of magnitude apart. Short searches with
    three weights come first, and the rest of the steps go to the weight whose image was best by the objective. A search
    starts near grey, and its step size falls smoothly to a hundredth. See GradientMatching for the other options.

    Attributes:
        tv: the middle one of the three weights, beside the logarithm of a distance or of a likelihood.
        spread: the deviation of the start around grey.
        ratio: the ratio of two neighbouring weights; 1 searches with ``tv`` only.
        pilot: the share of the steps that the short searches take together.
    """

    reference: ClassVar[str] = (
        "Geiping et al. 2020, Inverting Gradients, NeurIPS (distance, optimiser); the rest is our own"
    )
    assumes: ClassVar[str] = "A hard label, inferred from the last layer; a network in the mode that the client used."
    cost: ClassVar[str] = "One evaluation a step, the short searches included, in float32."
    fails: ClassVar[str] = (
        "Batch normalisation in training mode on one image, whose statistics hide it; deep networks without training "
        "leave blurred images; noise."
    )
    steps: Count = 2000
    tv: NonNegative = 0.55
    spread: NonNegative = 0.1
    ratio: Annotated[float, Field(ge=1, le=1e3)] = 5.0
    pilot: Annotated[float, Field(ge=0, lt=1)] = 0.3

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the cosine distance, which is no less than its rounding."""
        return self.distance_from(observed)(gradient)

    def distance_from(self, observed: Mapping[str, Tensor]) -> Callable[[Gradient], Tensor]:
        """Return ``distance``, with the observed norm computed once."""
        cosine = cosine_from(observed)

        def distance(dots: Tensor, squares: Tensor) -> Tensor:
            found = cosine.of(dots, squares)
            return found.clamp(min=torch.finfo(found.dtype).eps)

        return FromProducts(observed, distance)

    def reshape(self, distance: Tensor) -> Tensor:
        """Return the logarithm of the distance [T], or of a likelihood, which is positive as well."""
        return logarithm(distance)

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return an image from N(0.5, spread^2), and label logits from N(0, 1) if labels are optimised."""
        start = super().start(observation, rng)
        return start | {"image": 0.5 + self.spread * start["image"]}

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run Adam by the sign of the image's gradient, within [0, 1], with a step size that falls smoothly."""
        decay = LAST_STEP ** (1 / self.steps)
        return adam(objective, start, self.steps, self.lr, milestones=range(1, self.steps), decay=decay)

    def _search(self, objective: MatchingObjective) -> Found:
        """Search shortly with each weight, and then with the best one of every trial.

        Their images are compared by the objective with the middle weight: by the distance only, the least weight would
        lead while no search has come far.
        """
        factors = (1.0, 1 / self.ratio, self.ratio) if self.ratio > 1 and self.tv else ()  # a tie is the middle one
        steps = int(self.pilot * self.steps / len(factors)) if factors else 0
        if not steps:
            return super()._search(objective)
        size = objective.observation.trials
        like = next(iter(objective.observation.gradient.values()))
        pilot = replace(self, steps=steps, pilot=0)
        tried = [pilot._search(replace(objective, prior_factor=like.new_full((size,), factor))) for factor in factors]
        scores = [one.objective for one in tried]
        if objective.null_likelihood is None:  # or the match is the score
            scores = [self.reshape(one.objective) + self.prior(one.images) for one in tried]
        ranked = [score.masked_fill(one.failed, torch.inf) for score, one in zip(scores, tried)]
        best = torch.stack(ranked).nan_to_num(torch.inf).argmin(0)
        chosen = like.new_tensor(factors)[best]
        rest = replace(self, steps=self.steps - len(factors) * steps, pilot=0)
        found = rest._search(replace(objective, prior_factor=chosen))
        spent = torch.stack([one.evaluations for one in (*tried, found)]).sum(0)
        return replace(found, evaluations=spent, findings={**found.findings, WEIGHT: self.tv * chosen})
