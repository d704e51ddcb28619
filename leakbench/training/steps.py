"""Steps of SGD on the gradient that a defense releases, and the score of a network on test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Annotated

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.clients import take_step
from leakbench.core.rng import generator, seeded
from leakbench.core.text import plural
from leakbench.core.types import Gradient, Secret
from leakbench.datasets.images import ByteImages
from leakbench.defenses import Defense
from leakbench.defenses.base import Step, checked, encoded
from leakbench.errors import Unsupported, words
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.normalisation import lone_value
from leakbench.optim.client import ClientOptimiser, ClientState
from leakbench.training.data import batches, floats
from leakbench.training.settings import Recipe

Tensors = dict[str, Tensor]
"""Tensor name -> value, of a network's parameters and buffers."""

StoredLoss = Annotated[float, BeforeValidator(lambda value: nan if value is None else value)]
"""A training loss; a value that is not finite is None in a file."""

EVALUATION_BATCH = 500
"""Number of images that are evaluated at a time."""


@dataclass(frozen=True)
class Trainee:
    """A network that is trained behind a defense; training changes the network.

    Attributes:
        network: as ``Defense.wrap`` returned it.
        secrets: of ``Defense.secrets``.
        shapes: the shape of every secret.
    """

    network: nn.Module
    defense: Defense
    secrets: tuple[Secret, ...]
    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, network: nn.Module, defense: Defense) -> Trainee:
        """Return a network with its secrets."""
        secrets = defense.secrets(network)
        tensors = tensors_of(network)
        return cls(network, defense, secrets, {secret.name: tensors[secret.name].shape for secret in secrets})

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def lasting(self) -> tuple[Secret, ...]:
        """The secrets that a client keeps: a key, a lock."""
        return tuple(secret for secret in self.secrets if not secret.fresh)

    @property
    def keys(self) -> list[Secret]:
        """The lasting secrets that are not trained, of which every client draws its own."""
        trained = self.parameters()
        return [secret for secret in self.lasting if secret.name not in trained]

    @property
    def locks(self) -> list[Secret]:
        """The lasting secrets that are trained, which are part of the first model."""
        trained = self.parameters()
        return [secret for secret in self.lasting if secret.name in trained]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name."""
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}

    def shared(self) -> Tensors:
        """Return copies of all tensors but secrets, which a server can see."""
        private = {secret.name for secret in self.secrets}
        own = self.network.state_dict()
        return {name: value.detach().clone() for name, value in own.items() if name not in private}

    def private(self) -> Tensors:
        """Return copies of the lasting secrets, which a client keeps."""
        tensors = tensors_of(self.network)
        return {secret.name: tensors[secret.name].detach().clone() for secret in self.lasting}

    @torch.no_grad()
    def load(self, *states: Mapping[str, Tensor]) -> None:
        """Copy tensors into the network."""
        tensors = tensors_of(self.network)
        for state in states:
            for name, value in state.items():
                tensors[name].copy_(value)

    def draw(self, secrets: Sequence[Secret], *key: object) -> Tensors:
        """Return a draw of each of these secrets from its distribution, by a key."""
        rng = generator(*key)
        return {secret.name: secret.law.draw(tuple(self.shapes[secret.name]), rng) for secret in secrets}

    def refresh(self, rows: int, rng: torch.Generator) -> None:
        """Draw the fresh secrets of a pass, one draw for each of ``rows`` examples: [rows, *shape]."""
        for secret in self.secrets:
            if secret.fresh:
                self._put(secret, secret.law.draw((rows, *self.shapes[secret.name]), rng))

    def settle(self) -> None:
        """Give fresh secrets their own shape again, as zeros."""
        for secret in self.secrets:
            if secret.fresh:
                self._put(secret, torch.zeros(self.shapes[secret.name]))

    def _put(self, secret: Secret, value: Tensor) -> None:
        module, _, tensor = secret.name.rpartition(".")
        setattr(self.network.get_submodule(module), tensor, value.to(self.device))


@dataclass(frozen=True)
class Kept:
    """What a client keeps from step to step, beside its network.

    Attributes:
        optimiser: the state of its optimiser.
        memory: what its defense keeps of what was not sent, per parameter (``Defense.feedback``).
    """

    optimiser: ClientState = ClientState()
    memory: Tensors = field(default_factory=dict)


def rule(recipe: Recipe, number: int) -> ClientOptimiser:
    """Return the update rule of round ``number``."""
    return ClientOptimiser("sgd", recipe.rate(number), recipe.momentum, recipe.nesterov, recipe.weight_decay)


def resumed(trainee: Trainee, momentum: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Kept:
    """Return what a client keeps that continues with this momentum and memory.

    Raises:
        KeyError: they are of another network.
    """
    parameters = trainee.parameters()
    first = {name: value.to(parameters[name], copy=True) for name, value in momentum.items()}
    return Kept(ClientState(first=first), {name: value.to(parameters[name].dtype) for name, value in memory.items()})


def train_round(
    trainee: Trainee,
    images: ByteImages,
    recipe: Recipe,
    kept: Kept,
    *,
    key: Sequence[object],
    number: int,
    defended: bool,
    classes: int,
) -> tuple[list[float], Kept, tuple[Tensor, Tensor]]:
    """Train on images for round ``number``, from 1 on; every draw depends on ``key``, see ``descend``.

    Returns:
        The loss of each step, what the client keeps, and the images and labels of the last step.

    Raises:
        Unsupported: a normalisation by the statistics of a batch has one value.
    """
    optimiser = rule(recipe, number)
    order, draws = generator(*key, "order"), generator(*key, "defense")
    losses = []
    x = y = torch.empty(0)
    trainee.network.train()
    with seeded(*key, "layers", device=trainee.device):
        for _ in range(recipe.local_epochs):
            for x, y in batches(images, recipe.batch, recipe.augment, order):
                try:
                    loss, kept = descend(trainee, optimiser, kept, x, y, draws, defended=defended, classes=classes)
                except ValueError as error:
                    if not lone_value(error):
                        raise
                    raise Unsupported(
                        f"a batch of {plural(len(x), 'image')} has one value at the smallest layer that normalises by "
                        f"a batch's statistics ({words(error)}); choose batches that leave no single image over, or "
                        "larger images"
                    ) from error
                losses.append(loss)
    trainee.settle()
    return losses, kept, (x, y)


class _OnCpu(Step):
    """A step whose gradients are on the CPU, where defenses draw."""

    def _gradient(self, images: Tensor, labels: Tensor) -> Gradient:
        return {name: value.cpu() for name, value in super()._gradient(images, labels).items()}


def descend(
    trainee: Trainee,
    optimiser: ClientOptimiser,
    kept: Kept,
    x: Tensor,
    y: Tensor,
    rng: torch.Generator,
    *,
    defended: bool,
    classes: int,
) -> tuple[float, Kept]:
    """Take one step on a batch x [B, C, H, W] in [0, 1] with labels y [B].

    Args:
        trainee: the network, which is changed.
        optimiser: the update rule.
        kept: what the client keeps, before the step.
        rng: of the defense's draws.
        defended: whether the defense acts on the gradient (``release``), or only on data, network and loss.
        classes: number of classes.

    Returns:
        The mean training loss of the batch, and what the client keeps after the step.

    Raises:
        DefenseFailed: what the defense encodes or releases is malformed; or it is not finite, where the gradient of
            the same batch without the defense's loss and release is. Else the training diverged.
    """
    defense = trainee.defense
    x, y = (value.to(trainee.device) for value in _encoded(defense, x, y, rng, classes))
    trainee.refresh(len(x), rng)
    kind = Step if type(defense).release is Defense.release else _OnCpu
    step = kind(trainee.network, x, y, defense)
    fed_back = defense.feedback(step, kept.memory, rng) if defended else None
    if fed_back is not None:
        released, memory = fed_back
    else:
        released, memory = defense.release(step, rng) if defended else step.gradient(), kept.memory
    gradient = checked(defense, released, trainee.parameters(), finite=False)
    if not _finite(gradient) and _finite(Step(trainee.network, x, y, Defense()).gradient()):
        checked(defense, released, trainee.parameters())
    state = take_step(trainee.network, gradient, optimiser, kept.optimiser)
    return sum(step.losses) / max(1, len(step.losses)), Kept(state, memory)


def _finite(gradient: Gradient) -> bool:
    """Return whether every value is finite."""
    return all(bool(torch.isfinite(value).all()) for value in gradient.values())


def _encoded(defense: Defense, x: Tensor, y: Tensor, rng: torch.Generator, classes: int) -> tuple[Tensor, Tensor]:
    """Return the batch as the defense encodes it; further images of the batch serve as companions of each image."""
    if not defense.companions:
        return encoded(defense, x, y, rng)
    labels = F.one_hot(y, classes).to(x.dtype)
    pairs = []
    for row in range(len(x)):
        rows = torch.tensor([row, *(int(torch.randint(len(x), (), generator=rng)) for _ in range(defense.companions))])
        pairs.append(encoded(defense, x[rows], labels[rows], rng))
    images, targets = zip(*pairs)
    return torch.cat(images), torch.cat(targets)


@dataclass(frozen=True)
class Score:
    """The score of a network on images.

    Attributes:
        loss: the mean cross-entropy, without terms that a defense adds to it.
        correct: number of images that are classified correctly.
        count: number of images.
    """

    loss: StoredLoss
    correct: Annotated[int, Field(ge=0)]
    count: Annotated[int, Field(ge=1)]

    @property
    def accuracy(self) -> float:
        """The share of images that are classified correctly, in [0, 1]."""
        return self.correct / self.count


@torch.no_grad()
def evaluate(trainee: Trainee, images: ByteImages, *key: object) -> Score:
    """Return the score of a network in evaluation mode; fresh secrets are drawn by the key."""
    network, rng = trainee.network, generator("training", "evaluate", *key)
    mode = network.training
    network.eval()
    loss = 0.0
    correct = 0
    for start in range(0, len(images), EVALUATION_BATCH):
        rows = slice(start, start + EVALUATION_BATCH)
        x, y = floats(images.pixels[rows]).to(trainee.device), images.labels[rows].to(trainee.device)
        trainee.refresh(len(x), rng)
        logits = network(x)
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        correct += int((logits.argmax(1) == y).sum())
    trainee.settle()
    network.train(mode)
    return Score(loss / len(images), correct, len(images))
