"""The defenses that act on the gradient or on the data against independent formulas, and what the informed know."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import ALL_DEFENSES, CLASSES, SHAPE, clients, close, rand, randn, watch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

import leakbench
from leakbench import attacks, datasets, defenses, metrics, models
from leakbench.analysis.recovery import caveat, judged
from leakbench.api import run
from leakbench.attacks.base import prepare
from leakbench.attacks.lb import layer_normalised_distance
from leakbench.attacks.matching import GradientMatching, MatchingObjective, analytic_labels
from leakbench.core.rng import Rng, generator
from leakbench.core.types import Gradient
from leakbench.defenses import AdaptiveAttacker, Defense, Step
from leakbench.defenses.adaptive import CONTROLS, SIMULATED
from leakbench.defenses.ats import POOL, transform
from leakbench.defenses.base import by_informed
from leakbench.errors import BadOption, Unsupported
from leakbench.gradients.bilinear import squared_distance
from leakbench.gradients.evaluate import tensors_of
from leakbench.models import Model, OwnModule
from leakbench.models.surgery import linears
from leakbench.observation import Observation
from leakbench.optim import value_and_gradient
from leakbench.plan.matrix import Matrix, parse_threat
from leakbench.plan.trial import UNSEEN
from leakbench.report import worst_case
from leakbench.report.markdown import markdown
from leakbench.report.run import RunData as Report
from leakbench.store.run_file import FILE, Store
from leakbench.victim import Client, Exchange, StepRecord, build, observe
from leakbench.victim.client import batch_of

RGB = (3, 32, 32)
INFORMED = {"informed": True}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_step(defense: str, model: str = "lenet", images: int = 1) -> Step:
    method = defenses.parse(defense)
    network = build(models.parse(model), method, SHAPE, CLASSES, "weights")
    return Step(network, rand(images, *SHAPE), torch.arange(images) % CLASSES, method)


def released(defense: str, model: str = "lenet", images: int = 1, seed: int = 0) -> tuple[Gradient, Gradient]:
    """Return the plain gradient of a step, and what the defense sends of it."""
    step = one_step(defense, model, images)
    return step.gradient(), defenses.parse(defense).release(step, seeded(seed))


def rows(gradient: Gradient) -> Gradient:
    return {name: value[None] for name, value in gradient.items()}


def flat(gradient: Gradient) -> Tensor:
    return torch.cat([value.flatten() for value in gradient.values()])


# prune


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_pruning_zeroes_what_is_strictly_below_the_percentile(model: str, ratio: float) -> None:
    plain, sent = released(f"prune({ratio=})", model)
    for name, value in plain.items():
        size = value.abs().numpy()
        expected = np.where(size < np.percentile(size, 100 * ratio), 0, value.numpy())
        np.testing.assert_array_equal(sent[name].numpy(), expected)
        # of n distinct magnitudes, the percentile lies above the smallest ceil(ratio * (n - 1))
        if len(np.unique(size)) == size.size:
            assert int((sent[name] == 0).sum()) == math.ceil(ratio * (size.size - 1) - 1e-9)
    assert ratio or all(torch.equal(sent[name], plain[name]) for name in plain)


def test_entries_that_equal_the_percentile_are_sent() -> None:
    class Fixed(Step):
        def gradient(self) -> Gradient:
            return {"a": torch.tensor([1.0, -2.0, 2.0, 3.0, -1.0])}

    step = one_step("prune")
    fixed = Fixed(step.model, step.images, step.labels, defenses.parse("prune"))
    assert defenses.parse("prune:0.5").release(fixed, seeded())["a"].tolist() == [0, -2, 2, 3, 0]


# clip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("norm", [1e-3, 0.7, 1e6])
def test_clipping_scales_to_the_norm_over_all_parameters(norm: float) -> None:
    plain, sent = released(f"clip({norm=})")
    size = float(np.linalg.norm(flat(plain).numpy()))
    assert 0.7 < size < 1e6
    for name, value in plain.items():
        np.testing.assert_allclose(sent[name].numpy(), value.numpy() * min(1, norm / size), rtol=1e-12)
        assert norm < size or torch.equal(sent[name], value)


def adaptive(defense: str | Defense, name: str = "default") -> AdaptiveAttacker:
    return defenses.parse(defense).attackers()[name]


def derived(observation: Observation) -> Observation:
    """Return what an attack on a shared gradient is given."""
    return prepare(attacks.parse("ig"), observation)[1]


def test_each_dummy_is_clipped_by_its_own_norm() -> None:
    gradient = {"a": randn(3, 5, 2), "b": randn(3, 4, seed=1)}
    gradient = {
        name: value * torch.tensor([0.01, 1.0, 30.0]).view(3, *[1] * (value.ndim - 1))
        for name, value in gradient.items()
    }
    found = adaptive("clip(norm=2)").surrogate(gradient, gradient, {})
    for t in range(3):
        row = torch.cat([value[t].flatten() for value in gradient.values()])
        own = torch.cat([value[t].flatten() for value in found.values()])
        torch.testing.assert_close(own, row * min(1.0, 2 / float(row.norm())))


def test_a_dummy_gradient_of_zero_is_differentiated() -> None:
    """The derivative of a norm at 0 is infinite; the clip's is not."""
    zero = torch.zeros(2, 6, requires_grad=True)
    (found,) = torch.autograd.grad(adaptive("clip").surrogate({"a": zero}, {"a": zero}, {})["a"].sum(), zero)
    assert torch.equal(found, torch.ones(2, 6))


@pytest.mark.usefixtures("float64")
def test_informed_hooks_are_differentiated_right() -> None:
    """To second order, by finite differences: a line search needs no less."""
    observed = {"a": randn(2, 3, 4, seed=7), "b": randn(2, 5, seed=8)}
    weights = {"a": randn(2, 3, 4, seed=5), "b": randn(2, 5, seed=6)}
    on_weights = [
        f"weight-noise(scale=0.5, clip=1, {options})"
        for options in ("kind=laplace", "snapshots=after", "snapshots=after, kind=laplace", "as_released=true")
    ]
    for spec in ("clip(norm=2)", "noise", "quantise(bits=3)", "dp", *on_weights):
        attacker = adaptive(spec)

        def value(a: Tensor, b: Tensor, attacker: AdaptiveAttacker = attacker) -> Tensor:
            dummy = {"a": a, "b": b}
            released = dummy if attacker.surrogate is None else attacker.surrogate(dummy, observed, weights)
            if attacker.likelihood is None:
                return squared_distance(released, observed)
            return attacker.likelihood(released, observed, weights)

        dummies = tuple((value + randn(*value.shape, seed=9)).requires_grad_() for value in observed.values())
        assert torch.autograd.gradcheck(value, dummies)
        assert torch.autograd.gradgradcheck(value, dummies)


# DP-SGD


@pytest.mark.usefixtures("float64")
def test_dp_clips_each_example_and_averages() -> None:
    step = one_step("dp(clip=0.8, noise_multiplier=0)", images=3)
    sent = defenses.parse("dp(clip=0.8, noise_multiplier=0)").release(step, seeded())
    each = [
        one.gradient()
        for one in (
            Step(step.model, x[None], y[None], defenses.parse("none")) for x, y in zip(step.images, step.labels)
        )
    ]
    sizes = [float(flat(gradient).norm()) for gradient in each]
    assert min(sizes) > 0.8
    for name in sent:
        mean = sum(gradient[name] * min(1, 0.8 / size) for gradient, size in zip(each, sizes)) / 3
        torch.testing.assert_close(sent[name], mean, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("images", "clip", "multiplier"), [(1, 0.5, 2.0), (4, 3.0, 0.1)])
