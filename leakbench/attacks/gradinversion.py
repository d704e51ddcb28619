"""GradInversion: gradient matching with a prior on the statistics of batch normalisations, and a group of starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.attacks.adam import AdamSearch, adam, logarithm
from leakbench.attacks.base import register
from leakbench.attacks.matching import Count, Found, MatchingObjective, NonNegative, root
from leakbench.attacks.matching.problem import StatisticsOf
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient
from leakbench.gradients.bilinear import squared_norm
from leakbench.gradients.normalisation import batch_normalisations
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns

MAX_SHIFT = 3
"""By how many pixels an image is shifted, at most, to fit the mean of its group."""


def summed_norms(gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: the sum over parameters of |g' - g|, relative to that of |g|. A gradient of zeros is at 1."""
    errors = torch.stack([root(squared_norm(gradient[name] - target)) for name, target in observed.items()]).sum(0)
    whole = torch.stack([root(squared_norm(target)) for target in observed.values()]).sum(0)
    return errors / whole.clamp(min=torch.finfo(whole.dtype).tiny)


@register("gradinversion")
@dataclass(frozen=True)
class GradInversion(AdamSearch):
    """GradInversion: Adam on the distances of all layers, with priors on image, batch statistics and a group of starts.

    Minimised is log(sum_l |g'_l - g_l| / sum_l |g_l|) + tv TV + l2 |x - 0.5|^2 / N + statistics R + group |x - E|. R is
    the relative distance of means and variances of every batch normalisation's input from those that the threat model
    grants (``statistics`` of the threat model): by default the running statistics of the network that was handed out,
    which say nothing of one client unless the network was trained. E is the mean over ``seeds`` starts that run
    together, each shifted by up to 3 pixels to fit it. The paper has neither logarithm nor relation: its weights are
    those of one network. On a trained one, the gradient of noise is hundreds of times that of images, and priors beside
    a plain distance count for nothing. The paper's noise on every step is left out. See GradientMatching for the
    options.

    Attributes:
        statistics: the weight of the prior on batch statistics; without effect in a network without them.
        l2: the weight of the squared distance from grey.
        group: the weight of the distance from the mean of the group.
        seeds: how many starts form the group; the one that matches best is returned.
    """

    version: ClassVar[int] = 2  # 2: the logarithm, and the weights beside it
    reference: ClassVar[str] = (
        "Yin, Mallya, Vahdat, Alvarez, Kautz and Molchanov 2021, See through Gradients: Image Batch Recovery via "
        "GradInversion, CVPR, arXiv 2104.07586"
    )
    assumes: ClassVar[str] = (
        "A trained network with batch normalisation. The paper knows the statistics of the batch (statistics=exact in "
        "the threat model) and that no label occurs twice; the default here grants neither."
    )
    cost: ClassVar[str] = (
        "One evaluation and a pass of the network a step, for each seed; the seeds are in memory together."
    )
    fails: ClassVar[str] = (
        "Networks whose running statistics are not those of the batch: untrained ones, and batches of few images; then "
        "the prior pulls away from the images. Without batch normalisation it is IG with another distance."
    )
    per_tensor: ClassVar[bool] = True
    steps: Count = 2000
    tv: NonNegative = 4.0
    statistics: NonNegative = 3.0
    l2: NonNegative = 1e-4
    group: NonNegative = 1.0
    seeds: Count = 1

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return images from N(0.5, 0.25^2), about that of normalised photographs, and label logits from N(0, 1)."""
        start = super().start(observation, rng)
        return start | {"image": 0.5 + 0.25 * start["image"]}

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the relative sum of the parameters' distances."""
        return summed_norms(gradient, observed)

    def reshape(self, distance: Tensor) -> Tensor:
        """Return the logarithm of the distance, or of a likelihood, [T]."""
        return logarithm(distance)

    def prior(self, images: Tensor) -> Tensor:
        """Return the weighted total variation, squared distance from grey, and distance from the group's mean."""
        prior = super().prior(images) + self.l2 * (images - 0.5).square().flatten(1).mean(1)
        if self.seeds == 1 or not self.group:
            return prior
        return prior + self.group * root((images - consensus(images.detach(), self.seeds)).square().flatten(1).mean(1))

    def penalty(self, images: Tensor, observation: Observation, statistics: StatisticsOf) -> Tensor | None:
        """Return the weighted distance of batch statistics from the granted ones; None in a network without any."""
        granted = granted_statistics(observation) if self.statistics else {}
        if not granted:
            return None
        own = {name: value for name, value in statistics(images).items() if name in granted}
        errors, sizes = images.new_zeros(len(images)), images.new_zeros(len(images))
        for name, (mean, variance, count) in own.items():
            wanted_mean, wanted_variance, correction = granted[name]
            variance = variance * (count / max(1, count - correction))
            for found, wanted in ((mean, wanted_mean), (variance, wanted_variance)):
                errors = errors + root((found - wanted).square().sum(1))
                sizes = sizes + wanted.expand_as(found).square().sum(1).sqrt()
        return self.statistics * errors / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run Adam with IG's schedule, in [0, 1]."""
        return adam(objective, start, self.steps, self.lr, signed=False)

    def _objective(self, observation: Observation, rng: Rng) -> MatchingObjective:
        """Return the objective of every trial's seeds, one after the other: [T * seeds]."""
        objective = super()._objective(observation, rng)
        if self.seeds == 1:
            return objective
        trials = observation.trials
        many = objective.select([row for row in range(trials) for _ in range(self.seeds)])
        keys = tuple(f"{key}/seed {place}" for key in rng.keys for place in range(self.seeds))
        return replace(many, rng=Rng(keys, rng.device))

    def _search(self, objective: MatchingObjective) -> Found:
        """Return the seed of each group that matches best."""
        found = super()._search(objective)
        if self.seeds == 1:
            return found
        match = torch.where(found.failed, torch.inf, found.objective).nan_to_num(torch.inf).view(-1, self.seeds)
        best = match.argmin(1) + self.seeds * torch.arange(len(match), device=match.device)
        spread = (found.images - consensus(found.images, self.seeds)).square().flatten(1).mean(1).sqrt()
        curve = found.curve
        return Found(
            images=found.images[best],
            labels=found.labels[best],
            objective=found.objective[best],
            failed=found.failed[best],
            evaluations=found.evaluations.view(-1, self.seeds).sum(1),
            findings={"group_spread": spread[best]},
            curve=None if curve is None else replace(curve, values=curve.values[best]),
        )


