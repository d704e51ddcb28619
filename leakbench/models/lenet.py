"""The LeNet of the gradient-inversion literature, with and without batch normalisation."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from leakbench.core.component import STATED
from leakbench.core.text import FEDKL
from leakbench.models.base import Architecture, Mode, register
from leakbench.models.weights import Init


class _LeNet(nn.Module):
    """Three 5x5 convolutions of 12 channels (strides 2, 2, 1), each followed by a sigmoid, and a linear classifier."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, normalise: bool) -> None:
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for stride in (2, 2, 1):
            layers.append(nn.Conv2d(channels, 12, 5, stride=stride, padding=2))
            layers += [nn.BatchNorm2d(12)] if normalise else []
            layers.append(nn.Sigmoid())
            channels = 12
        self.features = nn.Sequential(*layers)
        quarter = ((height + 3) // 4) * ((width + 3) // 4)
        self.classifier = nn.Linear(12 * quarter, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, C, H, W] in [0, 1]."""
        return self.classifier(torch.flatten(self.features(x), 1))


@register("lenet")
@dataclass(frozen=True)
class LeNet(Architecture):
    """LeNet of DLG: sigmoid activations, three strided 5x5 convolutions of 12 channels, one linear layer.

    Attributes:
        init: ``uniform(0.5)``, which DLG needs, or ``default`` (torch's).
        fresh: every trial draws its own weights, as FedKL's scripts do, instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights.
    """

    reference: ClassVar[str] = "Zhu et al. 2019, Deep Leakage from Gradients, NeurIPS (released code)"
    init: Init = "uniform(0.5)"
    fresh: bool = False
    weights: str | None = None

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network; images must be at least 8x8."""
        self.require(image_shape, 8)
        return _LeNet(image_shape, num_classes, normalise=False)


@register("lenet-bn")
@dataclass(frozen=True)
class LeNetBN(Architecture):
    """LeNet of DLG with batch normalisation (affine) between every convolution and its sigmoid.

    Attributes:
        init: ``uniform(0.5)`` or ``default`` (torch's; scale 1 and shift 0 in the normalisations).
        mode: ``train`` normalises each image by its own statistics, ``eval`` by the running ones.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights.
    """

    reference: ClassVar[str] = f"{FEDKL}, section 4.3 (LeNet with BN)"
    init: Init = "uniform(0.5)"
    mode: Mode = field(default="train", metadata=STATED)
    fresh: bool = False
    weights: str | None = None

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network; images must be at least 8x8."""
        self.require(image_shape, 8)
        return _LeNet(image_shape, num_classes, normalise=True)
