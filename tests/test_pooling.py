"""The search below a max-pool: what is known of the maxima holds for the true image, and leads to it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import rand
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench.attacks.peeling import inversion
from leakbench.attacks.peeling.descent import Feature
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.pooling import Pooled, PooledMatch, Stem, find_stem, misfit_of_gradient, pooled, sample
from leakbench.attacks.peeling.trace import trace
from leakbench.core.rng import seeded

POOL = 4


def network(*, slope: float = 0.0) -> nn.Module:
    """Return a convolution of stride 2, a normalisation, a ReLU, a max-pool and a linear layer, for 16 x 16 pixels."""
    with seeded("pool"):
        relu = nn.LeakyReLU(slope) if slope else nn.ReLU()
        stem = [nn.Conv2d(3, 24, 5, 2, 2), nn.BatchNorm2d(24), relu, nn.MaxPool2d(3, 2, 1)]
        model = nn.Sequential(*stem, nn.Flatten(), nn.Linear(24 * 16, 5)).double()
        nn.init.uniform_(model[1].weight, 0.5, 1.5)
        nn.init.uniform_(model[1].running_var, 0.05, 0.2)
    return model.eval()


def known(images: Tensor, *, train: bool = False, scaled: bool = False) -> tuple[Stem, Pooled, Tensor]:
    """Return the stem, what is known of its windows, and the true routings [K, O, Q]; with an input normalisation."""
    model, pool = network().train(train), POOL
    if scaled:
        norm = nn.BatchNorm2d(3).double()
        nn.init.constant_(norm.running_mean, 0.4)
        nn.init.constant_(norm.running_var, 0.06)
        model, pool = nn.Sequential(norm.eval(), *model), POOL + 1
    loss = F.cross_entropy(model(images), torch.arange(len(images)))
    names, tensors = zip(*model.named_parameters())
    gradient = dict(zip(names, torch.autograd.grad(loss, tensors)))
    value = model[:pool](images).detach().requires_grad_()
    (error,) = torch.autograd.grad(F.cross_entropy(model[pool:](value), torch.arange(len(images))), value)
    steps = Network(trace(leakbench.observe(model, images[:1], torch.tensor([0]), salt="0" * 32)))
    stem = find_stem(steps, pool)
    assert stem is not None
    found = pooled(stem, value.detach(), error, gradient)
    with torch.no_grad():
        z = found.gather(stem.forward(images)).masked_fill(found.places[:, None] == found.bound.shape[1], -math.inf)
    return stem, found, F.one_hot(z.argmax(0), len(z)).permute(2, 0, 1) * found.active.double()


@pytest.mark.parametrize(
    ("count", "train", "scaled"), [(1, False, False), (1, False, True), (2, False, False), (2, True, False)]
)
def test_bounds_candidates_and_the_weight_gradient_hold_for_the_true_images(
    count: int, train: bool, scaled: bool
) -> None:
    images = rand(count, 3, 16, 16, seed=2).double()
    stem, found, routing = known(images, train=train, scaled=scaled)
    with torch.no_grad():
        assert float((stem.forward(images) - found.bound).max()) < 1e-12
        assert bool(found.candidate[routing > 0].all())
        # overlapping windows with the same maximum, and bounds, leave few positions of nine
        assert float(found.candidate.sum(0)[found.active].double().mean()) < 4
        assert float(misfit_of_gradient(stem, found, images, routing)) < 1e-24
        assert float(PooledMatch(stem, found, routing=routing, weight=1.0)({"image": images[None]}, 0)) < 1e-24
        sampled = sample(stem, found, images, 1e-4, torch.Generator().manual_seed(0))
        assert float((sampled - routing).abs().max()) < 1e-3
        # another image contradicts them
        other = rand(count, 3, 16, 16, seed=3).double()
        assert float((stem.forward(other) - found.bound).max()) > 0.1
        assert float(misfit_of_gradient(stem, found, other, routing)) > 0.01


def test_other_first_layers_are_left_to_the_search_by_layer_inputs() -> None:
    observation = leakbench.observe(network(slope=0.1), rand(1, 3, 16, 16).double(), torch.tensor([0]), salt="0" * 32)
    steps = Network(trace(observation))
    assert steps.steps[POOL].kind == "max-pool"
    assert find_stem(steps, POOL) is None


def inner(image: Tensor, *, train: bool = False) -> tuple[Network, Feature]:
    """Return a network with a max-pool that two convolutions are below, and its output for an image as recovered."""
    with seeded("inner"):
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1)]
        model = nn.Sequential(*layers, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 5)).double()
    model.train(train)
    steps = Network(trace(leakbench.observe(model, image, torch.tensor([0]), salt="0" * 32)))
    place = next(at for at, step in enumerate(steps.steps) if step.kind == "max-pool")
    return steps, Feature(place, steps.output(place, image).detach(), 1e-9, math.nan, math.nan, None)


def test_below_a_max_pool_the_image_is_found_from_smooth_ones() -> None:
    image = F.interpolate(rand(1, 3, 4, 4, seed=2), (8, 8), mode="bicubic").clamp(0, 1).double()
    steps, feature = inner(image)
    noise = rand(1, 3, 8, 8, seed=3).double()
    found, misfit, spent = inversion.invert(steps, [feature], noise, 80)
    assert float(misfit) < 1e-9
    assert float((found - image).abs().max()) < 1e-3
    assert spent < 500  # with Adam before L-BFGS, as below statistics of the image, about 650


def test_a_second_search_is_made_only_if_smooth_images_do_not_come_near(monkeypatch: pytest.MonkeyPatch) -> None:
    image = rand(1, 3, 8, 8, seed=2).double()
    monkeypatch.setattr(inversion, "MAX_PIECES", 0)
    monkeypatch.setattr(inversion, "CLOSE", math.inf)
    spent = {}
    for train in (False, True):
        steps, feature = inner(image, train=train)
        for near in (math.inf, 0.0):
            monkeypatch.setattr(inversion, "POOLED_NEAR", near)
            found, misfit, count = inversion.invert(steps, [feature], rand(1, 3, 8, 8, seed=3).double(), 1)
            spent[train, near] = count
            assert float(misfit) == pytest.approx(float(inversion.Match(steps, [feature])({"image": found[None]}, 0)))
    times = inversion.POOLED_SEARCHES[1].times
    assert spent[False, 0.0] - spent[False, math.inf] == times
    # below statistics of the image, smooth images do not lead near, and are not tried
    assert spent[True, 0.0] == times
    assert spent[False, math.inf] > times


def test_values_that_rounding_makes_positive_bound_what_is_in_front_of_a_relu_only() -> None:
    image = rand(1, 3, 8, 8, seed=2).double()
    steps, exact = inner(image)
    rounding = exact.deviation * float(exact.value.square().mean().sqrt())
    zeros = exact.value == 0
    assert int(zeros.sum()) > 10
    rounded = replace(exact, value=torch.where(zeros, 2 * rounding, exact.value))
    used = replace(rounded, value=inversion.certain(rounded))
    assert torch.equal(used.value, exact.value)
    for feature, least, most in ((rounded, 1e-4, math.inf), (used, 0.0, 1e-20)):
        assert least <= inversion.Match(steps, [feature]).misfit({"image": image[None]}) < most
    for other in (replace(rounded, deviation=1e-3), replace(rounded, free=True)):
        assert inversion.certain(other) is other.value
