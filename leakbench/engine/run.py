"""The driver of a run: it plans trials, refuses unsupported ones, and writes the results of its workers."""

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from leakbench import datasets, metrics
from leakbench.core.component import Component, as_json, shipped
from leakbench.core.device import accelerator, all_of, device_named, free_memory
from leakbench.core.lock import alone
from leakbench.core.malloc import keep_freed_memory
from leakbench.core.rng import check_salt, new_salt
from leakbench.datasets import Dataset
from leakbench.engine.executors import (
    Executor,
    InProcessExecutor,
    Message,
    ProcessExecutor,
    TaskDone,
    Tick,
    TimedOut,
    WorkerDied,
    packed,
)
from leakbench.engine.isolation import foreign, refuse_inside
from leakbench.engine.progress import NullProgress
from leakbench.engine.schedule import MAX_DEATHS, Schedule, recovered
from leakbench.engine.shard import part
from leakbench.engine.worker import (
    CheckTask,
    ChunkTask,
    ClientData,
    MeasureTask,
    Refusal,
    Task,
    WorkerContext,
    companions,
    failure_line,
    without_score,
)
from leakbench.errors import DEFENSE_FAILED, BadOption, LeakbenchError, MissingAsset, Unsupported, one_line
from leakbench.gradients import full_precision
from leakbench.metrics.base import Metric
from leakbench.metrics.public import PublicSSIM
from leakbench.models.weights import Checkpoint
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix
from leakbench.plan.trial import Result, Trial
from leakbench.store.frames import AFTER, BEFORE
from leakbench.store.provenance import Provenance
from leakbench.store.records import PluginFile, Statement
from leakbench.store.run_file import FILE, Store
from leakbench.victim import check_reveals

WORKER_TRIALS = 8
"""From this many searches a process earns the seconds that it takes to start."""
WORKER_BYTES = 2**30
"""What a process should find free: torch, the data, and a chunk."""


@dataclass(frozen=True)
class RunOptions:
    """How a matrix is run; none of it changes a trial or its id.

    Attributes:
        device: ``auto`` (CUDA if there is a GPU), ``cpu``, ``cuda`` or ``cuda:N``.
        chunk: trials at a time, by default as many as a short measurement finds best; a chunk that does not fit into
            memory is halved and tried again.
        strict: refuse a matrix with any unsupported cell, and stop at the first error of a component.
        workers: the number of processes; with 1 (and no time limit) it is this one. They share the threads, and the
            GPUs if ``device`` names none. Chunks of the same trials give the same numbers in any process. By default
            1 (a command line takes ``usual_workers``), and with Ray as many as its cluster has room for.
        time_limit: seconds per trial; a chunk of n trials may take n times as long. A chunk that takes longer is
            stopped and its trials are tried again one at a time; a trial that takes longer is an error.
        shard: ``i/n``: run only this part of the matrix (``leakbench.engine.shard.part``); empty for all of it.
        executor: ``local``, or ``ray`` for the machines of a Ray cluster (extra ``ray``).
        ray_address: of the cluster; by default ``RAY_ADDRESS``, and this machine if that is not set.
        gpus_per_worker: with Ray, the GPUs (or the part of one) of each worker; by default 1 if ``device`` is CUDA, or
            ``auto`` and this machine has a GPU, and otherwise 0.
        salt: of the keys of all draws (``core.rng.salted``): 32 hex digits; by default that of the existing run, and a
            random one for a new run. With the same salt two runs draw the same. Empty: keys that are not salted, to
            repeat a run of before there were salts; attackers can then compute the image and the client's draws.

    Raises:
        BadOption: one line on the first option that is out of range.
    """

    device: str = "auto"
    chunk: int | None = None
    strict: bool = False
    workers: int | None = None
    time_limit: float | None = None
    shard: str = ""
    executor: str = "local"
    ray_address: str = ""
    gpus_per_worker: float | None = None
    salt: str | None = None

    def __post_init__(self) -> None:
        if self.executor not in ("local", "ray"):
            raise BadOption(f"unknown executor {self.executor!r}; write local or ray")
        gpus = self.gpus_per_worker if self.executor == "ray" else None
        if gpus is not None and not 0 <= gpus < float("inf"):
            raise BadOption(f"gpus_per_worker={gpus:g} must be 0 or more")
        for name, count in (("chunk", self.chunk), ("workers", self.workers)):
            if count is not None and count < 1:
                raise BadOption(f"{name}={count} must be at least 1")
        if self.time_limit is not None and not self.time_limit > 0:
            raise BadOption(f"time_limit={self.time_limit:g} must be above 0 seconds")
        check_salt(self.salt or "")


