"""The defenses against independent formulas."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import (
    ALL_DEFENSES,
    CLASSES,
    DEFENSES,
    MODELS,
    SHAPE,
    clients,
    close,
    examples,
    rand,
    randn,
    tensors_of,
    watch,
)
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import defenses, models
from leakbench.core.types import Gradient, Normal, Uniform
from leakbench.defenses import Step
from leakbench.defenses.keylock import KeyLock
from leakbench.defenses.precode import VariationalBottleneck
from leakbench.errors import Unsupported
from leakbench.observation import Observation
from leakbench.victim import build

RGB = (3, 32, 32)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def defended(model: str, defense: str, shape: tuple[int, int, int] = RGB, classes: int = 10) -> nn.Module:
    return build(models.parse(model), defenses.parse(defense), shape, classes, "weights")


def only(network: nn.Module, kind: type[nn.Module]) -> nn.Module:
    found = [module for module in network.modules() if isinstance(module, kind)]
    assert len(found) == 1
    return found[0]


def step(network: nn.Module, defense: str, x: Tensor, y: Tensor) -> Step:
    return Step(network, x, y, defenses.parse(defense))


# every defense


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("model", MODELS)
def test_wrapping_leaves_its_argument_unchanged(model: str, defense: str) -> None:
    plain = models.parse(model).build(SHAPE, CLASSES).eval()
    text, values = str(plain), {name: value.clone() for name, value in plain.state_dict().items()}
    wrapped = defenses.parse(defense).wrap(plain)
    assert str(plain) == text
    assert all(torch.equal(value, values[name]) for name, value in plain.state_dict().items())
    assert {module.training for module in wrapped.modules()} == {False}
    if wrapped is not plain:
        assert not {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in wrapped.parameters()}


@pytest.mark.parametrize("defense", ALL_DEFENSES)
def test_hooks_do_not_change_their_arguments(defense: str) -> None:
    method = defenses.parse(defense)
    network = defended("lenet-bn", defense, SHAPE, CLASSES)
    x, y = examples(method)
    kept, known = x.clone(), y.clone()
    coded, labels = method.encode(x, y, torch.Generator())
    assert torch.equal(x, kept)
    assert torch.equal(y, known)
    parameters = {name: value.clone() for name, value in network.named_parameters()}
    sent = method.release(Step(network, coded, labels, method), torch.Generator())
    assert torch.equal(x, kept)
    assert all(torch.equal(value, parameters[name]) for name, value in network.named_parameters())
    shapes = {name: value.shape for name, value in parameters.items()}
    withheld = shapes.keys() - sent.keys()
    assert {name: value.shape for name, value in sent.items()} == {n: s for n, s in shapes.items() if n not in withheld}
    assert bool(withheld) == (defense == "local-norm")
    gradient = {name: 2 * value[None] for name, value in sent.items()}
    observed = {name: value[None].clone() for name, value in sent.items()}
    weights = {name: value[None] for name, value in parameters.items()}
    for attacker in method.attackers().values():
        if attacker.undo is not None:
            attacker.undo(observed, weights)
        dummy = gradient if attacker.surrogate is None else attacker.surrogate(gradient, observed, weights)
        if attacker.likelihood is not None:
            attacker.likelihood(dummy, observed, weights)
    assert all(torch.equal(weights[name][0], value) for name, value in network.named_parameters())
    assert all(torch.equal(gradient[name][0], 2 * sent[name]) for name in sent)
    assert all(torch.equal(observed[name][0], sent[name]) for name in sent)
    text = str(network)
    for attacker in method.attackers().values():
        if attacker.relax is not None:
            attacker.relax(network, {secret.name for secret in method.secrets(network)})
    assert str(network) == text


@pytest.mark.parametrize("defense", DEFENSES)
def test_the_released_gradient_is_that_of_the_clients_loss(defense: str) -> None:
    """Torch's own backward, on the network that the client trains, with what the client drew put in by hand."""
    method = defenses.parse(defense)
    reveal = {secret.group for secret in method.secrets(defended("lenet", defense, SHAPE, CLASSES))}
    observation = watch("lenet", defense, {"reveals": sorted(reveal)}, trials=2)
    plain = defense.partition("(")[0] != "noise"
    for t, client in enumerate(clients(2)):
        network = build(models.parse("lenet"), method, SHAPE, CLASSES, client.weights_key)
        with torch.no_grad():
            for name, tensor in tensors_of(network).items():
                if tensor.is_floating_point():
                    value = observation.weights[name]
                    tensor.copy_(value[t] if value.ndim > tensor.ndim else value)
        method.loss(network, client.image[None], torch.tensor([client.label])).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None
            error = observation.gradient[name][t] - parameter.grad
            if plain:
                torch.testing.assert_close(observation.gradient[name][t], parameter.grad)
            else:
                assert 0 < float(error.abs().max()) < 0.1


