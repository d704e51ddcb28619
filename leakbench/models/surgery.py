"""Find and replace parts of any network: its normalisations, its linear layers."""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, fx, nn

from leakbench.errors import Unsupported

Layers = Literal["first", "all"]

_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every ``nn.Linear`` by name, in order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def with_buffers(network: nn.Module) -> nn.Module:
    """Make every tensor that is a plain attribute of a layer a buffer, which moves with the network, and return it."""
    for layer in network.modules():
        for name in [name for name, value in vars(layer).items() if isinstance(value, Tensor)]:
            value = layer.__dict__.pop(name)
            layer.register_buffer(name, value.detach(), persistent=False)
    return network


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the sub-module of this dotted name by ``new``; the model is changed."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def plain_norm(channels: int, old: nn.Module | None) -> nn.BatchNorm2d:
    """Return a batch normalisation without scale and shift; it takes over the statistics of one that it replaces."""
    if not isinstance(old, nn.BatchNorm2d):
        return nn.BatchNorm2d(channels, affine=False)
    new = nn.BatchNorm2d(channels, old.eps, old.momentum, affine=False, track_running_stats=old.track_running_stats)
    new.load_state_dict(dict(old.named_buffers()))
    return new


def replace_norms(
    model: nn.Module, make: Callable[[int, nn.Module | None], nn.Module], layers: Layers = "first"
) -> nn.Module:
    """Return a copy whose convolutions are followed by ``make(channels, old)`` in place of their normalisation ``old``.

    A convolution's normalisation is the one that its output goes through next, before any other layer with parameters,
    for as many channels; if there is none, ``old`` is None and the new one is inserted after the convolution. Layers
    are taken in the order in which they run or, if ``torch.fx`` cannot trace the network, of registration.

    Args:
        model: any network; it is not changed.
        make: called once a layer, in order.
        layers: ``first`` serves only the first convolution; ``all`` also every later one with a normalisation and, in
            a network that has none at all, every later one.

    Raises:
        Unsupported: the network has no 2-d convolution.
    """
    model = copy.deepcopy(model)
    blocks = _traced(model) or _registered(model)
    if not blocks:
        raise Unsupported("the network has no 2-d convolution; the defense acts on a convolution's block")
    if layers == "first":
        blocks = blocks[:1]
    elif any(norm for _, norm in blocks):
        blocks = blocks[:1] + [(conv, norm) for conv, norm in blocks[1:] if norm]
    for name, norm in blocks:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        new = make(conv.out_channels, None if norm is None else model.get_submodule(norm))
        new.to(conv.weight.device, conv.weight.dtype).train(model.training)
        if norm is not None:
            replace_module(model, norm, new)
        elif name:
            replace_module(model, name, nn.Sequential(conv, new).train(model.training))
        else:
            return nn.Sequential(conv, new).train(model.training)
    return model


def _traced(model: nn.Module) -> list[tuple[str, str | None]]:
    """Return the names of every convolution and its normalisation as they run; nothing if that cannot be traced."""
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # forward may keep what it is given
    try:
        graph = _Tracer().trace(twin)
    except Exception:  # whatever a forward that depends on its data, or that torch.fx does not know, raises
        return []
    modules = dict(twin.named_modules())
    found: dict[str, str | None] = {}
    for node in graph.nodes:
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and str(node.target) not in found:
            found[str(node.target)] = _norm_behind(node, modules, conv.out_channels)
    return list(found.items())


class _Tracer(fx.Tracer):
    """A tracer that looks only into containers, and treats every layer of torch's as a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, *_NORMS)) or super().is_leaf_module(m, module_qualified_name)


def _norm_behind(node: fx.Node, modules: dict[str, nn.Module], channels: int) -> str | None:
    """Return the name of the normalisation that a node's output goes through, before anything with parameters."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "call_module":
            module = modules[str(node.target)]
            if isinstance(module, _NORMS):
                return str(node.target) if _width(module) == channels else None
            if list(module.parameters()):
                return None
        elif node.op == "output" or len(node.all_input_nodes) > 1:
            return None
    return None


def _registered(model: nn.Module) -> list[tuple[str, str | None]]:
    """Return the names of every convolution and its normalisation in order of registration."""
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    return [
        (name, _norm_after(leaves[index + 1 :], module.out_channels))
        for index, (name, module) in enumerate(leaves)
        if isinstance(module, nn.Conv2d)
    ]


def _norm_after(leaves: Sequence[tuple[str, nn.Module]], channels: int) -> str | None:
    """Return the name of the first normalisation of this many channels before any other layer with parameters."""
    for name, module in leaves:
        if isinstance(module, _NORMS) and _width(module) == channels:
            return name
        if list(module.parameters(recurse=False)):
            return None
    return None


def _width(norm: nn.Module) -> int:
    return int(norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)  # type: ignore[arg-type]
