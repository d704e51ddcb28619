"""What the server may see of the steps of T clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.clients import LocalTraining, check_threat
from leakbench.clients.local import ONE_IMAGE, Local
from leakbench.core.rng import generator
from leakbench.core.text import plural
from leakbench.core.types import HONEST, Secret, ThreatModel
from leakbench.datasets.samples import public_crops
from leakbench.defenses.base import Defense
from leakbench.errors import BadOption, Unsupported
from leakbench.gradients.evaluate import architecture, lifted, working
from leakbench.models import crafted
from leakbench.models.base import Model
from leakbench.observation import Observation
from leakbench.victim.client import Client, StepRecord
from leakbench.victim.network import blamed, build, plain_network, public_tensors
from leakbench.victim.records import record_of
from leakbench.victim.steps import blame_defense, joint_steps, single_steps
from leakbench.victim.trainer import Taken, Trainer


@dataclass(frozen=True)
class Exchange:
    """The local training of T clients, and what of it their server may see.

    Attributes:
        model: the public architecture and weights.
        defense: what every client does.
        threat: what the attacker is granted.
        clients: T clients with images of one shape.
        num_classes: how many classes the labels come from.
        mean_image: [C, H, W] in [0, 1], public.
        device: where the observation's tensors go.
        public: [P, C, H, W] in [0, 1], images of a malicious server, none of which is attacked; None: crops of the
            photographs that ship with leakbench.
        training: how every client trains; the default takes the steps that the threat model states.
    """

    model: Model
    defense: Defense
    threat: ThreatModel
    clients: Sequence[Client]
    num_classes: int
    mean_image: Tensor
    device: torch.device | str = "cpu"
    public: Tensor | None = None
    training: LocalTraining = ONE_IMAGE

    def observed(self) -> Observation:
        """Run the local training of every client, and return what the server may see of it.

        Raises:
            BadOption: the threat model lacks the learning rate, or contradicts the training. What it reveals is checked
                by the caller (``check_reveals``), for all the defenses of a matrix together.
            ClientFailed: without any defense, the client's step fails, too, or its gradient is not finite.
            DefenseFailed: the defense raised an error, or sent something that is no gradient of its network.
            Unsupported: model and defense do not go together, or a normalisation by a step's statistics has one value.
        """
        return _observed(self)[0]

    def recorded(self) -> tuple[Observation, list[StepRecord]]:
        """Return what ``observed`` returns, and what evaluation needs of each client's step."""
        return _observed(self, record_of)


def observe(
    model: Model,
    defense: Defense,
    threat: ThreatModel,
    clients: Sequence[Client],
    num_classes: int,
    mean_image: Tensor,
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
    training: LocalTraining = ONE_IMAGE,
) -> Observation:
    """Return what the server may see of an exchange of these attributes (``Exchange.observed``)."""
    return Exchange(model, defense, threat, clients, num_classes, mean_image, device, public, training).observed()


def _observed(
    own: Exchange, record: Callable[[Trainer, Client, Taken], StepRecord] | None = None
) -> tuple[Observation, list[StepRecord]]:
    """Return what the server may see of an exchange, and what ``record`` returns of each client's step."""
    model, defense, threat, clients, training = own.model, own.defense, own.threat, own.clients, own.training
    num_classes, device = own.num_classes, own.device
    shape = tuple(clients[0].image.shape)
    image_shape = (shape[0], shape[1], shape[2])
    if threat.server != HONEST:
        images = public_crops(image_shape) if own.public is None else own.public
        model = crafted.HandedOut(model, crafted.parse(threat.server), images)
    networks: dict[str, nn.Module] = {}
    for client in clients:
        if client.weights_key not in networks:
            networks[client.weights_key] = build(model, defense, image_shape, num_classes, client.weights_key)
    with blamed(defense):
        secrets = defense.secrets(next(iter(networks.values())))
    own_steps = training != ONE_IMAGE
    training = training if own_steps else Local(local_steps=threat.local_steps)
    if odd := next((client for client in clients if client.count != training.count), None):
        raise BadOption(
            f"a client has {plural(odd.count, 'image')}, and its training is of {training.count}; give it as many"
        )
    _check_local(secrets, threat, training, defense)
    checkpoint = model.checkpoint()
    behind = checkpoint is not None and bool(checkpoint.defense)
    values_hidden, gradients_hidden = _hidden(secrets, threat)

    trainers: dict[str, Trainer] = {}
    for key, network in networks.items():
        plain = None if record is None else plain_network(model, image_shape, num_classes, key)
        trainers[key] = Trainer(
            network, plain, defense, threat, training, secrets, gradients_hidden, image_shape, num_classes, behind
        )
    blame = partial(blame_defense, model, defense, threat, training, num_classes)
    steps = joint_steps(trainers, clients, torch.device(device), blame, record is not None)
    if steps is None:
        steps = single_steps(trainers, clients, torch.device(device), blame, record)
    gradient, records = steps.gradient, steps.records
    revealed = [{name: value for name, value in row.items() if name not in values_hidden} for row in steps.drawn]
    statistics = (
        [] if threat.statistics == "running" else [trainers[one.weights_key].statistics(one) for one in clients]
    )

    order = [networks[client.weights_key] for client in clients]
    weights = public_tensors(order, {secret.name for secret in secrets}, device)
    weights |= {name: torch.stack([row[name] for row in revealed]).to(device) for name in revealed[0]}
    weights = {name: lifted(value) for name, value in weights.items()}
    labels = _granted_labels(clients).to(device) if threat.labels != "inferred" else None
    batched = training.count > 1
    counts = F.one_hot(labels, num_classes).sum(1) if labels is not None and batched else None
    granted = threat.granted()
    if own_steps:
        granted = _granted(threat, training)
    hidden = batched and threat.count == "hidden"
    observation = Observation(
        model=architecture(order[0]),
        weights=weights,
        gradient=gradient,
        secrets=tuple(secret for secret in secrets if secret.name in values_hidden),
        labels=None if batched and threat.labels == "counts" else labels,
        image_shape=image_shape,
        num_classes=num_classes,
        mean_image=own.mean_image.to(device, working(order[0])),
        threat=granted,
        defense=defense if threat.informed else None,
        count=0 if hidden else training.count,
        counts=counts if batched and threat.labels == "counts" else None,
        client=training.without_rate() if own_steps and threat.recipe == "known" and not hidden else None,
        order=_order(clients, training) if own_steps and threat.order == "known" else (),
        statistics={name: torch.stack([row[name] for row in statistics]).to(device) for name in statistics[0]}
        if statistics
        else {},
    )
    return observation, records


