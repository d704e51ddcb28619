"""The client's side: the only place that holds private images, labels and secrets.

One client step is plain torch on the CPU, one trial at a time; on a GPU the gradients of many clients are computed at
once, if their defense serves that (``Defense.joint``). What the server may see of T steps is an Observation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import defenses
from leakbench.clients import LocalTraining, check_threat, take_step
from leakbench.clients.local import ONE_IMAGE, Local
from leakbench.core.device import SHARE, empty_cache, free_memory, out_of_memory
from leakbench.core.rng import DrawsOnHost, generator, seeded
from leakbench.core.text import plural
from leakbench.core.types import HONEST, Gradient, Secret, ThreatModel
from leakbench.datasets.samples import public_crops
from leakbench.defenses.base import Defense, Step, checked, encoded
from leakbench.defenses.joint import JointSteps
from leakbench.defenses.secrets import drawn_secrets
from leakbench.errors import DEFENSE_FAILED, BadOption, ClientFailed, DefenseFailed, LeakbenchError, Unsupported, words
from leakbench.gradients.bilinear import inner
from leakbench.gradients.evaluate import architecture, lifted, tensors_of, working
from leakbench.gradients.layer_inputs import InputRecorder, first_layer, first_layers, tensor_key
from leakbench.gradients.normalisation import batch_normalisations
from leakbench.models import crafted
from leakbench.models.base import Model
from leakbench.models.module import network_dtype
from leakbench.models.surgery import with_buffers
from leakbench.models.weights import load
from leakbench.observation import Observation
from leakbench.optim.client import ClientState

JOINT_COPIES = 12
"""How many times the network's size a client may take on a device where many are computed at once."""


@dataclass(frozen=True)
class Client:
    """One client: a private image and label, or several, and the keys of its random draws.

    Attributes:
        image: [C, H, W] in [0, 1].
        label: the class index, or class probabilities [K].
        weights_key: what the public weights are drawn from; clients that share it share the weights.
        key: what the client's own draws (secrets, noise, augmentation) come from.
        companions: further images and labels of the client's own, for a defense that mixes them in
            (``Defense.companions``).
        others: further images and labels that it trains on, each like the first one.
    """

    image: Tensor
    label: int | Tensor
    weights_key: str
    key: str
    companions: tuple[tuple[Tensor, int | Tensor], ...] = ()
    others: tuple[tuple[Tensor, int | Tensor], ...] = ()

    @property
    def count(self) -> int:
        """How many images it trains on."""
        return 1 + len(self.others)

    @property
    def images(self) -> Tensor:
        """Those images: [N, C, H, W]."""
        return torch.stack([self.image, *(image for image, _ in self.others)])

    @property
    def labels(self) -> Tensor:
        """Their labels: [N] int64, or [N, K] class probabilities."""
        rows = [self.label, *(label for _, label in self.others)]
        return torch.stack([row if isinstance(row, Tensor) else torch.tensor(row) for row in rows])


@dataclass(frozen=True)
class StepRecord:
    """What evaluation needs of a client's step; it is as private as the image, and no attacker is given it.

    Attributes:
        changed: [N, C, H, W] in any range, the images that the network ran on in place of the private one; None if
            there are none, or if they show nothing of the private one.
        unseen: whether the network may have run on something that cannot be compared with the private image, such as an
            image of another size.
        cosine: of what was sent and what the client would have sent without a defense, in [-1, 1]: 0 if only zeros were
            sent, NaN if it cannot be computed.
    """

    changed: Tensor | None
    unseen: bool
    cosine: float


def build(
    model: Model, defense: Defense, image_shape: tuple[int, int, int], num_classes: int, weights_key: str
) -> nn.Module:
    """Return the network that clients run under a defense; the part it shares with no defense has the same weights.

    Raises:
        BadOption: the model's checkpoint was trained behind another defense.
        DefenseFailed: the defense's ``wrap`` raises an error, or returns no network.
    """
    plain = _plain(model, image_shape, num_classes, weights_key)
    with seeded(weights_key, "defense"), _blamed(defense):
        network = defense.wrap(plain)
    if not isinstance(network, nn.Module):
        raise DefenseFailed(f"{defense.name!r} wraps the network as {type(network).__name__}; return an nn.Module")
    checkpoint = model.checkpoint()
    if checkpoint is not None and checkpoint.defense:
        if defenses.parse(checkpoint.defense).settings() != defense.settings():
            raise BadOption(
                f"the checkpoint {checkpoint.file!r} is of a network trained behind {checkpoint.defense!r}; attack it "
                f"behind that defense, and not behind {defenses.spec(defense)!r}"
            )
        load(network, checkpoint.file, secrets=True)
    return network


