"""What the tests share: small components, small clients, float64."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import own_attacks  # noqa: F401
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from leakbench import attacks, defenses, generators, models
from leakbench.core.rng import salted
from leakbench.core.types import Secret
from leakbench.defenses import Defense
from leakbench.engine import batch_size, isolation
from leakbench.generators import Card, Generator
from leakbench.models import Model
from leakbench.observation import Observation
from leakbench.plan.matrix import parse_threat
from leakbench.victim import Client, observe

sys.dont_write_bytecode = True  # some tests list all files of a folder: Python's own beside a plugin are none of ours
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # of the processes that tests start, too
torch.set_num_threads(1)  # the networks are so small that threads only wait for each other
settings.register_profile("leakbench", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("leakbench")

SHAPE = (1, 8, 8)
CLASSES = 4
GENERAL_PATHS = ("batched", "vmap", "one-at-a-time")
"""The paths that take networks of any operations."""
TESTS = Path(__file__).parent
"""The folder of the tests, from which processes of their own import them."""
MEASURED = batch_size.choose
"""Chooses by measurement how many trials run at a time."""


@generators.register("tiny")
class Tiny(Generator):
    """A linear generator of grey images of 8 x 8 pixels from 3 latents, with fixed weights and no classes."""

    def card(self) -> Card:
        return Card(latent=3, image_shape=SHAPE, num_classes=0, data="nothing", licence="none", checksum="none")

    def network(self) -> nn.Module:
        return TinyNetwork()


class TinyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(3, prod(SHAPE), seed=5) / 2)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        return (latent @ self.weight).tanh().view(-1, *SHAPE)


SMALL = {
    "precode": "precode(k=6)",
    "keylock": "keylock(length=9)",
    "dcs": "dcs(steps=2)",
    "censor": "censor(samples=2)",
    "dlg": "dlg(steps=1)",  # a step of L-BFGS is up to twenty iterations
    "idlg": "idlg(steps=1)",
    "dlm": "dlm(steps=3, solver=adam, lr=0.01)",  # twenty iterations of L-BFGS amplify rounding too far
    "dlm+": "dlm+(steps=3, solver=adam, lr=0.01)",
    "log-cosine": "log-cosine(steps=9, pilot=0.4)",  # a step with each weight, and six with the best
    "ggl": "ggl(budget=6, popsize=3, generator=tiny)",
    "prior": "prior(generator=tiny)",
}
"""Specs of components whose defaults are too large for a test of every combination."""

LARGE = ("convnet", "vit", "resnet18", "resnet32", "resnet34", "vgg16")
"""Models too large for a test of every combination; ``test_models`` takes narrow ones."""
FLAT = ("mlp",)
"""Models without a convolution, which key-lock and its placebo need; ``test_weights`` has their tests."""


def changes_network(defense: Defense) -> bool:
    """Return whether a defense changes what an attacker differentiates."""
    return type(defense).wrap is not Defense.wrap or type(defense).loss is not Defense.loss


MODELS = sorted(set(models.names()) - set(LARGE) - set(FLAT))
MODES = [*MODELS, *(f"{name}(mode=eval)" for name in MODELS if "mode" in models.registry.fields(models.get(name)))]
ON_WEIGHTS = ["weight-noise", "weight-sparsify"]
"""Defenses of clients that send their weights; they have none of a gradient."""
SUMMED = ["secagg"]
"""Defenses that need the images of several clients; ``test_malicious`` has their tests."""
ALL_DEFENSES = [SMALL.get(name, name) for name in sorted(set(defenses.names()) - {*ON_WEIGHTS, *SUMMED})]
"""Every defense of a gradient; for tests that are cheap."""
DEFENSES = [spec for spec in ALL_DEFENSES if spec in ("none", "noise") or changes_network(defenses.parse(spec))]
"""Those that change the network or the loss, and two that do not: the others are like these to an attack."""
ELSEWHERE = {"analytic", "disaggregate", "cocktail", "april", "april-search", "imprint", "trap"}
"""Attacks that no honest network with convolutions serves; they have tests of their own."""
ATTACKS = [
    SMALL.get(name, f"{name}(steps=3)" if "steps" in attacks.registry.fields(attacks.get(name)) else name)
    for name in sorted(set(attacks.names()) - ELSEWHERE)
]
"""All others."""


@pytest.fixture(scope="session", autouse=True)
def _one_template() -> Iterator[None]:
    """Start the process that is copied for attacks of plugin files once, and not once a run: it takes seconds."""
    real, kept = isolation.Template, list[isolation.Template]()

    @functools.wraps(real)
    def shared() -> isolation.Template:
        if not kept or kept[-1]._process.poll() is not None:
            kept.append(real())
            kept[-1].close = functools.partial(lambda: None)  # type: ignore[method-assign]
        return kept[-1]

    isolation.Template = shared  # type: ignore[misc,assignment]
    yield
    isolation.Template = real  # type: ignore[misc]
    for one in kept:
        real.close(one)


COPIED = multiprocessing.get_context("forkserver")
"""Starts processes as copies of one that has imported torch and leakbench, which takes seconds."""
COPIED.set_forkserver_preload(["leakbench.api", "leakbench.training", "pytest", "hypothesis", "pandas", "scipy.stats"])


@pytest.fixture(autouse=True, scope="session")
def _copied_workers() -> Iterator[None]:
    """Start the workers of runs as copies; ``test_workers`` has a test of the spawned ones that users have."""
    with pytest.MonkeyPatch.context() as patch:
        own = SimpleNamespace(Pipe=multiprocessing.Pipe, get_context=lambda kind: COPIED)
        patch.setattr("leakbench.engine.executors.multiprocessing", own)
        yield


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a component that hangs makes a file: for each, the clock of time limits jumps by an hour."""
    folder = tmp_path / "hanging"
    folder.mkdir()
    own = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * len(os.listdir(folder)))
    monkeypatch.setattr("leakbench.engine.executors.time", own)

    def look(heard: Sequence[Any], limit: float | None) -> list[Any]:
        return wait(heard, None if limit is None else min(limit, 0.05))

    monkeypatch.setattr("leakbench.engine.executors.wait", look)
    return folder


