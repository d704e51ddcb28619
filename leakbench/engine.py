"""Trials -> groups -> chunks -> observe -> attack -> score -> results in the run file."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from leakbench import datasets, metrics
from leakbench.allocator import keep_freed_memory
from leakbench.attacks.base import prepare
from leakbench.chunk import DEFAULT, choose, out_of_memory
from leakbench.datasets import Dataset
from leakbench.errors import BadOption, LeakbenchError, MissingAsset, Unsupported
from leakbench.gradients import full_precision
from leakbench.matrix import RECOVERY, Matrix
from leakbench.metrics.base import Metric, Truth
from leakbench.models.weights import Checkpoint
from leakbench.progress import Silent
from leakbench.rng import Rng, generator
from leakbench.store import AFTER, BEFORE, FILE, Provenance, Statement, Store
from leakbench.trial import Cell, Result, Trial
from leakbench.types import Observation, Reconstruction
from leakbench.victim import Client, build, check_reveals, groups_of, observe


@dataclass(frozen=True)
class Run:
    """A run on disk: everything else is read from its file.

    Attributes:
        out: the folder that holds ``run.sqlite``, and the report once it is written.
    """

    out: Path

    def results(self) -> pd.DataFrame:
        """Return one row per finished trial: what it was, how it ended, every metric."""
        with Store.open(self.out / FILE, readonly=True) as store:
            return store.results()

    def summary(self) -> pd.DataFrame:
        """Return one row per cell: counts, and each metric's mean, interval and gain over the best floor."""
        from leakbench.report import summarise

        with Store.open(self.out / FILE, readonly=True) as store:
            return summarise(store.results(), store.metrics())

    def tables(self) -> list[Table]:
        """Return the summary as compact rich tables, one for each dataset, model and threat model."""
        from leakbench.report import console_table

        return console_table(self.summary())

    def report(self, formats: Iterable[str] = ("md", "csv")) -> list[Path]:
        """Write the report next to the run file, and return the paths written."""
        from leakbench import report

        return report.write(self.out, set(formats))


@dataclass(frozen=True)
class _Data:
    """A dataset's images that clients hold, and what is public of it."""

    images: Mapping[int, Tensor]
    labels: Mapping[int, int]
    mean: Tensor
    num_classes: int


def run(
    matrix: Matrix,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    chunk: int | None = None,
    strict: bool = False,
    progress: Silent | None = None,
    command: str = "",
) -> Run:
    """Run every trial of a matrix that has no result yet, and return the run.

    Args:
        matrix: what to run.
        out: the run's folder, ``runs/NAME`` by default; a folder that holds a run is continued.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        chunk: trials at a time, by default as many as a short measurement finds best; a chunk that does not fit into
            memory is halved and tried again.
        strict: refuse a matrix with any cell that an attack cannot serve, and stop at the first error of a component.
        progress: what is told of the progress; nothing by default.
        command: the command line, for the provenance.

    Raises:
        LeakbenchError: one line on what does not fit; nothing was written then.
    """
    progress = progress or Silent()
    where = _device(device)
    if chunk is not None and chunk < 1:
        raise BadOption(f"chunk={chunk} does not fit; give at least 1")
    folder = Path(out) if out is not None else Path("runs") / matrix.name
    _check_indices(matrix)
    trials = matrix.trials()
    existing = _has_content(folder / FILE)
    if existing:
        Store.open(folder / FILE, readonly=True).close()  # a foreign file is told before anything is loaded
    keep_freed_memory()
    data = _load(trials)
    refused = _preflight(trials, strict, ensemble=matrix.threshold is not None)
    checkpoints = _checkpoints(trials)
    statements = _statements(trials)
    scores, missing = _metrics()
    store = Store.open(folder / FILE) if existing else Store.create(folder / FILE)
    with store, full_precision():
        session = store.start_session(Provenance.collect(command, _words(where), json.dumps(matrix.describe())))
        store.record_metrics([metrics.parse(name) for name in metrics.names()], _notes(trials))
        store.add_trials(trials)
        store.record_checkpoints(checkpoints)
        store.record_statements(statements)
        done = store.done()
        waiting = [trial for trial in trials if trial.id not in done]
        progress.start(waiting, len(trials) - len(waiting))
        for line in missing:
            progress.note(line)
        work = _Work(data, refused, scores, where, strict, progress.note)
        for _, members in itertools.groupby(trials, key=lambda trial: trial.cell.key):
            cell = tuple(members)
            if cell[0].cell.key not in refused:
                settled = _settled(cell, store, matrix.threshold)
                progress.spare([trial for trial in cell if trial.id in settled - done])
                cell = tuple(trial for trial in cell if trial.id not in settled)
            if all(trial.id in done for trial in cell):
                continue
            size = chunk or store.chunk(cell[0].cell.key)
            if size is None:
                size = work.size(cell)
                store.record_chunk(cell[0].cell.key, size)  # a run that is continued is cut into the same pieces
            width = size * cell[0].attack.queue
            for begin in range(0, len(cell), width):
                todo = [trial for trial in cell[begin : begin + width] if trial.id not in done]
                if not todo:
                    continue
                progress.begin(todo[0].cell.words, len(todo))
                results = work.results(todo, size)
                store.write(results, session)
                progress.finish(results)
        store.end_session(session)
    return Run(folder)


