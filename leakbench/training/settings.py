"""The plan of a training: arms of model x defense x dataset x seed, by one recipe; from TOML or from Python."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, SkipValidation

from leakbench import datasets, defenses, models
from leakbench.core.component import Positive, as_json
from leakbench.core.rng import salted
from leakbench.core.text import slug
from leakbench.datasets import Dataset
from leakbench.defenses import Defense
from leakbench.errors import BadOption
from leakbench.models import Model
from leakbench.plan.matrix import Axes, Indices, PositiveInt, axis, check_count

TrainingMode = Literal["centralised", "fedavg"]
Augmentation = Literal["flip", "crop"]
Select = Literal["validation", "test", "last"]
StageName = Literal["initial", "1 epoch", "25 %", "100 %", "best"]

FEDERATED = ("clients", "fraction", "local_epochs", "split", "shards")
"""The options of federated training only."""


class Recipe(Axes):
    """How every arm is trained.

    Attributes:
        mode: ``centralised``: one party with all the data, the defense acts on the gradient of every batch;
            ``fedavg``: clients train locally and a server averages, the defense acts on each client's update.
        rounds: rounds of fedavg, or epochs of a centralised training.
        batch: images in a step.
        lr: the learning rate of SGD.
        momentum: of SGD, in [0, 1); each client keeps its own from round to round.
        nesterov: Nesterov's momentum.
        weight_decay: added to the gradient as weight_decay * weight, after the defense.
        milestones: the rounds after which the learning rate is multiplied by ``gamma``.
        gamma: see ``milestones``.
        augment: ``flip`` mirrors half of the images, ``crop`` takes a random crop after padding by 4 black pixels.
        images: number of training images, drawn at random; None for all.
        tested: number of test images, the first ones; None for all.
        validation: the share of the training images that is held out to choose the best round.
        select: the best round is that of the highest accuracy on the held-out images (``validation``) or on the
            test images (``test``, as the FedKL paper does; then none are held out), or simply the ``last``.
        clients: number of clients, which share the data equally.
        fraction: the share of the clients that take part in a round, rounded down.
        local_epochs: epochs over its own data that a client trains in a round.
        split: ``iid``, or ``shards``: the images sorted by label and cut, each client has ``shards`` pieces.
        shards: see ``split``.
        thief: number of draws of each kind of wrong secret with which a stolen model is tested.

    Raises:
        BadOption: an option has no valid value, or is of fedavg and given in another mode.
    """

    mode: TrainingMode = "centralised"
    rounds: PositiveInt = 10
    batch: PositiveInt = 64
    lr: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    milestones: tuple[PositiveInt, ...] = ()
    gamma: Positive = 0.2
    augment: tuple[Augmentation, ...] = ()
    images: PositiveInt | None = None
    tested: PositiveInt | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    select: Select = "validation"
    clients: PositiveInt = 3
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    local_epochs: PositiveInt = 1
    split: Literal["iid", "shards"] = "iid"
    shards: PositiveInt = 2
    thief: Annotated[int, Field(ge=0, le=1000)] = 5

    def __init__(self, /, **axes: Any) -> None:
        super().__init__(**axes)
        if self.nesterov and self.momentum == 0:
            raise BadOption("nesterov=true needs a momentum above 0; write nesterov = false")
        if self.select == "validation" and self.validation == 0:
            raise BadOption("select='validation' needs held-out images and validation=0; give validation = 0.1")
        idle = [name for name in FEDERATED if name in self.model_fields_set and self.mode != "fedavg"]
        if idle:
            raise BadOption(
                f"{idle[0]}={getattr(self, idle[0])!r} is an option of fedavg, and mode={self.mode!r}; leave "
                f"{idle[0]} out, or give mode fedavg"
            )
        if self.mode == "fedavg" and self.sampled < 1:
            least = 1 / self.clients
            raise BadOption(
                f"fraction={self.fraction:g} of {self.clients} clients selects no client; give at least {least:.3g}"
            )

    @property
    def sampled(self) -> int:
        """How many clients take part in a round."""
        return int(self.fraction * self.clients + 1e-9)

    @property
    def unit(self) -> str:
        """What one of ``rounds`` is: ``round`` or ``epoch``."""
        return "round" if self.mode == "fedavg" else "epoch"

    @property
    def held_out(self) -> float:
        """The share of the training images that no step sees."""
        return self.validation if self.select == "validation" else 0.0

    def rate(self, number: int) -> float:
        """Return the learning rate of round ``number``, from 1 on."""
        return self.lr * self.gamma ** sum(number > milestone for milestone in self.milestones)

    def settings(self) -> dict[str, Any]:
        """Return every option that the training depends on, as plain JSON values."""
        unused = () if self.mode == "fedavg" else FEDERATED
        own = {name: getattr(self, name) for name in Recipe.model_fields if name not in unused}
        return as_json(own)


class Accuracy(Recipe):
    """The trainings of ``leakbench run accuracy``: every model x dataset x defense x seed, by one recipe.

    Attributes:
        name: the run's name.
        models: specs or Model objects.
        datasets: specs or Dataset objects, with a training and a test part.
        defenses: specs or Defense objects.
        seeds: a number of seeds, from 0 on, or a list; of weights, splits, orders, secrets and noise.
    """

    name: Annotated[str, Field(max_length=100, pattern=r"^\w[\w .()=,+-]*$")] = "accuracy"
    models: Annotated[tuple[SkipValidation[Model], ...], axis("models", models.parse)]
    datasets: Annotated[tuple[SkipValidation[Dataset], ...], axis("datasets", datasets.parse)]
    defenses: Annotated[tuple[SkipValidation[Defense], ...], axis("defenses", defenses.parse)]
    seeds: Indices = Field(default=[0])

    def arms(self) -> tuple[Arm, ...]:
        """Return every arm once, in the order of the axes."""
        recipe = Recipe(**{name: getattr(self, name) for name in Recipe.model_fields if name in self.model_fields_set})
        seeds = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        check_count("trainings", len(self.datasets) * len(self.models) * len(self.defenses), seeds)
        product = itertools.product(self.datasets, self.models, self.defenses, seeds)
        arms = (Arm(dataset, model, defense, seed, recipe) for dataset, model, defense, seed in product)
        return tuple({arm.id: arm for arm in arms}.values())


class Tradeoff(Accuracy):
    """The trainings of ``leakbench run tradeoff``, and the attacks on their checkpoints.

    Attributes:
        stages: the checkpoints that are attacked: ``initial``, ``1 epoch``, ``25 %``, ``100 %`` or ``best``.
        attack: axes of the matrix that attacks each checkpoint (attacks, threats, images, threshold, ...).
    """

    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] = ("initial", "100 %")
    attack: dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One training: a model behind a defense on a dataset, from one seed.

    Attributes:
        salt: of the lasting secrets (``core.rng.salted``), which no attack on a checkpoint can draw again; no part of
            the settings.
    """

    dataset: Dataset
    model: Model
    defense: Defense
    seed: int
    recipe: Recipe
    salt: str = ""

    def secret_key(self, *purpose: object) -> str:
        """Return the key that lasting secrets are drawn by: ``"lock"``, or ``"key"`` with a client's number."""
        plain = "\x1f".join(map(str, ("training", self.seed, *purpose)))
        return salted(plain, "client", self.salt)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as plain JSON values."""
        return as_json(
            {
                "dataset": self.dataset.settings(),
                "model": self.model.settings(),
                "defense": self.defense.settings(),
                "seed": self.seed,
                "recipe": self.recipe.settings(),
            }
        )

    @cached_property
    def id(self) -> str:
        """12 hex digits: a hash of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]

    @cached_property
    def specs(self) -> dict[str, str]:
        """The components as specs: dataset, model and defense."""
        return {
            "dataset": datasets.spec(self.dataset),
            "model": models.spec(self.model),
            "defense": defenses.spec(self.defense),
        }

    @property
    def folder(self) -> str:
        """The name of its folder."""
        names = (self.dataset.name, self.model.name, self.specs["defense"])
        return f"{slug(names)}-{self.recipe.mode}-seed{self.seed}-{self.id[:6]}"

    def words(self) -> str:
        """Return the arm in a few words, for a progress line."""
        specs = self.specs
        return f"{specs['dataset']} · {specs['model']} · {specs['defense']} · {self.recipe.mode} · seed {self.seed}"
