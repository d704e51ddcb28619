"""The contract of a generator: latents and labels to images, with a card of its training data and licence."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leakbench.core.component import Component
from leakbench.core.registry import Registry
from leakbench.core.types import Distribution, Normal
from leakbench.datasets.images import convert
from leakbench.errors import BadOption, LeakbenchError, Unsupported, one_line

SAME_MEAN = 1e-4
"""Root mean square difference below which two mean images are those of the same images."""


@dataclass(frozen=True)
class TruncatedNormal(Distribution):
    """The normal distribution N(0, 1) cut off at 2 sigma, times ``scale`` (Brock et al. 2019, section 3.1)."""

    scale: float = 1.0

    def draw(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Return independent draws; those beyond the cut are drawn again."""
        values = torch.randn(shape, generator=rng)
        while bool((outside := values.abs() > 2).any()):
            values = torch.where(outside, torch.randn(shape, generator=rng), values)
        return values * self.scale


@dataclass(frozen=True, eq=False)
class Card:
    """The description of a generator.

    Attributes:
        latent: the size d of the latent.
        image_shape: (C, H, W) of its images.
        num_classes: number of classes, each for one label; 0 for a generator that takes no label.
        data: its training data.
        licence: the terms of its weights.
        checksum: SHA-256 of its weights.
        law: the distribution of every coordinate of the latent.
        low: the output that is black.
        high: the output that is white.
        seen: [C, H, W] in [0, 1], the mean of its training images at their own size; None if it is not known.
        unseen: likewise, the mean of the dataset's images that it was not trained on.
    """

    latent: int
    image_shape: tuple[int, int, int]
    num_classes: int
    data: str
    licence: str
    checksum: str
    law: Distribution = Normal()
    low: float = -1.0
    high: float = 1.0
    seen: Tensor | None = None
    unseen: Tensor | None = None


class Generator(Component):
    """A trained network that draws images, which the attacker brings along.

    Its training images must not be attacked.
    """

    @abstractmethod
    def card(self) -> Card:
        """Return the generator's description.

        Raises:
            BadOption: its weights do not exist.
            CorruptAsset: its weights are damaged.
        """

    @abstractmethod
    def network(self) -> nn.Module:
        """Return the network from latents [N, d] and labels [N] to images [N, C, H, W] in [low, high], on the CPU."""

    def choose(self, image_shape: tuple[int, int, int], num_classes: int, mean_image: Tensor) -> Generator:
        """Return the generator for such images: this one, or the one among several that fits.

        Raises:
            Unsupported: none of several fits.
        """
        return self

    def settings(self) -> dict[str, Any]:
        """Return name, version, options and the checksum of the weights."""
        return {**super().settings(), "checksum": self.card().checksum}


class Loaded(nn.Module):
    """A generator ready to draw: latents [N, d] and labels [N] to images [N, C, H, W] in [0, 1]."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.card = generator.card()
        self.network = generator.network().requires_grad_(False)
        self.eval()

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images of the card's shape; differentiable in the latent."""
        images: Tensor = self.network(latent, labels)
        return ((images - self.card.low) / (self.card.high - self.card.low)).clamp(0, 1)

    def draw(self, latent: Tensor, labels: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Return images [N, *image_shape]: reduced with antialiasing, grey repeated if three channels are asked for."""
        channels, height, width = image_shape
        size = None if self.card.image_shape[1:] == (height, width) else height
        return convert(self(latent, labels), size, channels)


def load(generator: Generator, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Return a generator on a device, loaded once for the same options and weights; it must not be changed.

    Raises:
        BadOption: its inputs or images do not have the shapes in its card.
    """
    return _load(generator, generator.card().checksum, device, dtype)


@functools.lru_cache(maxsize=4)
def _load(generator: Generator, checksum: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    card = generator.card()
    latent = torch.stack([card.law.draw((card.latent,), torch.Generator().manual_seed(row)) for row in range(3)])
    labels = torch.arange(3) % max(1, card.num_classes)
    try:
        loaded = Loaded(generator).to(device, dtype)
        with torch.no_grad():
            images = loaded(latent.to(device, dtype), labels.to(device))
    except LeakbenchError:
        raise
    except Exception as error:
        raise BadOption(
            f"generator {registry.spec(generator)!r} does not run on 3 latents of {card.latent} values: "
            f"{one_line(error)[:300]}"
        ) from None
    if tuple(images.shape) != (3, *card.image_shape) or not bool(torch.isfinite(images).all()):
        raise BadOption(
            f"generator {registry.spec(generator)!r} returned {tuple(images.shape)} for 3 latents, not finite images "
            f"{(3, *card.image_shape)}; correct its description"
        )
    return loaded


def check_fit(
    generator: Generator, image_shape: tuple[int, int, int], num_classes: int, mean_image: Tensor | None = None
) -> None:
    """Raise Unsupported if a generator cannot draw such images, or was trained on the attacked ones.

    Args:
        generator: the generator.
        image_shape: (C, H, W) of the attacked images: no larger than the generator's; grey ones become RGB, no others.
        num_classes: number of classes of the labels.
        mean_image: [C, H, W], the public mean image. If it is the mean of the images that the generator did not see,
            those that it saw are attacked.
    """
    card, name = generator.card(), registry.spec(generator)
    channels, height, width = card.image_shape
    if channels not in (1, image_shape[0]) or height < image_shape[1] or width < image_shape[2]:
        raise Unsupported(
            f"generator {name!r} draws images {card.image_shape} and the dataset has {image_shape}; choose a generator "
            "of at least this size and as many channels, or a smaller size of the dataset"
        )
    if (height * image_shape[2]) != (width * image_shape[1]):
        raise Unsupported(f"generator {name!r} draws images {card.image_shape}, of another aspect than {image_shape}")
    if card.num_classes not in (0, num_classes):
        raise Unsupported(
            f"generator {name!r} draws {card.num_classes} classes and the dataset has {num_classes}, so that labels "
            "and classes do not correspond; choose another generator"
        )
    if mean_image is not None and card.unseen is not None and is_mean(card.unseen, mean_image):
        raise Unsupported(
            f"generator {name!r} was trained on {card.data}, whose images are attacked here; attack the test split"
        )


def is_mean(own: Tensor, mean_image: Tensor) -> bool:
    """Return whether a mean image [C, H, W] is that of a card, converted as the dataset converts its images."""
    channels, side = mean_image.shape[0], mean_image.shape[-1]
    if mean_image.shape[-2] != side:
        return False
    wanted = convert(own[None], side, channels if channels in (1, 3) else None)[0]
    mean = mean_image.detach().cpu().float()
    return wanted.shape == mean.shape and float((wanted - mean).square().mean().sqrt()) < SAME_MEAN


registry: Registry[Generator] = Registry("generator", "leakbench.generators", Generator)
register = registry.register
