"""The chain of layers between the image and the lowest linear layer whose gradient gives its input away.

A linear layer s = W f + b on one image has dL/dW = (dL/db) f^T and dL/df = W^T dL/db. So where both gradients were sent,
its input f and the error dL/df at it are known, whatever stands above. Below it a layer can be undone only if nothing
but that layer takes its input, and only if it is of a kind that is known here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from leakbench.defenses.keylock import KeyLock
from leakbench.errors import Unsupported
from leakbench.gradients.convolution import Geometry, convolve
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.intercept import batch_norm
from leakbench.rng import generator, seeded
from leakbench.types import Observation

Shape = tuple[int, ...]
Curve = Literal["sigmoid", "tanh", "leaky-relu", "elu", "softplus"]

TOLERANCE = 1e-9
"""How far the chain may be from the network on a random image in float64, relative to the values."""


@dataclass(frozen=True)
class Convolution:
    """A 2-d convolution, or a linear layer (an image of one pixel): weight [O, C / groups, kh, kw], maybe a bias."""

    name: str
    weight: str
    bias: str | None
    geometry: Geometry
    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]

    def kernel(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the weight, or its gradient, as [T, O, C / groups, kh, kw]."""
        value = tensors[self.weight]
        return value.reshape(len(value), self.outputs[0], -1, *self.geometry.kernel)

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return [T, O, h, w] for [T, C, H, W]."""
        out = convolve(x.view(-1, *self.inputs), self.kernel(tensors), self.geometry)
        return out if self.bias is None else out + tensors[self.bias][..., None, None]


@dataclass(frozen=True)
class Normalisation:
    """Batch normalisation of one image by its own statistics; its scale and shift are public, none, or secret.

    Attributes:
        weight: the name of the scale; None where it is 1 or secret.
        bias: the name of the shift; None where it is 0 or secret.
        secret: scale and shift are not known.
    """

    name: str
    weight: str | None
    bias: str | None
    eps: float
    secret: bool

    def coefficients(self, tensors: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift [T, C] of a layer whose they are public; like: [T, C, ...]."""
        shape = like.shape[:2]
        scale = like.new_ones(shape) if self.weight is None else tensors[self.weight].expand(shape)
        shift = like.new_zeros(shape) if self.bias is None else tensors[self.bias].expand(shape)
        return scale, shift

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scaled and shifted normalisation of [T, C, H, W]; secrets are in ``tensors`` by the layer's name."""
        secret = (tensors[f"{self.name}:scale"], tensors[f"{self.name}:shift"]) if self.secret else None
        scale, shift = secret or self.coefficients(tensors, x)
        return batch_norm(x, None, None, scale, shift, True, eps=self.eps)


