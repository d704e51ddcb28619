"""Does the slope of a matching distance lead to the private image? ``python -m benchmarks.slope FILE`` writes a table.

A private image x is left by a step s of normal noise. Measured at x + s is a distance D between the gradient there and
at x, and the derivative of D along s, <D', s>, over D. Where D is smooth this is 2 near x, since D grows as the square
of the step; as long as it is above 0, downhill leads back. Where a network has kinks, its gradient jumps from one side
of a kink to the other. D then grows by jumps of which no derivative knows: the ratio is 0, and a search that goes by
slopes has nothing to go by, whatever its budget and whatever the defense.

D is the layer-normalised distance that `lb` minimises, and the cosine distance of `ig`, both without a prior. No
defense, the weights of seed 0 before training, labels known, float64; the images are the samples 32 to 63. Brackets are
95 % bootstrap intervals over images.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from leakbench import defenses, models
from leakbench.attacks.ig import cosine_distance
from leakbench.attacks.lb import layer_normalised_distance
from leakbench.datasets.samples import Samples
from leakbench.gradients import Evaluator
from leakbench.gradients.evaluate import tensors_of
from leakbench.report.statistics import bootstrap_interval
from leakbench.rng import Rng
from leakbench.store import Provenance
from leakbench.victim import build

MODELS = ("lenet", "resnet20(activation=sigmoid)", "resnet20")
DISTANCES = (layer_normalised_distance, cosine_distance)
DEVIATIONS = (1e-4, 1e-3, 0.01, 0.03, 0.1)
IMAGES = range(32, 64)


def measure(model: str, indices: Sequence[int], deviation: float) -> list[tuple[Tensor, Tensor]]:
    """Return distances [T] and relative slopes [T] at these samples plus noise of this deviation, pixels in 0-1."""
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
    step = deviation * Rng(tuple(f"slope/{index}" for index in indices)).normal("step", images.shape[1:]).double()
    near = (images + step).requires_grad_()
    gradient = evaluator.gradient(tensors, near, labels)
    found = []
    for measured in DISTANCES:
        distance = measured(gradient, private)
        (slope,) = torch.autograd.grad(distance.sum(), near, retain_graph=True)
        found.append((distance.detach(), (slope * step).flatten(1).sum(1) / distance.detach()))
    return found


def _cell(values: Tensor) -> str:
    low, high = bootstrap_interval(values.tolist())
    return f"{values.mean():.2g} [{low:.2g}, {high:.2g}]"


def table(indices: Sequence[int]) -> str:
    """Return a Markdown table of these samples: a row a network and deviation."""
    lines = [
        "| network | deviation of the step | PSNR there | D of lb | <D', s> / D | D of ig | <D', s> / D |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for model in MODELS:
        for deviation in DEVIATIONS:
            cells = [_cell(values) for pair in measure(model, indices, deviation) for values in pair]
            psnr = -20 * math.log10(deviation)
            lines.append(f"| {model} | {deviation:g} | {psnr:.0f} dB | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table to a file, with what it means and what it came from."""
    title, _, meaning = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slope", description=title)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    made = Provenance.collect(" ".join(sys.argv), "cpu", "{}")
    changed = ", changed since" if made.dirty else ""
    origin = (
        f"`python -m benchmarks.slope`, commit {made.commit}{changed}, torch {made.packages['torch']}, {made.device}."
    )
    heading = title.partition("?")[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# {heading}?\n\n{meaning}\n{table(IMAGES)}\n\n{origin}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
