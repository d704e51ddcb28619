"""The steps of T clients, one after the other, or together on a device; and whose fault an error is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakbench.clients import LocalTraining
from leakbench.core.device import SHARE, empty_cache, free_memory, out_of_memory
from leakbench.core.rng import DrawsOnHost, generator, seeded
from leakbench.core.types import Gradient, ThreatModel
from leakbench.defenses.base import Defense
from leakbench.defenses.joint import JointSteps
from leakbench.defenses.secrets import drawn_secrets
from leakbench.errors import DEFENSE_FAILED, BadOption, ClientFailed, DefenseFailed, LeakbenchError, Unsupported, words
from leakbench.gradients.bilinear import inner
from leakbench.gradients.evaluate import lifted, tensors_of
from leakbench.gradients.layer_inputs import tensor_key
from leakbench.gradients.normalisation import lone_value
from leakbench.models.base import Model
from leakbench.models.crafted import HandedOut
from leakbench.models.module import OwnModule
from leakbench.victim.client import Client, StepRecord
from leakbench.victim.network import build, public_tensors
from leakbench.victim.records import Key, changed_images, overridden, ratio
from leakbench.victim.trainer import Taken, Trainer

JOINT_COPIES = 12
"""How many times the network's size a client may take on a device where many are computed at once."""


@dataclass(frozen=True)
class ClientSteps:
    """The steps of T clients.

    Attributes:
        gradient: what they sent, [T, *shape] by name, on the device of the observation.
        drawn: each client's secrets by name, on the CPU.
        records: what evaluation needs of each, if they were recorded.
    """

    gradient: Gradient
    drawn: list[dict[str, Tensor]]
    records: list[StepRecord]


Blame = Callable[[BaseException, Client], None]
"""Raises the right error for one of a client's step, unless its defense has no part in it."""


def single_steps(
    trainers: Mapping[str, Trainer],
    clients: Sequence[Client],
    device: torch.device,
    blame: Blame,
    record: Callable[[Trainer, Client, Taken], StepRecord] | None,
) -> ClientSteps:
    """Return the steps of clients, taken one after the other on the CPU."""
    sent: list[Gradient] = []
    every: list[dict[str, Tensor]] = []
    records: list[StepRecord] = []
    for client in clients:
        trainer = trainers[client.weights_key]
        network, drawn = trainer.drawn(client)
        every.append(drawn)
        with _blaming(blame, client):
            taken = trainer.step(network, client)
        sent.append(taken.sent)
        if record is not None:
            records.append(record(trainer, client, taken))
    names = _names(sent)
    return ClientSteps(
        {name: lifted(torch.stack([row[name] for row in sent])).to(device) for name in names}, every, records
    )


def _names(sent: Sequence[Gradient]) -> list[str]:
    """Return the parameters that all clients sent; raise BadOption if they sent different ones."""
    names = list(sent[0])
    if other := next((row for row in sent if set(row) != set(names)), None):
        differing = sorted(set(other) ^ set(names))
        raise BadOption(f"clients sent different parameters, {differing[0]!r} among them; observe them one at a time")
    return names


def joint_steps(
    trainers: Mapping[str, Trainer], clients: Sequence[Client], device: torch.device, blame: Blame, record: bool
) -> ClientSteps | None:
    """Return the steps of clients, computed together on a device; None if they are better taken one after the other.

    They are on the CPU, where the results of older runs were computed so; behind a defense that does not state
    ``joint``; of networks that compute in half precision, or that the engine does not serve; if images are augmented.
    """
    trainer = trainers[clients[0].weights_key]
    if device.type == "cpu" or not trainer.defense.joint or not trainer.training.same_inputs:
        return None
    size = sum(value.numel() * value.element_size() for value in trainer.network.parameters())
    most = max(1, int(SHARE * free_memory(device) / (JOINT_COPIES * max(1, size))))
    found: list[ClientSteps] = []
    begin = 0
    while begin < len(clients):
        some = clients[begin : begin + most]
        try:
            found.append(_joint_part(trainers, some, device, blame, record))
            begin += len(some)
            continue
        except Unsupported:  # which the single steps say again, if it is the defense that does
            return None
        except Exception as error:
            if not out_of_memory(error) or len(some) == 1:
                raise
        # outside of the except block, whose error would hold the tensors that did not fit
        most = len(some) // 2
        empty_cache(device)
    if len(found) == 1:
        return found[0]
    names = _names([part.gradient for part in found])
    return ClientSteps(
        {name: torch.cat([part.gradient[name] for part in found]) for name in names},
        [row for part in found for row in part.drawn],
        [row for part in found for row in part.records],
    )


