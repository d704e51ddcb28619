"""The closed form through ReLU networks: what it recovers exactly, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import plain, rand, same
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench import attacks, clients, datasets, defenses
from leakbench.attacks.peeling import descent, inversion, settle
from leakbench.attacks.peeling.averages import averaging, find_averaged
from leakbench.attacks.peeling.beginnings import beginnings, flat_heads, most_begun
from leakbench.attacks.peeling.contrast import classifier_input, with_contrast
from leakbench.attacks.peeling.correlation import Fitted, blocks, design, directions, least_squares
from leakbench.attacks.peeling.descent import Feature, inputs_alone, recover
from leakbench.attacks.peeling.gates import balanced, log_odds
from leakbench.attacks.peeling.inversion import Match, find_below
from leakbench.attacks.peeling.knowledge import Knowledge
from leakbench.attacks.peeling.lock import find_locks, with_levels
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.restore import restore
from leakbench.attacks.peeling.trace import trace
from leakbench.core.rng import seeded
from leakbench.errors import Unsupported
from leakbench.gradients.lanes.geometry import Geometry
from leakbench.models.module import OwnModule
from leakbench.observation import Observation
from leakbench.plan.matrix import parse_threat
from leakbench.victim import Client, observe

CLASSES = 5


class Block(nn.Module):
    """Two convolutions with batch normalisation, and a shortcut; it overwrites what it can."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, pad: bool = False, slope: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)
        self.extra = outputs - inputs if pad else 0
        self.stride = stride
        self.shortcut = nn.Sequential()
        if not pad and (stride > 1 or inputs != outputs):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        around = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra)) if self.extra else x
        out += self.shortcut(around)
        return self.relu(out)


def residual(*, pad: bool = False, slope: float = 0.0, width: int = 32) -> nn.Module:
    """Return a residual network for images of 8 x 8 pixels, in evaluation mode, with statistics of its own."""
    with seeded("residual"):
        stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        blocks = [Block(16, 20, 1, pad=pad, slope=slope), Block(20, width, 2, pad=pad, slope=slope)]
        model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.7), (module.bias, -0.3), (module.running_var, 0.5)):
                    nn.init.uniform_(tensor, low, low + 0.6)
    return model.double().eval()


def seen(
    model: nn.Module, count: int = 1, seed: int = 1, defense: str = "none"
) -> tuple[leakbench.Observation, Tensor]:
    """Return what a server sees of smooth random images, and these."""
    images = F.interpolate(rand(count, 3, 4, 4, seed=seed).double(), scale_factor=2, mode="bilinear")
    labels = torch.arange(count) % CLASSES
    return leakbench.observe(model, images, labels, salt="0" * 32, defense=defense), images


def truth(network: Network, image: Tensor) -> list[Tensor]:
    """Return the output of every step."""
    values: list[Tensor] = []
    for place, step in enumerate(network.steps):
        values.append(image if step.kind == "image" else network.forward(place, [values[each] for each in step.inputs]))
    return values


def sent(observation: leakbench.Observation) -> Mapping[str, Tensor]:
    return {name: value[0].double() for name, value in observation.gradient.items()}


def far(value: Tensor, exact: Tensor) -> float:
    return float((value - exact).detach().norm() / exact.detach().norm())


# the network as steps


@pytest.mark.parametrize("pad", [False, True])
def test_steps_compute_the_network(pad: bool) -> None:
    model = residual(pad=pad)
    observation, images = seen(model)
    network = Network(trace(observation))
    assert far(truth(network, images)[-1], model(images)) < 1e-14
    kinds = {step.kind for step in network.steps}
    assert kinds == {"image", "convolution", "scaling", "relu", "affine", "linear"}
    assert network.steps[-1].users == ()
    single = network.on(model.float())
    assert far(truth(single, images.float())[-1].double(), model.double()(images)) < 1e-5


class Rectified(nn.Module):
    """Two convolutions with an activation that is written in some way, below a linear layer that takes all values."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 10, 3, padding=1),
            nn.Linear(640, CLASSES),
        )
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.conv2(self.act(self.conv1(x)))).flatten(1))


def rectified(act: Any, gain: float = 1.0) -> tuple[Network, Mapping[str, Tensor], Tensor]:
    """Return a network with this activation, in double precision, what a server sees of it, and the image."""
    with seeded("rectified"):
        model = Rectified(act)
        nn.init.normal_(model.conv1.weight, std=gain * 0.3)
    observation, images = seen(model.double())
    return Network(trace(observation)), sent(observation), images


RECTIFIERS = {
    "relu_": torch.relu_,
    "clamp": lambda x: torch.clamp(x, min=0),
    "clamp by place": lambda x: torch.clamp(x, 0.0),
    "method": lambda x: x.clamp(min=0),
    "method in place": lambda x: x.clamp_(min=0),
    "clip": lambda x: x.clip(0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_": lambda x: torch.clamp_(x, min=0),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "Threshold": nn.Threshold(0, 0, inplace=True),
    "relu6": F.relu6,
    "relu6 in place": lambda x: F.relu6(x, inplace=True),
    "ReLU6": nn.ReLU6(inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, 0, 6),
    "two bounds": lambda x: x.clamp(0, 6),
}


@pytest.mark.parametrize("way", RECTIFIERS)
def test_a_relu_counts_as_one_however_it_is_written(way: str) -> None:
    network, gradient, images = rectified(RECTIFIERS[way])
    gates = [step for step in network.steps if step.kind == "relu"]
    capped = "6" in way or way in ("hardtanh", "two bounds")
    assert [gate.ceiling for gate in gates] == [6.0 if capped else math.inf] * 2
    found = recover(network, gradient, torch.Generator().manual_seed(0)).features
    exact = truth(network, images)
    assert [network.steps[each.place].kind for each in found] == ["relu", "relu"]
    assert max(far(each.value, exact[each.place]) for each in found) < 1e-10


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.clamp(max=6),
        lambda x: x.clamp(0.1),
        lambda x: F.threshold(x, 0, 0.5),
        nn.Threshold(0.1, 0),
        nn.Hardtanh(),
        lambda x: F.hardtanh(x),
        lambda x: torch.clamp(x, min=torch.zeros(())),
    ],
)
def test_what_is_no_relu_is_not_taken_for_one(act: Any) -> None:
    network, _, _ = rectified(act)
    assert "relu" not in {step.kind for step in network.steps}


def test_values_at_the_ceiling_of_a_relu_have_no_derivative_and_are_known() -> None:
    """Below a flattened head, whose input has its scale."""
    for ceiling in (0.3, 1.0):
        network, gradient, images = rectified(nn.Hardtanh(0, ceiling), gain=2)
        found = recover(network, gradient, torch.Generator().manual_seed(0)).features
        exact = truth(network, images)
        assert len(found) == 2
        for each in found:
            assert far(each.value, exact[each.place]) < 1e-9
            assert float((each.value == ceiling).double().mean()) == float(
                (exact[each.place] == ceiling).double().mean()
            )
        assert bool((found[-1].value == ceiling).any())
        match = Match(network, found)
        assert match.misfit({"image": images[None]}) < 1e-18


@pytest.mark.parametrize("train", [False, True])
def test_no_scale_is_read_from_an_input_that_reaches_the_ceiling(train: bool) -> None:
    """In front of a convolution that gives its own input up to a factor, and below statistics of the image."""

    def capped(ceiling: float) -> tuple[Network, Mapping[str, Tensor], Tensor]:
        model = residual()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ReLU):
                model.set_submodule(name, nn.Hardtanh(0, ceiling))
        observation, images = seen(model.train(train))
        return Network(trace(observation)), sent(observation), images

    network, gradient, images = capped(30.0)
    whole = recover(network, gradient, torch.Generator().manual_seed(0)).features
    assert len(whole) == 4
    begun = whole[0].place
    ceiling = 0.5 * float(truth(network, images)[begun].max())
    network, gradient, images = capped(ceiling)
    exact = truth(network, images)
    assert bool((exact[begun] == ceiling).any())
    found = recover(network, gradient, torch.Generator().manual_seed(0))
    assert all(far(each.value, exact[each.place]) < 1e-6 for each in inversion.chosen(found.features))
    known = Knowledge(network, gradient)
    known.values[begun] = Fitted(exact[begun], torch.zeros_like(exact[begun]))
    assert torch.equal(known.full(begun), exact[begun] == ceiling)


# the descent


NARROW = {"width": 18}
"""The topmost convolution has fewer independent channels than places, so that the descent begins at the head."""


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, 1e-9),
        ({"pad": True}, 1e-9),
        ({"slope": 0.2}, 1e-9),
        (NARROW, 1e-8),
        ({**NARROW, "pad": True}, 1e-8),
    ],
    ids=str,
)
def test_every_layer_below_the_beginning_is_exact(options: dict[str, Any], error: float) -> None:
    check_layers(residual(**options), error)


@pytest.mark.parametrize(
    ("options", "weak"),
    [({}, 1e-2), ({"pad": True}, 1e-2), pytest.param({"pad": True}, 0.2, marks=pytest.mark.long)],
    ids=str,
)
def test_statistics_of_the_image_itself_are_found_too(
    options: dict[str, bool], weak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if many directions count as weak, and follow from open ReLUs above."""
    monkeypatch.setattr(settle, "WEAK", weak)
    check_layers(residual(**options).train(), 1e-6)


