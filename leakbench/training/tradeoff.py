"""Train behind defenses, then attack the checkpoints: what each defense costs beside what it saves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from leakbench.engine import run as engine
from leakbench.engine.progress import NullProgress as Display
from leakbench.engine.run import RunOptions
from leakbench.errors import BadOption, CorruptAsset
from leakbench.plan.matrix import Matrix
from leakbench.training.data import unseen
from leakbench.training.files import read_json, write_json
from leakbench.training.run import ARMS_FOLDER, NullTrainingProgress, TrainingRecord, read
from leakbench.training.run import train as train_arms
from leakbench.training.settings import Arm, Tradeoff

TARGETS_FILE = "targets.json"
"""Which cells of the run attack which checkpoint, in a run's folder."""
THRESHOLD = 0.6
"""The ``ssim_aligned`` from which an image counts as recovered where the attack states none."""


@dataclass(frozen=True)
class Target:
    """A checkpoint that is attacked.

    Attributes:
        arm: the name of the arm's folder.
        stage: the checkpoint's.
        model: the spec under which the run has it.
        defense: the spec of the defense.
        accuracy: of the checkpoint itself on the test images, in [0, 1].
    """

    arm: str
    stage: str
    model: str
    defense: str
    accuracy: Annotated[float, Field(ge=0, le=1)]


def train(
    plans: Sequence[Tradeoff],
    out: Path,
    *,
    device: str = "cpu",
    workers: int = 0,
    command: str = "",
    progress: NullTrainingProgress | None = None,
) -> list[TrainingRecord]:
    """Train every arm of every plan that has no outcome in ``out``; see ``training.train``.

    Raises:
        LeakbenchError: one line on what does not fit, of the attacks too, before anything is trained.
    """
    arms = {}
    _threshold(plans)
    for plan in plans:
        for arm in plan.arms():
            _matrix(plan, arm, Path("checkpoint.safetensors"), check=True)
            arms[arm.id] = arm
    return train_arms(list(arms.values()), out, device=device, workers=workers, command=command, progress=progress)


def _matrix(plan: Tradeoff, arm: Arm, checkpoint: Path, *, check: bool = False) -> Matrix:
    """Return what attacks a checkpoint (``Tradeoff.matrix``), on images that it was not trained on."""
    matrix = plan.matrix(arm, checkpoint, check=check)
    dataset, images = unseen(arm.dataset, matrix.images)
    return matrix.model_copy(update={"datasets": (dataset,), "images": images})


def attack(
    plans: Sequence[Tradeoff],
    out: Path,
    *,
    device: str = "cpu",
    command: str = "",
    progress: Callable[[], Display] = Display,
) -> list[Target]:
    """Attack the checkpoints of the trainings in ``out``, in ``out/run.sqlite``, where that is still missing.

    Args:
        plans: what was trained, and by what it is attacked.
        out: the run's folder.
        device: where the attacks run.
        command: the command line, for the provenance.
        progress: makes what is told of the attacks on a checkpoint.

    Raises:
        BadOption: rows with different thresholds.
    """
    threshold, targets = _threshold(plans), []
    for plan in plans:
        for arm in plan.arms():
            outcome = read(out / ARMS_FOLDER / arm.folder).outcome
            for stage in outcome.stages if outcome.rounds else ():
                if stage.name not in plan.stages:
                    continue
                matrix = _matrix(plan, arm, out / ARMS_FOLDER / arm.folder / stage.file)
                with progress() as told:
                    engine.run(matrix, out, RunOptions(device), progress=told, command=command)
                targets.append(_target(arm, matrix, stage.name, stage.accuracy))
    write_json(out / TARGETS_FILE, {"threshold": threshold, "targets": [asdict(target) for target in targets]})
    return targets


def _threshold(plans: Sequence[Tradeoff]) -> float:
    """Return the threshold of all plans; raise BadOption where they have several, as one report has one."""
    found = list(dict.fromkeys(plan.attack.get("threshold", THRESHOLD) for plan in plans))
    if len(found) > 1:
        raise BadOption(
            f"attack: threshold={found[1]!r} of one row beside {found[0]!r} of another (it is {THRESHOLD} where a row "
            "states none); give all rows one, or each a run of its own"
        )
    return float(found[0])


def _target(arm: Arm, matrix: Matrix, stage: str, accuracy: float) -> Target:
    described = matrix.describe()
    return Target(arm.folder, stage, described["models"][0], described["defenses"][0], accuracy)


def targets_of(out: Path) -> tuple[float, list[Target]]:
    """Return the threshold and the checkpoints that were attacked; raise CorruptAsset where there is no such file."""
    plain = read_json(out / TARGETS_FILE)
    try:
        return _THRESHOLD.validate_python(plain.get("threshold")), _TARGETS.validate_python(plain.get("targets"))
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptAsset(
            f"{out / TARGETS_FILE} does not name what was attacked ({' '.join(str(first['msg']).split())}); "
            "start the trade-off again"
        ) from None


_THRESHOLD = TypeAdapter(Annotated[float, Field(ge=0, le=1)])
_TARGETS = TypeAdapter(list[Target])
