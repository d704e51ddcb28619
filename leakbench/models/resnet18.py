"""The residual networks of He et al. 2016 for ImageNet, of torchvision's blocks, for images of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.errors import Unsupported
from leakbench.models.architecture import Architecture, Mode
from leakbench.models.base import register
from leakbench.models.resnet import ACTIVATIONS, ActivationName, Width
from leakbench.models.weights import Init

Stem = Literal["imagenet", "cifar"]


class _ResNet(nn.Module):
    """A stem, four stages of doubling width, average pooling and a linear classifier; named as torchvision names it."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        blocks: tuple[int, ...],
        channels: int,
        num_classes: int,
        width: int,
        activation: type[nn.Module],
        stem: Stem,
        max_pool: bool,
    ) -> None:
        super().__init__()
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = activation()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if max_pool else nn.Identity()
        inputs = width
        for stage, count in enumerate(blocks):
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
    mode: Mode = "train"
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
        model = _ResNet(
            self.blocks,
            image_shape[0],
            num_classes,
            self.width,
            ACTIVATIONS[self.activation],
            self.stem,
            self.max_pool,
        )
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
