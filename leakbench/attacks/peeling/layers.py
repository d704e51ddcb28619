"""The layers that can be undone, each with its forward pass; T trials, whose tensors are named as in the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.gradients.convolution import convolve
from leakbench.gradients.intercept import batch_norm
from leakbench.gradients.lanes.geometry import Geometry

ActivationKind = Literal["sigmoid", "tanh", "leaky-relu", "elu", "softplus"]


@dataclass(frozen=True)
class Convolution:
    """A 2-d convolution, or a linear layer as one of an image of one pixel.

    Attributes:
        name: the module's.
        weight: the parameter's.
        bias: the parameter's; None without one.
        geometry: strides, padding, groups, sizes.
        inputs: (C, H, W) of its input.
        outputs: (O, h, w) of its output.
    """

    name: str
    weight: str
    bias: str | None
    geometry: Geometry
    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]

    def kernel(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight (or, from gradients, that by it) as [T, O, C / groups, kh, kw]."""
        value = tensors[self.weight]
        return value.reshape(len(value), self.outputs[0], -1, *self.geometry.kernel)

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return [T, O, h, w] for [T, C, H, W]."""
        out = convolve(x.reshape(-1, *self.inputs), self.kernel(tensors), self.geometry)
        return out if self.bias is None else out + tensors[self.bias][..., None, None]


@dataclass(frozen=True)
class Normalisation:
    """Batch normalisation of one image by its own statistics, scaled and shifted.

    Attributes:
        name: the module's.
        weight: the scale's; None if it is 1 or secret.
        bias: the shift's; None if it is 0 or secret.
        eps: added to a channel's variance.
        secret: scale and shift are secret.
    """

    name: str
    weight: str | None
    bias: str | None
    eps: float
    secret: bool

    def coefficients(self, tensors: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift [T, C] for an input like [T, C, ...]; secret ones are NAME:scale and NAME:shift."""
        weight, bias = (f"{self.name}:scale", f"{self.name}:shift") if self.secret else (self.weight, self.bias)
        shape = like.shape[:2]
        scale = like.new_ones(shape) if weight is None else tensors[weight].expand(shape)
        shift = like.new_zeros(shape) if bias is None else tensors[bias].expand(shape)
        return scale, shift

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return [T, C, H, W]."""
        return batch_norm(x, None, None, *self.coefficients(tensors, x), True, eps=self.eps)


@dataclass(frozen=True)
class Scaling:
    """Batch normalisation by its running statistics: a public scale and shift of each channel.

    Attributes:
        name: the module's.
        norm: the same layer, as it would normalise by an image's own statistics.
    """

    name: str
    norm: Normalisation

    def coefficients(self, tensors: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift [T, C] for an input like [T, C, ...]."""
        scale, shift = self.norm.coefficients(tensors, like)
        mean, variance = tensors[f"{self.name}.running_mean"], tensors[f"{self.name}.running_var"]
        scale = scale * torch.rsqrt(variance + self.norm.eps)
        return scale, shift - mean * scale

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return [T, C, H, W]."""
        scale, shift = self.coefficients(tensors, x)
        return scale[..., None, None] * x + shift[..., None, None]


@dataclass(frozen=True)
class Activation:
    """An increasing activation y = f(x).

    Attributes:
        name: the module's.
        curve: which one.
        parameter: the slope of leaky ReLU below 0, the alpha of ELU, the beta of softplus.
    """

    name: str
    curve: ActivationKind
    parameter: float = 1.0

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return f(x)."""
        if self.curve == "sigmoid":
            return torch.sigmoid(x)
        if self.curve == "tanh":
            return torch.tanh(x)
        if self.curve == "leaky-relu":
            return F.leaky_relu(x, self.parameter)
        return F.elu(x, self.parameter) if self.curve == "elu" else F.softplus(x, self.parameter, 40.0)

    def invert(self, y: Tensor, margin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, f'(x) and df'/dy for outputs y, which are first moved into f's range, a margin from its ends."""
        one = torch.ones_like(y)
        if self.curve == "sigmoid":
            edge = margin.clamp(max=0.25)
            y = torch.maximum(edge, torch.minimum(1 - edge, y))
            return y.logit(), y * (1 - y), 1 - 2 * y
        if self.curve == "tanh":
            edge = 1 - margin.clamp(max=0.5)
            y = torch.maximum(-edge, torch.minimum(edge, y))
            return y.atanh(), 1 - y.square(), -2 * y
        if self.curve == "leaky-relu":
            slope = torch.where(y > 0, one, self.parameter * one)
            return y / slope, slope, 0 * one
        if self.curve == "elu":
            y = torch.maximum(margin.clamp(max=self.parameter / 2) - self.parameter, y)
            x = torch.where(y > 0, y, torch.log1p(y.clamp(max=0) / self.parameter))
            return x, torch.where(y > 0, one, y + self.parameter), torch.where(y > 0, 0 * one, one)
        scaled = torch.maximum(margin, y) * self.parameter
        decay = torch.exp(-scaled)
        return (scaled + torch.log1p(-decay)) / self.parameter, 1 - decay, self.parameter * decay


@dataclass(frozen=True)
class Reshape:
    """The same values in the same order, in another shape.

    Attributes:
        name: the module's or the function's.
        inputs: the shape of its input, of one image.
    """

    name: str
    inputs: tuple[int, ...]

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return [T, N]; a convolution takes its input in its own shape."""
        return x.flatten(1)


@dataclass(frozen=True)
class Dropout:
    """Dropout whose mask follows from the gradient: of values or of whole channels.

    Attributes:
        name: the module's or the function's.
        kept: the name of the mask among the tensors, [T, 1, *shape] of 0 and 1.
        p: the probability with which a value is dropped; the others are divided by 1 - p.
        inputs: the shape of its input, of one image.
    """

    name: str
    kept: str
    p: float
    inputs: tuple[int, ...]

    def mask(self, like: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what is kept of values ``like`` [T, ...], as bool of their shape."""
        kept = tensors[self.kept].flatten(0, 1).bool()
        kept = kept.view(*kept.shape, *[1] * (1 + len(self.inputs) - kept.ndim))
        return kept.expand(len(kept), *self.inputs).reshape(like.shape)

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the kept values over 1 - p, and else 0."""
        return x * self.mask(x, tensors) / (1 - self.p)


ChainLayer = Convolution | Normalisation | Scaling | Activation | Reshape | Dropout
