"""The adaptive attacker of any defense: it has the defense's code, and runs it on its own dummy gradients.

What the defense draws, the attacker draws anew and averages over (expectation over transformation, Athalye et al. 2018,
arXiv 1707.07397). What cannot be differentiated is passed straight through (BPDA, Athalye et al. 2018, arXiv
1802.00420). A release that only moves and scales entries is inverted, so that closed forms apply too.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from leakbench.attacks.entry_map import EntryMap, find_map
from leakbench.core.rng import generator, seeded
from leakbench.core.types import Gradient, Secret
from leakbench.defenses.adaptive import CONTROLS, SIMULATED, AdaptiveAttacker, Dummies, Observed, Weights
from leakbench.defenses.base import Defense, Step
from leakbench.defenses.mixup import blended_targets
from leakbench.errors import Unsupported, one_line
from leakbench.gradients.bilinear import shared
from leakbench.gradients.evaluate import tensors_of
from leakbench.observation import Observation

DRAWS = 4
"""How many draws of a release, or of an encoding, are averaged."""
PERTURBATION = 0.1
"""The relative change of a gradient or an image by which a derivative is compared with a difference."""
SLOPES = (0.5, 2.0)
"""A derivative is used if it predicts that difference to within these factors."""


class DummyStep(Step):
    """The local training that an attacker's dummy gradient, or dummy update, is of: what ``release`` is run on.

    Args:
        defense: the defense whose release is run.
        gradient: [*shape] per trainable parameter; an update if ``update``.
        images: [1, C, H, W].
        labels: [1] int64 or [1, K].
        model: the architecture.
        tensors: every tensor of the network by name, the values before training.
        update: the client shares its weights.
    """

    def __init__(
        self,
        defense: Defense,
        gradient: Gradient,
        images: Tensor,
        labels: Tensor,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        update: bool,
    ) -> None:
        self.images = images
        self.labels = labels
        self.losses = []
        self._defense = defense
        self._gradients = gradient
        self._architecture = model
        self._tensors = tensors
        # ``trained`` and ``per_example`` raise what those of a client's step raise
        self._trained = {name: self._tensors[name] - value for name, value in gradient.items()} if update else None

    def __getattr__(self, name: str) -> nn.Module:
        """Return the network, built when a release first asks for it."""
        if name != "model":
            raise AttributeError(f"the step has no {name}")
        self.model = filled(self._architecture, self._tensors, self.images.dtype)
        return self.model

    def gradient(self) -> Gradient:
        """Return the dummy gradient, or the dummy update, with its graph."""
        return {name: value.clone() for name, value in self._gradients.items()}

    def weights(self) -> Gradient:
        """Return the trainable parameters before the training."""
        return {name: self._tensors[name].detach().clone() for name in self._gradients}

    def _gradient(self, images: Tensor, labels: Tensor) -> Gradient:
        """Return the gradient of the one example."""
        return self.gradient()


@dataclass(frozen=True)
class Release:
    """A defense's release as an attacker runs it.

    Attributes:
        model: the architecture.
        names: the parameters that the client sent.
        update: the client shares its weights.
        smooth: the parameters whose sent values autograd differentiates; the others are passed straight through.
        draws: how many draws are averaged.
        graph: the release runs on gradients with a graph, which numpy for one refuses.
    """

    defense: Defense
    model: nn.Module
    names: tuple[str, ...]
    update: bool
    graph: bool = True
    smooth: frozenset[str] = frozenset()
    draws: int = 1

    def send(
        self,
        gradient: Gradient,
        image: Tensor,
        label: Tensor,
        tensors: Mapping[str, Tensor],
        rng: torch.Generator,
    ) -> Gradient:
        """Return what is sent of one dummy gradient [*shape]: the observed parameters that are released.

        Args:
            gradient: per trainable parameter, on the CPU.
            image: [C, H, W].
            label: a scalar int64, or [K].
            tensors: every tensor of the network, [*shape].
            rng: what the release draws from; torch's global generator is seeded by it.

        Raises:
            Unsupported: the release fails on a dummy gradient, or returns no tensors of the parameters' shapes.
        """
        if not self.graph:
            gradient = {name: value.detach() for name, value in gradient.items()}
        step = DummyStep(self.defense, gradient, image[None], label[None], self.model, tensors, self.update)
        try:
            with seeded("simulate", rng.initial_seed(), device=image.device):
                sent = self.defense.release(step, rng)
            found = {name: sent[name].to(gradient[name].dtype) for name in self.names if name in sent}
            wrong = [name for name, value in found.items() if value.shape != gradient[name].shape]
            if wrong or any(sent[name].is_complex() or sent[name].layout != torch.strided for name in found):
                raise ValueError("it returned no dense real tensors of the parameters' shapes")
        except (Exception, SystemExit) as error:
            raise Unsupported(
                f"the release of {self.defense.name!r} cannot be run on a dummy gradient: "
                f"{one_line(error) or type(error).__name__}; use a threat model with informed=false"
            ) from error
        return found

    def __call__(self, dummies: Dummies) -> Gradient:
        """Return the mean of what would be sent of each dummy gradient, [T, *shape] per observed parameter."""
        device = dummies.images.device
        gradient = {name: value.cpu().unbind() for name, value in dummies.gradient.items()}
        images, labels, tensors = dummies.images.cpu(), dummies.labels.cpu(), _on_cpu(dummies.tensors)
        draws = [dummies.generators(number) for number in range(self.draws)]
        rows = []
        for t, (image, label) in enumerate(zip(images, labels)):
            own = {name: value[t] for name, value in gradient.items()}
            known = _row(self.model, tensors, t)
            rows.append(self._mean(own, [self.send(own, image, label, known, each[t]) for each in draws]))
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in self.names}

    def _mean(self, gradient: Gradient, sent: Sequence[Gradient]) -> Gradient:
        """Return the mean of several draws; a parameter that none of them sends is the gradient itself.

        What is passed straight through has the derivative of the multiple of the gradient that is nearest to it.
        """
        found = {}
        for name in self.names:
            own, values = gradient[name], [each[name] for each in sent if name in each]
            if not values:
                found[name] = own
                continue
            mean = torch.stack(values).mean(0) if len(values) > 1 else values[0]
            if name not in self.smooth:
                square = own.detach().square().sum()
                factor = (own.detach() * mean.detach()).sum() / torch.where(square > 0, square, 1.0)
                mean = factor * own + (mean - factor * own).detach()
            found[name] = mean
        return found


def simulated(observation: Observation) -> AdaptiveAttacker:
    """Return the attacker who runs the code of the observed defense.

    Nothing that it finds out depends on the images: gradients, images and draws of its own go through the release and
    the encoding.

    Raises:
        Unsupported: there is nothing to model; or the release or the encoding fails on the attacker's own values; or
            what is sent does not depend on the gradient.
    """
    defense, threat = observation.defense, observation.threat
    assert defense is not None
    if defense.name in CONTROLS:
        raise Unsupported(f"the defense {defense.name!r} does nothing to model; use a threat model with informed=false")
    attacker = AdaptiveAttacker(
        SIMULATED,
        relax=partial(_with_secrets, observation.secrets) if observation.secrets else None,
        loss=None if type(defense).loss is Defense.loss else defense.loss,
        encode=_encoding(defense, observation),
    )
    names = tuple(observation.gradient)
    whole = type(defense).release is Defense.release
    if not whole:
        release = Release(defense, observation.model, names, threat.shares == "weights")
        maps = _maps(release, observation)
        whole = maps is not None and all(each.identity(list(names)) for each in maps)
        if maps is None:
            attacker = replace(attacker, release=_classified(release, observation))
        elif not whole:
            attacker = replace(attacker, undo=partial(_inverted, maps))
    if attacker.release is None and attacker.encode is None:
        attacker = replace(attacker, batched=True)
    single = threat.shares == "gradient" or (observation.sent_unit is not None and threat.local_steps == 1)
    if whole and defense.companions and attacker.loss is None and single:
        attacker = replace(attacker, targets=blended_targets)  # the labels are blended as the images are
    return attacker


def _with_secrets(
    secrets: Sequence[Secret], model: nn.Module, hidden: Collection[str]
) -> tuple[nn.Module, tuple[Secret, ...]]:
    """Return the network as it is, with every hidden secret to be optimised."""
    return model, tuple(secret for secret in secrets if secret.name in hidden)


def _maps(release: Release, observation: Observation) -> tuple[EntryMap, ...] | None:
    """Return the map that a release is, one for each trial or one for all if they share their weights; else None."""
    parameters = {name: p for name, p in observation.model.named_parameters() if p.requires_grad}
    shapes = {name: value.shape for name, value in parameters.items()}
    maps: list[EntryMap] = []
    for tensors in _networks(observation):

        def send(gradient: Gradient, number: int, tensors: Mapping[str, Tensor] = tensors) -> Gradient:
            sent = release.send(gradient, *_example(observation, number), tensors, generator("simulate", number))
            lacking = {name: torch.full_like(gradient[name], torch.nan) for name in release.names if name not in sent}
            return {name: (sent | lacking)[name].detach() for name in release.names}

        found = find_map(send, shapes, observation.dtype)
        if found is None:
            return None
        maps.append(found)
    return tuple(maps)


def _inverted(maps: Sequence[EntryMap], observed: Observed, weights: Weights) -> Gradient:
    """Return what went into the releases that these maps are, [T, *shape], NaN where it was not sent."""
    trials = len(next(iter(observed.values())))
    rows = []
    for t in range(trials):
        sent = {name: value[t].cpu() for name, value in observed.items()}
        rows.append((maps[t] if len(maps) > 1 else maps[0]).inverse(sent))
    device = next(iter(observed.values())).device
    names = list(dict.fromkeys(name for row in rows for name in row))
    shapes = {name: next(row[name] for row in rows if name in row) for name in names}
    return {
        name: torch.stack([row.get(name, torch.full_like(shapes[name], torch.nan)) for row in rows]).to(device)
        for name in names
    }


def _classified(release: Release, observation: Observation) -> Release:
    """Return the release with which parameters are differentiated and how many draws are averaged.

    Raises:
        Unsupported: nothing that is sent depends on the gradient or the image.
    """
    (tensors, *_), first, second = _networks(observation), _example(observation, 0), _example(observation, 1)
    parameters = {name: p for name, p in observation.model.named_parameters() if p.requires_grad}
    rng, sizes = generator("simulate", "slope"), {}
    for name in parameters:
        value = observation.gradient[name][0].double() if name in observation.gradient else torch.ones(1)
        sizes[name] = float(value[value.isfinite()].square().mean().sqrt()) or 1.0
    own = {
        name: (sizes[name] * torch.randn(parameter.shape, generator=rng)).to(observation.dtype).requires_grad_()
        for name, parameter in parameters.items()
    }
    moves = {
        name: PERTURBATION * sizes[name] * torch.randn(value.shape, generator=rng).to(value)
        for name, value in own.items()
    }

    def send(gradient: Gradient, example: tuple[Tensor, Tensor], number: int) -> Gradient:
        return release.send(gradient, *example, tensors, generator("simulate", "slope", number))

    try:
        sent = send(own, first, 0)
    except Unsupported:  # for its graph, or for another reason that is raised again
        release = replace(release, graph=False)
        sent = send(own, first, 0)
    moved = send({name: (own[name] + moves[name]).detach() for name in own}, first, 0)
    redrawn, elsewhere = send(own, first, 1), send(own, second, 0)
    draws = sent.keys() != redrawn.keys() or any(not _equal(sent[name], redrawn[name]) for name in sent)
    reacts = [not _equal(sent[name], moved[name]) for name in sent if name in moved]
    reads = sent.keys() != elsewhere.keys() or any(not _equal(sent[name], elsewhere[name]) for name in sent)
    if not any(reacts) and not reads:
        raise Unsupported(
            f"what {release.defense.name!r} sends does not depend on the gradient: there is nothing to match"
        )
    smooth = {name for name in sent.keys() & moved.keys() if _sloped(sent[name], moved[name], own, moves)}
    return replace(release, smooth=frozenset(smooth), draws=DRAWS if draws else 1)


def _sloped(sent: Tensor, moved: Tensor, inputs: Gradient, moves: Gradient) -> bool:
    """Return whether the derivative of what is sent predicts how it moves with its inputs."""
    change = (moved - sent).detach()
    size = float(change.norm())
    if not sent.requires_grad or not 0 < size < float("inf"):
        return False
    along = torch.autograd.grad(sent, list(inputs.values()), change / size, retain_graph=True, allow_unused=True)
    predicted = sum(float((move * slope).sum()) for move, slope in zip(moves.values(), along) if slope is not None)
    return SLOPES[0] < predicted / size < SLOPES[1]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


@dataclass(frozen=True)
class Encoding:
    """A defense's encoding as an attacker runs it on dummy images.

    Attributes:
        smooth: autograd differentiates the encoded image; else it is passed straight through.
    """

    defense: Defense
    smooth: bool

    def __call__(self, images: Tensor, labels: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Return the images [T, C, H, W] that the network runs on, and their labels."""
        rows = [
            _encoded(self.defense, image[None], label[None], rng)
            for image, label, rng in zip(images.cpu(), labels.cpu(), generators)
        ]
        encoded = torch.cat([row[0] for row in rows]).to(images)
        if not self.smooth:
            encoded = images + (encoded - images).detach()
        return encoded, torch.cat([row[1] for row in rows]).to(images.device)


