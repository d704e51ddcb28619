"""The common part of both modes of training: the start, the measurements after each round, and the files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from leakbench.defenses import Defense
from leakbench.models import weights
from leakbench.models.weights import Checkpoint
from leakbench.training.data import TrainingData, load
from leakbench.training.files import STATE, plain, read_state, restoring, write_state
from leakbench.training.settings import Arm, Recipe
from leakbench.training.steps import Score, StoredLoss, Tensors, Trainee, evaluate
from leakbench.training.thief import Theft, thefts
from leakbench.victim import build

GLOBAL = "global"
"""The name of the view of a model that needs no secrets."""


@dataclass(frozen=True)
class View:
    """The scores that one holder of the model measures: the server, or a client with its secrets.

    Attributes:
        name: ``global``, or ``client N`` with N from 1 on.
        validation: on the held-out images; None if there are none.
        test: on the test images.
    """

    name: str
    validation: Score | None
    test: Score


@dataclass(frozen=True)
class Round:
    """The measurements after a round (an epoch of a centralised training).

    Attributes:
        number: from 1 on.
        rate: the learning rate.
        loss: the mean training loss of the steps, the defense's own terms included.
        views: the scores that each holder of the model measures.
        seconds: the wall time of training and measuring.
        failures: one line for each client that failed to train and was left out of the average.
        untested: one line for each client that could not test the model with its secrets; ``views`` has the others.
    """

    number: int
    rate: float
    loss: StoredLoss
    views: Annotated[tuple[View, ...], Field(min_length=1)]
    seconds: float
    failures: tuple[str, ...] = ()
    untested: tuple[str, ...] = ()

    @property
    def diverged(self) -> bool:
        """Whether the training loss is infinite or undefined."""
        return not math.isfinite(self.loss)

    def accuracy(self, part: str) -> float:
        """Return the mean accuracy of all views on ``validation`` or ``test``."""
        scores = [view.validation if part == "validation" else view.test for view in self.views]
        return sum(score.accuracy for score in scores if score is not None) / len(scores)


@dataclass(frozen=True)
class SavedStage:
    """A checkpoint.

    Attributes:
        name: ``initial``, ``1 epoch``, ``25 %``, ``100 %`` or ``best``.
        number: the round after which it was written.
        file: its name in the arm's folder.
        accuracy: on the test images, in [0, 1], with the secrets that it holds.
    """

    name: str
    number: int
    file: Annotated[str, Field(pattern=r"^[\w-]+\.safetensors$")]
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """The outcome of an arm.

    Attributes:
        status: ``ok``; ``failed``: the loss became infinite or undefined; ``unsupported`` or ``error``: no numbers.
        reason: one line, empty for ``ok``.
        rounds: the measurements after each round.
        best: the number of the best round (``Recipe.select``), 0 without rounds.
        stages: the checkpoints.
        thefts: the accuracy of the model of the best round for a thief without the right secrets.
        images: number of training images.
        groups: how many test images each of their groups has (``TrainingData``); empty if each image is its own.
    """

    status: str
    reason: str
    rounds: tuple[Round, ...] = ()
    best: int = 0
    stages: tuple[SavedStage, ...] = ()
    thefts: tuple[Theft, ...] = ()
    images: Annotated[int, Field(ge=0)] = 0
    groups: tuple[Annotated[int, Field(ge=1)], ...] = ()

    def __post_init__(self) -> None:
        numbers = [one.number for one in self.rounds]
        if numbers != list(range(1, len(numbers) + 1)) or self.best not in (numbers or [0]):
            raise ValueError("its rounds are not numbered 1, 2, ..., or the best round is not among them")

    def chosen(self) -> Round:
        """Return the best round."""
        return self.rounds[self.best - 1]


_ROUNDS, _STAGES = TypeAdapter(list[Round]), TypeAdapter(list[SavedStage])


@dataclass(frozen=True)
class TrainingSession:
    """An arm that is being trained: its images, and a network to work in.

    Attributes:
        initial: the tensors of the first model: the shared ones, and its secrets.
    """

    arm: Arm
    data: TrainingData
    trainee: Trainee
    initial: Tensors = field(repr=False)


OnRound = Callable[[Round], None]
"""OnRound of every round that is finished, those of an earlier start included."""


def start(arm: Arm, device: torch.device | str = "cpu") -> TrainingSession:
    """Load an arm's images and make its first model.

    Raises:
        MissingAsset: the dataset is not in the cache.
        BadOption: the dataset has too few images, or the checkpoint is of another model.
        Unsupported: the model or the defense does not admit these images.
    """
    data = load(arm.dataset, arm.recipe, arm.seed)
    network = build(arm.model, arm.defense, data.image_shape, data.num_classes, f"training/{arm.seed}")
    placed = network.train().to(device=torch.device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainee = Trainee.of(placed, arm.defense)
    checkpoint: Checkpoint | None = arm.model.checkpoint()
    if checkpoint is None or not checkpoint.defense:
        trainee.load(trainee.draw(trainee.locks, arm.secret_key("lock")))
        trainee.load(trainee.draw(trainee.keys, arm.secret_key("key", 0)))  # that of a federation's first client
    return TrainingSession(arm, data, trainee, {**trainee.shared(), **trainee.private()})


def view(session: TrainingSession, name: str, *key: object) -> View:
    """Return the network's scores on held-out and test images; fresh secrets are drawn by the key."""
    data, trainee, seed = session.data, session.trainee, session.arm.seed
    held = evaluate(trainee, data.validation, seed, "validation", *key) if len(data.validation) else None
    return View(name, held, evaluate(trainee, data.test, seed, "test", *key))


