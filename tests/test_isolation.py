"""Nothing private is reachable from what the server sees."""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import ALL_DEFENSES, ON_WEIGHTS, SALT, SMALL, rand, watch
from torch import Tensor, nn

import leakbench
from leakbench import Dataset, Reconstruction, attacks, clients, defenses, models
from leakbench.attacks.base import prepare
from leakbench.attacks.matching import GradientMatching
from leakbench.core.rng import Rng, generator, salted
from leakbench.core.types import PRESETS, ThreatModel
from leakbench.defenses import Defense
from leakbench.engine.isolation import Isolation
from leakbench.engine.worker import attack_key, companions
from leakbench.models import OwnModule
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix
from leakbench.plan.trial import Trial
from leakbench.victim import Client, build, observe

SHAPE = (1, 8, 8)
CLASSES = 60
LABELS = (37, 41, 53)  # numbers that stand for nothing else in a small network


def crowd(fresh: bool = False) -> list[Client]:
    return [
        Client(
            rand(*SHAPE, seed=100 + t),
            label,
            f"weights {t if fresh else 0}",
            f"private key {t}",
            ((rand(*SHAPE, seed=200 + t), 59),),
        )
        for t, label in enumerate(LABELS)
    ]


def see(defense: Defense, threat: ThreatModel, model: models.Model | str = "lenet", fresh: bool = False) -> Observation:
    return observe(models.parse(model), defense, threat, crowd(fresh), CLASSES, torch.full(SHAPE, 0.5))


def reachable(root: object) -> Iterator[tuple[str, object]]:
    """Yield (path, object) for everything that can be reached from ``root`` without importing anything."""
    seen: dict[int, object] = {}  # keeps what was seen alive, so that no id is used twice
    stack: list[tuple[str, object]] = [("", root)]
    while stack:
        path, item = stack.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        yield path, item
        stack.extend((f"{path}{step}", child) for step, child in children(item))


def children(item: object) -> Iterator[tuple[str, object]]:
    if isinstance(item, (str, bytes, int, float, complex, bool, type(None), types.ModuleType, torch.dtype)):
        return
    if isinstance(item, Mapping):
        for key, value in item.items():
            yield f"[{key!r}]", value
            yield f".keys[{key!r}]", key
    elif isinstance(item, (list, tuple, set, frozenset)) or type(item).__name__ in ("deque", "odict_values"):
        for index, value in enumerate(item):
            yield f"[{index}]", value
    if isinstance(item, types.CellType):
        try:
            yield ".cell", item.cell_contents
        except ValueError:  # an empty cell
            return
    if isinstance(item, types.FunctionType):
        yield from ((".closure", item.__closure__), (".defaults", item.__defaults__), (".kw", item.__kwdefaults__))
    if isinstance(item, (types.MethodType, types.BuiltinMethodType)):
        yield ".self", item.__self__
        yield ".func", getattr(item, "__func__", None)
    if isinstance(item, functools.partial):
        yield from ((".func", item.func), (".args", item.args), (".keywords", item.keywords))
    if isinstance(item, property):
        yield from ((".fget", item.fget), (".fset", item.fset))
    if isinstance(item, (staticmethod, classmethod)):
        yield ".func", item.__func__
    if isinstance(item, types.GeneratorType):
        yield ".locals", item.gi_frame.f_locals if item.gi_frame else None
    if isinstance(item, Tensor):
        yield ".base", item._base
        yield ".grad_fn", item.grad_fn
        if item.is_leaf:
            yield ".grad", item.grad
        yield ".hooks", item._backward_hooks
    if type(item).__module__ == "torch.autograd" or hasattr(item, "next_functions"):
        for name in dir(item):
            if name.startswith("_saved_") or name in ("variable", "next_functions", "saved_tensors"):
                try:
                    yield f".{name}", getattr(item, name)
                except RuntimeError:  # freed, or not there
                    continue
    if isinstance(item, type):
        if item.__module__.startswith("leakbench") or "test" in item.__module__:
            # the number of a line of source, which Python 3.13 keeps, may equal a label
            yield ".__dict__", {name: value for name, value in vars(item).items() if name != "__firstlineno__"}
            yield ".__bases__", item.__bases__
        return
    yield ".__dict__", getattr(item, "__dict__", None)
    for name in itertools.chain.from_iterable(getattr(kind, "__slots__", ()) for kind in type(item).__mro__):
        if hasattr(item, name) and not name.startswith("__"):
            yield f".{name}", getattr(item, name)
    if type(item).__module__.startswith("leakbench") or "test" in type(item).__module__:
        yield ".class", type(item)


