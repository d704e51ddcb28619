"""breaching beside the searches of ``relu-search.toml``: the same networks, weights, images, labels and steps.

``python -m benchmarks.relu_peer SCALE OUT.csv`` runs breaching's ``invertinggradients`` with the steps of the scale's
``log-cosine``, for every network and image of a scale. It starts at its own random image.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch

from benchmarks.speed import peer
from leakbench import defenses, metrics, models
from leakbench.core.rng import generator
from leakbench.plan.matrix import Matrix, expand, load
from leakbench.victim import build

FILE = Path(__file__).with_name("relu-search.toml")
MEASURED = ("psnr", "psnr_aligned", "ssim")


def main() -> None:
    """Write the scores of every network and image."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relu_peer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("scale")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    if reason := peer.available():
        parser.exit(2, f"error: {reason}\n")
    (matrix,) = [Matrix(**axes) for axes in expand(load(FILE), given.scale)]
    steps = next(attack.options()["steps"] for attack in matrix.attacks if attack.name == "log-cosine")
    scores = [metrics.parse(name) for name in MEASURED]
    with given.out.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("model", "image", "attack", *MEASURED))
        for model in matrix.models:
            for dataset in matrix.datasets:
                for index in matrix.images:
                    (image,), label = dataset.load([index])
                    network = build(
                        model, defenses.parse("none"), dataset.image_shape, dataset.num_classes, "weights/0"
                    )
                    loss = torch.nn.functional.cross_entropy(network(image[None]), label)
                    observed = torch.autograd.grad(loss, list(network.parameters()))
                    start = torch.randn((1, *image.shape), generator=generator("peer", str(index)))
                    found = peer.ig(network, observed, label, start, steps=steps)
                    guess = found.image.clamp(0, 1)
                    values = [f"{float(score(guess, image[None])):.4f}" for score in scores]
                    rows.writerow((models.spec(model), index, f"breaching(steps={steps})", *values))
                    file.flush()


if __name__ == "__main__":
    main()