def test_per_example_gradients_average_to_the_gradient() -> None:
    network = defended("lenet", "none", SHAPE, CLASSES)
    x, y = rand(3, *SHAPE), torch.tensor([0, 3, 1])
    rows = step(network, "none", x, y).per_example()
    mean = step(network, "none", x, y).gradient()
    for name, parameter in network.named_parameters():
        assert rows[name].shape == (3, *parameter.shape)
        torch.testing.assert_close(rows[name].mean(0), mean[name])
    second = step(network, "none", x[1:2], y[1:2]).gradient()
    assert all(torch.equal(rows[name][1], second[name]) for name in rows)
    assert not torch.equal(rows["classifier.bias"][0], rows["classifier.bias"][1])


def test_the_weights_of_a_step_are_those_before_it() -> None:
    network = defended("lenet", "none", SHAPE, CLASSES)
    network.get_parameter("classifier.bias").requires_grad_(False)
    one = step(network, "none", rand(1, *SHAPE), torch.tensor([1]))
    assert set(one.weights()) == set(one.gradient()) == set(dict(network.named_parameters())) - {"classifier.bias"}
    for name, value in one.weights().items():
        assert torch.equal(value, network.get_parameter(name))
        assert value.data_ptr() != network.get_parameter(name).data_ptr()


# noise


def noise_of(spec: str, trials: int = 4, model: str = "lenet") -> tuple[Tensor, Observation]:
    noisy, clean = (watch(model, defense, trials=trials, shape=RGB, classes=10) for defense in (spec, "none"))
    rows = [(noisy.gradient[name] - clean.gradient[name]).flatten(1) for name in clean.gradient]
    return torch.cat(rows, 1).double(), noisy


@pytest.mark.parametrize("scale", [0.3, 0.02])
@pytest.mark.parametrize(
    ("kind", "fourth", "absolute"), [("gaussian", 3.0, (2 / math.pi) ** 0.5), ("laplace", 6.0, 0.5**0.5)]
)
def test_the_scale_of_noise_is_its_standard_deviation(kind: str, fourth: float, absolute: float, scale: float) -> None:
    noise, _ = noise_of(f"noise(scale={scale}, kind={kind})")
    n = noise.numel()
    assert n == 4 * 15_826
    # variance of the mean, of the mean square, of the mean absolute value and of the mean fourth power; five of their
    # standard deviations
    assert float(noise.mean()) == pytest.approx(0, abs=5 * scale / n**0.5)
    assert float(noise.square().mean()) == pytest.approx(scale**2, abs=5 * scale**2 * ((fourth - 1) / n) ** 0.5)
    assert float(noise.abs().mean()) == pytest.approx(absolute * scale, abs=5 * scale * ((1 - absolute**2) / n) ** 0.5)
    eighth = 105.0 if kind == "gaussian" else 2520.0
    spread = ((eighth - fourth**2) / n) ** 0.5
    assert float((noise / scale).pow(4).mean()) == pytest.approx(fourth, abs=5 * spread)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_is_paired_across_scales_and_independent_across_clients(kind: str) -> None:
    one, _ = noise_of(f"noise(scale=0.1, kind={kind})")
    two, _ = noise_of(f"noise(scale=0.2, kind={kind})")
    again, _ = noise_of(f"noise(scale=0.1, kind={kind})")
    assert torch.equal(one, again)
    torch.testing.assert_close(two, 2 * one, rtol=0, atol=1e-5)
    correlation = torch.corrcoef(one)
    off = correlation[~torch.eye(4, dtype=torch.bool)]
    assert float(off.abs().max()) < 5 / one.shape[1] ** 0.5
    # and independent from one entry to the next
    assert abs(float(torch.corrcoef(torch.stack([one[0, 1:], one[0, :-1]]))[0, 1])) < 5 / one.shape[1] ** 0.5


