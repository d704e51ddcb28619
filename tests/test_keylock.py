"""Key-lock on every network: its size, one's own network, all blocks, threat levels, and the key from the lock."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping

import pytest
import torch
import torchvision
from conftest import CLASSES, SHAPE, clients, rand, randn, tensors_of, watch
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench import attacks, defenses, models
from leakbench.api import run
from leakbench.attacks.base import prepare
from leakbench.attacks.dlg import DLG
from leakbench.attacks.matching import GradientMatching
from leakbench.core.rng import Rng
from leakbench.core.types import PRESETS
from leakbench.defenses import Defense
from leakbench.defenses.keylock import (
    FreeAffine,
    KeyLock,
    KeyLockDefense,
    get_key,
    locks,
    set_key,
    shared_state,
)
from leakbench.errors import BadOption, Unsupported
from leakbench.gradients import Evaluator, choose_path
from leakbench.gradients.linear import layer_input
from leakbench.plan.matrix import Matrix, parse_threat
from leakbench.victim import build

RGB = (3, 32, 32)


def elements(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# sizes


@pytest.mark.parametrize(
    ("spec", "layers", "parameters", "state", "share"),
    [
        ("lenet", 24_600, 109_636, 109_661, "22.43"),
        ("resnet20(shortcut=conv)", 32_800, 311_092, 312_681, "10.49"),
        ("resnet32(shortcut=conv)", 32_800, 505_524, 508_021, "6.46"),
        ("resnet18(max_pool=false)", 131_200, 11_358_884, 11_368_504, "1.15"),
        ("resnet34(max_pool=false)", 131_200, 21_467_044, 21_484_104, "0.61"),
        ("vgg16", 131_200, 134_809_764, 134_818_225, "0.097"),
    ],
)
def test_the_locks_share_of_the_state_is_the_published_one(
    spec: str, layers: int, parameters: int, state: int, share: str
) -> None:
    """The paper's table 3; every share is that of a network of 100 classes, buffers counted."""
    with torch.device("meta"):
        network = defenses.parse("keylock").wrap(models.parse(spec).build(RGB, 100))
    whole = network.state_dict()
    assert elements(dict(network.named_parameters())) == parameters
    assert elements(whole) == state
    lock = elements(whole) - elements(shared_state(network))
    assert lock == layers
    digits = len(share.partition(".")[2])
    assert f"{100 * lock / state:.{digits}f}" == share


@pytest.mark.parametrize("spec", ["lenet", "lenet-bn", "resnet20", "resnet32(width=3)", "resnet18(width=2)"])
def test_the_arms_differ_in_the_defense_alone(spec: str) -> None:
    shape = (1, 33, 33)
    arms = {
        defense: build(models.parse(spec), defenses.parse(defense), shape, 5, "weights")
        for defense in ("none", "norm-only", "keylock(length=6)")
    }
    shared = {name: shared_state(network) for name, network in arms.items()}
    kernels = [[v for v in state.values() if v.ndim == 4] for state in shared.values()]
    assert all(torch.equal(a, b) for other in kernels[1:] for a, b in zip(kernels[0], other, strict=True))
    plain, control, locked = (dict(network.named_parameters()) for network in arms.values())
    (lock,) = locks(arms["keylock(length=6)"]).values()
    channels = lock.scale.out_features
    normed = any(isinstance(module, nn.BatchNorm2d) for module in list(arms["none"].modules())[:4])
    assert elements(control) == elements(plain) - 2 * channels * (normed or spec != "lenet")
    assert elements(locked) == elements(control) + 2 * channels * 7


# one's own network