def hang(folder: str) -> None:
    """Do not come back, and say so to ``hanging``."""
    (Path(folder) / str(time.monotonic_ns())).touch()
    time.sleep(1000)


@pytest.fixture(autouse=True, scope="session")
def _empty_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """Hide the cache of the user: without trained weights, LPIPS is left out, which takes longer than a small trial."""
    real = os.environ.get("LEAKBENCH_HOME")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_HOME", str(tmp_path_factory.mktemp("cache")))
        yield real


@pytest.fixture(autouse=True)
def _real_cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _empty_cache: str | None) -> None:
    """Show the cache of the user to the tests that need it."""
    if request.node.get_closest_marker("assets"):
        monkeypatch.delenv("LEAKBENCH_HOME")
        if _empty_cache is not None:
            monkeypatch.setenv("LEAKBENCH_HOME", _empty_cache)


@pytest.fixture(autouse=True, scope="session")
def _known_chunks() -> Iterator[None]:
    """Leave out the measurements that choose how many trials run at a time; ``test_chunk`` has them."""

    def choose(step: object, trials: int, device: object, share: float = 0) -> int:
        return -(-trials // -(-trials // batch_size.ALWAYS_TOGETHER))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_size, "choose", choose)
        yield


SALT = "5eed" * 8
"""The salt of every run of the tests that is given none."""


@pytest.fixture(autouse=True, scope="session")
def _one_salt() -> Iterator[None]:
    """Make the random salts of runs one fixed salt, so that the tests draw the same every time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leakbench.core.rng.secrets", SimpleNamespace(token_hex=lambda size: SALT))
        yield


def images_of(keys: Sequence[str], datasets: Sequence[str] = ("tiny", "pairs")) -> list[tuple[int, int] | None]:
    """Return seed and image of the trials of an attack's keys, for tests, which know the salt; None for other keys."""
    known = {
        salted(f"attack/{seed}/{dataset}/{image}", "attack", SALT): (seed, image)
        for dataset in datasets
        for seed in range(4)
        for image in range(16)
    }
    return [known.get(key) for key in keys]


@pytest.fixture
def float64() -> Iterator[None]:
    """Make every network, image and draw float64 for one test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clients(trials: int, *, shape: Sequence[int] = SHAPE, classes: int = CLASSES, fresh: bool = False) -> list[Client]:
    """Return clients with different images, labels and draws; ``fresh`` gives each its own weights."""
    other = (rand(*shape, seed=99), 0)
    return [
        Client(
            rand(*shape, seed=100 + t), (3 * t + 1) % classes, f"weights {t if fresh else 0}", f"client {t}", (other,)
        )
        for t in range(trials)
    ]


def examples(method: Defense, label: int = 2) -> tuple[Tensor, Tensor]:
    """Return small images and labels as a defense encodes them, the attacked one with this label."""
    if not method.companions:
        return rand(1, *SHAPE), torch.tensor([label])
    labels = torch.tensor([label, *range(method.companions)])
    return rand(len(labels), *SHAPE), nn.functional.one_hot(labels, CLASSES).to(torch.get_default_dtype())


def watch(
    model: str | Model,
    defense: str | Defense = "none",
    threat: object = "paper",
    *,
    trials: int = 2,
    shape: Sequence[int] = SHAPE,
    classes: int = CLASSES,
    fresh: bool = False,
) -> Observation:
    """Return what a server sees of small clients."""
    return observe(
        models.parse(model),
        defenses.parse(defense),
        parse_threat(threat),
        clients(trials, shape=shape, classes=classes, fresh=fresh),
        classes,
        torch.full(tuple(shape), 0.5),
    )


def public_tensors(observation: Observation, seed: int = 7) -> dict[str, Tensor]:
    """Return every tensor of the observed network, with draws in place of the secrets that are not revealed."""
    own = tensors_of(observation.model)
    tensors = dict(observation.weights)
    for secret in observation.secrets:
        tensors[secret.name] = draw(secret, (observation.trials, *own[secret.name].shape), seed)
    return tensors


def draw(secret: Secret, shape: tuple[int, ...], seed: int) -> Tensor:
    return secret.law.draw(shape, torch.Generator().manual_seed(seed))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def close(a: Tensor, b: Tensor, rel: float) -> None:
    """Assert |a - b| <= rel |b| in the Euclidean norm, and that there is something to compare."""
    assert a.shape == b.shape
    assert bool(torch.isfinite(b).all())
    assert float((a - b).norm()) <= rel * float(b.norm()), f"{float((a - b).norm() / b.norm()):.3g} > {rel:g}"


def plain(value: object) -> object:
    """Return a copy of anything made of dataclasses, mappings, sequences and tensors, for a deep comparison."""
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype), value.stride(), value.detach().clone(), value.grad)
    if isinstance(value, nn.Module):
        inside = {name: item for name, item in vars(value).items() if name not in ("_modules",)}
        return (type(value), plain(inside), {name: plain(child) for name, child in value.named_children()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value


def same(a: Any, b: Any) -> bool:
    """Return whether two results of ``plain`` are bitwise equal (tensors on meta by shape)."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        return both and (a.device.type == "meta" or torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return bool(a == b)