def _plain(model: Model, image_shape: tuple[int, int, int], num_classes: int, weights_key: str) -> nn.Module:
    """Return the network before a defense wraps it."""
    with seeded(weights_key, "model"):
        return with_buffers(model.build(image_shape, num_classes))


@contextmanager
def _blamed(defense: Defense) -> Iterator[None]:
    """Turn an error of a defense's own code into DefenseFailed."""
    try:
        yield
    except LeakbenchError:
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise DefenseFailed(f"{defense.name!r} raised {words(error)}") from error


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
    """Run the local training of every client, and return what the server may see of it.

    Args:
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

    Raises:
        BadOption: the threat model lacks the learning rate, or contradicts the training. What it reveals is checked by
            the caller (``check_reveals``), for all the defenses of a matrix together.
        ClientFailed: without any defense, the client's gradient is not finite either.
        DefenseFailed: the defense raised an error, or sent something that is no gradient of its network.
        Unsupported: model and defense do not go together.
    """
    return _observe(model, defense, threat, clients, num_classes, mean_image, device, public, training)[0]


def observe_recorded(
    model: Model,
    defense: Defense,
    threat: ThreatModel,
    clients: Sequence[Client],
    num_classes: int,
    mean_image: Tensor,
    device: torch.device | str = "cpu",
    public: Tensor | None = None,
    training: LocalTraining = ONE_IMAGE,
) -> tuple[Observation, list[StepRecord]]:
    """Return what ``observe`` returns, and what evaluation needs of each client's step."""
    return _observe(model, defense, threat, clients, num_classes, mean_image, device, public, training, _record)


def _observe(
    model: Model,
    defense: Defense,
    threat: ThreatModel,
    clients: Sequence[Client],
    num_classes: int,
    mean_image: Tensor,
    device: torch.device | str,
    public: Tensor | None,
    training: LocalTraining,
    record: Callable[[_Trainer, Client, _Taken], StepRecord] | None = None,
) -> tuple[Observation, list[StepRecord]]:
    """Return the observation of ``observe``, and what ``record`` returns of each client's step."""
    shape = tuple(clients[0].image.shape)
    image_shape = (shape[0], shape[1], shape[2])
    if threat.server != HONEST:
        images = public_crops(image_shape) if public is None else public
        model = crafted.HandedOut(model, crafted.parse(threat.server), images)
    networks: dict[str, nn.Module] = {}
    for client in clients:
        if client.weights_key not in networks:
            networks[client.weights_key] = build(model, defense, image_shape, num_classes, client.weights_key)
    with _blamed(defense):
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

    trainers: dict[str, _Trainer] = {}
    for key, own in networks.items():
        plain = None if record is None else _plain(model, image_shape, num_classes, key)
        trainers[key] = _Trainer(
            own, plain, defense, threat, training, secrets, gradients_hidden, image_shape, num_classes, behind
        )
    blame = partial(_blame, model, defense, threat, training, num_classes)
    steps = _joint_steps(trainers, clients, torch.device(device), blame, record is not None)
    if steps is None:
        steps = _single_steps(trainers, clients, torch.device(device), blame, record)
    gradient, records = steps.gradient, steps.records
    revealed = [{name: value for name, value in row.items() if name not in values_hidden} for row in steps.drawn]
    statistics = (
        [] if threat.statistics == "running" else [trainers[one.weights_key].statistics(one) for one in clients]
    )

    order = [networks[client.weights_key] for client in clients]
    weights = _public_tensors(order, {secret.name for secret in secrets}, device)
    weights |= {name: torch.stack([row[name] for row in revealed]).to(device) for name in revealed[0]}
    weights = {name: lifted(value) for name, value in weights.items()}
    labels = _granted_labels(clients).to(device) if threat.labels != "inferred" else None
    batched = training.count > 1
    counts = F.one_hot(labels, num_classes).sum(1) if labels is not None and batched else None
    granted = threat.granted()
    if own_steps:
        granted = _granted(threat, training)
    observation = Observation(
        model=architecture(order[0]),
        weights=weights,
        gradient=gradient,
        secrets=tuple(secret for secret in secrets if secret.name in values_hidden),
        labels=None if batched and threat.labels == "counts" else labels,
        image_shape=image_shape,
        num_classes=num_classes,
        mean_image=mean_image.to(device, working(order[0])),
        threat=granted,
        defense=defense if threat.informed else None,
        count=0 if batched and threat.count == "hidden" else training.count,
        counts=counts if batched and threat.labels == "counts" else None,
        client=training.without_rate() if own_steps and threat.recipe == "known" else None,
        order=_order(clients, training) if own_steps and threat.order == "known" else (),
        statistics={name: torch.stack([row[name] for row in statistics]).to(device) for name in statistics[0]}
        if statistics
        else {},
    )
    return observation, records