def test_the_noise_of_dp_has_the_clips_scale(images: int, clip: float, multiplier: float) -> None:
    quiet, loud = (
        flat(released(f"dp(clip={clip}, noise_multiplier={z})", "lenet", images)[1]) for z in (0.0, multiplier)
    )
    noise, expected = (loud - quiet).double(), multiplier * clip / images
    n = noise.numel()
    assert n > 7000
    assert float(noise.mean()) == pytest.approx(0, abs=5 * expected / n**0.5)
    assert float(noise.square().mean()) == pytest.approx(expected**2, rel=5 * (2 / n) ** 0.5)
    assert float((noise / expected).pow(4).mean()) == pytest.approx(3, abs=5 * (96 / n) ** 0.5)


def renyi_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Return epsilon by the sampled Gaussian's Renyi divergence at whole orders (Mironov et al. 2019, section 3.3).

    Converted as in Canonne et al. 2020, proposition 12.
    """
    found = []
    for order in range(2, 97):
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + k * math.log(rate) + ((order - k) * math.log1p(-rate) if rate < 1 else (0 if k == order else -math.inf))
            + k * (k - 1) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        top = max(terms)
        divergence = steps * (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)
        found.append(divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return min(found)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(1.1, 256 / 60000, 14063, 1e-5), (4.0, 0.01, 10_000, 1e-5), (5.0, 1.0, 4, 1e-6), (2.0, 0.05, 300, 1e-3)],
)
def test_epsilon_is_that_of_the_sampled_gaussian(noise: float, rate: float, steps: int, delta: float) -> None:
    method = defenses.registry.build(
        "dp", {"noise_multiplier": noise, "sampling_rate": rate, "steps": steps, "delta": delta}
    )
    expected = renyi_epsilon(noise, rate, steps, delta)
    # the accountant also tries orders between the whole ones
    assert 0.95 * expected < method.epsilon() <= expected * (1 + 1e-6)


def test_epsilon_bounds_what_a_single_gaussian_guarantees() -> None:
    """Balle and Wang 2018, theorem 8: delta of the Gaussian mechanism at an epsilon, exactly."""
    epsilon = defenses.parse("dp(noise_multiplier=2, sampling_rate=1, steps=9, delta=1e-4)").epsilon()
    shift = 3 / 2  # nine steps of noise 2 are one of 2 / 3

    def tail(x: float) -> float:
        return math.erfc(x / 2**0.5) / 2

    exact = tail(epsilon / shift - shift / 2) - math.exp(epsilon) * tail(epsilon / shift + shift / 2)
    assert 1e-5 < exact <= 1e-4


def test_the_note_says_what_is_guaranteed(monkeypatch: pytest.MonkeyPatch) -> None:
    note = defenses.parse("dp(noise_multiplier=1.1, sampling_rate=0.5, steps=7, delta=1e-6)").note()
    for words in ("epsilon = ", "delta = 1e-06", "7 steps", "probability 0.5"):
        assert words in note
    assert "\n" not in note
    assert "infinite" in defenses.parse("dp(noise_multiplier=0)").note()
    assert defenses.parse("noise").note() == ""
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    assert "pip install dp-accounting" in defenses.parse("dp").note()


# soteria


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", ["lenet", "lenet-bn", "lenet-bn(mode=eval)", "resnet20(width=4)"])
def test_soterias_score_is_the_features_jacobian_over_its_size(model: str) -> None:
    step = one_step("soteria", model)
    name, classifier = list(linears(step.model).items())[-1]
    seen: list[Tensor] = []
    classifier.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x = step.images.clone().requires_grad_()
    step.model(x)
    features = seen[0][0]
    norms = [float(torch.autograd.grad(value, x, retain_graph=True)[0].norm()) for value in features]
    taken, sizes = step.sensitivity(name)
    close(taken, features.detach(), 1e-10)
    close(sizes, torch.tensor(norms), 1e-10)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8])
def test_soteria_masks_columns_of_one_tensor(ratio: float) -> None:
    plain, sent = released(f"soteria({ratio=})")
    step = one_step("soteria")
    assert [name for name in plain if not torch.equal(plain[name], sent[name])] == ["classifier.weight"] * (ratio > 0)
    features, norms = step.sensitivity("classifier")
    scores = (norms / (features.abs() + 1e-10)).numpy()
    keep = scores >= np.percentile(scores, 100 * ratio)
    assert keep.sum() == len(scores) - math.ceil(ratio * (len(scores) - 1) - 1e-9)
    expected = plain["classifier.weight"].numpy() * keep
    np.testing.assert_array_equal(sent["classifier.weight"].numpy(), expected)


def test_soteria_says_where_it_is_not_defined() -> None:
    with pytest.raises(Unsupported, match="one image"):
        released("soteria", images=2)
    method = defenses.parse("soteria")
    convolutions = nn.Sequential(nn.Conv2d(1, CLASSES, 8), nn.Flatten())
    with pytest.raises(Unsupported, match="linear classifier"):
        method.release(Step(convolutions, rand(1, *SHAPE), torch.tensor([1]), method), seeded())
    by_token = nn.Sequential(nn.Flatten(2), nn.Linear(64, CLASSES), nn.Flatten())
    twice = Step(
        nn.Sequential(nn.Conv2d(1, 3, 1), by_token, nn.Unflatten(1, (3, CLASSES)), nn.AvgPool2d((3, 1)), nn.Flatten()),
        rand(1, *SHAPE),
        torch.tensor([1]),
        method,
    )
    with pytest.raises(Unsupported, match="one vector"):
        method.release(twice, seeded())


def test_the_informed_leave_out_the_columns_that_soteria_masked() -> None:
    plain, sent = released("soteria(ratio=0.4)")
    found = adaptive("soteria").undo(rows(sent), {})
    dead = (sent["classifier.weight"] == 0).all(0)
    assert 0 < int(dead.sum()) < len(dead)
    for name, value in plain.items():
        masked = dead.expand_as(value) if name == "classifier.weight" else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(torch.isnan(found[name][0]), masked)
        assert torch.equal(found[name][0][~masked], value[~masked])


# quantise


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
def test_uniform_quantisation_rounds_to_a_grid_between_the_extremes(bits: int) -> None:
    plain, sent = released(f"quantise({bits=})")
    for name, value in plain.items():
        entries = value.numpy()
        low, high = entries.min(), entries.max()
        step = (high - low) / (2**bits - 1)
        expected = low + step * np.round((entries - low) / step)
        np.testing.assert_allclose(sent[name].numpy(), expected, rtol=0, atol=1e-9 * step)
        assert len(sent[name].unique()) <= 2**bits
        assert np.abs(sent[name].numpy() - entries).max() <= step * (0.5 + 1e-9)


def test_half_precision_is_that_of_ieee() -> None:
    plain, sent = released("quantise(bits=half)")
    for name, value in plain.items():
        np.testing.assert_array_equal(sent[name].numpy(), value.numpy().astype(np.float16).astype(np.float32))


def fixed(value: Tensor, defense: str) -> Tensor:
    class Fixed(Step):
        def gradient(self) -> Gradient:
            return {"a": value}

    step = one_step("none")
    method = defenses.parse(defense)
    return method.release(Fixed(step.model, step.images, step.labels, method), seeded())["a"]


def test_quantisation_at_its_ends() -> None:
    assert fixed(torch.tensor([1e6, -1e6, 3.0]), "quantise(bits=half)").tolist() == [65504, -65504, 3]
    assert fixed(torch.full((3,), 0.1), "quantise").tolist() == torch.full((3,), 0.1).tolist()
    assert fixed(torch.tensor([-1.0, 0.9, 0.2, -0.2, 1.0]), "quantise(bits=1)").tolist() == [-1, 1, 1, -1, 1]
    assert fixed(torch.tensor([2.5]), "quantise:2").tolist() == [2.5]


@pytest.mark.parametrize("bits", ["half", "3"])
def test_a_quantisation_error_is_weighed_by_the_grids_width(bits: str) -> None:
    method = defenses.parse(f"quantise(bits={bits})")
    observed = {"a": (randn(2, 40) * 3).half().float(), "b": (randn(2, 3, 5, seed=1) * 1e-3).half().float()}
    observed["sparse"] = observed["a"] * 1e-3 * (observed["a"] > 2)  # as behind ReLU: most entries are 0
    observed["zero"] = torch.zeros(2, 7)
    dummy = {name: value + 1e-4 * randn(*value.shape, seed=2) for name, value in observed.items()}
    expected = np.zeros(2)
    for name, value in observed.items():
        given = value.numpy().reshape(2, -1)
        if bits == "half":
            each = np.abs(np.spacing(given.astype(np.float16))).astype(float)
            width = np.sqrt((each**2).mean(1, keepdims=True))
        else:
            width = (given.max(1) - given.min(1))[:, None] / 7
            if name == "zero":
                width[:] = 2.0**-24
        error = dummy[name].double().numpy().reshape(2, -1) - given
        expected += (error**2 / (2 * width**2 / 12)).sum(1)
    np.testing.assert_allclose(adaptive(method).likelihood(dummy, observed, {}).numpy(), expected, rtol=1e-4)


# mixup


def test_mixup_blends_images_and_labels_with_one_share() -> None:
    x, y = rand(2, *RGB), torch.eye(CLASSES)[[1, 3]]
    shares = []
    for seed in range(400):
        image, label = defenses.parse("mixup").encode(x, y, seeded(seed))
        share = float(label[0, 1])
        assert label.shape == (1, CLASSES)
        assert float(label.sum()) == pytest.approx(1)
        torch.testing.assert_close(image, share * x[:1] + (1 - share) * x[1:])
        torch.testing.assert_close(label, share * y[:1] + (1 - share) * y[1:])
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=5 * (1 / 12 / 400) ** 0.5)
    assert np.var(shares) == pytest.approx(1 / 12, abs=5 * (1 / 180 / 400) ** 0.5)


@pytest.mark.parametrize("alpha", [0.2, 8.0])
def test_mixups_share_has_a_beta_law(alpha: float) -> None:
    x, y = torch.eye(2)[:, :, None, None], torch.eye(2)
    method = defenses.parse(f"mixup({alpha=})")
    shares = np.array([float(method.encode(x, y, seeded(seed))[0].flatten()[0]) for seed in range(1000)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean() == pytest.approx(0.5, abs=5 * (variance / 1000) ** 0.5)
    assert shares.var() == pytest.approx(variance, rel=0.25)


def test_a_client_of_mixup_trains_on_the_blend() -> None:
    observation = watch("lenet", "mixup", trials=1)
    (client,) = clients(1)
    ((other, label),) = client.companions
    method = defenses.parse("mixup")
    x, y = torch.stack([client.image, other]), torch.eye(CLASSES)[[client.label, label]]
    blend, soft = method.encode(x, y, generator(client.key, "encode"))
    network = build(models.parse("lenet"), method, SHAPE, CLASSES, client.weights_key)
    F.cross_entropy(network(blend), soft).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(observation.gradient[name][0], parameter.grad)
    assert watch("lenet", "mixup", "known-label", trials=1).labels.tolist() == [client.label]


def test_a_client_without_a_second_image_cannot_mix() -> None:
    alone = [replace(client, companions=()) for client in clients(1)]
    arguments = (models.parse("lenet"), defenses.parse("mixup"), parse_threat("paper"), alone, CLASSES)
    with pytest.raises(Unsupported, match=r"mixes 2 images of a client, and it has 1; give"):
        observe(*arguments, torch.full(SHAPE, 0.5))
    network = build(models.parse("lenet"), defenses.parse("none"), SHAPE, CLASSES, "weights")
    with pytest.raises(Unsupported, match="mixes 2 images"):
        leakbench.observe(network, rand(1, *SHAPE), torch.tensor([1]), defense="mixup")
    first = leakbench.observe(network, rand(2, *SHAPE), torch.tensor([1, 2]), defense="mixup")
    other = leakbench.observe(network, rand(3, *SHAPE)[[0, 2]], torch.tensor([1, 2]), defense="mixup")
    assert not torch.equal(first.gradient["classifier.bias"][0], other.gradient["classifier.bias"][0])


def test_a_run_draws_a_companion_from_the_dataset(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = type(defenses.parse("mixup")).encode

    def spy(self: Defense, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        seen.append((x.clone(), y.clone()))
        return encode(self, x, y, rng)

    monkeypatch.setattr(type(defenses.parse("mixup")), "encode", spy)
    axes = {"defenses": ["mixup"], "models": ["lenet"], "datasets": ["samples(size=8, channels=1)"], "floors": False}
    run(Matrix(attacks=["grey"], images=4, **axes), tmp_path / "first")
    held, seen[:] = [pair for pair in seen if float(pair[0][0].std()) > 0], []  # less the blank images
    run(Matrix(attacks=["grey"], images=[3, 2], **axes), tmp_path / "second")
    images, labels = datasets.parse("samples(size=8, channels=1)").load(range(64))
    steps = {index: [pair for pair in held if torch.equal(pair[0][0], images[index])] for index in range(4)}
    for index, pairs in steps.items():
        ((x, y),) = pairs  # of the client's step, which is recorded and not repeated
        (other,) = [row for row in range(64) if torch.equal(images[row], x[1])]
        assert other != index
        assert y.argmax(1).tolist() == [int(labels[index]), int(labels[other])]
    again = [pair for pair in seen if float(pair[0][0].std()) > 0]
    for index in (2, 3):
        found = [x for x, _ in again if torch.equal(x[0], images[index])]
        assert found
        assert all(torch.equal(x, steps[index][0][0]) for x in found), "whatever else is attacked"


# ATSPrivacy


def picture(channels: int = 3, size: int = 32) -> Image.Image:
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    bands = [(40 + 3 * x + 2 * y), (200 - 4 * x + y), (90 + 25 * ((x // 4 + y // 4) % 2))][:channels]
    values = np.clip(np.stack(bands, -1), 20, 230).astype(np.uint8)
    return Image.fromarray(values if channels == 3 else values[..., 0])


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image).astype(int)


def test_the_pool_is_the_released_one() -> None:
    assert len(POOL) == 50
    operations = {name for name, _ in POOL}
    assert all(0 <= level <= 9 for _, level in POOL)
    named = [POOL[number] for number in (3, 1, 7, 43, 18, 0, 21, 13, 4, 15, 49)]
    assert named == [
        ("translate-x", 9), ("contrast", 6), ("translate-y", 2), ("translate-y", 3), ("contrast", 7), ("invert", 7),
        ("translate-x", 5), ("brightness", 5), ("sharpness", 1), ("brightness", 9), ("autocontrast", 1),
    ]  # fmt: skip
    for name in operations:
        assert transform(picture(), name, 5, 1).size == (32, 32)
    with pytest.raises(ValueError, match="unknown operation"):
        transform(picture(), "blur", 5, 1)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("level", [1, 4, 9])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_operations_by_other_means(channels: int, level: int, direction: int) -> None:
    image = picture(channels)
    tensor = torch.from_numpy(np.array(image)).view(32, 32, channels).permute(2, 0, 1)

    def found(operation: str) -> np.ndarray:
        return pixels(transform(image, operation, level, direction)).reshape(32, 32, channels).transpose(2, 0, 1)

    def near(operation: str, expected: Tensor, atol: float) -> None:
        np.testing.assert_allclose(found(operation), expected.numpy().astype(float), atol=atol, err_msg=operation)

    strength = 1 + direction * level / 18
    near("invert", 255 - tensor, 0)
    near("posterize", V.posterize(tensor, int(np.round(np.linspace(8, 4, 10))[level])), 0)
    near("solarize", torch.where(tensor >= np.linspace(256, 0, 10)[level], 255 - tensor, tensor), 0)
    near("autocontrast", V.autocontrast(tensor), 2)
    near("equalize", V.equalize(tensor), 0)
    near("brightness", V.adjust_brightness(tensor, strength), 1)
    near("contrast", V.adjust_contrast(tensor, strength), 2)
    near("sharpness", V.adjust_sharpness(tensor, strength), 2)
    if channels == 3:
        near("color", V.adjust_saturation(tensor, strength), 2)
    else:
        near("color", tensor, 0)
    # translation: whole pixels by the nearest, black where nothing was
    shift = direction * np.linspace(0, 150 / 331, 10)[level] * 32
    places = np.arange(32) + 0.5 + shift
    inside = (places >= 0) & (places < 32)
    source = np.floor(places[inside]).astype(int)
    expected = np.zeros((channels, 32, 32), dtype=int)
    expected[:, :, inside] = tensor.numpy()[:, :, source]
    np.testing.assert_array_equal(found("translate-x"), expected)
    np.testing.assert_array_equal(
        found("translate-y").transpose(0, 2, 1),
        np.stack(
            [pixels(transform(Image.fromarray(band.T), "translate-x", level, direction)) for band in tensor.numpy()]
        ),
    )


@pytest.mark.parametrize("direction", [1, -1])
def test_shear_and_rotation_map_pixels_where_they_should(direction: int) -> None:
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[:, None] * 4 + 50, (1, 32)))
    sheared = pixels(transform(ramp, "shear-y", 6, direction))
    column, row = np.meshgrid(np.arange(32), np.arange(32))
    expected = 50 + 4 * (row + direction * 0.2 * (column + 0.5))  # the row that each pixel takes its value from
    middle = (expected > 60) & (expected < 165)
    assert middle.sum() > 300
    np.testing.assert_allclose(sheared[middle], expected[middle], atol=1.5)
    rotated = pixels(transform(picture(), "rotate", 9, direction))
    np.testing.assert_array_equal(rotated, pixels(transform(picture(), "rotate", 9, -direction)), "one direction")
    assert rotated[0, 0].tolist() == [128, 128, 128], "what comes from outside is grey"
    centre = pixels(picture().rotate(30))[8:24, 8:24]
    np.testing.assert_array_equal(rotated[8:24, 8:24], centre)


def encoded(policy: str, seed: int, x: Tensor, augment: bool = False) -> Tensor:
    method = defenses.registry.build("ats", {"policy": policy, "augment": augment})
    image, label = method.encode(x, torch.tensor([2]), seeded(seed))
    assert label.tolist() == [2]
    assert image.shape == x.shape
    assert image.dtype == x.dtype
    return image


@pytest.mark.parametrize("shape", [(1, 28, 28), RGB, (3, 16, 24)])
def test_a_policy_is_applied_in_order_and_draws_from_its_generator(shape: tuple[int, int, int]) -> None:
    x = (rand(1, *shape) * 255).round() / 255
    assert torch.equal(encoded("29", 0, x), 1 - x) or torch.allclose(encoded("29", 0, x), 1 - x, atol=1e-6)
    torch.testing.assert_close(encoded("0-47", 0, x), x), "inverted twice"
    torch.testing.assert_close(encoded("28", 0, x), x), "no pixel reaches a threshold of 256"
    for policy in ("3-1-7+43-18-18", "21-13-3+7-4-15"):
        draws = [encoded(policy, seed, x, augment=True) for seed in range(20)]
        assert torch.equal(encoded(policy, 3, x, augment=True), draws[3])
        assert len({tuple(draw.flatten().tolist()) for draw in draws}) > 15
        assert all(0 <= float(draw.min()) <= float(draw.max()) <= 1 for draw in draws)


def test_one_of_the_policies_is_drawn_each_as_often() -> None:
    x = torch.full((1, 3, 8, 8), 0.2)
    inverted = [float(encoded("0+28", seed, x).mean()) > 0.5 for seed in range(400)]
    assert np.mean(inverted) == pytest.approx(0.5, abs=5 * 0.5 / 20)


def test_augmentation_crops_and_mirrors() -> None:
    x = (rand(1, 3, 16, 16) * 254 + 1).round() / 255  # no black pixel
    mirrored, offsets = [], set()
    for seed in range(120):
        found = encoded("28", seed, x, augment=True)[0]
        padded = F.pad(x[0], (4, 4, 4, 4))
        matches = [
            (flip, top, left)
            for flip in (False, True)
            for top in range(9)
            for left in range(9)
            if torch.allclose(padded[:, top : top + 16, left : left + 16], found.flip(2) if flip else found, atol=1e-6)
        ]
        ((flip, top, left),) = matches
        mirrored.append(flip)
        offsets.add((top, left))
    assert np.mean(mirrored) == pytest.approx(0.5, abs=5 * 0.5 / 120**0.5)
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(9))


def test_ats_needs_grey_or_colour() -> None:
    with pytest.raises(Unsupported, match="1 or 3 channels, not 2"):
        encoded("1", 0, rand(1, 2, 8, 8))


# what the informed know


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "defense",
    ["clip(norm=0.3)", "clip(norm=1e5)", "dp(clip=0.3, noise_multiplier=0)"],
)
def test_the_surrogate_of_the_clients_own_gradient_is_what_was_sent(defense: str) -> None:
    plain, sent = released(defense)
    found = adaptive(defense).surrogate(rows(plain), rows(sent), {})
    for name, value in sent.items():
        torch.testing.assert_close(found[name][0], value, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("defense", ["prune(ratio=0.7)", "soteria(ratio=0.7)"])
def test_a_mask_shows_what_was_sent_of_the_clients_own_gradient(defense: str) -> None:
    plain, sent = released(defense)
    found = adaptive(defense).undo(rows(sent), {})
    hidden = torch.cat([torch.isnan(value).flatten() for value in found.values()])
    assert 0 < int(hidden.sum()) < len(hidden)
    for name, value in plain.items():
        shown = ~torch.isnan(found[name][0])
        assert torch.equal(found[name][0][shown], value[shown])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_the_likelihood_of_noise_is_minus_the_log_of_its_density(kind: str) -> None:
    method = defenses.parse(f"noise(scale=0.3, kind={kind})")
    observed = {"a": randn(2, 3, 4), "b": randn(2, 7, seed=1)}
    dummies = [{name: randn(*value.shape, seed=seed) for name, value in observed.items()} for seed in (5, 6)]
    law = torch.distributions.Normal(0, 0.3) if kind == "gaussian" else torch.distributions.Laplace(0, 0.3 / 2**0.5)

    def density(dummy: Gradient) -> Tensor:
        return torch.stack([law.log_prob(observed[name] - dummy[name]).flatten(1).sum(1) for name in observed]).sum(0)

    likelihood = adaptive(method).likelihood
    first, second = (likelihood(dummy, observed, {}) for dummy in dummies)
    rtol = 1e-10 if kind == "gaussian" else 0.02  # Laplace's absolute value is rounded off near 0
    torch.testing.assert_close(first - second, density(dummies[1]) - density(dummies[0]), rtol=rtol, atol=1e-10)
    assert torch.equal(likelihood(observed, observed, {}), torch.zeros(2))
    for certain in ("noise(scale=0)", "dp(noise_multiplier=0)", "prune"):
        assert adaptive(certain).likelihood is None
    dp = adaptive("dp(clip=0.5, noise_multiplier=0.6)").likelihood(dummies[0], observed, {})
    gaussian = adaptive("noise(scale=0.3)").likelihood(dummies[0], observed, {})
    torch.testing.assert_close(dp, gaussian)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("model", ["lenet", "lenet-bn", "lenet-bn(mode=eval)", "resnet20(width=4)"])
def test_precodes_noise_is_worked_out(model: str, beta: float) -> None:
    """float32 gradients, as clients send them."""
    defense = f"precode({beta=})"
    told, informed = (
        watch(model, defense, threat, shape=RGB, classes=10, trials=3, fresh=True)
        for threat in ({"reveals": ["noise"]}, INFORMED)
    )
    (secret,) = informed.secrets
    known = derived(informed)
    assert known.secrets == ()
    truth = told.weights[secret.name]
    assert truth.shape == (3, 256)
    assert known.weights[secret.name].dtype == torch.float32
    assert float((known.weights[secret.name] - truth).abs().max()) < 1e-4
    assert secret.name not in informed.weights, "the observation itself is left as it is"
    assert derived(watch(model, defense)).secrets == (secret,), "nothing is worked out by who does not know of it"


def test_precodes_noise_is_not_worked_out_without_what_it_needs() -> None:
    observation = watch("lenet", "precode(k=6)", INFORMED)
    (name,) = [name for name in observation.gradient if name.endswith("decoder.bias")]
    less = replace(observation, gradient={key: value for key, value in observation.gradient.items() if key != name})
    assert derived(less).secrets == observation.secrets
    method = defenses.parse("precode(k=6)")
    recover = adaptive(method).recover
    assert recover(observation.model, less.gradient, observation.weights) == {}
    zero = {key: torch.zeros_like(value) for key, value in observation.gradient.items()}
    (noise,) = recover(observation.model, zero, observation.weights).values()
    assert bool(torch.isfinite(noise).all())


@pytest.mark.usefixtures("float64")
def test_with_precodes_noise_the_clients_image_has_the_observed_gradient() -> None:
    """What is worked out is enough: at the private image, an informed attack's distance is zero."""
    observation = derived(watch("lenet", "precode(k=6)", {"informed": True, "labels": "known"}))
    attack = attacks.parse("dlg(steps=1)")
    objective = attack._objective(observation, Rng(("a", "b"))).with_path()
    images = torch.stack([client.image for client in clients(2)])
    assert float(objective.match({"image": images}, 0).detach().abs().max()) < 1e-18
    elsewhere = objective.match({"image": images.flip(0)}, 0).detach()
    assert float(elsewhere.min()) > 1e-8


