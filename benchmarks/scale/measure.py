"""One measurement, in a process of its own: its figures as JSON on the last line of its output."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import psutil
import torch

import leakbench
from leakbench import api
from leakbench.engine import run as engine
from leakbench.engine.executors import Event, Executor, TaskDone
from leakbench.engine.progress import NullProgress
from leakbench.engine.worker import CheckTask, ChunkTask, MeasureTask, Refusal, Task, png
from leakbench.plan.trial import Result, Trial
from leakbench.store.run_file import FILE

SCORES = tuple(one.name for one in leakbench.metrics.of_run() if not one.name.startswith("lpips"))


class Clock(NullProgress):
    """The times of the first chunk of every worker and of the last chunk, and the number of trials between them.

    Workers begin together: the first chunk of each is not counted.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.chunks = self.trials = 0
        self.first = self.last = 0.0

    def finish(self, results):
        self.last = time.perf_counter()
        self.chunks += 1
        if self.chunks <= self.workers:
            self.first = self.last
        else:
            self.trials += len(results)


class Instant(Executor):
    """Does every task at once, so that only the overhead of leakbench is measured."""

    def __init__(self) -> None:
        noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self._pngs = [png(image) for image in noise]

    def run(self, tasks: Callable[[], Task | None], begin: Callable[[Task, int], None]) -> Iterator[Event]:
        while (task := tasks()) is not None:
            begin(task, 1)
            match task:
                case CheckTask():
                    yield TaskDone(task, Refusal({}, frozenset()))
                case MeasureTask():
                    yield TaskDone(task, 32)
                case ChunkTask():
                    yield TaskDone(task, [self._result(trial) for trial in task.trials])

    def _result(self, trial: Trial) -> Result:
        image, seed = trial.image, trial.seed
        value = (37 * image + 101 * seed + 13 * len(trial.cell.specs["attack"])) % 997 / 997
        scores = {name: value + place for place, name in enumerate(SCORES)}
        return Result(trial, "ok", "", 0.01, scores, self._pngs[(image + seed) % 64], self._pngs[image], image % 10)


def matrix(trials: int) -> leakbench.Matrix:
    """50 cells of 20 images and trials / 1,000 seeds."""
    attacks = [f"ig(steps={steps})" for steps in range(1, 11)]
    defenses = ["none", "keylock", "norm-only", "precode", "noise"]
    axes = {"attacks": attacks, "defenses": defenses, "models": ["lenet"], "datasets": ["samples"]}
    return leakbench.Matrix(**axes, images=20, seeds=trials // 1000, floors=False, name="scale")


def trivial(out: str, trials: int) -> dict[str, float]:
    """Plan, schedule and store trials that take no time."""
    before = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    with mock.patch.object(engine, "_executor", return_value=Instant()):
        leakbench.run(matrix(trials), out, device="cpu")
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = (Path(out) / FILE).stat().st_size
    return {"trials": trials, "seconds": seconds, "before": before, "peak": peak, "bytes": size}


def workers(out: str, count: int, images: int) -> dict[str, float]:
    """Run real trials, without the time of starting."""
    torch.set_num_threads(count if count > 1 else 1)  # one thread each
    clock = Clock(count)
    axes = {"attacks": ["ig(steps=100)"], "models": ["lenet"], "datasets": ["samples"], "images": images}
    defenses = ["none", "norm-only", "keylock", "noise"]
    plan = leakbench.Matrix(**axes, defenses=defenses, floors=False, name="workers")
    begin = time.perf_counter()
    leakbench.run(plan, out, device="cpu", chunk=8, workers=count, progress=clock)
    seconds = clock.last - clock.first
    whole = time.perf_counter() - begin
    rate = clock.trials / seconds
    return {"trials": clock.trials, "seconds": seconds, "whole": whole, "rate": rate, "left_out": count}


def report(out: str) -> dict[str, float]:
    """Write the report of a run."""
    begin = time.perf_counter()
    written = api.Run(Path(out)).report()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "files": len(written), "peak": peak}


def check(out: str) -> dict[str, float]:
    """Verify a run."""
    from leakbench.analysis.integrity import check as verify

    begin = time.perf_counter()
    state = verify(Path(out))
    assert state.code == 0, state
    return {"seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    what, folder, *numbers = sys.argv[1:]
    verbs = {"trivial": trivial, "workers": workers, "report": report, "check": check}
    print(json.dumps(verbs[what](folder, *map(int, numbers))))
