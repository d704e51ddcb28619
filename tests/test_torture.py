"""Kills, interruptions, a full disk and a clock that jumps, each really caused: ``make torture``."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import psutil
import pytest
import torch
from conftest import SALT, TESTS
from test_engine import Thief, go, measured, no_assets, plan  # noqa: F401

import leakbench
from leakbench import LeakbenchError, Matrix, Reconstruction
from leakbench.analysis.integrity import check
from leakbench.engine.run import finished
from leakbench.engine.worker import ClientData, without_score
from leakbench.store import merge as merging
from leakbench.store.merge import merge
from leakbench.store.run_file import FILE, Store

pytestmark = pytest.mark.torture
KILLS = 50


@dataclass(frozen=True)
class Slower(Thief):
    name: ClassVar[str] = "slower"

    def give(self, images, observation, rng):
        time.sleep(0.15 * len(images))
        return Reconstruction(images)


def matrix() -> Matrix:
    attacks = [Slower(), "random", "ig(steps=2)"]
    return plan(attacks=attacks, defenses=["none", "noise(scale=0.01)"], images=16, seeds=2)


def count_writes(store: Store) -> None:
    """Have every row of results that is written leave another in a table of the same file, by the same transaction."""
    store._db.execute("CREATE TABLE IF NOT EXISTS writes (trial TEXT, status TEXT)")
    store._db.execute(
        "CREATE TEMP TRIGGER counts AFTER INSERT ON main.results"
        " BEGIN INSERT INTO writes VALUES (new.trial_id, new.status); END"
    )


def repeats(out: Path) -> int:
    """How often a result that stood was written again."""
    with Store.open(out / FILE, readonly=True) as store:
        rows = store.query("SELECT count(*) AS n FROM writes WHERE status != 'error' GROUP BY trial")
        return sum(row["n"] - 1 for row in rows)


def drive(out: str) -> None:
    """Be the driver of a run whose writes are counted."""
    torch.set_num_threads(1)
    init = Store.__init__

    def counted(store: Store, path: Path, db: sqlite3.Connection, readonly: bool) -> None:
        init(store, path, db, readonly)
        if not readonly:
            count_writes(store)

    Store.__init__ = counted
    leakbench.run(matrix(), out, chunk=4, workers=2, device="cpu", salt=SALT)


def driver(out: Path, log: Path) -> subprocess.Popen[bytes]:
    script = f"import test_torture; test_torture.drive({str(out)!r})"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with log.open("ab") as told:
        return subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stderr=told,
            start_new_session=True,
        )


def held(matrix: Matrix) -> ClientData:
    """What the clients of a matrix of two images hold."""
    (dataset,) = matrix.datasets
    images, labels = dataset.load([0, 1])
    return ClientData(dict(enumerate(images)), dict(enumerate(labels.tolist())), dataset.mean(), dataset.num_classes)


def written(out: Path) -> dict[str, tuple[int, str]]:
    """Which session wrote each result, and when; errors, which are done again, left out."""
    if not (out / FILE).exists() or not (out / FILE).stat().st_size:
        return {}
    try:
        with Store.open(out / FILE, readonly=True) as store:
            rows = store.query("SELECT trial_id, session_id, finished FROM results WHERE status != 'error'")
            return {row["trial_id"]: (row["session_id"], row["finished"]) for row in rows}
    except LeakbenchError:  # it is being made
        return {}


def gone(processes: list[psutil.Process], start: float = 0.0) -> bool:
    """Whether all of these end within half a minute, and the time of three starts: one that starts notices it late."""
    _, alive = psutil.wait_procs(processes, timeout=30 + 3 * start)
    return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_kill_9_of_drivers_and_workers_loses_and_repeats_nothing(tmp_path, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = go(matrix(), tmp_path / "whole", chunk=4)
    torch.set_num_threads(before)
    draw, begin = random.Random(0), time.monotonic()
    subprocess.run(
        [sys.executable, "-c", "import leakbench.engine.executors"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    pace = 1.0 + time.monotonic() - begin  # what a worker takes to start
    drivers = workers = lost = twice = runs = 0
    while drivers + workers < KILLS:
        out, known, process = tmp_path / f"run{runs}", {}, None
        runs += 1
        while finished(out, matrix()) < len(whole):
            process = driver(out, tmp_path / "log")
            here = psutil.Process(process.pid)
            while process.poll() is None:
                time.sleep(draw.uniform(0.0, 1.5 * pace))
                try:
                    children = here.children(recursive=True)
                    own = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
                except psutil.NoSuchProcess:
                    break
                if drivers + workers < KILLS and process.poll() is None:
                    if draw.random() < 0.15:
                        process.kill()
                        process.wait()
                        drivers += 1
                        assert gone(children, pace), "workers outlive their driver"
                    elif own:
                        draw.choice(own).kill()
                        workers += 1
                now = written(out)
                lost += len(known.keys() - now.keys())
                twice += sum(now[trial] != known[trial] for trial in known.keys() & now.keys())
                known = now
            assert process.wait() in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        results = leakbench.Run(out).results().set_index("trial")
        lost += len(set(whole.index) - set(results.index))
        twice += len(results) - results.index.nunique() + repeats(out)
        pd.testing.assert_frame_equal(measured(results), measured(whole))
        assert list(results.index) == list(whole.index)
        assert check(out).code == 0
    figures = {
        "kills": drivers + workers,
        "drivers": drivers,
        "workers": workers,
        "runs": runs,
        "trials": len(whole),
        "lost": lost,
        "duplicated": twice,
        "seconds": round(time.monotonic() - begin),
    }
    with capsys.disabled():
        print(
            "\n{kills} kills ({drivers} of drivers, {workers} of workers) over {runs} runs of {trials} trials: "
            "lost = {lost}, duplicated = {duplicated}; tables equal to the undisturbed run's".format(**figures)
        )
    if "LEAKBENCH_FIGURES" in os.environ:  # python -m benchmarks.scale --page takes it into its page
        (Path(os.environ["LEAKBENCH_FIGURES"]) / "torture.json").write_text(json.dumps(figures, indent=2) + "\n")
    assert (lost, twice) == (0, 0)
    assert drivers + workers >= KILLS


def test_a_result_that_is_written_again_is_counted(tmp_path):
    matrix = plan(attacks=["random"], images=2)
    results = go(matrix, tmp_path)
    with Store.open(tmp_path / FILE) as store:
        count_writes(store)
        again = [without_score(held(matrix), trial, "unsupported", "again") for trial in matrix.trials()]
        store.write(again, 1)
        assert len(results) == len(store.results()) == 2
    assert repeats(tmp_path) == 0
    with Store.open(tmp_path / FILE) as store:
        count_writes(store)
        store.write(again[:1], 1)
    assert repeats(tmp_path) == 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 500 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "leakbench-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let its user mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_no_result_and_the_run_goes_on(small_disk, tmp_path):
    many = plan(attacks=["random"], images=16, seeds=20)
    with pytest.raises(LeakbenchError, match="free space on its disk and resume") as told:
        go(many, small_disk / "run", chunk=8)
    assert "\n" not in str(told.value)
    before = written(small_disk / "run")
    assert 0 < len(before) < 320
    assert len(before) % 8 == 0
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    results = go(many, small_disk / "run", chunk=8)
    assert len(results) == 320
    after = written(small_disk / "run")
    assert {trial: after[trial] for trial in before} == before
    pd.testing.assert_frame_equal(measured(results), measured(go(many, tmp_path / "whole", chunk=8)))
    assert check(small_disk / "run").code == 0


def test_a_report_on_a_full_disk_is_one_line_and_the_old_one_stays(small_disk):
    go(plan(attacks=["random"], images=2), small_disk / "run")
    run = leakbench.Run(small_disk / "run")
    before = {path: path.read_bytes() for path in run.report()}
    go(plan(attacks=["random"], images=3), small_disk / "run")
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(LeakbenchError, match="free space") as told:
        run.report()
    assert "\n" not in str(told.value)
    assert {path: path.read_bytes() for path in before} == before
    (small_disk / "filler").unlink()
    assert len(run.report()) == len(before)


def killed(parts: list[str], out: str) -> None:
    """Be a merge that is killed in the middle of the second run that it adds."""
    insert, added = merging._results, []

    def dies(db: sqlite3.Connection, other: Store, sessions: Mapping[int, int]) -> int:
        count = insert(db, other, sessions)
        added.append(count)
        if len(added) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    merging._results = dies
    merge([Path(part) for part in parts], Path(out))


def test_a_merge_that_was_killed_is_started_again(tmp_path):
    matrix = plan(attacks=["random", "mean"], images=16)
    whole = go(matrix, tmp_path / "whole")
    parts = [tmp_path / str(number) for number in (1, 2, 3)]
    for number, part in enumerate(parts, 1):
        go(matrix, part, shard=f"{number}/3", salt=SALT)
    script = f"import test_torture; test_torture.killed({list(map(str, parts))!r}, {str(tmp_path / 'all')!r})"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path})
    assert run.returncode == -signal.SIGKILL
    assert len(written(tmp_path / "all")) == len(written(parts[0]))
    assert check(tmp_path / "all").faults == ()
    merge(parts, tmp_path / "all")
    merged = leakbench.Run(tmp_path / "all").results().set_index("trial")
    pd.testing.assert_frame_equal(measured(merged), measured(whole))
    assert check(tmp_path / "all").code == 0


def test_a_read_only_run_file_is_one_line_and_is_still_read(small_disk):
    few = plan(attacks=["random"], images=2)
    go(few, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LeakbenchError, match="writable") as told:
        go(plan(attacks=["random"], images=3), small_disk / "run")
    assert "\n" not in str(told.value)
    assert len(leakbench.Run(small_disk / "run").results()) == 2
    assert check(small_disk / "run").code == 0


JUMPS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* The wall clock jumps by up to two days, forwards and back, at every look; the monotonic one does not. */
static long jump(void) {
    static long looks;
    return (__sync_fetch_and_add(&looks, 1) * 7919 % 345600) - 172800;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, now);
    if (id == CLOCK_REALTIME) now->tv_sec += jump();
    return code;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    if (out) *out = fine.tv_sec;
    return fine.tv_sec;
}
"""