def _has_content(file: Path) -> bool:
    """Return whether there is a run file with anything in it; one that was killed at its birth is begun anew."""
    return file.exists() and not (file.is_file() and file.stat().st_size == 0)


def finished(folder: Path, matrix: Matrix) -> int:
    """Return how many trials of a matrix have a result in a run's folder, or need none (``Matrix.threshold``)."""
    if not (folder / FILE).exists():
        return 0
    trials = matrix.trials()
    with Store.open(folder / FILE, readonly=True) as store:
        return len({trial.id for trial in trials} & (store.done() | _settled(trials, store, matrix.threshold)))


def _settled(trials: Iterable[Trial], store: Store, threshold: float | None) -> set[str]:
    """Return the trials that need not be run: another one has recovered the same image behind the same defense.

    The private image decides here what is left to be measured; what an attack returns it never decides. Floors always
    run, and so does every trial without a threshold.
    """
    if threshold is None:
        return set()
    recovered = store.recovered(RECOVERY, threshold)
    return {trial.id for trial in trials if not trial.attack.floor and recovered.get(trial.target, set()) - {trial.id}}


@dataclass(frozen=True)
class _Work:
    """Everything that turns trials into results."""

    data: Mapping[str, _Data]
    refused: Mapping[str, str]
    metrics: Sequence[Metric]
    device: torch.device
    strict: bool
    note: Callable[[str], None]
    told: set[str] = field(default_factory=set)

    def size(self, cell: Sequence[Trial]) -> int:
        """Return how many of a cell's trials to run at a time, by measurement where the attack can be measured."""
        first, size = cell[0], min(len(cell), DEFAULT[self.device.type])
        if len(cell) == 1 or first.cell.key in self.refused:
            return size
        try:
            attack, blank = prepare(first.attack, _blank(first, set(), self.device))

            def step(trials: int) -> int | None:
                rng = Rng(tuple(f"probe {trial}" for trial in range(trials)), self.device)
                return attack.probe(_repeated(blank, trials, first.model.fresh_weights()), rng)

            return size if step(1) is None else choose(step, len(cell), self.device)
        except Exception:  # a component that fails does so again, and is recorded, when its trials run
            return size

    def results(self, trials: Sequence[Trial], slots: int) -> list[Result]:
        """Return the results of trials of one cell; what fails together is tried in halves, then recorded."""
        reason = self.refused.get(trials[0].cell.key)
        if reason is not None:
            return [self._empty(trial, "unsupported", reason) for trial in trials]
        try:
            return self._chunk(trials, slots)
        except Exception as error:  # whatever a component raises costs its own trials, not the run
            if isinstance(error, Unsupported) and len(trials) == 1 and not self.strict:
                return [self._empty(trials[0], "unsupported", str(error))]
            memory = out_of_memory(error)
            if memory and self.device.type == "cuda":
                torch.cuda.empty_cache()
            if len(trials) > 1:
                slots = min(slots, len(trials))
                if memory:
                    self.note(f"{slots} trials at a time do not fit into memory; trying {-(-slots // 2)}")
                    slots = -(-slots // 2)
                half = len(trials) // 2
                return self.results(trials[:half], slots) + self.results(trials[half:], slots)
            reason = "out of memory" if memory else f"{type(error).__name__}: {' '.join(str(error).split())}"
            if self.strict:
                raise LeakbenchError(f"{trials[0].cell.words}, image {trials[0].image}: {reason}") from error
            return [self._empty(trials[0], "error", reason)]

    def _chunk(self, trials: Sequence[Trial], slots: int) -> list[Result]:
        """Observe, attack and score trials of one cell, so many at a time."""
        begin = time.perf_counter()
        first = trials[0]
        data = self.data[first.specs["dataset"]]
        observation = observe(
            first.model,
            first.defense,
            first.threat,
            [_client(trial, data) for trial in trials],
            data.num_classes,
            data.mean,
            self.device,
        )
        rng = Rng(tuple(f"attack/{trial.seed}/{_data_key(trial)}/{trial.image}" for trial in trials), self.device)
        attack, known = prepare(first.attack, observation)
        guess = _checked(attack(replace(known, slots=slots), rng), observation, first)
        failed = guess.failed if guess.failed is not None else torch.zeros(len(trials), dtype=torch.bool)
        truth = Truth(
            torch.stack([data.images[trial.image] for trial in trials]).to(self.device),
            torch.tensor([data.labels[trial.image] for trial in trials], device=self.device),
        )
        # the one place where reconstruction and truth meet
        scores = self._score(guess, truth)
        seconds = (time.perf_counter() - begin) / len(trials)
        images, truths = guess.images.cpu(), truth.images.cpu()
        return [
            Result(
                trial=trial,
                status="failed" if bool(failed[row]) else "ok",
                reason="the attack diverged; scored as the grey image" if bool(failed[row]) else "",
                seconds=seconds,
                scores={name: values[row] for name, values in scores.items() if values[row] == values[row]},
                reconstruction=png(images[row]),
                truth=png(truths[row]),
                label=data.labels[trial.image],
                objective=_finite(guess.objective, row),
                evaluations=None if guess.evaluations is None else int(guess.evaluations[row]),
                path=guess.path,
            )
            for row, trial in enumerate(trials)
        ]

    def _score(self, guess: Reconstruction, truth: Truth) -> dict[str, list[float]]:
        """Return every metric's values by row, NaN where the metric raises, which is told."""
        with torch.no_grad():
            return {metric.name: self._values(metric, guess, truth) for metric in self.metrics}

    def _values(self, metric: Metric, guess: Reconstruction, truth: Truth) -> list[float]:
        rows = len(truth.images)
        try:
            values = [float(value) for value in metric.score(guess, truth)]
            if len(values) != rows:
                raise ValueError(f"it returned {len(values)} values for {rows} images; return one an image")
            return values
        except Exception as error:
            if self.strict or out_of_memory(error):
                raise
            if rows > 1:
                each = [self._values(metric, *_row(guess, truth, row)) for row in range(rows)]
                return [value for (value,) in each]
            if metric.name not in self.told:
                self.told.add(metric.name)
                self.note(f"metric {metric.name!r} left out: {' '.join(str(error).split())}")
            return [float("nan")]

    def _empty(self, trial: Trial, status: str, reason: str) -> Result:
        data = self.data[trial.specs["dataset"]]
        return Result(
            trial=trial,
            status="unsupported" if status == "unsupported" else "error",
            reason=reason,
            seconds=0.0,
            scores={},
            reconstruction=None,
            truth=png(data.images[trial.image]),
            label=data.labels[trial.image],
        )


def _row(guess: Reconstruction, truth: Truth, row: int) -> tuple[Reconstruction, Truth]:
    """Return one trial's reconstruction and truth, as a batch of one."""
    labels = None if guess.labels is None else guess.labels[row : row + 1]
    only = Reconstruction(guess.images[row : row + 1], labels)
    return only, Truth(truth.images[row : row + 1], truth.labels[row : row + 1])


def png(image: Tensor) -> bytes:
    """Return a PNG of an image [C, H, W] (C = 1 or 3), clamped to [0, 1] and rounded to 8 bits."""
    pixels = image.detach().clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(stream, "PNG")
    return stream.getvalue()


def _checked(guess: Reconstruction, observation: Observation, trial: Trial) -> Reconstruction:
    """Return a reconstruction whose shape is right and whose failed or non-finite rows are the grey image."""
    expected = (observation.trials, *observation.image_shape)
    if not isinstance(guess, Reconstruction):
        raise BadOption(f"attack {trial.attack.name!r} returned {type(guess).__name__}; return a Reconstruction")
    if tuple(guess.images.shape) != expected:
        raise BadOption(
            f"attack {trial.attack.name!r} returned images of shape {tuple(guess.images.shape)}, not {expected}"
        )
    images = guess.images.detach().float()
    failed = ~torch.isfinite(images.flatten(1)).all(1)
    if guess.failed is not None:
        failed = failed | guess.failed.to(failed.device)
    images = torch.where(failed[:, None, None, None], torch.full_like(images, 0.5), images)
    return replace(guess, images=images, failed=failed)


def _client(trial: Trial, data: _Data) -> Client:
    key = f"{trial.seed}/{_data_key(trial)}/{trial.image}"
    weights = f"weights/{key}" if trial.model.fresh_weights() else f"weights/{trial.seed}"
    companions = tuple((data.images[index], data.labels[index]) for index in _companions(trial))
    return Client(data.images[trial.image], data.labels[trial.image], weights, f"client/{key}", companions)


def _companions(trial: Trial) -> list[int]:
    """Return the indices of the client's further images, any but the attacked one, for a defense that mixes them in."""
    if not trial.defense.companions:
        return []
    rng = generator("companions", trial.seed, _data_key(trial), trial.image)
    order = torch.randperm(len(trial.dataset), generator=rng).tolist()
    return [index for index in order if index != trial.image][: trial.defense.companions]


def _data_key(trial: Trial) -> str:
    return trial.specs["dataset"]


def _cells_of(trials: Sequence[Trial]) -> list[Cell]:
    """Return the cells of trials, each once."""
    return list({trial.cell.key: trial.cell for trial in trials}.values())


def _words(device: torch.device) -> str:
    """Return a device as provenance names it: a GPU with its model and CUDA version."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda})"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DEFAULT:
        raise BadOption(f"device {name!r} is not known; write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadOption(f"device {name!r} was asked for, and torch finds no CUDA device; write --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadOption(f"device {name!r} does not exist; there are {torch.cuda.device_count()} CUDA devices")
    return device


def _check_indices(matrix: Matrix) -> None:
    """Raise BadOption where an image index is out of range, before a large matrix is made."""
    last = matrix.images - 1 if isinstance(matrix.images, int) else max(matrix.images)
    for dataset in matrix.datasets:
        if last >= len(dataset):
            raise BadOption(
                f"image index {last} is out of range for dataset {datasets.spec(dataset)!r} "
                f"({len(dataset)} images); give indices from 0 to {len(dataset) - 1}"
            )


def _load(trials: Sequence[Trial]) -> dict[str, _Data]:
    """Load the clients' images of every dataset, by its spec; what does not fit is told before the run."""
    data = {}
    for name, dataset in {trial.specs["dataset"]: trial.dataset for trial in trials}.items():
        held = [trial for trial in trials if trial.specs["dataset"] == name]
        indices = sorted({index for trial in held for index in (trial.image, *_companions(trial))})
        try:
            data[name] = _load_one(dataset, indices)
        except LeakbenchError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise LeakbenchError(f"dataset {name!r} cannot be read: {type(error).__name__}: {reason}") from error
    return data


def _load_one(dataset: Dataset, indices: list[int]) -> _Data:
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
    return _Data(
        images=dict(zip(indices, images)),
        labels={index: int(label) for index, label in zip(indices, labels)},
        mean=dataset.mean(),
        num_classes=dataset.num_classes,
    )


def _preflight(trials: Sequence[Trial], strict: bool, ensemble: bool) -> dict[str, str]:
    """Return why each cell that cannot be served cannot, from one step on a blank image.

    Raises:
        Unsupported: an attack that serves no cell at all (of an ensemble, if none does) or, if strict, any cell that is
            not served.
        BadOption: a threat model that reveals what no defense of the matrix has.
    """
    cells = {trial.cell.key: trial for trial in trials}
    refused: dict[str, str] = {}
    observed: dict[str, Observation | Exception] = {}
    groups: set[str] = set()
    for cell, trial in cells.items():
        key = json.dumps([trial.cell.settings[part] for part in ("dataset", "model", "defense", "threat")])
        try:
            if key not in observed:
                observed[key] = _blank(trial, groups)
            observation = observed[key]
            if isinstance(observation, Exception):
                raise observation
            attack, known = prepare(trial.attack, observation)
            attack.check(known)
        except Unsupported as error:
            observed.setdefault(key, error)
            refused[cell] = str(error)
        except LeakbenchError:
            raise
        except Exception as error:  # a component that fails is recorded, with its reason, when its trials run
            observed.setdefault(key, error)
    check_reveals({trial.threat for trial in trials}, groups)
    for cell, reason in refused.items():
        spec = cells[cell].specs["attack"]
        others = [other for other, trial in cells.items() if ensemble or trial.specs["attack"] == spec]
        if strict or all(other in refused for other in others):
            raise Unsupported(f"{cells[cell].cell.words}: {reason}")
    return refused


def _blank(trial: Trial, groups: set[str], device: torch.device | str = "cpu") -> Observation:
    """Return what a step on a blank image shows; note the defense's groups of secrets."""
    shape, classes = trial.dataset.image_shape, trial.dataset.num_classes
    network = build(trial.model, trial.defense, shape, classes, "blank")
    groups |= groups_of(trial.defense, network)
    image = torch.full(shape, 0.5)
    client = Client(image, 0, "blank", "blank", ((image, 0),) * min(trial.defense.companions, len(trial.dataset) - 1))
    mean = trial.dataset.mean()
    return observe(trial.model, trial.defense, trial.threat, [client], classes, mean, device)


def _repeated(blank: Observation, trials: int, own: bool) -> Observation:
    """Return the observation of one trial as one of many, each with its ``own`` weights or all with the same."""
    parameters = {name for name, _ in blank.model.named_parameters()}

    def repeat(value: Tensor, copy: bool) -> Tensor:
        rows = value.expand(trials, *value.shape[1:])
        return rows.contiguous() if copy else rows

    return replace(
        blank,
        weights={name: repeat(value, own) if name in parameters else value for name, value in blank.weights.items()},
        gradient={name: repeat(value, True) for name, value in blank.gradient.items()},
        labels=None if blank.labels is None else blank.labels.expand(trials),
        targets=None if blank.targets is None else blank.targets.expand(trials, -1),
    )


def _metrics() -> tuple[list[Metric], list[str]]:
    """Return the metrics that can be computed here, and a line on each that cannot."""
    usable, missing = [], []
    for name in metrics.names():
        if name in BEFORE + AFTER:
            raise BadOption(f"metric {name!r} has the name of a column of the results; rename the metric")
        metric = metrics.parse(name)
        try:
            metric.check()
            usable.append(metric)
        except MissingAsset as error:
            missing.append(str(error))
    return usable, missing


def _notes(trials: Sequence[Trial]) -> dict[str, str]:
    """Return what a reader must know of each column, for the image shapes of the run."""
    shapes = dict.fromkeys(trial.dataset.image_shape for trial in trials)
    notes = {}
    for name in metrics.names():
        lines = dict.fromkeys(metrics.parse(name).note(shape) for shape in shapes)
        notes[name] = " ".join(line for line in lines if line)
    return notes


def _checkpoints(trials: Sequence[Trial]) -> dict[str, Checkpoint]:
    """Return what the models' files of trained weights state, by the models' settings as JSON."""
    models = {json.dumps(cell.settings["model"], sort_keys=True): cell.model for cell in _cells_of(trials)}
    stated = {settings: model.checkpoint() for settings, model in models.items()}
    return {settings: checkpoint for settings, checkpoint in stated.items() if checkpoint is not None}


def _statements(trials: Sequence[Trial]) -> dict[str, Statement]:
    """Return what the defenses state of themselves, by their settings as JSON."""
    defenses = {json.dumps(cell.settings["defense"], sort_keys=True): cell.defense for cell in _cells_of(trials)}
    return {settings: Statement.of(defense) for settings, defense in defenses.items()}


def _finite(values: Tensor | None, row: int) -> float | None:
    value = None if values is None else float(values[row])
    return value if value is not None and abs(value) < float("inf") else None
