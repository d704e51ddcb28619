"""Samples of a trained generator, and their distances to the training images."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from leakbench.core.rng import generator
from leakbench.datasets.images import read
from leakbench.generators.dcgan import DCGAN
from leakbench.generators.train import WEIGHTS, GeneratorRecipe, splits

SAMPLES = 1000
"""Number of samples (equally many of each class), and of test images, whose distances are measured."""

_GRID = 10
_SCALE = 2
_LEVELS = torch.tensor([0.0, 0.01, 0.05, 0.5, 0.95], dtype=torch.float64)


@dataclass(frozen=True)
class Nearest:
    """The distances of images to the training images.

    Attributes:
        distance: [N], root mean square over the pixels, of images in [0, 1], to the nearest training image.
        index: [N] int64, which training image that is.
    """

    distance: Tensor
    index: Tensor


def nearest(images: Tensor, training: Tensor, rows: int = 2000) -> Nearest:
    """Return the nearest training image of each image; both [N, C, H, W], float in [0, 1] and uint8."""
    points = images.flatten(1).double()
    best = torch.full((len(points),), torch.inf, dtype=torch.float64)
    index = torch.zeros(len(points), dtype=torch.int64)
    for start in range(0, len(training), rows):
        distance = torch.cdist(points.float(), training[start : start + rows].flatten(1).float() / 255)
        found, place = distance.min(1)
        closer = found < best
        best = torch.where(closer, found.double(), best)
        index = torch.where(closer, place + start, index)
    # computed from the difference, the distance is exact even if it is small
    exact = (points - training[index].flatten(1).double() / 255).square().mean(1).sqrt()
    return Nearest(exact, index)


@torch.no_grad()
def samples(file: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images [count, C, 32, 32] in [0, 1] of the classes in turn, and their labels, drawn by this seed."""
    trained = DCGAN(str(file))
    card, decoder = trained.card(), trained.network()
    labels = torch.arange(count) % card.num_classes
    latent = torch.randn(count, card.latent, generator=generator("samples", seed))
    images = [decoder(part, own) for part, own in zip(latent.split(250), labels.split(250))]
    return torch.cat(images).add(1).div(2), labels


def assess(recipe: GeneratorRecipe, out: Path) -> tuple[list[Path], dict[str, object]]:
    """Write ``samples.png`` and ``nearest.png`` on the weights in ``out``.

    Returns:
        Their paths, and what the page of the generator states beside its recipe.
    """
    seen, unseen = splits(recipe.dataset)
    training, test = read(seen, range(len(seen))), read(unseen, range(min(SAMPLES, len(unseen))))
    trained = DCGAN(str(out / WEIGHTS))
    drawn, _ = samples(out / WEIGHTS, SAMPLES, recipe.seed)
    classes = trained.card().num_classes
    own, other = nearest(drawn, training.pixels), nearest(test.pixels.float() / 255, training.pixels)

    places = [row * classes + column for column in range(min(classes, 20)) for row in range(_GRID)]
    _save(out / "samples.png", drawn[places], _GRID)
    pairs = torch.cat([drawn[: 2 * _GRID], training.pixels[own.index[: 2 * _GRID]].float() / 255])
    _save(out / "nearest.png", pairs, 2 * _GRID)
    measured = (("samples", own.distance), ("test images", other.distance))
    return [out / "samples.png", out / "nearest.png"], {
        "parameters": sum(value.numel() for value in trained.network().parameters()),
        "training": len(training),
        "each": _GRID,
        "rows": [(name, len(found), found.quantile(_LEVELS).tolist()) for name, found in measured],
        "close": float((own.distance < other.distance.quantile(0.01)).double().mean()),
    }


def _save(file: Path, images: Tensor, columns: int) -> None:
    """Write images [N, C, H, W] in [0, 1] as a PNG of ``columns`` columns, doubled in size without smoothing."""
    sheet = make_grid(images.clamp(0, 1).mul(255).round().to(torch.uint8), columns, padding=1, pad_value=255)
    picture = to_pil_image(sheet[: images.shape[1], 1:-1, 1:-1])
    picture.resize((picture.width * _SCALE, picture.height * _SCALE), Image.Resampling.NEAREST).save(
        file, optimize=True
    )