@pytest.mark.parametrize("slope", [0.2, pytest.param(0.01, marks=pytest.mark.long)])
def test_statistics_of_the_image_itself_are_found_through_leaky_relus(slope: float) -> None:
    """Its values have no zeros that say what a convolution of stride 2 cannot see; the mean of its input does."""
    check_layers(residual(slope=slope).train(), 1e-6)


def test_a_constant_that_no_mean_gives_leaves_the_input_of_a_leaky_relu_open() -> None:
    """The mean of what goes around a block without a normalisation is not known."""
    observation, images = seen(residual(slope=0.2, pad=True).train())
    network = Network(trace(observation))
    found = recover(network, sent(observation), torch.Generator().manual_seed(0))
    exact = truth(network, images)
    assert [network.steps[each.place].name for each in found.features] == ["4.relu"]
    assert far(found.features[0].value, exact[found.features[0].place]) < 1e-12
    assert found.reason == "4.conv1: the equations leave 1 values of each channel of the input open"


@pytest.mark.parametrize("slope", [0.01, 0.3])
def test_the_mean_of_its_input_tells_a_constant_of_a_leaky_relus_output(slope: float) -> None:
    value = rand(2, 3, 4, 4, seed=1).double() - 0.4
    pattern = torch.zeros(2, 4, 4, dtype=torch.float64)
    pattern[:, ::2, ::2] = -0.5
    middle = value.mean((0, 2, 3))
    exact, factor = F.leaky_relu(value, slope), 3.0
    shifted = factor * exact + torch.where(pattern[:, None] != 0, torch.tensor([0.5, -2.0, 0.1])[:, None, None], 0.0)
    found = settle.centred(shifted, pattern, slope, factor, middle)
    assert far(found, factor * exact) < 1e-12
    rough = settle.centred(shifted, pattern, slope, math.nan, middle)
    assert far(rough, factor * exact) < far(shifted, factor * exact)


@pytest.mark.parametrize(("width", "error"), [(32, 1e-9), (20, 1e-9)])
def test_no_gradient_of_a_normalisation_is_needed_below_average_pooling(width: int, error: float) -> None:
    """With a width of 20, the inputs of the topmost convolution have fewer independent channels than places, too."""
    observation, _ = seen(residual(width=width), defense="local-norm")
    assert not any("bn" in name or name[:2] == "1." for name in observation.gradient)
    check_layers(residual(width=width), error, "local-norm")


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 with batch normalisation, and a shortcut."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel, step in ((inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1)):
            layers += [
                nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
        self.body, self.relu = nn.Sequential(*layers[:-1]), nn.ReLU()
        around = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*around if inputs != outputs or stride > 1 else [])

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def bottlenecks() -> nn.Module:
    with seeded("bottlenecks"):
        stem = [nn.Conv2d(3, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        blocks = [Bottleneck(16, 32, 64, 1), Bottleneck(64, 32, 64, 1)]
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)).double()


INSIDE = ["4.body.2", "3.relu", "3.body.5", "3.body.2", "2"]


def test_a_descent_that_begins_inside_a_block_knows_what_goes_around_it() -> None:
    """The forward pass gives the masks above, the linear layer the error there."""
    observation, images = seen(bottlenecks().eval())
    network = Network(trace(observation))
    found = recover(network, sent(observation), torch.Generator().manual_seed(0))
    exact = truth(network, images)
    assert [network.steps[each.place].name for each in found.features] == INSIDE
    assert max(far(each.value, exact[each.place]) for each in found.features) < 1e-8
    assert max(each.balance for each in found.features) < 1e-8
    assert not found.reason


def test_values_that_do_not_settle_are_not_kept() -> None:
    """Below a 1x1 convolution that is normalised by the image's own statistics, a constant cannot be seen."""
    observation, images = seen(bottlenecks().train())
    network = Network(trace(observation))
    found = recover(network, sent(observation), torch.Generator().manual_seed(0))
    exact = truth(network, images)
    assert len(found.features) > 0
    assert max(far(each.value, exact[each.place]) for each in found.features) < 1e-4
    assert "3.body.0: no scale" in found.reason


def test_a_value_with_the_error_of_rounding_counts_however_exact_others_are() -> None:
    missing = float("nan")
    given = [inversion.Feature(at, torch.ones(1), each, 0.0, missing, None) for at, each in enumerate((1e-5, 1e-8))]
    assert len(inversion.chosen(given)) == 2
    noisy = [replace(each, deviation=3e3 * each.deviation) for each in given]
    assert [each.place for each in inversion.chosen(noisy)] == [1]