def test_precodes_label_is_worked_out_where_the_published_rule_misses_it() -> None:
    """A decoded feature has any sign, so that the sums over the classifier's weights mislead."""
    observation = watch("lenet", "precode(k=6)", INFORMED, trials=8, fresh=True)
    truth = [client.label for client in clients(8)]
    known = derived(observation)
    assert known.labels.tolist() == truth
    assert known.targets.tolist() == F.one_hot(torch.tensor(truth), CLASSES).tolist()
    assert analytic_labels(observation).tolist() != truth
    granted = derived(watch("lenet", "precode(k=6)", {"informed": True, "labels": "known"}, trials=8))
    assert granted.labels.tolist() == truth
    assert derived(watch("lenet", "precode(k=6)")).targets is None


def objective(attack: str, observation: Observation) -> MatchingObjective:
    acting, known = prepare(attacks.parse(attack), observation)
    assert isinstance(acting, GradientMatching)
    return acting._objective(known, Rng(tuple(map(str, range(known.trials))))).with_path()


@pytest.mark.parametrize(
    ("attack", "same"),
    [("lb", True), ("lb(line_search=none)", False), ("dlg", False), ("lb(solver=adam)", False), ("ig", False)],
)
def test_a_line_search_meets_one_draw_of_the_noise(attack: str, same: bool) -> None:
    """It compares evaluations, which are of one function then; another start of the search has another draw."""
    seen = watch("lenet", "precode(k=6)")
    own = objective(attack, seen)
    start = {"image": own_images(2).to(own.observation.dtype), "label": torch.zeros(2, CLASSES, dtype=torch.float64)}
    first, second = (own(start, evaluation).detach() for evaluation in (3, 4))
    assert bool((first == second).all()) is same
    other = replace(own, rng=own.rng.fork("restart 1"))
    assert not bool((other(start, 3).detach() == first).any())


