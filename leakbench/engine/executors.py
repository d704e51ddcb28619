"""Executors: in-process and multiprocessing. Only the driver decides what is run, and only it writes.

A worker holds one task. The driver learns from the process itself whether a worker lives, so no clock decides it (the
time limit is measured by the monotonic clock). If a worker dies, its task is done again; it has no other state. Workers
end with the driver, however that ends.
"""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Generic, Self, TypeVar

import cloudpickle
import torch

from leakbench.core.device import make_current
from leakbench.core.lock import remove_abandoned
from leakbench.core.malloc import keep_freed_memory
from leakbench.core.registry import load_plugin, plugins
from leakbench.engine.isolation import foreign
from leakbench.engine.worker import ChunkTask, MeasureTask, Task, TaskAnswer, Worker, WorkerContext
from leakbench.errors import LeakbenchError, one_line
from leakbench.gradients import full_precision

MAX_FAILED_STARTS = 10
"""After this many workers in a row died before they were ready, the run ends."""

LOADING_SECONDS = 20.0
"""By how much the time limit of a worker's first task, and of an attack with a process of its own, is longer."""

TICK_SECONDS = 0.25
"""At most this often a process says how far its chunk is."""


@dataclass(frozen=True)
class TaskDone:
    """A task is done."""

    task: Task
    answer: TaskAnswer


@dataclass(frozen=True)
class WorkerDied:
    """A worker died while it held a task; ``reason`` says how."""

    task: Task
    reason: str


@dataclass(frozen=True)
class TimedOut:
    """A task took longer than the time limit, and its worker was killed."""

    task: Task


@dataclass(frozen=True)
class Message:
    """A line for the user."""

    line: str


Event = TaskDone | WorkerDied | TimedOut | Message


class Executor(AbstractContextManager["Executor"]):
    """Does tasks; entered before the first task and left after the last, or after an error.

    Attributes:
        workers: the number of tasks that run at a time.
    """

    workers: int = 1

    @abstractmethod
    def run(self, tasks: Callable[[], Task | None], begin: Callable[[Task, int], None]) -> Iterator[Event]:
        """Do all tasks and yield the events; raise the LeakbenchError that a worker raised.

        Args:
            tasks: returns the next task, or None if there is none before the next event.
            begin: called with every task that a worker begins, and the number by which it is known while it runs.
        """

    def close(self) -> None:
        """End every worker, even a busy one."""

    def __exit__(self, *exception: object) -> None:
        self.close()


Tick = Callable[[int, int, int], None]
"""Called while the attack on a chunk searches: the chunk's number, evaluations of all its trials so far, and in all."""


@dataclass
class _Current:
    """The task that runs in this process, by its number only: an attack reaches what it calls."""

    tick: Tick
    number: int = 0

    def move(self, done: int, total: int) -> None:
        self.tick(self.number, done, total)


class InProcessExecutor(Executor):
    """Does the tasks in this process, one after the other.

    Args:
        work: what a worker needs.
        tick: is told how far a chunk is.
    """

    def __init__(self, work: WorkerContext, tick: Tick) -> None:
        self._messages: list[Message] = []
        self._current = _Current(tick)
        self._worker = Worker(work, lambda line: self._messages.append(Message(line)), tick=self._current.move)

    def run(self, tasks: Callable[[], Task | None], begin: Callable[[Task, int], None]) -> Iterator[Event]:
        """Do the tasks; see ``Executor.run``."""
        while (task := tasks()) is not None:
            self._current.number += 1
            begin(task, self._current.number)
            answer = self._worker.do(task)
            yield from self._messages
            self._messages.clear()
            yield TaskDone(task, answer)

    def close(self) -> None:
        """End the processes of attacks."""
        self._worker.isolation.close()


@dataclass
class WorkerSlot:
    """A worker as the driver sees it.

    Attributes:
        ready: whether it has loaded everything.
        fresh: whether it has not completed a task yet.
        task: the task that it holds.
        number: by which it is known.
        deadline: of the task, by the monotonic clock; None without a limit.
    """

    ready: bool = field(default=False, init=False)
    fresh: bool = field(default=True, init=False)
    task: Task | None = field(default=None, init=False)
    number: int = field(default=0, init=False)
    deadline: float | None = field(default=None, init=False)


S = TypeVar("S", bound=WorkerSlot)


