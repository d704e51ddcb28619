"""LB: its distance, its precision, and that it goes further than the attacks that it is to judge for."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, rand, randn, watch

import leakbench
from leakbench import attacks
from leakbench.attacks.ig import cosine_distance
from leakbench.attacks.lb import layer_normalised_distance
from leakbench.core.rng import Rng


def test_parameters_count_by_how_large_they_are_not_by_its_square() -> None:
    observed = {"small": 1e-2 * randn(3, 4, seed=1), "large": 10 * randn(3, 2, 5, seed=2)}
    zero = {name: torch.zeros_like(value) for name, value in observed.items()}
    torch.testing.assert_close(layer_normalised_distance(zero, observed), torch.ones(3))
    torch.testing.assert_close(layer_normalised_distance(observed, observed), torch.zeros(3))
    half = {"small": observed["small"] / 2, "large": observed["large"]}
    small, large = (observed[name].flatten(1).norm(dim=1) for name in ("small", "large"))
    torch.testing.assert_close(layer_normalised_distance(half, observed), 0.25 * small / (small + large))


def test_the_rounding_of_a_parameter_without_gradient_is_not_magnified() -> None:
    observed = {"dead": torch.full((2, 4), 1e-9), "live": torch.ones(2, 4)}
    gradient = {"dead": torch.zeros(2, 4), "live": torch.ones(2, 4)}
    assert float(layer_normalised_distance(gradient, observed).max()) < 1e-9
    nothing = {name: torch.zeros(2, 4) for name in observed}
    assert layer_normalised_distance(nothing, nothing).tolist() == [0, 0]


def test_it_searches_in_float64_and_returns_what_it_was_given() -> None:
    observation = watch("lenet", trials=2)
    found = leakbench.attack("lb(steps=20)", observation)
    assert found.images.dtype == torch.float32
    assert found.objective is not None
    assert found.objective.dtype == torch.float64
    assert observation.gradient["classifier.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ("", torch.float64),
        (", solver=signed-adam", torch.float64),
        (", matching=cosine", torch.float64),
        (", matching=cosine, solver=adam", torch.float32),
        (", matching=cosine, solver=signed-adam", torch.float32),
    ],
)
def test_only_a_first_order_solver_on_the_cosine_distance_is_in_float32(options: str, dtype: torch.dtype) -> None:
    found = leakbench.attack(f"lb(steps=2{options})", watch("lenet", trials=2))
    assert found.objective is not None
    assert found.objective.dtype == dtype


def test_the_cosine_distance_is_that_of_ig() -> None:
    observed, gradient = ({"a": randn(3, 4, seed=seed), "b": randn(3, 2, 5, seed=seed + 1)} for seed in (1, 3))
    cosine = attacks.parse("lb(matching=cosine)")
    torch.testing.assert_close(cosine.distance(gradient, observed), cosine_distance(gradient, observed))
    assert "matching" in cosine.settings()
    assert "matching" not in attacks.parse("lb").settings(), "the ids of earlier trials stay"


@pytest.mark.parametrize("line_search", ["none", "strong-wolfe"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_a_step_is_an_evaluation_whatever_the_line_search_takes(line_search: str, restarts: int) -> None:
    observation = watch("lenet", threat="known-label", trials=2)
    found = leakbench.attack(f"lb(steps=37, line_search={line_search}, restarts={restarts})", observation)
    both_ends = 2  # where start and end are compared
    assert found.evaluations is not None
    assert found.evaluations.tolist() == [restarts * (37 + both_ends)] * 2


def test_of_several_starts_the_one_that_matches_best_is_returned() -> None:
    observation = watch("lenet", threat="known-label", trials=3)
    one, two, three = (
        leakbench.attack(f"lb(steps=30, spread=1, restarts={restarts})", observation).objective
        for restarts in (1, 2, 3)
    )
    assert one is not None
    assert two is not None
    assert three is not None
    assert bool((two <= one).all())
    assert bool((three <= two).all())
    assert bool((three < one).any())


@pytest.mark.long
def test_it_ends_nearer_than_dlg_and_ig_for_the_same_evaluations() -> None:
    observation = watch("lenet", threat="known-label", trials=4)
    truth = torch.cat([rand(1, 1, 8, 8, seed=100 + t) for t in range(4)])

    def error(attack: str) -> float:
        images = leakbench.attack(attack, observation).images
        return float((images - truth).square().flatten(1).mean(1).median())

    strong = error("lb(steps=200, tv=0)")  # the images are noise
    assert strong < 0.1 * error("dlg(steps=10)")
    assert strong < 0.1 * error("ig(steps=200, tv=0)")


@pytest.mark.parametrize("defense", ["none", "precode(k=6)", "keylock(length=9)", "noise(scale=0.1, relative=true)"])
def test_labels_are_read_off_whatever_the_sign_of_the_features_and_through_noise(defense: str) -> None:
    observation = watch("lenet", defense, trials=8)
    found = attacks.parse("lb(steps=1)")(observation, Rng(tuple("abcdefgh")))
    assert found.labels is not None
    assert found.labels.tolist() == [(3 * t + 1) % CLASSES for t in range(8)]