def test_the_end_of_a_descent_is_stated_with_the_layer_that_hides_what_is_below() -> None:
    with seeded("end"):
        stem = [nn.Conv2d(3, 16, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()]
        top = [nn.MaxPool2d(2), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*stem, *top, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))
    observation, _ = seen(model.double())
    found = recover(Network(trace(observation)), sent(observation), torch.Generator().manual_seed(0))
    assert found.reason.startswith("4: the error below it does not follow")


def check_layers(model: nn.Module, error: float, defense: str = "none") -> None:
    """Check that the descent reaches all layers in their order, each within a relative error of the truth."""
    observation, images = seen(model, defense=defense)
    network = Network(trace(observation))
    found = recover(network, sent(observation), torch.Generator().manual_seed(0)).features
    exact = truth(network, images)
    assert [network.steps[each.place].name for each in found] == ["4.relu", "3.relu", "3.relu", "2"]
    assert max(far(each.value, exact[each.place]) for each in found) < error


@pytest.mark.parametrize("train", [False, True])
def test_the_output_of_a_pool_of_the_first_layers_is_exact(train: bool) -> None:
    with seeded("pool"):
        stem = [nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        model = nn.Sequential(*stem, Block(20, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES))
    observation, images = seen(model.double().train(train))
    network = Network(trace(observation))
    found = recover(network, sent(observation), torch.Generator().manual_seed(0)).features
    exact = truth(network, images)
    assert [network.steps[each.place].name for each in found] == ["4.relu", "3"]
    assert max(far(each.value, exact[each.place]) for each in found) < 1e-6
    assert found[-1].error is not None


# batches


@pytest.mark.parametrize(
    ("train", "error"), [pytest.param(False, 1e-9), pytest.param(True, 1e-6, marks=pytest.mark.long)]
)
def test_layers_of_every_image_of_a_batch_are_exact(train: bool, error: float) -> None:
    network, gradient, images = batch(train=train)
    found = recover(network, gradient, torch.Generator().manual_seed(0), 2).features
    exact = truth(network, images)
    assert len(found) == 4
    order = torch.cdist(found[0].value.flatten(1), exact[found[0].place].flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    assert max(far(each.value, exact[each.place][order]) for each in found) < error


def shrinking(width: int = 64) -> nn.Module:
    """Return a residual network in training mode, whose last block normalises one value of each image of 8 x 8."""
    with seeded("shrinking"):
        stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        blocks = [Block(16, 24, 2), Block(24, width, 2), Block(width, 48, 2)]
        model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, CLASSES))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.double().train()


def step_on(model: nn.Module, count: int, training: str = "", threat: str = "paper") -> tuple[Observation, Tensor]:
    """Return what a server sees of a client's step, or other training, on several images, and these."""
    images = F.interpolate(rand(count, 3, 4, 4, seed=1), scale_factor=2, mode="bilinear")
    others = tuple((image, place % CLASSES) for place, image in enumerate(images[1:], 1))
    client, trained = Client(images[0], 0, "w", "c", (), others), clients.parse(training or f"local(batch={count})")
    grey, own = torch.full((3, 8, 8), 0.5), OwnModule("own", model)
    known = parse_threat(threat)
    return observe(own, defenses.parse("none"), known, [client], CLASSES, grey, training=trained), images.double()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_batch_is_opened_below_a_normalisation_of_one_value_of_each_image(count: int) -> None:
    """The layer below such a normalisation cannot be one to begin at: the rank of its gradient is one too low."""
    observation, images = step_on(shrinking(), count)
    network = Network(trace(observation))
    assert {network.steps[place].name for place in beginnings(network, sent(observation), count)} == {"4.conv2"}
    gradient = sent(observation)["5.conv2.weight"][:, :, 1, 1]
    singular = torch.linalg.svdvals(gradient)
    assert float(singular[count - 2]) > 1e4 * float(singular[count - 1])
    found = recover(network, sent(observation), torch.Generator().manual_seed(0), count).features
    exact = truth(network, images)
    assert [network.steps[each.place].name for each in found][:2] == ["4.relu", "3.relu"]
    order = torch.cdist(found[0].value.flatten(1), exact[found[0].place].flatten(1)).argmin(1)
    assert sorted(order.tolist()) == list(range(count))
    assert max(far(each.value, exact[each.place][order]) for each in found) < 1e-6


def test_a_normalisation_of_one_value_takes_no_single_image_and_no_batch_too_large_for_the_layers_below() -> None:
    observation, _ = step_on(shrinking(), 2)
    for spec in ("peel", "disaggregate"):
        with pytest.raises(Unsupported, match="which it does not take: Expected more than 1 value per channel") as seen:
            attacks.parse(spec).preflight(replace(observation, count=1))
        assert "\n" not in str(seen.value)
    attacks.parse("peel").preflight(replace(observation, count=16))  # 64 channels of 4 places
    with pytest.raises(Unsupported, match="give a client at most 16"):
        attacks.parse("peel").preflight(replace(observation, count=17))