@dataclass(frozen=True)
class _Planned:
    """A checked matrix with all that its workers need.

    Attributes:
        trials: those of this shard.
        whole: those of the whole matrix.
        data: the clients' images, by the dataset's spec.
        metrics: those of the run, including those that an existing run has.
        missing: a line on each metric that cannot be computed here.
        salt: of the run.
    """

    matrix: Matrix
    trials: Sequence[Trial]
    whole: Sequence[Trial]
    data: dict[str, ClientData]
    executor: Executor
    device: torch.device
    metrics: Sequence[Metric]
    missing: Sequence[str]
    salt: str


def run(
    matrix: Matrix,
    out: str | Path | None = None,
    options: RunOptions | None = None,
    *,
    progress: NullProgress | None = None,
    command: str = "",
    data: ClientData | None = None,
) -> Path:
    """Run every trial of a matrix that has no result yet, and return the run's folder.

    Args:
        matrix: the trials to run.
        out: the run's folder, ``runs/NAME`` by default; an existing run in it is resumed.
        options: device, workers, shard.
        progress: the display; none by default.
        command: the command line, for the provenance.
        data: a recorded update of the only client, with its image and label if they are known; None for clients that
            take their steps on the images of the datasets.

    Raises:
        LeakbenchError: one line on an invalid option, matrix or folder; nothing was written then.
    """
    options, progress = options or RunOptions(), progress or NullProgress()
    folder = Path(out) if out is not None else Path("runs") / matrix.name
    refuse_inside()
    metrics.refuse_replaced()
    plan = _plan(matrix, options, folder / FILE, data, progress.move)
    observed = None if data is None else data.observed
    with full_precision(), plan.executor:
        ensemble = matrix.threshold is not None
        refused = _preflight(plan.whole, options.strict, ensemble, plan.executor, plan.salt, observed)
        with _session(plan, folder, options.shard, command) as (store, session):
            done = store.done()
            waiting = [trial for trial in plan.trials if trial.id not in done]
            progress.start(waiting, len(plan.trials) - len(waiting))
            for line in plan.missing:
                progress.note(line)

            told: set[str] = set()

            def keep(results: list[Result]) -> None:
                for result in results:
                    if result.reason.startswith(DEFENSE_FAILED):
                        line = failure_line(result.trial.cell, result.reason)
                        if (where := line.partition(DEFENSE_FAILED)[0]) not in told:
                            told.add(where)
                            progress.note(line)
                if results:
                    store.write(results, session)
                    progress.finish(results)

            unsupported = [trial for trial in waiting if trial.cell.key in refused]
            for key, members in itertools.groupby(unsupported, key=lambda trial: trial.cell.key):
                trials = list(members)
                cell = trials[0].cell
                images = plan.data[cell.specs["dataset"]]
                keep([without_score(images, trial, "unsupported", refused[key]) for trial in trials])
            schedule = Schedule(
                [trial for trial in plan.trials if trial.cell.key not in refused],
                store,
                plan.data,
                threshold=matrix.threshold,
                size=options.chunk,
                workers=plan.executor.workers,
                skip=progress.skip,
            )
            _loop(schedule, plan.executor, options.time_limit, keep, progress)
    return folder


def _device(options: RunOptions) -> torch.device:
    """Return the device of a run; on a Ray cluster the machine that starts it needs none of its own."""
    if options.executor == "ray" and (options.gpus_per_worker or options.device.partition(":")[0] == "cuda"):
        return torch.device("cuda")
    return device_named(options.device)


