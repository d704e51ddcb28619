"""LB: its distance, its precision, and that it goes further than the attacks that it is to judge for."""

from __future__ import annotations

import torch
from conftest import rand, randn, watch

import leakbench
from leakbench import attacks
from leakbench.attacks.lb import layer_normalised_distance


def test_every_parameter_counts_alike_whatever_its_size() -> None:
    observed = {"small": 1e-2 * randn(3, 4, seed=1), "large": 10 * randn(3, 2, 5, seed=2)}
    zero = {name: torch.zeros_like(value) for name, value in observed.items()}
    torch.testing.assert_close(layer_normalised_distance(zero, observed), torch.ones(3))
    half = {"small": observed["small"] / 2, "large": observed["large"]}
    torch.testing.assert_close(layer_normalised_distance(half, observed), torch.full((3,), 0.125))
    torch.testing.assert_close(layer_normalised_distance(observed, observed), torch.zeros(3))


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


def test_it_ends_nearer_than_dlg_for_the_same_evaluations() -> None:
    observation = watch("lenet", threat="known-label", trials=4)
    strong = leakbench.attack("lb(steps=40)", observation)
    plain = leakbench.attack("dlg(steps=40)", observation)
    attack = attacks.parse("lb(steps=1)")
    truth = torch.cat([rand(1, 1, 8, 8, seed=100 + t) for t in range(4)])

    def error(images: torch.Tensor) -> torch.Tensor:
        return (images - truth).square().flatten(1).mean(1)

    assert float(error(strong.images).median()) < 0.1 * float(error(plain.images).median().clamp(min=1e-3))
    assert attack.name == "lb"
