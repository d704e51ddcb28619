"""The closed form of a linear layer that takes the pixels, wherever they come from and whatever stands above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from conftest import clients
from torch import Tensor, nn

import leakbench
from leakbench import Unsupported
from leakbench.attacks.analytic import pixel_layers, widths
from leakbench.attacks.known_draws import read_draws
from leakbench.audit import AuditedNetwork
from leakbench.gradients.linear import layer_direction, layer_input, unexplained
from leakbench.models import OwnModule
from leakbench.observation import Observation
from leakbench.plan.matrix import parse_threat
from leakbench.victim import observe

SHAPE = (3, 6, 5)
SIZE = 90
IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3))


class Turned(nn.Module):
    """Pixels in another order, two branches above them, and a residual connection."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIZE, 8, bias=bias), nn.Linear(SIZE, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        pixels = (2 * x - 1).flip(3).permute(0, 2, 3, 1).flatten(1)
        own = torch.relu(self.one(pixels))
        return self.last(own + torch.tanh(self.two(pixels)))


class Bare(nn.Module):
    """A layer without a bias, on dropped-out pixels behind a branch on the data."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.drop, self.first, self.last = nn.Dropout(drop), nn.Linear(SIZE, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.drop(x.flatten(1)))) if x.sum() > -1e9 else x)


def see(network: nn.Module, threat: str = "paper") -> Observation:
    torch.manual_seed(0)
    return observe(
        network if isinstance(network, OwnModule) else OwnModule("own", network),
        leakbench.defenses.parse("none"),
        parse_threat(threat),
        clients(3, shape=SHAPE),
        4,
        torch.full(SHAPE, 0.5),
    )


def truth() -> Tensor:
    return torch.stack([client.image for client in clients(3, shape=SHAPE)])


def made(kind: str) -> nn.Module | OwnModule:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 8), nn.ReLU(), nn.Linear(8, 4))
    kinds: Mapping[str, nn.Module | OwnModule] = {
        "plain": plain,
        "turned": Turned(),
        "normalised": AuditedNetwork("own", plain, normalise="0.5,0.4,0.3/0.2,0.25,0.3").model(3),
        "in evaluation mode": nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(SIZE, 4)).eval(),
    }
    return kinds[kind]


@pytest.mark.parametrize("threat", ["paper", "weights", "weights, rate=known, local_steps=1"])
@pytest.mark.parametrize("kind", ["plain", "turned", "normalised", "in evaluation mode"])
def test_the_pixels_are_read_off_exactly(kind: str, threat: str) -> None:
    seen = see(made(kind), "shares=weights, rate=known" if threat.endswith("1") else threat)
    found = leakbench.attack("analytic", seen)
    assert torch.allclose(found.images, truth(), atol=2e-3 if threat != "paper" else 1e-4)
    assert found.failed is not None
    assert not bool(found.failed.any())
    assert found.objective is not None
    assert float(found.objective.max()) < 1e-3


def test_without_a_bias_the_pixels_are_known_but_for_a_factor() -> None:
    found = leakbench.attack("analytic", see(Bare()))
    ratio = truth().flatten(1) / found.images.flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    assert torch.allclose(found.images.flatten(1).amax(1), torch.ones(3), atol=1e-5)
    signed = leakbench.attack("analytic", see(Turned(bias=False))).images  # of pixels in [-1, 1], of either sign
    for own, real in zip(signed, truth()):
        both = torch.stack([own.flatten(), real.flatten()])
        assert float(torch.corrcoef(both)[0, 1].abs()) > 0.999
        assert 0 <= float(own.min()) <= float(own.max()) <= 1


def test_dropped_pixels_are_filled_in_and_the_others_are_seen() -> None:
    seen = see(Bare(drop=0.3))
    found = leakbench.attack("analytic", seen)
    kept = read_draws(seen).masks[0].view_as(found.images) == 1
    assert bool((found.images != 0).all())
    assert 0.5 < float(kept.float().mean()) < 0.9
    for own, real, there in zip(found.images, truth(), kept):
        ratio = real[there] / own[there]
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)


def test_what_takes_no_pixels_is_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(SIZE, 4))
    with pytest.raises(Unsupported, match="needs a linear layer that takes every pixel"):
        leakbench.attack("analytic", see(conv))
    seen = see(made("plain"))
    kept = {name: value for name, value in seen.gradient.items() if not name.startswith("1.")}
    with pytest.raises(Unsupported, match="was not sent"):
        leakbench.attack("analytic", replace(seen, gradient=kept))
    assert widths(seen) == {"1": SIZE, "3": 8}
    assert list(pixel_layers(seen)) == ["1"]
    assert list(pixel_layers(see(Turned()))) == ["one", "two"]


def test_the_direction_of_a_layer_is_its_input() -> None:
    x, d = IMAGES.flatten(1).double(), torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).double()
    weight = d[:, :, None] * x[:, None]
    found = layer_direction(weight)
    assert torch.allclose((found * x).sum(1).abs(), x.norm(dim=1))
    assert torch.allclose(layer_input(weight, d), x)
    assert unexplained(weight, d, x).tolist() == [0, 0, 0]
    mixed = weight + weight.roll(1, 0) * torch.linspace(-1, 1, 7).double()[:, None]
    by_bias = torch.einsum("tcs,ts->tc", mixed, layer_direction(mixed))
    best = torch.linalg.svdvals(mixed)
    left = (best[:, 1:].square().sum(1) / best.square().sum(1)).sqrt()
    assert torch.allclose(unexplained(mixed, by_bias, layer_direction(mixed)), left, rtol=1e-3)