def _plan(
    matrix: Matrix,
    options: RunOptions,
    file: Path,
    given: ClientData | None,
    tick: Tick,
) -> _Planned:
    """Return a matrix with its data and executor; nothing is written.

    Raises:
        LeakbenchError: see ``run``.
    """
    device = _device(options)
    _check_indices(matrix)
    trials = planned(matrix, options.shard)
    if not trials:
        raise BadOption(f"shard {options.shard} of {len(matrix.trials())} trials would be empty; choose a smaller n")
    named, new = {metric.name for metric in matrix.metrics}, list[str]()
    if any(
        foreign(attack) or attack.is_control
        for attack in {trial.cell.attack.name: trial.cell.attack for trial in trials}.values()
    ):
        named.add(PublicSSIM.name)  # such an attack may have memorised images
    stored: str | None = None
    if _has_content(file):
        with Store.open(file, readonly=True) as store:  # a foreign file is refused before anything is loaded
            recorded, stored = {metric.name for metric in store.metrics()}, store.salt()
        new = sorted(named - recorded)
        named |= recorded
    salt = _salt(options, file, stored)
    keep_freed_memory()
    name = trials[0].cell.specs["dataset"]
    data = _load(trials, salt) if given is None else {name: replace(given, salt=salt)}
    measured = metrics.of_run(named, any(trial.others for trial in trials))
    scores, missing = _usable(measured)
    missing += [f"metric {name!r} is new to this run: trials that are done keep no value of it" for name in new]
    executor = _executor(WorkerContext(scores, device, options.strict), options, tick)
    whole = matrix.trials() if options.shard else trials
    return _Planned(matrix, trials, whole, data, executor, device, measured, missing, salt)


def _salt(options: RunOptions, file: Path, stored: str | None) -> str:
    """Return the salt of a run: the stored one, or else that of the options, or a random one.

    Raises:
        BadOption: the options have another salt than the run; a new run is a shard, and no salt is given.
    """
    if stored is not None:
        check_salt(stored)
        if options.salt not in (None, stored):
            raise BadOption(
                f"--salt {options.salt!r}: {file} has the salt {stored!r}; leave --salt out, or choose another --out"
            )
        return stored
    if options.salt is None and options.shard:
        raise BadOption(
            f"shard {options.shard} begins a run without a salt, and all shards of a matrix need the same one; give "
            f"each of them the same 32 random hex digits, such as --salt {new_salt()}"
        )
    return new_salt() if options.salt is None else options.salt


@contextmanager
def _session(plan: _Planned, folder: Path, shard: str, command: str) -> Iterator[tuple[Store, int]]:
    """Open or create the run file, record plan and provenance, and record the end of the session."""
    file = folder / FILE
    checkpoints, statements = _stated(plan.trials)
    matrix = json.dumps(plan.matrix.describe())
    provenance = Provenance.collect(command, _named(plan.device), matrix, shard, plan.executor.workers, plan.salt)
    with Store.open(file) if _has_content(file) else Store.create(file) as store, alone(folder):
        if store.salt() not in (None, plan.salt):
            raise LeakbenchError(f"{file} was begun by another process at the same time; start the command again")
        session = store.start_session(provenance)
        store.record_metrics(plan.metrics, _notes(plan.metrics, plan.trials))
        store.add_trials(plan.trials, among=plan.whole)
        store.record_checkpoints(checkpoints)
        store.record_statements(statements)
        with store.transaction():
            store.record_groups(_groups(plan.whole))
        store.record_plugins(_plugin_files(plan.trials, plan.metrics))
        yield store, session
        store.end_session(session)


def _loop(
    schedule: Schedule,
    executor: Executor,
    time_limit: float | None,
    keep: Callable[[list[Result]], None],
    progress: NullProgress,
) -> None:
    """Hand out tasks until the schedule has none left, and keep the results."""

    running: dict[int, int] = {}  # the number of each chunk that runs, by the identity of its task

    def begin(task: Task, number: int) -> None:
        if isinstance(task, ChunkTask):
            running[id(task)] = number
            progress.begin(number, task.trials)

    shown: set[str] = set()
    for event in executor.run(schedule.next, begin):
        if not isinstance(event, Message) and id(event.task) in running:
            progress.end(running.pop(id(event.task)))
        match event:
            case Message() if event.line not in shown:
                shown.add(event.line)
                progress.note(event.line)
            case TaskDone(ChunkTask() as task, list() as results):
                keep(results)
                schedule.finished(task)
            case TaskDone(MeasureTask() as task, int() as size):
                schedule.measured(task, size)
            case WorkerDied(ChunkTask() | MeasureTask() as task, reason):
                progress.note(f"a worker died {reason}; its trials are run again")
                keep(schedule.lost(task, reason))
            case TimedOut(ChunkTask() | MeasureTask() as task):
                progress.note(f"{task.trial.cell.words}: timed out")
                keep(schedule.timed_out(task, time_limit or 0.0))


