"""Batched per-trial gradients against one at a time, against plain torch, and against finite differences."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import CLASSES, DEFENSES, MODELS, MODES, SHAPE, close, public_tensors, rand, randn, tensors_of, watch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import defenses, models
from leakbench.core.types import Gradient
from leakbench.errors import Unsupported
from leakbench.gradients import Evaluator, Path, choose_path, plain_loss
from leakbench.gradients.evaluate import architecture
from leakbench.models import OwnModule
from leakbench.observation import Observation

pytestmark = pytest.mark.usefixtures("float64")


def targets(kind: str, trials: int) -> Tensor:
    if kind == "hard":
        return torch.tensor([t % CLASSES for t in range(trials)])
    return torch.softmax(randn(trials, CLASSES, seed=3), 1)


def distance(gradient: Gradient, observed: Gradient) -> Tensor:
    """A distance [T] that weighs every entry differently, so that no error can cancel."""
    parts = [
        ((gradient[name] - target).square() * (1 + torch.arange(target[0].numel()).view(target.shape[1:]) % 5))
        .reshape(len(target), -1)
        .sum(1)
        for name, target in observed.items()
    ]
    return torch.stack(parts).sum(0)


def evaluate(
    evaluator: Evaluator, observation: Observation, tensors: dict[str, Tensor], x: Tensor, y: Tensor
) -> tuple[Gradient, Tensor, Tensor]:
    probe = x.clone().requires_grad_()
    soft = y.clone().requires_grad_(y.is_floating_point())
    gradient = evaluator.gradient(tensors, probe, soft)
    value = distance(gradient, dict(observation.gradient))
    wanted = [probe, soft] if soft.requires_grad else [probe]
    by = torch.autograd.grad(value.sum(), wanted)
    return {name: grad.detach() for name, grad in gradient.items()}, by[0], by[-1]


def ordinary(
    model: nn.Module,
    defense: defenses.Defense,
    observation: Observation,
    tensors: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
) -> tuple[Gradient, Tensor]:
    """Double backward through ordinary modules that own their values, one trial after the other."""
    rows: list[Gradient] = []
    by_image = []
    for t in range(len(x)):
        network = copy.deepcopy(model)
        own = tensors_of(network)
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(value[t] if value.ndim > own[name].ndim else value)
        names = list(observation.gradient)
        probe = x[t : t + 1].clone().requires_grad_()
        loss = defense.loss(network, probe, y[t : t + 1]).sum()
        parameters = dict(network.named_parameters())
        grads = torch.autograd.grad(loss, [parameters[name] for name in names], create_graph=True)
        row = {name: grad[None] for name, grad in zip(names, grads)}
        value = distance(row, {name: observation.gradient[name][t : t + 1] for name in names})
        by_image.append(torch.autograd.grad(value.sum(), probe)[0])
        rows.append({name: grad.detach() for name, grad in row.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}, torch.cat(by_image)


CASES = [
    pytest.param(model, defense, fresh, kind, id=f"{model}-{defense}-{'fresh' if fresh else 'shared'}-{kind}")
    for model in MODES
    for index, defense in enumerate(DEFENSES)
    for fresh in (False, True)
    for kind in ("hard", "soft")
    # a network of sixty layers takes turns instead of every combination
    if "resnet" not in model or (fresh, kind) == (index % 2 == 0, "soft" if index % 4 < 2 else "hard")
]


@pytest.mark.parametrize(("model", "defense", "fresh", "kind"), CASES)
def test_batched_is_one_at_a_time_is_plain_torch(model: str, defense: str, fresh: bool, kind: str) -> None:
    trials = 2
    observation = watch(model, defense, trials=trials, fresh=fresh)
    shared = next(iter(observation.weights.values()))
    assert (shared.stride(0) == 0) != fresh
    parsed = defenses.parse(defense)
    tensors = public_tensors(observation)
    evaluator = Evaluator(observation.model, tuple(observation.gradient), parsed.loss)
    x, y = rand(trials, *SHAPE, seed=5), targets(kind, trials)

    fast, fast_x, fast_y = evaluate(evaluator, observation, tensors, x, y)
    slow, slow_x, slow_y = evaluate(replace(evaluator, path="one-at-a-time"), observation, tensors, x, y)
    plain_network = parsed.wrap(models.parse(model).build(SHAPE, CLASSES))
    obvious, obvious_x = ordinary(plain_network, parsed, observation, tensors, x, y)
    for name in observation.gradient:
        # a bias before batch normalisation has the gradient 0 up to rounding; compare on the scale of all entries
        scale = max(float(obvious[name].norm()), 1e-6 * float(torch.stack([g.norm() for g in obvious.values()]).norm()))
        assert float((fast[name] - obvious[name]).norm()) <= 1e-10 * scale, name
        assert float((slow[name] - obvious[name]).norm()) <= 1e-10 * scale, name
    close(fast_x, obvious_x, 1e-10)
    close(slow_x, obvious_x, 1e-10)
    close(fast_y, slow_y, 1e-10)


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("model", MODES)
def test_the_batched_path_is_chosen(model: str, defense: str) -> None:
    observation = watch(model, defense)
    evaluator = Evaluator(observation.model, tuple(observation.gradient), defenses.parse(defense).loss)
    assert choose_path(evaluator, public_tensors(observation), SHAPE, CLASSES) == "batched"


@pytest.mark.parametrize("defense", ["none", "keylock(length=9, gate=sigmoid)"])
@pytest.mark.parametrize("model", [m.replace("resnet20", "resnet20(activation=sigmoid)") for m in MODELS])
def test_finite_differences_of_the_matching_loss(model: str, defense: str) -> None:
    observation = watch(model, defense, trials=1)
    tensors = public_tensors(observation)
    evaluator = Evaluator(observation.model, tuple(observation.gradient))
    x, y = rand(1, *SHAPE, seed=5), targets("soft", 1)
    _, by_image, _ = evaluate(evaluator, observation, tensors, x, y)
    for seed in range(1 if "resnet" in model else 3):
        direction = randn(*x.shape, seed=seed)
        direction /= direction.norm()

        def value(step: float, direction: Tensor = direction) -> float:
            gradient = evaluator.gradient(tensors, x + step * direction, y, create_graph=False)
            return float(distance(gradient, dict(observation.gradient)))

        h = 1e-4  # the five-point rule: an error of order h^4
        numeric = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
        analytic = float((by_image * direction).sum())
        assert numeric == pytest.approx(analytic, rel=1e-5, abs=1e-6 * float(by_image.norm()))


class Net(nn.Module):
    """An embedding of the image by ``make``, then a linear classifier."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.middle = middle
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.middle(torch.sigmoid(self.conv(x)))).flatten(1))


