"""What a slope of the matching distance knows of the private image: ``python -m benchmarks.slope FILE`` writes tables.

A private image x is left by a step s of normal noise. D is a distance between the gradients at x + s and at x, without
a prior. The share is <D', s> / D, the derivative of D along the step over D itself. Where D is smooth it tends to 2 as
the step becomes small, since D then grows as the square of the step: the slope knows how far the image is. Where it
tends to 0, D has grown by jumps that no derivative sees: where a network has kinks (ReLU), its gradient jumps from one
side of a kink to the other. At large steps a smooth D ends below 2 as well, since it bends and saturates. The cosine is
that of D' and s: how much of the steepest descent leads back to x. For directions drawn at random it is 0, with a
deviation of 0.018 an image here.

This is of infinitesimal steps from there, one direction an image, one draw of weights (those of seed 0, before
training), no defense, labels known, float64. It is not what a search of finite steps finds. The images are the samples
32 to 63; brackets are 95 % bootstrap intervals over them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from leakbench import defenses, models
from leakbench.analysis.statistics import bootstrap_interval
from leakbench.attacks.ig import cosine_distance
from leakbench.attacks.lb import layer_normalised_distance
from leakbench.core.rng import Rng
from leakbench.datasets.samples import Samples
from leakbench.gradients import Evaluator
from leakbench.gradients.evaluate import tensors_of
from leakbench.store.provenance import Provenance
from leakbench.victim import build

MODELS = ("lenet", "resnet20(activation=sigmoid)", "resnet20")
DISTANCES = {
    "The layer-normalised distance of lb": layer_normalised_distance,
    "The cosine distance of ig": cosine_distance,
}
DEVIATIONS = (1e-4, 1e-3, 0.01, 0.03, 0.1)
IMAGES = range(32, 64)


@dataclass(frozen=True)
class Slopes:
    """What is measured of one distance, [T] each: the distance, the share <D', s> / D, and the cosine of D' and s."""

    distance: Tensor
    share: Tensor
    cosine: Tensor


def measure(model: str, indices: Sequence[int], deviations: Sequence[float]) -> Iterator[list[Slopes]]:
    """Yield for each deviation the slopes of each of DISTANCES at these samples plus noise of it, pixels in 0-1."""
    dataset = Samples()
    images, labels = dataset.load(indices)
    images = images.double()
    network = build(models.parse(model), defenses.parse("none"), dataset.image_shape, dataset.num_classes, "weights/0")
    network.double()
    names = tuple(name for name, _ in network.named_parameters())
    tensors = {
        name: value.detach().expand(len(images), *value.shape) if name in names else value
        for name, value in tensors_of(network).items()
    }
    evaluator = Evaluator(network, names)
    private = evaluator.gradient(tensors, images, labels, create_graph=False)
    noise = Rng(tuple(f"slope/{index}" for index in indices)).normal("step", images.shape[1:]).double()
    for deviation in deviations:
        step = deviation * noise
        near = (images + step).requires_grad_()
        gradient = evaluator.gradient(tensors, near, labels)
        found = []
        for of in DISTANCES.values():
            distance = of(gradient, private)
            (slope,) = torch.autograd.grad(distance.sum(), near, retain_graph=True)
            distance = distance.detach()
            along = (slope * step).flatten(1).sum(1)
            cosine = functional.cosine_similarity(slope.flatten(1), step.flatten(1))
            found.append(Slopes(distance, along / distance, cosine))
        yield found


def _cell(values: Tensor) -> str:
    low, high = bootstrap_interval(values.tolist())
    return f"{values.mean():.2g} [{low:.2g}, {high:.2g}]"


def tables(indices: Sequence[int]) -> str:
    """Return a Markdown table of these samples for each distance: a row a network and deviation."""
    columns = "| network | deviation of the step | PSNR there | D | share | cosine |\n|:--|--:|--:|--:|--:|--:|"
    rows: dict[str, list[str]] = {name: [f"## {name}", "", columns] for name in DISTANCES}
    for model in MODELS:
        for deviation, found in zip(DEVIATIONS, measure(model, indices, DEVIATIONS), strict=True):
            psnr = -20 * math.log10(deviation)
            for name, one in zip(DISTANCES, found, strict=True):
                cells = " | ".join(_cell(values) for values in (one.distance, one.share, one.cosine))
                rows[name].append(f"| {model} | {deviation:g} | {psnr:.0f} dB | {cells} |")
    return "\n\n".join("\n".join(lines) for lines in rows.values())


def main() -> None:
    """Write the tables to a file, with what it means and what it came from."""
    title, _, meaning = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slope", description=title)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    made = Provenance.collect(" ".join(sys.argv), "cpu", "{}")
    changed = ", changed since" if made.dirty else ""
    origin = (
        f"`python -m benchmarks.slope`, commit {made.commit}{changed}, torch {made.packages['torch']}, {made.device}."
    )
    heading = title.partition(":")[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# {heading}\n\n{meaning}\n{tables(IMAGES)}\n\n{origin}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
