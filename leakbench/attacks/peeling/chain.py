"""The chain of layers between the image and the lowest linear layer whose gradient leaks its input.

A linear layer s = W f + b on one image has dL/dW = (dL/db) f^T and dL/df = W^T dL/db. So if both gradients were
sent, its input f and the error dL/df at it are known, whatever is above. Below it a layer can be undone only if
nothing else takes its input, and only if it is of a kind that is known here.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from leakbench.attacks.peeling.layers import (
    Activation,
    ActivationKind,
    ChainLayer,
    Convolution,
    Dropout,
    Normalisation,
    Reshape,
    Scaling,
)
from leakbench.attacks.peeling.trace import Traced, read_convolution, reads_shape, trace
from leakbench.defenses.keylock import KeyLock
from leakbench.errors import Unsupported
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.lanes.geometry import Geometry
from leakbench.observation import Observation

TOLERANCE = 1e-9
"""How far the chain may be from the network on a random image in float64, relative to the values."""


@dataclass(frozen=True)
class Chain:
    """The layers from the image upwards, and the names of the parameters of the linear layer above them.

    ``masks`` are those of its dropout, by the name under which a layer looks them up.
    """

    layers: tuple[ChainLayer, ...]
    weight: str
    bias: str
    masks: Mapping[str, Tensor] = field(default_factory=dict)


def find_chain(observation: Observation) -> Chain:
    """Return the chain of a network, after checking on a random image that it computes what the network does.

    Raises:
        Unsupported: there is no such chain; the message names the layer that prevents it.
    """
    traced = trace(observation)
    chain, last = _walk(observation, traced)
    _check(chain, traced.twin, traced.image, traced.values[last])
    masks = {_kept_name(node): mask for node, (mask, _) in traced.kept.items()}
    return replace(chain, masks={one.kept: masks[one.kept] for one in chain.layers if isinstance(one, Dropout)})


def _walk(observation: Observation, traced: Traced) -> tuple[Chain, fx.Node]:
    """Follow the image upwards until a linear layer gives its input away; return the node of that input too."""
    twin, graph, values = traced.twin, traced.graph, traced.values
    modules = dict(twin.named_modules())
    uses = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    node = next(node for node in graph.nodes if node.op == "placeholder")
    layers: list[ChainLayer] = []
    while True:
        users = [user for user in node.users if not reads_shape(user)]
        if len(users) != 1:
            raise Unsupported(
                f"peel goes back through a chain of layers, and {node.name} goes {len(users)} ways "
                "(a residual connection, or branches)"
            )
        (user,) = users
        if user.op == "output":
            raise Unsupported("peel begins at a linear layer, and none sent the gradients of its weight and its bias")
        before, after = values[node], values[user]
        others = [other for other in user.all_input_nodes if other is not node and not reads_shape(other)]
        if others or not isinstance(before, Tensor) or not isinstance(after, Tensor):
            raise Unsupported(
                f"peel goes back through a chain of layers, and {user.name} takes or gives several tensors"
            )
        name = str(user.target)
        module = modules[name] if user.op == "call_module" else None
        if module is not None and uses.count(name) > 1:
            raise Unsupported(f"peel needs layers that run once, and {name} runs {uses.count(name)} times")
        if isinstance(module, nn.Linear) and before.ndim == 2:
            weight, bias = f"{name}.weight", f"{name}.bias"
            if weight in observation.gradient and bias in observation.gradient:
                return Chain(tuple(layers), weight, bias), node
        layer: ChainLayer | None
        if user in traced.drawn:
            layer = _dropout(traced, user, name if module is not None else user.name, before)
        else:
            layer = _function(user, before) if module is None else _module(name, module, before, after)
        if isinstance(layer, Normalisation) and not (layers and isinstance(layers[-1], Convolution)):
            raise Unsupported(f"peel needs a convolution right before a normalisation, and {name} has none")
        layers += [] if layer is None else [layer]
        node = user


def _dropout(traced: Traced, node: fx.Node, name: str, before: Tensor) -> Dropout:
    """Return the layer of an operation that draws what it keeps."""
    if node not in traced.kept:
        raise Unsupported(
            f"peel cannot go back through {name}, which draws random numbers while clients train: its draws do not "
            "follow from the gradient"
        )
    return Dropout(name, _kept_name(node), traced.kept[node][1], tuple(before.shape[1:]))


def _kept_name(node: fx.Node) -> str:
    """Return the name of what an operation keeps, which no tensor of a network has."""
    return f"{node.name}:kept"


_CURVES: Mapping[type[nn.Module], tuple[ActivationKind, str]] = {
    nn.Sigmoid: ("sigmoid", ""),
    nn.Tanh: ("tanh", ""),
    nn.LeakyReLU: ("leaky-relu", "negative_slope"),
    nn.ELU: ("elu", "alpha"),
    nn.Softplus: ("softplus", "beta"),
}
"""The activations, and the attribute of the module that is their parameter."""


def _module(name: str, module: nn.Module, before: Tensor, after: Tensor) -> ChainLayer | None:
    """Return the layer that a module is; None for the identity."""
    kind = type(module)
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        return read_convolution(name, module, before, after)
    if isinstance(module, nn.Linear) and kind is nn.Linear and before.ndim == 2:
        return Convolution(
            name=name,
            weight=f"{name}.weight",
            bias=None if module.bias is None else f"{name}.bias",
            geometry=Geometry((1, 1), (0, 0), (1, 1), 1, (1, 1), (1, 1)),
            inputs=(module.in_features, 1, 1),
            outputs=(module.out_features, 1, 1),
        )
    if isinstance(module, KeyLock) or (isinstance(module, nn.BatchNorm2d) and kind is nn.BatchNorm2d):
        return _normalisation(name, module)
    if kind in _CURVES:
        curve, parameter = _CURVES[kind]
        return _activation(name, curve, float(getattr(module, parameter)) if parameter else 1.0)
    if kind is nn.Unflatten or (kind is nn.Flatten and after.ndim == 2):
        return Reshape(name, tuple(before.shape[1:]))
    if kind is nn.Identity or (
        isinstance(module, nn.modules.dropout._DropoutNd) and not (module.p and module.training)
    ):
        return None
    raise _unknown(name, kind.__name__)


def _normalisation(name: str, module: KeyLock | nn.BatchNorm2d) -> Normalisation | Scaling:
    norm = module.norm if isinstance(module, KeyLock) else module
    public = isinstance(module, nn.BatchNorm2d) and module.affine
    layer = Normalisation(
        name=name,
        weight=f"{name}.weight" if public else None,
        bias=f"{name}.bias" if public else None,
        eps=norm.eps,
        secret=isinstance(module, KeyLock),
    )
    if norm.training or norm.running_mean is None:
        return layer
    if layer.secret:
        raise Unsupported(
            f"peel infers a secret scale and shift from the statistics of the image itself, and {name} normalises by "
            "running ones; attack the network in training mode"
        )
    return Scaling(name, layer)


_FUNCTIONS: Mapping[Callable[..., object] | str, tuple[ActivationKind, str, float]] = {
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), ("sigmoid", "", 1.0)),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), ("tanh", "", 1.0)),
    F.leaky_relu: ("leaky-relu", "negative_slope", 0.01),
    F.elu: ("elu", "alpha", 1.0),
    F.softplus: ("softplus", "beta", 1.0),
}
"""The activations as functions, and the name and the default of the argument that is their parameter."""

_RESHAPES = (torch.flatten, torch.reshape, "flatten", "reshape", "view")


def _function(node: fx.Node, before: Tensor) -> ChainLayer | None:
    """Return the layer that a function or a tensor's method is; None for the identity."""
    if node.target in _RESHAPES:
        return Reshape(node.name, tuple(before.shape[1:]))
    if node.target == "contiguous" or (node.target is F.dropout and node.kwargs.get("training") is False):
        return None
    if node.target not in _FUNCTIONS:
        raise _unknown(node.name, str(getattr(node.target, "__name__", node.target)))
    curve, parameter, default = _FUNCTIONS[node.target]
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get(parameter, default)
    if not isinstance(given, (int, float)):
        raise _unknown(node.name, curve)
    return _activation(node.name, curve, float(given))