class WorkerPool(Executor, Generic[S]):
    """Long-lived workers that hold a task each; a worker that dies, or takes too long, is replaced.

    Args:
        limit: seconds per trial; a chunk of n trials may take n times as long.
    """

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._slots: list[S] = []
        self._numbers = itertools.count(1)
        self._deaths = 0

    def __enter__(self) -> Self:
        try:
            for place in range(self.workers):
                self._slots.append(self._start(place))
        except BaseException:
            self.close()
            raise
        return self

    def run(self, tasks: Callable[[], Task | None], begin: Callable[[Task, int], None]) -> Iterator[Event]:
        """Have workers do the tasks; see ``Executor.run``."""
        task = tasks()
        while task is not None or any(slot.task is not None for slot in self._slots):
            slot = next((slot for slot in self._slots if slot.ready and slot.task is None), None)
            if task is not None and slot is not None:
                slot.task, slot.number = task, next(self._numbers)
                begin(task, slot.number)
                self._send(slot, task)
                self._set_deadline(slot, trials_of(task))
                task = tasks()
                continue
            yield from self.wait()
            task = tasks() if task is None else task

    def wait(self) -> list[Event]:
        """Wait for answers, deaths and deadlines."""
        due = [slot.deadline for slot in self._slots if slot.deadline is not None]
        timeout = None if not due else max(0.0, min(due) - time.monotonic())
        events: list[Event] = []
        dead = {place for place in self._heard(timeout) if not self._read(self._slots[place], events)}
        for place, slot in enumerate(self._slots):
            late = place not in dead and slot.deadline is not None and slot.deadline <= time.monotonic()
            if late:
                assert slot.task is not None  # a deadline is a task's
                events.append(TimedOut(slot.task))
                slot.task = None
            if late or place in dead:
                reason = self._end(slot)
                if slot.task is not None:
                    events.append(WorkerDied(slot.task, reason))
                self._deaths += not slot.ready
                if self._deaths == MAX_FAILED_STARTS:
                    raise LeakbenchError(
                        f"{MAX_FAILED_STARTS} workers in a row died before they were ready, the last {reason}; give "
                        "fewer --workers, or free memory"
                    )
                self._slots[place] = self._start(place)
        return events

    @abstractmethod
    def _start(self, place: int) -> S:
        """Start the worker of a place: the first one, or the successor of one that has ended."""

    @abstractmethod
    def _send(self, slot: S, task: Task) -> None:
        """Send a task to a worker; ``_heard`` reports a dead one."""

    @abstractmethod
    def _heard(self, timeout: float | None) -> list[int]:
        """Wait at most this many seconds; return the places of workers that have sent something, or died."""

    @abstractmethod
    def _read(self, slot: S, events: list[Event]) -> bool:
        """Read what a worker has sent, append its events, and return whether the worker lives."""

    @abstractmethod
    def _end(self, slot: S) -> str:
        """End a worker, and return how it died."""

    def _started(self, slot: S) -> None:
        """Record that a worker is ready."""
        slot.ready, self._deaths = True, 0

    def _answered(self, slot: S, answer: TaskAnswer, events: list[Event]) -> None:
        """Record that a worker has done its task."""
        assert slot.task is not None  # it answers what it was sent
        events.append(TaskDone(slot.task, answer))
        slot.task, slot.deadline, slot.fresh = None, None, False

    def _set_deadline(self, slot: S, trials: int) -> None:
        if self._limit is not None:
            loads = slot.fresh or (slot.task is not None and _starts_process(slot.task))
            slot.deadline = time.monotonic() + self._limit * trials + (LOADING_SECONDS if loads else 0.0)


@dataclass
class _Process(WorkerSlot):
    """A worker process."""

    process: SpawnProcess
    pipe: Connection


