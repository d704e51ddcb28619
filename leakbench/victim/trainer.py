"""The local training of one client at a time, in plain torch on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from leakbench.clients import LocalTraining, take_step
from leakbench.core.rng import generator, seeded
from leakbench.core.types import Gradient, Secret, ThreatModel
from leakbench.defenses.base import Defense, Step, checked, encoded
from leakbench.errors import DefenseFailed, Unsupported
from leakbench.gradients.layer_inputs import InputRecorder, first_layers
from leakbench.gradients.normalisation import batch_normalisations
from leakbench.models.base import Model
from leakbench.optim.client import ClientState
from leakbench.victim.client import Client, batch_of
from leakbench.victim.network import build, draw_secrets, typed


@dataclass(frozen=True)
class Taken:
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
class Trainer:
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
        return network, draw_secrets(network, self.secrets, client.key, trained=self.behind, rows=rows)

    def encoded(self, client: Client) -> tuple[Tensor, Tensor]:
        """Return the images and labels that a client trains on, in the type of its network."""
        x, y = batch_of(self.defense, client, self.num_classes)
        return typed(self.network, *encoded(self.defense, x, y, generator(client.key, "encode")))

    def step(self, network: nn.Module, client: Client) -> Taken:
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
        return Taken(sent, x, inputs)

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

    def again(self, client: Client) -> Taken:
        """Return the step of a client from the start."""
        return self.step(self.drawn(client)[0], client)


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
            draw_secrets(network, fresh, key, index, rows=len(rows) * (training.count > 1), like=like)
        some = (x, y) if len(rows) == training.count else (x[rows], y[rows])
        gradient = Step(network, training.prepared(some[0], draws), some[1], defense).gradient()
        state = take_step(network, gradient, optimiser, state)
    return network


def layer_inputs(
    model: Model, defense: Defense, client: Client, num_classes: int, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Return what layers of a client's network take in its first step, by name, to verify closed forms.

    Private: only for evaluation. A layer that does not run is left out; of one that runs several
    times all inputs are joined.
    """
    shape = tuple(client.image.shape)
    network = build(model, defense, (shape[0], shape[1], shape[2]), num_classes, client.weights_key)
    draw_secrets(network, defense.secrets(network), client.key)
    taken: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, own in taken.items():
        network.get_submodule(name).register_forward_pre_hook(partial(_keep, own))
    x, y = batch_of(defense, client, num_classes)
    with seeded(client.key, "step"):
        x, y = typed(network, *encoded(defense, x, y, generator(client.key, "encode")))
        with torch.no_grad():
            defense.loss(network, x, y)
    return {name: torch.cat([value.flatten() for value in values]) for name, values in taken.items() if values}


def _keep(taken: list[Tensor], _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keep what a module takes."""
    taken.append(inputs[0].detach().clone())
