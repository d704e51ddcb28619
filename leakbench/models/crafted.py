"""What a malicious server makes of a network before it hands it out: linear layers that keep a batch's images apart.

Each kind acts on the network's own first linear layer if that takes the pixels; in front of any other network it puts a
block of its own.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.core.component import Component, Count
from leakbench.core.registry import Registry
from leakbench.core.rng import generator, seeded
from leakbench.errors import Unsupported
from leakbench.gradients.layer_inputs import first_layer
from leakbench.models.base import Model

BLOCK = "block"
"""The name of a block that was put in front of a network."""

PROBES = 4
"""How many public images a crafted layer of the network's own is tried on."""

TOLERANCE = 1e-3
"""Up to which relative difference the errors of two rows count as equal."""


class Server(Component):
    """What the server does to the network that it hands out."""

    def craft(self, network: nn.Module, public: Tensor) -> nn.Module:
        """Return the network that the server hands out, made from a copy of ``network``.

        Args:
            network: maps images to logits; it is not changed.
            public: [P, C, H, W] in [0, 1], images of the same kind as the clients', none of which is attacked.
        """
        return network


registry: Registry[Server] = Registry("server", "leakbench.servers", Server)


@registry.register("honest")
@dataclass(frozen=True)
class Honest(Server):
    """The server hands out the network as it is."""


@registry.register("imprint")
@dataclass(frozen=True)
class Imprint(Server):
    """Every row of a linear layer measures the same functional of the image, with thresholds that are its quantiles.

    Row r is active for the images whose measurement is above the r-th quantile. The gradients of two neighbouring rows
    therefore differ by the images between two quantiles; of one image, the difference of the weights' gradients divided
    by that of the biases' is the image. The next layer treats all rows alike.

    Attributes:
        bins: how many rows measure; at most as many as the network's own layer has.
        functional: ``mean``, the brightness, or ``random``, a direction drawn from a normal distribution.
    """

    reference: ClassVar[str] = (
        "Fowl, Geiping, Czaja, Goldblum and Goldstein 2022, Robbing the Fed: Directly Obtaining Private Data in "
        "Federated Learning with Modified Models, ICLR, arXiv 2110.13057"
    )
    bins: Annotated[int, Field(ge=2, le=65536)] = 512
    functional: Literal["mean", "random"] = "mean"

    def craft(self, network: nn.Module, public: Tensor) -> nn.Module:
        """Return the network with an imprinted layer, whose thresholds are quantiles of the public images."""
        network = copy.deepcopy(network)
        own = _own_layer(network, public)
        if own is not None:
            layer, following = own.layer, own.following
            before = copy.deepcopy((layer.state_dict(), following.state_dict()))
            self._fill(layer, own)
            with torch.no_grad():  # the first column is that of every row
                following.weight.copy_(following.weight[:, :1].expand_as(following.weight))
            if _alike(network, layer, public):
                return network
            layer.load_state_dict(before[0])
            following.load_state_dict(before[1])
        block = CraftedBlock(tuple(public.shape[1:]), self.bins, 1)
        self._fill(block.measure, _pixels_of(block, public))
        return in_front(block, network)

    def _fill(self, layer: nn.Linear, own: PixelLayer) -> None:
        """Write the rows and thresholds of a layer that takes the pixels as ``own`` says."""
        size = own.pixels.shape[1]
        row = torch.full((size,), 1.0 / size, dtype=torch.float64)
        if self.functional == "random":
            row = torch.randn(size, generator=generator("imprint", size), dtype=torch.float64) / size
        bins = min(self.bins, layer.out_features)
        values = own.pixels @ row
        edges = torch.quantile(values, torch.arange(bins, dtype=torch.float64) / bins)
        edges[0] = float(values.min()) - (float(values.max()) - float(values.min()))  # below any image
        weight = torch.zeros(layer.weight.shape, dtype=torch.float64)
        bias = torch.full(layer.bias.shape, -1.0, dtype=torch.float64)
        weight[:bins], bias[:bins] = own.on_pixels(row.expand(bins, size), -edges)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


