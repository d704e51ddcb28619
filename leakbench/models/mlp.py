"""Fully connected networks: that of Deep Leakage from Model, and PRECODE's."""

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from torch import nn

from leakbench.models.base import Architecture, register
from leakbench.models.weights import Init

_ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def _checked(hidden: str) -> str:
    for part in hidden.split("-"):
        if not (part.isascii() and part.isdigit() and 1 <= int(part) <= 65536):
            raise ValueError(f"{part!r} is no width; write numbers of 1 to 65536 such as 32 or 1024-1024")
    return hidden


@register("mlp")
@dataclass(frozen=True)
class MLP(Architecture):
    """A fully connected network: the flattened image, hidden layers of ``hidden`` units each, and the classifier.

    ``mlp`` is the one of DLM, ``mlp(hidden=1024-1024, init=default)`` that of PRECODE (WACV 2022, section 5).

    Attributes:
        hidden: the widths of the hidden layers, from the image on.
        activation: behind each of them.
        init: ``uniform(0.5)``, as DLM's code has it, or ``default`` (torch's).
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights.
    """

    reference: ClassVar[str] = (
        "Zhao et al. 2022, Deep Leakage from Model in Federated Learning, arXiv 2206.04887 (code)"
    )
    hidden: Annotated[str, AfterValidator(_checked), Field(description="widths such as 32 or 1024-1024")] = "32"
    activation: Literal["relu", "sigmoid"] = "relu"
    init: Init = "uniform(0.5)"
    fresh: bool = False
    weights: str | None = None

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network, for images of any shape."""
        widths = [prod(image_shape), *map(int, self.hidden.split("-"))]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), _ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
