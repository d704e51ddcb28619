"""What evaluation needs of a client's step: which images the network ran on, and how far a defense turns a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from leakbench.core.rng import generator, seeded
from leakbench.core.types import Gradient
from leakbench.defenses.base import Defense
from leakbench.gradients.layer_inputs import first_layer, tensor_key
from leakbench.victim.client import Client, StepRecord
from leakbench.victim.trainer import Taken, Trainer

Key = tuple[tuple[int, ...], bytes]
"""Of a tensor (``tensor_key``)."""


def record_of(trainer: Trainer, client: Client, taken: Taken) -> StepRecord:
    """Return the record of a step that was taken."""
    if client.count > 1:  # which of the changed images is which one's is not followed
        return StepRecord(None, False, _cosine(trainer, client, taken.sent))
    images, unseen = _images(trainer, client, taken)
    images.pop(tensor_key(client.image.to(taken.encoded)), None)

    def again(other: Client) -> Collection[Key]:
        return _images(trainer, other, trainer.again(other))[0]

    return StepRecord(changed_images(client, images, again), unseen, _cosine(trainer, client, taken.sent))


def changed_images(
    client: Client, images: Mapping[Key, Tensor], again: Callable[[Client], Collection[Key]]
) -> Tensor | None:
    """Return ``StepRecord.changed`` of the images that a network ran on in place of the private one.

    Args:
        client: the client.
        images: these images by ``tensor_key``.
        again: returns the keys of those of another client.
    """
    if not images:
        return None
    noise = torch.rand(client.image.shape, generator=generator(client.key, "other image")).to(client.image)
    try:
        same = again(replace(client, image=noise))
    except (Exception, SystemExit):  # of a defense that does not take every image
        same = ()
    kept = [image for key, image in images.items() if key not in same]
    return torch.stack(kept).to(client.image) if kept else None


def _images(trainer: Trainer, client: Client, taken: Taken) -> tuple[dict[Key, Tensor], bool]:
    """Return the images [C, H, W] that a step's network ran on, by ``tensor_key``, and ``StepRecord.unseen``.

    What the first layer took is an image that was encoded if the plain network's first layer takes the same of that
    one; else it is an image itself, if it has the size of one.
    """
    shape, encoded_images = tuple(client.image.shape), {tensor_key(image): image for image in taken.encoded}
    known, sizes = dict(encoded_images), [shape, (client.image.numel(),)]
    assert trainer.plain is not None
    with seeded(client.key, "step"):
        found = first_layer(trainer.plain, taken.encoded)
    if found is not None and len(found[1]) == len(taken.encoded):
        known |= {tensor_key(row): image for row, image in zip(found[1], taken.encoded)}
        sizes.insert(0, tuple(found[1].shape[1:]))
    images, unseen = {}, taken.inputs.unreadable or not taken.inputs.values
    for value in taken.inputs.values.values():
        size = next((size for size in sizes if size and value.shape[-len(size) :] == size), None)
        for row in value.reshape(-1, *size) if size is not None else ():
            image = known.get(tensor_key(row), row if row.numel() == client.image.numel() else None)
            if image is None:
                unseen = True
            else:
                image = image.reshape(shape)
                images[tensor_key(image)] = image
        unseen |= size is None
    return images if taken.inputs.values else encoded_images, unseen


def _cosine(trainer: Trainer, client: Client, sent: Gradient) -> float:
    """Return the cosine of what a client sent and what it would send without a defense (``StepRecord.cosine``)."""
    if not overridden(trainer.defense, "encode", "loss", "release"):
        return 1.0
    try:
        plain = replace(trainer, plain=None, defense=Defense()).again(client).sent
    except (Exception, SystemExit):  # of a network that only its defense's loss takes
        return math.nan
    own = {name: value.double() for name, value in sent.items()}
    size = math.sqrt(sum(float(value.double().square().sum()) for value in plain.values()))
    length = math.sqrt(sum(float(value.square().sum()) for value in own.values()))
    product = sum(float((value * plain[name].double()).sum()) for name, value in own.items())
    return ratio(size, length, product)


def ratio(size: float, length: float, product: float) -> float:
    """Return the cosine of two gradients of these norms and this inner product (``StepRecord.cosine``)."""
    if not size or not length:
        return 0.0 if size else math.nan
    return product / (size * length)


def overridden(defense: Defense, *hooks: str) -> set[str]:
    """Return which of these hooks a defense defines."""
    return {hook for hook in hooks if getattr(type(defense), hook) is not getattr(Defense, hook)}