def test_noise_of_scale_zero_is_none() -> None:
    assert float(noise_of("noise(scale=0)")[0].abs().max()) == 0


# PRECODE


def test_precode_adds_the_published_parameters() -> None:
    """787,968 for a hidden layer of 1,024 and a bottleneck of 256."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 10))
    wrapped = defenses.parse("precode").wrap(network)
    assert count(wrapped) - count(network) == 787_968
    assert [tuple(p.shape) for p in only(wrapped, VariationalBottleneck).parameters()] == [
        (512, 1024),
        (512,),
        (1024, 256),
        (1024,),
    ]


def test_precode_samples_and_decodes() -> None:
    torch.manual_seed(0)
    bottleneck = VariationalBottleneck(5, 3)
    bottleneck.noise = torch.tensor([0.3, -2.0, 1.0])
    f = randn(4, 5)
    encoded = f @ bottleneck.encoder.weight.T + bottleneck.encoder.bias
    mu, sigma = encoded[:, :3], torch.log1p(encoded[:, 3:].exp())
    z = mu + sigma * bottleneck.noise
    torch.testing.assert_close(bottleneck(f), z @ bottleneck.decoder.weight.T + bottleneck.decoder.bias)


@pytest.mark.parametrize("beta", [1e-3, 0.5])
def test_precodes_loss_is_cross_entropy_plus_the_divergence_in_bits(beta: float) -> None:
    method = defenses.parse(f"precode(k=6, beta={beta})")
    network = defended("lenet", f"precode(k=6, beta={beta})", SHAPE, CLASSES)
    x, y = rand(3, *SHAPE), torch.tensor([1, 0, 3])
    bottleneck = only(network, VariationalBottleneck)
    features = network.features(x).flatten(1)
    mu, raw = bottleneck.encoder(features).chunk(2, 1)
    law = torch.distributions.Normal(mu, F.softplus(raw))
    divergence = torch.distributions.kl_divergence(law, torch.distributions.Normal(0.0, 1.0)).sum(1) / math.log(2)
    assert float(divergence.detach().min()) > 0.01
    expected = F.cross_entropy(network(x), y, reduction="none") + beta * divergence
    torch.testing.assert_close(method.loss(network, x, y), expected)
    # and so is its gradient, through both terms
    grads = torch.autograd.grad(expected.mean(), list(network.parameters()))
    sent = Step(network, x, y, method).gradient()
    for (name, _), grad in zip(network.named_parameters(), grads):
        torch.testing.assert_close(sent[name], grad)


@pytest.mark.parametrize("model", ["lenet-bn", "lenet-bn(mode=eval)"])
def test_precode_samples_in_every_mode_anew_for_every_client(model: str) -> None:
    observation = watch(model, "precode(k=6)", {"reveals": ["noise"]}, trials=3)
    (name,) = [name for name in observation.weights if name.endswith("noise")]
    noise = observation.weights[name]
    assert noise.shape == (3, 6)
    assert len({round(float(value), 6) for value in noise.flatten()}) == 18
    network = defended(model, "precode(k=6)", SHAPE, CLASSES)
    bottleneck = only(network, VariationalBottleneck)
    x = rand(2, *SHAPE)
    silent = network(x)
    bottleneck.noise = noise[0]
    assert float((network(x) - silent).detach().abs().max()) > 1e-3


def test_precodes_noise_is_a_fresh_secret_of_a_standard_normal_law() -> None:
    network = defended("lenet", "precode(k=6)", SHAPE, CLASSES)
    (secret,) = defenses.parse("precode(k=6)").secrets(network)
    assert (secret.group, secret.law, secret.fresh) == ("noise", Normal(0, 1), True)
    assert secret.name in dict(network.named_buffers())
    # its layers' gradients are sent, all of them
    assert set(watch("lenet", "precode(k=6)").gradient) == set(dict(network.named_parameters()))


def test_precode_needs_a_linear_classifier() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    with pytest.raises(Unsupported, match="linear classifier"):
        defenses.parse("precode").wrap(network)


# key-lock and its control


def gate(kind: str, value: Tensor) -> Tensor:
    return {"relu": value.clamp(min=0), "sigmoid": 1 / (1 + (-value).exp()), "none": value}[kind]


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "none"])
def test_the_keylock_is_its_equation(kind: str) -> None:
    torch.manual_seed(0)
    lock = KeyLock(4, 7, kind)
    lock.key = rand(7)
    u = randn(1, 4, 5, 6)
    mean, var = u.mean((2, 3), keepdim=True), u.var((2, 3), unbiased=False, keepdim=True)
    gamma = gate(kind, lock.scale.weight @ lock.key + lock.scale.bias)
    beta = gate(kind, lock.shift.weight @ lock.key + lock.shift.bias)
    expected = gamma.view(1, 4, 1, 1) * (u - mean) / (var + 1e-5).sqrt() + beta.view(1, 4, 1, 1)
    torch.testing.assert_close(lock(u), expected)


@pytest.mark.parametrize(
    ("model", "classes", "channels", "total"),
    [
        ("lenet", 10, 12, 40_426),
        ("lenet", 100, 12, 109_636),
        ("lenet-bn", 10, 12, None),
        ("resnet20", 10, 16, None),
    ],
)
def test_the_keylocks_size_and_place(model: str, classes: int, channels: int, total: int | None) -> None:
    network = defended(model, "keylock", RGB, classes)
    lock = only(network, KeyLock)
    expected = {12: 24_600, 16: 32_800}[channels]
    assert count(lock) == 2 * channels * (1024 + 1) == expected
    assert total is None or count(network) == total
    leaves = [
        module
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, KeyLock, nn.Sigmoid, nn.ReLU)) and ".norm" not in name
    ]
    assert isinstance(leaves[0], nn.Conv2d)
    assert isinstance(leaves[1], KeyLock)
    assert isinstance(leaves[2], (nn.Sigmoid, nn.ReLU)), "the lock's normalisation stands in place of the block's own"
    norms = {"lenet": 0, "lenet-bn": 2, "resnet20": 18}[model]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in leaves) == norms
    control = defended(model, "norm-only", RGB, classes)
    assert count(network) - count(control) == expected
    assert sum(isinstance(module, nn.BatchNorm2d) for module in control.modules()) == norms + 1


@pytest.mark.parametrize(("lock_init", "width"), [("default", 16**-0.5), ("uniform", 0.5)])
@pytest.mark.parametrize(("keys", "key_law"), [("uniform", Uniform(0, 1)), ("normal", Normal(0, 1))])
def test_the_laws_of_key_and_lock(keys: str, key_law: object, lock_init: str, width: float) -> None:
    spec = f"keylock(length=16, keys={keys}, lock_init={lock_init})"
    secrets = defenses.parse(spec).secrets(defended("lenet", spec, SHAPE, CLASSES))
    assert [secret.group for secret in secrets] == ["key", *["lock"] * 4]
    assert secrets[0].law == key_law
    assert {secret.law for secret in secrets[1:]} == {Uniform(-width, width)}
    assert not any(secret.fresh for secret in secrets)
    # what the clients draw obeys them
    observation = watch("lenet", spec, {"reveals": ["key", "lock"]}, trials=20)
    key, *lock = (observation.weights[secret.name] for secret in secrets)
    inside = torch.cat([value.flatten() for value in lock])
    assert float(inside.abs().max()) <= width
    n = inside.numel()
    assert float(inside.square().mean()) == pytest.approx(width**2 / 3, abs=5 * width**2 * (4 / 45 / n) ** 0.5)
    n = key.numel()
    if keys == "uniform":
        assert 0 <= float(key.min()) < 0.1 < 0.9 < float(key.max()) < 1
        assert float(key.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / n) ** 0.5)
    else:
        assert float(key.mean()) == pytest.approx(0, abs=5 / n**0.5)
        assert float(key.square().mean()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)


def test_the_lock_has_torchs_default_law() -> None:
    """``nn.Linear`` draws weight and bias from U(-1/sqrt(S), 1/sqrt(S))."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 5000)
    for tensor in (layer.weight, layer.bias):
        assert float(tensor.detach().abs().max()) == pytest.approx(16**-0.5, rel=1e-2)
        assert float(tensor.detach().std()) == pytest.approx(16**-0.5 / 3**0.5, rel=5e-2)