@pytest.mark.parametrize(("defense", "counts"), [("noise(scale=0.1)", True), ("clip", False)])
def test_what_a_likelihood_finds_is_judged_with_the_prior(defense: str, counts: bool) -> None:
    own = objective("lb(tv=0.01)", watch("lenet", defense, INFORMED))
    start = {"image": own_images(2).to(own.observation.dtype)}
    match = own.match(start, 0).detach()
    prior = own.attack.prior(start["image"])
    assert bool((prior > 0).all())
    distance = own._distance(*own.render(start), start, 0, judge=True).detach()
    torch.testing.assert_close(match, distance + prior if counts else distance, rtol=1e-12, atol=0)


def own_images(trials: int) -> Tensor:
    return torch.stack([client.image for client in clients(trials)])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", ["lenet", "resnet20(width=4)"])
def test_the_blends_class_probabilities_are_worked_out(model: str) -> None:
    """With them the distance is zero at the blend; with one label it is not."""
    observation = watch(model, "mixup", INFORMED, trials=4)
    known = derived(observation)
    method = defenses.parse("mixup")
    blends = []
    for t, client in enumerate(clients(4)):
        x, y = batch_of(method, client, CLASSES)
        blend, shares = method.encode(x, y, generator(client.key, "encode"))
        torch.testing.assert_close(known.targets[t : t + 1], shares, rtol=1e-9, atol=1e-9)
        assert torch.equal(recorded("lenet", method, [client])[0].changed, blend)
        blends.append(blend[0])
    informed, oblivious = objective("ig", observation), objective("ig", watch(model, "mixup", trials=4))
    images = {"image": torch.stack(blends)}
    assert float(informed.match(images, 0).detach().abs().max()) < 1e-12
    apart = [t for t, client in enumerate(clients(4)) if client.label != client.companions[0][1]]
    assert float(oblivious.match(images, 0).detach()[apart].min()) > 1e-6
    part = informed.select([2, 0])
    assert float(part.match({"image": images["image"][[2, 0]]}, 0).detach().abs().max()) < 1e-12
    own = leakbench.attack("dlg(steps=1)", observation)
    assert own.labels.tolist() == known.targets.argmax(1).tolist()


