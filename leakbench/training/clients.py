"""What a client does in a round of federated averaging: pure functions, whatever carries the messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leakbench.core.rng import generator, seeded
from leakbench.datasets.in_memory import ByteImages
from leakbench.defenses.base import UpdateStep
from leakbench.training.data import batches
from leakbench.training.settings import Recipe
from leakbench.training.steps import Tensors, Trainee, check, descend, draw, momentum_of, optimiser


@dataclass(frozen=True)
class Own:
    """What stays with a client from round to round, and enters no message.

    Attributes:
        private: its lasting secrets: a key, a lock.
        momentum: that of its optimiser, by parameter.
    """

    private: Tensors
    momentum: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """What a client sends after a round.

    Attributes:
        shared: the tensors that the server averages; no secret is among them.
        examples: how many images it trained on, its weight in the average.
        loss: the mean training loss of the round.
        steps: how many steps it took.
    """

    shared: Tensors
    examples: int
    loss: float
    steps: int


def begin(trainee: Trainee, client: int, seed: int, initial: Mapping[str, Tensor]) -> Own:
    """Return what a client has before its first round: a key of its own, and the lock that the server began with.

    Secrets that are trained (a lock) are part of the first model, which the server makes; those that are not (a key)
    are drawn by each client.

    Args:
        trainee: a network; only its names and shapes are looked at.
        client: its number.
        seed: what keys come from.
        initial: the tensors of the first model.
    """
    trained = trainee.parameters()
    keys = [secret for secret in trainee.lasting if secret.name not in trained]
    first = {secret.name: initial[secret.name] for secret in trainee.lasting if secret.name in trained}
    return Own({**first, **draw(keys, trainee, generator("training", seed, "key", client))})


def local_round(
    trainee: Trainee,
    images: ByteImages,
    recipe: Recipe,
    own: Own,
    shared: Mapping[str, Tensor],
    *,
    client: int,
    number: int,
    seed: int,
    classes: int,
) -> tuple[Sent, Own]:
    """Train a client for a round; return what it sends and what it keeps.

    The defense encodes the data, adds its layers and loss to every step, and releases the round's whole update
    (weights before less weights after); what it withholds does not move. Buffers (running statistics) are sent as they
    are.

    Args:
        trainee: a network to train in; its tensors are overwritten.
        images: the client's.
        recipe: how.
        own: what it kept from its last round.
        shared: the global model.
        client: its number; every draw depends on it, on ``number``, the round (from 1 on), and on ``seed``.
        classes: how many there are.
    """
    key = ("training", seed, "client", client, "round", number)
    trainee.network.train()
    trainee.load(shared, own.private)
    sgd = optimiser(trainee, recipe, own.momentum)
    for group in sgd.param_groups:
        group["lr"] = recipe.rate(number)
    rng, draws = generator(*key, "order"), generator(*key, "defense")
    losses = []
    x = y = torch.empty(0)
    with seeded(*key, "layers"):
        for _ in range(recipe.local_epochs):
            for x, y in batches(images, recipe.batch, recipe.augment, rng):
                losses.append(descend(trainee, sgd, x, y, draws, defended=False, classes=classes))
    trainee.settle()
    after = trainee.shared()
    parameters = trainee.parameters()
    update = {name: shared[name].cpu() - after[name].cpu() for name in after if name in parameters}
    before = {name: shared[name].cpu() for name in update}
    step = UpdateStep(trainee.defense, before, update, (trainee.network, x, y))
    released = trainee.defense.reply(step, generator(*key, "release"))
    check(released, update, trainee.defense)
    sent = {name: value.cpu() for name, value in after.items()}
    sent |= {name: shared[name].cpu() - released.get(name, torch.zeros_like(value)) for name, value in update.items()}
    loss = sum(losses) / len(losses)
    return Sent(sent, len(images), loss, len(losses)), Own(trainee.private(), momentum_of(trainee, sgd))