def test_a_zero_lock_gives_constant_logits() -> None:
    network = defended("lenet", "keylock(length=9)", SHAPE, CLASSES)
    lock = only(network, KeyLock)
    lock.key = rand(9)
    x = rand(3, *SHAPE)
    assert not torch.equal(network(x)[0], network(x)[1])
    with torch.no_grad():
        for parameter in lock.parameters():
            parameter.zero_()
    assert torch.equal(network(x)[0], network(x)[1])
    assert torch.equal(network(x)[0], network(x)[2])


@pytest.mark.parametrize("model", MODELS)
def test_norm_only_is_the_keylock_with_scale_one_and_shift_zero(model: str) -> None:
    locked = defended(model, "keylock(length=9)", SHAPE, CLASSES)
    control = defended(model, "norm-only", SHAPE, CLASSES)
    lock = only(locked, KeyLock)
    lock.key = rand(9)
    x = rand(1, *SHAPE)
    assert float((locked(x) - control(x)).detach().abs().max()) > 1e-3
    with torch.no_grad():
        for parameter in lock.parameters():
            parameter.zero_()
        lock.scale.bias.fill_(1)
    torch.testing.assert_close(locked(x), control(x))
    y = torch.tensor([1])
    sent = [list(step(copy.deepcopy(net), "none", x, y).gradient().items()) for net in (locked, control)]
    shared = [[value for name, value in row if "scale" not in name and "shift" not in name] for row in sent]
    for a, b in zip(*shared, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "none"])
