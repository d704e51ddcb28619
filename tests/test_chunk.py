"""How many trials run at a time: the knee of the cost, within memory, cut evenly, and kept for the next session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MEASURED

import leakbench
from leakbench import attacks
from leakbench.attacks.base import Attack
from leakbench.core import device as devices
from leakbench.core.rng import Rng
from leakbench.engine import batch_size as chunk
from leakbench.engine import worker as work
from leakbench.engine.isolation import Isolation
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix
from leakbench.store.run_file import FILE, Store

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "choose", MEASURED)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Replace clock and memory by functions of the number of trials; what is tried is noted."""

    def install(seconds: Callable[[int], float], used: Callable[[int], int], free: int = 10**9) -> list[int]:
        tried: list[int] = []

        def measure(step: object, size: int, device: torch.device) -> tuple[float, int]:
            tried.append(size)
            return seconds(size), used(size)

        monkeypatch.setattr(chunk, "_measure", measure)
        monkeypatch.setattr(chunk, "free_memory", lambda device: free)
        return tried

    return install


def test_the_smallest_chunk_at_which_a_trial_is_cheap(measured: Callable[..., list[int]]) -> None:
    # a fixed cost of 8 makes a trial cost 9, 5, 3, 2, 1.5, 1.25, 1.125, 1.0625, 1.03
    tried = measured(lambda size: 8.0 + size, lambda size: 1)
    assert chunk.choose(lambda trials: 0, 128 * 50, CPU) == 128
    assert tried == [2**power for power in range(9)]


def test_no_larger_chunk_is_tried_where_two_brought_nothing(measured: Callable[..., list[int]]) -> None:
    tried = measured(lambda size: float(size), lambda size: 1)
    assert chunk.choose(lambda trials: 0, 8 * 50, CPU) == 8
    assert tried == [1, 2, 4, 8, 16, 32]


def test_memory_bounds_the_chunk_before_it_is_tried(measured: Callable[..., list[int]]) -> None:
    tried = measured(lambda size: 1.0, lambda size: 100 * size, free=1000)
    assert chunk.choose(lambda trials: 0, 64, CPU) == 4  # 4 trials take 400 of the 500 that may be used
    assert tried == [1, 2, 4]


def test_what_runs_out_of_memory_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(step: object, size: int, device: torch.device) -> tuple[float, int]:
        if size > 2:
            raise torch.OutOfMemoryError("full")
        return 1.0, 1

    monkeypatch.setattr(chunk, "_measure", measure)
    assert chunk.choose(lambda trials: 0, 64, CPU) == 2


@pytest.mark.parametrize(("trials", "expected"), [(1, 1), (3, 3), (8, 8), (300, 150), (257, 129)])
def test_the_pieces_are_even_and_none_is_larger_than_what_was_measured(
    measured: Callable[..., list[int]], trials: int, expected: int
) -> None:
    measured(lambda size: 1.0, lambda size: 1)
    assert chunk.choose(lambda trials: 0, trials, CPU) == expected <= chunk.LARGEST_CHUNK["cpu"]


def test_a_measurement_takes_the_time_and_memory_of_a_step() -> None:
    kept = []

    def step(trials: int) -> int:
        kept.append(torch.ones(trials, 2**20))
        return 7

    seconds, used = chunk._measure(step, 3, CPU)
    assert [len(tensor) for tensor in kept] == [3, 3]
    assert seconds > 0
    assert used >= 7


def test_free_memory_is_within_the_machine_and_a_containers_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import psutil

    assert 0 < devices.free_memory(CPU) <= psutil.virtual_memory().total
    limit, current = tmp_path / "max", tmp_path / "current"
    limit.write_text("5000000\n")
    current.write_text("1000000\n")
    monkeypatch.setattr(devices, "_GROUPS", (str(limit), str(current)))
    assert devices.free_memory(CPU) == 4_000_000
    limit.write_text("max\n")
    assert devices.free_memory(CPU) > 4_000_000


@pytest.mark.parametrize("spec", [name for name in attacks.names() if not attacks.parse(name).floor and name != "ggl"])
def test_every_searching_attack_can_be_measured(spec: str) -> None:
    trial = _plan(attack=spec).trials()[0]
    blank = work.blank(trial.cell, set())
    several = chunk.repeated(blank, 3, own=False)
    assert several.trials == 3
    rng = Rng(("a", "b", "c"), CPU)
    held = trial.cell.attack.probe(several, rng)
    assert held is None or held > 0


def test_a_continued_run_is_cut_into_the_same_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    spied = work.Worker._together

    def spy(self: work.Worker, data: object, trials: list[object], slots: int) -> object:
        sizes.append(len(trials))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return spied(self, data, trials, slots)  # type: ignore[arg-type]

    monkeypatch.setattr(work.Worker, "_together", spy)
    monkeypatch.setattr(chunk, "choose", lambda step, trials, device, share: 2)
    with pytest.raises(KeyboardInterrupt):
        leakbench.run(_plan(images=5), tmp_path)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        assert store.chunk(_plan().trials()[0].cell.key) == 2
    monkeypatch.setattr(chunk, "choose", lambda step, trials, device, share: 5)
    leakbench.run(_plan(images=5), tmp_path)
    assert sizes == [2, 2, 2, 1]


def test_an_attack_that_cannot_be_measured_takes_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(devices.DEFAULT, "cpu", 3)
    monkeypatch.setattr(chunk, "choose", lambda step, trials, device, share: pytest.fail("measured"))
    leakbench.run(_plan(attack="grey", images=4), tmp_path)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        assert store.chunk(_plan(attack="grey").trials()[0].cell.key) == 3


@pytest.mark.long
def test_a_queue_is_worked_off_in_the_slots_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int | None]] = []

    def spy(self: Isolation, attack: Attack, observation: Observation, rng: Rng) -> object:
        seen.append((observation.trials, observation.slots))
        return attack(observation, rng)

    monkeypatch.setattr(Isolation, "run", spy)
    monkeypatch.setattr(chunk, "choose", lambda step, trials, device, share: 2)
    queued = leakbench.run(_plan(attack="dlg(steps=1)", images=9), tmp_path / "queue").results()
    assert seen == [(8, 2), (1, 2)]
    alone = leakbench.run(_plan(attack="dlg(steps=1)", images=9), tmp_path / "alone", chunk=1).results()
    assert queued["evaluations"].equals(alone["evaluations"])


def _plan(attack: str = "ig(steps=1)", images: int = 2) -> Matrix:
    return Matrix(
        attacks=[attack], defenses=["none"], models=["lenet"], datasets=["samples"], images=images, floors=False
    )