def _joint_part(
    trainers: Mapping[str, Trainer], clients: Sequence[Client], device: torch.device, blame: Blame, record: bool
) -> ClientSteps:
    """Return the steps of as many clients as fit into memory; raise Unsupported if they cannot be computed together."""
    first = trainers[clients[0].weights_key]
    order = [trainers[client.weights_key].network for client in clients]
    rows = first.training.count if first.training.count > 1 else 0
    drawn = [
        drawn_secrets(first.secrets, tensors_of(network), client.key, trained=first.behind, rows=rows)
        for network, client in zip(order, clients)
    ]
    own = tensors_of(first.network)
    tensors = public_tensors(order, {secret.name for secret in first.secrets}, device) | {
        secret.name: torch.stack([one[secret.name] for one in drawn]).to(device, own[secret.name].dtype)
        for secret in first.secrets
    }
    steps = _joint(first, clients, tensors, blame)
    if steps.in_half_precision:
        raise Unsupported("the clients compute in half precision")
    sent: list[Gradient] = []
    steps.compute()
    for row, client in enumerate(clients):
        step = steps.step(row)
        with _blaming(blame, client), seeded(client.key, "step", device=device), DrawsOnHost(device):
            released = first.defense.release(step, generator(client.key, "release"))
            sent.append(first.sendable(released, step.weights(), finite=False))
    names = _names(sent)
    gradient = {name: torch.stack([row[name] for row in sent]) for name in names}
    finite = torch.stack([torch.isfinite(value.flatten(1)).all(1) for value in gradient.values()]).all(0).tolist()
    if not all(finite):
        row = finite.index(False)
        with _blaming(blame, clients[row]):
            first.sendable(sent[row], steps.step(row).weights())
    return ClientSteps(gradient, drawn, _joint_records(first, clients, steps, gradient, blame) if record else [])


@contextmanager
def _blaming(blame: Blame, client: Client) -> Iterator[None]:
    """Raise the right error for one of a client's step."""
    try:
        yield
    except Unsupported:
        raise
    except (Exception, SystemExit) as error:
        if not out_of_memory(error):
            blame(error, client)
        raise


def _joint(trainer: Trainer, clients: Sequence[Client], tensors: Mapping[str, Tensor], blame: Blame) -> JointSteps:
    """Return the local training of clients with these tensors; raise Unsupported if their images are not alike."""
    pairs = []
    for client in clients:
        with _blaming(blame, client), seeded(client.key, "step"):
            pairs.append(trainer.encoded(client))
    images, labels = zip(*pairs)
    counts = {tuple(image.shape) for image in images}
    kinds = {(label.dtype, label.ndim) for label in labels}
    several = clients[0].count > 1
    if len(counts) > 1 or len(kinds) > 1 or (several and len(images[0]) != clients[0].count):
        raise Unsupported("the clients train on different numbers of images")
    if images[0].shape[1:] != clients[0].image.shape:
        raise Unsupported("the clients train on images of another size")
    device = next(iter(tensors.values())).device
    steps = JointSteps(
        trainer.defense,
        trainer.network,
        tensors,
        torch.stack(images).to(device),
        torch.stack(labels).to(device),
        trainer.num_classes,
        tuple(client.key for client in clients),
    )
    if trainer.threat.shares == "gradient":
        return steps
    lr = trainer.training.rate or trainer.threat.learning_rate
    assert lr is not None, "``_check_local`` refuses a client without a rate"
    return steps.after(trainer.training, lr, [secret for secret in trainer.secrets if secret.fresh])


