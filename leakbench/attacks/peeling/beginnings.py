"""The convolutions and linear layers at which a descent through a ReLU network can begin."""

from collections.abc import Collection
from math import prod

import torch

from leakbench.attacks.peeling.averages import averaging
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.network import Network


def beginnings(network: Network, sent: Collection[str], images: int = 1) -> list[int]:
    """Return the places of the convolutions at which a descent can begin, the lowest first.

    The gradient by the weight of such a convolution can give its input and the error at its output up to a factor
    (``shifts.py``), and the gradient of a shift below the ReLU that it comes from gives the factor.

    Args:
        network: its steps.
        sent: the names of the tensors whose gradient was sent.
        images: how many images were trained on at a time; only the zeros of a ReLU separate several.
    """
    found = []
    for place in factorisable(network, sent, images):
        (at,) = network.steps[place].inputs
        source = network.steps[at]
        alone = source.kind == "relu" and source.users == (place,) and (images == 1 or _separable(network, place))
        if alone and network.shift(at) in sent:
            found.append(place)
    return found


def most_begun(network: Network, sent: Collection[str]) -> int:
    """Return of how many images a descent can begin at the most; 0 if none can begin at a convolution behind a ReLU.

    Args:
        network: its steps.
        sent: the names of the tensors whose gradient was sent.
    """
    layers = [network.steps[place].layer for place in beginnings(network, sent, 2)]
    counts = [channels // (height * width) for channels, height, width in (one.inputs for one in layers if one)]
    return max(counts, default=int(any(_separable(network, place) for place in beginnings(network, sent))))


def _separable(network: Network, place: int) -> bool:
    """Return whether a convolution takes a ReLU's output, whose zeros tell images apart."""
    (at,) = network.steps[place].inputs
    return network.steps[at].kind == "relu" and network.steps[at].slope == 0


def factorisable(network: Network, sent: Collection[str], images: int = 1) -> list[int]:
    """Return the places of the convolutions of stride 1 that have as many channels as places, the lowest first.

    Those that give an input in parts only (``opens``) are left out, and those below a normalisation of one value of
    each image: it makes the errors of all images add up to zero, so that the rank of the gradient is one too low.

    Args:
        network: its steps.
        sent: the names of the tensors whose gradient was sent.
        images: how many images were trained on at a time.
    """
    found = []
    for place, step in enumerate(network.steps):
        layer = step.layer
        if layer is None or layer.weight not in sent or not opens(layer):
            continue
        channels, height, width = layer.inputs
        lone = any(network.steps[user].kind == "normalisation" for user in step.users) and prod(step.shape[1:]) == 1
        first = network.steps[step.inputs[0]].kind == "image"
        if not lone and not first and channels >= images * height * width:
            found.append(place)
    return found


def opens(layer: Convolution) -> bool:
    """Return whether a convolution's shifts join all positions of its input (``lattice.py``).

    Its stride is 1, its kernel above 1x1; groups, a dilation, or a kernel in one direction give an input in parts.
    """
    g = layer.geometry
    return g.stride == (1, 1) and g.kernel != (1, 1) and g.groups == 1 and lattice_of(layer).phases == 1


def withheld(network: Network, sent: Collection[str], images: int = 1) -> list[str]:
    """Return the weights whose gradient would have given their convolution's input, but was not sent; the lowest first.

    Args:
        network: its steps.
        sent: the names of the tensors whose gradient was sent.
        images: how many images were trained on at a time.
    """
    own = {place: step.layer.weight for place, step in enumerate(network.steps) if step.layer is not None}
    return [own[place] for place in factorisable(network, own.values(), images) if own[place] not in sent]


def flat_heads(network: Network, sent: Collection[str]) -> list[tuple[int, int]]:
    """Return the places of the linear layers that take all values of a ReLU or max-pool, or averages of these.

    The gradients of such a layer's weight and bias give its input, and the error there. With each comes the place of
    the ReLU, the max-pool or the averages. A mean over all positions is another head (``heads``).
    """
    found = []
    for place, step in enumerate(network.steps):
        if step.kind != "linear" or not {f"{step.name}.weight", f"{step.name}.bias"} <= set(sent):
            continue
        at = step.inputs[0]
        while network.steps[at].kind == "affine" and _orders(network, at):
            (at,) = network.steps[at].inputs
        lowest = network.steps[at]
        averaged = len(lowest.shape) == 3 and prod(lowest.shape[1:]) > 1 and averaging(network, at) is not None
        gate = network.steps[lowest.inputs[0]] if averaged else lowest
        if len(lowest.shape) == 3 and gate.kind in ("relu", "max-pool"):
            found.append((place, at))
    return found


def _orders(network: Network, place: int) -> bool:
    """Return whether a step only orders the values of another one anew, or repeats all of them as often."""
    step = network.steps[place]
    if len(step.inputs) != 1:
        return False
    (below,) = step.inputs
    ones = torch.ones((1, *network.steps[below].shape), dtype=torch.float64)
    if prod(step.shape) < ones.numel():
        return False
    values = torch.arange(ones.numel(), dtype=torch.float64).view_as(ones)
    times = prod(step.shape) / ones.numel()
    again = network.backward(place, below, network.forward(place, [values]))
    return bool(torch.equal(again, times * values))


def heads(network: Network, sent: Collection[str]) -> list[int]:
    """Return the places of the linear layers that take the means of a ReLU's channels, and sent what is needed.

    That is the gradient of their bias or of their weight and of a shift below the ReLU, and so the error at their
    input; and that of a convolution right below the ReLU, which gives the masks. With half as many channels as places,
    they cannot be found.
    """
    found = []
    for place, step in enumerate(network.steps):
        if step.kind != "linear" or not {f"{step.name}.bias", f"{step.name}.weight"} & set(sent):
            continue
        at = network.below_affine(step.inputs[0])
        lowest = network.steps[at]
        channels, places = lowest.shape[:1], prod(lowest.shape[1:])
        pooled = channels == network.steps[step.inputs[0]].shape and 1 < places <= 2 * prod(channels)
        sized = f"{step.name}.bias" in sent or network.shift(at) in sent
        rectified = lowest.kind == "relu" and lowest.slope == 0
        if pooled and rectified and sized and _opened_right_below(network, at, sent):
            found.append(place)
    return found


def _opened_right_below(network: Network, place: int, sent: Collection[str]) -> bool:
    """Return whether a convolution that sent its gradient and ``opens`` reaches a step by steps that scale and add."""
    unseen = list(network.steps[place].inputs)
    while unseen:
        step = network.steps[unseen.pop()]
        if step.layer is not None and step.layer.weight in sent and opens(step.layer):
            return True
        if step.kind in ("scaling", "affine"):
            unseen += step.inputs
    return False


def all_beginnings(network: Network, sent: Collection[str]) -> list[int]:
    """Return the places at which a descent can begin for one image, in the order in which they are tried."""
    flat = [place for place, _ in flat_heads(network, sent)]
    return [*beginnings(network, sent), *flat, *heads(network, sent), *factorisable(network, sent)]


def lattice_of(layer: Convolution) -> Lattice:
    """Return the geometry of a layer as the factorisation takes it."""
    g = layer.geometry
    padding = tuple((each, each) for each in g.padding)
    return Lattice(g.image, g.kernel, padding, g.stride, g.dilation, g.groups)