class Odd(nn.Module):
    """A made-up network: two branches, a grouped convolution, no normalisation, a functional activation."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.stem = nn.Conv2d(3, 6, 5, stride=3, groups=3)
        self.left = nn.Conv2d(6, 6, 1)
        self.right = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(torch.cat([self.left(x), F.gelu(self.right(x))], 1).mean((2, 3)))


TORCHVISION = ["resnet18", "vgg16", "mobilenet_v3_small", "densenet121", "efficientnet_b0"]


def network_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "odd":
            return Odd()
        if name == "vgg16":  # with one linear layer in place of the three, which are half a gigabyte
            with torch.device("meta"):
                network = torchvision.models.vgg16()
                network.classifier = nn.Linear(512 * 49, 5)
            for value in network.to_empty(device="cpu").parameters():
                nn.init.normal_(value, 0, 0.05)
            return network
        options = {"memory_efficient": False} if name == "densenet121" else {}
        return torchvision.models.get_model(name, weights=None, num_classes=5, **options)


@pytest.mark.parametrize("name", [*TORCHVISION, "odd"])
def test_any_network_with_convolutions_takes_the_lock(name: str) -> None:
    network = network_of(name)
    text, values = str(network), {key: value.clone() for key, value in network.state_dict().items()}
    drawn = torch.get_rng_state()
    locked = leakbench.keylock(network, length=8, rng=seeded())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert str(network) == text
    assert all(torch.equal(value, values[key]) for key, value in network.state_dict().items())
    (lock,) = locks(locked).values()
    convolution = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert lock.scale.out_features == convolution.out_channels
    x = rand(4, 3, 64, 64)

    # training: the lock's weights have a gradient, and its normalisation sees the data
    locked.train()
    F.cross_entropy(locked(x), torch.tensor([0, 1, 2, 3])).backward()
    for layer in (lock.scale, lock.shift):
        assert layer.weight.grad is not None
        assert float(layer.weight.grad.abs().max()) > 0
    assert float(lock.norm.running_mean.abs().max()) > 0
    assert locked.get_submodule("") is locked

    # inference: with the key, without it, with another
    locked.eval()
    with torch.no_grad():
        mine = locked(x)
        key = get_key(locked)
        set_key(locked, None)
        assert float(get_key(locked).abs().max()) == 0
        without = locked(x)
        set_key(locked, rand(8, seed=5))
        wrong = locked(x)
        set_key(locked, key)
        assert torch.equal(locked(x), mine)
    assert mine.shape == network.eval()(x).shape
    for other in (without, wrong):
        assert bool(torch.isfinite(other).all())
        assert float((other - mine).abs().max()) > 0


@pytest.mark.parametrize("name", ["resnet18", "odd"])
@pytest.mark.parametrize("layers", ["first", "all"])
def test_states_are_saved_and_loaded_without_the_key(name: str, layers: str) -> None:
    network = network_of(name).eval()
    mine = leakbench.keylock(network, length=8, layers=layers, rng=seeded(1))  # type: ignore[arg-type]
    other = leakbench.keylock(network, length=8, layers=layers, rng=seeded(2))  # type: ignore[arg-type]
    x = rand(2, 3, 64, 64)
    state = mine.state_dict()
    assert not any(value.shape == (8,) and torch.equal(value, get_key(mine)) for value in state.values())
    other.load_state_dict(state)
    assert not torch.equal(other(x), mine(x)), "the key is still another"
    set_key(other, get_key(mine))
    assert torch.equal(other(x), mine(x))
    # what a client sends loads into another client's network, and leaves its lock as it is
    sent = shared_state(mine)
    third = leakbench.keylock(network, length=8, layers=layers, rng=seeded(3))  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in third.state_dict().items()}
    report = third.load_state_dict(sent, strict=False)
    assert report.unexpected_keys == []
    assert (
        set(report.missing_keys) == set(before) - set(sent) == {n for n in before if ".scale." in n or ".shift." in n}
    )
    assert all(torch.equal(third.state_dict()[key], before[key]) for key in report.missing_keys)


def test_a_locked_network_learns_with_its_key() -> None:
    """Four textures: an ordinary loop lowers the loss, and the opposite of the key does not read them."""
    labels = torch.arange(4).repeat(8)
    grid = torch.arange(12.0)
    patterns = torch.stack([
        torch.sin(grid)[None].expand(12, 12), torch.sin(grid)[:, None].expand(12, 12),
        torch.sin(grid[None] + grid[:, None]), torch.sin(grid[None] - grid[:, None]),
    ])  # fmt: skip
    images = patterns[labels][:, None] + 0.1 * randn(32, 1, 12, 12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
    locked = leakbench.keylock(network, length=16, gate="none", rng=seeded())
    key = get_key(locked)
    optimiser = torch.optim.Adam(locked.parameters(), lr=0.03)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.cross_entropy(locked(images), labels)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < 1 < losses[0]
    assert torch.equal(get_key(locked), key), "training leaves the key as it is"
    locked.eval()
    with torch.no_grad():
        assert float((locked(images).argmax(1) == labels).float().mean()) > 0.9
        set_key(locked, -key)
        assert float((locked(images).argmax(1) == labels).float().mean()) < 0.9


def test_the_lock_takes_over_trained_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-3))
    network(5 + rand(8, 1, 9, 9))
    network.eval()
    locked = leakbench.keylock(network, length=3, gate="none", rng=seeded())
    (lock,) = locks(locked).values()
    with torch.no_grad():
        for parameter in lock.parameters():
            parameter.zero_()
        lock.scale.bias.fill_(1)
    x = rand(2, 1, 9, 9)
    torch.testing.assert_close(locked(x), network(x))


def test_draws_come_from_the_generator() -> None:
    network = Odd()
    first, again, other = (leakbench.keylock(network, length=5, rng=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(get_key(first), get_key(again))
    assert not torch.equal(get_key(first), get_key(other))
    ours, theirs = first.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(get_key(leakbench.keylock(network)), get_key(leakbench.keylock(network)))
    assert float(get_key(leakbench.keylock(network, keys="normal", rng=seeded())).min()) < 0


def test_what_cannot_be_locked_is_told() -> None:
    with pytest.raises(Unsupported, match="no 2-d convolution"):
        leakbench.keylock(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(BadOption, match="already"):
        leakbench.keylock(leakbench.keylock(Odd()))
    with pytest.raises(BadOption, match="give an nn"):
        leakbench.keylock("resnet18")  # type: ignore[arg-type]
    with pytest.raises(BadOption, match="length=0"):
        leakbench.keylock(Odd(), length=0)
    with pytest.raises(BadOption, match="no key-lock"):
        get_key(Odd())
    with pytest.raises(BadOption, match=r"\(3,\).*\(1024,\)"):
        set_key(leakbench.keylock(Odd()), torch.zeros(3))


# a lock in every block


def test_each_block_is_keyed_by_the_block_before() -> None:
    """Against the equations, written out."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    locked = leakbench.keylock(network, length=6, layers="all", gate="sigmoid", rng=seeded())
    first, second = locks(locked).values()
    assert (first.previous, second.previous) == (None, first)
    assert second.scale.in_features == 8

    def normal(u: Tensor) -> Tensor:
        var, mean = torch.var_mean(u, (0, 2, 3), correction=0, keepdim=True)
        return (u - mean) / (var + 1e-5).sqrt()

    def gates(lock: KeyLock, key: Tensor) -> list[Tensor]:
        return [torch.sigmoid(layer.weight @ key + layer.bias) for layer in (lock.scale, lock.shift)]

    x = rand(2, 1, 8, 8)
    gamma, beta = gates(first, get_key(locked))
    h = torch.sigmoid(gamma.view(4, 1, 1) * normal(network[0](x)) + beta.view(4, 1, 1))
    gamma, beta = gates(second, torch.cat([gamma, beta]))
    torch.testing.assert_close(locked(x), gamma.view(3, 1, 1) * normal(network[3](h)) + beta.view(3, 1, 1))


