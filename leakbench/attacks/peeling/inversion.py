"""The image whose forward pass gives recovered values: a search, which the values determine, for the last layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Self

import torch
from torch import Tensor

from leakbench.attacks.peeling.descent import Feature
from leakbench.attacks.peeling.network import Network
from leakbench.optim import Evaluation, Unknowns, descend, lbfgs

SPREAD = 0.05
"""The standard deviation of the starting image about grey."""


@dataclass(frozen=True)
class Search:
    """A search by Adam for an image.

    Attributes:
        times: how many times the steps of a search it takes.
        size: the first step size, which falls to a hundredth.
        smooth: the weight of total variation at first, which falls to 0 linearly: without it the search ends in a wrong
            image.
    """

    times: int
    size: float
    smooth: float


SEARCHES, NEAR = (Search(1, 0.1, 2.0), Search(5, 0.3, 2.0)), 0.02
"""The searches that are made until one comes near, and the relative squared misfit that counts as near. Below
normalisations by the image's own statistics, an image has no scale, and small steps lead nowhere."""

POOLED_SEARCHES, POOLED_NEAR = (Search(10, 0.03, 0.1), Search(5, 0.3, 1.0)), 1e-3
"""The same if there is a max-pool on the way: which value is the maximum changes with the image, and larger steps end
with wrong ones, unless small ones do not come near at all."""

NOISY, MAX_SMOOTH = 4.0, 0.3
"""The weight of total variation in the end, in relative errors of the values, and the largest one."""

CLEAN = 3e-5
"""The relative error of values up to which it is 0: rounding to single precision is no noise."""

LOCKED, LOCK_SIZE = ("scale", "shift"), 0.3
"""The unknowns of a key-lock on the way, and their step size relative to that of the image."""

CONTRAST = 0.25
"""The standard deviation of an image's values by which total variation is measured if contrast is not determined."""

REFINEMENTS = 5
"""How many times as many iterations of L-BFGS as steps of Adam are made at most."""

EXACT = 1e-11
"""The relative squared misfit below which the search ends: rounding to single precision leaves 1e-12."""

NO_CHANGE = 1e-12
"""The change of the relative squared misfit that counts as none."""

HISTORY = 50
"""How many pairs of L-BFGS are kept."""


FEATURES = 3
"""From how many recovered values, the lowest ones, the image is searched for."""

WORST = 8.0
"""How many times the least error of these the error of a value may be."""

MAX_ERROR = 0.1
"""The largest relative error of a value that is used, and the largest contradiction to the values below."""

UNCHECKED = 1e-3
"""The largest relative error of a value of a descent that no value below confirms."""


def chosen(features: Sequence[Feature]) -> list[Feature]:
    """Return the recovered values from which an image is searched for: the lowest ones that nothing contradicts.

    Args:
        features: the recovered values, the highest first.
    """
    good = [
        each
        for each in features
        if each.deviation < MAX_ERROR
        and (each.check < MAX_ERROR or (isnan(each.check) and (each.free or each.deviation < UNCHECKED)))
        and not each.balance > MAX_ERROR
    ]
    lowest = good[-FEATURES:]
    least = min((each.deviation for each in lowest), default=0.0)
    return [each for each in lowest if each.deviation <= WORST * least]