class Sequence1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1d(x.flatten(2))


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(64, 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x.flatten(1), x.flatten(1))


class Gain(nn.Module):
    """A bare parameter that multiplies: with a trial axis in front it would broadcast along the wrong axis."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, max(1, torch.Size(shape).numel())).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class AcrossExamples(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.mean()


class OutsideTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().max())


COVERED = {
    "group convolution": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "same padding, dilation": lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2),
    "circular padding": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "batch norm without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "batch norm without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(),
    "linear on the last axis": lambda: nn.Linear(4, 4),
    "gain per channel": lambda: Gain(4, 1, 1),
    "in-place activation": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ELU(inplace=True)),
    "layer norm": lambda: nn.LayerNorm([4, 4, 4]),
    "layer norm without bias": lambda: nn.LayerNorm([4], bias=False),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "instance norm": lambda: nn.InstanceNorm2d(4, affine=True),
    "gain with an axis for the batch": lambda: Gain(1, 4, 1, 1),
    "average pooling and repeat": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2)),
}
UNDER_VMAP = {
    "conv1d": Sequence1d,
    "an operation without a rule for vmap": Pairs,
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    "prelu": nn.PReLU,
    "scalar gain": lambda: Gain(),
    "gain along the width": lambda: Gain(4),
    "weight normalisation": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
    "mean over examples": AcrossExamples,
}
IN_A_LOOP = {"a number taken out of torch": OutsideTorch}
PATHS: dict[Path, dict[str, Callable[[], nn.Module]]] = {
    "batched": COVERED,
    "vmap": UNDER_VMAP,
    "one-at-a-time": IN_A_LOOP,
}


@pytest.mark.parametrize(("expected", "name"), [(path, name) for path in PATHS for name in PATHS[path]])
def test_the_path_for_other_operations_and_its_numbers(expected: Path, name: str) -> None:
    torch.manual_seed(0)
    net = Net(PATHS[expected][name]())
    observation = watch(OwnModule("net", net))
    tensors = public_tensors(observation)
    evaluator = Evaluator(observation.model, tuple(observation.gradient))
    path = choose_path(evaluator, tensors, SHAPE, CLASSES)
    assert path == expected
    x, y = rand(2, *SHAPE, seed=5), targets("soft", 2)
    got, got_x, _ = evaluate(replace(evaluator, path=path), observation, tensors, x, y)
    obvious, obvious_x = ordinary(net, defenses.parse("none"), observation, tensors, x, y)
    for key in got:
        close(got[key], obvious[key], 1e-10)
    close(got_x, obvious_x, 1e-10)


def test_a_network_without_a_second_derivative_is_unsupported() -> None:
    class OnceOnly(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.hardsigmoid(x)

    observation = watch(OwnModule("net", Net(OnceOnly())))
    evaluator = Evaluator(observation.model, tuple(observation.gradient))
    with pytest.raises(Unsupported, match="differentiated twice"):
        choose_path(evaluator, public_tensors(observation), SHAPE, CLASSES)


def test_a_gradient_that_does_not_depend_on_the_image_is_unsupported() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.reshape(-1, CLASSES).expand(len(x), CLASSES)

    observation = watch(OwnModule("blind", Blind()))
    with pytest.raises(Unsupported):
        choose_path(Evaluator(observation.model, ("logits",)), public_tensors(observation), SHAPE, CLASSES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", inspect.get_annotations(Evaluator, eval_str=True)["path"].__args__)
@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("model", ["lenet", "lenet-bn"])
def test_a_non_finite_image_stays_in_its_row(model: str, defense: str, path: Path, bad: float) -> None:
    observation = watch(model, defense, trials=3)
    tensors = public_tensors(observation)
    evaluator = Evaluator(observation.model, tuple(observation.gradient), defenses.parse(defense).loss, path)
    x, y = rand(3, *SHAPE, seed=5), targets("soft", 3)
    if path == "lanes" and not evaluator.suits_kernels(SHAPE, 3, x.device, x.dtype):
        with pytest.raises(Unsupported, match="kernels"):
            evaluate(evaluator, observation, tensors, x, y)
        return
    clean, clean_x, _ = evaluate(evaluator, observation, tensors, x, y)
    x[1, 0, 2, 2] = bad
    dirty, dirty_x, _ = evaluate(evaluator, observation, tensors, x, y)
    assert not bool(torch.isfinite(dirty_x[1]).all())
    keep = [0, 2]
    for name in clean:
        torch.testing.assert_close(dirty[name][keep], clean[name][keep], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dirty_x[keep], clean_x[keep], rtol=1e-12, atol=1e-14)


def test_running_statistics_and_weights_are_not_touched() -> None:
    observation = watch("lenet-bn")
    tensors = public_tensors(observation)
    before = {name: value.clone() for name, value in tensors.items()}
    for path in ("batched", "one-at-a-time"):
        evaluator = Evaluator(observation.model, tuple(observation.gradient), path=path)
        evaluate(evaluator, observation, tensors, rand(2, *SHAPE), targets("hard", 2))
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())


def test_without_a_graph_the_gradient_is_the_same() -> None:
    observation = watch("lenet")
    evaluator = Evaluator(observation.model, tuple(observation.gradient))
    x, y = rand(2, *SHAPE), targets("hard", 2)
    kept = evaluator.gradient(observation.weights, x, y)
    dropped = evaluator.gradient(observation.weights, x, y, create_graph=False)
    assert all(torch.equal(kept[name], dropped[name]) for name in kept)
    assert not any(value.requires_grad for value in dropped.values())


def test_plain_loss_is_cross_entropy_per_example() -> None:
    net = Net(nn.Identity())
    x, soft = rand(3, *SHAPE), targets("soft", 3)
    expected = -(soft * torch.log_softmax(net(x), 1)).sum(1)
    torch.testing.assert_close(plain_loss(net, x, soft), expected)
    hard = torch.tensor([2, 0, 1])
    torch.testing.assert_close(plain_loss(net, x, hard), plain_loss(net, x, F.one_hot(hard, CLASSES).double()))


def test_the_architecture_holds_no_values() -> None:
    net = Net(nn.BatchNorm2d(4))
    bare = architecture(net)
    assert {tensor.device.type for tensor in tensors_of(bare).values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in tensors_of(bare).items()} == {
        name: tensor.shape for name, tensor in tensors_of(net).items()
    }
    assert {tensor.device.type for tensor in tensors_of(net).values()} == {"cpu"}