@dataclass(frozen=True)
class Scaling:
    """Batch normalisation by its running statistics: a public scale and shift for each channel."""

    name: str
    norm: Normalisation

    def coefficients(self, tensors: Mapping[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift [T, C]; like: [T, C, ...]."""
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
        parameter: the slope of leaky ReLU below 0, the alpha of ELU, the beta of softplus.
    """

    name: str
    curve: Curve
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
        """Return x, f'(x) and df'/dy for outputs y, which are moved into the range, a margin from its ends."""
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
            below = torch.log1p(y.clamp(max=0) / self.parameter)
            return torch.where(y > 0, y, below), torch.where(y > 0, one, y + self.parameter), (y <= 0) * one
        y = torch.maximum(margin, y) * self.parameter
        decay = torch.exp(-y)
        return (y + torch.log1p(-decay)) / self.parameter, 1 - decay, self.parameter * decay


@dataclass(frozen=True)
class Reshape:
    """The same values, in the same order, in another shape: what it takes of one image."""

    name: str
    inputs: Shape

    def forward(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return [T, N]; every layer brings its input into its own shape."""
        return x.flatten(1)


Layer = Convolution | Normalisation | Scaling | Activation | Reshape


@dataclass(frozen=True)
class Chain:
    """The layers from the image upwards, and the names of the linear layer above them."""

    layers: tuple[Layer, ...]
    weight: str
    bias: str


def find_chain(observation: Observation) -> Chain:
    """Return the chain of a network, after checking on a random image that it computes what the network does.

    Raises:
        Unsupported: there is no such chain; the message names the layer that stands in its way.
    """
    twin = _filled(observation)
    try:
        graph = _Tracer().trace(twin)
    except Exception as error:  # whatever a forward that depends on its data, or that torch.fx does not know, raises
        raise Unsupported(
            f"peel cannot follow {type(twin).__name__}: {' '.join(str(error).split())}; "
            "write its forward without branches on the data"
        ) from error
    image = torch.rand((1, *observation.image_shape), generator=generator("peel"), dtype=torch.float64)
    run = fx.Interpreter(fx.GraphModule(twin, graph), garbage_collect_values=False)
    with torch.no_grad(), seeded("peel"):
        run.run(image)
    chain, last = _walk(observation, twin, graph, {node: value for node, value in run.env.items()})
    _check(chain, twin, image, run.env[last])
    return chain


class _Tracer(fx.Tracer):
    """A tracer that takes every layer of torch's, and key-lock's, for what it is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, KeyLock) or super().is_leaf_module(m, module_qualified_name)


def _filled(observation: Observation) -> nn.Module:
    """Return the network of the first trial in float64 on the CPU, with draws in the place of hidden secrets."""
    twin = copy.deepcopy(observation.model).to_empty(device="cpu").double()
    own = tensors_of(twin)
    hidden = {secret.name: secret.law for secret in observation.secrets}
    with torch.no_grad():
        for name, tensor in own.items():
            if name in hidden:
                tensor.copy_(hidden[name].draw(tuple(tensor.shape), generator("peel", name)))
            else:
                value = observation.weights[name]
                tensor.copy_(value[0] if value.ndim > tensor.ndim else value)
    return twin


def _walk(
    observation: Observation, twin: nn.Module, graph: fx.Graph, values: Mapping[fx.Node, object]
) -> tuple[Chain, fx.Node]:
    """Follow the image upwards until a linear layer that gives its input away; return the node of that input too."""
    modules = dict(twin.named_modules())
    uses = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    node = next(node for node in graph.nodes if node.op == "placeholder")
    layers: list[Layer] = []
    while True:
        users = [user for user in node.users if not _reads_shape(user)]
        if len(users) != 1 or users[0].op == "output":
            what = "goes to no layer" if len(users) != 1 and not users else "takes several ways (a residual connection)"
            if users and users[0].op == "output":
                what = "is the output, and no linear layer sent the gradients of its weight and its bias"
            raise Unsupported(f"peel goes back through a chain of layers, and what {node.name} returns {what}")
        (user,) = users
        if any(not _reads_shape(other) and other is not node for other in user.all_input_nodes):
            raise Unsupported(f"peel goes back through a chain of layers, and {user.name} takes several tensors")
        before, after = values[node], values[user]
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            raise Unsupported(f"peel goes back through a chain of layers, and {user.name} returns no tensor")
        name = str(user.target)
        module = modules[name] if user.op == "call_module" else None
        if module is not None and uses.count(name) > 1:
            raise Unsupported(f"peel needs layers that run once, and {name} runs {uses.count(name)} times")
        if isinstance(module, nn.Linear) and before.ndim == 2:
            weight, bias = f"{name}.weight", f"{name}.bias"
            if weight in observation.gradient and bias in observation.gradient:
                return Chain(tuple(layers), weight, bias), node
        layer = _module_layer(name, module, before, after) if module is not None else _function_layer(user, before)
        layers += [] if layer is None else [layer]
        _check_order(layers)
        node = user


def _reads_shape(node: fx.Node) -> bool:
    """Return whether a node looks at a tensor's shape alone."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(_reads_shape(other) for other in inputs)


def _module_layer(name: str, module: nn.Module, before: Tensor, after: Tensor) -> Layer | None:
    """Return the layer that a module is; None for the identity."""
    if type(module) is nn.Conv2d:
        return _convolution(name, module, before, after)
    if type(module) is nn.Linear and before.ndim == 2:
        return Convolution(
            name=name,
            weight=f"{name}.weight",
            bias=None if module.bias is None else f"{name}.bias",
            geometry=Geometry((1, 1), (0, 0), (1, 1), 1, (1, 1), (1, 1)),
            inputs=(module.in_features, 1, 1),
            outputs=(module.out_features, 1, 1),
        )
    if isinstance(module, KeyLock) or type(module) is nn.BatchNorm2d:
        return _normalisation(name, module)
    if type(module) in _CURVES:
        curve, read = _CURVES[type(module)]
        return _activation(name, curve, read(module))
    if type(module) is nn.Flatten and after.ndim == 2:
        return Reshape(name, tuple(before.shape[1:]))
    if type(module) is nn.Unflatten:
        return Reshape(name, tuple(before.shape[1:]))
    if type(module) is nn.Identity or (isinstance(module, _DROPOUT) and (module.p == 0 or not module.training)):
        return None
    raise _unknown(name, type(module).__name__)


def _convolution(name: str, module: nn.Conv2d, before: Tensor, after: Tensor) -> Convolution:
    spread = tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size))
    if module.padding_mode != "zeros" or (module.padding == "same" and any(total % 2 for total in spread)):
        raise Unsupported(f"peel needs zeros around an image, as many on each side; {name} pads otherwise")
    names = {"valid": (0, 0), "same": tuple(total // 2 for total in spread)}
    padding = names[module.padding] if isinstance(module.padding, str) else module.padding
    return Convolution(
        name=name,
        weight=f"{name}.weight",
        bias=None if module.bias is None else f"{name}.bias",
        geometry=Geometry(
            (module.stride[0], module.stride[1]),
            (padding[0], padding[1]),
            (module.dilation[0], module.dilation[1]),
            module.groups,
            (before.shape[2], before.shape[3]),
            (module.kernel_size[0], module.kernel_size[1]),
        ),
        inputs=(before.shape[1], before.shape[2], before.shape[3]),
        outputs=(after.shape[1], after.shape[2], after.shape[3]),
    )


def _normalisation(name: str, module: KeyLock | nn.BatchNorm2d) -> Normalisation | Scaling:
    norm = module.norm if isinstance(module, KeyLock) else module
    named = isinstance(module, nn.BatchNorm2d) and module.affine
    known = Normalisation(
        name=name,
        weight=f"{name}.weight" if named else None,
        bias=f"{name}.bias" if named else None,
        eps=norm.eps,
        secret=isinstance(module, KeyLock),
    )
    if norm.training or norm.running_mean is None:
        return known
    if known.secret:
        raise Unsupported(
            f"peel finds a secret scale and shift by the statistics of one image; {name} normalises by running ones"
        )
    return Scaling(name, known)


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
_CURVES: Mapping[type[nn.Module], tuple[Curve, Callable[[nn.Module], float]]] = {
    nn.Sigmoid: ("sigmoid", lambda module: 1.0),
    nn.Tanh: ("tanh", lambda module: 1.0),
    nn.LeakyReLU: ("leaky-relu", lambda module: float(module.negative_slope)),  # type: ignore[arg-type]
    nn.ELU: ("elu", lambda module: float(module.alpha)),  # type: ignore[arg-type]
    nn.Softplus: ("softplus", lambda module: float(module.beta)),  # type: ignore[arg-type]
}


def _activation(name: str, curve: Curve, parameter: float) -> Activation:
    if not (parameter > 0 and math.isfinite(parameter)):
        raise Unsupported(f"peel needs an invertible activation, and {name} ({curve}) has the parameter {parameter:g}")
    return Activation(name, curve, parameter)


_FUNCTIONS: Mapping[object, Curve] = {
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    "tanh": "tanh",
    F.leaky_relu: "leaky-relu",
    F.elu: "elu",
    F.softplus: "softplus",
}
_DEFAULTS: Mapping[Curve, float] = {"leaky-relu": 0.01}
_PARAMETERS = {"leaky-relu": "negative_slope", "elu": "alpha", "softplus": "beta"}
_RESHAPES = (torch.flatten, torch.reshape, "flatten", "reshape", "view")


def _function_layer(node: fx.Node, before: Tensor) -> Layer | None:
    """Return the layer that a function or a tensor's method is; None for the identity."""
    if node.target in _RESHAPES:
        return Reshape(node.name, tuple(before.shape[1:]))
    if node.target == "contiguous":
        return None
    if node.target in (F.dropout, F.dropout2d) and not node.kwargs.get("training", True):
        return None
    curve = _FUNCTIONS.get(node.target)
    if curve is None:
        raise _unknown(node.name, str(getattr(node.target, "__name__", node.target)))
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get(_PARAMETERS.get(curve, ""))
    if given is not None and not isinstance(given, (int, float)):
        raise _unknown(node.name, curve)
    return _activation(node.name, curve, _DEFAULTS.get(curve, 1.0) if given is None else float(given))


def _unknown(name: str, kind: str) -> Unsupported:
    reason = next((why for word, why in _REASONS.items() if word in kind.lower()), "it is none of the layers it knows")
    return Unsupported(
        f"peel cannot go back through {name} ({kind}): {reason}; it takes convolutions, linear layers, sigmoid, tanh, "
        "leaky ReLU, ELU, softplus and batch normalisation"
    )


_REASONS = {
    "pool": "pooling loses information",
    "relu": "it is not invertible",
    "gelu": "it is not invertible",
    "silu": "it is not invertible",
    "dropout": "which units it dropped is not known",
    "add": "a residual connection makes no chain",
}


def _check_order(layers: list[Layer]) -> None:
    """Raise Unsupported where the newest layer is a normalisation that does not follow a convolution."""
    if isinstance(layers[-1] if layers else None, Normalisation):
        if len(layers) < 2 or not isinstance(layers[-2], Convolution):
            raise Unsupported(f"peel needs a convolution right before a normalisation; {layers[-1].name} has none")


def _check(chain: Chain, twin: nn.Module, image: Tensor, features: object) -> None:
    """Raise Unsupported where the chain does not compute what the network does."""
    tensors = {name: value.detach()[None] for name, value in tensors_of(twin).items()}
    for name, module in twin.named_modules():
        if isinstance(module, KeyLock):
            scale, shift = module.coefficients()
            tensors |= {f"{name}:scale": scale.detach()[None], f"{name}:shift": shift.detach()[None]}
    value = image
    for layer in chain.layers:
        value = layer.forward(value, tensors)
    assert isinstance(features, Tensor)
    error = (value.flatten() - features.flatten()).norm() if value.numel() == features.numel() else math.inf
    if not error <= TOLERANCE * features.norm():
        raise Unsupported("peel's chain of layers does not compute what the network does (a hook, or a custom layer)")
