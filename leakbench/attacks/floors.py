"""The floors: attacks that use no gradient. Every other attack is measured against them."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from leakbench.attacks.base import Attack, register
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.observation import Observation


@register("random")
@dataclass(frozen=True)
class RandomFloor(Attack):
    """Floor: uniform noise, no gradient used."""

    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "Nothing."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is a floor: it recovers nothing."
    floor: ClassVar[bool] = True

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return U[0, 1) images."""
        return Reconstruction(rng.uniform("image", observation.image_shape), labels=observation.labels)


@register("grey")
@dataclass(frozen=True)
class GreyFloor(Attack):
    """Floor: the constant image 0.5, no gradient used."""

    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "Nothing."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is a floor; in PSNR it is above many published reconstructions."
    floor: ClassVar[bool] = True

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return constant 0.5 images."""
        shape = (observation.trials, *observation.image_shape)
        return Reconstruction(torch.full(shape, 0.5, device=observation.device), labels=observation.labels)


@register("mean")
@dataclass(frozen=True)
class MeanFloor(Attack):
    """Floor: the mean of public images of the same kind, no gradient used."""

    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "Public images of the same kind."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is a floor: it recovers nothing."
    floor: ClassVar[bool] = True

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the public mean image for every trial."""
        images = observation.mean_image.expand(observation.trials, *observation.image_shape)
        return Reconstruction(images.clone(), labels=observation.labels)
