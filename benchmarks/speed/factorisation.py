"""Time of a shift factorisation as positions, channels and images grow: ``python -m benchmarks.speed.factorisation``.

A 3x3 convolution with zero padding on random inputs behind a ReLU, and random errors; the gradient is float32.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.speed import machine
from leakbench.attacks.peeling.factors import ConvolutionFactors
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.shifts import factorise_convolution

OUT = machine.ROOT / "reports" / "speed"
ROUNDS = 3


@dataclass(frozen=True)
class Point:
    """One size: the side of a square input, its channels (as many output channels), and the number of images."""

    side: int
    channels: int
    images: int


CURVES = {
    "positions": [Point(side, 256, 1) for side in (2, 4, 7, 8, 10, 12, 14)],
    "channels": [Point(4, channels, 1) for channels in (32, 64, 128, 256, 512, 1024)],
    "images": [Point(4, 512, images) for images in (1, 2, 4, 8, 16)],
}


def measure(point: Point, rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the processor seconds of each round, and the largest relative error of an image up to its scale."""
    layer = nn.Conv2d(point.channels, point.channels, 3, padding=1, bias=False)
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(point.images, point.channels, point.side, point.side, generator=rng).relu()
    out = layer(inputs)
    gradient = torch.autograd.grad(out, layer.weight, torch.randn(out.shape, generator=rng))[0]
    lattice = Lattice.of(layer, inputs.shape[2:])
    lattice.ambiguity()  # is cached
    seconds = []
    for seed in range(rounds):
        begun = time.process_time()
        found = factorise_convolution(gradient, lattice, torch.Generator().manual_seed(seed), point.images)
        seconds.append(time.process_time() - begun)
    worst = 0.0
    if isinstance(found, ConvolutionFactors):
        own = found.inputs.flatten(1)
        for image in inputs.double().flatten(1):
            scale = own @ image / own.square().sum(1)
            worst = max(worst, float(((scale[:, None] * own - image).norm(dim=1) / image.norm()).min()))
    return {**asdict(point), "seconds": seconds, "error": worst if isinstance(found, ConvolutionFactors) else None}


def page(data: dict[str, Any]) -> str:
    """Return the page of the measurements."""
    about = data["machine"]
    lines = [
        "# Time of a shift factorisation",
        "",
        f"Processor seconds of one thread, median of {ROUNDS}; {about['processor']}, torch {about['torch']}, commit "
        f"{about['commit']}. The weight gradient of a 3x3 convolution (float32) gives its input and the error at its "
        "output; the error is the largest relative one of an image, up to the image's scale. Written by "
        "`python -m benchmarks.speed.factorisation`.",
    ]
    for axis, rows in data["curves"].items():
        lines += [
            "",
            f"## Growth with {axis}",
            "",
            "| positions | channels | images | seconds | error |",
            "|--:" * 5 + "|",
        ]
        for row in rows:
            error = "not separated" if row["error"] is None else f"{row['error']:.1e}"
            cells = (
                row["side"] ** 2,
                row["channels"],
                row["images"],
                f"{statistics.median(row['seconds']):.2f}",
                error,
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all curves, and write data and page."""
    torch.set_num_threads(1)
    data = {"machine": machine.describe("cpu"), "curves": {}}
    for axis, points in CURVES.items():
        data["curves"][axis] = [measure(point) for point in points]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "factorisation.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (OUT / "factorisation.md").write_text(page(data), encoding="utf-8")
    print(page(data))


if __name__ == "__main__":
    main()