def best_of(rounds: Sequence[Round], recipe: Recipe) -> int:
    """Return the number of the best round so far, the first of equals, among those that every client has tested.

    See ``Recipe.select``; if no round was tested by every client, all rounds are compared.
    """
    if recipe.select == "last":
        return rounds[-1].number
    tested = [one for one in rounds if not one.untested] or rounds
    return max(tested, key=lambda one: (one.accuracy(recipe.select), -one.number)).number


def stages_of(recipe: Recipe) -> dict[str, int]:
    """Return the round after which each stage is reached; a short training reaches several at once.

    If a round has several local epochs, ``1 epoch`` is the first round.
    """
    return {"initial": 0, "1 epoch": 1, "25 %": math.ceil(recipe.rounds / 4), "100 %": recipe.rounds}


class TrainingHistory:
    """The measurements and files of an arm's training: rounds, checkpoints, and the tensors of the best round.

    Args:
        session: the arm.
        folder: of the state and the checkpoints.
        on_round: called with every finished round, those of an earlier start included.
    """

    def __init__(self, session: TrainingSession, folder: Path, on_round: OnRound) -> None:
        self.session, self.folder, self.on_round = session, folder, on_round
        self.rounds: list[Round] = []
        self.stages: list[SavedStage] = []
        self.best: Tensors = {}

    def restore(self) -> dict[str, Any] | None:
        """Read the state of an earlier start, and return its further entries; None if there is no state.

        Raises:
            CorruptAsset: the state cannot be read.
        """
        file = self.folder / STATE
        if not file.exists():
            return None
        state = read_state(file)
        with restoring(file):
            self.rounds = _ROUNDS.validate_python(state.pop("rounds"))
            self.stages = _STAGES.validate_python(state.pop("stages"))
            self.best = state.pop("best")
        for one in self.rounds:
            self.on_round(one)
        return state

    @property
    def done(self) -> bool:
        """Whether no round is left."""
        return len(self.rounds) >= self.session.arm.recipe.rounds or bool(self.rounds and self.rounds[-1].diverged)

    @property
    def best_round(self) -> Round:
        """The best round so far (``best_of``)."""
        return self.rounds[best_of(self.rounds, self.session.arm.recipe) - 1]

    def add(self, one: Round, accuracy: float, model: Tensors, rest: Mapping[str, Any]) -> None:
        """Add a round, write the checkpoints of the stages that it reaches, and write the state.

        Args:
            one: the round.
            accuracy: of the network on the test images.
            model: the tensors that are kept if this round is the best.
            rest: further entries of the state.
        """
        self.rounds.append(one)
        for name, at in stages_of(self.session.arm.recipe).items():
            if at == one.number:
                self.keep(name, at, accuracy)
        if self.best_round is one:
            self.best = model
        state = {"rounds": plain(self.rounds), "stages": plain(self.stages), "best": self.best}
        write_state(self.folder / STATE, {**state, **rest})

    def keep(self, name: str, number: int, accuracy: float) -> None:
        """Write the network as it is as a checkpoint that the matrix of attacks takes.

        If the defense changes the network, the file holds the defended network with its secrets, and is attacked behind
        that defense; otherwise it holds the plain network.
        """
        arm = self.session.arm
        file = f"{name.replace(' %', '-percent').replace(' ', '-')}.safetensors"
        weights.save(
            self.session.trainee.network,
            self.folder / file,
            stage=f"{name} ({arm.recipe.unit} {number} of {arm.recipe.rounds})",
            test_accuracy=accuracy,
            dataset=arm.specs["dataset"],
            defense=arm.specs["defense"] if type(arm.defense).wrap is not Defense.wrap else "",
        )
        self.stages.append(SavedStage(name, number, file, accuracy))

    def outcome(self, accuracy: float, privates: Sequence[Tensors]) -> Outcome:
        """Write the checkpoint of the best round, and return the outcome.

        Args:
            accuracy: of the network, which holds the model of the best round, on the test images.
            privates: the secrets of each client in that round.
        """
        session, recipe, last = self.session, self.session.arm.recipe, self.rounds[-1]
        number = self.best_round.number
        self.keep("best", number, accuracy)
        stolen = thefts(
            session.trainee,
            session.trainee.shared(),
            privates,
            session.initial,
            session.data.test,
            draws=recipe.thief,
            seed=session.arm.seed,
        )
        reason = f"the training loss was {last.loss} in {recipe.unit} {last.number}; it stopped there"
        return Outcome(
            "failed" if last.diverged else "ok",
            reason if last.diverged else "",
            tuple(self.rounds),
            number,
            tuple(self.stages),
            tuple(stolen),
            len(session.data.train),
            session.data.groups,
        )
