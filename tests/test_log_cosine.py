"""LogCosine: what it minimises, and the weight of the total variation that each trial gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import rand, watch

import leakbench
from leakbench.attacks.base import prepare
from leakbench.attacks.ig import IG
from leakbench.attacks.log_cosine import LogCosine
from leakbench.attacks.matching import total_variation
from leakbench.core.rng import Rng
from leakbench.observation import Observation

KEYS = Rng(("a", "b", "c"))


def seen() -> Observation:
    return watch("lenet-bn(mode=eval)", threat="known-label", trials=3)


def test_it_minimises_the_logarithm_of_the_distance_and_a_weighted_variation() -> None:
    observation = seen()
    images = rand(3, 1, 8, 8, seed=5)
    distance = IG(tv=0)._objective(observation, KEYS)({"image": images}, 0)
    objective = LogCosine(tv=0.5)._objective(observation, KEYS)
    expected = distance.log() + 0.5 * total_variation(images)
    torch.testing.assert_close(objective({"image": images}, 0), expected)
    weighted = replace(objective, prior_factor=torch.tensor([1.0, 2.0, 0.0]))
    expected = distance.log() + torch.tensor([0.5, 1.0, 0.0]) * total_variation(images)
    torch.testing.assert_close(weighted({"image": images}, 0), expected)
    some = weighted.select([2, 1])
    torch.testing.assert_close(some({"image": images[[2, 1]]}, 0), expected[[2, 1]])
    (
        torch.testing.assert_close(weighted.match({"image": images}, 0), distance),
        "weights are compared by the distance only",
    )


def test_the_objective_is_finite_at_the_private_image() -> None:
    observation = seen()
    truth = torch.cat([rand(1, 1, 8, 8, seed=100 + t) for t in range(3)])
    image = truth.requires_grad_()
    value = LogCosine()._objective(observation, KEYS)({"image": image}, 0)
    (slope,) = torch.autograd.grad(value.sum(), image)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(slope).all())


@pytest.mark.long
def test_each_trial_gets_the_weight_of_the_best_short_search() -> None:
    observation = seen()
    attack = LogCosine(steps=60, tv=0.5, ratio=4, pilot=0.5)
    found = attack(observation, KEYS)
    weights = [0.5, 0.125, 2.0]
    short = [LogCosine(steps=10, tv=weight, ratio=1)(observation, KEYS) for weight in weights]
    scores = [one.objective.log() + 0.5 * total_variation(one.images) for one in short if one.objective is not None]
    chosen = torch.tensor(weights)[torch.stack(scores).argmin(0)]
    torch.testing.assert_close(found.findings["tv"], chosen)
    for row, weight in enumerate(chosen.tolist()):
        alone = LogCosine(steps=30, tv=weight, ratio=1)(observation, KEYS)
        torch.testing.assert_close(found.images[row], alone.images[row], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("options", "searches"), [("", 4), (", ratio=1", 1), (", pilot=0", 1), (", tv=0", 1)])
def test_short_searches_are_part_of_the_steps(options: str, searches: int) -> None:
    found = leakbench.attack(
        f"log-cosine(steps=31, pilot=0.3{options})".replace("pilot=0.3, pilot=0", "pilot=0"), seen()
    )
    assert found.evaluations is not None
    assert found.evaluations.tolist() == [31 + 2 * searches] * 3, "both ends of every search are evaluated once more"
    assert ("tv" in found.findings) == (searches > 1)


def test_an_adaptive_attacker_minimises_the_logarithm_of_the_likelihood() -> None:
    observation = watch("lenet", "noise(scale=0.1, relative=true)", "labels=known, informed=true", trials=3)
    attack, known = prepare(LogCosine(steps=30, tv=0.5, ratio=3, pilot=0.4), observation)
    images = rand(3, 1, 8, 8, seed=5)
    objective = attack._objective(known, KEYS)
    variation = 0.5 * total_variation(images)
    expected = (IG(tv=0.5)._objective(known, KEYS)({"image": images}, 0) - variation).log() + variation
    torch.testing.assert_close(objective({"image": images}, 0), expected)
    torch.testing.assert_close(objective.match({"image": images}, 0), expected)
    found = attack(observation, KEYS)
    assert found.failed is not None
    assert not bool(found.failed.any())
    nearest = (found.findings["tv"][:, None] - torch.tensor([0.5 / 3, 0.5, 1.5])).abs().amin(1)
    assert float(nearest.max()) < 1e-6
