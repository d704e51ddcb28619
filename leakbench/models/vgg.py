"""VGG-16, for images of any size from 32x32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from leakbench.core.component import STATED
from leakbench.models.base import Architecture, Mode, register
from leakbench.models.resnet import ACTIVATIONS, ActivationName, Width
from leakbench.models.weights import Init

_STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""Multiples of the width, and convolutions, of the five stages of configuration D; a max-pool ends each."""


class _VGG(nn.Module):
    """Thirteen 3x3 convolutions in five stages and three linear layers; named as torchvision names it."""

    def __init__(self, options: VGG16, channels: int, num_classes: int) -> None:
        super().__init__()
        activation, hidden = ACTIVATIONS[options.activation], options.hidden
        layers: list[nn.Module] = []
        for factor, count in _STAGES:
            for _ in range(count):
                outputs = options.width * factor
                layers.append(nn.Conv2d(channels, outputs, 3, padding=1))
                layers += [nn.BatchNorm2d(outputs)] if options.norm == "batch" else []
                layers.append(activation())
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 49, hidden),
            activation(),
            nn.Dropout(options.dropout),
            nn.Linear(hidden, hidden),
            activation(),
            nn.Dropout(options.dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, C, H, W] in [0, 1]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@register("vgg16")
@dataclass(frozen=True)
class VGG16(Architecture):
    """VGG-16 (configuration D): 134 M parameters, torchvision's, with or without batch normalisation.

    Attributes:
        activation: ``relu`` or ``sigmoid``.
        norm: ``batch`` normalises after every convolution, as FedKL's locked network does; ``none`` is the published
            network, FedKL's control.
        dropout: of the two hidden linear layers, in training mode.
        width: the channels of the first stage.
        hidden: the units of the hidden linear layers.
        init: ``default`` (Kaiming normal convolutions by their outputs, linear layers N(0, 0.01^2), zero biases) or
            ``uniform(a)``.
        mode: ``train`` drops units and normalises each image by its own statistics, ``eval`` does neither.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights; torchvision's own fit.
    """

    reference: ClassVar[str] = "Simonyan and Zisserman 2015, VGG, ICLR, table 1, D (torchvision's definition)"
    activation: ActivationName = "relu"
    norm: Literal["batch", "none"] = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    width: Width = 64
    hidden: Annotated[int, Field(ge=1, le=65536)] = 4096
    init: Init = "default"
    mode: Mode = field(default="train", metadata=STATED)
    fresh: bool = False
    weights: str | None = None

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network; images must be at least 32x32."""
        self.require(image_shape, 32)
        model = _VGG(self, image_shape[0], num_classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        return model