@dataclass
class Private:
    """What must not be found: tensors by name, labels, numbers, and the strings from which draws could be repeated."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    labels: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()
    classes: int = CLASSES

    def found_in(self, root: object) -> list[str]:
        storages = {name: value.untyped_storage().data_ptr() for name, value in self.tensors.items()}
        found = []
        for path, item in reachable(root):
            if isinstance(item, torch.Generator):
                found.append(f"a generator at {path}")
            elif isinstance(item, str):
                found += [f"{word!r} at {path}" for word in self.words if word in item]
            elif isinstance(item, (int, np.integer)) and not isinstance(item, bool) and int(item) in self.labels:
                found.append(f"label {item} at {path}")
            elif isinstance(item, float) and item in self.numbers:
                found.append(f"{item} at {path}")
            elif isinstance(item, np.ndarray):
                found += self._like(torch.from_numpy(item.copy()), path)
            elif isinstance(item, Tensor) and item.device.type != "meta":
                found += [f"the storage of {n} at {path}" for n in storages if self._shares(item, storages[n])]
                found += self._like(item.detach(), path)
        return found

    def _like(self, item: Tensor, path: str) -> list[str]:
        found = []
        whole = self._rows(item)
        for name, value in self.tensors.items():
            flat = value.detach().flatten().to(item.dtype)
            size = flat.numel()
            if size and item.numel() >= size and item.numel() % size == 0 and bool((flat != flat[0]).any()):
                rows = whole.reshape(-1, size)
                if bool((rows == flat).all(1).any()):
                    found.append(f"{name} at {path}")
        labels = torch.tensor(self.labels)
        if self.labels and item.numel() <= 8 and bool(torch.isin(item.flatten().double(), labels.double()).any()):
            found.append(f"a label in a tensor at {path}")
        if self.numbers and item.numel() <= 8:
            secret = torch.tensor(self.numbers, dtype=torch.float64)
            if bool(torch.isclose(item.flatten().double()[:, None], secret, rtol=1e-6, atol=0).any()):
                found.append(f"a number in a tensor at {path}")
        if self.labels and item.ndim and item.shape[-1] == self.classes:
            hot = torch.eye(self.classes)[labels]
            rows = whole.reshape(-1, self.classes).float()
            if bool((rows[:, None] == hot).all(2).any()):
                found.append(f"a one-hot label at {path}")
        return found

    @staticmethod
    def _rows(item: Tensor) -> Tensor:
        return item.contiguous().flatten()

    @staticmethod
    def _shares(item: Tensor, pointer: int) -> bool:
        try:
            return item.untyped_storage().data_ptr() == pointer != 0
        except NotImplementedError:
            return False


def groups_of(defense: Defense) -> set[str]:
    network = build(models.parse("lenet"), defense, SHAPE, CLASSES, "weights 0")
    return {secret.group for secret in defense.secrets(network)}


def secret_names(defense: Defense, group: str) -> list[str]:
    network = build(models.parse("lenet"), defense, SHAPE, CLASSES, "weights 0")
    return [secret.name for secret in defense.secrets(network) if secret.group == group]


def split(defense: Defense, threat: ThreatModel) -> tuple[Private, dict[str, Tensor], dict[str, Tensor]]:
    """Return what must be hidden, and the secret values and gradients that must be there, under a threat model."""
    full = see(defense, replace(threat, reveals=frozenset(groups_of(defense))))
    private = Private({}, () if threat.labels == "known" else LABELS, tuple(client.key for client in crowd()))
    for t, client in enumerate(crowd()):
        private.tensors[f"image {t}"] = client.image
        ((other, label),) = client.companions
        private.tensors[f"companion {t}"] = other
        x, y = client.image[None], torch.tensor([client.label])
        if defense.companions:
            x, y = torch.stack([client.image, other]), torch.eye(CLASSES)[[client.label, label]]
        private.tensors[f"encoded image {t}"], _ = defense.encode(x, y, generator(client.key, "encode"))
    values, gradients = {}, {}
    for group in groups_of(defense):
        for name in secret_names(defense, group):
            if threat.reveals & {group, f"{group}-weights"}:
                values[name] = full.weights[name]
            else:
                private.tensors |= {f"{name} of {t}": full.weights[name][t] for t in range(len(LABELS))}
            if name not in full.gradient:
                continue
            if group in threat.reveals:
                gradients[name] = full.gradient[name]
            else:
                private.tensors |= {f"gradient of {name} of {t}": full.gradient[name][t] for t in range(len(LABELS))}
    return private, values, gradients


@dataclass(frozen=True)
class Hushed(Dataset):
    """Images whose indices and labels are numbers that stand for nothing else."""

    name: ClassVar[str] = "hushed"
    image_shape = SHAPE
    num_classes = CLASSES

    def __len__(self) -> int:
        return 60

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = torch.stack([rand(*SHAPE, seed=300 + index) for index in indices])
        return images, torch.tensor([INDICES.get(index, 0) for index in indices])

    def mean(self) -> Tensor:
        return torch.full(SHAPE, 0.5)


INDICES = {37: 43, 41: 47, 53: 59}
"""Index -> label of the images that are attacked in a run."""


def secrets_of_a_run(trial: Trial, seen: Observation) -> Private:
    """Return what no attack may be given of a trial: images, dataset and index, a hidden label, client's keys, salt."""
    others = companions(trial, SALT)
    plain = f"{trial.seed}/hushed/{trial.image}"
    keys = [salted(f"{kind}/{plain}", "client", SALT) for kind in ("client", "weights")]
    labels = (trial.image, INDICES[trial.image])[: 2 if seen.labels is None else 1]
    images, classes = Hushed().load([trial.image, *others])
    encoded = images[:1], classes[:1]
    if others:
        encoded = images, nn.functional.one_hot(classes, CLASSES).float()
    tensors = {f"image {row}": image for row, image in enumerate(images)}
    tensors["encoded"] = trial.cell.defense.encode(*encoded, generator(keys[0], "encode"))[0]
    return Private(tensors, labels, ("hushed", SALT, f"/{trial.image}", *keys))


