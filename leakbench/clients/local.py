"""Local training as clients of federated averaging do it: batches, epochs, momentum, weight decay, Adam."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakbench.clients.base import LocalTraining, augmented, batches_of, register
from leakbench.core.component import Count, NonNegative, Positive
from leakbench.core.text import plural
from leakbench.errors import BadOption
from leakbench.optim.client import ClientOptimiser

Augment = Literal["none", "flip", "crop", "flip+crop"]


@register("local")
@dataclass(frozen=True)
class Local(LocalTraining):
    """Local training by SGD, Adam or AdamW on one image, a batch, or many images in batches and epochs.

    The default is a client of one image that takes one step. ``batch=8`` alone is a client that takes one step on 8
    images. ``images=32, local_batch=8, local_epochs=2`` is a client of federated averaging, which sends its weights
    after 8 steps.

    Attributes:
        batch: the images of a client all of whose steps take all of them.
        images: the images of a client that trains in batches; none: ``batch``.
        local_epochs: how often it goes through its images.
        local_steps: how many steps it takes, in place of ``local_epochs``; none: those of the epochs.
        local_batch: the images of a step; none: all of them.
        optimizer: ``sgd``, ``adam`` or ``adamw``, as in ``torch.optim``.
        lr: the learning rate; none: that of the threat model.
        momentum: of SGD, in [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: as in ``torch.optim``.
        augment: ``flip`` mirrors half of the images, ``crop`` takes a random crop after padding by 4 black pixels; by
            draws of their own in every step.
        shuffle: draw the order of the images anew in every epoch.
        labels: the images of a batch: ``drawn`` as they follow each other in the dataset; ``distinct``: the next one of
            a class that the batch does not have yet, which makes labels easy to infer; ``same``: all of one class.
    """

    reference: ClassVar[str] = "McMahan et al. 2017, Communication-Efficient Learning of Deep Networks, AISTATS"
    batch: Count = 1
    images: Count | None = None
    local_epochs: Count = 1
    local_steps: Count | None = None
    local_batch: Count | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0
    augment: Augment = "none"
    shuffle: bool = True
    labels: Literal["drawn", "distinct", "same"] = "drawn"

    def __post_init__(self) -> None:
        if self.images is not None and self.batch != 1:
            raise BadOption(
                f"client 'local': batch={self.batch} and images={self.images} both say how many images it has; write "
                f"images={self.images}, local_batch={self.batch}"
            )
        if self.local_batch is not None and self.local_batch > self.count:
            raise BadOption(
                f"client 'local': local_batch={self.local_batch} is more than its {plural(self.count, 'image')}; write "
                f"local_batch={self.count}, or more images"
            )
        if self.local_steps is not None and self.local_epochs != 1:
            raise BadOption(
                f"client 'local': local_epochs={self.local_epochs} and local_steps={self.local_steps} both say how "
                "many steps it takes; write one of them"
            )
        self.optimiser(self.lr or 1.0)  # raises for options that do not go together

    @property
    def count(self) -> int:
        """How many images what it sends is of."""
        return self.images or self.batch

    @property
    def in_step(self) -> int:
        """How many images a step takes; the last one of an epoch can take fewer."""
        return self.local_batch or self.count

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return self.local_steps or self.local_epochs * -(-self.count // self.in_step)

    @property
    def several_steps(self) -> bool:
        """Whether it can only send its weights: one step of plain SGD on all images is a gradient."""
        return self.steps > 1 or self.in_step < self.count or self.optimiser(1.0) != ClientOptimiser(lr=1.0)

    @property
    def rate(self) -> float | None:
        """The learning rate, if it states one."""
        return self.lr

    def optimiser(self, lr: float) -> ClientOptimiser:
        """Return the update rule at this learning rate."""
        return ClientOptimiser(self.optimizer, lr, self.momentum, self.nesterov, self.weight_decay)

    def rows(self, rng: torch.Generator) -> Iterator[Tensor]:
        """Yield which images [b] each step takes."""
        taken = 0
        while taken < self.steps:
            for rows in batches_of(self.count, self.in_step, rng if self.shuffle else None):
                if taken == self.steps:
                    return
                taken += 1
                yield rows

    def prepared(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Return the images [b, C, H, W] of a step, augmented."""
        return images if self.augment == "none" else augmented(images, self.augment.split("+"), rng)

    @property
    def same_inputs(self) -> bool:
        """Whether nothing is augmented."""
        return self.augment == "none"

    def without_rate(self) -> "Local":
        """Return the training without its learning rate."""
        return replace(self, lr=None)

    def members(self, images: Sequence[int], labels: Mapping[int, int]) -> list[tuple[int, ...]]:
        """Return the indices of each client's images; without ``labels=drawn`` those that fill no batch are left out.

        Raises:
            BadOption: the images do not fill a batch.
        """
        size = self.count
        if len(images) < size or (self.labels == "drawn" and len(images) % size):
            raise BadOption(
                f"images={len(images)} do not fill batches of {size}; give a multiple of {size}, such as "
                f"{max(1, len(images) // size) * size}"
            )
        if self.labels == "drawn":
            return super().members(images, labels)
        found, left = [], list(images)
        while left and (own := self._one(left, labels)) is not None:
            found.append(own)
            left = [index for index in left if index not in own]
        if not found:
            raise BadOption(
                f"images={len(images)} have no {size} images of {self.labels} labels; give more images, a smaller "
                "batch, or labels=drawn"
            )
        return found

    def _one(self, images: list[int], labels: Mapping[int, int]) -> tuple[int, ...] | None:
        """Return the indices of the next client's images; None if there are not enough."""
        if self.labels == "same":
            classes = list(dict.fromkeys(labels[index] for index in images))
            each = ([index for index in images if labels[index] == own][: self.count] for own in classes)
            return next((tuple(own) for own in each if len(own) == self.count), None)
        own = tuple({labels[index]: index for index in reversed(images)}.values())
        return tuple(sorted(own, key=images.index)[: self.count]) if len(own) >= self.count else None

    @property
    def needs_labels(self) -> bool:
        """Whether the choice of images depends on their labels."""
        return self.labels != "drawn"

    def words(self) -> str:
        """Return how many images it has, and how they were chosen if that makes an attack easier."""
        chosen = {"drawn": "", "distinct": " of distinct labels", "same": " of one label"}
        return f"{plural(self.count, 'image') if self.count > 1 else 'one image'}{chosen[self.labels]}"

    def recipe(self) -> str:
        """Return the steps, the optimiser and its options."""
        name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[self.optimizer]
        parts = ["one step" if self.steps == 1 else f"{self.steps} steps", f"of {name}"]
        if self.in_step < self.count:
            parts.append(f"on batches of {self.in_step}")
        options = [f"{'Nesterov ' * self.nesterov}momentum {self.momentum:g}"] * (self.momentum > 0)
        options += [f"weight decay {self.weight_decay:g}"] * (self.weight_decay > 0)
        options += [f"augmentation ({self.augment})"] * (not self.same_inputs)
        options += ["a fixed order of images"] * (not self.shuffle)
        return " ".join(parts) + (f" with {' and '.join(options)}" if options else "")


ONE_IMAGE = Local()
"""The client of one image, which takes the steps that the threat model states."""
