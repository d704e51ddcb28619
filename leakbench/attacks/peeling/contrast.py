"""The contrast of an image that is known up to a factor, from the input of the linear layer on top.

Before training, the shifts of a ReLU network are zero, so that a brighter image only scales every layer's input: inputs
that are known up to a factor do not show it. The linear layer on top does: with d = dL/db, dL/dW = d f^T gives its
input f, with its size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from leakbench.attacks.peeling.network import Network

GRIDS = ((2.0, 13), (1.2, 9), (1.05, 9), (1.01, 9), (1.002, 9), (1.0005, 9))
"""The ratio of two neighbouring factors that are tried, and how many there are, about the best one before."""

CLEARER = 0.5
"""The part of the misfit that another factor may leave at most; otherwise the classifier does not show the factor."""


def classifier_input(network: Network, sent: Mapping[str, Tensor]) -> tuple[int, Tensor] | None:
    """Return the place whose output the topmost linear layer takes, and that [F], NaN where it does not follow.

    None if nothing of it follows.

    Args:
        network: its steps.
        sent: the gradient of one image, by name; NaN in entries that were not sent.
    """
    place = network.topmost_linear()
    if place is None:
        return None
    step = network.steps[place]
    weight, bias = (sent.get(f"{step.name}.{own}") for own in ("weight", "bias"))
    if weight is None or bias is None:
        return None
    there = weight.isfinite() & bias.isfinite()[:, None]
    weight, errors = (torch.where(there, each, 0.0) for each in (weight.double(), bias.double()[:, None]))
    power = errors.square().sum(0)
    value = torch.where(power > 0, (errors * weight).sum(0) / power, torch.nan)
    return (step.inputs[0], value) if bool(value.isfinite().any()) else None


def with_contrast(network: Network, image: Tensor, place: int, value: Tensor) -> Tensor:
    """Return an image [1, C, H, W] times the factor with which the output of a step is nearest to what it must be.

    Args:
        network: of the image's floating type.
        image: known up to a positive factor.
        place: of the step.
        value: its output [F]; NaN where it is not known.
    """
    if any(network.unknown(each) or each in network.hidden for each in network.below(place)):
        return image
    known = value.isfinite()
    wanted = value[known].to(image)

    def misfit(factor: float) -> float:
        return float((network.output(place, factor * image).flatten()[known] - wanted).square().sum())

    best = 1.0
    with torch.no_grad():
        for ratio, count in GRIDS:
            best = min((best * ratio ** (step - count // 2) for step in range(count)), key=misfit)
        return best * image if misfit(best) < CLEARER * misfit(1.0) else image
