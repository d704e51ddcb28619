"""Workers: the same numbers as one process, and nothing lost with a worker that dies, hangs or cannot start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from conftest import hang
from test_engine import (  # noqa: F401
    Counter,
    RaisesForOne,
    Thief,
    Tiny,
    done,
    go,
    measured,
    no_assets,
    plan,
)
from test_store import provenance
from test_worst_case import Counts, Knows, ensemble, planned

from leakbench import Defense, LeakbenchError, Reconstruction
from leakbench.core.lock import PREFIX, remove_abandoned, temporary_folder
from leakbench.datasets import spec
from leakbench.engine import executors as workers
from leakbench.engine.progress import NullProgress
from leakbench.engine.run import RunOptions, usual_workers
from leakbench.engine.schedule import MAX_DEATHS, Schedule
from leakbench.engine.worker import ClientData, MeasureTask, without_score
from leakbench.store.run_file import FILE, Store


@pytest.fixture(autouse=True)
def one_thread():
    """Sums do not depend on the number of threads then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    assert not multiprocessing.active_children()


@dataclass(frozen=True)
class Dies(Thief):
    """Kills its process at one image: always, or so many times (counted by files in a folder)."""

    name: ClassVar[str] = "dies"
    folder: str = ""
    times: int = 1
    image: int = 2

    def give(self, images, observation, rng):
        if self.rows(rng, self.image) and len(list(Path(self.folder).iterdir())) < self.times:
            (Path(self.folder) / f"{time.monotonic_ns()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Reconstruction(images)


@dataclass(frozen=True)
class Hangs(Thief):
    """Does not come back at one image."""

    name: ClassVar[str] = "hangs"
    folder: str = ""

    def give(self, images, observation, rng):
        if self.rows(rng, 2):
            hang(self.folder)
        return Reconstruction(images)


def spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers as users have them, and not as copies."""
    monkeypatch.setattr(workers, "multiprocessing", multiprocessing)


@pytest.mark.long
def test_workers_give_the_bytes_of_one_process(tmp_path, monkeypatch):
    spawned(monkeypatch)
    matrix = plan(attacks=["random", "ig(steps=2)", RaisesForOne()], defenses=["none", "noise(scale=0.1)"], images=5)
    alone, seen = go(matrix, tmp_path / "1", chunk=2), Counter()
    two = go(matrix, tmp_path / "2", chunk=2, workers=2, progress=seen)
    pd.testing.assert_frame_equal(measured(alone), measured(two))
    assert list(alone.index) == list(two.index)
    assert sum(seen.chunks) == 30
    with Store.open(tmp_path / "1" / FILE) as first, Store.open(tmp_path / "2" / FILE) as second:
        assert first.images(alone.index) == second.images(alone.index)
        assert [session.provenance.workers for session in second.sessions()] == [2]


@pytest.mark.long
def test_a_worker_that_dies_costs_nothing(tmp_path):
    (tmp_path / "deaths").mkdir()
    seen = Counter()
    matrix = plan(attacks=[Dies(str(tmp_path / "deaths"), times=1), "random"])
    results = go(matrix, tmp_path / "run", chunk=4, workers=2, progress=seen)
    assert set(results["status"]) == {"ok"}
    assert len(list((tmp_path / "deaths").iterdir())) == 1
    assert sum(seen.chunks) == 8
    assert [line for line in seen.notes if "SIGKILL" in line]


@pytest.mark.long
def test_an_ensemble_skips_the_same_trials_with_workers(tmp_path):
    matrix = ensemble(Knows("0 2"), Counts("2 3"), Thief(), defenses=["none", "noise(scale=0.01)"], floors=True)
    alone, two = go(matrix, tmp_path / "1", chunk=2), go(matrix, tmp_path / "2", chunk=2, workers=2)
    assert len(alone) < len(matrix.trials())
    pd.testing.assert_frame_equal(measured(alone), measured(two))
    pd.testing.assert_frame_equal(
        planned(tmp_path / "1").drop(columns="seconds"), planned(tmp_path / "2").drop(columns="seconds")
    )


@pytest.mark.long
def test_a_trial_that_hangs_is_stopped_at_the_time_limit(tmp_path, monkeypatch, hanging):
    temporary = temporary_files(tmp_path / "tmp", monkeypatch)
    abandoned = temporary / f"{PREFIX}attack-abcdefgh"  # of a worker that was killed before
    abandoned.mkdir(mode=0o700)
    spawned(monkeypatch)
    matrix = plan(attacks=[Hangs(str(hanging))], images=[3, 2])
    results = go(matrix, tmp_path / "run", chunk=2, time_limit=1).set_index("image")
    assert not abandoned.exists()
    assert results["status"].to_dict() == {3: "ok", 2: "error"}
    assert "timed out after 1 s" in results["reason"][2]


def temporary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new folder in which this process makes its temporary files."""
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_temporary_folder_is_deleted_by_others_once_its_process_has_ended(tmp_path, monkeypatch):
    temporary = temporary_files(tmp_path / "tmp", monkeypatch)
    others = [temporary / name for name in ("attack-abcdefgh", f"{PREFIX}attack-long-name", f"{PREFIX}draft-abcdefgh")]
    for other in others:
        other.mkdir(mode=0o700)
    public = temporary / f"{PREFIX}attack-abcdefgh"
    public.mkdir()
    public.chmod(0o755)
    (tmp_path / "kept").mkdir(mode=0o700)
    link = temporary / f"{PREFIX}check-abcdefgh"
    link.symlink_to(tmp_path / "kept")
    code = "import time; from leakbench.core.lock import temporary_folder as made\nwith made('attack') as folder:\n"
    code += "    (folder / 'file').touch(); print(folder, flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)}
    )
    held = Path(process.stdout.readline().strip())
    with temporary_folder("check") as own:
        remove_abandoned()
        assert held.exists()
        assert own.exists()
        process.kill()
        process.communicate()
        assert held.exists()
        remove_abandoned()
        assert set(temporary.iterdir()) == {*others, public, link, own}
        assert (tmp_path / "kept").exists()
    assert not own.exists()