def granted_statistics(observation: Observation) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Return mean and variance [T, C], or [1, C], of each batch normalisation's input as far as they are granted.

    Where clients send their buffers, those of the batch follow from the ones before and after: after k steps that each
    move them by the share m, (after - (1 - m)^k before) / (1 - (1 - m)^k). Clients in eval mode send what they were
    given, and then that is all that is known.

    Returns:
        By layer; the number is 1 where the variance is the unbiased one, as a running variance is, and else 0.
    """
    found = {}
    own, known = observation.statistics, observation.weights
    for name, layer in batch_normalisations(observation.model).items():
        if f"{name}.mean" in own:
            found[name] = (own[f"{name}.mean"], own[f"{name}.var"], 0)
            continue
        if not layer.track_running_stats:
            continue
        pair = []
        for buffer in (f"{name}.running_mean", f"{name}.running_var"):
            before = known[buffer]
            before = before if before.ndim == 2 else before[None]
            if buffer in own and layer.training and layer.momentum:
                client = observation.client
                steps = observation.threat.local_steps if client is None else client.steps
                share = (1 - layer.momentum) ** (1 if observation.threat.shares == "gradient" else steps)
                before = (own[buffer] - share * before) / (1 - share)
            pair.append(before)
        found[name] = (pair[0], pair[1], 1)
    return found


def consensus(images: Tensor, seeds: int) -> Tensor:
    """Return, for each image, the mean of its group after a shift of the others to fit the group's plain mean.

    Args:
        images: [T * seeds, ..., C, H, W], the groups one after the other.
        seeds: the size of a group.
    """
    groups = images.view(-1, seeds, *images.shape[1:])
    plain = groups.mean(1, keepdim=True)
    best, error = groups, (groups - plain).square().mean((-3, -2, -1), keepdim=True)
    for down in range(-MAX_SHIFT, MAX_SHIFT + 1):
        for across in range(-MAX_SHIFT, MAX_SHIFT + 1):
            moved = groups.roll((down, across), (-2, -1))
            own = (moved - plain).square().mean((-3, -2, -1), keepdim=True)
            better = own < error
            best, error = torch.where(better, moved, best), torch.where(better, own, error)
    return best.mean(1, keepdim=True).expand_as(groups).reshape(images.shape)