@pytest.mark.long
@pytest.mark.parametrize("spec", ["peel(search=60)", "disaggregate(search=60)"])
def test_every_image_below_a_normalisation_of_one_value_is_recovered(spec: str) -> None:
    """But for its brightness and contrast."""
    observation, images = step_on(shrinking(), 2)
    found = leakbench.attack(spec, observation)
    assert found.failed.tolist() == [False]
    order = torch.cdist(found.images[0].flatten(1).double(), images.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    assert min(fitted_psnr(*pair) for pair in zip(found.images[0].double(), images[order])) > 60


def fitted_psnr(image: Tensor, exact: Tensor) -> float:
    """Return the PSNR after brightness and contrast are fitted."""
    columns = torch.stack([image.flatten(), torch.ones_like(image).flatten()], 1)
    fit = torch.linalg.lstsq(columns, exact.flatten()[:, None]).solution
    return psnr((columns @ fit).view_as(exact), exact)


@pytest.mark.parametrize("known", ["known", "hidden"])
@pytest.mark.parametrize(("rate", "least"), [(1e-5, 50), (1e-4, 30), (1e-2, None)])
def test_a_few_steps_on_an_image_leak_it_as_long_as_they_change_the_network_little(
    rate: float, least: float | None, known: str
) -> None:
    """The mean gradient of five steps counts as that of one, with what they differ by as noise."""
    training, threat = f"local(local_steps=5, lr={rate})", f"shares=weights, rate={known}"
    observation, images = step_on(residual(width=64), 1, training, threat)
    found = leakbench.attack("peel(search=15)", observation)
    if least is None:
        assert "the descent fails at 4.conv2" in found.reasons[0]
    else:
        assert fitted_psnr(found.images.view_as(images).double(), images) > least


@pytest.mark.long
def test_every_image_of_a_batch_is_recovered() -> None:
    network, gradient, images = batch(train=False)
    noise = rand(2, 3, 8, 8, seed=5).double()
    found = restore(network, network, gradient, noise, torch.Generator().manual_seed(0), 60)
    assert found.reason == ""
    order = torch.cdist(found.images.flatten(1), images.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [0, 1]
    assert min(psnr(*pair) for pair in zip(found.images, images[order])) > 60


def batch(*, train: bool) -> tuple[Network, Mapping[str, Tensor], Tensor]:
    """Return a network, the gradient of the mean loss of two images, and these."""
    model = residual(width=48)
    observation, images = seen(model, 2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(rand(8, 3, 8, 8, seed=3).double())
    model.train(train)
    observation = leakbench.observe(model, images[:1], torch.tensor([3]))
    network = Network(trace(observation))
    loss = F.cross_entropy(model(images), torch.tensor([3, 1]))
    names, tensors = zip(*model.named_parameters())
    gradient = dict(zip(names, torch.autograd.grad(loss, tensors)))
    return network, gradient, images


# other beginnings


def test_a_flattened_head_gives_its_input_and_the_error_there() -> None:
    with seeded("flat"):
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(640, 32), nn.ReLU(), nn.Linear(32, CLASSES)).double()
    observation, images = seen(model)
    network = Network(trace(observation))
    found = recover(network, sent(observation), torch.Generator().manual_seed(0)).features
    assert [network.steps[each.place].name for each in found] == ["3", "1"]
    exact = truth(network, images)
    assert max(far(each.value, exact[each.place]) for each in found) < 1e-10


class Averaging(nn.Module):
    """Two convolutions below averages, and linear layers."""

    def __init__(self, pool: nn.Module, channels: int = 16, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, channels, 3, padding=1)
        self.norm1, self.norm2 = norm(16), norm(channels)
        self.pool, self.fc1 = pool, nn.LazyLinear(24)
        self.fc2 = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.norm1(self.conv1(x)).relu(), 2)
        x = self.pool(self.norm2(self.conv2(x)).relu())
        return self.fc2(self.fc1(x.flatten(1)).relu())


def averaged(pool: nn.Module, channels: int = 16, norm: type[nn.Module] = nn.Identity, *, train: bool = False) -> Any:
    """Return a network with average pooling, what a server sees of it in double precision, and the image."""
    with seeded("averages"):
        model = Averaging(pool, channels, norm)
        model(torch.zeros(2, 3, 8, 8))
    observation, images = seen(model.double().train(train))
    return Network(trace(observation)), sent(observation), images


@pytest.mark.parametrize(
    ("pool", "norm"),
    [
        (nn.AvgPool2d(2), nn.Identity),
        (nn.AvgPool2d(2), nn.BatchNorm2d),
        (nn.AdaptiveAvgPool2d(3), nn.Identity),
        (nn.AvgPool2d(3, 1), nn.Identity),
        (nn.AvgPool2d(3, 2, 1), nn.Identity),
    ],
    ids=str,
)
def test_masks_below_averages_follow_from_these_and_the_gradient_below(pool: nn.Module, norm: type[nn.Module]) -> None:
    """With windows that overlap, too. The descent ends at the averages above the image."""
    network, gradient, images = averaged(pool, norm=norm)
    ((_, at),) = flat_heads(network, gradient)
    assert network.steps[at].name == "pool"
    found = recover(network, gradient, torch.Generator().manual_seed(0)).features
    exact = truth(network, images)
    assert [network.steps[each.place].name for each in found] == ["pool", "avg_pool2d"]
    assert max(far(each.value, exact[each.place]) for each in found) < 1e-9
    assert found[-1].error is not None


def test_masks_below_averages_that_do_not_follow_are_not_taken() -> None:
    """In a convolution that is too narrow, and below a normalisation by the image's own statistics."""
    for channels, train, reason in ((2, False, "conv2: "), (16, True, "relu_1: the error below it does not follow")):
        norm = nn.BatchNorm2d if train else nn.Identity
        network, gradient, images = averaged(nn.AvgPool2d(2), channels, norm, train=train)
        found = recover(network, gradient, torch.Generator().manual_seed(0))
        exact = truth(network, images)
        assert [network.steps[each.place].name for each in found.features] == ["pool"]
        assert far(found.features[0].value, exact[found.features[0].place]) < 1e-12
        assert found.reason.startswith(reason)


def test_a_wrong_gradient_below_averages_gives_no_masks() -> None:
    network, gradient, _ = averaged(nn.AvgPool2d(2))
    wrong = gradient | {"conv2.weight": rand(*gradient["conv2.weight"].shape, seed=2).double()}
    found = recover(network, wrong, torch.Generator().manual_seed(0))
    assert len(found.features) == 1
    assert found.reason == "conv2: no masks that give the averages above and its gradient were found"


def test_averages_are_told_by_what_a_step_does() -> None:
    network, _, _ = averaged(nn.AdaptiveAvgPool2d(3))
    names = {step.name: place for place, step in enumerate(network.steps)}
    weights = averaging(network, names["pool"])
    assert weights is not None
    assert weights.shape == (9, 16)
    torch.testing.assert_close(weights.sum(1), torch.ones(9, dtype=torch.float64))
    assert averaging(network, names["conv2"]) is None
    assert averaging(network, names["relu"]) is None
    lowest = find_averaged(network, network.steps[names["pool"]].inputs[0])
    assert lowest is not None
    assert network.steps[lowest.source].name == "avg_pool2d"
    assert find_averaged(network, network.steps[names["avg_pool2d"]].inputs[0]) is None  # below is the image


def test_a_flattened_head_may_repeat_values() -> None:
    """As the adaptive pooling of torchvision's VGG does with small images."""
    with seeded("repeated"):
        layers = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 64, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(3)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 32), nn.ReLU(), nn.Linear(32, CLASSES)).double()
    observation, images = seen(model)
    network = Network(trace(observation))
    found = recover(network, sent(observation), torch.Generator().manual_seed(0)).features
    assert network.steps[found[0].place].name == "3"
    exact = truth(network, images)
    assert max(far(each.value, exact[each.place]) for each in found) < 1e-10


@pytest.mark.long
def test_an_image_below_averages_is_nearly_recovered() -> None:
    with seeded("averages"):
        layers = [
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.ReLU(),
        ]
        model = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 10))
    images, _ = datasets.parse("samples(size=16)").load(range(2))
    observation = leakbench.observe(model, images, torch.tensor([3, 3]), salt="0" * 32)
    found = leakbench.attack("peel(search=60)", observation)
    assert min(psnr(*pair) for pair in zip(found.images, images)) > 30


def test_inputs_behind_any_activation_and_normalisation_are_found_up_to_a_factor() -> None:
    with seeded("silu"):
        stem = [nn.Conv2d(3, 20, 3, 2, 1), nn.GroupNorm(4, 20), nn.SiLU(), nn.Conv2d(20, 8, 3, padding=1)]
        model = nn.Sequential(*stem, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)).double()
    observation, images = seen(model)
    network = Network(trace(observation))
    assert recover(network, sent(observation), torch.Generator().manual_seed(0)).features == ()
    (found,) = inputs_alone(network, sent(observation), torch.Generator().manual_seed(0))
    exact = truth(network, images)[found.place]
    assert network.steps[found.place].name == "2"
    assert found.free
    assert far(found.value * exact.norm() / found.value.norm(), exact) < 1e-8
    # without the smallest entries of the weight's gradient
    weight = sent(observation)["3.weight"]
    others = {name: value for name, value in sent(observation).items() if name != "3.weight"}
    assert inputs_alone(network, others, torch.Generator().manual_seed(0)) == []
    others["3.weight"] = torch.where(weight.abs() > weight.abs().flatten().kthvalue(40).values, weight, torch.nan)
    (found,) = inputs_alone(network, others, torch.Generator().manual_seed(0))
    seen_ = torch.isfinite(found.value)
    factor = (found.value[seen_] * exact[seen_]).sum() / found.value[seen_].square().sum()
    assert float(seen_.double().mean()) > 0.5
    assert far(factor * found.value[seen_], exact[seen_]) < 1e-3


