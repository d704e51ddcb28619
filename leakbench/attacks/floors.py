"""The floors: attacks that use no gradient. Every other attack is measured against them."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from leakbench.attacks.base import Attack, register
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.datasets.samples import crops
from leakbench.observation import Observation


@register("random")
@dataclass(frozen=True)
class RandomFloor(Attack):
    """Floor: uniform noise, no gradient used."""

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "Nothing."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is a floor: it recovers nothing."
    floor: ClassVar[bool] = True

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return U[0, 1) images."""
        shape = (*observation.places, *observation.image_shape)
        return Reconstruction(rng.uniform("image", shape), labels=observation.labels)


@register("grey")
@dataclass(frozen=True)
class GreyFloor(Attack):
    """Floor: the constant image 0.5, no gradient used."""

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "Nothing."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is a floor; in PSNR it is above many published reconstructions."
    floor: ClassVar[bool] = True

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return constant 0.5 images."""
        shape = (observation.trials, *observation.places, *observation.image_shape)
        return Reconstruction(torch.full(shape, 0.5, device=observation.device), labels=observation.labels)


@register("mean")
@dataclass(frozen=True)
class MeanFloor(Attack):
    """Floor: the mean of public images of the same kind, no gradient used."""

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "Public images of the same kind."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is a floor: it recovers nothing."
    floor: ClassVar[bool] = True

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the public mean image for every trial."""
        shape = (observation.trials, *observation.places, *observation.image_shape)
        images = observation.mean_image.expand(shape)
        return Reconstruction(images.clone(), labels=observation.labels)


@register("others")
@dataclass(frozen=True)
class OthersFloor(Attack):
    """Floor: other photographs, no gradient used; what the assignment alone makes of real images.

    Mirrored crops of the photographs that ship with leakbench, drawn at random, as many as a client has images. The
    best of B assignments lifts the scores of images that have nothing to do with the private ones.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "Public photographs."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is a floor: it recovers nothing."
    floor: ClassVar[bool] = True

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return other images."""
        public = crops(observation.image_shape).flip(-1)
        count = observation.count
        rows = []
        for own in rng.generators("others"):
            times = -(-count // len(public))
            rows.append(torch.cat([torch.randperm(len(public), generator=own) for _ in range(times)])[:count])
        shape = (observation.trials, *observation.places, *observation.image_shape)
        images = public[torch.stack(rows)].view(shape).to(observation.device)
        return Reconstruction(images, labels=observation.labels)