@pytest.mark.parametrize(
    ("defense", "model"),
    [
        *((defense, "lenet") for defense in [*ALL_DEFENSES, *ON_WEIGHTS]),
        *((defense, "lenet(fresh=true)") for defense in ("none", "mixup", "keylock(length=9)")),
    ],
)
def test_an_attack_of_a_run_is_given_nothing_that_names_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defense: str, model: str
) -> None:
    method = defenses.parse(defense)
    groups = groups_of(method)
    granted = [one for one in PRESETS.values() if {word.removesuffix("-weights") for word in one.reveals} <= groups]
    threats = [replace(one, informed=informed) for one in granted for informed in (False, True)]
    threats.append(ThreatModel(shares="weights", learning_rate=0.01, local_steps=2, rate="known"))
    threats = [one for one in threats if one.shares == "weights" or defense not in ON_WEIGHTS]
    given: list[tuple[Observation, Rng]] = []
    monkeypatch.setattr(
        Isolation,
        "run",
        lambda self, attack, observation, rng: given.append((observation, rng)) or grey(observation),
    )
    axes: dict[str, Any] = {"attacks": ["grey"], "datasets": [Hushed()], "images": [53], "floors": False}
    matrix = Matrix(defenses=[method], models=[model], threats=threats, **axes)
    results = leakbench.run(matrix, tmp_path, device="cpu", chunk=1).results()
    trials = {attack_key(trial, SALT): trial for trial in matrix.trials()}
    own = [(seen, rng) for seen, rng in given if rng.keys[0] in trials]  # a floor is also called with a blank image
    assert len(own) >= (results["status"] == "ok").sum() >= 2
    for seen, rng in own:
        (key,) = rng.keys
        private = secrets_of_a_run(trials[key], seen)
        assert private.found_in((seen, rng)) == []
    for hint in (Hushed(), trials[key], Rng((f"attack/0/x/{trials[key].image}",)), SALT):
        assert private.found_in((seen, rng, hint)) != []


def grey(observation: Observation) -> Reconstruction:
    """Return grey images, as a called attack does."""
    images = torch.full((observation.trials, *observation.image_shape), 0.5)
    return Reconstruction(images, failed=torch.zeros(observation.trials, dtype=torch.bool))