def test_a_reconstruction_is_scored_against_both_images(tmp_path) -> None:
    """What a server sees of a client is exact for an attacker who returns what was trained on."""
    axes = {"models": ["lenet"], "datasets": ["samples(size=16)"], "images": 2, "attacks": ["peel"], "floors": False}
    spec = "ats(policy=3, augment=false)"  # moved sideways
    table = run(Matrix(defenses=["none", spec, "mixup"], **axes), tmp_path).results().set_index(["defense", "image"])
    assert table.loc["none", "psnr_encoded"].isna().all()
    assert (table.loc[spec, "psnr_encoded"] > 60).all()
    assert (table.loc[spec, "ssim_encoded"] > 0.99).all()
    assert (table.loc[spec, "psnr_aligned"] < 25).all()
    assert (table.loc["mixup", "psnr_encoded"] > 60).all()
    assert (table.loc["mixup", "psnr_encoded"] > table.loc["mixup", "psnr_aligned"]).all()


def recorded(model: str | Model, defense: Defense, own: Sequence[Client], threat: str = "paper") -> list[StepRecord]:
    """Return what the steps of clients were."""
    network = models.parse(model) if isinstance(model, str) else model
    mean = torch.full(own[0].image.shape, 0.5)
    return Exchange(network, defense, parse_threat(threat), own, CLASSES, mean).recorded()[1]


