"""The CIFAR residual networks of He et al. 2016, section 4.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.errors import Unsupported
from leakbench.models.base import Model, register
from leakbench.models.lenet import checkpoint_settings
from leakbench.models.weights import Init, initialise, load


class _Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation and an identity shortcut (option A: subsample, pad with zeros)."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stride = stride
        self.extra = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = activation()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return self.act2(out + x)


class _ResNet(nn.Module):
    """A 3x3 stem of 16 channels, three stages of 16, 32 and 64, average pooling and a linear classifier."""

    def __init__(self, blocks: int, channels: int, num_classes: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = activation()
        layers = []
        width = 16
        for stage in (16, 32, 64):
            for block in range(blocks):
                layers.append(_Block(width, stage, 2 if block == 0 and stage > 16 else 1, activation))
                width = stage
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [B, K] for images [B, C, H, W] in [0, 1]."""
        x = self.layers(self.act1(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@register("resnet20")
@dataclass(frozen=True)
class ResNet20(Model):
    """ResNet-20 for CIFAR: 0.27 M parameters, batch normalisation, identity shortcuts (option A).

    Attributes:
        activation: ``relu``, or ``sigmoid`` as the released key-lock attacks use.
        init: ``default`` (Kaiming normal convolutions) or ``uniform(a)``.
        mode: ``train`` normalises each image by its own statistics, ``eval`` by the running ones.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: a checkpoint to attack instead of random weights.
    """

    reference: ClassVar[str] = "He et al. 2016, Deep Residual Learning, CVPR, section 4.2"
    activation: Literal["relu", "sigmoid"] = "relu"
    init: Init = "default"
    mode: Literal["train", "eval"] = "train"
    fresh: bool = False
    weights: str | None = None

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network in its mode; images must be at least 8x8."""
        if min(image_shape[1:]) < 8:
            raise Unsupported(
                f"resnet20 needs images of at least 8x8, not {image_shape[1]}x{image_shape[2]}; set size=32"
            )
        model = _ResNet(3, image_shape[0], num_classes, nn.ReLU if self.activation == "relu" else nn.Sigmoid)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        initialise(model, self.init)
        if self.weights is not None:
            load(model, self.weights)
        return model.train(self.mode == "train")

    def fresh_weights(self) -> bool:
        """Return ``fresh``."""
        return self.fresh

    def settings(self) -> dict[str, Any]:
        """Return the options, with the checkpoint's content in place of its path."""
        return checkpoint_settings(super().settings())