@dataclass(frozen=True)
class _Steps:
    """The steps of T clients.

    Attributes:
        gradient: what they sent, [T, *shape] by name, on the device of the observation.
        drawn: each client's secrets by name, on the CPU.
        records: what evaluation needs of each, if they were recorded.
    """

    gradient: Gradient
    drawn: list[dict[str, Tensor]]
    records: list[StepRecord]


_Blame = Callable[[BaseException, Client], None]
"""Raises the right error for one of a client's step, unless its defense has no part in it."""


def _single_steps(
    trainers: Mapping[str, _Trainer],
    clients: Sequence[Client],
    device: torch.device,
    blame: _Blame,
    record: Callable[[_Trainer, Client, _Taken], StepRecord] | None,
) -> _Steps:
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
    return _Steps({name: lifted(torch.stack([row[name] for row in sent])).to(device) for name in names}, every, records)


def _names(sent: Sequence[Gradient]) -> list[str]:
    """Return the parameters that all clients sent; raise BadOption if they sent different ones."""
    names = list(sent[0])
    if other := next((row for row in sent if set(row) != set(names)), None):
        differing = sorted(set(other) ^ set(names))
        raise BadOption(f"clients sent different parameters, {differing[0]!r} among them; observe them one at a time")
    return names


def _joint_steps(
    trainers: Mapping[str, _Trainer], clients: Sequence[Client], device: torch.device, blame: _Blame, record: bool
) -> _Steps | None:
    """Return the steps of clients, computed together on a device; None if they are better taken one after the other.

    They are on the CPU, where the results of older runs were computed so; behind a defense that does not state
    ``joint``; of networks that compute in half precision, or that the engine does not serve; if images are augmented.
    """
    trainer = trainers[clients[0].weights_key]
    if device.type == "cpu" or not trainer.defense.joint or not trainer.training.same_inputs:
        return None
    size = sum(value.numel() * value.element_size() for value in trainer.network.parameters())
    most = max(1, int(SHARE * free_memory(device) / (JOINT_COPIES * max(1, size))))
    found: list[_Steps] = []
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
    return _Steps(
        {name: torch.cat([part.gradient[name] for part in found]) for name in names},
        [row for part in found for row in part.drawn],
        [row for part in found for row in part.records],
    )


def _joint_part(
    trainers: Mapping[str, _Trainer], clients: Sequence[Client], device: torch.device, blame: _Blame, record: bool
) -> _Steps:
    """Return the steps of as many clients as fit into memory; raise Unsupported if they cannot be computed together."""
    first = trainers[clients[0].weights_key]
    order = [trainers[client.weights_key].network for client in clients]
    rows = first.training.count if first.training.count > 1 else 0
    drawn = [
        drawn_secrets(first.secrets, tensors_of(network), client.key, trained=first.behind, rows=rows)
        for network, client in zip(order, clients)
    ]
    own = tensors_of(first.network)
    tensors = _public_tensors(order, {secret.name for secret in first.secrets}, device) | {
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
    return _Steps(gradient, drawn, _joint_records(first, clients, steps, gradient, blame) if record else [])


@contextmanager
def _blaming(blame: _Blame, client: Client) -> Iterator[None]:
    """Raise the right error for one of a client's step."""
    try:
        yield
    except Unsupported:
        raise
    except (Exception, SystemExit) as error:
        if not out_of_memory(error):
            blame(error, client)
        raise


def _joint(trainer: _Trainer, clients: Sequence[Client], tensors: Mapping[str, Tensor], blame: _Blame) -> JointSteps:
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
    trainer: _Trainer, clients: Sequence[Client], steps: JointSteps, sent: Gradient, blame: _Blame
) -> list[StepRecord]:
    """Return the records of steps that were computed together, in which a network runs on what was encoded only."""
    cosines = _joint_cosines(trainer, clients, steps, sent, blame)
    if clients[0].count > 1:
        return [StepRecord(None, False, cosine) for cosine in cosines]
    records = []

    def again(other: Client) -> Collection[_Key]:
        with seeded(other.key, "step"):
            return [tensor_key(image) for image in trainer.encoded(other)[0]]

    for client, own, cosine in zip(clients, steps.images.cpu(), cosines):
        images = {tensor_key(image): image for image in own}
        images.pop(tensor_key(client.image.to(own)), None)
        records.append(StepRecord(_changed(client, images, again), False, cosine))
    return records