@registry.register("trap")
@dataclass(frozen=True)
class Trap(Server):
    """Rows of a linear layer that are active for few images: half of the entries negative, the others a bit smaller.

    Of each row a random half of the entries is -|z| with normal z, and the other half the same values with the opposite
    sign, times ``scale`` < 1. The row's value is below zero for most images; where it is active for one image of the
    batch only, the weight's gradient divided by the bias's is that image.

    Attributes:
        scale: of the positive half; the smaller, the fewer images activate a row.
        rows: how many rows a block in front of the network has; the network's own layer keeps its number.
    """

    reference: ClassVar[str] = (
        "Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov and Papernot 2023, When the Curious Abandon Honesty: "
        "Federated Learning Is Not Private, IEEE EuroS&P, arXiv 2112.02918"
    )
    scale: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.97
    rows: Count = 512

    def craft(self, network: nn.Module, public: Tensor) -> nn.Module:
        """Return the network with a layer of trap weights."""
        network = copy.deepcopy(network)
        own = _own_layer(network, public)
        if own is not None:
            self._fill(own.layer, own)
            return network
        block = CraftedBlock(tuple(public.shape[1:]), self.rows, self.rows)
        self._fill(block.measure, _pixels_of(block, public))
        return in_front(block, network)

    def _fill(self, layer: nn.Linear, own: PixelLayer) -> None:
        """Write the rows of a layer that takes the pixels as ``own`` says."""
        rows, size = layer.weight.shape
        rng = generator("trap", rows, size)
        half = size // 2
        values = torch.randn(rows, half, generator=rng, dtype=torch.float64).abs() / size**0.5
        order = torch.rand(rows, size, generator=rng).argsort(1)
        weight = torch.zeros(rows, size, dtype=torch.float64)
        weight.scatter_(1, order[:, :half], -values)
        weight.scatter_(1, order[:, half : 2 * half], self.scale * values)
        weight, bias = own.on_pixels(weight, torch.zeros(rows, dtype=torch.float64))
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)


def parse(spec: str) -> Server:
    """Return the server of a spec such as ``imprint(bins=512)``; raise BadOption if it is none."""
    return registry.parse(spec)


spec = registry.spec


