"""Train behind defenses, then attack the checkpoints: the accuracy that a defense costs, and the leakage it stops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from leakbench import models
from leakbench.engine import run as engine
from leakbench.engine.progress import NullProgress as Display
from leakbench.engine.run import RunOptions
from leakbench.errors import BadOption, CorruptAsset
from leakbench.plan.matrix import Matrix
from leakbench.training.data import unseen
from leakbench.training.files import read_json, write_json
from leakbench.training.run import ARMS_FOLDER, read, salt_of
from leakbench.training.settings import Arm, Tradeoff

TARGETS_FILE = "targets.json"
"""The file that names the checkpoint of each attacked model, in a run's folder."""
THRESHOLD = 0.6
"""The ``ssim_aligned`` from which an image counts as recovered, unless the attack states a threshold."""


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


def arms_of(plans: Sequence[Tradeoff]) -> list[Arm]:
    """Return every arm of the plans once, each of which can be attacked once it is trained.

    Raises:
        LeakbenchError: an arm or its attacks cannot be run as given.
    """
    arms = {}
    _threshold(plans)
    for plan in plans:
        for arm in plan.arms():
            matrix_of(plan, arm, None)
            arms[arm.id] = arm
    return list(arms.values())


def matrix_of(plan: Tradeoff, arm: Arm, checkpoint: Path | None) -> Matrix:
    """Return the matrix that attacks a checkpoint behind its arm's defense, on images that it was not trained on.

    Without a checkpoint, which does not exist yet, the matrix is only good for a check.

    Raises:
        BadOption: an axis has no valid value, or the model takes no checkpoint.
    """
    taken = [name for name in ("models", "defenses", "datasets") if name in plan.attack]
    if taken:
        raise BadOption(f"attack: {taken[0]} are set by the training; leave {taken[0]} out of [attack]")
    if "weights" not in models.registry.fields(type(arm.model)):
        raise BadOption(f"model {arm.model.name!r} takes no weights= and cannot be attacked after training")
    options = arm.model.options() | ({} if checkpoint is None else {"weights": str(checkpoint)})
    trained = models.registry.build(arm.model.name, options)
    own = {"models": [trained], "defenses": [arm.defense], "datasets": [arm.dataset], "name": plan.name}
    matrix = Matrix(**{**plan.attack, **own})
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
    """Attack the checkpoints of the trainings in ``out``; an existing run in ``out/run.sqlite`` is resumed.

    A new run has the salt of the trainings.

    Args:
        plans: the trainings and their attacks.
        out: the run's folder.
        device: of the attacks.
        command: the command line, for the provenance.
        progress: makes the display of the attacks on a checkpoint.

    Raises:
        BadOption: rows with different thresholds.
    """
    threshold, targets = _threshold(plans), []
    run_options = RunOptions(device, salt=salt_of(out) or None)
    for plan in plans:
        for arm in plan.arms():
            outcome = read(out / ARMS_FOLDER / arm.folder).outcome
            for stage in outcome.stages if outcome.rounds else ():
                if stage.name not in plan.stages:
                    continue
                matrix = matrix_of(plan, arm, out / ARMS_FOLDER / arm.folder / stage.file)
                with progress() as display:
                    engine.run(matrix, out, run_options, progress=display, command=command)
                specs = matrix.describe()
                model, defense = specs["models"][0], specs["defenses"][0]
                targets.append(Target(arm.folder, stage.name, model, defense, stage.accuracy))
    write_json(out / TARGETS_FILE, {"threshold": threshold, "targets": targets})
    return targets


def _threshold(plans: Sequence[Tradeoff]) -> float:
    """Return the one threshold of all plans; raise BadOption if they have several, as a report has one."""
    found = list(dict.fromkeys(plan.attack.get("threshold", THRESHOLD) for plan in plans))
    if len(found) > 1:
        raise BadOption(
            f"attack: threshold={found[1]!r} of one row and {found[0]!r} of another ({THRESHOLD} for a row without "
            "one); give all rows one threshold, or each row a run of its own"
        )
    return float(found[0])


def targets_of(out: Path) -> tuple[float, list[Target]]:
    """Return the threshold and the checkpoints that were attacked; raise CorruptAsset if the file cannot be read."""
    plain = read_json(out / TARGETS_FILE)
    try:
        return _THRESHOLD.validate_python(plain.get("threshold")), _TARGETS.validate_python(plain.get("targets"))
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptAsset(
            f"{out / TARGETS_FILE} does not name the attacked checkpoints ({' '.join(str(first['msg']).split())}); "
            "start the trade-off again"
        ) from None


_THRESHOLD = TypeAdapter(Annotated[float, Field(ge=0, le=1)])
_TARGETS = TypeAdapter(list[Target])