@pytest.mark.parametrize(
    ("spec", "count"), [("lenet", 3), ("lenet-bn", 3), ("resnet20", 19), ("resnet18(width=2, stem=cifar)", 20)]
)
def test_all_blocks_are_locked_on_every_network(spec: str, count: int) -> None:
    shape = (1, 20, 20)
    locked = build(models.parse(spec), defenses.parse("keylock(length=6, layers=all)"), shape, 5, "weights")
    found = list(locks(locked).values())
    assert len(found) == count
    assert [lock.previous is not None for lock in found] == [False] + [True] * (count - 1)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in locked.modules()) == count
    secrets = defenses.parse("keylock(length=6, layers=all)").secrets(locked)
    assert [secret.group for secret in secrets].count("key") == 1
    assert [secret.group for secret in secrets].count("lock") == 4 * count
    control = build(models.parse(spec), defenses.parse("norm-only(layers=all)"), shape, 5, "weights")
    assert not any(m.affine for m in control.modules() if isinstance(m, nn.BatchNorm2d))
    lock_parameters = elements(locked.state_dict()) - elements(shared_state(locked))
    assert elements(dict(locked.named_parameters())) - lock_parameters == elements(dict(control.named_parameters()))


def test_a_copy_of_a_chain_is_keyed_by_its_own_locks() -> None:
    locked = leakbench.keylock(Odd(), length=4, layers="all", rng=seeded())
    twin = copy.deepcopy(locked)
    x = rand(1, 3, 16, 16)
    before = twin(x)
    set_key(locked, None)
    assert torch.equal(twin(x), before)
    set_key(twin, None)
    assert not torch.equal(twin(x), before)
    assert torch.equal(twin(x), locked(x))


