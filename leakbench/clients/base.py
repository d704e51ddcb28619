"""The contract of a local training: how many images a client has, and which steps it takes on them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.core.component import Component
from leakbench.core.registry import Registry
from leakbench.core.types import Gradient, ThreatModel
from leakbench.errors import BadOption
from leakbench.optim.client import ClientOptimiser, ClientState

CROP_PADDING = 4
"""How many black pixels are added on each side before a random crop."""


class LocalTraining(Component):
    """What a client does between two messages; a subclass states its images, its steps and its optimiser."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many images what a client sends is of."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """How many steps it takes."""

    @property
    def several_steps(self) -> bool:
        """Whether it can only send its weights: a gradient is that of one step."""
        return self.steps > 1

    @property
    def rate(self) -> float | None:
        """The learning rate, if it states one."""
        return None

    @abstractmethod
    def optimiser(self, lr: float) -> ClientOptimiser:
        """Return the update rule at this learning rate."""

    @abstractmethod
    def rows(self, rng: torch.Generator) -> Iterator[Tensor]:
        """Yield which images [b] each of the ``steps`` takes, by their places among the client's own."""

    def prepared(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return the images [b, C, H, W] of a step as the network takes them: augmented by draws of their own."""
        return images

    @property
    def same_inputs(self) -> bool:
        """Whether the network takes each image as it is, in every step."""
        return type(self).prepared is LocalTraining.prepared

    def without_rate(self) -> "LocalTraining":
        """Return the training as an attacker may know it: without a learning rate."""
        return self

    def members(self, images: Sequence[int], labels: Mapping[int, int]) -> list[tuple[int, ...]]:
        """Return the indices of each client's images: these images cut into consecutive batches.

        Args:
            images: indices in a dataset, in order.
            labels: their classes; empty if ``needs_labels`` is false.
        """
        size = self.count
        return [tuple(images[begin : begin + size]) for begin in range(0, len(images), size)]

    @property
    def needs_labels(self) -> bool:
        """Whether the choice of images depends on their labels."""
        return False

    @abstractmethod
    def words(self) -> str:
        """Return what the client trains on, as ``8 images``."""

    @abstractmethod
    def recipe(self) -> str:
        """Return how it trains, as ``16 steps of SGD on batches of 8 with momentum 0.9``."""


def check_threat(training: LocalTraining, threat: ThreatModel) -> None:
    """Raise BadOption if a client cannot train as it states under a threat model."""
    said = f"client {registry.spec(training)!r}"
    if threat.shares == "gradient" and training.several_steps:
        raise BadOption(
            f"{said} takes several steps or changes its gradient (momentum, weight decay, Adam), and the threat model "
            "has shares=gradient; add shares=weights to the threat model"
        )
    if threat.shares == "gradient" and training.rate is not None:
        raise BadOption(f"{said}: lr is for clients that share weights; leave it out, or add shares=weights")
    if training.rate is not None and threat.learning_rate not in (None, training.rate, ThreatModel().learning_rate):
        raise BadOption(
            f"{said} has lr={training.rate:g}, and the threat model learning_rate={threat.learning_rate:g}; leave "
            "learning_rate out"
        )
    if training.count > 1 and threat.count == "hidden" and threat.labels != "inferred":
        raise BadOption(
            f"{said} has {training.count} images, whose number labels={threat.labels} shows and count=hidden hides; "
            "leave one of the two out of the threat model"
        )
    if training.count > 1 and threat.count == "hidden" and threat.shares == "weights" and threat.recipe == "known":
        raise BadOption(
            f"{said} has {training.count} images, whose number recipe=known shows and count=hidden hides; add "
            "recipe=hidden to the threat model, or leave count out"
        )
    if training.several_steps and threat.order == "known" and threat.recipe == "hidden":
        raise BadOption(
            f"{said}: order=known shows how it trains, which recipe=hidden hides; leave one of the two out of the "
            "threat model"
        )
    if threat.local_steps > 1 and training != type(training)():
        raise BadOption(
            f"{said} states its own steps, and the threat model has local_steps={threat.local_steps}; write "
            f"local_steps={threat.local_steps} in the client, and leave it out of the threat model"
        )


def take_step(
    network: nn.Module, gradient: Mapping[str, Tensor], optimiser: ClientOptimiser, state: ClientState
) -> ClientState:
    """Move a network's parameters by one step, in place; parameters without a gradient stay.

    Every local training takes its steps by this: a client that is attacked, and one whose network is trained.
    """
    with torch.no_grad():
        before: Gradient = {name: network.get_parameter(name) for name in gradient}
        after, state = optimiser.moved(before, dict(gradient), state)
        for name, value in after.items():
            before[name].copy_(value)
    return state


def batches_of(count: int, size: int, rng: torch.Generator | None) -> Iterator[Tensor]:
    """Yield the places of ``count`` images once, ``size`` at a time; in a random order, or in their own for None."""
    order = torch.arange(count) if rng is None else torch.randperm(count, generator=rng)
    yield from order.split(size)


def augmented(images: Tensor, kinds: Sequence[str], rng: torch.Generator) -> Tensor:
    """Return images [B, C, H, W], each cropped (``crop``) and mirrored (``flip``) by draws of its own."""
    count, _, height, width = images.shape
    if "crop" in kinds:
        padded = F.pad(images, (CROP_PADDING,) * 4)
        top, left = torch.randint(2 * CROP_PADDING + 1, (2, count), generator=rng)
        rows = (top[:, None] + torch.arange(height))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width))[:, None, None, :]
        channels = torch.arange(images.shape[1])[None, :, None, None]
        images = padded[torch.arange(count)[:, None, None, None], channels, rows, columns]
    if "flip" in kinds:
        mirrored = torch.rand(count, generator=rng) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


registry: Registry[LocalTraining] = Registry("client", "leakbench.clients", LocalTraining)
register = registry.register