def jumping(out: str) -> None:
    """Run with a time limit while the clock jumps, and say how far it did."""
    looks = [time.time() for _ in range(100)]
    leakbench.run(plan(attacks=["random", "ig(steps=2)"], images=8), out, chunk=4, workers=2, time_limit=30, salt=SALT)
    print(max(looks) - min(looks))


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("this machine has no C compiler, with which the clock is made to jump")
    (tmp_path / "jumps.c").write_text(JUMPS)
    library = tmp_path / "jumps.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "jumps.c", "-ldl"], check=True)
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", f"import test_torture; test_torture.jumping({str(tmp_path / 'run')!r})"],
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) > 86400
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    steady = go(plan(attacks=["random", "ig(steps=2)"], images=8), tmp_path / "steady", chunk=4)
    torch.set_num_threads(before)
    jumped = leakbench.Run(tmp_path / "run").results().set_index("trial")
    pd.testing.assert_frame_equal(measured(jumped), measured(steady))
    assert check(tmp_path / "run").code == 0


SPEC = [
    "--attack",
    "random",
    "--attack",
    "ig(steps=60)",
    "--defense",
    "none",
    "--model",
    "lenet",
    "--dataset",
    "samples",
]


def test_ctrl_c_at_any_time_ends_all_processes_and_leaves_a_sound_run(tmp_path, capsys):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "leakbench",
        "run",
        "matrix",
        *SPEC,
        "--images",
        "32",
        "--workers",
        "2",
        "--chunk",
        "4",
    ]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    draw, phases = random.Random(1), []
    for phase in [phase for phase in ("start", "run", "report") for _ in range(5)]:
        before = len(written(out))
        process = subprocess.Popen(
            [*command, "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "LEAKBENCH_HOME": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        here = psutil.Process(process.pid)
        while process.poll() is None and not any("torch" in each.path for each in here.memory_maps()):
            time.sleep(0.02)  # before that, Python itself answers
        awaited = {"start": 0, "run": min(before + 1, 128), "report": 128}[phase]
        while process.poll() is None and len(written(out)) < awaited:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, {"start": 8.0, "run": 2.0, "report": 4.0}[phase]))
        children = []
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it was done before
            children = here.children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, stderr = process.communicate(timeout=60)
        assert gone(children)
        ending = (
            phase == "report" and process.returncode == -signal.SIGINT and not stderr
        )  # it was done, and Python ended
        if process.returncode == 0 or ending:
            phases.append(f"{phase}: done")
            shutil.rmtree(out)
            continue
        # Python ends by the signal where it came while a string was executed, as in dataclasses: 130 to a shell too
        assert process.returncode in (130, -signal.SIGINT), stderr
        assert "Traceback" not in stderr, stderr
        lines = stderr.strip().splitlines()
        assert len(lines) == 1, stderr
        assert lines[0].startswith("stopped"), stderr
        phases.append(f"{phase}: {lines[0].partition(' of ')[0].partition(';')[0]}")
        if (out / FILE).exists():
            assert check(out).code in (0, 1)
    with capsys.disabled():
        print(f"\nCtrl-C {len(phases)} times: {sorted(set(phases))}")
    assert any(phase.startswith("run: stopped") for phase in phases), phases
