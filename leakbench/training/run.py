"""Train every arm that has no outcome yet, into one folder."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, TypeAdapter

from leakbench.core.device import device_named
from leakbench.core.lock import alone
from leakbench.core.rng import check_salt, new_salt
from leakbench.errors import BadOption, CorruptAsset, DefenseFailed, LeakbenchError, Unsupported, one_line
from leakbench.flower import require
from leakbench.gradients import full_precision
from leakbench.models.base import with_mode
from leakbench.store.provenance import Provenance
from leakbench.training import centralised
from leakbench.training import data as parts
from leakbench.training.arm import Outcome, Round, start
from leakbench.training.files import RECORD, STATE, read_json, remove_drafts, write_json
from leakbench.training.settings import Arm, Recipe
from leakbench.victim import build

FORMAT = "leakbench-accuracy-1"
SALT = "salt.json"
"""The file of the salt of all trainings, in a run's folder."""
ARMS_FOLDER = "arms"
"""The folder of the arms in a run's folder; each arm has its own folder in it."""


class NullTrainingProgress:
    """No output; also the interface of the other displays."""

    def begin(self, arm: Arm, number: int, arms: int) -> None:
        """Report that an arm, ``number`` of ``arms``, is started or resumed."""

    def round(self, one: Round) -> None:
        """Report the measurements after a round."""

    def end(self, outcome: Outcome) -> None:
        """Report the outcome of the arm."""

    def note(self, line: str) -> None:
        """Report one further line."""


@dataclass(frozen=True)
class TrainingRecord:
    """An arm and its outcome, as read from its file.

    Attributes:
        specs: dataset, model and defense.
        recipe: every option of the training.
        seed: of every draw.
        settings: everything that the numbers depend on.
        outcome: its outcome.
        provenance: command, commit and versions of the process that finished it.
        folder: of the arm.
    """

    specs: Annotated[dict[Literal["dataset", "model", "defense"], str], Field(min_length=3)]
    recipe: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    outcome: Outcome
    provenance: Provenance
    folder: Path


