"""Which inputs of convolutions an audit states as exposed, and how its pages show them."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_audit import DATA, audit
from test_cli import cli, place  # noqa: F401
from test_descent import residual, seen, shrinking
from torch import nn

import leakbench
from leakbench.audit.exposure import LayerExposure, exposures, has_relus, predicted, rule_in_words

SIZE = 8


class Network(nn.Module):
    """A stem, a convolution whose input is exposed, one with too few channels, and a strided one that would be."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.exposed = nn.Conv2d(24, 24, 3, 1, 1)
        self.norm = nn.BatchNorm2d(24)
        self.strided = nn.Conv2d(24, 6, 3, 2, 1)
        self.head = nn.Linear(6 * 4, 5)
        self.twice = nn.Conv2d(24, 24, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.exposed(self.stem(x).relu())).relu()
        return self.head(self.strided(self.twice(self.twice(x).relu())).flatten(1))


def network() -> Network:
    torch.manual_seed(3)
    return Network()


def inputs(model: Network, images: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Return the true inputs of every convolution, flattened, one for each image."""
    taken: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            own = taken.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, given, own=own: own.append(given[0].detach().flatten()))
    for image in images:
        model(image[None])
    return {name: [torch.cat(values[k :: len(images)]) for k in range(len(images))] for name, values in taken.items()}


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def found(images: torch.Tensor, defense: str = "none", truth: bool = True) -> dict[str, LayerExposure]:
    observation = leakbench.observe(network(), images, torch.tensor([1, 2]), defense=defense)
    return {one.layer: one for one in exposures(observation, inputs(network(), images) if truth else None)}


def test_inputs_that_follow_from_one_weight_gradient_are_stated(images: torch.Tensor) -> None:
    layers = found(images)
    assert list(layers) == ["stem", "exposed", "strided"]  # a layer that runs twice sums two gradients
    own = layers["exposed"]
    assert (own.images, own.exposed, own.reason, own.inputs) == (2, 2, "", (24, 4, 4))
    assert own.error < 1e-4
    assert own.features is not None
    picture = np.asarray(Image.open(io.BytesIO(own.features))).astype(int)
    assert picture.shape == (2 * 6, 16 * 6)  # the recovered channels above, the true ones below
    assert abs(picture[:6] - picture[6:]).max() <= 1
    assert picture[1:5].std() > 10
    assert "3 channels are fewer than 1 x 64 positions" in layers["stem"].reason
    assert not layers["strided"].exposed
    assert "stride" in layers["strided"].reason


def test_without_a_truth_the_gradient_itself_says_whether_an_input_follows(images: torch.Tensor) -> None:
    layers = found(images, truth=False)
    assert layers["exposed"].everywhere
    assert math.isnan(layers["exposed"].error)
    assert not layers["strided"].exposed


def test_strong_noise_and_a_withheld_gradient_expose_nothing(images: torch.Tensor) -> None:
    assert not any(one.exposed for one in found(images, "noise(scale=1, relative=true)").values())
    observation = leakbench.observe(network(), images, torch.tensor([1, 2]))
    kept = {name: value for name, value in observation.gradient.items() if name != "exposed.weight"}
    object.__setattr__(observation, "gradient", kept)
    assert "exposed" not in {one.layer for one in exposures(observation, None)}


def test_a_wrong_answer_is_not_stated_as_exposed(images: torch.Tensor) -> None:
    observation = leakbench.observe(network(), images, torch.tensor([1, 2]))
    wrong = {name: [value.roll(1) for value in values] for name, values in inputs(network(), images).items()}
    (own,) = [one for one in exposures(observation, wrong) if one.layer == "exposed"]
    assert own.exposed == 0
    assert "from the true input" in own.reason


def test_inputs_of_other_layers_follow_from_an_exposed_one() -> None:
    model = residual()
    observation, truth = seen(model, 2)
    found = exposures(observation, {name: values for name, values in inputs(model, truth).items() if "." in name})
    counts = {one.layer: (one.exposed, one.derived) for one in found}
    assert counts["4.conv2"] == (2, 0)
    assert counts["0"] == (0, 0)
    assert [counts[layer] for layer in ("3.conv1", "3.conv2", "4.conv1", "4.shortcut.0")] == [(0, 2)] * 4
    assert max(one.error for one in found if one.known) < 1e-8
    assert predicted(model, (3, 8, 8))["4.conv2"].verdict == "exposed"


def test_a_layer_below_a_normalisation_of_one_value_of_each_image_is_hidden() -> None:
    """Its errors add up to zero over the images, in training mode only."""
    for train in (True, False):
        expected = predicted(shrinking().train(train), (3, 8, 8), 4)
        assert expected["4.conv2"].verdict == "exposed"
        for layer in ("5.conv1", "5.conv2"):
            assert expected[layer].verdict == ("hidden" if train else "exposed")
            assert ("add up to zero" in expected[layer].reason) == train
        words = rule_in_words(expected, (3, 8, 8), 4)
        assert words.endswith("none right below a normalisation of one value of each image") == train


def test_a_layer_whose_weight_is_frozen_or_made_of_other_tensors_is_hidden() -> None:
    assert predicted(network(), (3, 8, 8))["exposed"].verdict == "exposed"
    frozen, normed = network(), network()
    frozen.exposed.weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(normed.exposed)
    for model in (frozen, normed):
        found = predicted(model, (3, 8, 8))["exposed"]
        assert found.verdict == "hidden"
        assert "is not computed" in found.reason


class Joined(nn.Module):
    """A layer of a DenseNet: what it computes is joined to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())], 1)


