"""Experiment trackers: a run is logged to Weights & Biases, TensorBoard or MLflow while it runs."""

import hashlib
import importlib
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from leakbench.engine.progress import NullProgress
from leakbench.errors import BadOption, LeakbenchError, one_line
from leakbench.plan.trial import Cell, Result, Trial
from leakbench.report.run import RunData
from leakbench.report.scenes import worst_cases
from leakbench.store.run_file import FILE, Store
from leakbench.trackers.base import RunOutcome, TrackedRun, Tracker

CLASSES = {"wandb": "WandB", "tensorboard": "TensorBoard", "mlflow": "MLflow"}
"""The trackers by name: each is the class in the module of its name."""

MESSAGE = 300
"""The length in letters to which a tracker's own message is cut: some repeat what they were given."""


def tracker(name: str) -> type[Tracker]:
    """Return a tracker by its name.

    Raises:
        BadOption: there is no such tracker, or its package is not installed.
    """
    if name not in CLASSES:
        raise BadOption(f"tracker {name!r} is unknown; known: {', '.join(CLASSES)}")
    try:
        found: type[Tracker] = getattr(importlib.import_module(f"leakbench.trackers.{name}"), CLASSES[name])
    except ImportError as error:
        raise BadOption(f"--log {name} needs a package: {one_line(error)}; pip install {name}") from None
    return found


@contextmanager
def tracked(names: Sequence[str], folder: Path) -> Iterator["Tracking"]:
    """Yield the tracking of a run, and close it at the end; without names nothing is tracked.

    Args:
        names: of trackers.
        folder: the run's folder.

    Raises:
        BadOption: one of them is unknown, or its package is not installed.
    """
    tracking = Tracking({name: tracker(name) for name in dict.fromkeys(names)}, folder)
    completed = False
    try:
        yield tracking
        completed = True
    finally:
        tracking.close(completed=completed)


class Tracking:
    """The trackers of a run, which may have several matrices. One that raises is left out from then on, with a line.

    Args:
        kinds: the trackers by name; they are opened when the first matrix starts.
        folder: the run's folder.
    """

    def __init__(self, kinds: dict[str, type[Tracker]], folder: Path) -> None:
        self.kinds, self.folder = kinds, folder
        self.open: dict[str, Tracker] = {}
        self.done = 0
        self.note: Callable[[str], None] = lambda line: None

    def display(self, inner: NullProgress) -> NullProgress:
        """Return a display of one matrix that tells the trackers what it tells another display."""
        return _Tracked(inner, self) if self.kinds else inner

    def start(self, done: int, note: Callable[[str], None]) -> None:
        """Begin a matrix of which some trials were done before; ``note`` reports a line.

        Raises:
            LeakbenchError: a tracker does not open; nothing has run.
        """
        self.done, self.note = self.done + done, note
        for name in [name for name in self.kinds if name not in self.open]:
            try:
                self.open[name] = self.kinds[name].open(_run(self.folder))
            except Exception as error:
                reason = textwrap.shorten(one_line(error), MESSAGE)
                raise LeakbenchError(f"--log {name} does not begin: {reason}; mend this, or leave it out") from error

    def log(self, results: Sequence[Result]) -> None:
        """Log the scores of each trial that has some, as ``METRIC/ATTACK against DEFENSE, MODEL on DATASET``."""
        for result in results:
            self.done += 1
            words = _words(result.trial.cell)
            scores = {f"{metric}/{words}": score for metric, score in result.scores.items()}
            if scores:
                self._each(lambda one, scores=scores: one.log(self.done, scores))  # type: ignore[misc]

    def finish(self, written: Sequence[Path]) -> None:
        """Log what the run found; ``written`` are the files of its report."""
        if self.open:
            outcome = _outcome(self.folder, written, self.done)
            self._each(lambda one: one.finish(outcome))

    def close(self, *, completed: bool) -> None:
        """Close the trackers."""
        self._each(lambda one: one.close(completed=completed))

    def _each(self, does: Callable[[Tracker], None]) -> None:
        for name, one in list(self.open.items()):
            try:
                does(one)
            except Exception as error:
                del self.open[name], self.kinds[name]
                reason = textwrap.shorten(one_line(error), MESSAGE)
                self.note(f"{name} failed, and nothing more is logged to it: {reason}")


class _Tracked(NullProgress):
    """A display that tells trackers which trials are finished."""

    def __init__(self, inner: NullProgress, tracking: Tracking) -> None:
        self.inner, self.tracking = inner, tracking

    def start(self, waiting: Sequence[Trial], done: int) -> None:
        self.inner.start(waiting, done)
        self.tracking.start(done, self.inner.note)

    def skip(self, trials: Sequence[Trial]) -> None:
        self.inner.skip(trials)

    def note(self, line: str) -> None:
        self.inner.note(line)

    def begin(self, chunk: int, trials: Sequence[Trial]) -> None:
        self.inner.begin(chunk, trials)

    def move(self, chunk: int, done: int, total: int) -> None:
        self.inner.move(chunk, done, total)

    def end(self, chunk: int) -> None:
        self.inner.end(chunk)

    def finish(self, results: Sequence[Result]) -> None:
        self.inner.finish(results)
        self.tracking.log(results)


def _words(cell: Cell) -> str:
    """Return the cell in words, with the threat model unless it is the usual one."""
    threat = cell.specs["threat"]
    return cell.words if threat == "paper" else f"{cell.words}, {threat}"


def _run(folder: Path) -> TrackedRun:
    """Return a run whose last session has begun."""
    with Store.open(folder / FILE, readonly=True) as store:
        now = store.sessions()[-1].provenance
    axes = json.loads(now.matrix)
    config = {axis: value if isinstance(value, str) else json.dumps(value) for axis, value in axes.items()}
    config |= {"leakbench": now.version, "device": now.device, "command": now.command}
    config |= {name: version for name, version in now.packages.items() if name == "torch"}
    identity = hashlib.sha256(f"tracked {now.salt} {folder.resolve()}".encode()).hexdigest()[:16]
    return TrackedRun(str(axes.get("name", folder.name)), identity, config, folder)


def _outcome(folder: Path, written: Sequence[Path], step: int) -> RunOutcome:
    with Store.open(folder / FILE, readonly=True) as store:
        run = RunData.of(store, folder.resolve().name)
    scenes = worst_cases(run)
    shares = {
        result.defense if len(scenes) == 1 else f"{result.defense}, {scene.model} on {scene.dataset}": result.share
        for scene in scenes
        for result in scene.known
    }
    pictures = [path for path in written if path.suffix == ".png"]
    return RunOutcome(step, shares, run.results, pictures, [path for path in written if path not in pictures])
