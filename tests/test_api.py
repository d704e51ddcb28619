"""One's own network in a few calls."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import plain, rand, same
from torch import Tensor, nn

import leakbench
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import BadOption, LeakbenchError, Unsupported

SHAPE = (1, 8, 8)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(96, 5))


def images(trials: int = 3) -> tuple[Tensor, Tensor]:
    return rand(trials, *SHAPE, seed=4), torch.arange(trials) + 1


def test_observe_is_one_step_of_each_client() -> None:
    net = network()
    x, y = images()
    observation = leakbench.observe(net, x, y)
    assert observation.image_shape == SHAPE
    assert observation.num_classes == 5
    assert observation.labels is None
    for t in range(3):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[t : t + 1]), y[t : t + 1]).backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(observation.gradient[name][t], parameter.grad)
            assert torch.equal(observation.weights[name][t], parameter)


def test_observe_leaves_network_images_and_generator_alone() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5))
    x, y = images()
    before, state = plain([net, x, y]), torch.get_rng_state()
    observation = leakbench.observe(net, x, y, defense="noise")
    assert same(plain([net, x, y]), before)
    assert torch.equal(torch.get_rng_state(), state)
    again = leakbench.observe(net, x, y, defense="noise")
    assert all(torch.equal(observation.gradient[name], again.gradient[name]) for name in again.gradient)
    other = leakbench.observe(net, x, y, defense="noise", seed=1)
    assert not torch.equal(other.gradient["4.bias"], again.gradient["4.bias"])


class Diverges(leakbench.Attack):
    """Return white for the first image, and what is not finite for the others."""

    def run(self, observation: leakbench.Observation, rng: Rng) -> leakbench.Reconstruction:
        found = torch.ones(observation.trials, *observation.image_shape)
        found[1:, 0, 0, 0] = torch.nan
        return leakbench.Reconstruction(found)


def test_a_trial_that_diverges_is_the_grey_image_and_counts_as_failed() -> None:
    x, y = images()
    found = leakbench.attack(Diverges(), leakbench.observe(network(), x, y))
    assert found.failed is not None
    assert found.failed.tolist() == [False] + [True] * (len(x) - 1)
    assert bool((found.images[0] == 1).all())
    assert bool((found.images[1:] == 0.5).all())


def test_a_network_in_float64_is_observed_and_attacked_in_float64() -> None:
    x, y = images()
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5)).double()
    observation = leakbench.observe(net, x, y)
    assert observation.dtype == torch.float64
    found = leakbench.attack("analytic", observation).images
    torch.testing.assert_close(found, x.double(), rtol=0, atol=1e-12)


def test_observe_takes_components_threats_and_a_mean_image() -> None:
    net, (x, y) = network(), images()
    mean = torch.full(SHAPE, 0.25)
    observation = leakbench.observe(
        net,
        x,
        y,
        defense=leakbench.defenses.parse("keylock(length=5)"),
        threat="labels=known, reveals=key, informed=true",
        mean_image=mean,
        num_classes=5,
    )
    assert observation.labels is not None
    assert observation.labels.tolist() == y.tolist()
    assert torch.equal(observation.mean_image, mean)
    assert observation.weights["0.1.key"].shape == (3, 5)
    assert observation.defense is not None
    assert torch.equal(leakbench.observe(net, x, y).mean_image, torch.full(SHAPE, 0.5))


def test_a_frozen_parameter_is_not_sent() -> None:
    net, (x, y) = network(), images()
    net[0].weight.requires_grad_(False)
    observation = leakbench.observe(net, x, y)
    assert "0.weight" not in observation.gradient
    assert torch.equal(observation.weights["0.weight"][0], net[0].weight)
    assert leakbench.attack("ig(steps=2)", observation).images.shape == (3, *SHAPE)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(3, 8, 8), torch.tensor([0, 1, 2]), "give \\[T, C, H, W\\]"),
        (torch.rand(3, 1, 8, 8), torch.tensor([0, 1]), "give \\[T, C, H, W\\]"),
        (torch.rand(1, 1, 8, 8), torch.tensor([[0]]), "give \\[T, C, H, W\\]"),
        (torch.rand(1, 1, 8, 8) + 1, torch.tensor([0]), "give them in \\[0, 1\\]"),
        (torch.rand(1, 1, 8, 8) - 1, torch.tensor([0]), "give them in \\[0, 1\\]"),
        (torch.full((1, 1, 8, 8), torch.nan), torch.tensor([0]), "give them in \\[0, 1\\]"),
    ],
)
def test_what_does_not_fit_is_told(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        leakbench.observe(network(), x, y)


def test_networks_that_do_not_fit_are_told() -> None:
    x, y = images()
    with pytest.raises(Unsupported, match="takes no image"):
        leakbench.observe(nn.Sequential(nn.Flatten(), nn.Linear(3, 5)), x, y)
    with pytest.raises(Unsupported, match="logits"):
        leakbench.observe(nn.Conv2d(1, 2, 3), x, y)
    with pytest.raises(Unsupported, match="one output a class"):
        leakbench.observe(network(), x, y, num_classes=7)
    with pytest.raises(Unsupported, match="2-d convolution"):
        leakbench.observe(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), x, y, defense="keylock")
    with pytest.raises(Unsupported, match="acts on the gradient of each example"):
        leakbench.observe(network(), x, y, defense="dp", threat="weights")
    with pytest.raises(LeakbenchError, match="did you mean"):
        leakbench.observe(network(), x, y, defense="nosie")


class OnlyPairs(nn.Linear):
    """A network that trains on two images or more, and predicts any number of them."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:
            raise RuntimeError("trains on\npairs")
        return super().forward(x.flatten(1))


