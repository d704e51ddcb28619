"""The CIFAR residual networks of He et al. 2016, section 4.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.errors import Unsupported
from leakbench.models.architecture import Architecture, Mode
from leakbench.models.base import register
from leakbench.models.weights import Init

ActivationName = Literal["relu", "sigmoid"]
Shortcut = Literal["pad", "conv"]
Width = Annotated[int, Field(ge=1, le=1024)]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class _Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut.

    If the shape changes, the shortcut subsamples and pads with zeros (option A, ``pad``), or is a 1x1 convolution
    with batch normalisation (option B, ``conv``); elsewhere it is the identity.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: type[nn.Module], shortcut: Shortcut) -> None:
        super().__init__()
        self.stride = stride
        self.extra = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = activation()
        self.shortcut: nn.Module | None = None
        if shortcut == "conv" and (stride > 1 or self.extra):
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride > 1 or self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return self.act2(out + x)


class _ResNet(nn.Module):
    """A 3x3 stem, three stages of doubling width, average pooling and a linear classifier."""

    def __init__(
        self,
        blocks: int,
        channels: int,
        num_classes: int,
        width: int,
        activation: type[nn.Module],
        shortcut: Shortcut,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        layers = []
        inputs = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(_Block(inputs, width * 2**stage, stride, activation, shortcut))
                inputs = width * 2**stage
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, C, H, W] in [0, 1]."""
        x = self.layers(self.act1(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@dataclass(frozen=True)
class _CifarResNet(Architecture):
    """The base of the CIFAR residual networks.

    Attributes:
        activation: ``relu``, or ``sigmoid`` as the released key-lock attacks use.
        shortcut: if the shape changes, ``pad`` (option A) or ``conv``, a 1x1 convolution with batch normalisation
            (option B, which FedKL's locked networks have).
        width: the channels of the first stage.
        init: ``default`` (Kaiming normal convolutions) or ``uniform(a)``.
        mode: ``train`` normalises each image by its own statistics, ``eval`` by the running ones.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights.
    """

    blocks: ClassVar[int]
    activation: ActivationName = "relu"
    init: Init = "default"
    mode: Mode = "train"
    fresh: bool = False
    weights: str | None = None
    shortcut: Shortcut = "pad"
    width: Width = 16

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network; images must be at least 8x8."""
        if min(image_shape[1:]) < 8:
            raise Unsupported(
                f"{self.name} needs images of at least 8x8, not {image_shape[1]}x{image_shape[2]}; set size=32"
            )
        activation = ACTIVATIONS[self.activation]
        model = _ResNet(self.blocks, image_shape[0], num_classes, self.width, activation, self.shortcut)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return model


@register("resnet20")
@dataclass(frozen=True)
class ResNet20(_CifarResNet):
    """ResNet-20 for CIFAR: 0.27 M parameters, batch normalisation, three stages of three blocks."""

    reference: ClassVar[str] = "He et al. 2016, Deep Residual Learning, CVPR, section 4.2"
    blocks: ClassVar[int] = 3


@register("resnet32")
@dataclass(frozen=True)
class ResNet32(_CifarResNet):
    """ResNet-32 for CIFAR: 0.46 M parameters, batch normalisation, three stages of five blocks."""

    reference: ClassVar[str] = "He et al. 2016, Deep Residual Learning, CVPR, section 4.2"
    blocks: ClassVar[int] = 5