@pytest.mark.long
def test_ctrl_c_ends_the_workers_and_the_run_is_resumed(tmp_path):
    matrix = plan(attacks=["random", "mean"], images=8)
    with pytest.raises(KeyboardInterrupt):
        go(matrix, tmp_path, chunk=2, workers=2, progress=Counter(stop_after=2))
    assert not multiprocessing.active_children()
    assert 4 <= len(done(tmp_path)) < 16
    assert len(go(matrix, tmp_path, chunk=2)) == 16


@pytest.mark.long
def test_a_component_that_no_process_can_import_is_refused_in_one_line(tmp_path):
    @dataclass(frozen=True)
    class Local(Thief):
        name: ClassVar[str] = "local"

    with pytest.raises(LeakbenchError, match=r"define it at the top level of a module, or run with workers=1") as told:
        go(plan(attacks=[Local()]), tmp_path / "run", workers=2)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_cells_are_cut_for_workers_where_chunks_stay_large(tmp_path):
    found = {}
    for images, attacks in ((4, ["ig"]), (4, ["ig", "dlg"]), (40, ["ig"]), (80, ["ig", "dlg"])):
        trials = plan(attacks=[*attacks, "random"], images=images).trials()
        with Store.create(tmp_path / f"{images}-{len(attacks)}.sqlite") as store:
            store.add_trials(trials)
            data = ClientData({}, {}, torch.zeros(1, 12, 12), 4)
            schedule = Schedule(
                trials, store, {"tiny": data}, threshold=None, size=None, workers=4, skip=lambda skipped: None
            )
            task = schedule.next()
            assert isinstance(task, MeasureTask)
            found[images, len(attacks)] = task.trials
    assert found == {(4, 1): 1, (4, 2): 2, (40, 1): 10, (80, 2): 20}


def test_trials_that_end_at_different_times_are_cut_for_workers_too(tmp_path):
    trials = plan(attacks=["dlg"], images=40).trials()
    found = {}
    for workers_, begun in ((1, 0), (2, 0), (2, 7)):
        with Store.create(tmp_path / f"{workers_}-{begun}.sqlite") as store:
            store.add_trials(trials)
            session = store.start_session(provenance())
            data = ClientData({}, {}, torch.zeros(1, 12, 12), 4)
            store.write([without_score(data, trial, "unsupported", "") for trial in trials[:begun]], session)
            schedule = Schedule(
                trials, store, {"tiny": data}, threshold=None, size=8, workers=workers_, skip=lambda skipped: None
            )
            chunks = iter(schedule.next, None)
            found[workers_, begun] = [len(chunk.trials) for chunk in chunks]
    assert found == {(1, 0): [32, 8], (2, 0): [24, 16], (2, 7): [17, 16]}


@pytest.mark.parametrize(("defenses", "trials"), [(["none"], 2), (["none", "noise(scale=0.1)"], 4)])
def test_cells_that_wait_for_each_other_are_cut_for_all_workers(tmp_path, defenses, trials):
    matrix = ensemble(["ig"], ["dlg"], ["lb"], defenses=defenses, images=4)
    with Store.create(tmp_path / "run.sqlite") as store:
        store.add_trials(matrix.trials())
        data = {spec(matrix.datasets[0]): ClientData({}, {}, torch.zeros(1, 12, 12), 4)}
        schedule = Schedule(
            matrix.trials(), store, data, threshold=0.6, size=None, workers=2, skip=lambda skipped: None
        )
        task = schedule.next()
    assert isinstance(task, MeasureTask)
    assert task.trials == trials