class CraftedBlock(nn.Module):
    """A linear layer on the pixels with a ReLU, which is added to the image.

    Args:
        image_shape: (C, H, W).
        rows: how many values the layer measures.
        outputs: as many as the rows, each of which is added along a direction of its own; or 1, their mean along one.
    """

    def __init__(self, image_shape: tuple[int, ...], rows: int, outputs: int) -> None:
        super().__init__()
        size = prod(image_shape)
        with seeded(BLOCK, rows, outputs):
            self.measure = nn.Linear(size, rows)
            self.spread = nn.Linear(outputs, size, bias=False)
        with torch.no_grad():
            self.spread.weight.copy_(torch.randn(size, outputs, generator=generator(BLOCK, size)) / outputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return images [B, C, H, W], moved by what was measured."""
        active = F.relu(self.measure(x.flatten(1)))
        if self.spread.in_features == 1:
            active = active.mean(1, keepdim=True)
        return x + self.spread(active).view_as(x)


class Fronted(nn.Module):
    """A network behind a block.

    Args:
        block: from images to images.
        network: from images to logits.
    """

    def __init__(self, block: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the network's logits for what the block makes of the images."""
        return self.network(self.block(x))


def in_front(block: CraftedBlock, network: nn.Module) -> Fronted:
    """Return a network behind a block of its type, in its mode."""
    return Fronted(block.to(_dtype(network)), network).train(network.training)


@dataclass(frozen=True)
class PixelLayer:
    """A linear layer that takes the pixels: its input is ``slope`` times a pixel plus ``shift``, in any order.

    Attributes:
        layer: the layer.
        following: the linear layer that runs next.
        pixels: [P, D] float64, the public images in the order in which the layer takes them.
        slope: [D], likewise ``shift``.
    """

    layer: nn.Linear
    following: nn.Linear
    pixels: Tensor
    slope: Tensor
    shift: Tensor

    def on_pixels(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows that measure of the layer's input what these, [M, D] and [M], measure of the pixels."""
        weight = weight / self.slope
        return weight, bias - weight @ self.shift


def _pixels_of(block: CraftedBlock, public: Tensor) -> PixelLayer:
    """Return the layer of a block, which takes the pixels as they are."""
    pixels = public.flatten(1).double()
    return PixelLayer(block.measure, block.spread, pixels, torch.ones_like(pixels[0]), torch.zeros_like(pixels[0]))


def _own_layer(network: nn.Module, public: Tensor) -> PixelLayer | None:
    """Return the first layer if it is linear with a bias, takes the pixels, and another linear layer follows."""
    size = public[0].numel()
    probe = copy.deepcopy(network).eval()
    ends = torch.stack([torch.zeros_like(public[0]), torch.ones_like(public[0])])
    images = torch.cat([ends, public]).to(_dtype(network))
    order: list[str] = []
    for name, module in probe.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(functools.partial(_note, order, name))
    found = first_layer(probe, images)
    if found is None or not isinstance(found[0], nn.Linear) or found[0].bias is None:
        return None
    if found[1].shape != (len(images), size):
        return None
    with torch.no_grad():
        probe(ends.to(images))
    taken = found[1].double()
    slope, shift = taken[1] - taken[0], taken[0]
    names = list(dict.fromkeys(order))
    if len(names) < 2 or not bool(slope.ne(0).all()):
        return None
    first, second = (network.get_submodule(name) for name in names[:2])
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    if second.in_features != first.out_features:
        return None
    return PixelLayer(first, second, (taken[2:] - shift) / slope, slope, shift)


def _dtype(network: nn.Module) -> torch.dtype:
    return next((value.dtype for value in network.parameters() if value.is_floating_point()), torch.float32)


def _note(order: list[str], name: str, *_: object) -> None:
    """Note that a layer runs."""
    order.append(name)


def _alike(network: nn.Module, layer: nn.Linear, public: Tensor) -> bool:
    """Return whether, of each of some public images, all active rows of a layer have the same error."""
    probe = copy.deepcopy(network).eval()
    name = next(name for name, module in network.named_modules() if module is layer)
    own = probe.get_submodule(name)
    assert isinstance(own, nn.Linear)
    kind = own.weight.dtype
    for image in public[:PROBES]:
        logits = probe(image[None].to(kind))
        loss = F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64))
        (error,) = torch.autograd.grad(loss, [own.bias])
        active = error[error != 0]
        if not len(active) or float((active - active.mean()).abs().max()) > TOLERANCE * float(active.abs().max()):
            return False
    return True


def handed_out(network: nn.Module, server: str, public: Tensor) -> nn.Module:
    """Return the network that a server of this spec hands out; the network itself if the server is honest."""
    return parse(server).craft(network, public)


@dataclass(frozen=True)
class HandedOut(Model):
    """A model as a malicious server hands it out.

    Attributes:
        inner: the model.
        server: what crafts its networks.
        public: [P, C, H, W] in [0, 1], the server's images of the clients' kind.
    """

    inner: Model
    server: Server
    public: Tensor = field(repr=False, compare=False)

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the crafted network; see ``Model.build``.

        Raises:
            Unsupported: the inner model is a checkpoint of a network behind a defense, which has other layers.
        """
        checkpoint = self.inner.checkpoint()
        if checkpoint is not None and checkpoint.defense:
            raise Unsupported(
                f"the checkpoint {checkpoint.file!r} is of a network behind {checkpoint.defense!r}, and server="
                f"{spec(self.server)} would change its layers; use server=honest"
            )
        return self.server.craft(self.inner.build(image_shape, num_classes), self.public)

    def fresh_weights(self) -> bool:
        """Return whether every trial has its own weights."""
        return self.inner.fresh_weights()


def expected_alone(bins: int, batch: int) -> float:
    """Return (1 - 1/bins)^(batch - 1): the chance that an image has its bin for itself (Fowl et al. 2022)."""
    return (1.0 - 1.0 / bins) ** (batch - 1)
