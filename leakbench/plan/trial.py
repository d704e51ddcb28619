"""A trial (one cell of the matrix on one image with one seed) and its result."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from leakbench import attacks, clients, datasets, defenses, models
from leakbench.attacks import Attack
from leakbench.clients import LocalTraining
from leakbench.clients.local import ONE_IMAGE
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
    client: LocalTraining = ONE_IMAGE

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Everything that identifies the cell, as plain JSON values; the client unless it is the one of one image."""
        return as_json(
            {
                "dataset": self.dataset.settings(),
                "model": {**self.model.settings(), **self.model.behaviour(self.dataset.image_shape)},
                "defense": self.defense.settings(),
                "attack": self.attack.settings(),
                "threat": self.threat.settings(),
                **({} if self.client == ONE_IMAGE else {"client": self.client.settings()}),
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

    @cached_property
    def labels(self) -> dict[str, str]:
        """The specs as results name them: the dataset with the client, unless that is the one of one image.

        Images of other clients are other targets, with floors of their own: ``cifar10 with local(batch=8)``.
        """
        if self.client == ONE_IMAGE:
            return self.specs
        return {**self.specs, "dataset": f"{self.specs['dataset']}{WITH}{clients.spec(self.client)}"}

    @property
    def threat_words(self) -> str:
        """What the attacker is granted, and what the client does, in sentences."""
        if self.client == ONE_IMAGE:
            return self.threat.describe()
        return self.threat.describe(self.client.words(), self.client.recipe(), self.client.rate)

    @property
    def words(self) -> str:
        """The cell in a few words, for messages; a user's own network has its own name."""
        specs = self.labels
        model = self.model.title if isinstance(self.model, OwnModule) else specs["model"]
        return f"{specs['attack']} against {specs['defense']}, {model} on {specs['dataset']}"


WITH = " with "
"""What separates dataset and client in a label."""


def split_label(label: str) -> tuple[str, str]:
    """Return the specs of dataset and client of which a label was made (``Cell.labels``); no client for the default."""
    dataset, _, client = label.partition(WITH)
    return dataset, client


def cell_key(settings: Mapping[str, Any]) -> str:
    """Return the settings of a trial or a cell as the text that identifies the cell."""
    return json.dumps({**settings, "image": None, "seed": None}, sort_keys=True)


def trial_id(cell: Mapping[str, Any], image: int, seed: int, others: Sequence[int] = ()) -> str:
    """Return 16 hex digits: a hash of every resolved setting, defaults written out and component versions included.

    Args:
        cell: the settings of its cell.
        image: the index of its first image.
        seed: its seed.
        others: the indices of the further images of a batch.
    """
    batch = {"others": list(others)} if others else {}
    text = json.dumps({**cell, "image": image, "seed": seed, **batch}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Trial:
    """One attack on one client, which has one private image or a batch, behind one defense.

    Attributes:
        image: the index of the image in the dataset; of a batch, that of the first one.
        seed: the seed of the weights, the client's draws and the attacker's start.
        others: the indices of the further images of a batch.
    """

    cell: Cell
    image: int
    seed: int
    others: tuple[int, ...] = ()

    @cached_property
    def id(self) -> str:
        """The hash that identifies the trial (``trial_id``)."""
        return trial_id(self.cell.settings, self.image, self.seed, self.others)

    @property
    def indices(self) -> tuple[int, ...]:
        """The indices of all images of the client."""
        return (self.image, *self.others)

    @property
    def target(self) -> str:
        """What is attacked (``target``)."""
        return target(self.cell.settings, self.image, self.seed)


UNSEEN = "the network ran on something that has not the size of the image: scores are against the private image only"
"""The reason of a trial that has scores, if the image that its client trained on may be unknown."""

MAX_PICTURE_ERROR = 1e-4
"""The mean squared error that a stored picture may add to a reconstruction, after the fit: 40 dB."""


@dataclass(frozen=True)
class BatchMember:
    """An image of a batch, and the reconstruction that was assigned to it.

    Attributes:
        image: its index in the dataset.
        label: its true label; None if it is not known.
        truth: a PNG of the private image.
        reconstruction: a PNG, as of a result; None if none was left for it.
        aligned: likewise.
        scores: metric name -> value; of the grey image if no reconstruction was left.
    """

    image: int
    label: int | None
    truth: bytes
    reconstruction: bytes | None
    aligned: bytes | None
    scores: Mapping[str, float]


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
        path: how the gradients were computed, ``lanes``, ``batched``, ``vmap`` or ``one-at-a-time``.
        findings: further numbers that the attack found, by name (``Reconstruction.findings``); only finite ones.
        members: the images of a batch of several, in the client's order; the other fields are then those of its first
            image, and ``scores`` the means over all.
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
    members: tuple[BatchMember, ...] = ()
    aligned: bytes | None = None
