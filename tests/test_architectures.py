"""Unmodified torchvision networks: the batched path against one at a time, and that against plain torch.

Networks of small width and depth from torchvision's own classes run with every other test; those of full size are
marked ``full``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import CLASSES, rand, randn, tensors_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vgg import make_layers
from torchvision.models.vision_transformer import VisionTransformer

from leakbench.core.rng import generator
from leakbench.core.types import Gradient
from leakbench.gradients import Evaluator, Path, choose_path, plain_loss

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Case:
    """A network, and the size of its square images.

    Attributes:
        make: builds it, for CLASSES classes.
        pixels: the smallest size that its normalisation takes in training mode.
        draws: it draws random numbers in training mode.
        plain: torch itself can differentiate it twice.
        path: the path that serves it.
        tolerance: the largest relative error, to which rounding may grow on the way through the network.
    """

    make: Callable[..., nn.Module]
    pixels: int = 32
    draws: bool = False
    plain: bool = True
    path: Path = "batched"
    tolerance: float = 1e-10


def small_resnet() -> nn.Module:
    net = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=16)
    net.layer3 = net.layer4 = nn.Identity()
    net.fc = nn.Linear(512, CLASSES)
    return net


def small_vgg(batch_norm: bool) -> nn.Module:
    layers = make_layers([4, "M", 4, 4, "M"], batch_norm=batch_norm)
    hidden = [nn.Linear(16, 32), nn.Sigmoid(), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(True), nn.Dropout()]
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *hidden, nn.Linear(32, CLASSES))


def small_efficientnet() -> nn.Module:
    setting = [MBConvConfig(1, 3, 1, 8, 8, 1, 1.0, 1.0), MBConvConfig(4, 5, 2, 8, 8, 2, 1.0, 1.0)]
    return EfficientNet(setting, dropout=0.2, stochastic_depth_prob=0.4, last_channel=16, num_classes=CLASSES)


def small_mobilenet() -> nn.Module:
    setting = [
        InvertedResidualConfig(8, 3, 8, 8, True, "RE", 1, 1, 1.0),
        InvertedResidualConfig(8, 5, 16, 8, True, "HS", 2, 1, 1.0),
        InvertedResidualConfig(8, 3, 16, 8, False, "HS", 1, 2, 1.0),
    ]
    return MobileNetV3(setting, last_channel=16, num_classes=CLASSES)


def small_convnext() -> nn.Module:
    setting = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)]
    return ConvNeXt(setting, stochastic_depth_prob=0.4, num_classes=CLASSES)


SMALL = {
    "resnet": Case(small_resnet),
    "vgg": Case(partial(small_vgg, False), 16, draws=True),
    "vgg-bn": Case(partial(small_vgg, True), 16, draws=True),
    "densenet": Case(lambda: DenseNet(8, (2, 2), 16, num_classes=CLASSES)),
    "efficientnet": Case(small_efficientnet, draws=True),
    "shufflenet": Case(lambda: ShuffleNetV2([2, 2, 2], [8, 8, 16, 16, 32], num_classes=CLASSES), 64),
    "mobilenet-v3": Case(small_mobilenet, draws=True, plain=False),
    "convnext": Case(small_convnext, draws=True),
    "vit": Case(
        lambda: VisionTransformer(32, 16, 2, 2, 12, 16, dropout=0.1, attention_dropout=0.1, num_classes=CLASSES),
        draws=True,
    ),
    "swin": Case(
        lambda: SwinTransformer([4, 4], 8, [1, 2], [2, 2], [2, 2], stochastic_depth_prob=0.4, num_classes=CLASSES),
        draws=True,
        path="vmap",
    ),
}
FULL = {
    "resnet18": Case(models.resnet18, 64),
    "resnet50": Case(models.resnet50, 64),
    "vgg16": Case(models.vgg16, draws=True),
    # thirteen normalisations of one image on top of each other: 4e-10 at 64 pixels, 6e-10 at 96
    "vgg16_bn": Case(models.vgg16_bn, 64, draws=True, tolerance=1e-9),
    "densenet121": Case(models.densenet121, 64),
    "efficientnet_b0": Case(models.efficientnet_b0, 64, draws=True),
    "shufflenet_v2_x0_5": Case(models.shufflenet_v2_x0_5, 64),
    "shufflenet_v2_x1_0": Case(models.shufflenet_v2_x1_0, 64),
    "mobilenet_v3_small": Case(models.mobilenet_v3_small, 64, draws=True, plain=False),
    "convnext_tiny": Case(models.convnext_tiny, draws=True),
    "vit_b_16": Case(partial(models.vit_b_16, image_size=32)),
}


@dataclass(frozen=True)
class Derivatives:
    """What an attack uses of a network: the gradient by parameters, and the derivative of a distance by the image."""

    gradient: Gradient
    by_image: Tensor


def network(case: Case, mode: str) -> nn.Module:
    """Return a network whose parameters are all in use: no head of zeros, no scale of a millionth."""
    torch.manual_seed(0)
    net = case.make() if case in SMALL.values() else case.make(num_classes=CLASSES)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim < 2 or parameter.abs().max() < 1e-4:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return net.train(mode == "train")


def trial_tensors(net: nn.Module, weights: str) -> dict[str, Tensor]:
    tensors = dict(net.named_buffers())
    for name, p in net.named_parameters():
        p = p.detach()
        tensors[name] = p.expand(2, *p.shape) if weights == "shared" else torch.stack([p, 0.9 * p + 0.01 * p.mean()])
    return tensors


def weighed(gradient: Gradient) -> Tensor:
    """Return a distance that weighs every entry differently, so that no error can cancel."""
    parts = [(g.flatten(1).square() * (1 + torch.arange(g[0].numel()) % 5)).sum() for g in gradient.values()]
    return torch.stack(parts).sum()


def derivatives(net: nn.Module, path: Path, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Derivatives:
    evaluator = Evaluator(net, tuple(name for name, _ in net.named_parameters()), path=path)
    probe = x.clone().requires_grad_()
    gradient = evaluator.gradient(tensors, probe, y, generators=lambda: [generator("mask", t) for t in range(len(x))])
    (by_image,) = torch.autograd.grad(weighed(gradient), probe)
    return Derivatives({name: g.detach() for name, g in gradient.items()}, by_image)


def untouched(net: nn.Module, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Derivatives:
    """Return the derivatives by plain torch, of copies that hold their own values."""
    rows, by_image = [], []
    for t in range(len(x)):
        own = copy.deepcopy(net)
        with torch.no_grad():
            for name, value in tensors_of(own).items():
                value.copy_(tensors[name][t] if tensors[name].ndim > value.ndim else tensors[name])
        probe = x[t : t + 1].clone().requires_grad_()
        names, parameters = zip(*own.named_parameters())
        with sdpa_kernel(SDPBackend.MATH):  # torch differentiates its other kernels once
            loss = plain_loss(own, probe, y[t : t + 1]).sum()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        rows.append({name: grad[None] for name, grad in zip(names, grads)})
        by_image.append(torch.autograd.grad(weighed(rows[-1]), probe)[0])
    return Derivatives({name: torch.cat([row[name].detach() for row in rows]) for name in rows[0]}, torch.cat(by_image))


def error(got: Derivatives, expected: Derivatives) -> float:
    """Return the largest relative error, of a tensor's gradient or of the derivative by the image.

    A bias before a normalisation has the gradient 0 up to rounding; it is compared on the scale of all entries.
    """
    whole = float(torch.stack([g.norm() for g in expected.gradient.values()]).norm())
    errors = [
        float((got.gradient[name] - g).norm()) / max(float(g.norm()), 1e-6 * whole)
        for name, g in expected.gradient.items()
    ]
    assert float(expected.by_image.flatten(1).norm(dim=1).min()) > 0
    return max(*errors, float((got.by_image - expected.by_image).norm() / expected.by_image.norm()))


def check(case: Case, mode: str, weights: str) -> None:
    net = network(case, mode)
    tensors = trial_tensors(net, weights)
    x, y = rand(2, 3, case.pixels, case.pixels, seed=5), torch.softmax(randn(2, CLASSES, seed=3), 1)
    names = tuple(name for name, _ in net.named_parameters())
    assert choose_path(Evaluator(net, names), tensors, tuple(x.shape[1:]), CLASSES) == case.path
    slow = derivatives(net, "one-at-a-time", tensors, x, y)
    assert error(derivatives(net, case.path, tensors, x, y), slow) <= case.tolerance
    if case.plain and (mode == "eval" or not case.draws):
        assert error(slow, untouched(net, tensors, x, y)) <= case.tolerance


@pytest.mark.parametrize("weights", ["shared", "own"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", SMALL)
def test_small_networks(name: str, mode: str, weights: str) -> None:
    check(SMALL[name], mode, weights)


@pytest.mark.full
@pytest.mark.parametrize("weights", ["shared", "own"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FULL)
def test_networks_of_full_size(name: str, mode: str, weights: str) -> None:
    check(FULL[name], mode, weights)
