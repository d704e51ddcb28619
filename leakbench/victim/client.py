"""A client, its images, and what evaluation keeps of its step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.defenses.base import Defense
from leakbench.errors import Unsupported


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


def batch_of(defense: Defense, client: Client, num_classes: int) -> tuple[Tensor, Tensor]:
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