def test_the_classifier_tells_the_contrast_of_an_image() -> None:
    model = residual()
    observation, images = seen(model)
    network, gradient = Network(trace(observation)), sent(observation)
    seen_ = classifier_input(network, gradient)
    assert seen_ is not None
    place, value = seen_
    assert far(value, truth(network, images)[place].flatten()) < 1e-12
    assert far(with_contrast(network, 0.4 * images, place, value), images) < 1e-3
    assert torch.equal(with_contrast(network, images, place, value), images)
    # from the entries that were sent
    some = dict(gradient)
    some["7.bias"] = torch.where(some["7.bias"].abs() == some["7.bias"].abs().max(), some["7.bias"], torch.nan)
    some["7.weight"] = torch.where(
        some["7.weight"].abs() > some["7.weight"].abs().median(), some["7.weight"], torch.nan
    )
    seen_ = classifier_input(network, some)
    assert seen_ is not None
    there = seen_[1].isfinite()
    assert 0 < int(there.sum()) < len(value)
    assert far(seen_[1][there], value[there]) < 1e-12
    assert far(with_contrast(network, 3 * images, *seen_), images) < 1e-3
    nothing = {name: torch.full_like(each, torch.nan) for name, each in gradient.items()}
    assert classifier_input(network, nothing) is None
    assert classifier_input(network, {"7.weight": gradient["7.weight"]}) is None


@pytest.mark.parametrize(
    ("norm", "act", "least"),
    [
        pytest.param("group", "relu", 50, marks=pytest.mark.long),
        ("group", "gelu", 50),
        pytest.param("batch", "sigmoid", 30, marks=pytest.mark.long),
    ],
)
def test_an_image_follows_from_inputs_that_are_known_up_to_a_factor(norm: str, act: str, least: float) -> None:
    """Its contrast is lost behind a normalisation by its own statistics."""
    acts = {"relu": nn.ReLU, "gelu": nn.GELU, "sigmoid": nn.Sigmoid}

    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        own = nn.GroupNorm(4, outputs) if norm == "group" else nn.BatchNorm2d(outputs)
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), own, acts[act]()]

    with seeded("free"):
        layers = [*layer(3, 24, 1), *layer(24, 32, 2), *layer(32, 32, 1)]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)).double()
    observation, images = seen(model)
    network = Network(trace(observation))
    assert [each.free for each in inputs_alone(network, sent(observation), torch.Generator().manual_seed(0))] == [True]
    found = leakbench.attack("peel(search=20)", observation)
    assert float(leakbench.metrics.parse("psnr_aligned")(found.images, images)[0]) > least


@pytest.mark.long
@pytest.mark.parametrize(("norm", "slope"), [("batch", 0.1), ("group", 0.1), ("group", 0.0)])
def test_photographs_follow_through_leaky_relus_and_group_normalisation(norm: str, slope: float) -> None:
    """In training mode, in single precision, 16 x 16 pixels; brightness and contrast are fitted."""
    with seeded("photographs"):
        stem = [nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.LeakyReLU(slope)]
        block = Block(24, 96, 2, slope=slope)
        model = nn.Sequential(*stem, block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES))
    if norm == "group":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, nn.GroupNorm(4, module.num_features))
    images, _ = datasets.parse("samples(size=16)").load(range(2))
    observation = leakbench.observe(model.train(), images, torch.tensor([1, 3]), salt="0" * 32)
    found = leakbench.attack("peel(search=60)", observation)
    assert found.failed.tolist() == [False, False]
    assert float(leakbench.metrics.parse("psnr_aligned")(found.images, images).min()) > 60


def test_the_misfit_of_values_up_to_a_factor_is_exact_and_relative_to_their_differences() -> None:
    observation, images = seen(residual())
    network = Network(trace(observation))
    place = next(at for at, step in enumerate(network.steps) if step.kind == "relu")
    value = truth(network, images)[place]
    missing = float("nan")
    for scale in (1.0, 7.0):
        free = inversion.Feature(place, scale * value, 0.0, missing, missing, None, free=True)
        for dtype, most in ((torch.float64, 1e-25), (torch.float32, 1e-12)):
            own = replace(free, value=free.value.to(dtype))
            match = inversion.Match(network.on(residual().to(dtype)), [own])
            assert 0 <= match.misfit({"image": images[None].to(dtype)}) < most
    shifted = inversion.varied(value + 100)
    assert float(shifted) == pytest.approx(float(inversion.varied(value)), rel=1e-9)
    one = torch.full((1, 3, 1, 1), 2.0)
    assert float(inversion.varied(one)) == 12
    gap = torch.cat([value, torch.full_like(value, torch.nan)], 1)
    assert float(inversion.varied(gap)) == pytest.approx(float(inversion.varied(value)), rel=1e-12)


# the attack


def psnr(images: Tensor, exact: Tensor) -> float:
    return float(-10 * (images.clamp(0, 1) - exact).square().mean().log10())


def test_the_image_of_a_residual_network_is_recovered() -> None:
    observation, images = seen(residual())
    found = leakbench.attack("peel(search=60)", observation)
    assert found.failed.tolist() == [False]
    assert found.labels is not None
    assert found.labels.tolist() == [0]
    assert psnr(found.images, images) > 60


def test_weight_gradients_below_a_recovered_value_hold_for_the_true_image() -> None:
    observation, images = seen(residual())
    network, gradient = Network(trace(observation)), sent(observation)
    found = recover(network, gradient, torch.Generator().manual_seed(0)).features
    below = find_below(network, found, gradient)
    assert below is not None
    around = [each for place in range(below.place + 1, len(network.steps)) for each in network.steps[place].inputs]
    assert min(around) >= below.place
    assert [network.steps[place].name for place in below.gradients] == ["0"]
    for image, holds in ((images, True), (rand(1, 3, 8, 8, seed=9).double(), False)):
        values = dict(enumerate(truth(network, image.requires_grad_())))
        assert (float(below.misfit(network, values).detach()) < 1e-10) == holds
    assert find_below(network, found, {}) is None


