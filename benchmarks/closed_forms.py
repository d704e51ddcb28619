"""The figure of docs/closed-forms.md: ``python -m benchmarks.closed_forms`` writes docs/closed-forms.png."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from leakbench.attacks.peeling.factors import NotFactorised
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.shifts import factorise_convolution
from leakbench.core.rng import generator
from leakbench.datasets.samples import Samples
from leakbench.report.figure import COLOURS, INK, MARKERS, saved

PAGE = Path(__file__).resolve().parent.parent / "docs" / "closed-forms.png"

IMAGE = 7
"""The photograph whose features the convolution takes."""

SHOWN = (0.0, 1e-3, 5e-3)
"""The noise, relative to the gradient, of the rows of pictures."""

NOISE = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""The noise, relative to the gradient, of the curves."""

SIDES = (2, 4, 7)
"""The sides of the inputs of the curves."""

DRAWS = 5
"""How many networks each point of a curve is the median of."""

CHANNELS = 10
"""How many channels the pictures show."""


def features(side: int, draw: int) -> Tensor:
    """Return the photograph's ReLU features [2 * side^2, side, side] in a random network."""
    rng = generator("closed forms", str(side), str(draw))
    image = nn.functional.interpolate(Samples().load([IMAGE])[0], (4 * side, 4 * side), mode="area")
    weight = torch.randn(2 * side**2, 3, 7, 7, generator=rng)
    values = nn.functional.conv2d(image - image.mean(), weight, stride=4, padding=3)[0]
    return (values / values.std() + 0.3 * torch.randn(len(values), 1, 1, generator=rng)).relu()


def recovered(value: Tensor, noise: float, draw: int) -> Tensor | None:
    """Return an input [C, H, W] from the noisy gradient of one 3x3 convolution of it; None if it does not follow."""
    rng = generator("noise", str(noise), str(draw))
    layer = nn.Conv2d(len(value), 64, 3, padding=1)
    error = torch.randn(64, *value.shape[1:], generator=rng) * (torch.rand(64, *value.shape[1:], generator=rng) > 0.5)
    (gradient,) = torch.autograd.grad((layer(value[None]) * error).sum(), layer.weight)
    gradient = gradient + noise * gradient.square().mean().sqrt() * torch.randn(gradient.shape, generator=rng)
    found = factorise_convolution(gradient, Lattice.of(layer, value.shape[1:]), rng)
    if isinstance(found, NotFactorised):
        return None
    guess = found.inputs[0].to(value)
    return guess * (guess * value).sum() / guess.square().sum()


def error(value: Tensor, guess: Tensor | None) -> float:
    """Return the relative error; 1 without a guess."""
    return 1.0 if guess is None else float((guess - value).norm() / value.norm())


def figure() -> Figure:
    """Return the figure."""
    drawn = Figure(figsize=(10.5, 3.6), dpi=110, layout="constrained")
    pictures, curves = drawn.subfigures(1, 2, width_ratios=(1.5, 1))
    value = features(7, 0)
    rows = [("true", value)]
    for noise in SHOWN:
        guess = recovered(value, noise, 0)
        words = f"noise {noise:g}" if noise else "float32"
        if guess is not None:
            rows.append((f"{words}\nerror {error(value, guess):.0e}", guess))
    axes = pictures.subplots(len(rows), CHANNELS)
    chosen = value.flatten(1).norm(dim=1).argsort(descending=True)[:CHANNELS]
    for place, (words, each) in enumerate(rows):
        for column, channel in enumerate(chosen):
            axis = axes[place, column]
            axis.imshow(each[channel], cmap="gray", vmin=0, vmax=float(value[channel].max()))
            axis.set(xticks=[], yticks=[])
        axes[place, 0].set_ylabel(words, rotation=0, ha="right", va="center", color=INK, fontsize=9)
    pictures.suptitle(f"{CHANNELS} of {len(value)} channels of a 3x3 convolution's input", fontsize=10)
    axis = curves.subplots()
    for side, colour, marker in zip(SIDES, COLOURS, MARKERS):
        found = []
        for noise in NOISE:
            values = [(features(side, draw), draw) for draw in range(DRAWS)]
            errors = [error(each, recovered(each, noise, draw)) for each, draw in values]
            found.append(float(torch.tensor(errors).median()))
        axis.loglog(NOISE, found, color=colour, marker=marker, markersize=4, label=f"{side} x {side}, {2 * side**2}")
    axis.set_xlabel("noise, relative to the gradient")
    axis.set_ylabel("relative error of the input")
    axis.legend(title="positions, channels", frameon=False, fontsize=8, title_fontsize=8)
    axis.grid(alpha=0.3)
    axis.set_title(f"median of {DRAWS} networks; 1: it does not follow", fontsize=10)
    return drawn


if __name__ == "__main__":
    PAGE.write_bytes(saved(figure()))