def _encoding(defense: Defense, observation: Observation) -> Encoding | None:
    """Return a defense's encoding of images; None if it has none, or one that a server cannot repeat.

    It cannot if the encoding takes further images of the client, or if it draws: a client's gradient is that of one
    draw, and no mean of others. Then the encoded image is what is recovered.
    """
    if type(defense).encode is Defense.encode or defense.companions:
        return None
    image, label = _example(observation, 0)
    image = image[None].clone().requires_grad_()
    rng = [generator("simulate", "encode", number) for number in (0, 1, 0)]
    encoded = _encoded(defense, image, label[None], rng[0])[0]
    other = _example(observation, 1)[0][None]
    if _equal(encoded, _encoded(defense, other, label[None], generator("simulate", "encode", 0))[0]):
        raise Unsupported(
            f"what {defense.name!r} trains on does not depend on the image: there is nothing of it to match"
        )
    if not _equal(encoded, _encoded(defense, image, label[None], rng[1])[0]):
        return None
    move = PERTURBATION * torch.randn(image.shape, generator=generator("simulate", "move")).to(image)
    moved = _encoded(defense, (image + move).detach().clamp(0, 1), label[None], rng[2])[0]
    move = (image + move).clamp(0, 1).detach() - image.detach()
    return Encoding(defense, _sloped(encoded, moved, {"": image}, {"": move}))