def check_reveals(threats: Iterable[ThreatModel], groups: set[str]) -> None:
    """Raise BadOption if a threat model reveals something that is not a group of secrets."""
    for threat in threats:
        for token in sorted(threat.reveals):
            if token not in groups and token.removesuffix("-weights") not in groups:
                known = f"known: {', '.join(sorted(groups))}" if groups else "there are none; leave reveals out"
                raise BadOption(f"threat: reveals={token!r} is not a secret of the defense; {known}")


def _hidden(secrets: Sequence[Secret], threat: ThreatModel) -> tuple[set[str], set[str]]:
    """Return the names whose values, and the names whose gradients, the threat model does not reveal."""
    values = {s.name for s in secrets if not threat.reveals & {s.group, f"{s.group}-weights"}}
    gradients = {s.name for s in secrets if s.group not in threat.reveals}
    return values, gradients


def _check_local(secrets: Sequence[Secret], threat: ThreatModel, training: LocalTraining, defense: Defense) -> None:
    """Raise if the local training cannot be run, or contradicts what the threat model reveals."""
    if training.count > 1 and not defense.batched:
        raise Unsupported(f"defense {defense.name!r} serves clients of one image, and these have several; use batch=1")
    if threat.statistics != "running" and defense.aggregated:
        raise Unsupported(
            f"defense {defense.name!r} sums over clients with statistics of their own, and statistics="
            f"{threat.statistics} grants those of one client; use statistics=running"
        )
    check_threat(training, replace(threat, local_steps=1))
    if threat.shares == "gradient":
        return
    if threat.learning_rate is None and training.rate is None:
        raise BadOption("the threat model shares weights and states no learning rate; give one, as learning_rate=0.01")
    for secret in secrets:
        if secret.fresh and training.steps > 1 and threat.reveals & {secret.group, f"{secret.group}-weights"}:
            raise Unsupported(
                f"the secret {secret.group!r} is drawn anew in each of {training.steps} local steps, and one value "
                "can be revealed; use local_steps=1"
            )


def _granted(threat: ThreatModel, training: LocalTraining) -> ThreatModel:
    """Return what an attacker may read of a threat model whose clients state their own training.

    Without the recipe a learning rate is of no use: the steps that it is of are not known.
    """
    if threat.shares == "gradient":
        return replace(threat, name="")
    known = threat.recipe == "known"
    rate = training.rate or threat.learning_rate if known and threat.rate == "known" else None
    return replace(threat, learning_rate=rate, local_steps=training.steps if known else 1, name="")


def _order(clients: Sequence[Client], training: LocalTraining) -> tuple[Tensor, ...]:
    """Return which images [T, b] each local step of T clients takes."""
    each = [list(training.rows(generator(client.key, "order"))) for client in clients]
    return tuple(torch.stack(rows) for rows in zip(*each))


def _granted_labels(clients: Sequence[Client]) -> Tensor:
    """Return the labels [T] or [T, B] that an attacker is granted; raise Unsupported for class probabilities."""
    labels = [client.labels for client in clients]
    if any(own.is_floating_point() for own in labels):
        raise Unsupported("labels=known grants one class, and a client trains on class probabilities; grant no label")
    return torch.stack(labels).squeeze(1) if clients[0].count == 1 else torch.stack(labels)
