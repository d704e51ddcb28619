"""The steps of several clients at once, on any device, by the engine that attacks use.

A defense is written for one client. Here the gradients of all clients are computed together, and the defense's hooks
are then called with each client's part. What they draw is drawn on the CPU, so that it is the same on every device.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.clients import LocalTraining
from leakbench.core.rng import generator, seeded
from leakbench.core.types import Gradient, Secret
from leakbench.defenses.base import Defense, Step
from leakbench.defenses.secrets import drawn_secrets
from leakbench.errors import Unsupported
from leakbench.gradients import Evaluator, choose_path
from leakbench.gradients.bilinear import shared
from leakbench.gradients.draws import Generators
from leakbench.gradients.evaluate import HALF, Path, architecture, tensors_of
from leakbench.gradients.plain import noted_autocast
from leakbench.gradients.sensitivity import JACOBIAN_ROWS, layer_input_of
from leakbench.optim.client import ClientState


@dataclass(frozen=True)
class JointSteps:
    """The local training of T clients with networks of one architecture.

    Attributes:
        defense: its ``loss`` is what they train with.
        network: one of the networks, for its structure.
        tensors: every tensor of the networks by name, with the clients' secrets: parameters [T, *shape], buffers
            [*shape] or [T, *shape], and what each image of a batch has of its own [T, B, *shape].
        images: [T, B, C, H, W], after ``encode``, in the type of the networks.
        labels: [T, B] int64 or [T, B, K], after ``encode``.
        num_classes: K.
        keys: of the clients' draws.
        trained: the parameters [T, *shape] after local training; None if they send gradients.
    """

    defense: Defense
    network: nn.Module
    tensors: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor
    num_classes: int
    keys: tuple[str, ...]
    trained: Gradient | None = None
    _kept: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def gradient(self) -> Gradient:
        """The gradient of each client's mean loss, or its update, [T, *shape] per trainable parameter.

        Raises:
            Unsupported: the network cannot be run for several clients at once.
        """
        if self.trained is not None:
            return {name: self.tensors[name] - value for name, value in self.trained.items()}
        return self._gradient(self.tensors, self.images, self.labels, self._generators)

    def compute(self) -> None:
        """Compute the gradient now, and not while the hooks of a defense run: an error of it is none of theirs."""
        _ = self.gradient

    def parts(self, parts: int) -> Gradient:
        """Return the gradient of each of ``parts`` equal parts of each client's images: [T, parts, *shape]."""
        if parts == 1:
            return {name: value[:, None] for name, value in self.gradient.items()}
        if parts not in self._kept:
            self._kept[parts] = self._by_part(parts)
        found: Gradient = self._kept[parts]
        return found

    def _by_part(self, parts: int) -> Gradient:
        images, labels = (value.flatten(0, 1).unflatten(0, (-1, value.shape[1] // parts)) for value in self._data)
        # without generators: the parts of one client would draw one after the other
        found = self._gradient(self._repeated(parts), images, labels, None)
        return {name: value.unflatten(0, (-1, parts)) for name, value in found.items()}

    def sensitivity(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return what ``Step.sensitivity`` does for each client: [T, D] each."""
        if layer not in self._kept:
            self._kept[layer] = self._sensitivity(layer)
        found: tuple[Tensor, Tensor] = self._kept[layer]
        return found

    def _sensitivity(self, layer: str) -> tuple[Tensor, Tensor]:
        model = self.evaluator.model
        if self._path(self.tensors, self.images.shape[1]) != "batched":
            raise Unsupported("the network's layers cannot be run for several clients at once")
        trials = len(self.images)
        copies = max(1, JACOBIAN_ROWS // trials)
        x = self.images[:, 0].repeat_interleave(copies, 0).requires_grad_()
        own = Evaluator(model, (), partial(layer_input_of, layer=layer))
        features = own.losses(self._repeated(copies), x, self.labels[:, 0]).unflatten(0, (trials, copies))
        norms = []
        for begin in range(0, features.shape[2], copies):
            count = min(copies, features.shape[2] - begin)
            place = torch.arange(count, device=x.device)
            # each copy of an image has the derivative of a feature of its own
            (part,) = torch.autograd.grad(features[:, place, begin + place].sum(), x, retain_graph=True)
            norms.append(part.unflatten(0, (trials, copies))[:, :count].flatten(2).norm(dim=2))
        return features[:, 0].detach(), torch.cat(norms, 1)

    def step(self, row: int) -> "JointStep":
        """Return the part of one client."""
        return JointStep(self, row)

    def after(self, training: LocalTraining, lr: float, secrets: Sequence[Secret]) -> "JointSteps":
        """Return the clients after their local training, which the default ``prepared`` leaves the images as they are.

        What is drawn anew for every pass is so for every step.
        """
        every, state, optimiser = dict(self.tensors), ClientState(), training.optimiser(lr)
        generators, place = self._generators(), torch.arange(len(self.keys))[:, None]
        orders = zip(*(training.rows(generator(key, "order")) for key in self.keys))
        for index, rows in enumerate(map(torch.stack, orders)):
            images, labels = self._data
            if rows.shape[1] < training.count:
                images, labels = (value[place.to(value.device), rows.to(value.device)] for value in self._data)
            if index or rows.shape[1] < training.count:
                every |= self._drawn(secrets, index, rows=rows.shape[1] * (training.count > 1))
            gradient = self._gradient(every, images, labels, lambda: generators)
            moved, state = optimiser.moved({name: every[name] for name in gradient}, gradient, state)
            every |= moved
        return replace(self, trained={name: every[name] for name in self.evaluator.names}, _kept={})

    @cached_property
    def evaluator(self) -> Evaluator:
        """Computes the gradients by all trainable parameters."""
        names = tuple(name for name, parameter in self.network.named_parameters() if parameter.requires_grad)
        return Evaluator(architecture(self.network), names, self.defense.loss)

    @cached_property
    def in_half_precision(self) -> bool:
        """Whether a client computes in half precision, in which the engine does not."""
        model = self.evaluator.model
        if any(value.dtype in HALF for value in tensors_of(self.network).values()):
            return True
        blank = torch.zeros((1, *self.images.shape[2:]), dtype=self.images.dtype)
        label = torch.full((1, self.num_classes), 1 / self.num_classes, dtype=blank.dtype)
        with noted_autocast() as entered, torch.no_grad(), seeded("precision"):
            try:
                self.defense.loss(copy.deepcopy(model), blank.to("meta"), label.to("meta"))
            except Exception:  # of a network that looks at values
                self.defense.loss(copy.deepcopy(self.network), blank, label)
        return bool(entered)

    @property
    def _data(self) -> tuple[Tensor, Tensor]:
        return self.images, self.labels

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return tensors_of(self.evaluator.model)

    def _generators(self) -> list[torch.Generator]:
        """Return what the networks' random layers draw from, one generator a client."""
        return [generator(key, "step") for key in self.keys]

    def _drawn(self, secrets: Sequence[Secret], *purpose: object, rows: int) -> dict[str, Tensor]:
        """Return fresh draws of secrets, as ``tensors`` has them."""
        each = [drawn_secrets(secrets, self._own, key, *purpose, rows=rows) for key in self.keys]
        return {
            secret.name: torch.stack([one[secret.name] for one in each]).to(self.tensors[secret.name])
            for secret in secrets
        }

    def _path(self, tensors: Mapping[str, Tensor], batch: int) -> Path:
        """Return the path that serves the network; raise Unsupported if none does."""
        return choose_path(self.evaluator, tensors, tuple(self.images.shape[2:]), self.num_classes, batch)

    def _gradient(
        self, tensors: Mapping[str, Tensor], images: Tensor, labels: Tensor, generators: Generators | None
    ) -> Gradient:
        """Return the gradient [T, *shape] of images [T, B, C, H, W] and their labels."""
        batch = images.shape[1]
        data = images, labels
        if batch == 1:
            data = images[:, 0], labels[:, 0]
            each = {name for name, value in tensors.items() if value.ndim == self._own[name].ndim + 2}
            tensors = {name: value[:, 0] if name in each else value for name, value in tensors.items()}
        evaluator = replace(self.evaluator, path=self._path(tensors, batch))
        return evaluator.gradient(tensors, *data, create_graph=False, generators=generators, native=True)

    def _repeated(self, parts: int) -> dict[str, Tensor]:
        """Return the tensors of T * ``parts`` clients: each of the T in its place, as often as it has parts."""
        return {name: self._again(value, self._own[name].ndim, parts) for name, value in self.tensors.items()}

    def _again(self, value: Tensor, ndim: int, parts: int) -> Tensor:
        if value.ndim == ndim:
            return value
        if value.ndim == ndim + 2:  # a row for each image
            return value.flatten(0, 1).unflatten(0, (-1, value.shape[1] // parts))
        if shared(value):
            return value[:1].expand(len(value) * parts, *value.shape[1:])
        return value.repeat_interleave(parts, 0)


class JointStep(Step):
    """One client's part of the steps of several: its gradients are rows of theirs."""

    def __init__(self, steps: JointSteps, row: int) -> None:
        self.images = steps.images[row]
        self.labels = steps.labels[row]
        self.losses = []
        self._defense = steps.defense
        self._trained = None if steps.trained is None else {name: value[row] for name, value in steps.trained.items()}
        self._steps = steps
        self._row = row

    @cached_property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The client's network, on the device."""
        network = copy.deepcopy(self._steps.network).to(self.images.device)
        with torch.no_grad():
            for name, own in tensors_of(network).items():
                value = self._steps.tensors[name]
                own.copy_(value if value.ndim == own.ndim else value[self._row])
        return network

    @property
    def structure(self) -> nn.Module:
        """The network of one of the clients."""
        return self._steps.network

    def gradient(self) -> Gradient:
        """Return the client's gradient, or its update."""
        return {name: value[self._row] for name, value in self._steps.gradient.items()}

    def weights(self) -> Gradient:
        """Return the client's parameters before it trains."""
        return {name: self._steps.tensors[name][self._row] for name in self._steps.evaluator.names}

    def sensitivity(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return what the layer takes, and how strongly it depends on the image."""
        features, norms = self._steps.sensitivity(layer)
        return features[self._row], norms[self._row]

    def _by_part(self, parts: int) -> Gradient:
        return {name: value[self._row] for name, value in self._steps.parts(parts).items()}