@pytest.mark.parametrize("spec", ["lenet", "lenet-bn(mode=eval)", "resnet20(width=4, activation=sigmoid)"])
def test_a_chain_is_evaluated_for_all_trials_at_once(spec: str) -> None:
    observation = watch(spec, "keylock(length=9, layers=all, gate=sigmoid)", {"reveals": ["key", "lock"]})
    evaluator = Evaluator(observation.model, tuple(observation.gradient))
    assert choose_path(evaluator, observation.weights, SHAPE, CLASSES) == "batched"
    for name in observation.gradient:
        assert ".key" not in name
    lock_names = [name for name in observation.gradient if ".scale." in name or ".shift." in name]
    assert len(lock_names) == 4 * len(locks(observation.model))
    assert not set(lock_names) & set(watch(spec, "keylock(length=9, layers=all)").gradient)


# the key from the lock's gradients


def derived(observation: leakbench.Observation) -> leakbench.Observation:
    """Return what an attack on a shared gradient is given."""
    return prepare(attacks.parse("ig"), observation)[1]


@pytest.mark.parametrize("kind", ["relu", "sigmoid", "none"])
@pytest.mark.parametrize("layers", ["first", "all"])
@pytest.mark.parametrize("spec", ["lenet", "resnet20", "resnet20(mode=eval, activation=sigmoid)"])
def test_shared_lock_gradients_are_the_key(spec: str, layers: str, kind: str) -> None:
    """The key is (dL/dW)_c / (dL/db)_c for every live row c, so T4 grants an informed attacker what T5 does."""
    defense = f"keylock(gate={kind}, layers={layers})"
    told = watch(spec, defense, {"reveals": ["lock", "key"]}, shape=RGB, classes=10, trials=3)
    informed = watch(spec, defense, {"reveals": ["lock"], "informed": True}, shape=RGB, classes=10, trials=3)
    (secret,) = informed.secrets
    assert secret.group == "key"
    assert secret.name not in informed.weights
    known = derived(informed)
    assert known.secrets == ()
    truth = told.weights[secret.name]
    assert truth.shape == (3, 1024)
    assert float((known.weights[secret.name] - truth).abs().max()) < 1e-5
    assert set(known.weights) == set(told.weights)
    assert informed.secrets == (secret,), "the observation itself is left as it is"


def test_the_key_is_recovered_only_with_the_lock_and_the_defense_known() -> None:
    for threat in (
        {"reveals": ["lock"]},
        {"informed": True},
        {"informed": True, "reveals": ["lock-weights"]},
    ):
        observation = watch("lenet", "keylock(length=9)", threat)
        assert derived(observation).secrets == observation.secrets != ()
    observation = watch("lenet", "noise", {"informed": True})
    assert dict(derived(observation).weights) == dict(observation.weights)


# scale and shift free


def relax(
    defense: Defense, model: nn.Module, hidden: Collection[str]
) -> tuple[nn.Module, tuple[leakbench.Secret, ...]]:
    function = defense.attackers()["default"].relax
    assert function is not None
    return function(model, hidden)


def test_an_adaptive_attacker_without_key_optimises_scale_and_shift() -> None:
    defense = defenses.parse("keylock(length=9)")
    model = watch("lenet", defense).model
    hidden = {secret.name for secret in defense.secrets(model)}
    assert relax(defense, model, ()) == (model, ()), "who knows everything has nothing to optimise"
    relaxed, found = relax(defense, model, hidden)
    assert locks(model)
    assert not locks(relaxed)
    assert defense.secrets(relaxed) == ()
    assert [secret.name.rpartition(".")[2] for secret in found] == ["gamma", "beta"]
    (own,) = (module for module in relaxed.modules() if isinstance(module, FreeAffine))
    assert own.gamma.shape == own.beta.shape == (12,)
    everywhere = defenses.parse("keylock(length=9, layers=all)")
    deep = watch("lenet", everywhere).model
    assert len({secret.name for secret in relax(everywhere, deep, ["0.key", *hidden])[1]}) == 6


