"""Executor on a Ray cluster: long-lived actors, each with its share of a GPU; the extra ``ray``.

An actor holds a task until it answers or dies. The tasks of actors on a lost node are done again by others, or by new
actors if the cluster has room. Only the driver writes the run file. Every machine needs leakbench, the weights that
metrics and attacks load from its cache, and plugins at the same path; images are sent.
"""

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from leakbench.core.device import make_current
from leakbench.core.malloc import keep_freed_memory
from leakbench.core.registry import load_plugin, plugins
from leakbench.engine.executors import Event, Message, WorkerPool, WorkerSlot, packed, sendable
from leakbench.engine.worker import Task, Worker, WorkerContext
from leakbench.errors import BadOption, LeakbenchError, one_line
from leakbench.gradients import full_precision

MAX_STARTUP_SECONDS = 120.0
"""If no actor is ready within this time, the cluster is too small."""

POLL_SECONDS = 1.0
"""How often the driver checks deadlines while no actor answers."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # otherwise Ray warns about visible GPUs
    "RAY_worker_niceness": "0",  # otherwise 15: any other process would come first
}
"""Environment variables for Ray, unless they are set."""


class RayWorker:
    """The worker in an actor."""

    def __init__(self, work: bytes, files: Sequence[Path], path: Sequence[str], threads: int) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        for file in files:
            load_plugin(file)
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._notes: list[str] = []
        context: WorkerContext = pickle.loads(work)
        make_current(context.device)
        self._worker = Worker(context, self._notes.append)

    def ready(self) -> None:
        """Return as soon as everything is loaded."""

    def do(self, task: bytes) -> bytes:
        """Return the notes, and the answer to a task or the error that ends the run."""
        self._notes.clear()
        try:
            with full_precision():
                answer: object = self._worker.do(pickle.loads(task))
        except Exception as error:
            answer = sendable(error)
        return packed((self._notes, answer))


@dataclass
class _Actor(WorkerSlot):
    """An actor, and the reference of its last call."""

    actor: Any
    asked: Any
    death: str = field(default="stopped", init=False)


class RayExecutor(WorkerPool[_Actor]):
    """Actors of a Ray cluster.

    Args:
        work: the context of every actor; its device is ``cuda`` if ``gpus`` is above 0.
        workers: the number of actors; None: as many as the cluster has room for.
        gpus: the GPUs, or the part of one, of each actor.
        threads: the CPUs and threads of each actor.
        limit: seconds per trial.
        address: of the cluster; empty: ``RAY_ADDRESS``, or else only this machine.

    Raises:
        LeakbenchError: Ray is not installed, or the cluster cannot be reached or has no room.
    """

    def __init__(
        self, work: WorkerContext, workers: int | None, gpus: float, threads: int, limit: float | None, address: str
    ) -> None:
        super().__init__(limit)
        self._work, self._count, self._gpus, self._threads, self._address = work, workers, gpus, threads, address
        self.workers = workers or 1
        self._own = False

    def __enter__(self) -> Self:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise LeakbenchError("Ray is not installed; pip install 'ray>=2.49'") from None
        self._ray = ray
        try:
            if not ray.is_initialized():
                ray.init(address=self._address or None, log_to_driver=False, logging_level="ERROR")
                self._own = True
            nodes = sum(bool(node["Alive"]) for node in ray.nodes())
            self.workers = self._count or self._room()
            share = self._work.share * (min(1.0, self._gpus) or 1 / max(1, -(-self.workers // max(1, nodes))))
            self._packed = packed(replace(self._work, share=share))
            options = {"num_cpus": self._threads, "num_gpus": self._gpus, "max_restarts": 0, "max_task_retries": 0}
            self._host = ray.remote(**options)(RayWorker)
            super().__enter__()
        except (ConnectionError, RuntimeError, ValueError) as error:
            self.close()
            if isinstance(error, LeakbenchError):
                raise
            reason = one_line(error)
            where = self._address or "of this machine"
            raise LeakbenchError(f"the Ray cluster {where} cannot be used: {reason}; check its address") from None
        except BaseException:
            self.close()
            raise
        self._since = time.monotonic()
        return self

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        for slot in self._slots:
            with contextlib.suppress(Exception):  # the cluster may be gone
                self._ray.kill(slot.actor)
        self._slots = []
        if self._own:
            self._ray.shutdown()

    def _room(self) -> int:
        """Return how many actors the cluster has room for."""
        fit = [
            min(
                node["Resources"].get("CPU", 0.0) // self._threads,
                node["Resources"].get("GPU", 0.0) // self._gpus if self._gpus else float("inf"),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        if not int(sum(fit)):
            raise BadOption(
                f"no node of the Ray cluster has {self._threads} CPUs and {self._gpus:g} GPUs; give --gpus-per-worker"
            )
        return int(sum(fit))

    def _start(self, place: int) -> _Actor:
        actor = self._host.remote(self._packed, plugins(), sys.path, self._threads)
        return _Actor(actor, actor.ready.remote())

    def _send(self, slot: _Actor, task: Task) -> None:
        slot.asked = slot.actor.do.remote(packed(task))

    def _heard(self, timeout: float | None) -> list[int]:
        if any(slot.ready for slot in self._slots):
            self._since = time.monotonic()
        elif time.monotonic() - self._since > MAX_STARTUP_SECONDS:
            raise LeakbenchError(
                f"no worker started within {MAX_STARTUP_SECONDS:g} s: the Ray cluster has no node with {self._threads} "
                f"free CPUs and {self._gpus:g} GPUs; ask for less, or add nodes"
            )
        asked = {slot.asked: place for place, slot in enumerate(self._slots) if slot.asked is not None}
        seconds = POLL_SECONDS if timeout is None else min(POLL_SECONDS, timeout)
        try:
            ended, _ = self._ray.wait(list(asked), num_returns=1, timeout=seconds)
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise LeakbenchError(f"the Ray cluster is lost: {_line(error)}; start the run again") from None
        return [asked[reference] for reference in ended]

    def _read(self, slot: _Actor, events: list[Event]) -> bool:
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(slot.asked)
        except errors.RayError as error:
            slot.death = _line(error)
            broken = isinstance(error, (errors.RayTaskError, errors.RuntimeEnvSetupError))
            if broken or getattr(error, "actor_init_failed", False):
                raise LeakbenchError(f"a Ray actor failed: {slot.death}; see the logs of its node") from None
            return False  # it or its node died, Ray killed it for its memory, or it cannot be reached
        slot.asked = None
        if not slot.ready:
            self._started(slot)
            return True
        notes, value = pickle.loads(answer)
        events += [Message(line) for line in notes]
        if isinstance(value, LeakbenchError):
            raise value
        self._answered(slot, value, events)
        return True

    def _end(self, slot: _Actor) -> str:
        with contextlib.suppress(Exception):  # an unreachable actor may still live, and hold its share of a GPU
            self._ray.kill(slot.actor)
        return f"with its actor ({slot.death})"


def _line(error: Exception) -> str:
    """Return the type of an error of Ray and the last line of its message, which states the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[-1:]])
