"""Crafted weights: what a malicious server makes of a network, and what a client sees of it without any image."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_cli import cli, place  # noqa: F401
from torch import Tensor, nn

from leakbench import datasets, models
from leakbench.audit.received import layer_score, read_received, scores
from leakbench.errors import BadOption, MissingAsset
from leakbench.models import crafted
from leakbench.models.crafted import Fronted, Imprint, Trap, expected_alone, handed_out
from leakbench.report.received import lines

SHAPE = (3, 8, 8)


def public(count: int = 300) -> Tensor:
    """Return images of different brightness."""
    rng = torch.Generator().manual_seed(5)
    return (torch.rand(count, *SHAPE, generator=rng) * 0.5 + 0.5 * torch.rand(count, 1, 1, 1, generator=rng)).float()


def mlp(rows: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, rows), nn.ReLU(), nn.Linear(rows, 5))


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5))


def gradient(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    loss = nn.functional.cross_entropy(network(images), labels)
    return dict(zip(dict(network.named_parameters()), torch.autograd.grad(loss, list(network.parameters()))))


@pytest.mark.parametrize(("make", "front"), [(mlp, False), (convolutional, True)])
@pytest.mark.parametrize("functional", ["mean", "random"])
def test_the_rows_of_an_imprint_differ_by_single_images(make, front: bool, functional: str) -> None:
    """Differences of neighbouring rows' gradients, divided by those of the biases, are the images."""
    network = make()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made = Imprint(64, functional).craft(network, public())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert isinstance(made, Fronted) == front
    images, labels = public(310)[300:], torch.arange(10) % 5
    made = made.double()
    name = "block.measure" if front else "1"
    sent = gradient(made, images.double(), labels)
    weight, bias = (torch.cat([sent[f"{name}.{part}"], 0 * sent[f"{name}.{part}"][:1]]) for part in ("weight", "bias"))
    rows, sizes = weight[:-1] - weight[1:], bias[:-1] - bias[1:]
    live = sizes.abs() > 1e-9 * sizes.abs().max()
    found = (rows[live] / sizes[live, None]).view(-1, *SHAPE)
    layer = made.get_submodule(name)
    values = images.double().flatten(1) @ layer.weight[0].detach()
    bins = torch.searchsorted(-layer.bias.detach(), values)
    alone = [one for one in range(10) if int((bins == bins[one]).sum()) == 1]
    assert len(alone) >= 6
    for one in alone:
        assert float((found - images[one]).square().mean((1, 2, 3)).min()) < 1e-12


def test_an_imprint_undoes_the_normalisation_before_its_layer() -> None:
    norm = nn.BatchNorm2d(3, affine=False).eval()
    norm.running_mean.copy_(torch.tensor([0.5, 0.4, 0.3]))
    norm.running_var.copy_(torch.tensor([0.04, 0.05, 0.06]))
    made = Imprint(32).craft(nn.Sequential(norm, *mlp()), public())
    layer = made[2]
    measured = (norm(public()).flatten(1) @ layer.weight.T + layer.bias).detach()
    shares = (measured[:, :32] > 0).double().mean(0)
    torch.testing.assert_close(shares, 1 - torch.arange(32) / 32.0, atol=0.01, rtol=0, check_dtype=False)


def test_trap_rows_are_half_negative_and_rarely_active() -> None:
    made = Trap(scale=0.9, rows=200).craft(convolutional(), public())
    layer = made.block.measure
    assert torch.equal((layer.weight < 0).sum(1), torch.full((200,), 96))
    ratio = layer.weight.clamp(min=0).sum(1) / layer.weight.clamp(max=0).sum(1)
    torch.testing.assert_close(ratio, torch.full((200,), -0.9))
    active = (layer(public().flatten(1)) > 0).double().mean()
    assert 0 < float(active) < 0.45


def test_an_honest_server_hands_out_the_network() -> None:
    network = mlp()
    assert handed_out(network, "honest", public()) is network
    with pytest.raises(BadOption, match="unknown server 'imprnt'; did you mean 'imprint'"):
        crafted.parse("imprnt")
    assert expected_alone(128, 64) == pytest.approx(0.6101, abs=1e-3)