def threats_of(defense: Defense) -> list[ThreatModel]:
    words = [word for group in sorted(groups_of(defense)) for word in (group, f"{group}-weights")]
    revealed = [frozenset(some) for n in range(3) for some in itertools.combinations(words, n)]
    return [
        ThreatModel(labels, reveals, informed)
        for reveals in revealed
        for labels in ("inferred", "known")
        for informed in (False, True)
    ]


@dataclass(frozen=True)
class Shift(Defense):
    """A defense that encodes: the client trains on another image."""

    def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return (x + torch.rand(x.shape, generator=rng)) / 2, y


CASES = [
    pytest.param(defense, threat, id=f"{name}-{threat.spec().replace(', ', ',')}")
    for name, defense in [(name, defenses.parse(name)) for name in ALL_DEFENSES] + [("shift", Shift())]
    for threat in threats_of(defense)
]


@pytest.mark.parametrize(("defense", "threat"), CASES)
def test_nothing_private_is_reachable_and_what_is_granted_is_there(defense: Defense, threat: ThreatModel) -> None:
    private, values, gradients = split(defense, threat)
    observation = see(defense, threat)
    assert private.found_in(observation) == []
    for name, value in values.items():
        assert torch.equal(observation.weights[name], value)
    for name, value in gradients.items():
        assert torch.equal(observation.gradient[name], value)
    secret = {name for group in groups_of(defense) for name in secret_names(defense, group)}
    assert set(observation.weights) & secret == set(values)
    assert set(observation.gradient) & secret == set(gradients)
    assert {s.name for s in observation.secrets} == secret - set(values)
    assert observation.labels is None if threat.labels == "inferred" else observation.labels.tolist() == list(LABELS)
    assert observation.defense == (defense if threat.informed else None)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("defense", ["none", "keylock(length=9)", "precode(k=6)", "noise", *ON_WEIGHTS])
def test_a_hidden_learning_rate_is_nowhere_and_secrets_stay_home(defense: str, steps: int) -> None:
    method = defenses.parse(defense)
    private, _, _ = split(method if defense not in ON_WEIGHTS else defenses.parse("none"), ThreatModel())
    private.numbers = (0.0371, 1 / 0.0371, 0.0371 * steps, 1 / (0.0371 * steps))
    hidden = ThreatModel(shares="weights", learning_rate=0.0371, local_steps=steps)
    observation = see(method, hidden)
    assert private.found_in(observation) == []
    if defense in ON_WEIGHTS:
        attack, known = prepare(attacks.parse("dlm"), see(method, replace(hidden, informed=True)))
        assert private.found_in(attack._objective(known, Rng(("a", "b", "c")))) == []  # type: ignore[attr-defined]
    assert observation.threat == replace(hidden, learning_rate=None)
    secret = {name for group in groups_of(method) for name in secret_names(method, group)}
    assert not secret & (set(observation.weights) | set(observation.gradient))
    known = see(method, replace(hidden, rate="known"))
    assert known.threat.learning_rate == 0.0371
    assert private.found_in(known) != []
    for name, value in observation.gradient.items():
        assert torch.equal(known.gradient[name], value)


@pytest.mark.parametrize("fresh", [False, True])
def test_public_weights_are_those_before_the_step_and_hold_no_secret(fresh: bool) -> None:
    defense = defenses.parse("keylock(length=9)")
    observation = see(defense, ThreatModel(), "lenet-bn", fresh)
    for t, client in enumerate(crowd(fresh)):
        network = build(models.parse("lenet-bn"), defense, SHAPE, CLASSES, client.weights_key)
        public = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        for name, value in observation.weights.items():
            row = value[t] if value.ndim > public[name].ndim else value
            assert torch.equal(row, public[name]), name
        hidden = set(public) - set(observation.weights)
        assert hidden == {secret.name for secret in observation.secrets}