def _encoded(defense: Defense, image: Tensor, label: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return what a defense encodes an image [1, C, H, W] and its label as; raise Unsupported if it fails."""
    try:
        with seeded("simulate", rng.initial_seed(), device=image.device):
            encoded, labels = defense.encode(image, label, rng)
        if encoded.shape != image.shape:
            raise ValueError(f"it returned images of shape {tuple(encoded.shape)} for {tuple(image.shape)}")
    except (Exception, SystemExit) as error:
        raise Unsupported(
            f"the encoding of {defense.name!r} cannot be run on a dummy image: "
            f"{one_line(error) or type(error).__name__}; use a threat model with informed=false"
        ) from error
    return encoded, labels


def _example(observation: Observation, number: int) -> tuple[Tensor, Tensor]:
    """Return an image [C, H, W] and a label of the attacker's own."""
    rng = generator("simulate", "example", number)
    image = torch.rand(observation.image_shape, generator=rng).to(observation.dtype)
    return image, torch.randint(observation.num_classes, (), generator=rng)


def _networks(observation: Observation) -> list[dict[str, Tensor]]:
    """Return every tensor of the network of each trial, or of all if they share it, with draws in secrets' places."""
    own = tensors_of(observation.model)
    alike = all(shared(value) for name, value in observation.weights.items() if value.ndim > own[name].ndim)
    drawn = {
        secret.name: secret.law.draw(tuple(own[secret.name].shape), generator("simulate", secret.name))
        for secret in observation.secrets
    }
    known = _on_cpu(observation.weights)
    return [drawn | _row(observation.model, known, t) for t in range(1 if alike else observation.trials)]


def _row(model: nn.Module, tensors: Mapping[str, Tensor], t: int) -> dict[str, Tensor]:
    """Return the tensors [*shape] of one trial."""
    own = tensors_of(model)
    return {name: value[t] if value.ndim > own[name].ndim else value for name, value in tensors.items() if name in own}


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}


def filled(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Return an architecture with these tensors [*shape] on the CPU, floating-point ones in this type."""
    network = copy.deepcopy(model).to_empty(device="cpu").to(dtype)
    with torch.no_grad():
        for name, tensor in tensors_of(network).items():
            tensor.copy_(tensors[name])
    return network
