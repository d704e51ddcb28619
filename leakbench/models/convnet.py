"""ConvNet, the network of convolutions on which most papers on gradient inversion measure."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from leakbench.core.component import STATED
from leakbench.models.base import Architecture, Mode, register
from leakbench.models.resnet import ACTIVATIONS, ActivationName, Width
from leakbench.models.weights import Init

_MULTIPLES = (1, 2, 2, 4, 4, 4, 4, 4)
"""The channels of each convolution, in multiples of the width."""
_POOLED = (5, 7)
"""The convolutions that a max-pool follows."""


class _ConvNet(nn.Module):
    """Eight 3x3 convolutions with batch normalisation, two 3x3 max-pools, and a linear classifier of every feature."""

    def __init__(self, options: ConvNet, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise([channels, *(options.width * n for n in _MULTIPLES)])):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)]
            layers.append(ACTIVATIONS[options.activation]())
            layers += [nn.MaxPool2d(3)] if index in _POOLED else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(options.width * _MULTIPLES[-1] * (height // 9) * (width // 9), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, C, H, W] in [0, 1]."""
        return self.classifier(self.features(x).flatten(1))


@register("convnet")
@dataclass(frozen=True)
class ConvNet(Architecture):
    """ConvNet of the papers on gradient inversion: 8 convolutions, batch normalisation, 2 max-pools; 2.9 M parameters.

    The classifier sees every position of the last features (3x3 of an image of 32x32), not their average.

    Attributes:
        activation: ``relu`` or ``sigmoid``.
        width: the channels of the first convolution; later ones have up to four times as many. Papers have 16 to 64.
        init: ``default`` (torch's) or ``uniform(a)``.
        mode: ``train`` normalises each image by its own statistics, ``eval`` by the running ones.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights.
    """

    reference: ClassVar[str] = "Geiping et al. 2020, Inverting Gradients, NeurIPS, section 5 (ConvNet of the code)"
    activation: ActivationName = "relu"
    width: Width = 64
    init: Init = "default"
    mode: Mode = field(default="train", metadata=STATED)
    fresh: bool = False
    weights: str | None = None

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network.

        Images must be at least 9x9, of which the two pools leave one feature.
        """
        self.require(image_shape, 9)
        return _ConvNet(self, image_shape, num_classes)
