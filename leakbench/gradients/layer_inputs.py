"""What the first layer of a network takes: the images that a step is taken on, whatever the code around it does."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from leakbench.core.rng import seeded


class InputRecorder:
    """A forward pre-hook that keeps each different tensor that a layer takes; copies of a network share it.

    Attributes:
        values: the tensors, detached, by their bytes.
        unreadable: whether a layer took something whose values cannot be read, as within ``torch.func.vmap``.
    """

    def __init__(self) -> None:
        self.values: dict[tuple[tuple[int, ...], bytes], Tensor] = {}
        self.unreadable = False

    def __call__(self, module: nn.Module, inputs: Sequence[object], named: Mapping[str, object]) -> None:
        """Keep the first tensor of a call; it never raises, since it runs within the call."""
        try:
            value = _first_tensor(inputs, named).detach().clone()
            self.values.setdefault(tensor_key(value), value)
        except Exception:
            self.unreadable = True

    def __deepcopy__(self, memo: object) -> "InputRecorder":
        return self

    def watch(self, network: nn.Module, layers: Sequence[str]) -> None:
        """Record what layers of a network take, by their names."""
        for name in layers:
            network.get_submodule(name).register_forward_pre_hook(self, with_kwargs=True)


def tensor_key(value: Tensor) -> tuple[tuple[int, ...], bytes]:
    """Return what equal tensors have in common: shape and bytes."""
    return tuple(value.shape), value.detach().double().cpu().contiguous().numpy().tobytes()


def _first_tensor(inputs: Sequence[object], named: Mapping[str, object]) -> Tensor:
    return next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))


class _Reached(Exception):
    """The first layer runs on ``value``."""

    def __init__(self, layer: nn.Module, value: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.value = value


def _stop(layer: nn.Module, inputs: Sequence[object], named: Mapping[str, object]) -> None:
    raise _Reached(layer, _first_tensor(inputs, named).detach().clone())


def first_layer(network: nn.Module, images: Tensor) -> tuple[nn.Module, Tensor] | None:
    """Return the layer with parameters that a network runs first on images, and what it takes; None if it runs none.

    The network runs only up to this layer, which does not run.
    """
    owners = [one for one in network.modules() if next(one.parameters(recurse=False), None) is not None]
    handles = [one.register_forward_pre_hook(_stop, with_kwargs=True) for one in owners]
    try:
        with torch.no_grad():
            network(images)
    except _Reached as reached:
        return reached.layer, reached.value
    except Exception:  # of a network that a defense calls in another way
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None


def first_layers(network: nn.Module, plain: nn.Module, shape: Sequence[int]) -> list[str]:
    """Return the names of the layers of a wrapped network that its images enter by.

    They are the first layer of the network before it was wrapped, and the one that the wrapped network runs first.

    Args:
        network: the wrapped network; it is not changed.
        plain: the network before that; only statistics of layers without parameters may change.
        shape: of an image, (C, H, W).
    """
    blank = torch.full((1, *shape), 0.5).to(next(plain.parameters(), torch.zeros(())).dtype)
    own, layers = dict(network.named_modules()), dict[str, None]()
    with seeded("first layer"):
        found = first_layer(plain, blank)
        if found is not None:
            known = dict(found[0].named_parameters(recurse=False))
            layers |= dict.fromkeys(name for name, one in own.items() if _holds(one, known))
        copied = copy.deepcopy(network)
        found = first_layer(copied, blank)
    layers |= dict.fromkeys(name for name, one in copied.named_modules() if found is not None and one is found[0])
    return list(layers)


def _holds(layer: nn.Module, known: Mapping[str, Tensor]) -> bool:
    """Return whether a layer has these parameters of its own."""
    own = dict(layer.named_parameters(recurse=False))
    return known.keys() <= own.keys() and all(
        own[name].shape == value.shape and torch.equal(own[name], value) for name, value in known.items()
    )