def test_every_layer_whose_input_is_joined_to_others_is_begun_at() -> None:
    """No error goes from one of them to the next, whose masks are not known: each gives the input of the 1x1 below."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), Joined(16, 8), Joined(24, 8), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).double().eval()
    observation, truth = seen(model, 1)
    counts = {one.layer: (one.exposed, one.derived) for one in exposures(observation, inputs(model, truth))}
    assert counts["1.conv2"] == counts["2.conv2"] == (1, 0)
    assert counts["1.conv1"] == counts["2.conv1"] == (0, 1)
    assert [one.derived for one in exposures(observation, None)] == [derived for _, derived in counts.values()]


def test_a_pointwise_convolution_leaks_its_positions_in_unknown_order(images: torch.Tensor) -> None:
    torch.manual_seed(1)
    below = [nn.Conv2d(3, 32, 4, 4), nn.BatchNorm2d(32), nn.ReLU()]
    model = nn.Sequential(*below, nn.Conv2d(32, 16, 1), nn.Flatten(), nn.Linear(64, 5))
    observation = leakbench.observe(model, images, torch.tensor([1, 2]))
    truth = inputs(model, images)
    (own,) = [one for one in exposures(observation, truth) if one.layer == "3"]
    assert (own.positions, own.read, own.exposed, own.unordered) == (4, 4, 0, True)
    assert own.error < 1e-5
    (blind,) = [one for one in exposures(observation, None) if one.layer == "3"]
    assert (blind.positions, math.isnan(blind.error)) == (4, True)
    wrong = {"0": truth["0"], "3": [torch.rand(128), torch.rand(128)]}
    (other,) = [one for one in exposures(observation, wrong) if one.layer == "3"]
    assert (other.positions, other.unordered) == (0, False)


def test_the_rule_says_which_layers_are_exposed_at_this_size() -> None:
    expected = predicted(Network(), (3, SIZE, SIZE))
    assert {name: one.verdict for name, one in expected.items()} == {
        "stem": "hidden",
        "exposed": "exposed",
        "strided": "hidden",
    }
    assert rule_in_words(expected, (3, SIZE, SIZE)).startswith(
        "1 of 3 convolutions (exposed), for 1 image of 3 x 8 x 8 in a step. The rule: a kernel above 1x1, stride 1"
    )
    assert "0 of 3 convolutions, for 2 images" in rule_in_words(predicted(Network(), (3, 8, 8), 2), (3, 8, 8), 2)
    assert has_relus(Network(), (3, SIZE, SIZE))
    assert not has_relus(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid(), nn.Dropout(), nn.Linear(2, 2)), (3,))
    assert rule_in_words(predicted(nn.Linear(3, 2), (3,)), (3,)) == "the network has no convolution that runs once"


def test_both_pages_of_an_audit_state_the_exposed_inputs(cli, place) -> None:  # noqa: F811
    (place / "nets.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 24, 3, 3, 1), nn.ReLU(), nn.Conv2d(24, 8, 3, 1, 1), nn.ReLU(),"
        " nn.Flatten(), nn.Linear(128, 70))\n"
    )
    ended = audit(cli, "build", *DATA, "--images", "1")
    assert ended.code == 0
    assert "exposed by size: 1 of 2 convolutions (2), for 1 image" in ended.out
    (out,) = (file.parent for file in place.rglob("audit.md"))
    text, page = ((out / name).read_text() for name in ("audit.md", "audit.html"))
    for one in (text, page):
        assert "The input of 1 of 2 convolutions follows from the gradient of its weight by itself" in one
    assert "| 2 | 3 x 3 | 24 x 4 x 4 | exposed | by itself |" in " ".join(text.split())
    assert page.count('<li class="exposed">') == page.count('<figure class="features">') == 1
