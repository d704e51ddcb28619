"""leakbench on a pretended GPU (``pretend.py``): tensors that may not meet, waits, recordings, memory, two devices."""

from __future__ import annotations

import csv
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import pytest
import torch
from conftest import CLASSES, SHAPE, Tiny, clients, rand
from test_pooling import POOL
from test_pooling import known as known_of_pool
from test_pooling import network as pooling_network
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench import attacks, datasets, defenses, models
from leakbench.attacks.base import prepare
from leakbench.attacks.matching import GradientMatching
from leakbench.attacks.peeling.descent import Feature
from leakbench.attacks.peeling.inversion import Match
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.pooling import PooledMatch, find_stem
from leakbench.attacks.peeling.trace import trace
from leakbench.clients.local import Local
from leakbench.core.compiled import SWITCH
from leakbench.core.device import accelerator, all_of, device_named, make_current
from leakbench.core.registry import load_plugin
from leakbench.core.rng import Rng, seeded
from leakbench.core.types import Reconstruction
from leakbench.engine import run as engine
from leakbench.engine.executors import ProcessExecutor, packed
from leakbench.engine.progress import NullProgress
from leakbench.engine.ray_executor import RayWorker
from leakbench.engine.worker import WorkerContext
from leakbench.errors import BadOption
from leakbench.gradients import full_precision
from leakbench.models import OwnModule
from leakbench.observation import Observation
from leakbench.optim import Evaluation, LineSearch, Objective, Unknowns, graph, lbfgs, value_and_gradient
from leakbench.plan.matrix import parse_threat
from leakbench.victim import observe, observing
from leakbench.victim import steps as client_steps

sys.path.insert(0, str(Path(__file__).parent))
import pretend

GPUS = ("pretend:0", "pretend:1")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The pretended GPU with nothing counted yet; a test in which a rule of CUDA was broken fails.

    The CPU, with which it is compared, takes the paths of a GPU.
    """
    monkeypatch.setenv(SWITCH, "off")
    if reason := pretend.unavailable():
        pytest.skip(reason)
    pretend.install()
    pretend.clear()
    yield pretend
    for device in range(pretend.COUNT):
        pretend.core().set_limit(device, 0)
    faults, remarks = pretend.counted("fault"), pretend.counted("remark")
    pretend.clear()
    assert faults == {}
    assert remarks == {}


def stepped(
    device: str,
    model: str | leakbench.Model = "lenet",
    defense: str = "none",
    threat: object = "paper",
    trials: int = 2,
    batch: int = 1,
    shape: tuple[int, int, int] = SHAPE,
) -> Observation:
    """Return what a server sees of small clients, of ``batch`` images each, that take their steps on a device."""
    network = models.parse(model) if isinstance(model, str) else model
    who, grey = clients(trials * batch, shape=shape), torch.full(shape, 0.5)
    if batch > 1:
        groups = [who[begin : begin + batch] for begin in range(0, len(who), batch)]
        who = [
            replace(first, companions=(), others=tuple((one.image, one.label) for one in rest))
            for first, *rest in groups
        ]
    training = {"training": Local(batch=batch)} if batch > 1 else {}
    return observe(network, defenses.parse(defense), parse_threat(threat), who, CLASSES, grey, device, **training)


def seen(device: str, *case: Any, **options: Any) -> Observation:
    """Return what a server on a device sees of small clients that take their steps on the CPU."""
    return stepped("cpu", *case, **options).to(device)


def attacked(attack: str, observation: Observation) -> Reconstruction:
    """Return an attack's reconstruction, with keys of the trials."""
    keys = tuple(map(str, range(observation.trials)))
    return attacks.parse(attack)(observation, Rng(keys, observation.device))