def test_what_a_client_trained_on_is_what_its_step_was_taken_on() -> None:
    method = defenses.parse("ats")
    network = build(models.parse("lenet"), method, SHAPE, CLASSES, "weights 0")
    for client, sent in zip(clients(2), zip(*watch("lenet", method).gradient.values())):
        (record,) = recorded("lenet", method, [client])
        image = record.changed
        assert not record.unseen
        plain = Step(network, image, torch.tensor([client.label]), method).gradient()
        assert all(torch.equal(value, own) for value, own in zip(plain.values(), sent))
    for spec in ("none", "noise", "keylock", "precode", "dp"):
        (record,) = recorded("lenet-bn", defenses.parse(spec), clients(1))
        assert record.changed is None, spec
        assert not record.unseen, spec


@dataclass(frozen=True)
class Changes(Defense):
    """Trains on something else than the private image."""

    name: ClassVar[str] = "changes"
    how: str = "shift"

    def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.how == "noise":
            return torch.rand(x.shape, generator=rng), y
        x = torch.full_like(x, 0.5) if self.how == "grey" else x.roll(5, -1).flip(-1)
        x = 4 * x - 2 if self.how == "scale" else x
        return (torch.cat([x, x]), torch.cat([y, y])) if self.how == "twice" else (x, y)


def moved(x: Tensor) -> Tensor:
    return x.roll(5, -1).flip(-1)


class Moved(nn.Module):
    """Moves the image as a layer of the network."""

    def forward(self, x: Tensor) -> Tensor:
        return moved(x)


@dataclass(frozen=True)
class Hides(Defense):
    """Changes the image after ``encode``."""

    name: ClassVar[str] = "hides"
    how: str = "loss"

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.Sequential(Moved(), model) if self.how == "layer" else model

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model({"crop": x[..., 2:], "layer": x, "mean": x.roll(3, -1) / 2 + x.flip(-1) / 2}
                                     .get(self.how, moved(x))), y, reduction="none")  # fmt: skip
        if self.how in ("decoy", "noise"):
            unlike = 0.5 + 1e-4 * x if self.how == "decoy" else torch.rand(x.shape, generator=seeded())
            loss = loss + 0 * model(unlike).sum(1)
        return loss

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        if self.how not in ("release", "copy"):
            return step.gradient()
        network = copy.deepcopy(step.model) if self.how == "copy" else step.model
        loss = F.cross_entropy(network(moved(step.images)), step.labels)
        return dict(zip(step.weights(), torch.autograd.grad(loss, list(network.parameters()))))


def test_a_changed_image_is_compared_whatever_its_number_and_range(tmp_path) -> None:
    """Two copies of it, values beyond [0, 1], or a change after ``encode`` do not hide what the gradient leaks."""
    hows = [*map(Changes, ("shift", "twice", "scale")), *map(Hides, ("loss", "decoy"))]
    axes = {"models": ["lenet"], "datasets": ["samples(size=16)"], "images": 2, "attacks": ["peel"]}
    table = run(Matrix(defenses=hows, **axes), tmp_path).results()
    own = judged(table, 0.6).query("not floor")
    assert (own["ssim_encoded"] > 0.99).all(), own[["defense", "ssim_encoded"]].to_string()
    assert (len(own), int(own["recovered"].sum()), int(own["itself"].sum())) == (10, 10, 0)
    floors = own[["ssim_encoded_floor", "psnr_encoded_floor"]]
    assert floors.notna().all().all()
    assert (floors["psnr_encoded_floor"] < 40).all(), "no floor resembles the image"
    assert (floors["psnr_encoded_floor"] > own["psnr_aligned"].min()).any()
    as_before = own.drop(columns=list(floors)).assign(ssim_encoded_floor=1.0)
    assert not judged(as_before, 0.6)["recovered"].any(), "a floor that reaches the changed image shows nothing of it"


@pytest.mark.parametrize("how", ["release", "copy", "mean", "noise", "layer"])
def test_the_images_that_a_network_ran_on_are_recorded(how: str) -> None:
    """However they come there, and whatever else it runs on that does not depend on the private image."""
    (client,) = clients(1)
    image = client.image[None]
    expected = image.roll(3, -1) / 2 + image.flip(-1) / 2 if how == "mean" else moved(image)
    for threat in ("paper", "shares=weights, local_steps=2, learning_rate=0.1"):
        if threat == "paper" or how not in ("release", "copy"):
            (record,) = recorded("lenet", Hides(how), [client], threat)
            assert torch.equal(record.changed, expected)
            assert not record.unseen


