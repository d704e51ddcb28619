"""A client's round of federated averaging, as pure functions that know nothing of messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leakbench.core.rng import generator
from leakbench.datasets.images import ByteImages
from leakbench.defenses.base import UpdateStep, checked
from leakbench.training.settings import Arm, Recipe
from leakbench.training.steps import Tensors, Trainee, resumed, train_round


@dataclass(frozen=True)
class Own:
    """The tensors that stay with a client from round to round, and enter no message.

    Attributes:
        private: its lasting secrets: a key, a lock.
        momentum: that of its optimiser, by parameter.
        memory: what its defense keeps of the updates that were not sent, by parameter (``Defense.feedback``).
    """

    private: Tensors
    momentum: Tensors = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Sent:
    """The reply of a client to a round.

    Attributes:
        shared: the tensors that the server averages, without secrets.
        examples: number of its training images, which is its weight in the average.
        loss: the mean training loss of the round.
        steps: number of its steps.
    """

    shared: Tensors
    examples: int
    loss: float
    steps: int


def begin(trainee: Trainee, client: int, arm: Arm, initial: Mapping[str, Tensor]) -> Own:
    """Return the tensors of a client before its first round: a key of its own, and the lock of the first model.

    Trained secrets (a lock) are part of the first model, which the server makes; each client draws the others (a key).

    Args:
        trainee: a network, of which only names and shapes are used.
        client: its number, from 0 on.
        arm: with the seed and the salt of the keys.
        initial: the tensors of the first model.
    """
    first = {secret.name: initial[secret.name] for secret in trainee.locks}
    return Own(first | trainee.draw(trainee.keys, arm.secret_key("key", client)))


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
    """Train a client for a round; return its reply, and the tensors that it keeps.

    The defense encodes the data, adds its layers and loss to every step, and releases the round's whole update
    (weights before less weights after); weights that it withholds stay as they were. Buffers (running statistics) are
    sent unchanged.

    Args:
        trainee: a network to train in; its tensors are overwritten.
        images: the client's.
        recipe: of the training.
        own: the tensors that it kept from its last round.
        shared: the global model.
        client: its number; every draw depends on it, on ``number``, the round (from 1 on), and on ``seed``.
        classes: number of classes.
    """
    key = ("training", seed, "client", client, "round", number)
    trainee.load(shared, own.private)
    kept = resumed(trainee, own.momentum, {})
    losses, kept, batch = train_round(
        trainee, images, recipe, kept, key=key, number=number, defended=False, classes=classes
    )
    after = trainee.shared()
    parameters = trainee.parameters()
    update = {name: shared[name].cpu() - after[name].cpu() for name in after if name in parameters}
    before = {name: shared[name].cpu() for name in update}
    step = UpdateStep(trainee.defense, before, update, (trainee.network, *batch))
    finite = all(bool(torch.isfinite(value).all()) for value in update.values())  # else the training diverged
    rng = generator(*key, "release")
    fed_back = trainee.defense.feedback(step, own.memory, rng)
    reply, memory = (trainee.defense.reply(step, rng), own.memory) if fed_back is None else fed_back
    released = checked(trainee.defense, reply, update, finite=finite)
    sent = {name: value.cpu() for name, value in after.items()}
    sent |= {name: shared[name].cpu() - released.get(name, torch.zeros_like(value)) for name, value in update.items()}
    loss = sum(losses) / len(losses)
    return Sent(sent, len(images), loss, len(losses)), Own(trainee.private(), dict(kept.optimiser.first), memory)