@pytest.mark.usefixtures("float64")
def test_free_scale_and_shift_compute_what_the_lock_does() -> None:
    network = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU())
    locked = leakbench.keylock(network, length=9, gate="sigmoid", rng=seeded())
    defense = KeyLockDefense(length=9)
    relaxed, _ = relax(defense, locked, [secret.name for secret in defense.secrets(locked)])
    ((name, lock),) = locks(locked).items()
    free = relaxed.get_submodule(name)
    free.gamma, free.beta = (value.detach() for value in lock.coefficients())
    x = rand(3, *SHAPE)
    torch.testing.assert_close(relaxed(x), locked(x), rtol=1e-12, atol=1e-12)


def drawn(defense: KeyLockDefense, locked: nn.Module, rng: torch.Generator) -> None:
    for secret in defense.secrets(locked):
        value = tensors_of(locked)[secret.name]
        value.data.copy_(secret.law.draw(tuple(value.shape), rng))


@pytest.mark.parametrize("gate", ["relu", "sigmoid", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"lock_init": "uniform"}, {"keys": "normal"}, {"drift": 2.0}, {"layers": "all"}], ids=str
)
def test_the_search_starts_at_the_mean_gate_of_random_locks(gate: str, options: dict[str, object]) -> None:
    """Scale and shift alike, and in a chain every lock by the law of its own key; measured on drawn locks."""
    defense = KeyLockDefense(length=200, gate=gate, **options)
    locked = defense.wrap(nn.Sequential(nn.Conv2d(1, 300, 1), nn.Conv2d(300, 300, 1)))
    secrets, rng = defense.secrets(locked), seeded()
    sizes: dict[str, list[Tensor]] = {}
    for _ in range(4):
        drawn(defense, locked, rng)
        for name, lock in locks(locked).items():
            for kind, value in zip(("gamma", "beta"), lock.coefficients()):
                sizes.setdefault(f"{name}.{kind}", []).append(value.detach().abs())
    _, starts = relax(defense, locked, [secret.name for secret in secrets])
    assert [start.name for start in starts] == list(sizes)
    for start in starts:
        values = start.law.draw((4000,), seeded(1))
        assert float(values.mean()) == pytest.approx(float(torch.cat(sizes[start.name]).mean()), rel=0.15)
        assert float(values.std()) > 0, "several starts differ"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gate", ["relu", "sigmoid"])
