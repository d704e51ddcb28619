"""Train every arm that has no outcome yet, into one folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from leakbench.core.device import device_named
from leakbench.core.lock import alone
from leakbench.errors import BadOption, CorruptAsset, LeakbenchError, Unsupported, one_line
from leakbench.flower import require
from leakbench.gradients import full_precision
from leakbench.store.provenance import Provenance
from leakbench.training import centralised
from leakbench.training import data as parts
from leakbench.training.arm import Outcome, Round, start
from leakbench.training.files import RECORD, STATE, read_json, remove_drafts, write_json
from leakbench.training.settings import Arm, Recipe
from leakbench.victim import build

FORMAT = "leakbench-accuracy-1"
ARMS_FOLDER = "arms"
"""Where in a run's folder the arms are, each in a folder of its own."""


class NullTrainingProgress:
    """OnRound of the progress; tells nobody."""

    def begin(self, arm: Arm, number: int, arms: int) -> None:
        """Tell that an arm, the number-th of so many, begins or goes on."""

    def round(self, one: Round) -> None:
        """Tell what was measured after a round."""

    def end(self, outcome: Outcome) -> None:
        """Tell what came of the arm."""

    def note(self, line: str) -> None:
        """Tell something worth a line of its own."""


@dataclass(frozen=True)
class TrainingRecord:
    """An arm and what came of it, as its file has it.

    Attributes:
        specs: dataset, model and defense.
        recipe: every option of the training.
        seed: of every draw.
        settings: what identifies the arm.
        outcome: what came of it.
        provenance: the command, commit and versions of the start that ended it.
        folder: of the arm.
    """

    specs: dict[str, str]
    recipe: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    outcome: Outcome
    provenance: dict[str, Any]
    folder: Path


def train(
    arms: Sequence[Arm],
    out: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    command: str = "",
    progress: NullTrainingProgress | None = None,
) -> list[TrainingRecord]:
    """Train every arm that has no outcome in ``out``, and return the records of all of them.

    An arm that was stopped goes on after its last finished round. One that cannot be trained, or fails, is a record
    with a status and a reason.

    Args:
        arms: what to train.
        out: the run's folder.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        workers: so many Ray processes share the clients of fedavg; with 0 they train one after another in this process.
        command: the command line, for the provenance.
        progress: what is told of the progress.

    Raises:
        LeakbenchError: one line on what does not fit, before anything is trained; another process trains in ``out``.
    """
    progress = progress or NullTrainingProgress()
    where = device_named(device)
    folders = [out / ARMS_FOLDER / arm.folder for arm in arms]
    for arm in arms:
        check(arm)
    if any(arm.recipe.mode == "fedavg" for arm in arms):
        require()
    out.mkdir(parents=True, exist_ok=True)
    with alone(out), full_precision(deterministic=True):
        done = [_finished(folder, arm) for folder, arm in zip(folders, arms)]
        for number, (arm, folder, known) in enumerate(zip(arms, folders, done), 1):
            if known:
                continue
            progress.begin(arm, number, len(arms))
            remove_drafts(folder)
            outcome = _one(arm, folder, where, workers, progress)
            write_json(folder / RECORD, plain(arm, outcome, Provenance.collect(command, str(where), "")))
            if outcome.rounds:  # one that broke goes on after its last round
                (folder / STATE).unlink(missing_ok=True)
                shutil.rmtree(folder / "clients", ignore_errors=True)
            progress.end(outcome)
    return [read(folder) for folder in folders]


def check(arm: Arm) -> None:
    """Raise one line on what does not fit of an arm, without training it; what is unsupported is told later."""
    parts.check(arm.dataset, arm.recipe)
    arm.dataset.load([0])
    try:
        build(arm.model, arm.defense, arm.dataset.image_shape, arm.dataset.num_classes, "blank")
    except Unsupported:
        return


def _one(arm: Arm, folder: Path, device: torch.device, workers: int, progress: NullTrainingProgress) -> Outcome:
    """Return what comes of an arm; what a component raises is its outcome."""
    try:
        if arm.recipe.mode == "fedavg":
            from leakbench.training import federated

            return federated.train(start(arm, device), folder, progress.round, workers)
        return centralised.train(start(arm, device), folder, progress.round)
    except Unsupported as error:
        return Outcome("unsupported", str(error))
    except LeakbenchError:
        raise
    except (Exception, SystemExit) as error:  # whatever a component raises costs its own arm, not the run
        return Outcome("error", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _finished(folder: Path, arm: Arm) -> bool:
    """Return whether an arm has an outcome that stands: one without numbers is tried again."""
    if not (folder / RECORD).exists():
        return False
    record = read_json(folder / RECORD)
    if record.get("format") != FORMAT or record.get("id") != arm.id:
        raise BadOption(f"{folder} holds another training; choose another --out")
    return bool(read(folder).outcome.rounds)


def finished(arms: Sequence[Arm], out: Path) -> int:
    """Return how many of the arms have an outcome in ``out`` that stands."""
    return sum(_finished(out / ARMS_FOLDER / arm.folder, arm) for arm in arms)


def plain(arm: Arm, outcome: Outcome, provenance: Provenance) -> dict[str, Any]:
    """Return what ``read`` takes, as JSON values."""
    source = asdict(provenance)
    del source["matrix"]
    return {
        "format": FORMAT,
        "id": arm.id,
        "specs": arm.specs,
        "recipe": arm.recipe.settings(),
        "seed": arm.seed,
        "settings": arm.settings,
        "outcome": outcome.plain(),
        "provenance": source,
    }


def read(folder: Path) -> TrainingRecord:
    """Return the record of an arm's folder; raise CorruptAsset where it is none."""
    found = read_json(folder / RECORD)
    try:
        source = asdict(_PROVENANCE.validate_python({**found["provenance"], "matrix": ""}))
        del source["matrix"]
        return TrainingRecord(
            specs={axis: _TEXT.validate_python(found["specs"][axis]) for axis in ("dataset", "model", "defense")},
            recipe=Recipe(**found["recipe"]).settings(),
            seed=_WHOLE.validate_python(found["seed"]),
            settings=_TABLE.validate_python(found["settings"]),
            outcome=Outcome.of(found["outcome"]),
            provenance=source,
            folder=folder,
        )
    except (KeyError, TypeError, ValueError, LeakbenchError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise CorruptAsset(f"{folder / RECORD} is no record of a training ({reason}); remove its folder") from None


_PROVENANCE = TypeAdapter(Provenance)
_TEXT = TypeAdapter(str)
_WHOLE = TypeAdapter(int)
_TABLE = TypeAdapter(dict[str, Any])


def records(out: Path) -> list[TrainingRecord]:
    """Return the record of every arm that has an outcome in a run's folder, by name."""
    return [read(path.parent) for path in sorted((out / ARMS_FOLDER).glob(f"*/{RECORD}"))]