def _activation(name: str, curve: ActivationKind, parameter: float) -> Activation:
    if not (parameter > 0 and math.isfinite(parameter)):
        raise Unsupported(f"peel needs an invertible activation, and {name} ({curve}) has the parameter {parameter:g}")
    return Activation(name, curve, parameter)


_REASONS = {
    "pool": "pooling loses information",
    "relu": "it is not invertible",
    "elu": "it is not invertible",
    "silu": "it is not invertible",
    "add": "a residual connection makes no chain",
}


def _unknown(name: str, kind: str) -> Unsupported:
    reason = next((why for word, why in _REASONS.items() if word in kind.lower()), "it is none of the layers it knows")
    return Unsupported(
        f"peel cannot go back through {name} ({kind}): {reason}; it takes convolutions, linear layers, sigmoid, tanh, "
        "leaky ReLU, ELU, softplus and batch normalisation"
    )


def _check(chain: Chain, twin: nn.Module, image: Tensor, features: object) -> None:
    """Raise Unsupported if the chain does not compute what the network does."""
    tensors = {name: value.detach()[None] for name, value in tensors_of(twin).items()}
    for name, module in twin.named_modules():
        if isinstance(module, KeyLock):
            scale, shift = module.coefficients()
            tensors |= {f"{name}:scale": scale.detach()[None], f"{name}:shift": shift.detach()[None]}
    tensors |= {layer.kept: image.new_ones(1, 1) for layer in chain.layers if isinstance(layer, Dropout)}
    value = image
    for layer in chain.layers:
        value = layer.forward(value, tensors)
    assert isinstance(features, Tensor)
    same = value.numel() == features.numel()
    if not same or not (value.flatten() - features.flatten()).norm() <= TOLERANCE * features.norm():
        raise Unsupported("peel's chain of layers does not compute what the network does (a hook, or a custom layer)")