def _joint_cosines(
    trainer: _Trainer, clients: Sequence[Client], steps: JointSteps, sent: Gradient, blame: _Blame
) -> list[float]:
    """Return ``StepRecord.cosine`` of each client."""
    if not _changes(trainer.defense, "encode", "loss", "release"):
        return [1.0] * len(clients)
    plain = steps.gradient
    if _changes(trainer.defense, "encode", "loss"):
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
    return [_ratio(math.sqrt(a), math.sqrt(b), c) for a, b, c in zip(size, length, product)]


def _ratio(size: float, length: float, product: float) -> float:
    """Return the cosine of two gradients of these norms and this inner product (``StepRecord.cosine``)."""
    if not size or not length:
        return 0.0 if size else math.nan
    return product / (size * length)


def _changes(defense: Defense, *hooks: str) -> set[str]:
    """Return which of these hooks a defense defines."""
    return {hook for hook in hooks if getattr(type(defense), hook) is not getattr(Defense, hook)}


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


def _blame(
    model: Model,
    defense: Defense,
    threat: ThreatModel,
    training: LocalTraining,
    num_classes: int,
    error: BaseException,
    client: Client,
) -> None:
    """Raise DefenseFailed for an error of a client's step, unless the same step fails without any defense too.

    Raises:
        ClientFailed: without a defense, the gradient is not finite either.
    """
    none, shape = Defense(), client.image.shape
    try:
        image_shape = (shape[0], shape[1], shape[2])
        network = build(model, none, image_shape, num_classes, client.weights_key)
        _Trainer(network, None, none, threat, training, (), set(), image_shape, num_classes).step(network, client)
    except DefenseFailed as own:
        reason = str(own).removeprefix(f"{DEFENSE_FAILED}{none.name!r} released ")
        raise ClientFailed(
            f"without any defense the client sends {reason}; check the network and its images"
        ) from error
    except (Exception, SystemExit):
        return
    if isinstance(error, DefenseFailed):
        return
    said = str(error) if isinstance(error, LeakbenchError) else f"{defense.name!r} raised {words(error)}"
    raise DefenseFailed(said) from error


def _public_tensors(
    networks: Sequence[nn.Module], secret: Collection[str], device: torch.device | str
) -> dict[str, Tensor]:
    """Return the parameters [T, *shape] and buffers of T clients' networks by name, without the secret ones.

    Parameters have stride 0 along T if all clients have one network; buffers are [*shape] if all are equal.
    """
    first = networks[0]
    shared = all(network is first for network in networks)
    tensors: dict[str, Tensor] = {}
    for name, parameter in first.named_parameters():
        if name in secret:
            continue
        if shared:
            tensors[name] = parameter.detach().to(device)[None].expand(len(networks), *parameter.shape)
        else:
            tensors[name] = torch.stack([network.get_parameter(name).detach() for network in networks]).to(device)
    for name, buffer in first.named_buffers():
        if name not in secret:
            rows = [network.get_buffer(name) for network in networks]
            same = all(torch.equal(buffer, row) for row in rows)
            tensors[name] = (buffer if same else torch.stack(rows)).detach().clone().to(device)
    return tensors