def test_a_network_that_runs_on_images_of_another_size_is_named(tmp_path) -> None:
    axes = {"models": ["resnet20(width=4)"], "datasets": ["samples(size=16)"], "images": 1, "attacks": ["ig(steps=1)"]}
    table = run(Matrix(defenses=[Hides("crop")], floors=False, **axes), tmp_path).results()
    assert table["ssim_encoded"].isna().all()
    assert list(table["reason"]) == [UNSEEN]
    assert caveat(table).endswith(f"Behind hides(how=crop), {UNSEEN}.")
    (record,) = recorded("resnet20(width=4)", Hides("crop"), clients(1))
    assert (record.changed, record.unseen) == (None, True)


def test_a_first_layer_that_normalises_is_no_change() -> None:
    """The private image is what such a layer makes of it, and a changed one is given as the network takes it."""
    body = nn.Sequential(nn.BatchNorm2d(SHAPE[0], affine=False), nn.Flatten(), nn.Linear(math.prod(SHAPE), CLASSES))
    records = [recorded(OwnModule("net", body), own, clients(1))[0] for own in (Defense(), Changes("shift"))]
    assert records[0].changed is None
    assert torch.equal(records[1].changed, moved(clients(1)[0].image[None]))
    assert not any(record.unseen for record in records)


@pytest.mark.parametrize("how", ["grey", "noise"])
def test_what_has_nothing_of_the_private_image_shows_nothing_of_it(tmp_path, how: str) -> None:
    axes = {"models": ["lenet"], "datasets": ["samples(size=16)"], "images": 2, "attacks": ["peel"]}
    threats = ["paper", {"informed": "every"}]
    table = run(Matrix(defenses=["none", Changes(how)], threats=threats, **axes), tmp_path).results()
    own = judged(table, 0.6).query("not floor and defense != 'none'")
    assert not own["recovered"].any()
    assert own["ssim_encoded"].isna().all()
    (reason,) = set(own.loc[own["threat"] == "informed=simulate", "reason"])
    assert reason.startswith("what 'changes' trains on does not depend on the image")


@pytest.mark.parametrize("attack", ["analytic", "peel"])
def test_a_closed_form_behind_precode_leaves_out_a_splice(attack: str) -> None:
    """It inverts the network itself, which has no tensor for the error at the features."""
    observations = [watch("mlp", "precode(k=6)", threat) for threat in ("informed=true", "informed=splice")]
    known, spliced = (attacks.parse(attack)(own, Rng(("a", "b"))) for own in observations)
    assert torch.equal(spliced.images, known.images)
    assert not bool(spliced.failed.any())


BELOW = ["lenet", "lenet-bn(mode=eval)", "resnet20(width=4, activation=sigmoid)"]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", BELOW)
def test_a_splice_matches_the_layers_below_with_the_inferred_error(model: str) -> None:
    """At the private image its distance is zero, and its second derivative is that of autograd through <f, e>."""
    observation = watch(model, "precode(k=6, beta=0.3)", "informed=splice", fresh=True)
    spliced = objective("lb", observation)
    assert set(spliced.observation.gradient) < set(observation.gradient)
    assert not any("coder" in name for name in spliced.observation.gradient)
    assert spliced.observation.secrets == (), "the noise is never drawn"
    assert float(spliced.match({"image": own_images(2)}, 0).detach().abs().max()) < 1e-18
    start = rand(2, *SHAPE, seed=5)
    assert float(spliced.match({"image": start}, 0).detach().min()) > 1e-6
    _, found = value_and_gradient(lambda unknowns, n: spliced.match(unknowns, n), {"image": start}, 0)
    relaxed, observed = spliced.observation.model, spliced.observation.gradient
    for t in range(2):
        own = {name: value[t] if value.ndim > tensors_of(relaxed)[name].ndim else value
               for name, value in spliced.tensors.items()}  # fmt: skip
        leaves = {name: own[name].clone().requires_grad_() for name in observed}
        image = start[t : t + 1].clone().requires_grad_()
        loss = functional_call(relaxed, {**own, **leaves}, (image,)).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        dummy = {name: grad[None] for name, grad in zip(leaves, grads)}
        distance = layer_normalised_distance(dummy, {name: value[t : t + 1] for name, value in observed.items()})
        (slow,) = torch.autograd.grad(distance.sum(), image)
        close(found["image"][t : t + 1], slow, 1e-9)


@pytest.mark.usefixtures("float64")
def test_who_omits_matches_the_layers_below_and_draws_noise_in_every_pass() -> None:
    observation = watch("lenet", "precode(k=6)", "informed=omit")
    omitting = objective("ig", observation)
    below = set(omitting.observation.gradient)
    assert below == {name for name in observation.gradient if not name.startswith("classifier.")} != set()
    assert {name for name in observation.gradient if name.startswith("classifier.")}, "what is left out was sent"
    assert omitting.observation.secrets == observation.secrets, "nothing is worked out but the label"
    images = {"image": own_images(2)}
    first, again, other = (omitting.match(images, n).detach() for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    (secret,) = observation.secrets
    told = watch("lenet", "precode(k=6)", "informed=omit, reveals=noise")
    assert float(objective("ig", told).match(images, 0).detach().abs().max()) < 1e-12, "with the noise nothing is left"
    sought = objective("ig(secrets=optimise)", observation)
    assert f"secret:{secret.name}" in sought.attack._begin(sought)


def test_an_attacker_is_asked_for_by_name() -> None:
    named = parse_threat("informed=splice")
    assert named.informed == "splice"
    assert named == parse_threat({"informed": "splice"})
    assert named.spec() == "informed=splice"
    assert "adaptive (splice)" in named.describe()
    for plain in ("informed=true", {"informed": True}, "informed=yes"):
        assert parse_threat(plain).settings()["informed"] is True
    assert parse_threat("informed=false") == parse_threat("paper")
    for bad in ({"informed": ""}, {"informed": "No Name"}, {"informed": 3}):
        with pytest.raises(BadOption, match="informed="):
            parse_threat(bad)
    floor, _ = prepare(attacks.parse("grey"), watch("lenet", "none", "informed=splice"))
    assert floor.name == "grey"
    with pytest.raises(
        Unsupported, match=r"'prune' has no adaptive attacker 'splice'; write informed=true or simulate$"
    ):
        objective("ig", watch("lenet", "prune", "informed=splice"))
    with pytest.raises(Unsupported, match=r"write informed=true or splice or omit or simulate$"):
        objective("ig", watch("lenet", "precode(k=6)", "informed=splize"))


def test_a_splice_needs_a_layer_below() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), CLASSES))
    defense = defenses.parse("precode(k=6)")
    for attacker in (adaptive(defense, name) for name in ("splice", "omit")):
        with pytest.raises(Unsupported, match="no layer below its bottleneck"):
            attacker.relax(defense.wrap(network), ())


def every_attacker() -> list[tuple[str, str]]:
    """Return every defense with each of its adaptive attackers, as ``informed`` asks for it."""
    stated = {spec: by_informed(defenses.parse(spec)) for spec in ALL_DEFENSES}
    return [(spec, str(name).lower()) for spec, attackers in stated.items() for name in attackers]


@pytest.mark.parametrize(("spec", "name"), every_attacker())
def test_what_clients_do_does_not_depend_on_who_is_informed(spec: str, name: str) -> None:
    plain, informed = watch("lenet", spec), watch("lenet", spec, f"informed={name}")
    assert plain.gradient.keys() == informed.gradient.keys()
    assert all(torch.equal(value, informed.gradient[key]) for key, value in plain.gradient.items())