HONEST = [
    "mlp(hidden=256-128, init=default)",
    "lenet(init=default)",
    "resnet20(width=16)",
    "convnet(width=16)",
]


@pytest.mark.parametrize("spec", HONEST)
def test_an_untrained_network_is_not_taken_for_crafted(spec: str) -> None:
    torch.manual_seed(3)
    layers, _ = scores(models.parse(spec).build((3, 32, 32), 10).state_dict())
    assert all(one.score < 0.8 and not one.reasons for one in layers)


SERVERS = ["imprint(bins=64)", "imprint(bins=64, functional=random)", "trap", "trap(scale=0.9)"]


@pytest.mark.parametrize("server", SERVERS)
def test_crafted_layers_are_found_and_named(server: str, tmp_path) -> None:
    for make, name in ((mlp, "1.weight"), (convolutional, "block.measure.weight")):
        save_file(handed_out(make(), server, public()).state_dict(), tmp_path / "weights.safetensors")
        found = read_received(str(tmp_path / "weights.safetensors"))
        assert name in [one.name for one in found.crafted]
        assert ("imprint" if server.startswith("imprint") else "trap weights") in " ".join(lines(found))
        assert lines(found)[0].startswith("CRAFTED: ")


def test_each_score_sees_its_sign_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    plain = torch.randn(64, 50, generator=rng).double()
    copies = plain.clone()
    copies[10:20] = torch.linspace(-2, 3, 10).double()[:, None] * plain[:1]
    assert layer_score("", copies).copies == pytest.approx(11 / 64)
    uneven, even = torch.randn(64, generator=rng).double(), torch.linspace(-1, 1, 64).double() ** 3
    assert layer_score("", plain, even).evenness > 6
    assert layer_score("", plain, uneven).evenness < 3
    coarse = (torch.linspace(-1, 1, 512) ** 3).bfloat16().double()
    assert layer_score("", plain.repeat(8, 1), coarse).evenness == 0, "the grid of half precision is no sign"
    zeros = plain.clone()
    zeros[:8] = 0
    assert layer_score("", zeros).dead == 1 / 8
    balanced = plain.abs() * (1 - 2 * (torch.arange(50) % 2))
    assert layer_score("", balanced).balance > 5
    for one in (layer_score("", plain, uneven), layer_score("", zeros)):
        assert one.score < 0.8


def test_a_file_that_cannot_be_judged_is_refused(tmp_path) -> None:
    with pytest.raises(MissingAsset, match=r"--received 'no\.pt' does not exist"):
        read_received("no.pt")
    save_file({"weight": torch.zeros(3, 4)}, tmp_path / "small.safetensors")
    with pytest.raises(BadOption, match="has no weight matrix of at least 16 rows"):
        read_received(str(tmp_path / "small.safetensors"))


def test_the_command_says_what_it_found(cli, tmp_path) -> None:  # noqa: F811
    torch.save(mlp().state_dict(), tmp_path / "honest.pt")
    torch.save({"state_dict": handed_out(mlp(), "trap", public()).state_dict()}, tmp_path / "trap.pt")
    honest = cli("audit", "--received", str(tmp_path / "honest.pt"), "--layers")
    assert honest.code == 0
    assert honest.out.startswith("No sign of crafting in 1 weight matrix of ")
    assert "no proof of honesty" in honest.out
    assert "1.weight | 64 x 192 | 0% |" in honest.out
    found = cli("audit", "received", "--received", str(tmp_path / "trap.pt"))
    assert found.code == 1
    assert "do not train on these weights" in found.out
    assert "False alarms: " in found.out


def test_quantiles_come_from_public_images_of_a_dataset() -> None:
    images = datasets.parse("samples(size=8)").public()
    made = Imprint(16).craft(convolutional(), images)
    active = (made.block.measure(images.flatten(1)) > 0).sum(1)
    assert int(active.min()) >= 1
    assert int(active.max()) == 16
