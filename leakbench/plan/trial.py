"""A trial (one cell of the matrix on one image with one seed) and its result."""

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
from leakbench.models import Model, OwnModule

Status = Literal["ok", "failed", "unsupported", "error"]


def target(cell: Mapping[str, Any], image: int, seed: int) -> str:
    """Return what a trial attacks: the settings of its cell but attack and threat model, with image and seed (JSON).

    A network that a malicious server crafted is another target than the honest one.
    """
    server = cell["threat"].get("server")
    threat = None if server is None else {"server": server}
    return json.dumps({**cell, "attack": None, "threat": threat, "image": image, "seed": seed}, sort_keys=True)


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix; it has one trial for each image and seed."""

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
        """The cell in a few words, for messages; a user's own network has its own name."""
        specs = self.specs
        model = self.model.title if isinstance(self.model, OwnModule) else specs["model"]
        return f"{specs['attack']} against {specs['defense']}, {model} on {specs['dataset']}"


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
        seed: the seed of the weights, the client's draws and the attacker's start.
    """

    cell: Cell
    image: int
    seed: int

    @cached_property
    def id(self) -> str:
        """The hash that identifies the trial (``trial_id``)."""
        return trial_id(self.cell.settings, self.image, self.seed)

    @property
    def target(self) -> str:
        """What is attacked (``target``)."""
        return target(self.cell.settings, self.image, self.seed)


UNSEEN = "the network ran on something that has not the size of the image: scores are against the private image only"
"""The reason of a trial that has scores, if the image that its client trained on may be unknown."""

MAX_PICTURE_ERROR = 1e-4
"""The mean squared error that a stored picture may add to a reconstruction, after the fit: 40 dB."""


@dataclass(frozen=True)
class Result:
    """The outcome of a trial; every trial that was started has one.

    Attributes:
        status: ``ok``; ``failed`` (the attack diverged: the scores are the grey image's); ``unsupported`` or ``error``
            (no scores), with the reason.
        reason: one line; for ``ok`` empty or ``UNSEEN``.
        seconds: the wall time of the trial's chunk divided by its trials.
        scores: metric name -> value; a metric that could not be computed is absent.
        reconstruction: a PNG of the reconstruction, clamped to [0, 1]; None without scores.
        truth: a PNG of the private image; None if it is not known (a recorded update).
        label: the true label; None if it is not known.
        objective: the attack's own final objective, if it has one.
        evaluations: how often the attack evaluated its objective, if it counts.
        path: how the gradients were computed, ``batched``, ``vmap`` or ``one-at-a-time``.
        findings: further numbers that the attack found, by name (``Reconstruction.findings``); only finite ones.
        curve: the objective at some evaluations (``Curve.rows``); empty if there is none.
        aligned: a PNG of the reconstruction after the best fit of brightness and contrast to the private image
            (``metrics.aligned``). Only where ``reconstruction`` cannot show it: values outside [0, 1] are lost there,
            and so is a contrast of a few levels of 256. None otherwise.
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
    aligned: bytes | None = None