def searched_again(monkeypatch: pytest.MonkeyPatch, observation: Observation, bound: str, steps: int) -> list[Tensor]:
    """Return the images of a search that never counts as wrong, and of one that always does and is made again."""
    network, gradient = Network(trace(observation)), sent(observation)
    features = inversion.chosen(recover(network, gradient, torch.Generator().manual_seed(0)).features)
    found = []
    for most in (torch.inf, 0.0):
        monkeypatch.setattr(inversion, bound, most)
        found.append(inversion.invert(network, features, rand(1, 3, 8, 8, seed=3).double(), steps, gradient))
    (_, first, short), (_, second, long) = found
    assert float(second) <= float(first)
    assert long > short
    return [images for images, _, _ in found]


def test_an_image_that_ends_wrong_is_searched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    observation, _ = seen(residual())
    searched_again(monkeypatch, observation, "CLOSE", 2)


def test_values_above_recovered_ones_are_computed_from_these() -> None:
    observation, images = seen(residual())
    network, gradient = Network(trace(observation)), sent(observation)
    features = inversion.chosen(recover(network, gradient, torch.Generator().manual_seed(0)).features)
    needed = inversion.seen(network, features)
    assert [each.place for each in needed] == [features[-1].place]  # all of the image goes through the lowest one
    whole, lowest = (Match(network, each, exact=True) for each in (features, needed))
    for image in (images, rand(1, 3, 8, 8, seed=9).double()):
        assert whole.misfit({"image": image[None]}) == pytest.approx(lowest.misfit({"image": image[None]}), abs=1e-9)
    assert Match(network, features).misfit({"image": image[None]}) > 1.1 * lowest.misfit({"image": image[None]})


def test_a_search_below_statistics_of_the_image_that_ends_wrong_begins_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observation, _ = seen(residual().train())
    for images in searched_again(monkeypatch, observation, "LOST", 1):
        assert bool((images >= 0).all() & (images <= 1).all())


@pytest.mark.parametrize(
    ("pixels", "kept"),
    [([-0.5, 1.5], [0.0, 1.0]), ([0.9, 1.4], [0.5, 1.0]), ([-0.2, 0.5], [0.0, 0.7]), ([0.2, 0.7],) * 2],
)
def test_an_image_of_unknown_brightness_and_contrast_keeps_to_its_range(pixels: list[float], kept: list[float]) -> None:
    found = inversion.within(torch.tensor(pixels).view(1, 1, 1, 2))
    assert found.flatten().tolist() == pytest.approx(kept)


def test_a_neighbour_does_not_change_an_image() -> None:
    pair, alone = (leakbench.attack("peel(search=1)", seen(residual(), count)[0]) for count in (2, 1))
    assert torch.equal(alone.images[0], pair.images[0])
    assert not torch.equal(pair.images[1], pair.images[0])


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_observation_gives_the_same_image_and_stays_as_it_is(dtype: torch.dtype, train: bool) -> None:
    observation, _ = seen(residual().to(dtype).train(train))
    before = plain(observation)
    once, again = (leakbench.attack("peel(search=1)", observation) for _ in range(2))
    assert once.images.dtype == dtype
    assert torch.equal(once.images, again.images)
    assert torch.equal(once.objective, again.objective)
    assert same(plain(observation), before)


def test_a_batch_of_more_images_than_channels_have_places_for_is_refused() -> None:
    """The widest convolution has 32 channels of 16 places: for two images. A flat head serves one image only."""
    peel = attacks.parse("peel")
    linear = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES)).double()
    for model, most in ((residual(), 2), (linear, 0)):
        network = Network(trace(seen(model)[0]))
        assert most_begun(network, sent(seen(model)[0])) == most
        for count in (1, 2, 3):
            observation = replace(seen(model)[0], count=count)
            if count <= max(1, most):
                peel.preflight(observation)
                continue
            words = f"of each of {count} images: .* give a client at most 2" if most else "places"
            with pytest.raises(Unsupported, match=f"{words}$"):
                peel.preflight(observation)


def test_a_trial_whose_beginning_is_not_finite_fails_alone() -> None:
    observation, _ = seen(residual(), 2)
    gradient = {name: value.clone() for name, value in observation.gradient.items()}
    for damaged, failed in (((0, 0, 0), [False, False]), (0, [True, False])):  # a kernel can be completed, a layer not
        gradient["4.conv2.weight"][damaged] = torch.nan
        found = leakbench.attack("peel(search=1)", replace(observation, gradient=gradient))
        assert found.failed.tolist() == failed
    assert "4.conv2: the gradient of its weight was not sent, or is not finite" in found.reasons[0]


@pytest.mark.parametrize("damage", ["zero", "noise", "constant", "without head", "one layer zero"])
def test_a_damaged_gradient_is_a_failure_with_a_line(damage: str) -> None:
    observation, _ = seen(residual())
    changes = {
        "zero": lambda name, value: 0 * value,
        "noise": lambda name, value: rand(*value.shape, seed=len(name)).to(value),
        "constant": lambda name, value: torch.ones_like(value),
        "without head": lambda name, value: 0 * value if name.startswith("7") or "4.conv2" in name else value,
        "one layer zero": lambda name, value: 0 * value if name == "4.conv2.weight" else value,
    }
    gradient = {name: changes[damage](name, value) for name, value in observation.gradient.items()}
    found = leakbench.attack("peel(search=1)", replace(observation, gradient=gradient))
    assert found.failed.tolist() == [True]
    (reason,) = found.reasons
    assert re.match("nothing was recovered|the descent fails at", reason)
    assert "\n" not in reason


def test_shifts_that_are_not_finite_leave_no_size_behind_a_head_without_bias() -> None:
    observation, _ = seen(residual(**NARROW))
    gone = {name: torch.full_like(value, torch.nan) for name, value in sent(observation).items() if "bias" in name}
    found = recover(Network(trace(observation)), sent(observation) | gone, torch.Generator().manual_seed(0))
    assert not found.features
    assert found.reason.startswith("4.conv2: ")
    wide, _ = seen(residual())
    gone = {name: torch.full_like(value, torch.nan) for name, value in sent(wide).items() if "bias" in name}
    assert not recover(Network(trace(wide)), sent(wide) | gone, torch.Generator().manual_seed(0)).features


@pytest.mark.parametrize("names", [["7.weight"], ["7.bias"], ["7.weight", "7.bias"]], ids=str)
def test_a_head_whose_gradient_is_not_finite_counts_as_one_that_was_not_sent(names: list[str]) -> None:
    observation, _ = seen(residual(**NARROW))
    network, gradient = Network(trace(observation)), sent(observation)
    damaged = {name: torch.full_like(value, torch.nan) if name in names else value for name, value in gradient.items()}
    missing = {name: value for name, value in gradient.items() if name not in names}
    one, other = (recover(network, each, torch.Generator().manual_seed(0)) for each in (damaged, missing))
    assert [each.place for each in one.features] == [each.place for each in other.features]
    assert bool(one.features) == (names == ["7.weight"])
    assert len(names) == 1 or "7: the gradients of its weight and bias" in one.reason