@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_the_key_is_read_off_the_locks_gradient(model: str, kind: str) -> None:
    """The key is (dL/dW_gamma)_c / (dL/db_gamma)_c for any live channel c: revealing the lock reveals the key."""
    spec = f"keylock(gate={kind})"
    observation = watch(model, spec, {"reveals": ["lock"]}, trials=2, shape=RGB, classes=10)
    told = watch(model, spec, {"reveals": ["key", "lock"]}, trials=2, shape=RGB, classes=10)
    (name,) = [name for name in observation.gradient if name.endswith("scale.weight")]
    key_name = name.replace("scale.weight", "key")
    assert key_name not in observation.weights
    by_weight, by_bias = observation.gradient[name], observation.gradient[name.replace("weight", "bias")]
    for t in range(2):
        c = int(by_bias[t].abs().argmax())
        assert float(by_bias[t, c].abs()) > 0
        recovered = by_weight[t, c] / by_bias[t, c]
        assert float((recovered - told.weights[key_name][t]).abs().max()) < 1e-5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("defense", ["keylock", "norm-only"])
def test_normalisation_of_one_image_hides_its_contrast(defense: str) -> None:
    network = defended("lenet", defense)
    if defense == "keylock":
        only(network, KeyLock).key = rand(1024)
    plain = defended("lenet", "none")
    x, y = rand(1, *RGB), torch.tensor([3])

    def flat(gradient: Gradient) -> Tensor:
        return torch.cat([value.flatten() for value in gradient.values()])

    def change(net: nn.Module) -> float:
        one, three = (flat(step(copy.deepcopy(net), "none", factor * x, y).gradient()) for factor in (1.0, 3.0))
        return float((one - three).norm() / one.norm())

    assert change(network) < 1e-4
    assert change(plain) > 1e-2
    other = flat(step(copy.deepcopy(network), "none", rand(1, *RGB, seed=9), y).gradient())
    one = flat(step(copy.deepcopy(network), "none", x, y).gradient())
    assert float((one - other).norm() / one.norm()) > 1e-3, "it does depend on the image"


def test_keys_differ_between_clients_and_not_between_observations() -> None:
    first, again = (watch("lenet", "keylock(length=9)", {"reveals": ["key"]}, trials=3) for _ in range(2))
    (name,) = [name for name in first.weights if name.endswith("key")]
    assert torch.equal(first.weights[name], again.weights[name])
    assert len({tuple(row.tolist()) for row in first.weights[name]}) == 3
    close(first.weights[name][0], again.weights[name][0], 1e-12)


def test_the_divergence_of_a_far_off_encoding_is_finite() -> None:
    method = defenses.parse("precode(k=6)")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    wrapped = method.wrap(network)
    with torch.no_grad():
        for module in wrapped.modules():
            if hasattr(module, "encoder"):
                module.encoder.bias[6:] = -120.0  # softplus underflows, its logarithm is -inf
    assert bool(torch.isfinite(method.loss(wrapped, rand(1, *SHAPE), torch.tensor([1]))).all())