def train(
    arms: Sequence[Arm],
    out: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    command: str = "",
    salt: str | None = None,
    progress: NullTrainingProgress | None = None,
) -> list[TrainingRecord]:
    """Train every arm that has no outcome in ``out``, and return the records of all of them.

    An arm that was stopped is resumed after its last finished round. The record of an arm that cannot be trained, or
    fails, has a status and a reason.

    Args:
        arms: the trainings.
        out: the run's folder.
        device: ``auto`` (CUDA if there is a GPU), ``cpu``, ``cuda`` or ``cuda:N``.
        workers: number of Ray processes that share the clients of fedavg; with 0 they train in this process, in turn.
        command: the command line, for the provenance.
        salt: of the lasting secrets (``Arm.salt``); by default that of the trainings in ``out``, or a random one.
        progress: the display.

    Raises:
        LeakbenchError: an arm cannot be trained as given, found before any training; another process uses ``out``.
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
        salt = _salted(out, salt)
        code = Provenance.collect(command, str(where), "", salt=salt)  # now: a checkout may change while this trains
        arms = [replace(arm, salt=salt) for arm in arms]
        done = [_finished(folder, arm) for folder, arm in zip(folders, arms)]
        for number, (arm, folder, known) in enumerate(zip(arms, folders, done), 1):
            if known:
                continue
            progress.begin(arm, number, len(arms))
            remove_drafts(folder)
            outcome = _one(arm, folder, where, workers, progress)
            write_json(folder / RECORD, contents(arm, outcome, code))
            if outcome.rounds:  # an arm that broke is resumed after its last round
                (folder / STATE).unlink(missing_ok=True)
                shutil.rmtree(folder / "clients", ignore_errors=True)
            progress.end(outcome)
    return [read(folder) for folder in folders]


def salt_of(out: Path) -> str | None:
    """Return the salt of the trainings in ``out``, empty for those of an earlier leakbench; None if there are none.

    Raises:
        CorruptAsset: its file cannot be read.
        BadOption: it is no salt.
    """
    if not (out / SALT).exists():
        return "" if (out / ARMS_FOLDER).exists() else None
    salt = str(read_json(out / SALT).get("salt"))
    check_salt(salt)
    return salt


def _salted(out: Path, given: str | None) -> str:
    """Return the salt of trainings in ``out``; a new one is written, before anything is drawn by it.

    Raises:
        BadOption: the given one is no salt, or the trainings in ``out`` have another one.
    """
    check_salt(given or "")
    stored = salt_of(out)
    if stored is None:
        stored = new_salt() if given is None else given
        write_json(out / SALT, {"salt": stored})
    if given not in (None, stored):
        raise BadOption(
            f"--salt {given!r}: the trainings in {out} have the salt {stored!r}; leave --salt out, or choose another "
            "--out"
        )
    return stored


def check(arm: Arm) -> None:
    """Raise LeakbenchError if an arm cannot be trained as given; one that is unsupported gets a record instead."""
    parts.check(arm.dataset, arm.recipe)
    arm.dataset.load([0])
    try:
        build(arm.model, arm.defense, arm.dataset.image_shape, arm.dataset.num_classes, "blank")
    except Unsupported:
        return


def _one(arm: Arm, folder: Path, device: torch.device, workers: int, progress: NullTrainingProgress) -> Outcome:
    """Return the outcome of an arm; an exception of a component is an outcome too."""
    try:
        if arm.recipe.mode == "fedavg":
            from leakbench.training import federated

            return federated.train(start(arm, device), folder, progress.round, workers)
        return centralised.train(start(arm, device), folder, progress.round)
    except Unsupported as error:
        return Outcome("unsupported", str(error))
    except DefenseFailed as error:  # ends its own arm, as do the errors of any component
        return Outcome("error", str(error))
    except LeakbenchError:
        raise
    except (Exception, SystemExit) as error:  # an error of a component ends its own arm, not the run
        return Outcome("error", f"{type(error).__name__}: {one_line(error)}")


def _finished(folder: Path, arm: Arm) -> bool:
    """Return whether an arm has an outcome with numbers; an arm without numbers is tried again."""
    if not (folder / RECORD).exists():
        return False
    record = read_json(folder / RECORD)
    if record.get("format") != FORMAT or record.get("id") != arm.id:
        raise BadOption(f"{folder} holds another training; choose another --out")
    return bool(read(folder).outcome.rounds)


def finished(arms: Sequence[Arm], out: Path) -> int:
    """Return how many of the arms have an outcome with numbers in ``out``."""
    return sum(_finished(out / ARMS_FOLDER / arm.folder, arm) for arm in arms)


def contents(arm: Arm, outcome: Outcome, provenance: Provenance) -> dict[str, Any]:
    """Return the contents of an arm's file, as ``write_json`` takes them."""
    return {
        "format": FORMAT,
        "id": arm.id,
        "specs": arm.specs,
        "recipe": arm.recipe.settings(),
        "seed": arm.seed,
        "settings": arm.settings,
        "outcome": outcome,
        "provenance": {name: value for name, value in vars(provenance).items() if name != "matrix"},
    }


def read(folder: Path) -> TrainingRecord:
    """Return the record of an arm's folder; raise CorruptAsset if it cannot be read."""
    found = read_json(folder / RECORD)
    try:
        recipe = Recipe(**found["recipe"]).settings()
        specs = {**found["specs"], "model": with_mode(found["specs"]["model"], found["settings"]["model"])}
        provenance = {**found["provenance"], "matrix": ""}  # a training has no matrix
        read_as = {"specs": specs, "recipe": recipe, "provenance": provenance, "folder": folder}
        return _RECORD.validate_python({**found, **read_as})
    except (AttributeError, KeyError, TypeError, ValueError, LeakbenchError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise CorruptAsset(f"{folder / RECORD} is not the record of a training ({reason}); remove its folder") from None


_RECORD = TypeAdapter(TrainingRecord)


def records(out: Path) -> list[TrainingRecord]:
    """Return the record of every arm that has an outcome in a run's folder, by name."""
    return [read(path.parent) for path in sorted((out / ARMS_FOLDER).glob(f"*/{RECORD}"))]