@dataclass(frozen=True)
class Match:
    """How far the values of images [1, B, C, H, W] on the way are from recovered ones, squared and relative.

    Attributes:
        network: of the images' floating type.
        features: what was recovered.
        smooth: the weight of total variation at first; it falls to ``last`` within ``anneal`` evaluations.
        anneal: see ``smooth``.
        last: the weight in the end, for values with noise.
    """

    network: Network
    features: Sequence[Feature]
    smooth: float = 0.0
    anneal: int = 1
    last: float = 0.0

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [1]."""
        image = unknowns["image"].flatten(0, 1)
        total = self._misfit(unknowns)
        locked = len(unknowns) > 1
        if locked:  # the lock's scale undoes any contrast: the image's must not fall, nor leave [0, 1]
            total = total + (image - image.clamp(0, 1)).square().mean()
        done = evaluation if isinstance(evaluation, int) else evaluation[0]
        weight = max(self.smooth * (1 - done / self.anneal), self.last)
        if weight:
            across, down = image.diff(dim=3).abs().mean(), image.diff(dim=2).abs().mean()
            rough = across + down
            total = total + weight * (rough * CONTRAST / image.std() if locked else rough)
        return total

    def select(self, rows: Sequence[int]) -> Self:
        """Return itself: there is one trial."""
        return self

    def _misfit(self, unknowns: Unknowns) -> Tensor:
        steps, image = self.network.steps, unknowns["image"].flatten(0, 1)
        wanted = {feature.place: feature.value.to(image) for feature in self.features}
        free = {feature.place for feature in self.features if feature.free}
        needed = {place for feature in self.features for place in self.network.below(feature.place)}
        values: dict[int, Tensor] = {}
        total = image.new_zeros(1)
        for place in sorted(needed):
            step = steps[place]
            inputs = [values[each] for each in step.inputs]
            if f"{LOCKED[0]} {place}" in unknowns:
                scale, shift = (unknowns[f"{name} {place}"][0] for name in LOCKED)
                values[place] = self.network.rescaled(place, inputs[0], scale, shift)
            else:
                values[place] = image if step.kind == "image" else self.network.forward(place, inputs)
            if place not in wanted:
                continue
            target, reached = wanted[place], values[place]
            if place in free:
                seen = torch.isfinite(target)
                target, reached = torch.where(seen, target, 0.0), torch.where(seen, reached, 0.0)
                total = total + 1 - (reached * target).sum().square() / (reached.square().sum() * target.square().sum())
                continue
            # in front of a ReLU there is a slope where the value is wrongly 0, and 0 only bounds what is in front
            if step.kind == "relu" and step.slope == 0:
                reached = torch.where(target > 0, inputs[0], reached)
            elif step.kind == "max-pool" and steps[step.inputs[0]].kind == "relu" and steps[step.inputs[0]].slope == 0:
                before = values[steps[step.inputs[0]].inputs[0]]
                reached = torch.where(target > 0, self.network.forward(place, [before]), reached)
            total = total + (reached - target).square().sum() / target.square().sum()
        return total


def roughest(features: Sequence[Feature]) -> float:
    """Return the weight of total variation for values with noise: without, the search would fit the noise."""
    least = min(each.deviation for each in features)
    return min(NOISY * least, MAX_SMOOTH) if least > CLEAN else 0.0


def invert(network: Network, features: Sequence[Feature], noise: Tensor, steps: int) -> tuple[Tensor, Tensor, int]:
    """Return the images [B, C, H, W] that give recovered values best, the misfit [1] and the number of evaluations.

    Args:
        network: of the floating type in which to search.
        features: the recovered values, of which there is at least one.
        noise: [B, C, H, W] standard normal, from which the search starts about grey.
        steps: of Adam in the first search, in which total variation is annealed; up to ``REFINEMENTS`` times as many of
            L-BFGS follow.
    """
    way = set().union(*(network.below(each.place) for each in features))
    start = {"image": 0.5 + SPREAD * noise[None]}
    for place in way & network.locked:
        for name, drawn in zip(LOCKED, network.coefficients(place)):
            start[f"{name} {place}"] = drawn.detach().mean().expand_as(drawn)[None].clone()
    last = roughest(features)
    match = Match(network, features, last=last)
    best, least, spent = start, torch.inf, 0
    pooled = any(network.steps[place].kind == "max-pool" for place in way)
    searches, enough = (POOLED_SEARCHES, POOLED_NEAR) if pooled else (SEARCHES, NEAR)
    for search in searches:
        count = search.times * steps
        near = descend(
            Match(network, features, search.smooth, count, last),
            start,
            steps=count,
            lr={name: search.size if name == "image" else LOCK_SIZE * search.size for name in start},
            milestones=range(1, count),
            decay=0.01 ** (1 / count),
        )
        spent += int(near.evaluations)
        with torch.no_grad():
            misfit = float(Match(network, features)(near.unknowns, 0))
        if misfit < least:
            best, least = near.unknowns, misfit
        if least < max(enough, sum(2 * each.deviation**2 for each in features)):
            break
    exact = lbfgs(
        match,
        best,
        steps=-(-REFINEMENTS * steps // 20),
        max_iter=20,
        history=HISTORY,
        tolerance_grad=0.0,
        tolerance_change=NO_CHANGE,
        line_search="strong-wolfe",
        stop_below=EXACT,
        stop_every=1,
    )
    with torch.no_grad():
        final = Match(network, features)(exact.unknowns, 0)
    return exact.unknowns["image"][0], final, spent + int(exact.evaluations)