class ProcessExecutor(WorkerPool[_Process]):
    """Long-lived processes on this machine, spawned, each with a pipe to the driver.

    Args:
        works: the context of each process; they differ in the device.
        threads: the threads of each process.
        limit: seconds per trial.
        tick: is told how far a chunk is.
    """

    def __init__(self, works: Sequence[WorkerContext], threads: int, limit: float | None, tick: Tick) -> None:
        super().__init__(limit)
        self._works, self._threads, self._tick = works, threads, tick
        self._plugins = plugins()
        self.workers = len(works)

    def close(self) -> None:
        """Kill every process, none of which has state to save, and delete the folders of their attacks."""
        for slot in self._slots:
            slot.process.kill()
        for slot in self._slots:
            slot.process.join()
            slot.pipe.close()
        self._slots = []
        remove_abandoned()

    def _start(self, place: int) -> _Process:
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        given = (there, packed(self._works[place]), self._plugins, self._threads)
        process = context.Process(target=_serve, args=given, daemon=True)
        with _sigint_blocked():  # Ctrl-C goes to all processes of a terminal; only the driver answers it
            process.start()
        there.close()
        return _Process(process, here)

    def _send(self, slot: _Process, task: Task) -> None:
        message = packed(task)
        with contextlib.suppress(OSError):  # it has died
            slot.pipe.send_bytes(message)

    def _heard(self, timeout: float | None) -> list[int]:
        ready = set(wait([watched for slot in self._slots for watched in (slot.pipe, slot.process.sentinel)], timeout))
        return [place for place, slot in enumerate(self._slots) if slot.pipe in ready or slot.process.sentinel in ready]

    def _read(self, slot: _Process, events: list[Event]) -> bool:
        try:
            while slot.pipe.poll():
                kind, value = pickle.loads(slot.pipe.recv_bytes())
                match kind:
                    case "ready":
                        self._started(slot)
                    case "note":
                        events.append(Message(value))
                    case "begin":
                        self._set_deadline(slot, value)
                    case "tick":
                        self._tick(slot.number, *value)
                    case "done":
                        self._answered(slot, value, events)
                    case "error":
                        raise value
        except (EOFError, OSError):
            return False
        return slot.process.is_alive()

    def _end(self, slot: _Process) -> str:
        slot.process.kill()
        slot.process.join()
        slot.pipe.close()
        reason = _death(slot.process.exitcode)
        if not slot.ready and (slot.process.exitcode or 0) >= 0:
            raise LeakbenchError(
                f"a worker process ended before it was ready: {reason}; run with --workers 1 to see why, and in your "
                "own script call leakbench.run under if __name__ == '__main__'"
            )
        return reason


def trials_of(task: Task) -> int:
    """Return how many trials may take the time of a task."""
    match task:
        case ChunkTask():
            return len(task.trials)
        case MeasureTask():
            return task.trials
        case _:
            return 1


def _starts_process(task: Task) -> bool:
    """Return whether an attack of a task may have to wait for a process of its own."""
    trials = (task.trial,) if isinstance(task, MeasureTask) else task.trials
    return any(foreign(attack) for attack in {trial.cell.attack.name: trial.cell.attack for trial in trials}.values())


def packed(value: object) -> bytes:
    """Return a value as the bytes that another process is sent.

    Classes of a notebook or a prompt, which another process cannot import, are sent with it.

    Raises:
        LeakbenchError: another process cannot import a component.
    """
    own = Path(str(vars(sys.modules["__main__"]).get("__file__", "")))
    by_value = not own.is_file()  # what ``__main__`` defines cannot be imported from a file
    try:
        try:
            body = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
            if not (by_value and b"__main__" in body):
                return body
        except (pickle.PicklingError, AttributeError) as error:
            if not (by_value and "__main__" in str(error)):
                raise
        content: bytes = cloudpickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        return content
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        reason = one_line(error)
        raise LeakbenchError(
            f"a component cannot be sent to a worker process: {reason}; define it at the top level of a module, or run "
            "with workers=1"
        ) from error


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            memory = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
            return f"by {name}{memory}"
    return f"with exit code {code}"


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A process that is started inside ignores Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # otherwise it starts with the first process, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, work: bytes, plugins: Sequence[Path], threads: int) -> None:
    """The main function of a worker process: do tasks until the driver ends."""
    _end_with_the_driver()
    # otherwise tqdm makes a semaphore, and a killed process leaves a warning about it
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())

    def send(kind: str, value: object = None) -> None:
        pipe.send_bytes(packed((kind, value)))

    told = 0.0

    def tick(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > TICK_SECONDS:
            told = time.monotonic()
            send("tick", (done, total))

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the driver has ended
        try:
            for file in plugins:
                load_plugin(file)
            torch.set_num_threads(threads)
            keep_freed_memory()
            own: WorkerContext = pickle.loads(work)
            make_current(own.device)
            worker = Worker(own, lambda line: send("note", line), lambda trials: send("begin", trials), tick=tick)
            send("ready")
            with full_precision():
                while True:
                    send("done", worker.do(pickle.loads(pipe.recv_bytes())))
        except (EOFError, OSError):
            raise
        except Exception as error:
            send("error", sendable(error))


def sendable(error: Exception) -> LeakbenchError:
    """Return an error that ends the run in a form that a pipe can carry, without its frames."""
    if isinstance(error, LeakbenchError):
        return type(error)(str(error))
    traceback.print_exception(error)
    return LeakbenchError(f"a worker process failed: {type(error).__name__}: {' '.join(str(error).split())}")


def _end_with_the_driver() -> None:
    """End this process as soon as its parent has ended, even in the middle of a task."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # it is a worker

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux":  # also while a component holds the interpreter
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