def layer_inputs(
    model: Model, defense: Defense, client: Client, num_classes: int, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Return what layers of a client's network take in its first step, by name, to verify closed forms.

    Private: only for evaluation. A layer that does not run is left out; of one that runs several
    times all inputs are joined.
    """
    shape = tuple(client.image.shape)
    network = build(model, defense, (shape[0], shape[1], shape[2]), num_classes, client.weights_key)
    _draw_secrets(network, defense.secrets(network), client.key)
    taken: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, own in taken.items():
        network.get_submodule(name).register_forward_pre_hook(partial(_keep, own))
    x, y = _batch(defense, client, num_classes)
    with seeded(client.key, "step"):
        x, y = _typed(network, *encoded(defense, x, y, generator(client.key, "encode")))
        with torch.no_grad():
            defense.loss(network, x, y)
    return {name: torch.cat([value.flatten() for value in values]) for name, values in taken.items() if values}


def _keep(taken: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keep what a module takes."""
    taken.append(inputs[0].detach().clone())


def groups_of(defense: Defense, network: nn.Module) -> set[str]:
    """Return the groups of secrets of a defense's network, by which a threat model reveals them."""
    with _blamed(defense):
        return {secret.group for secret in defense.secrets(network)}


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


def _draw_secrets(
    network: nn.Module,
    secrets: Sequence[Secret],
    key: str,
    *purpose: object,
    trained: bool = False,
    rows: int = 0,
    like: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Draw this client's secrets into its network, and return them; of a ``trained`` network only the fresh ones.

    If ``rows`` is given, each image of a pass gets a draw of its own of a fresh secret: [rows, *shape], with the shapes
    of the network ``like``, in which nothing was drawn.
    """
    tensors = tensors_of(network)
    drawn = drawn_secrets(secrets, tensors_of(like or network), key, *purpose, trained=trained, rows=rows)
    for secret in secrets:
        if secret.fresh and rows:
            module, _, tensor = secret.name.rpartition(".")
            setattr(network.get_submodule(module), tensor, drawn[secret.name])
        else:
            with torch.no_grad():
                tensors[secret.name].copy_(drawn[secret.name])
    return drawn


def _batch(defense: Defense, client: Client, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return what a client's defense encodes: see ``Defense.encode``."""
    if not defense.companions:
        return client.images, client.labels
    examples = [(client.image, client.label), *client.companions[: defense.companions]]
    if len(examples) <= defense.companions:
        raise Unsupported(
            f"defense {defense.name!r} mixes {1 + defense.companions} images of a client, and it has {len(examples)}; "
            "give the clients more images"
        )
    images, labels = zip(*examples)
    rows = [row if isinstance(row, Tensor) else F.one_hot(torch.tensor(row), num_classes) for row in labels]
    return torch.stack(images), torch.stack([row.to(client.image.dtype) for row in rows])


def _typed(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return encoded images, and labels that are probabilities, in the type of the network."""
    kind = network_dtype(network)
    return images.to(kind), labels.to(kind) if labels.is_floating_point() else labels


def _train(
    network: nn.Module,
    defense: Defense,
    x: Tensor,
    y: Tensor,
    training: LocalTraining,
    lr: float,
    secrets: Sequence[Secret],
    key: str,
    like: nn.Module,
) -> nn.Module:
    """Return a copy of a network after the client's local training on its encoded images.

    What is drawn anew for every pass is so for every step; the client's other secrets are trained with the rest.
    """
    network = copy.deepcopy(network)
    fresh = [secret for secret in secrets if secret.fresh]
    optimiser, state, draws = training.optimiser(lr), ClientState(), generator(key, "augment")
    for index, rows in enumerate(training.rows(generator(key, "order"))):
        if index or len(rows) < training.count:
            _draw_secrets(network, fresh, key, index, rows=len(rows) * (training.count > 1), like=like)
        some = (x, y) if len(rows) == training.count else (x[rows], y[rows])
        gradient = Step(network, training.prepared(some[0], draws), some[1], defense).gradient()
        state = take_step(network, gradient, optimiser, state)
    return network


@dataclass(frozen=True)
class _Taken:
    """A client's step.

    Attributes:
        sent: what leaves the client, without the hidden names.
        encoded: [B, C, H, W], what the defense encoded, in the type of the network.
        inputs: what the first layers took, if the step was recorded.
    """

    sent: Gradient
    encoded: Tensor
    inputs: InputRecorder


@dataclass(frozen=True)
class _Trainer:
    """What the steps of all clients with the same weights have in common.

    Attributes:
        network: the wrapped network, without the clients' secrets.
        plain: a network of its own, as it is before it is wrapped; None: steps are not recorded.
        hidden: the names that are removed from what is sent.
        behind: the network was trained behind the defense (``drawn_secrets``).
    """

    network: nn.Module
    plain: nn.Module | None
    defense: Defense
    threat: ThreatModel
    training: LocalTraining
    secrets: Sequence[Secret]
    hidden: set[str]
    image_shape: tuple[int, int, int]
    num_classes: int
    behind: bool = False

    def drawn(self, client: Client) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a client's network, and the secrets that were drawn into it."""
        network = copy.deepcopy(self.network)
        rows = self.training.count if self.training.count > 1 else 0
        return network, _draw_secrets(network, self.secrets, client.key, trained=self.behind, rows=rows)

    def encoded(self, client: Client) -> tuple[Tensor, Tensor]:
        """Return the images and labels that a client trains on, in the type of its network."""
        x, y = _batch(self.defense, client, self.num_classes)
        return _typed(self.network, *encoded(self.defense, x, y, generator(client.key, "encode")))

    def step(self, network: nn.Module, client: Client) -> _Taken:
        """Return what one client does; raise DefenseFailed if it sends no gradient."""
        defense, threat, inputs = self.defense, self.threat, InputRecorder()
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if self.plain is not None:
            inputs.watch(network, self._layers)
        with seeded(client.key, "step"):
            x, y = self.encoded(client)
            trained = None
            if client.count > 1 and len(x) != client.count:
                raise Unsupported(
                    f"defense {defense.name!r} makes {len(x)} images of a batch of {client.count}; use batch=1"
                )
            if threat.shares == "weights":
                own = self._trained(network, x, y, client).named_parameters()
                trained = {name: parameter.detach().clone() for name, parameter in own if parameter.requires_grad}
            released = defense.release(Step(network, x, y, defense, trained), generator(client.key, "release"))
        sent = {name: value.clone() for name, value in self.sendable(released, parameters).items()}
        return _Taken(sent, x, inputs)

    def sendable(self, released: object, parameters: Mapping[str, Tensor], *, finite: bool = True) -> Gradient:
        """Return what leaves a client of what its defense released; raise DefenseFailed if that is no gradient."""
        if isinstance(released, Mapping):
            released = {name: value for name, value in released.items() if name not in self.hidden}
        sent = checked(self.defense, released, parameters, finite=finite)
        if not sent:
            raise DefenseFailed(f"{self.defense.name!r} withheld every parameter; send at least one")
        return sent

    def _trained(self, network: nn.Module, x: Tensor, y: Tensor, client: Client) -> nn.Module:
        """Return a copy of the network after the client's local training on its encoded images."""
        lr = self.training.rate or self.threat.learning_rate
        assert lr is not None, "``_check_local`` refuses a client without a rate"
        return _train(network, self.defense, x, y, self.training, lr, self.secrets, client.key, self.network)

    def statistics(self, client: Client) -> dict[str, Tensor]:
        """Return what the threat model grants of a client's batch normalisations (``Observation.statistics``)."""
        network, _ = self.drawn(client)
        layers = batch_normalisations(network)
        with seeded(client.key, "step"):
            x, y = self.encoded(client)
            if self.threat.statistics == "sent" and self.threat.shares == "weights":
                network = self._trained(network, x, y, client)
                layers = batch_normalisations(network)
                taken: dict[str, list[Tensor]] = {}
            else:
                rows = next(iter(self.training.rows(generator(client.key, "order"))))
                some = (x, y) if len(rows) == self.training.count else (x[rows], y[rows])
                taken = {name: [] for name in layers}
                hooks = [layers[name].register_forward_pre_hook(partial(_keep, own)) for name, own in taken.items()]
                with torch.no_grad():
                    self.defense.loss(network, *some)
                for hook in hooks:
                    hook.remove()
        if self.threat.statistics == "sent":
            return {
                f"{name}.{buffer}": layer.get_buffer(buffer).clone()
                for name, layer in layers.items()
                for buffer in ("running_mean", "running_var")
                if layer.track_running_stats
            }
        rows_of = {name: own[0].transpose(0, 1).flatten(1) for name, own in taken.items() if own}
        means = {f"{name}.mean": values.mean(1) for name, values in rows_of.items()}
        return means | {f"{name}.var": values.var(1, correction=0) for name, values in rows_of.items()}

    @cached_property
    def _layers(self) -> list[str]:
        assert self.plain is not None
        return first_layers(self.network, self.plain, self.image_shape)

    def again(self, client: Client) -> _Taken:
        """Return the step of a client from the start."""
        return self.step(self.drawn(client)[0], client)


def _record(trainer: _Trainer, client: Client, taken: _Taken) -> StepRecord:
    """Return the record of a step that was taken."""
    if client.count > 1:  # which of the changed images is which one's is not followed
        return StepRecord(None, False, _cosine(trainer, client, taken.sent))
    images, unseen = _images(trainer, client, taken)
    images.pop(tensor_key(client.image.to(taken.encoded)), None)

    def again(other: Client) -> Collection[_Key]:
        return _images(trainer, other, trainer.again(other))[0]

    return StepRecord(_changed(client, images, again), unseen, _cosine(trainer, client, taken.sent))


def _changed(
    client: Client, images: Mapping[_Key, Tensor], again: Callable[[Client], Collection[_Key]]
) -> Tensor | None:
    """Return ``StepRecord.changed`` of the images that a network ran on in place of the private one.

    Args:
        client: the client.
        images: these images by ``tensor_key``.
        again: returns the keys of those of another client.
    """
    if not images:
        return None
    noise = torch.rand(client.image.shape, generator=generator(client.key, "other image")).to(client.image)
    try:
        same = again(replace(client, image=noise))
    except (Exception, SystemExit):  # of a defense that does not take every image
        same = ()
    kept = [image for key, image in images.items() if key not in same]
    return torch.stack(kept).to(client.image) if kept else None


_Key = tuple[tuple[int, ...], bytes]
"""Of a tensor (``tensor_key``)."""


def _images(trainer: _Trainer, client: Client, taken: _Taken) -> tuple[dict[_Key, Tensor], bool]:
    """Return the images [C, H, W] that a step's network ran on, by ``tensor_key``, and ``StepRecord.unseen``.

    What the first layer took is an image that was encoded if the plain network's first layer takes the same of that
    one; else it is an image itself, if it has the size of one.
    """
    shape, encoded_images = tuple(client.image.shape), {tensor_key(image): image for image in taken.encoded}
    known, sizes = dict(encoded_images), [shape, (client.image.numel(),)]
    assert trainer.plain is not None
    with seeded(client.key, "step"):
        found = first_layer(trainer.plain, taken.encoded)
    if found is not None and len(found[1]) == len(taken.encoded):
        known |= {tensor_key(row): image for row, image in zip(found[1], taken.encoded)}
        sizes.insert(0, tuple(found[1].shape[1:]))
    images, unseen = {}, taken.inputs.unreadable or not taken.inputs.values
    for value in taken.inputs.values.values():
        size = next((size for size in sizes if size and value.shape[-len(size) :] == size), None)
        for row in value.reshape(-1, *size) if size is not None else ():
            image = known.get(tensor_key(row), row if row.numel() == client.image.numel() else None)
            if image is None:
                unseen = True
            else:
                image = image.reshape(shape)
                images[tensor_key(image)] = image
        unseen |= size is None
    return images if taken.inputs.values else encoded_images, unseen


def _cosine(trainer: _Trainer, client: Client, sent: Gradient) -> float:
    """Return the cosine of what a client sent and what it would send without a defense (``StepRecord.cosine``)."""
    if not _changes(trainer.defense, "encode", "loss", "release"):
        return 1.0
    try:
        plain = replace(trainer, plain=None, defense=Defense()).again(client).sent
    except (Exception, SystemExit):  # of a network that only its defense's loss takes
        return math.nan
    own = {name: value.double() for name, value in sent.items()}
    size = math.sqrt(sum(float(value.double().square().sum()) for value in plain.values()))
    length = math.sqrt(sum(float(value.square().sum()) for value in own.values()))
    product = sum(float((value * plain[name].double()).sum()) for name, value in own.items())
    return _ratio(size, length, product)