class Hoarder(nn.Module):
    """A network that keeps what it sees: in an attribute, a list, a closure, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, CLASSES)
        self.last: Tensor | None = None
        self.kept: list[Tensor] = []
        self.register_buffer("memory", torch.zeros(SHAPE))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.kept.append(x)
        if len(x) == 1:
            self.memory.copy_(x[0].detach())
        return self.fc(torch.sigmoid(x.flatten(1)))


def test_a_network_that_keeps_its_input_does_not_leak_it() -> None:
    network = Hoarder()
    observation = see(defenses.parse("none"), ThreatModel(), OwnModule("hoarder", network))
    private, _, _ = split(defenses.parse("none"), ThreatModel())
    assert private.found_in(observation) == []
    assert network.last is None
    assert not network.kept
    # the walk would have found it there
    network(crowd()[0].image[None])
    assert len(private.found_in(network)) >= 3


MATCHING = [name for name in attacks.names() if issubclass(attacks.get(name), GradientMatching)]


@pytest.mark.parametrize("secrets", ["sample", "optimise"])
@pytest.mark.parametrize("defense", ["keylock(length=9)", "precode(k=6)"])
@pytest.mark.parametrize("name", MATCHING)
def test_the_attackers_own_draws_are_not_the_clients(name: str, defense: str, secrets: str) -> None:
    """The same rng keys as the clients' would be no help; and nothing private is in the attack's objective."""
    parsed = defenses.parse(defense)
    observation = see(parsed, ThreatModel())
    private, _, _ = split(parsed, ThreatModel())
    private.words = ()  # the keys are the test's own here
    attack = replace(attacks.parse(SMALL.get(name, name)), secrets=secrets)  # type: ignore[call-arg]
    for keys in (tuple(client.key for client in crowd()), ("a", "b", "c")):
        objective = attack._objective(observation, Rng(keys))
        # iDLG's label is read off the gradient: the attack's own finding
        guess = replace(private, labels=()) if attack.labels == "analytic" else private
        assert guess.found_in(objective) == []


class Holder:
    """Somewhere to hide things."""


def plant(where: str, secret: Tensor) -> object:
    """Return an object with a private tensor hidden in it."""
    observation = watch("lenet")
    model = observation.model
    holder = Holder()
    if where == "field":
        return replace(observation, mean_image=secret)
    if where == "copy of a slice":
        return replace(observation, weights={**observation.weights, "x": torch.stack([secret * 0, secret]).clone()})
    if where == "module attribute":
        model.last = secret  # type: ignore[assignment]
    elif where == "module buffer":
        model.register_buffer("hidden", secret.clone())
    elif where == "closure":
        model.forward = lambda x: x + secret  # type: ignore[method-assign]
    elif where == "default argument":
        model.forward = lambda x, y=secret: x  # type: ignore[method-assign,misc]
    elif where == "forward hook":
        model.register_forward_hook(functools.partial(lambda kept, *rest: None, secret))
    elif where == "bound method":
        holder.secret = secret  # type: ignore[attr-defined]
        holder.read = types.MethodType(lambda self: self.secret, holder)  # type: ignore[attr-defined]
        return replace(observation, model=nn.Sequential(model).apply(lambda m: setattr(m, "f", holder.read)))
    elif where == "base of a view":
        base = torch.stack([secret, secret + 1])
        return replace(observation, mean_image=base[1])
    elif where == "storage of a view":
        return replace(observation, mean_image=secret[..., :1].detach())
    elif where == "graph":
        leaf = torch.ones_like(secret).requires_grad_()
        return replace(observation, mean_image=(leaf * secret).sum())
    elif where == "grad":
        leaf = torch.ones_like(secret).requires_grad_()
        (leaf * secret).sum().backward()
        return replace(observation, mean_image=leaf)
    elif where == "numpy":
        return replace(observation, mean_image=[secret.numpy().copy()])  # type: ignore[arg-type]
    elif where == "class attribute":
        return type("Kept", (Defense,), {"cache": {"last": secret}, "__module__": __name__})()
    elif where == "slot":
        slotted = type("Slotted", (), {"__slots__": ("inside",)})()
        slotted.inside = secret
        return {1: [slotted]}
    return observation


PLACES = [
    "field",
    "copy of a slice",
    "module attribute",
    "module buffer",
    "closure",
    "default argument",
    "forward hook",
    "bound method",
    "base of a view",
    "storage of a view",
    "graph",
    "grad",
    "numpy",
    "class attribute",
    "slot",
]


@pytest.mark.parametrize("where", PLACES)
def test_the_walk_finds_what_is_planted(where: str) -> None:
    secret = rand(*SHAPE, seed=77)
    private = Private({"it": secret})
    assert private.found_in(plant("nowhere", secret)) == []
    assert private.found_in(plant(where, secret)) != []


@pytest.mark.parametrize(
    "value",
    [
        41,
        np.int64(41),
        torch.tensor([1, 41]),
        torch.tensor([41.0]),
        {"y": [(41,)]},
        torch.eye(CLASSES)[[3, 41]],
        np.array([41]),
    ],
)
def test_the_walk_finds_a_planted_label(value: object) -> None:
    private = Private(labels=LABELS)
    observation = see(defenses.parse("none"), ThreatModel())
    assert private.found_in(observation) == []
    observation.model.hint = value  # type: ignore[assignment]
    assert private.found_in(observation) != []


def test_the_walk_finds_a_key_or_a_generator() -> None:
    private = Private(words=("private key 0",))
    observation = see(defenses.parse("none"), ThreatModel())
    observation.model.note = "drawn from private key 0"  # type: ignore[assignment]
    assert len(private.found_in(observation)) == 1
    observation.model.source = torch.Generator()  # type: ignore[assignment]
    assert len(private.found_in(observation)) == 2


def test_no_presets_name_tells_a_hidden_learning_rate() -> None:
    seen = PRESETS["weights"].granted()
    assert seen.learning_rate is None
    assert seen.name not in PRESETS


@pytest.mark.parametrize(
    ("spec", "threat"),
    [
        ("local(batch=23)", ThreatModel()),
        ("local(batch=23)", ThreatModel(count="hidden")),
        ("local(batch=23)", ThreatModel(labels="counts")),
        ("local(images=23, local_batch=6, momentum=0.9)", ThreatModel(shares="weights")),
        ("local(images=23, local_batch=6)", ThreatModel(shares="weights", recipe="hidden", count="hidden")),
        ("local(images=23, local_batch=6)", ThreatModel(shares="weights", labels="known", order="known")),
    ],
    ids=lambda one: one if isinstance(one, str) else one.spec().replace(", ", ","),
)
def test_of_several_images_only_what_is_granted_is_reachable(spec: str, threat: ThreatModel) -> None:
    """Neither images nor labels, nor the order of the steps, nor the number of the images where it is hidden."""
    images = [rand(*SHAPE, seed=500 + index) for index in range(23)]
    labels = [43 + index % 3 * 4 for index in range(23)]
    training = clients.parse(spec)

    def seen(granted: ThreatModel) -> Observation:
        client = Client(images[0], labels[0], "w 0", "c 0", (), tuple(zip(images[1:], labels[1:])))
        grey, model = torch.full(SHAPE, 0.5), models.parse("lenet")
        return observe(model, defenses.parse("none"), granted, [client], CLASSES, grey, training=training)

    hidden = {f"image {index}": image for index, image in enumerate(images)}
    if threat.order != "known" and training.several_steps:
        full = seen(replace(threat, order="known", labels="known", recipe="known", count="known"))
        hidden |= {f"the order of step {step}": rows for step, rows in enumerate(full.order)}
    numbers = () if threat.labels == "known" else (43, 47, 51)
    numbers += (23,) if threat.count == "hidden" else ()
    observation = seen(threat)
    assert Private(hidden, numbers, ("w 0", "c 0")).found_in(observation) == []
    assert (observation.labels is not None, bool(observation.order)) == (
        threat.labels == "known",
        threat.order == "known",
    )
    assert (observation.counts is not None) == (threat.labels == "counts")
    assert observation.count == (0 if threat.count == "hidden" else 23)


@pytest.mark.parametrize("spec", ["local(batch=4)", "local(images=4, local_steps=3, lr=0.01)"])
def test_the_order_of_a_batch_is_not_in_what_is_sent(spec: str, float64: None) -> None:
    images, labels = [rand(*SHAPE, seed=600 + index).double() for index in range(4)], [3, 1, 4, 15]
    sent = []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        first, *others = ((images[place], labels[place]) for place in order)
        client = Client(*first, "w 0", "c 0", (), tuple(others))
        grey, model = torch.full(SHAPE, 0.5, dtype=torch.float64), models.parse("lenet")
        threat = ThreatModel(shares="weights") if "lr" in spec else ThreatModel()
        sent.append(
            observe(
                model, defenses.parse("none"), threat, [client], CLASSES, grey, training=clients.parse(spec)
            ).gradient
        )
    for name, value in sent[0].items():
        assert torch.allclose(value, sent[1][name], rtol=1e-9, atol=1e-13), name