class Branching(nn.Module):
    """A network whose forward depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x if x.sum() > 0 else -x)


def test_networks_that_cannot_be_served_are_refused_in_a_line() -> None:
    with pytest.raises(Unsupported, match="cannot follow Branching") as refused:
        leakbench.attack("peel", seen(Branching())[0])
    assert "\n" not in str(refused.value)
    with pytest.raises(Unsupported, match="as many channels as places"):
        leakbench.attack("peel", seen(residual(width=4))[0])
    observation, _ = seen(residual())
    kept = {name: value for name, value in observation.gradient.items() if "conv" not in name and name[0] != "7"}
    with pytest.raises(Unsupported, match=r"gradient of 4\.conv2\.weight sent"):
        leakbench.attack("peel", replace(observation, gradient=kept))


def plain_layers(*top: nn.Module, channels: int = 32) -> nn.Module:
    """Return two convolutions, of stride 1 and 2, below layers that end with as many channels, and average pooling."""
    with seeded("plain"):
        stem = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, 2, padding=1), nn.ReLU()]
        return nn.Sequential(*stem, *top, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)).double()


UNSUITED = {
    "dilated": nn.Conv2d(32, 32, 3, padding=2, dilation=2),
    "in one direction": nn.Conv2d(32, 32, (1, 3), padding=(0, 1)),
    "1x1": nn.Conv2d(32, 32, 1),
    "in groups": nn.Conv2d(32, 32, 3, padding=1, groups=2),
    "pads otherwise": nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("kind", UNSUITED)
def test_no_descent_begins_at_a_convolution_whose_shifts_leave_positions_mixed(kind: str) -> None:
    """Nor at a head above it. A convolution above it that leaves none is begun at."""
    with pytest.raises(Unsupported, match="with a kernel above 1x1 give its own input") as refused:
        leakbench.attack("peel", seen(plain_layers(UNSUITED[kind], nn.ReLU()))[0])
    assert "\n" not in str(refused.value)
    observation, _ = seen(plain_layers(UNSUITED[kind], nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()))
    network = Network(trace(observation))
    assert [network.steps[place].name for place in beginnings(network, sent(observation))] == ["6"]
    found = recover(network, sent(observation), torch.Generator().manual_seed(0))
    assert network.steps[found.features[0].place].name == "5"


def test_a_withheld_gradient_that_would_have_given_an_input_is_named() -> None:
    observation, _ = seen(plain_layers(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()))
    kept = {name: value for name, value in observation.gradient.items() if name != "4.weight"}
    with pytest.raises(Unsupported, match=r"gradient of 4\.weight sent, which would give that layer's input$"):
        leakbench.attack("peel", replace(observation, gradient=kept))


def test_images_behind_a_leaky_relu_are_said_to_have_no_zeros() -> None:
    observation, _ = seen(residual(slope=0.2))
    with pytest.raises(Unsupported, match="behind a ReLU, whose zeros tell images apart, give its own input"):
        attacks.parse("peel").preflight(replace(observation, count=2))


def test_the_error_of_a_deep_network_needs_no_deep_recursion() -> None:
    """DenseNet-121 has more steps between a layer and the head than Python's stack would take."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), *[nn.Identity() for _ in range(400)], nn.Flatten(), nn.Linear(144, CLASSES)
    )
    observation, _ = seen(model.double().eval())
    network = Network(trace(observation))
    knowledge = Knowledge(network, sent(observation))
    error = sent(observation)["402.bias"]
    knowledge.pin(len(network.steps) - 1, error[None])
    below = knowledge.error(1)
    assert below is not None
    assert far(below.sum((0, 2, 3)), sent(observation)["0.bias"]) < 1e-10


@pytest.mark.parametrize("wrong", [[3], [3, 5, 8, 9], [4, 9, 12]])
def test_a_wrong_sum_of_errors_corrects_the_mask_near_the_threshold(wrong: list[int]) -> None:
    """One place; all that are below another threshold; and some of those near it."""
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(40).expand(1, 6, 40) % 2 == 0
    deviation = torch.ones(1, 6, 40, 1, dtype=torch.float64)
    value = torch.where(true, 100.0, 0.3)[..., None].double()
    mask = true[..., None].clone()
    for rank, place in enumerate(wrong):
        value[0, 2, place] = 6 + rank
        mask[0, 2, place] = ~mask[0, 2, place]
    if wrong[0] == 4:  # an open place between those that are not: no threshold explains it
        value[0, 2, 6] = 6.5
    error = torch.randn(1, 6, 40, 1, generator=generator, dtype=torch.float64)
    sums = torch.where(true[..., None], error, 0.0).sum((0, 2, 3))
    sums = sums + 1e-7 * torch.randn(6, generator=generator, dtype=torch.float64)
    found = balanced(mask, Fitted(value, deviation), error, sums)
    assert torch.equal(found, true[..., None])
    unexplained = balanced(mask, Fitted(value, deviation), error, sums + torch.tensor([0.0, 0, 0.7, 0, 0, 0]))
    assert torch.equal(unexplained, mask)


def test_a_descent_behind_noise_begins_at_the_head_and_knows_how_large_the_noise_is() -> None:
    model = residual(width=64)
    observation, images = seen(model)
    network = Network(trace(observation))
    exact = truth(network, images)
    clean, generator = sent(observation), torch.Generator().manual_seed(3)
    spreads = {name: 0.01 * float(value.square().mean().sqrt()) for name, value in clean.items()}
    noisy = {
        name: value + spreads[name] * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in clean.items()
    }
    found = recover(network, noisy, torch.Generator().manual_seed(0), spreads=spreads).features
    top = found[0]
    assert network.reader(top.place) == "4.conv2"
    assert far(top.value, exact[top.place]) < 0.02
    assert top.balance < 0.01  # that of the noise is 0.01, and wrong masks add to it
    nothing = {name: value - clean[name] for name, value in noisy.items()}
    assert not any(descent.usable(each) for each in recover(network, nothing, generator, spreads=spreads).features)


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_what_is_used_behind_rounding_is_near_the_truth(bits: int) -> None:
    """Rounding is no independent noise, so that two halves of a gradient may agree on what is wrong."""
    model, used = residual(width=64), 0
    for seed in range(2):
        observation, images = seen(model, seed=seed, defense=f"quantise(bits={bits})")
        network, gradient = Network(trace(observation)), sent(observation)
        exact = truth(network, images)
        found = recover(network, gradient, torch.Generator().manual_seed(0)).features
        for each in inversion.chosen(found) or inversion.chosen(inputs_alone(network, gradient, torch.Generator())):
            value, real = each.value.flatten(), exact[each.place].flatten()
            factor = (value @ real) / (value @ value) if each.free else 1.0
            assert far(factor * value, real) < 0.25
            used += 1
    assert used or bits < 12