class Detached(nn.Linear):
    """A network whose logits have no derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)).detach()


def untrainable(kind: str, channels: int, classes: int) -> nn.Module:
    """A network that cannot take a step on one image of 8 x 8 pixels."""
    size = 64 * channels
    if kind in ("pairs", "detached"):
        return {"pairs": OnlyPairs, "detached": Detached}[kind](size, classes)
    if kind == "flat":
        return nn.Sequential(nn.Flatten(), nn.Linear(size, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))
    norm = nn.BatchNorm2d(4) if kind == "batch" else nn.InstanceNorm2d(4, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(channels, 4, 8), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4, classes))


UNTRAINABLE = {
    "batch": "normalises by the statistics of a step's images.* give larger images",
    "flat": "normalises by the statistics .*size.*1, 4.*give larger images, more images a step, or evaluation mode",
    "instance": "more than 1 spatial element.* give larger images",
    "pairs": "without any defense, either: RuntimeError: trains on pairs; check the network",
    "detached": "without any defense, either: RuntimeError: .*does not require grad",
}


@pytest.mark.parametrize("defense", ["none", "noise"])
@pytest.mark.parametrize("kind", UNTRAINABLE)
def test_a_network_that_cannot_take_the_step_is_told(kind: str, defense: str) -> None:
    net = untrainable(kind, 1, 5)
    with pytest.raises(LeakbenchError, match=UNTRAINABLE[kind]) as error:
        leakbench.observe(net, *images(1), defense=defense)
    assert "\n" not in str(error.value)
    assert f"model '{type(net).__name__}' " in str(error.value)


@pytest.mark.parametrize("kind", ["batch", "pairs"])
def test_a_matrix_says_why_a_network_cannot_take_the_step(kind: str, tmp_path: Path) -> None:
    plan = leakbench.Matrix(
        name="untrainable",
        datasets=["samples(size=8)"],
        models=[untrainable(kind, 3, 7)],
        attacks=["ig(steps=1)"],
        defenses=["none"],
        images=1,
    )
    if kind == "pairs":
        reasons = leakbench.run(plan, tmp_path).results()["reason"]
        assert all(re.search(UNTRAINABLE[kind], reason) for reason in reasons)
    else:  # no image is served
        with pytest.raises(Unsupported, match=UNTRAINABLE[kind]):
            leakbench.run(plan, tmp_path)


def test_attack_recovers_and_is_repeatable() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 5))
    x, y = rand(2, *SHAPE, seed=4), torch.tensor([3, 1])
    observation = leakbench.observe(net, x, y)
    assert observation.gradient["1.weight"].dtype == torch.float32
    found = leakbench.attack("ig(steps=200)", observation)
    assert found.labels is not None
    assert found.labels.tolist() == y.tolist()
    assert float((found.images - x).square().flatten(1).mean(1).max()) < 1e-2
    assert torch.equal(
        leakbench.attack("ig(steps=3)", observation).images, leakbench.attack("ig(steps=3)", observation).images
    )
    assert not torch.equal(
        leakbench.attack("ig(steps=3)", observation, seed=1).images, leakbench.attack("ig(steps=3)", observation).images
    )


def test_a_written_attack_and_defense_are_served() -> None:
    @dataclass(frozen=True)
    class Half(leakbench.Attack):
        """Returns half of the mean image."""

        def run(self, observation: leakbench.Observation, rng: Rng) -> leakbench.Reconstruction:
            return leakbench.Reconstruction(0.5 * observation.mean_image.expand(observation.trials, -1, -1, -1))

    @dataclass(frozen=True)
    class Twice(leakbench.Defense):
        """Sends twice the gradient."""

        def release(self, step: leakbench.Step, rng: torch.Generator) -> leakbench.Gradient:
            return {name: 2 * value for name, value in step.gradient().items()}

    x, y = images()
    one, two = (leakbench.observe(network(), x, y, defense=defense) for defense in ("none", Twice()))
    assert all(torch.equal(two.gradient[name], 2 * one.gradient[name]) for name in one.gradient)
    assert torch.equal(leakbench.attack(Half(), two).images, torch.full((3, *SHAPE), 0.25))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"nothing": torch.zeros(1)}, "not a parameter"),
        ({"0.bias": torch.zeros(7)}, "of shape"),
        ({}, "withheld every parameter"),
    ],
)
def test_a_defense_that_misbehaves_is_told(sent: dict[str, Tensor], message: str) -> None:
    @dataclass(frozen=True)
    class Wrong(leakbench.Defense):
        """Sends something else."""

        def release(self, step: leakbench.Step, rng: torch.Generator) -> leakbench.Gradient:
            return sent

    with pytest.raises(BadOption, match=message):
        leakbench.observe(network(), *images(), defense=Wrong())


def test_the_public_names_are_there() -> None:
    for name in leakbench.__all__:
        assert getattr(leakbench, name) is not None
    assert set(dir(leakbench)) == set(leakbench.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = leakbench.nothing


@pytest.mark.parametrize(("defense", "reveals"), [("keylock(length=9)", "kee"), ("none", "key")])
def test_revealing_what_the_defense_does_not_have_is_told(defense: str, reveals: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    with pytest.raises(LeakbenchError):
        leakbench.observe(net, rand(1, *SHAPE), torch.tensor([1]), defense=defense, threat={"reveals": [reveals]})  # type: ignore[arg-type]


def test_a_component_without_a_decorator_is_served_or_told() -> None:
    class Plain(leakbench.Defense):
        """Does nothing."""

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with contextlib.suppress(LeakbenchError):
        assert leakbench.observe(net, rand(1, *SHAPE), torch.tensor([1]), defense=Plain()).trials == 1


@pytest.mark.parametrize("label", [-100, 7, -1])
def test_a_label_out_of_range_is_told(label: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(LeakbenchError):
        leakbench.observe(net, rand(1, *SHAPE), torch.tensor([label]))


def test_no_images_are_told() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(LeakbenchError):
        leakbench.observe(net, torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))


def test_observation_and_reconstruction_are_one_line_of_counts_and_shapes() -> None:
    observation = leakbench.observe(network(), *images(), defense="keylock(length=9, layers=all)")
    text = repr(observation)
    assert text.startswith("Observation(3 trials of Sequential, images [1, 8, 8], 5 classes, 4 gradient tensors with ")
    assert "labels hidden, secrets: key, lock, threat model: paper, defense: unknown, float32 on cpu" in text
    rows = torch.tensor([3.0, 0.25, 1.0])
    found = repr(Reconstruction(rand(3, *SHAPE), torch.arange(3), rows, rows > 2, findings={"rate": rows}))
    assert found == (
        "Reconstruction(images [3, 1, 8, 8] float32 on cpu, 1 failed, objective 0.25 to 3, labels [0, 1, 2], "
        "findings: rate)"
    )
    assert repr(Reconstruction(rand(3, *SHAPE))) == "Reconstruction(images [3, 1, 8, 8] float32 on cpu)"
    assert all("\n" not in line and len(line) < 300 for line in (text, found))


def test_a_matrix_and_its_run_are_one_line_of_names_and_counts(tmp_path: Path) -> None:
    axes = {"defenses": ["none"], "models": ["lenet"], "datasets": ["samples(size=12)"], "images": 2}
    matrix = leakbench.Matrix(attacks=["grey", "random", "mean", "ig(steps=1)"], **axes)
    expected = (
        "Matrix('matrix': 4 attacks (grey, random, mean, ...), 1 defense (none), 1 model (lenet), "
        "1 dataset (samples(size=12)), 1 threat model (paper), 2 images, 1 seed)"
    )
    assert repr(matrix) == str(matrix) == expected
    run = leakbench.run(leakbench.Matrix(attacks=["grey"], floors=False, **axes), tmp_path / "run")
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}: 2 of 2 trials finished)"
    assert "there is no run file" in repr(leakbench.api.Run(tmp_path / "none"))
    assert leakbench.api.Run(str(run.out)) == run
