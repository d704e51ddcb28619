"""The images of a training: split into parts, divided among clients, and augmented in batches."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from leakbench import assets
from leakbench.clients.base import augmented, batches_of
from leakbench.core.rng import generator
from leakbench.datasets import Dataset
from leakbench.datasets.images import ByteImages, read
from leakbench.datasets.stored import Stored
from leakbench.errors import BadOption
from leakbench.training.settings import Augmentation, Recipe

TEST_STRIDE = 5
"""If a dataset has no test split, every fifth image is a test image."""


@dataclass(frozen=True)
class TrainingData:
    """The three parts of a training's images; ``validation`` is empty if none are held out.

    Attributes:
        groups: how many test images each group of the dataset has (``Dataset.group``); empty if none has several.
    """

    train: ByteImages
    validation: ByteImages
    test: ByteImages
    image_shape: tuple[int, int, int]
    num_classes: int
    groups: tuple[int, ...] = ()


def load(dataset: Dataset, recipe: Recipe, seed: int) -> TrainingData:
    """Return the images of a training; the seed selects the held-out ones, whatever model and defense are.

    The images of the last call are kept in memory for the next arm.

    Raises:
        MissingAsset: the dataset is not in the cache.
        BadOption: there are too few images for the recipe.
    """
    check(dataset, recipe)
    return _loaded(dataset, recipe.images, recipe.tested, recipe.held_out, seed, assets.home())


@lru_cache(maxsize=1)
def _loaded(
    dataset: Dataset, images: int | None, tested: int | None, held_out: float, seed: int, home: Path
) -> TrainingData:
    """Return the images of a training from the cache of datasets in ``home``."""
    seen, other, train, test = parts(dataset)
    order = torch.randperm(len(train), generator=generator("training", seed, "held out"))
    chosen = order[:images]
    kept = len(chosen) - int(held_out * len(chosen))
    held = [train[int(row)] for row in chosen]
    read_parts = (read(seen, held[:kept]), read(seen, held[kept:]), read(other, test[:tested]))
    groups = Counter(map(other.group, test[:tested]))
    sizes = tuple(groups.values()) if len(groups) < groups.total() else ()
    return TrainingData(*read_parts, dataset.image_shape, dataset.num_classes, sizes)


def check(dataset: Dataset, recipe: Recipe) -> None:
    """Raise BadOption if a dataset has too few images for a recipe, before any is read."""
    _, _, train, test = parts(dataset)
    count = min(len(train), recipe.images or len(train))
    kept = count - int(recipe.held_out * count)
    if recipe.held_out and kept == count:
        raise BadOption(f"validation={recipe.validation:g} of {count} images holds none out; give a larger share")
    if not len(test):
        raise BadOption(f"dataset {dataset.name!r} has {len(train)} images, too few to test on; give a larger one")
    if recipe.mode == "fedavg":
        pieces = recipe.clients * (recipe.shards if recipe.split == "shards" else 1)
        if kept < pieces:
            each = f" with {recipe.shards} shards each" if recipe.split == "shards" else ""
            raise BadOption(
                f"{recipe.clients} clients{each} are more than the {kept} training images of {dataset.name!r}; "
                "give fewer clients"
            )


def unseen(dataset: Dataset, images: int | Sequence[int]) -> tuple[Dataset, int | list[int]]:
    """Return a dataset and images of it on which no training is done: the first ``images``, or these indices.

    Raises:
        BadOption: the dataset has too few test images, or one of the indices is a training image.
    """
    _, other, _, test = parts(dataset)
    if isinstance(images, int):
        if images > len(test):
            raise BadOption(
                f"images={images} are more than the {len(test)} test images of {dataset.name!r}; give fewer"
            )
        chosen = list(test[:images])
        return other, images if chosen == list(range(images)) else chosen
    for index in images:
        if index not in test:
            raise BadOption(
                f"image {index} of {dataset.name!r} is not a test image; give some of {list(test[:4])}, ..."
            )
    return other, list(images)


def parts(dataset: Dataset) -> tuple[Dataset, Dataset, Sequence[int], Sequence[int]]:
    """Return the dataset to train on and the one to test on, with the indices of each."""
    if isinstance(dataset, Stored):
        seen, other = replace(dataset, split="train"), replace(dataset, split="test")
        return seen, other, range(len(seen)), range(len(other))
    test = range(0, len(dataset), TEST_STRIDE)
    return dataset, dataset, [index for index in range(len(dataset)) if index % TEST_STRIDE], test


def partition(labels: Tensor, recipe: Recipe, seed: int) -> list[Tensor]:
    """Return the rows of each client's training images, in order: equally many for each client, and none twice.

    With ``shards`` the rows are sorted by label and cut into clients * shards pieces, which are dealt at random, as in
    McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, section 3.

    Args:
        labels: [N] int64, at least one for each piece.
    """
    rng = generator("training", seed, "partition")
    pieces = recipe.clients * (recipe.shards if recipe.split == "shards" else 1)
    size = len(labels) // pieces
    order = torch.randperm(len(labels), generator=rng)
    if recipe.split == "shards":
        order = order[labels[order].argsort(stable=True)]
    dealt = torch.randperm(pieces, generator=rng).view(recipe.clients, -1)
    parts = order[: pieces * size].view(pieces, size)
    return [parts[own].flatten().sort().values for own in dealt]


def batches(
    images: ByteImages, size: int, augment: Sequence[Augmentation], rng: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once, in a random order: x [B, C, H, W] in [0, 1] and y [B]; the last batch can be smaller."""
    for rows in batches_of(len(images), size, rng):
        yield floats(augmented(images.pixels[rows], augment, rng)), images.labels[rows]


def floats(pixels: Tensor) -> Tensor:
    """Return bytes [B, C, H, W] as float32 in [0, 1], channels last, which convolutions on the CPU take faster."""
    return pixels.contiguous(memory_format=torch.channels_last).float().div_(255)