def _joint_records(
    trainer: Trainer, clients: Sequence[Client], steps: JointSteps, sent: Gradient, blame: Blame
) -> list[StepRecord]:
    """Return the records of steps that were computed together, in which a network runs on what was encoded only."""
    cosines = _joint_cosines(trainer, clients, steps, sent, blame)
    if clients[0].count > 1:
        return [StepRecord(None, False, cosine) for cosine in cosines]
    records = []

    def again(other: Client) -> Collection[Key]:
        with seeded(other.key, "step"):
            return [tensor_key(image) for image in trainer.encoded(other)[0]]

    for client, own, cosine in zip(clients, steps.images.cpu(), cosines):
        images = {tensor_key(image): image for image in own}
        images.pop(tensor_key(client.image.to(own)), None)
        records.append(StepRecord(changed_images(client, images, again), False, cosine))
    return records


def _joint_cosines(
    trainer: Trainer, clients: Sequence[Client], steps: JointSteps, sent: Gradient, blame: Blame
) -> list[float]:
    """Return ``StepRecord.cosine`` of each client."""
    if not overridden(trainer.defense, "encode", "loss", "release"):
        return [1.0] * len(clients)
    plain = steps.gradient
    if overridden(trainer.defense, "encode", "loss"):
        try:
            plain = _joint(replace(trainer, defense=Defense()), clients, steps.tensors, blame).gradient
        except Unsupported:
            raise
        except Exception as error:  # of a network that only its defense's loss takes
            if out_of_memory(error):
                raise
            return [math.nan] * len(clients)
    plain = {name: value for name, value in plain.items() if name not in trainer.hidden}
    size, length, product = (
        torch.stack([inner(one[name].double(), two[name].double()) for name in one]).sum(0).tolist()
        for one, two in ((plain, plain), (sent, sent), (sent, plain))
    )
    return [ratio(math.sqrt(a), math.sqrt(b), c) for a, b, c in zip(size, length, product)]


def _named(model: Model) -> str:
    """Return what errors call a model."""
    model = model.inner if isinstance(model, HandedOut) else model
    return model.label if isinstance(model, OwnModule) else model.name


def blame_defense(
    model: Model,
    defense: Defense,
    threat: ThreatModel,
    training: LocalTraining,
    num_classes: int,
    error: BaseException,
    client: Client,
) -> None:
    """Raise the error of a client's step whose cause is the defense, the network or the images.

    Raises:
        ClientFailed: the same step fails without any defense, too, or its gradient is not finite.
        DefenseFailed: it does not fail without the defense.
        Unsupported: a normalisation by the statistics of a step has a single value.
    """
    none, shape = Defense(), client.image.shape
    try:
        image_shape = (shape[0], shape[1], shape[2])
        network = build(model, none, image_shape, num_classes, client.weights_key)
        Trainer(network, None, none, threat, training, (), set(), image_shape, num_classes).step(network, client)
    except DefenseFailed as own:
        reason = str(own).removeprefix(f"{DEFENSE_FAILED}{none.name!r} released ")
        raise ClientFailed(
            f"without any defense the client sends {reason}; check the network and its images"
        ) from error
    except LeakbenchError:
        return
    except (Exception, SystemExit) as own:
        if out_of_memory(own):
            return
        if lone_value(own):
            raise Unsupported(
                f"model {_named(model)!r} normalises by the statistics of a step's images, which at its smallest layer "
                f"have one value ({words(own)}); give larger images, more images a step, or evaluation mode"
            ) from error
        raise ClientFailed(
            f"model {_named(model)!r} cannot take the client's step without any defense, either: {words(own)}; check "
            "the network and its images"
        ) from error
    if isinstance(error, DefenseFailed):
        return
    said = str(error) if isinstance(error, LeakbenchError) else f"{defense.name!r} raised {words(error)}"
    raise DefenseFailed(said) from error