def same(here: Reconstruction, there: Reconstruction) -> None:
    """Assert that two reconstructions have the same numbers, by the same path."""
    assert here.path == there.path
    for name in ("images", "labels", "objective", "failed"):
        one, other = getattr(here, name), getattr(there, name)
        if one is not None:
            torch.testing.assert_close(other.cpu(), one, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


class DroppingNetwork(nn.Module):
    """A network that adds noise, and drops entries and whole channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 6, 3), nn.Linear(216, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(torch.sigmoid(self.first(x)), 0.3, self.training)
        x = F.dropout(x + 0.1 * torch.randn_like(x), 0.2, self.training)
        logits: Tensor = self.last(x.flatten(1))
        return logits


@dataclass(frozen=True)
class Dropping(leakbench.Model):
    """The model of this network."""

    name: ClassVar[str] = "dropping"

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return DroppingNetwork()


# The device itself


def test_the_device_has_the_rules_of_a_gpu(gpu: ModuleType) -> None:
    here = torch.ones(3, device="pretend:0")
    refused: list[Callable[[], object]] = [
        lambda: here + torch.ones(3),
        lambda: here + torch.ones(3, device="pretend:1"),
        lambda: torch.cat([here, torch.ones(())[None]]),
        lambda: torch.randn(3, generator=torch.Generator(), device="pretend"),
    ]
    for operation in refused:
        with pytest.raises(RuntimeError, match=r"same device|device type"):
            operation()
    assert len(gpu.counted("fault")) == 2  # the others are found by torch
    gpu.clear()
    assert float((here * 2).sum()) == 6
    assert gpu.total("wait") == 1
    assert gpu.counted("launch") == {"aten::mul": 1, "aten::sum": 1, "aten::_local_scalar_dense": 1}
    torch.rand(3, device="pretend")
    assert list(gpu.counted("remark")) == ["unseeded draws of aten::uniform_\telsewhere"]
    gpu.clear()


def test_memory_that_is_not_there_is_refused_and_given_back(gpu: ModuleType) -> None:
    with gpu.limited(2**20):
        kept = torch.empty(2**19, dtype=torch.uint8, device="pretend")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**20, dtype=torch.uint8, device="pretend")
        torch.empty(2**21, dtype=torch.uint8, device="pretend:1")
        del kept
        torch.empty(2**20, dtype=torch.uint8, device="pretend")


def test_a_recording_runs_nothing_and_its_replay_reads_the_same_memory(gpu: ModuleType) -> None:
    x, counter = (torch.zeros(size, device="pretend") for size in (3, 1))
    far = torch.zeros(3, device="pretend:1")
    module, own = torch.get_device_module("pretend"), torch.get_device_module("pretend").CUDAGraph()
    with module.graph(own):
        counter += 1
        found = F.softplus(2 * x + torch.arange(3, device="pretend")).sum()
        far += 1
        with pytest.raises(RuntimeError, match="capturing"):
            x.sum().item()
    assert float(counter) == 0
    assert torch.isnan(found)
    assert far.tolist() == [1, 1, 1]  # of another device: it ran, and is not part of the recording
    for number, value in enumerate((0.5, -1.0), 1):
        x.fill_(value)
        own.replay()
        assert float(found) == float(F.softplus(2 * torch.full((3,), value) + torch.arange(3)).sum())
        assert float(counter) == number
    assert far.tolist() == [1, 1, 1]


# The same numbers as on the CPU


@pytest.mark.parametrize(
    ("attack", "case"),
    [
        ("ig(steps=3)", {}),
        ("dlg(steps=3, solver=adam, lr=0.1)", {}),
        ("lb(steps=12)", {}),
        ("grnn(steps=2)", {}),
        ("ggl(budget=6, popsize=3, generator=tiny)", {}),
        ("ggl(budget=3, optimizer=adam, generator=tiny)", {}),
        ("analytic", {"model": "mlp"}),
        ("peel", {}),
        ("grey", {}),
        ("dlm(steps=2, solver=adam, lr=0.01)", {"threat": "weights"}),
        ("dlm+(steps=2, solver=adam, lr=0.01)", {"threat": "weights"}),
        ("ig(steps=3)", {"defense": "precode(k=6)"}),
        ("ig(steps=3)", {"defense": "keylock(length=9)"}),
        ("ig(steps=3)", {"defense": "noise", "threat": "informed=true"}),
        ("ig(steps=3)", {"model": "resnet20"}),
    ],
)
def test_the_numbers_are_those_of_the_cpu(gpu: ModuleType, attack: str, case: Mapping[str, Any]) -> None:
    here, there = (attacked(attack, seen(device, **case)) for device in ("cpu", "pretend:1"))
    same(here, there)
    assert there.images.device == torch.device("pretend:1")


# Clients on the device


def refuse(*_: object) -> None:
    """Fail if a function is called that must not be."""
    pytest.fail("it must not be called")


def compared(*case: Any, flips: float = 0.0, **options: Any) -> tuple[Observation, Observation]:
    """Return what a server sees of clients on the CPU and on the device, whose gradients are compared.

    Args:
        case: as for ``stepped``, as are the options.
        flips: the share of entries that may differ, of a defense that rounds.
    """
    here, there = (stepped(device, *case, **options) for device in ("cpu", "pretend:1"))
    assert there.gradient.keys() == here.gradient.keys()
    scale = max(float(value.abs().max()) for value in here.gradient.values())
    for name, value in here.gradient.items():
        apart = ~torch.isclose(there.gradient[name].cpu(), value, rtol=1e-4, atol=1e-5 * scale)
        assert float(apart.double().mean()) <= flips, name
    assert there.device == torch.device("pretend:1")
    return here, there


@pytest.mark.parametrize("defense", ["noise", "soteria", "svt-privacy(gamma=0.01)", "keylock(length=9)", "mixup"])
def test_clients_take_the_same_step_on_the_device(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, defense: str
) -> None:
    compared(defense=defense, trials=3)
    monkeypatch.setattr(observing, "single_steps", refuse)
    stepped("pretend", defense=defense)


def test_clients_that_train_do_so_on_the_device(gpu: ModuleType) -> None:
    compared(defense="weight-noise", threat={"shares": "weights", "local_steps": 3, "learning_rate": 0.1})
    compared(model=Dropping())


def test_a_defense_of_a_plugin_takes_its_steps_on_the_cpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(defenses.parse("noise")), "joint", False)
    monkeypatch.setattr(client_steps, "_joint_part", refuse)
    compared(defense="noise", trials=3)


def test_clients_that_do_not_fit_are_halved(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = client_steps._joint_part

    def greedy(trainers: Any, some: Sequence[Any], *rest: Any) -> Any:
        sizes.append(len(some))
        held = torch.zeros(2**18 * len(some), device="pretend")
        assert len(held)
        return real(trainers, some, *rest)

    monkeypatch.setattr(client_steps, "_joint_part", greedy)
    monkeypatch.setattr(client_steps, "free_memory", lambda device: 2**40)
    with gpu.limited(5 * 2**20):
        there = stepped("pretend", trials=8)
    assert sizes == [8, 4, 4]
    for name, value in stepped("cpu", trials=8).gradient.items():
        torch.testing.assert_close(there.gradient[name].cpu(), value, rtol=1e-4, atol=1e-6)


with Path(__file__).with_name("clients.csv").open() as file:
    CLIENTS = list(csv.DictReader(file))
    """What the steps of all clients launch together, what each of them launches beside that, and the waits, at most."""


@pytest.mark.parametrize("row", CLIENTS, ids=lambda row: f"{row['defense']}")
def test_the_steps_of_clients_launch_and_wait_no_more_than_committed(gpu: ModuleType, row: Mapping[str, str]) -> None:
    counts = []
    stepped("pretend", defense=row["defense"], trials=2)  # what is computed once in a process
    for trials in (2, 10):
        gpu.clear()
        stepped("pretend", defense=row["defense"], trials=trials)
        counts.append((gpu.total("launch"), gpu.total("wait")))
    (launches, waits), each = counts[0], [(long - short) / 8 for short, long in zip(*counts)]
    assert each[0] <= float(row["launches_each"])
    assert each[1] <= float(row["waits_each"])
    assert launches - 2 * each[0] <= float(row["launches"])
    assert waits - 2 * each[1] <= float(row["waits"])


# Searches that are recorded


@dataclass(frozen=True)
class Bowl:
    """|x - 1|^2 of each row; ``drift`` makes it another function at each evaluation, ``reads`` reads a value."""

    drift: float = 0.0
    reads: bool = False

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        assert isinstance(evaluation, int)
        value = (unknowns["x"] - 1 - self.drift * evaluation).square().sum(1)
        return value * (1 if not self.reads or bool(value.any()) else 2)

    def select(self, rows: Sequence[int]) -> Self:
        return self


class Valley(Bowl):
    """A curved valley in each pair of neighbouring entries."""

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        x = unknowns["x"]
        return ((1 - x[:, :-1]).square() + 5 * (x[:, 1:] - x[:, :-1].square()).square()).sum(1)


@pytest.mark.parametrize("device", GPUS)
def test_a_recorded_objective_gives_the_same_numbers_at_other_points(gpu: ModuleType, device: str) -> None:
    start, other = ({"x": rand(3, 4, seed=seed).to(device)} for seed in (0, 1))
    evaluate = graph.recorded(Bowl(), start, pytest.fail)
    value, gradient = evaluate(other, 7)
    expected, slope = value_and_gradient(Bowl(), other, 7)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient["x"], slope["x"])
    gpu.clear()
    evaluate(start, 8)
    assert gpu.counted("launch") == {"copy": 1, "replay": 1}


def test_a_recording_that_is_right_only_at_its_start_is_not_used(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def empty(objective: Bowl, start: Unknowns, module: ModuleType) -> graph.Evaluate:
        once = value_and_gradient(objective, start, 0)
        return lambda unknowns, evaluation: once

    monkeypatch.setattr(graph, "_record", empty)
    notes: list[str] = []
    assert graph.recorded(Bowl(), {"x": rand(3, 4).to("pretend")}, notes.append).__name__ == "plain"
    assert "other numbers" in notes[0]


@pytest.mark.parametrize(
    ("fault", "search"),
    [
        ("", "none"),
        ("", "strong-wolfe"),
        ("it ran at once", "none"),
        ("it is empty", "strong-wolfe"),
        ("no memory", "none"),
    ],
)
def test_steps_of_lbfgs_are_recorded_only_with_the_same_numbers(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, fault: str, search: LineSearch
) -> None:
    def faulty(work: Callable[[], object], stream: object, module: ModuleType) -> tuple[Callable[[], None], object]:
        if fault == "no memory":
            raise torch.OutOfMemoryError(fault)
        return (lambda: None), work() if fault == "it ran at once" else None

    module = sys.modules["leakbench.optim.lbfgs"]
    monkeypatch.setattr(module, "recorded", lambda objective, start, note: partial(value_and_gradient, objective))
    if fault:
        monkeypatch.setattr(module, "capture", faulty)
    start, notes = {"x": 4 * rand(3, 4)}, list[str]()
    options: dict[str, Any] = {"steps": 2, "lr": 0.2, "history": 12, "line_search": search, "slots": 2}
    here = lbfgs(Valley(), start, **options)
    there = lbfgs(Valley(), {"x": start["x"].to("pretend:1")}, note=notes.append, **options)
    torch.testing.assert_close(there.unknowns["x"].cpu(), here.unknowns["x"], rtol=1e-4, atol=1e-5)
    assert there.evaluations.tolist() == here.evaluations.tolist()
    reason = {"": "", "no memory": fault}.get(fault, "its recording gives other numbers")
    assert {line.partition("take longer: ")[2] for line in notes} == ({reason} if reason else set())
    assert (gpu.counted("launch").get("replay", 0) < 30) == bool(fault)


def test_what_cannot_be_recorded_is_found_before_anything_is(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    start, notes, begun = {"x": rand(3, 4).to("pretend")}, list[str](), list[object]()
    real = pretend.core().begin_recording
    monkeypatch.setattr(pretend.core(), "begin_recording", lambda: begun.append(None) or real())
    assert graph.recorded(Bowl(drift=1e-6), start, notes.append).__name__ == "plain"
    assert graph.recorded(Bowl(reads=True), start, notes.append).__name__ == "plain"
    assert len(begun) == 1
    assert [line.partition(": ")[2] for line in notes] == [
        "its recording gives other numbers",
        "called a synchronizing operation: aten::is_nonzero"
        if "is_nonzero" in notes[1]
        else "called a synchronizing operation: aten::_local_scalar_dense",
    ]


@pytest.mark.parametrize(
    ("attack", "case"),
    [
        ("ig(steps=2)", {}),
        ("grnn(steps=2)", {}),
        ("ggl(budget=2, optimizer=adam, generator=tiny)", {}),
        ("ig(steps=2)", {"defense": "keylock(length=9)"}),
        ("ig(secrets=optimise, steps=2)", {"defense": "keylock(length=9)"}),
        ("ggl(budget=2, optimizer=adam, generator=tiny)", {"defense": "precode(k=6)"}),
        ("ig(steps=2)", {"model": Dropping()}),
    ],
)
def test_a_search_is_recorded(gpu: ModuleType, attack: str, case: Mapping[str, Any]) -> None:
    ticks: list[tuple[int, int]] = []
    observation = replace(
        seen("pretend:1", **case), note=pytest.fail, tick=lambda done, whole: ticks.append((done, whole))
    )
    attacked(attack, observation)
    assert gpu.counted("launch")["replay"] >= 3  # the first is compared with an evaluation
    assert ticks[-1] == (1, 2)


@pytest.mark.parametrize("case", [{"defense": "precode(k=6)"}, {"model": Dropping()}])
def test_a_recorded_evaluation_has_the_draws_of_its_number(gpu: ModuleType, case: Mapping[str, Any]) -> None:
    ticks: list[int] = []
    seen_by = replace(seen("pretend", **case), tick=lambda done, whole: ticks.append(done))
    method, known = prepare(attacks.parse("dlg"), seen_by)
    assert isinstance(method, GradientMatching)
    objective = method._objective(known, Rng(("0", "1"), known.device)).with_path()
    start = method._begin(objective)
    evaluate = graph.recorded(objective, start, pytest.fail)
    values = []
    for evaluation in (3, 40, [0, 5], [1, 6], [40, 45]):
        expected, slope = value_and_gradient(objective, start, evaluation)
        ticks.clear()
        value, gradient = evaluate(start, evaluation)
        assert ticks == [evaluation if isinstance(evaluation, int) else max(evaluation)]
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient["image"], slope["image"])
        values.append(tuple(value.tolist()))
    assert len(set(values)) == 5


def annealed(device: str) -> list[tuple[Objective, Unknowns]]:
    """Return objectives of ``peel`` that change slowly from evaluation to evaluation, and where their search begins."""
    image, label = rand(1, 3, 16, 16, seed=2), torch.tensor([0])
    network = pooling_network().float()
    steps = Network(trace(leakbench.observe(network, image, label, salt="0" * 32))).on(network.to(device))
    value = network[:POOL](image.to(device)).detach()
    stem = find_stem(steps, POOL)
    assert stem is not None
    known = known_of_pool(image.double())[1].to(value)
    start = {"image": rand(1, 1, 3, 16, 16, seed=3).to(device)}
    match = Match(steps, [Feature(POOL, value, 1e-9, math.nan, math.nan, None)], smooth=2.0, anneal=2000)
    return [(match, start), (PooledMatch(stem, known, 2000), start)]


@pytest.mark.parametrize("which", [0, 1])
def test_a_search_below_a_layer_is_recorded_with_what_falls_from_evaluation_to_evaluation(
    gpu: ModuleType, which: int
) -> None:
    (there, start), (here, origin) = (annealed(device)[which] for device in ("pretend:1", "cpu"))
    evaluate = graph.recorded(there, start, pytest.fail)
    values = set()
    for evaluation in (0, 1, 700, 1900, 0):
        (value, gradient), (expected, slope) = evaluate(start, evaluation), value_and_gradient(here, origin, evaluation)
        torch.testing.assert_close(value.cpu(), expected)
        torch.testing.assert_close(gradient["image"].cpu(), slope["image"], rtol=1e-3, atol=1e-6)
        values.add(float(value))
    assert len(values) == 4


with Path(__file__).with_name("launches.csv").open() as file:
    LAUNCHES = list(csv.DictReader(file))
    """What an iteration launches and how often it waits, at most, for any number of trials.

    An iteration has ``each`` evaluations. ``before`` is without recordings, on 32 x 32 colour images, which need a few
    launches more, of the attacks that there were; the other counts are of the small images of the tests.
    """


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            row,
            marks=[pytest.mark.long] * (row["suite"] == "long"),
            id=f"{row['attack']} {row['defense']} {row['model']}",
        )
        for row in LAUNCHES
    ],
)
def test_an_iteration_launches_and_waits_no_more_than_committed(gpu: ModuleType, row: Mapping[str, str]) -> None:
    counts = []
    for steps in (row["each"], row["short"], row["long"]):  # the first does what is done once in a process
        observation = seen("pretend", row["model"], row["defense"], row["threat"])
        gpu.clear()
        found = attacked(row["attack"].format(steps), observation)
        assert found.evaluations is not None
        iterations = int(found.evaluations.max()) / int(row["each"])
        counts.append((gpu.total("launch"), gpu.total("wait"), iterations))
    launches, waits, iterations = (long - short for short, long in zip(*counts[1:]))
    assert iterations >= 4
    assert launches / iterations <= float(row["launches"])
    assert float(row["waits"]) - 0.01 < waits / iterations <= float(row["waits"])


def test_a_closed_form_launches_about_the_same_for_any_number_of_trials(gpu: ModuleType) -> None:
    counts = []
    for trials in (2, 64):
        observation = seen("pretend", trials=trials)
        gpu.clear()
        attacked("peel", observation)
        counts.append((gpu.total("launch"), gpu.total("wait")))
    assert max(launches for launches, _ in counts) <= 1050  # before, 300 a trial
    assert {waits for _, waits in counts} == {30}  # before, 69 a trial


def test_a_generator_is_compared_with_the_images_once_in_a_search(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Tiny.card
    monkeypatch.setattr(Tiny, "card", lambda self: replace(real(self), unseen=torch.zeros(SHAPE)))
    observation = replace(seen("pretend"), note=pytest.fail)  # which a search that waits would call
    attacked("ggl(budget=2, optimizer=adam, generator=tiny)", observation)


# Out of memory


class Told(NullProgress):
    """Keeps the lines for the user."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


@dataclass(frozen=True)
class Greedy(leakbench.Attack):
    """Holds a mebibyte a trial, as an attack's unknowns would be."""

    name: ClassVar[str] = "greedy"
    reference: ClassVar[str] = "a test"

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        held: list[Tensor] = []
        for _ in range(observation.trials):
            held.append(torch.zeros(2**18, device=observation.device))
        return Reconstruction(observation.mean_image.expand(observation.trials, *observation.image_shape).clone())


def ran(
    tmp_path: Path, attack: object, images: int, axes: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Any, list[str]]:
    """Return the results of attacks on clients without a defense, and the lines for the user."""
    axes = {"defenses": ["none"], "models": ["lenet"], "datasets": ["samples"], **(axes or {})}
    matrix = leakbench.Matrix(attacks=[attack], images=images, floors=False, **axes)
    progress = Told()
    engine.run(matrix, tmp_path, engine.RunOptions(**options), progress=progress)
    return leakbench.Run(tmp_path).results(), progress.notes


def test_a_chunk_that_does_not_fit_is_halved_and_then_fits(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakbench.metrics.of_run", lambda named, batches=False: [])
    monkeypatch.setattr("leakbench.engine.worker.foreign", lambda attack: False)
    monkeypatch.setattr("leakbench.engine.isolation.foreign", lambda attack: False)
    gc.collect()
    with gpu.limited(12 * 2**20):  # room for 8 of 16 trials
        results, notes = ran(tmp_path, Greedy(), 16, device="pretend", chunk=16)
    assert list(results["status"]) == ["ok"] * 16
    assert [line for line in notes if "memory" in line] == ["16 trials at a time do not fit into memory; trying 8"]


@dataclass(frozen=True)
class Hungry(leakbench.Metric):
    """Holds a mebibyte an image, as the features of a network would be, and has the image's mean."""

    name: ClassVar[str] = "hungry"
    convention: ClassVar[str] = "a mean"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        held = [torch.zeros(2**18, device=truth.device) for _ in truth]
        return truth.double().flatten(1).mean(1) + torch.stack([one[0] for one in held])


def test_a_metric_that_does_not_fit_halves_the_chunk_and_then_has_all_values(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakbench.metrics.of_run", lambda named, batches=False: [Hungry()])
    gc.collect()
    with gpu.limited(12 * 2**20):  # room for 8 of 16 images
        results, notes = ran(tmp_path, "grey", 16, device="pretend", chunk=16)
    means = [float(image.double().mean()) for image in datasets.parse("samples").load(range(16))[0]]
    assert list(results["status"]) == ["ok"] * 16
    assert list(results["hungry"]) == pytest.approx(means)
    assert [line for line in notes if "grey" not in line] == ["16 trials at a time do not fit into memory; trying 8"]


BATCHES: Mapping[str, Mapping[str, Any]] = {
    "ig(steps=2)": {"defenses": ["none", "keylock(length=9)"]},
    "lb(steps=2)": {"models": ["mlp(hidden=8)"]},
    "disaggregate": {"models": ["mlp(hidden=64)"]},
    "cocktail": {"models": ["mlp(hidden=16, activation=sigmoid)"]},
    "imprint": {"threats": ["server=imprint(bins=16)"], "defenses": ["none", "secagg(clients=2)"]},
    "trap": {"threats": ["server=trap"]},
}
"""Attacks on clients of several images, and what each needs."""


@pytest.mark.parametrize(
    "attack",
    [pytest.param(one, marks=() if one in ("imprint", "lb(steps=2)") else pytest.mark.long) for one in BATCHES],
)
def test_clients_of_several_images_end_as_on_the_cpu(gpu: ModuleType, tmp_path: Path, attack: str) -> None:
    usual = {"defenses": ["none"], "models": ["lenet"], "datasets": ["samples(size=12)"], "images": 4}
    matrix = leakbench.Matrix(attacks=[attack], clients=["local(batch=2)"], **{**usual, **BATCHES[attack]})
    found = {}
    for device in ("cpu", "pretend:1"):
        engine.run(matrix, tmp_path / device, engine.RunOptions(device=device, salt="0" * 32), progress=Told())
        found[device] = leakbench.Run(tmp_path / device).results()
    assert list(found["pretend:1"]["reason"]) == list(found["cpu"]["reason"])
    assert "error" not in set(found["cpu"]["status"])
    for score in ("psnr", "recovered_share"):  # dB: a separation by independence amplifies rounding
        assert list(found["pretend:1"][score]) == pytest.approx(list(found["cpu"][score]), abs=0.5, nan_ok=True)


# Draws and precision


def test_dropout_in_training_is_seeded_on_the_device(gpu: ModuleType) -> None:
    x, device = torch.ones(64, device="pretend:1"), torch.device("pretend:1")
    rows = []
    for key in ("a", "a", "b"):
        with seeded(key, device=device):
            rows.append(F.dropout(x).tolist())
    assert rows[0] == rows[1] != rows[2]
    assert gpu.core().state(1).numel() == 0  # unseeded, as before


def set_high() -> None:
    torch.set_float32_matmul_precision("high")


def set_all() -> None:
    torch.backends.fp32_precision = "tf32"


def set_convolutions() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@contextmanager
def precision(how: Callable[[], None] | None) -> Iterator[None]:
    """Restore what a test sets of torch's precision."""
    backends = torch.backends
    owners = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = [owner.fp32_precision for owner in owners]
    try:
        if how is not None:
            how()
        yield
    finally:
        backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = True
        for owner, own in zip(owners, before):
            owner.fp32_precision = own


@pytest.mark.parametrize("how", [None, set_high, set_all, set_convolutions])
def test_products_have_full_precision_whatever_was_set_before(how: Callable[[], None] | None) -> None:
    backends = torch.backends

    def state() -> list[object]:
        return [owner.fp32_precision for owner in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul)]

    with precision(how):
        before = state()
        with full_precision(deterministic=True):
            assert state() == ["ieee"] * 3
            assert not backends.cuda.matmul.allow_tf32  # can be read, and agrees
            assert not backends.cudnn.allow_tf32
            assert backends.cudnn.deterministic
        assert state() == before


# Networks and devices of a user


class Shifted(nn.Module):
    """A network that keeps a tensor as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))
        self.mean = torch.full((1, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x - self.mean)
        return logits


@dataclass(frozen=True)
class ShiftedModel(leakbench.Model):
    """A model of a plugin that builds such a network."""

    name: ClassVar[str] = "shifted"

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        return Shifted()


def test_a_plain_tensor_of_a_network_goes_to_the_device(gpu: ModuleType) -> None:
    grey, paper = torch.full(SHAPE, 0.5), parse_threat("paper")
    for model in (ShiftedModel(), OwnModule("own", Shifted())):
        here, there = (
            attacked("ig(steps=2)", observe(model, defenses.parse("none"), paper, clients(2), CLASSES, grey, device))
            for device in ("cpu", "pretend:0")
        )
        same(here, there)


def test_a_device_is_named_or_refused(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_of(device_named("pretend")) == [torch.device(name) for name in GPUS]
    assert all_of(device_named("pretend:1")) == [torch.device("pretend:1")]
    with pytest.raises(BadOption, match="there are 2 PRETEND devices"):
        device_named("pretend:2")
    module = accelerator(torch.device("pretend"))
    assert module is not None
    make_current(torch.device("pretend:1"))
    assert module.current_device() == 1
    make_current(torch.device("pretend:0"))
    assert engine._named(torch.device("pretend:1")) == "pretend:1 (a pretended device)"
    monkeypatch.setattr(module, "is_available", lambda: False)
    # the head of a Ray cluster has no GPU, and its driver raises if it is asked for one
    monkeypatch.setattr(module, "get_device_name", pytest.fail)
    assert engine._named(torch.device("pretend")) == "pretend (of other machines)"
    assert engine._device(engine.RunOptions("cuda", executor="ray")) == torch.device("cuda")


def test_workers_take_the_devices_in_turn(gpu: ModuleType) -> None:
    work = WorkerContext([], torch.device("pretend"), strict=False)
    executor = engine._executor(work, engine.RunOptions(workers=3), NullProgress().move)
    assert isinstance(executor, ProcessExecutor)
    assert [one.device for one in executor._works] == [torch.device(name) for name in (*GPUS, GPUS[0])]


@pytest.mark.parametrize("axes", [{}, {"clients": ["local(batch=2)"], "datasets": ["samples(size=12)"]}])
def test_scores_are_read_from_the_device_at_once(gpu: ModuleType, tmp_path: Path, axes: Mapping[str, Any]) -> None:
    waits = []
    for images in (4, 16):
        gpu.clear()
        ran(tmp_path / str(images), "grey", images, axes, device="pretend", chunk=16)
        waits.append({place: times for place, times in gpu.counted("wait").items() if "engine/worker.py" in place})
    assert waits[0] == waits[1] != {}


def test_an_actor_of_a_cluster_has_its_device_as_the_current_one(gpu: ModuleType) -> None:
    module = torch.get_device_module("pretend")
    RayWorker(packed(WorkerContext([], torch.device("pretend:1"), strict=False)), [], [], 1)
    assert module.current_device() == 1
    module.set_device(0)


@pytest.mark.long
def test_each_process_has_a_device_of_its_own(gpu: ModuleType, tmp_path: Path) -> None:
    load_plugin(Path(__file__).with_name("plugin.py"))
    attack = "ig(steps=2)"
    here, notes = ran(tmp_path / "one", attack, 4, device="pretend:1", chunk=1)
    assert not [line for line in notes if "left out" in line]  # a metric that fails has no value
    there, _ = ran(tmp_path / "two", attack, 4, device="pretend", chunk=1, workers=2)
    assert list(there["status"]) == ["ok"] * 4
    assert list(there["psnr"]) == list(here["psnr"])
    # whatever names no index is made on the process's own device, and takes no memory of another one
    metrics = {"metrics": ["current_device"]}
    own, _ = ran(tmp_path / "own", attack, 2, metrics, device="pretend:1", chunk=1, workers=2)
    assert list(own["current_device"]) == [1.0, 1.0]
    apart, _ = ran(tmp_path / "apart", "current-device", 2, device="pretend:1")
    assert list(apart["reason"]) == ["device 1"] * 2


@pytest.mark.long
def test_the_check_of_a_gpu_passes_on_the_pretended_one(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "tools/cuda_check.py", "--device", "pretend", "--small", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    verdicts = {line.split()[1] for line in done.stdout.splitlines() if line[:1] == " "}
    assert {"PASS", "INFO", "SKIP"} >= verdicts > {"INFO"}
    assert (tmp_path / "check.md").exists()