def check(matrix: Matrix, options: RunOptions) -> None:
    """Check a matrix as ``run`` does before it writes: one step on a blank image for each cell.

    If several matrices are run, this refuses the last one before the first has run for hours.

    Raises:
        LeakbenchError: see ``run``.
    """
    _check_indices(matrix)
    local = replace(options, executor="local", workers=1)
    here = torch.device("cpu") if options.executor == "ray" else device_named(options.device)
    with full_precision(), _executor(WorkerContext((), here, options.strict), local, NullProgress().move) as executor:
        _preflight(matrix.trials(), options.strict, matrix.threshold is not None, executor, options.salt or "")


def _executor(work: WorkerContext, options: RunOptions, tick: Tick) -> Executor:
    """Return the executor that options ask for; a Ray actor with a GPU has one thread.

    ``tick`` is called while an attack of this machine searches: Ray's actors report whole chunks.
    """
    if options.executor == "ray":
        from leakbench.engine.ray_executor import RayExecutor

        gpus = float(work.device.type == "cuda") if options.gpus_per_worker is None else options.gpus_per_worker
        own = replace(work, device=torch.device("cuda" if gpus else "cpu"))
        return RayExecutor(own, options.workers, gpus, 1, options.time_limit, options.ray_address)
    workers = options.workers or 1
    if workers == 1 and options.time_limit is None:
        return InProcessExecutor(work, tick)
    devices = all_of(work.device)
    share = work.share * len(devices) / max(workers, len(devices))
    works = [replace(work, device=devices[place % len(devices)], share=share) for place in range(workers)]
    return ProcessExecutor(works, max(1, torch.get_num_threads() // workers), options.time_limit, tick)


def _has_content(file: Path) -> bool:
    """Return whether there is a run file; an empty one, of a run that was killed at its start, is begun again."""
    return file.exists() and not (file.is_file() and file.stat().st_size == 0)


def planned(matrix: Matrix, shard: str = "") -> Sequence[Trial]:
    """Return the trials of a matrix, or of a shard of it."""
    trials = matrix.trials()
    return part(trials, shard, ensemble=matrix.threshold is not None) if shard else trials


def finished(folder: Path, matrix: Matrix, shard: str = "") -> int:
    """Return how many trials of a matrix or shard have a result in a folder, or need none (``Matrix.threshold``)."""
    return _count_finished(folder, planned(matrix, shard), matrix.threshold)


def _count_finished(folder: Path, trials: Sequence[Trial], threshold: float | None) -> int:
    if not _has_content(folder / FILE):
        return 0
    with Store.open(folder / FILE, readonly=True) as store:
        return len({trial.id for trial in trials} & (store.done() | recovered(trials, store, threshold)))


def usual_workers(matrix: Matrix, folder: Path, options: RunOptions) -> int:
    """Return how many processes of this machine do a matrix or shard soonest, where the user did not say.

    On a CPU one for each thread of torch, as far as there is memory, and ``WORKER_TRIALS`` searches for each: trials of
    one thread never wait for each other, and a search of few trials at a time has no work for two threads. Otherwise,
    if a component cannot be sent to a process, or if all trials have a result in the run's folder, 1.

    Otherwise trials that are done count, too: by the threads of a process sums are rounded, and a run that is resumed
    is to have as many as before.
    """
    device = device_named(options.device)
    if device.type != "cpu":
        return 1
    trials = planned(matrix, options.shard)
    searches = sum(trial.cell.attack.competes for trial in trials)
    room = free_memory(device) // WORKER_BYTES
    workers = max(1, min(torch.get_num_threads(), searches // WORKER_TRIALS, room))
    if workers == 1 or _count_finished(folder, trials, matrix.threshold) == len(trials):
        return 1
    return workers if _can_be_sent(matrix, trials) else 1


def _can_be_sent(matrix: Matrix, trials: Sequence[Trial]) -> bool:
    """Return whether another process can be given the components: those of a plugin may hold a lock or a function."""
    try:
        packed((matrix.metrics, [trial.cell for trial in {trial.cell.key: trial for trial in trials}.values()]))
    except LeakbenchError:
        return False
    return True


def _named(device: torch.device) -> str:
    """Return a device for the provenance: a GPU of this machine with its model and CUDA version."""
    module = accelerator(device)
    if module is None:
        return str(device)
    if not module.is_available():
        return f"{device} (of other machines)"
    version = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    return f"{device} ({module.get_device_name(device)}{version})"


def _check_indices(matrix: Matrix) -> None:
    """Raise BadOption if an image index is out of range, before a large matrix is made."""
    last = matrix.images - 1 if isinstance(matrix.images, int) else max(matrix.images)
    for dataset in matrix.datasets:
        if last >= len(dataset):
            raise BadOption(
                f"image index {last} is out of range for dataset {datasets.spec(dataset)!r} "
                f"({len(dataset)} images); give indices from 0 to {len(dataset) - 1}"
            )


def _load(trials: Sequence[Trial], salt: str) -> dict[str, ClientData]:
    """Return the clients' images of every dataset, by its spec; raise LeakbenchError if they are not as promised."""
    data = {}
    for name, dataset in {trial.cell.specs["dataset"]: trial.cell.dataset for trial in trials}.items():
        held = [trial for trial in trials if trial.cell.specs["dataset"] == name]
        indices = sorted({index for trial in held for index in (*trial.indices, *companions(trial, salt))})
        try:
            data[name] = replace(_load_one(dataset, indices), salt=salt)
        except LeakbenchError:
            raise
        except (Exception, SystemExit) as error:
            reason = one_line(error)
            raise LeakbenchError(f"dataset {name!r} cannot be read: {type(error).__name__}: {reason}") from error
    return data


def _load_one(dataset: Dataset, indices: list[int]) -> ClientData:
    name = datasets.spec(dataset)
    images, labels = dataset.load(indices)
    shape = (len(indices), *dataset.image_shape)
    if tuple(images.shape) != shape or tuple(labels.shape) != shape[:1]:
        raise BadOption(
            f"dataset {name!r} gave images {tuple(images.shape)}, labels {tuple(labels.shape)}, not {shape}"
        )
    if not (float(images.min()) >= 0 and float(images.max()) <= 1):
        raise BadOption(
            f"dataset {name!r} ranges from {float(images.min()):g} to {float(images.max()):g}, not in [0, 1]"
        )
    if not (int(labels.min()) >= 0 and int(labels.max()) < dataset.num_classes):
        raise BadOption(f"dataset {name!r} has the label {int(labels.max())}, not in 0 to {dataset.num_classes - 1}")
    if shape[1] not in (1, 3):
        raise BadOption(f"dataset {name!r} has {shape[1]} channels; images have 1 (grey) or 3 (RGB)")
    return ClientData(
        images={index: image.clone() for index, image in zip(indices, images)},  # else each is sent with all others
        labels={index: int(label) for index, label in zip(indices, labels)},
        mean=dataset.mean(),
        num_classes=dataset.num_classes,
    )


def _preflight(
    trials: Sequence[Trial],
    strict: bool,
    ensemble: bool,
    executor: Executor,
    salt: str,
    observed: Observation | None = None,
) -> dict[str, str]:
    """Return the reason for each unsupported cell: by a recorded update, or by a step on a blank and then a real image.

    The real image is that of the first trial; it is asked only about cells that the blank one refused. A defense that
    is not part of leakbench may treat each image in another way: its cells are never left out, and each of their trials
    is refused by its own step.

    Raises:
        Unsupported: an attack that supports no cell at all (of an ensemble, if no attack does) or, if strict, any
            unsupported cell.
        BadOption: a threat model that reveals a secret that no defense of the matrix has.
    """
    cells: dict[str, Trial] = {}
    for trial in trials:
        cells.setdefault(trial.cell.key, trial)
    seen: dict[str, list[Trial]] = {}  # cells of the same observation
    for trial in cells.values():
        parts = [trial.cell.settings.get(part) for part in ("dataset", "model", "defense", "threat", "client")]
        seen.setdefault(json.dumps(parts), []).append(trial)
    blank = _ask([CheckTask(tuple(alike), observed) for alike in seen.values()], executor)
    check_reveals({trial.cell.threat for trial in trials}, {group for one in blank for group in one.groups})
    refused = {key: reason for one in blank for key, reason in one.cells.items()}
    if observed is None:
        again = [[trial for trial in alike if trial.cell.key in refused] for alike in seen.values()]
        again = [alike for alike in again if alike]
        data = _load([alike[0] for alike in again], salt)
        tasks = [CheckTask(tuple(own), data=data[own[0].cell.specs["dataset"]].of(own[:1])) for own in again]
        refused = {key: reason for one in _ask(tasks, executor) for key, reason in one.cells.items()}
    for cell in (cell for cell in cells if cell in refused):
        spec = cells[cell].cell.specs["attack"]
        others = [other for other, trial in cells.items() if ensemble or trial.cell.specs["attack"] == spec]
        if strict or all(other in refused for other in others):
            raise Unsupported(f"{cells[cell].cell.words}: {refused[cell]}")
    known = {key for key, trial in cells.items() if observed is not None or shipped(type(trial.cell.defense))}
    return {key: reason for key, reason in refused.items() if key in known}


def _ask(checks: Iterable[CheckTask], executor: Executor) -> list[Refusal]:
    """Return the answers to checks; one whose worker died ``MAX_DEATHS`` times has none."""
    waiting, found = deque(checks), list[Refusal]()
    for event in executor.run(lambda: waiting.popleft() if waiting else None, lambda task, number: None):
        match event:
            case TaskDone(CheckTask(), Refusal() as refusal):
                found.append(refusal)
            case WorkerDied(CheckTask() as check) if check.lost + 1 < MAX_DEATHS:
                waiting.append(replace(check, lost=check.lost + 1))
    return found


def _usable(measured: Sequence[Metric]) -> tuple[list[Metric], list[str]]:
    """Return the metrics that can be computed here, and a line on each other."""
    usable, missing = [], []
    for metric in measured:
        if metric.name in BEFORE + AFTER:
            raise BadOption(f"metric {metric.name!r} has the name of a column of the results; rename the metric")
        try:
            metric.check()
            usable.append(metric)
        except MissingAsset as error:
            missing.append(str(error))
    return usable, missing


def _notes(measured: Sequence[Metric], trials: Sequence[Trial]) -> dict[str, str]:
    """Return what a reader must know of each column, for the image shapes of the run."""
    shapes = dict.fromkeys(trial.cell.dataset.image_shape for trial in trials)
    notes = {}
    for metric in measured:
        lines = dict.fromkeys(metric.note(shape) for shape in shapes)
        notes[metric.name] = " ".join(line for line in lines if line)
    return notes


def _groups(trials: Sequence[Trial]) -> dict[str, dict[int, int]]:
    """Return the group of each image by the dataset's settings (JSON), for datasets in which images share groups."""
    found = {}
    for dataset in {trial.cell.specs["dataset"]: trial.cell.dataset for trial in trials}.values():
        name = datasets.spec(dataset)
        own = (trial for trial in trials if trial.cell.specs["dataset"] == name)
        images = sorted({index for trial in own for index in trial.indices})
        try:
            groups = {image: int(dataset.group(image)) for image in images}
        except Exception as error:
            raise LeakbenchError(
                f"dataset {name!r}: group() failed: {type(error).__name__}: {one_line(error)}"
            ) from error
        if len(set(groups.values())) < len(groups):
            found[json.dumps(as_json(dataset.settings()), sort_keys=True)] = groups
    return found


def _plugin_files(trials: Sequence[Trial], measured: Sequence[Metric]) -> list[PluginFile]:
    """Return the files of all components that are not part of leakbench."""
    parts: list[tuple[str, Component]] = [("metric", metric) for metric in measured]
    for cell in {trial.cell.key: trial.cell for trial in trials}.values():
        parts += [("dataset", cell.dataset), ("model", cell.model), ("defense", cell.defense), ("attack", cell.attack)]
        parts.append(("client", cell.client))
        parts += [("generator", one) for one in cell.attack.uses()]
    return [file for kind, one in parts if (file := PluginFile.of(kind, one)) is not None]


def _stated(trials: Sequence[Trial]) -> tuple[dict[str, Checkpoint], dict[tuple[str, str], Statement]]:
    """Return the statements of models' files of trained weights, by settings, and of components, by kind and settings.

    Settings are the components' as JSON.
    """
    checkpoints, statements = {}, {}
    for cell in {trial.cell.key: trial.cell for trial in trials}.values():
        settings = {kind: json.dumps(own, sort_keys=True) for kind, own in cell.settings.items()}
        if checkpoint := cell.model.checkpoint():
            checkpoints[settings["model"]] = checkpoint
        if note := cell.dataset.note():
            statements["dataset", settings["dataset"]] = Statement(note, {})
        statements["defense", settings["defense"]] = Statement.of(cell.defense)
    return checkpoints, statements