def test_training_moves_a_lock_by_one_number_a_channel(gate: str) -> None:
    """Steps of SGD with one key add a multiple of it to every row: a lock with this drift computes the same."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, CLASSES))
    locked = leakbench.keylock(network, length=9, gate=gate, rng=seeded())
    (lock,) = locks(locked).values()
    before = copy.deepcopy(lock)
    optimiser = torch.optim.SGD(locked.parameters(), lr=0.5)
    for step in range(5):
        optimiser.zero_grad()
        nn.functional.cross_entropy(locked(rand(4, 1, 8, 8, seed=step)), torch.arange(4) % CLASSES).backward()
        optimiser.step()
    stale = KeyLock(6, 9, gate, drift=True)
    stale.load_state_dict(before.state_dict())
    stale.key.copy_(lock.key)
    for layer in ("scale", "shift"):
        now, then = getattr(lock, layer), getattr(before, layer)
        moved = (now.bias - then.bias).detach()
        torch.testing.assert_close(
            (now.weight - then.weight).detach(), moved[:, None] * lock.key, rtol=1e-9, atol=1e-12
        )
        getattr(stale, f"{layer}_drift").copy_(moved * (1 + lock.key.square().sum()))
        assert float(moved.abs().max()) > 1e-4
    for found, expected in zip(stale.coefficients(), lock.coefficients()):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def gates(tensors: Mapping[str, Tensor], path: str, key: Tensor, drift: bool = False) -> Tensor:
    """Return gamma and beta [T, 2, C] of locks with sigmoid gates and keys [T, S]."""
    found = []
    for layer in ("scale", "shift"):
        weight, bias = (tensors[f"{path}.{layer}.{tensor}"] for tensor in ("weight", "bias"))
        before = torch.einsum("tcs,ts->tc", weight, key) + bias
        found.append(torch.sigmoid(before + tensors[f"{path}.{layer}_drift"] if drift else before))
    return torch.stack(found, 1)


@pytest.mark.usefixtures("float64")
def test_the_search_starts_at_what_a_stale_lock_makes_of_the_mean_key() -> None:
    spec = "keylock(length=400, gate=sigmoid, lock_init=uniform, drift=0.3)"
    everything = watch("lenet", spec, "reveals=lock+key+drift").weights
    (path,) = locks(watch("lenet", spec).model)
    for name, value in watch("lenet", spec.replace("0.3", "0"), "T5").weights.items():
        assert torch.equal(value, everything[name]), "key and initial lock are drawn as without drift"
    truth = gates(everything, path, everything[f"{path}.key"], drift=True)
    away = {}
    for name in ("true", "free"):
        observation = watch("lenet", spec, f"reveals=lock-weights, labels=known, informed={name}")
        assert {secret.group for secret in observation.secrets} == {"key", "drift"}
        acting, known = prepare(attacks.parse("ig(steps=5)"), observation)
        assert isinstance(acting, GradientMatching)
        objective = acting._objective(known, Rng(("first", "second"))).with_path()
        assert not any(".scale." in sent for sent in objective.observation.gradient)
        begin = acting._begin(objective)
        sought = [f"secret:{path}.{kind}" for kind in ("gamma", "beta")]
        base = gates(objective.tensors, path, torch.full((2, 400), 0.5)) if name == "true" else torch.zeros_like(truth)
        away[name] = float((base + torch.stack([begin[kind] for kind in sought], 1) - truth).square().mean())
        exact = dict(zip(sought, (truth - base).unbind(1)))
        images = torch.stack([client.image for client in clients(2)])
        match = objective.match({**begin, **exact, "image": images}, 0).detach()
        assert float(match.abs().max()) < 1e-12, "with scale and shift nothing is left"
        assert float(objective.match({**begin, "image": images}, 0).detach().min()) > 1e-9
    assert away["true"] < 0.75 * away["free"]


def test_scale_and_shift_are_sought_only_where_key_or_lock_are_hidden() -> None:
    attack = attacks.parse("ig(steps=5)")
    assert isinstance(attack, GradientMatching)
    begin = {}
    for level in ("informed=true", "reveals=lock+key, informed=true", "reveals=lock, informed=true", "T0"):
        _, known = prepare(attack, watch("lenet", "keylock(length=9)", level))
        begin[level] = set(attack._begin(attack._objective(known, Rng(("first", "second")))))
    names = [name.rpartition(".")[2] for name in begin.pop("informed=true") - {"image"}]
    assert sorted(names) == ["beta", "gamma"]
    assert set(map(frozenset, begin.values())) == {frozenset({"image"})}
    informed = leakbench.attack("ig(steps=5)", watch("lenet", "keylock(length=9)", "informed=true"))
    assert not bool(informed.failed.any())


def test_recovery_is_exact_for_tiny_huge_and_dead_rows() -> None:
    key = rand(3, 50, seed=4)
    for scale in (1e-30, 1.0, 1e30):
        by_bias = scale * randn(3, 8)
        by_bias[:, ::2] = 0
        torch.testing.assert_close(layer_input(by_bias[..., None] * key[:, None], by_bias), key, rtol=1e-5, atol=1e-6)
    by_bias = torch.zeros(3, 8)
    by_bias[1, 2] = 1
    found = layer_input(by_bias[..., None] * key[:, None], by_bias)
    assert torch.equal(found[[0, 2]], torch.zeros(2, 50))
    torch.testing.assert_close(found[1], key[1])
    broken = by_bias.clone()
    broken[0, 0] = torch.nan
    kept = layer_input(broken[..., None] * key[:, None], broken)
    assert torch.equal(kept[1], found[1]), "one row's NaN stays in its row"


@pytest.mark.parametrize("attack", ["ig(steps=3)", "ig(steps=3, signed=false)"])
def test_an_adaptive_attacker_with_the_lock_does_as_well_as_with_all(attack: str) -> None:
    """Through the library: the same reconstruction as if the key had been handed over."""
    network = models.parse("lenet").build(SHAPE, CLASSES)
    x, y = torch.stack([rand(*SHAPE, seed=s) for s in (1, 2)]), torch.tensor([0, 3])

    def attacked(threat: str) -> Tensor:
        return leakbench.attack(
            attack, leakbench.observe(network, x, y, defense="keylock(length=9)", threat=threat)
        ).images

    worked_out = attacked("reveals=lock, informed=true, labels=known")
    torch.testing.assert_close(worked_out, attacked("reveals=lock+key, informed=true, labels=known"), atol=1e-3, rtol=0)
    assert not torch.allclose(worked_out, attacked("reveals=lock, labels=known"), atol=1e-3)


# threat levels


LEVELS = {"T0": (), "T1": ("lock values",), "T2": ("lock values",), "T3": ("lock values", "key"),
          "T4": ("lock values", "lock gradients"), "T5": ("lock values", "lock gradients", "key")}  # fmt: skip


@pytest.mark.parametrize(("name", "granted"), LEVELS.items())
def test_what_each_level_grants(name: str, granted: tuple[str, ...]) -> None:
    observation = watch("lenet", "keylock(length=9)", name)
    network = build(models.parse("lenet"), defenses.parse("keylock(length=9)"), SHAPE, CLASSES, "weights 0")
    (lock,) = locks(network)
    layers = {f"{lock}.{layer}.{tensor}" for layer in ("scale", "shift") for tensor in ("weight", "bias")}
    assert (layers <= set(observation.weights)) == ("lock values" in granted)
    assert (layers <= set(observation.gradient)) == ("lock gradients" in granted)
    assert (f"{lock}.key" in observation.weights) == ("key" in granted)
    assert {**dict.fromkeys(observation.weights), **dict.fromkeys(s.name for s in observation.secrets)}.keys() == set(
        tensors_of(network)
    )
    assert observation.threat.spec() == name
    assert observation.threat.optimises == (name == "T2")


def test_levels_are_lines_of_their_own() -> None:
    words = [PRESETS[name].describe() for name in LEVELS]
    assert len(set(words)) == len(words)
    assert "optimises" in PRESETS["T2"].describe()
    assert PRESETS["T0"] == PRESETS["paper"]
    assert (PRESETS["T0"].spec(), PRESETS["paper"].spec()) == ("T0", "paper")
    assert parse_threat({"reveals": ["lock"]}).spec() == "T4"
    assert parse_threat("reveals=lock-weights, optimises=true") == PRESETS["T2"]


def test_t2_searches_for_the_key_and_t1_does_not() -> None:
    method = attacks.parse("ig(steps=2)")
    t1, t2 = (watch("lenet", "keylock(length=9)", level) for level in ("T1", "T2"))
    assert prepare(method, t1)[0] is method
    assert attacks.spec(prepare(method, t2)[0]) == "ig(steps=2, secrets=optimise)"
    floor = attacks.parse("grey")
    assert prepare(floor, t2)[0] is floor
    found = [leakbench.attack("ig(steps=5)", observation).images for observation in (t1, t2)]
    assert not torch.equal(*found)
    assert torch.equal(found[1], leakbench.attack("ig(steps=5, secrets=optimise)", t1).images)


class Stubborn(leakbench.Attack):
    """Returns grey, and has no option."""

    def run(self, observation: leakbench.Observation, rng: leakbench.Rng) -> leakbench.Reconstruction:
        return leakbench.Reconstruction(observation.mean_image.expand(observation.trials, *observation.image_shape))


def test_an_attack_that_cannot_search_is_unsupported_under_t2(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.raises(Unsupported, match="cannot optimise secrets"):
        prepare(Stubborn(), watch("lenet", "keylock(length=9)", "T2"))
    matrix = Matrix(
        attacks=[dataclasses.dataclass(frozen=True)(Stubborn)(), DLG(steps=1)],
        defenses=["keylock(length=9)"],
        models=["lenet"],
        datasets=["samples(size=8)"],
        threats=["T0", "T2", "T5"],
        images=1,
    )
    results = run(matrix, tmp_path).results()  # type: ignore[arg-type]
    status = results.set_index(["threat", "attack"])["status"]
    assert status["T2", "Stubborn"] == "unsupported"
    assert status["T0", "Stubborn"] == "ok"
    assert set(results["threat"]) == {"T0", "T2", "T5"}
    assert set(status["T2"].index) == set(status["T5"].index) == {"random", "grey", "mean", "Stubborn", "dlg(steps=1)"}