@pytest.mark.long
def test_a_process_says_how_far_its_chunk_is(tmp_path):
    begun: dict[int, int] = {}
    seen: list[tuple[int, int, int]] = []

    class Moves(NullProgress):
        def begin(self, chunk, trials):
            begun[chunk] = len(trials)

        def move(self, chunk, done, total):
            seen.append((begun[chunk], done, total))

        def end(self, chunk):
            del begun[chunk]

    matrix = plan(attacks=["ig(steps=3)"], images=2)
    go(matrix, tmp_path / "run", chunk=2, workers=2, progress=Moves())
    assert seen
    assert {(trials, total) for trials, _, total in seen} == {(2, 3)}, seen
    assert all(0 <= done <= 3 for _, done, _ in seen)
    assert not begun


@pytest.mark.parametrize(
    ("threads", "images", "device", "workers"),
    [(1, 64, "cpu", 1), (4, 7, "cpu", 1), (4, 16, "cpu", 2), (4, 64, "cpu", 4), (4, 64, "cuda", 1)],
)
def test_a_command_has_a_worker_for_each_thread(monkeypatch, tmp_path, threads, images, device, workers):
    monkeypatch.setattr("leakbench.engine.run.torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("leakbench.engine.run.free_memory", lambda device: 64 * 2**30)
    monkeypatch.setattr("leakbench.engine.run.device_named", lambda name: torch.device(device))
    assert usual_workers(plan(attacks=["ig", "random"], images=images), tmp_path, RunOptions()) == workers


def test_a_command_has_no_more_workers_than_memory_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("leakbench.engine.run.torch.get_num_threads", lambda: 64)
    matrix, found = plan(attacks=["ig"], images=600), {}
    for room in (1, 2**30, 5 * 2**30, 2**40):
        monkeypatch.setattr("leakbench.engine.run.free_memory", lambda device, room=room: room)
        found[room] = usual_workers(matrix, tmp_path, RunOptions(device="cpu"))
    assert found == {1: 1, 2**30: 1, 5 * 2**30: 5, 2**40: 64}


@dataclass(frozen=True)
class Held(Defense):
    """Holds what no other process can be given."""

    name: ClassVar[str] = "held"
    lock: Any = field(default_factory=threading.Lock)


def test_a_command_with_a_component_that_cannot_be_sent_has_one_worker(monkeypatch, tmp_path):
    monkeypatch.setattr("leakbench.engine.run.torch.get_num_threads", lambda: 2)
    matrices = [plan(attacks=["ig"], defenses=[one], images=64) for one in ("none", Held())]
    assert [usual_workers(one, tmp_path, RunOptions()) for one in matrices] == [2, 1]


def test_a_command_whose_trials_are_all_done_starts_no_process(monkeypatch, tmp_path):
    monkeypatch.setattr("leakbench.engine.run.torch.get_num_threads", lambda: 2)
    matrix, found = plan(attacks=["ig"], images=16), []
    trials = matrix.trials()
    with Store.create(tmp_path / FILE) as store:
        store.add_trials(trials)
        session = store.start_session(provenance())
        data = ClientData({}, {}, torch.zeros(1, 12, 12), 4)
        for some in (trials[:15], trials[15:]):
            store.write([without_score(data, trial, "unsupported", "") for trial in some], session)
            found.append(usual_workers(matrix, tmp_path, RunOptions()))
    assert found == [2, 1]


def test_a_task_whose_workers_die_is_repeated_halved_and_given_up(tmp_path):
    trials = plan(images=4).trials()
    image = torch.zeros(1, 12, 12)
    data = {"tiny": ClientData(dict.fromkeys(range(4), image), dict.fromkeys(range(4), 0), image, 4)}
    with Store.create(tmp_path / FILE) as store:
        store.add_trials(trials)
        schedule = Schedule(trials, store, data, threshold=None, size=None, workers=1, skip=lambda skipped: None)
        for _ in range(MAX_DEATHS):
            task = schedule.next()
            assert isinstance(task, MeasureTask)
            assert schedule.next() is None
            assert schedule.lost(task, "by SIGKILL") == []
        assert store.chunk(trials[0].cell.key) == 1
        store.record_chunk(trials[0].cell.key, 4)
        schedule = Schedule(trials, store, data, threshold=None, size=None, workers=1, skip=lambda skipped: None)
        given_up, tried = [], []
        while (task := schedule.next()) is not None:
            tried.append(len(task.trials))
            if any(trial.image == 1 for trial in task.trials):
                given_up += schedule.lost(task, "by SIGKILL")
            else:
                schedule.finished(task)
        assert tried == [4, 4, 4, 2, 2, 2, 1, 1, 1, 1, 2]
        (result,) = given_up
        assert (result.trial.image, result.status) == (1, "error")
        assert result.reason == "3 workers died while they ran it, the last one by SIGKILL"
