"""Which images of a client each of its local steps takes, and a set of unknown images for each time that it takes them.

The order in which a client takes its images is not known. With one set of unknowns, a guess of it is wrong in most
epochs. With a set for each epoch the order within an epoch is free, since any image may be at any place; that the sets
are the same images is a term that does not depend on their order (Dimitrov et al. 2022, Data Leakage in Federated
Averaging, TMLR, arXiv 2206.12395, section 4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from leakbench.clients import LocalTraining
from leakbench.core.rng import generator

FEATURES, KERNEL = 16, 3
"""The random convolutions whose mean over a set of images must be the same for all sets, and their size."""


@dataclass(frozen=True)
class TakenImages:
    """Which images each step of a local training takes.

    Attributes:
        steps: by step [T, b] int64, the places of its images among the client's B.
        earlier: likewise, how often each was taken in earlier steps: the number of its epoch, from 0 on.
    """

    steps: tuple[Tensor, ...]
    earlier: tuple[Tensor, ...]

    @classmethod
    def of(cls, steps: Sequence[Tensor], count: int) -> "TakenImages":
        """Return the steps of clients of ``count`` images with how often each image was taken before."""
        taken = torch.zeros(len(steps[0]), count, dtype=torch.int64, device=steps[0].device)
        earlier = []
        for rows in steps:
            earlier.append(taken.gather(1, rows))
            taken = taken.scatter_add(1, rows, torch.ones_like(rows))
        return cls(tuple(steps), tuple(earlier))

    @cached_property
    def epochs(self) -> int:
        """How often the image that is taken most often is taken."""
        return 1 + max(int(one.max()) for one in self.earlier)

    def seen(self, count: int) -> Tensor:
        """Return which images are taken in which epoch: [T, E, B] bool."""
        found = torch.zeros(len(self.steps[0]), self.epochs, count, dtype=torch.bool, device=self.steps[0].device)
        trials = torch.arange(len(found), device=found.device)[:, None]
        for rows, epoch in zip(self.steps, self.earlier):
            found[trials, epoch, rows] = True
        return found


def guessed(client: LocalTraining, trials: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return by step [T, b] a guess of the places of its images, the same for every trial and at every time."""
    return tuple(rows.to(device).expand(trials, -1) for rows in client.rows(generator("dummy order")))


def set_filters(channels: int) -> Tensor:
    """Return the filters [F, C, 3, 3] by which sets of images are compared."""
    return torch.randn(FEATURES, channels, KERNEL, KERNEL, generator=generator("set features"))


def set_distance(images: Tensor, filters: Tensor) -> Tensor:
    """Return [T], how far sets of images are from each other whatever the order of each: squared and relative.

    The sets are compared by the means over their images of random convolutions with a ReLU.

    Args:
        images: [T, E, B, C, H, W], B images in each of E sets.
        filters: [F, C, 3, 3], of ``set_filters``.
    """
    trials, epochs, count, channels, height, width = images.shape
    maps = torch.relu(F.conv2d(images.reshape(-1, channels, height, width), filters, padding=KERNEL // 2))
    means = maps.view(trials, epochs, count, -1).mean(2)
    spread = (means - means.mean(1, keepdim=True)).square().flatten(1).sum(1)
    return spread / means.square().flatten(1).sum(1).clamp(min=torch.finfo(images.dtype).tiny)


def merged(images: Tensor, labels: Tensor, seen: Tensor, mean: bool) -> Tensor:
    """Return the images [T, B, C, H, W] that several sets have in common, in the order of the first set.

    Each set is assigned to the first one by the least squared distance among images of one label.

    Args:
        images: [T, E, B, C, H, W].
        labels: [T, B] int64, or class probabilities [T, B, K]; the same for every set.
        seen: [T, E, B] bool, the images that a step took; the others do not count.
        mean: return the mean of the images that belong together; otherwise those of the first set.
    """
    if not mean:
        return images[:, 0]
    classes = labels.argmax(-1) if labels.ndim > 2 else labels
    found = []
    for sets, own, taken in zip(images, classes, seen):
        total, weight = sets[0].clone(), torch.ones(len(own), device=images.device, dtype=images.dtype)
        for other, known in zip(sets[1:], taken[1:]):
            apart = torch.cdist(sets[0].flatten(1), other[known].flatten(1)).square().double()
            apart = apart + (own[:, None] != own[known][None]) * (1 + apart.amax())
            first, second = (torch.from_numpy(part).to(images.device) for part in linear_sum_assignment(apart.cpu()))
            total[first] += other[known][second]
            weight[first] += 1
        found.append(total / weight.view(-1, 1, 1, 1))
    return torch.stack(found)
