"""A trial (one cell of the matrix for one image and one seed) and its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from leakbench import attacks, datasets, defenses, models
from leakbench.attacks import Attack
from leakbench.core.component import as_json
from leakbench.core.types import ThreatModel
from leakbench.datasets import Dataset
from leakbench.defenses import Defense
from leakbench.models import Model

Status = Literal["ok", "failed", "unsupported", "error"]


def target(cell: Mapping[str, Any], image: int, seed: int) -> str:
    """Return what a trial of a cell of these settings attacks, whatever the attack and the threat model."""
    return json.dumps({**cell, "attack": None, "threat": None, "image": image, "seed": seed}, sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix: what its trials, one for each image and seed, have in common."""

    dataset: Dataset
    model: Model
    defense: Defense
    attack: Attack
    threat: ThreatModel

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that identifies the cell, as plain JSON values."""
        return as_json(
            {
                "dataset": self.dataset.settings(),
                "model": {**self.model.settings(), **self.model.behaviour(self.dataset.image_shape)},
                "defense": self.defense.settings(),
                "attack": self.attack.settings(),
                "threat": self.threat.settings(),
            }
        )

    @cached_property
    def key(self) -> str:
        """The settings as text."""
        return cell_key(self.settings)

    @cached_property
    def specs(self) -> dict[str, str]:
        """The components as specs: dataset, model, defense, attack and threat."""
        return {
            "dataset": datasets.spec(self.dataset),
            "model": models.spec(self.model),
            "defense": defenses.spec(self.defense),
            "attack": attacks.spec(self.attack),
            "threat": self.threat.spec(),
        }

    @property
    def words(self) -> str:
        """The cell as messages name it."""
        specs = self.specs
        return f"{specs['attack']} against {specs['defense']}, {specs['model']} on {specs['dataset']}"


def cell_key(settings: Mapping[str, Any]) -> str:
    """Return the settings of a trial or a cell as the text that identifies the cell."""
    return json.dumps({**settings, "image": None, "seed": None}, sort_keys=True)


def trial_id(cell: Mapping[str, Any], image: int, seed: int) -> str:
    """Return 16 hex digits: a hash of every resolved setting, defaults written out and component versions included."""
    text = json.dumps({**cell, "image": image, "seed": seed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trial:
    """One attack on one private image behind one defense.

    Attributes:
        image: the index of the image in the dataset.
        seed: what the weights, the client's draws and the attacker's start come from.
    """

    cell: Cell
    image: int
    seed: int

    @cached_property
    def id(self) -> str:
        """What identifies the trial (``trial_id``)."""
        return trial_id(self.cell.settings, self.image, self.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that identifies the trial, as plain JSON values."""
        return {**self.cell.settings, "image": self.image, "seed": self.seed}

    @property
    def dataset(self) -> Dataset:
        """The cell's."""
        return self.cell.dataset

    @property
    def model(self) -> Model:
        """The cell's."""
        return self.cell.model

    @property
    def defense(self) -> Defense:
        """The cell's."""
        return self.cell.defense

    @property
    def attack(self) -> Attack:
        """The cell's."""
        return self.cell.attack

    @property
    def threat(self) -> ThreatModel:
        """The cell's."""
        return self.cell.threat

    @property
    def specs(self) -> dict[str, str]:
        """The cell's."""
        return self.cell.specs

    @property
    def target(self) -> str:
        """What is attacked: every setting but the attack and the threat model."""
        return target(self.cell.settings, self.image, self.seed)


@dataclass(frozen=True)
class Result:
    """What came of a trial; every trial that was started ends as one.

    Attributes:
        status: ``ok``; ``failed`` (the attack diverged: scored as the grey image); ``unsupported`` or ``error``
            (no scores), with the reason.
        reason: one line that says why, empty for ``ok``.
        seconds: the wall time of the trial's chunk divided by its trials.
        scores: metric name -> value; a metric that could not be computed is absent.
        reconstruction: a PNG of the reconstruction, clamped to [0, 1]; None without scores.
        truth: a PNG of the private image; None where it is not known (a recorded update).
        label: the true label; None likewise.
        objective: the attack's own final objective, where it has one.
        evaluations: how often the attack evaluated its objective, where it counts.
        path: how the gradients were computed, ``batched``, ``vmap`` or ``one-at-a-time``.
        findings: further numbers that the attack found, by name (``Reconstruction.findings``); finite ones alone.
        curve: the objective at some evaluations (``Curve.rows``); empty where there is none.
    """

    trial: Trial
    status: Status
    reason: str
    seconds: float
    scores: Mapping[str, float]
    reconstruction: bytes | None
    truth: bytes | None
    label: int | None
    objective: float | None = None
    evaluations: int | None = None
    path: str = ""
    findings: Mapping[str, float] = field(default_factory=dict)
    curve: bytes = b""