def test_a_problem_that_falls_apart_is_solved_in_its_parts() -> None:
    """At stride 2 a tap reads every other position only: the same solution as of the whole problem."""
    geometry = Geometry(stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1, image=(6, 6), kernel=(3, 3))
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(2, 24, 3, 3, generator=generator, dtype=torch.float64)
    matrix = design(error, geometry)
    parts = blocks(matrix)
    assert sorted((len(rows), len(columns)) for rows, columns in parts) == [(24, 18), (48, 18), (48, 18), (96, 18)]
    right = torch.randn(len(matrix), 3, generator=generator, dtype=torch.float64)
    exact = torch.linalg.lstsq(matrix, right).solution
    found, whole = least_squares(matrix, right), directions(matrix, right)
    assert found is not None
    for each in (found, whole.solution(72)):
        assert far(each.value, exact) < 1e-12
    spread = torch.linalg.inv(matrix.T @ matrix).diagonal()[:, None]
    noise = (right - matrix @ exact).square().sum(0) / (len(matrix) - 72)
    assert far(found.deviation, (spread * noise).sqrt()) < 1e-10
    assert far(whole.solution(72).deviation, found.deviation) < 1e-10
    assert far(whole.size, torch.linalg.svdvals(matrix)) < 1e-12
    assert far(whole.basis @ whole.basis.T, torch.eye(72)) < 1e-12


def test_what_no_equation_reads_is_left_open() -> None:
    """By a convolution that skips positions; and by one whose middle tap has too few equations."""
    generator = torch.Generator().manual_seed(0)
    for kernel, outputs, open_ in (((1, 1), 24, 27), ((3, 3), 5, 4)):
        around = (kernel[0] // 2, kernel[1] // 2)
        geometry = Geometry(stride=(2, 2), padding=around, dilation=(1, 1), groups=1, image=(6, 6), kernel=kernel)
        matrix = design(torch.randn(1, outputs, 3, 3, generator=generator, dtype=torch.float64), geometry)
        exact = torch.randn(36, 2, generator=generator, dtype=torch.float64)
        whole = directions(matrix, matrix @ exact)
        rank = int((whole.size > 0).sum())
        found, null = whole.solution(rank), whole.basis[rank:]
        assert len(null) == open_
        assert float((matrix @ null.T).abs().max()) < 1e-10
        assert float((null @ found.value).abs().max()) < 1e-10
        assert far(matrix @ found.value, matrix @ exact) < 1e-10
        assert least_squares(matrix, matrix @ exact) is None


def test_equations_that_cannot_be_solved_are_refused_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    observation, _ = seen(residual())
    network = Network(trace(observation))
    monkeypatch.setattr("leakbench.attacks.peeling.values.free_memory", lambda _: 3e5)
    found = recover(network, sent(observation), torch.Generator().manual_seed(0))
    assert re.fullmatch(r"[\w.]+( and [\w.]+)?: \d+ equations of \d+ values take .* GiB are free", found.reason)


def test_missing_right_hand_sides_are_left_out_or_taken_for_small() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    exact = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    exact[:, 2] *= 1e-3  # a column of which nothing large enough was sent
    right = matrix @ exact
    sent = torch.where(right.abs() > 0.3, right, torch.nan)
    found = least_squares(matrix, sent)
    assert found is not None
    assert far(found.value[:, :2], exact[:, :2]) < 1e-12
    assert float((found.value[:, 2] - exact[:, 2]).norm()) < float(found.deviation[:, 2].norm())
    assert least_squares(matrix, torch.full_like(right, torch.nan)) is None


def test_a_descent_by_the_entries_that_were_sent() -> None:
    """Every tensor without the smallest third of its entries."""
    observation, images = seen(residual(width=128))
    network = Network(trace(observation))
    exact = truth(network, images)
    pruned = {
        name: torch.where(value.abs() < value.abs().quantile(1 / 3), torch.nan, value)
        for name, value in sent(observation).items()
    }
    found = recover(network, pruned, torch.Generator().manual_seed(0)).features
    assert len(found) > 1
    for feature in found[:2]:
        assert far(feature.value, exact[feature.place]) < 0.05


def test_the_odds_of_a_mask_by_a_noisy_value() -> None:
    """Against the two densities, by numerical integration over the half-normal outputs of an open ReLU."""
    value = torch.linspace(-0.5, 1.5, 41, dtype=torch.float64).view(1, 1, 1, -1)
    deviation = torch.full_like(value, 0.2)
    scale = (2 * value.clamp(min=0).square().mean()).sqrt()
    outputs = torch.linspace(0, 12, 200_001, dtype=torch.float64) * scale
    half_normal = 2 * torch.exp(-0.5 * (outputs / scale).square()) / scale
    for at in (0, 10, 20, 40):
        x = value[..., at]
        density = torch.exp(-0.5 * ((x - outputs) / 0.2).square()) / (2 * math.pi * 0.2)
        closed = torch.exp(-0.5 * (x / 0.2).square()) / (math.sqrt(2 * math.pi) * 0.2)
        opened = torch.trapezoid(density * half_normal, outputs)
        expected = float((opened / closed).log())
        assert float(log_odds(Fitted(value, deviation))[..., at]) == pytest.approx(expected, abs=1e-6)


def test_levels_of_a_lock_are_found_before_the_image() -> None:
    observation, images = seen(residual(), defense="keylock(gate=relu)")
    network = Network(trace(observation), [secret.name for secret in observation.secrets])
    locks = find_locks(network, network.locked, images)
    ((place, lock),) = locks.items()
    (source,) = network.steps[place].inputs
    scale, level = rand(1, 16, seed=3).double(), (rand(1, 16, seed=4).double() - 0.5).clamp(min=0)
    unknowns = {lock.name("scale"): scale, lock.name("level"): level}
    out = lock.output(network, network.output(source, images), unknowns)
    torch.testing.assert_close(out.mean((0, 2, 3)), level[0])  # the level is the mean at these images
    normalised = network.rescaled(place, network.output(source, images), torch.ones(16), torch.zeros(16))
    torch.testing.assert_close(out.std((0, 2, 3)), scale[0] * normalised.std((0, 2, 3)))

    top = next(at for at, step in enumerate(network.steps) if step.kind == "relu" and at > place + 4)
    values = {place: level[0, :, None, None].expand(1, 16, 8, 8)}
    for at in sorted(network.below(top) - network.below(place)):
        values[at] = network.forward(at, [values[each] for each in network.steps[at].inputs])
    feature = Feature(top, values[top], 0.0, math.nan, math.nan, None)
    start = {"image": images[None], **lock.start(network)}
    found, _ = with_levels(Match(network, [feature], locks=locks).distance, start, locks, None)
    assert bool((start[lock.name("level")] > 0).all())
    torch.testing.assert_close(found[lock.name("level")], level, rtol=0, atol=1e-3)


@pytest.mark.long
def test_scale_and_shift_of_a_key_lock_are_searched_for_with_the_image() -> None:
    model = residual()
    images = F.interpolate(rand(1, 3, 4, 4, seed=1).double(), scale_factor=2, mode="bilinear")
    observation = leakbench.observe(model, images, torch.tensor([0]), defense="keylock(gate=sigmoid)", salt="0" * 32)
    found = leakbench.attack("peel(search=60)", observation)
    guess, true = (each.flatten() - each.mean() for each in (found.images, images))
    assert float(torch.nn.functional.cosine_similarity(guess, true, 0)) > 0.9