STATED = {spec: defenses.parse(spec).attackers() for spec in ALL_DEFENSES}


def test_every_defense_describes_its_adaptive_attackers_or_has_none() -> None:
    assert {spec for spec, attackers in STATED.items() if not attackers} == {"none", "norm-only", "ats", "local-norm"}
    for attackers in STATED.values():
        for words in (attacker.description for attacker in attackers.values()):
            assert "\n" not in words
            assert 0 < len(words) <= 120
            assert words[:1] == words[:1].lower()
            assert not words.endswith(".")


@pytest.mark.parametrize("defense", ALL_DEFENSES)
def test_informed_attacks_run_where_there_is_something_to_know(defense: str) -> None:
    observation = watch("lenet", defense, "labels=known, informed=true")
    attack = attacks.parse("ig(steps=3)")
    floor, _ = prepare(attacks.parse("grey"), observation)
    assert floor.name == "grey", "a floor looks at nothing, whatever it knows"
    if defense in CONTROLS:
        with pytest.raises(Unsupported, match=r"does nothing to model; use a threat model with informed=false"):
            prepare(attack, observation)
        return
    acting, known = prepare(attack, observation)
    acting.check(known)
    found = acting(known, Rng(("a", "b")))
    assert bool(torch.isfinite(found.images).all())
    assert not bool(found.failed.any())


@dataclass(frozen=True)
class Signs(Defense):
    """Send signs."""

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        return {name: value.sign() for name, value in step.gradient().items()}


def test_a_defense_states_no_adaptive_attacker_and_is_simulated() -> None:
    assert Signs().attackers() == {}
    network = build(models.parse("lenet"), Signs(), SHAPE, CLASSES, "weights")
    observation: Observation = leakbench.observe(
        network, rand(1, *SHAPE), torch.tensor([1]), defense=Signs(), threat="informed=true"
    )
    _, known = prepare(attacks.parse("ig"), observation)
    assert known.adaptive is not None
    assert known.adaptive.description == SIMULATED
    assert bool(torch.isfinite(leakbench.attack("ig(steps=2)", observation).images).all())


def test_a_cell_in_which_there_is_nothing_to_know_is_a_row(tmp_path) -> None:
    axes = {
        "attacks": ["ig(steps=2)"],
        "models": ["lenet"],
        "datasets": ["samples(size=8)"],
        "threats": ["informed=true"],
    }
    table = run(Matrix(defenses=["none", "prune"], images=1, **axes), tmp_path / "run").results()
    status = table.set_index(["defense", "attack"])["status"]
    assert status["none", "ig(steps=2)"] == "unsupported"
    assert status["prune", "ig(steps=2)"] == "ok"
    assert status["none", "grey"] == "ok"
    assert "informed" in table.loc[table["status"] == "unsupported", "reason"].item()
    with pytest.raises(Unsupported, match="does nothing to model"):
        run(Matrix(defenses=["none"], images=1, **axes), tmp_path / "other")


def test_what_a_dataset_says_of_its_images_stands_in_every_report(tmp_path) -> None:
    axes = {"models": ["lenet"], "images": 2, "threshold": 0.6, "floors": False, "defenses": ["none"]}
    finished = run(Matrix(datasets=["samples(size=8)"], attacks=["dlg(steps=1)"], **axes), tmp_path / "run")
    finished.report(["md", "html"])
    for file in ("report.md", "worst-case.md", "report.html"):
        assert "crops of 7 photographs" in (tmp_path / "run" / file).read_text(encoding="utf-8"), file


@dataclass(frozen=True)
class Halved(Signs):
    """Send half of it, with two adaptive attackers."""

    def note(self) -> str:
        return "Half of everything is sent."

    def attackers(self) -> dict[str, AdaptiveAttacker]:
        return {"default": AdaptiveAttacker("doubles | it"), "thrice": AdaptiveAttacker("trebles it")}


def test_a_report_says_who_is_informed_of_every_defense_or_that_nobody_is(tmp_path) -> None:
    """Without the plugin that the defenses came from: the words are in the run file."""
    axes = {"models": ["lenet"], "datasets": ["samples(size=8)"], "images": 1, "attacks": ["grey", "ig(steps=1)"]}
    used = [Signs(), Halved(), "precode(k=2)", "dp(noise_multiplier=0.01)"]
    run(Matrix(defenses=used, threshold=0.5, **axes), tmp_path)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        report = Report.of(store, "x")
        page, worst = markdown(report), worst_case.markdown(report, 0.5)
    for text in (page, worst):
        lines = text.partition("What each defense states")[2].splitlines()
        cells = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| ")]
        rows = {cell[1]: cell[2:4] for cell in cells}
        assert rows["Signs"] == ["–", "none stated"]
        assert rows["Halved"] == ["Half of everything is sent.", 'doubles &#124; it; "thrice": trebles it']
        assert rows["precode(k=2)"][1].count("; ") == 2
        assert rows["dp(noise_multiplier=0.01)"][0].startswith("epsilon = ")
        assert "weak or no protection" in rows["dp(noise_multiplier=0.01)"][0]


# bad input


@pytest.mark.parametrize(
    "spec",
    [
        "prune(ratio=-0.1)", "prune(ratio=1.1)", "prune(ratio=nan)", "clip(norm=0)", "clip(norm=inf)", "dp(clip=0)",
        "dp(noise_multiplier=-1)", "dp(steps=0)", "dp(sampling_rate=0)", "dp(sampling_rate=1.5)", "dp(delta=0)",
        "dp(delta=1)", "soteria(ratio=2)", "soteria(offset=0)", "quantise(bits=0)", "quantise(bits=17)",
        "quantise(bits=double)", "quantise(bits=2.5)", "mixup(alpha=0)", "mixup(alpha=-1)", "ats(policy=3-50)",
        "ats(policy=3--1)", "ats(policy=a)", "ats(policy=3-1-)", "ats(augment=perhaps)",
    ],
)  # fmt: skip
def test_a_strength_out_of_range_is_refused_in_one_line(spec: str) -> None:
    name, _, option = spec.rstrip(")").partition("(")
    with pytest.raises(BadOption, match=f"defense '{name}': option {option.partition('=')[0]}=") as error:
        defenses.parse(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "defense",
    [
        "noise(scale=0.1, relative=true)",
        "noise(scale=0.1, relative=true, kind=laplace)",
        "quantise(bits=half)",
        "quantise(bits=4)",
        "dp(clip=1, noise_multiplier=0.001)",
        "prune(ratio=0.8)",
        "clip(norm=0.1)",
        "soteria(ratio=0.5)",
    ],
)
def test_who_is_informed_does_not_do_worse(defense) -> None:
    data = datasets.parse("samples(size=16)")
    images, labels = data.load([0, 9])
    torch.manual_seed(0)
    network = models.parse("lenet").build(data.image_shape, data.num_classes)
    scores = {}
    for threat in ("paper", "informed=true"):
        seen = leakbench.observe(network, images, labels, defense=defense, threat=threat, seed=1000)
        found = leakbench.attack("lb(steps=60)", seen)
        scores[threat] = float(metrics.parse("psnr_aligned")(found.images, images).mean())
    assert scores["informed=true"] > scores["paper"] - 0.5, scores
