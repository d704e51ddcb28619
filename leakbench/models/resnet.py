"""The residual networks of He et al. 2016: those for CIFAR, and those for ImageNet, for images of any size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.core.component import STATED
from leakbench.errors import Unsupported
from leakbench.models.base import Architecture, Mode, register
from leakbench.models.weights import Init

ActivationName = Literal["relu", "sigmoid"]
Shortcut = Literal["pad", "conv"]
Stem = Literal["imagenet", "cifar"]
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


class _CifarNetwork(nn.Module):
    """A 3x3 stem, three stages of doubling width, average pooling and a linear classifier."""

    def __init__(self, options: _CifarResNet, channels: int, num_classes: int) -> None:
        super().__init__()
        width, activation = options.width, ACTIVATIONS[options.activation]
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = activation()
        layers = []
        inputs = width
        for stage in range(3):
            for block in range(options.blocks):
                outputs, stride = width * 2**stage, 2 if block == 0 and stage > 0 else 1
                layers.append(_Block(inputs, outputs, stride, activation, options.shortcut))
                inputs = outputs
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
    mode: Mode = field(default="train", metadata=STATED)
    fresh: bool = False
    weights: str | None = None
    shortcut: Shortcut = "pad"
    width: Width = 16

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network; images must be at least 8x8."""
        self.require(image_shape, 8)
        model = _CifarNetwork(self, image_shape[0], num_classes)
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


class _ImageNetNetwork(nn.Module):
    """A stem, four stages of doubling width, average pooling and a linear classifier; named as torchvision names it."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, options: _ImageNetResNet, channels: int, num_classes: int) -> None:
        super().__init__()
        width, activation = options.width, ACTIVATIONS[options.activation]
        kernel, stride = (7, 2) if options.stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = activation()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if options.max_pool else nn.Identity()
        inputs = width
        for stage, count in enumerate(options.blocks):
            outputs = width * 2**stage
            layer = [_block(inputs, outputs, 1 if stage == 0 else 2, activation)]
            layer += [_block(outputs, outputs, 1, activation) for _ in range(count - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
            inputs = outputs
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, C, H, W] in [0, 1]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _block(inputs: int, outputs: int, stride: int, activation: type[nn.Module]) -> nn.Module:
    from torchvision.models.resnet import BasicBlock  # takes a second

    shortcut = None
    if stride > 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    block: nn.Module = BasicBlock(inputs, outputs, stride, shortcut)
    block.relu = activation()  # torchvision's works in place
    return block


@dataclass(frozen=True)
class _ImageNetResNet(Architecture):
    """The base of the ImageNet residual networks.

    Attributes:
        activation: ``relu``, or ``sigmoid`` as the released key-lock attacks use.
        stem: ``imagenet`` is a 7x7 convolution of stride 2, ``cifar`` a 3x3 convolution of stride 1.
        max_pool: the stem's 3x3 max-pool of stride 2; FedKL's networks have none.
        width: the channels of the first stage.
        init: ``default`` (Kaiming normal convolutions, by their outputs) or ``uniform(a)``.
        mode: ``train`` normalises each image by its own statistics, ``eval`` by the running ones.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights; torchvision's own fit.
    """

    blocks: ClassVar[tuple[int, ...]]
    activation: ActivationName = "relu"
    stem: Stem = "imagenet"
    max_pool: bool = True
    width: Width = 64
    init: Init = "default"
    mode: Mode = field(default="train", metadata=STATED)
    fresh: bool = False
    weights: str | None = None

    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network.

        In training mode the last stage must keep more than one pixel, which batch normalisation of one image needs:
        images larger than 8 pixels (``cifar`` stem without max-pool) to 32 pixels (both halvings of the stem).
        """
        smallest = 2 ** (3 + (self.stem == "imagenet") + self.max_pool)
        if self.mode == "train" and max(image_shape[1:]) <= smallest:
            raise Unsupported(
                f"{self.name} leaves one pixel of images of {image_shape[1]}x{image_shape[2]}, and batch normalisation "
                f"needs two; set a size above {smallest}, stem=cifar, max_pool=false or mode=eval"
            )
        model = _ImageNetNetwork(self, image_shape[0], num_classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model


@register("resnet18")
@dataclass(frozen=True)
class ResNet18(_ImageNetResNet):
    """ResNet-18: 11 M parameters, torchvision's; its stem and activations can be those of FedKL's networks."""

    reference: ClassVar[str] = "He et al. 2016, Deep Residual Learning, CVPR, table 1 (torchvision's definition)"
    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)


@register("resnet34")
@dataclass(frozen=True)
class ResNet34(_ImageNetResNet):
    """ResNet-34: 21 M parameters, torchvision's; its stem and activations can be those of FedKL's networks."""

    reference: ClassVar[str] = "He et al. 2016, Deep Residual Learning, CVPR, table 1 (torchvision's definition)"
    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)
