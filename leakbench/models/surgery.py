"""Find and replace parts of any network: its first normalisation, its last linear layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from leakbench.errors import Unsupported

_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every ``nn.Linear`` by name, in order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the sub-module of this dotted name is; the model is changed."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def replace_first_norm(model: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    """Return a copy whose first convolution is followed by ``make(channels)`` instead of its normalisation.

    The normalisation is the one registered right after the first 2-d convolution, before any other layer with
    parameters, for as many channels; where there is none, the new one is inserted after the convolution.

    Raises:
        Unsupported: the network has no 2-d convolution.
    """
    model = copy.deepcopy(model)
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    first = next((i for i, (_, module) in enumerate(leaves) if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise Unsupported("the network has no 2-d convolution; the defense acts on the first convolution's block")
    conv_name, conv = leaves[first]
    assert isinstance(conv, nn.Conv2d)
    new = make(conv.out_channels).train(model.training)
    for name, module in leaves[first + 1 :]:
        if isinstance(module, _NORMS):
            channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
            if channels == conv.out_channels:
                replace_module(model, name, new)
                return model
        if list(module.parameters(recurse=False)):
            break
    replace_module(model, conv_name, nn.Sequential(conv, new).train(model.training))
    return model
