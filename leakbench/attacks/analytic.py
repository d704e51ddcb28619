"""Analytic: the image inferred from the gradient of a linear layer that takes its pixels, whatever follows it."""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakbench.attacks.base import Attack, register
from leakbench.attacks.fill import fill_in
from leakbench.attacks.known_draws import read_draws
from leakbench.attacks.peel import read_labels
from leakbench.core.rng import Rng, generator
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.draws import Draws
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.intercept import Interception
from leakbench.gradients.linear import layer_direction, layer_input, unexplained
from leakbench.models.surgery import linears
from leakbench.observation import Observation

PIXEL_TOLERANCE = 0.1
"""How far a value may be from its pixel, in steps between neighbouring values of the probe."""

NEGLIGIBLE = 1e-3
"""Entries up to this fraction of the largest do not limit the factor that keeps pixels in [0, 1]."""


@register("analytic")
@dataclass(frozen=True)
class Analytic(Attack):
    """Analytic: derives the pixels that enter a linear layer from the layer's gradient, in closed form.

    The layer is W x + b, so that each row of dL/dW is x times that row's dL/db: x = (dL/dW)^T (dL/db) / |dL/db|^2.
    Without dL/db (no bias, or a withheld one), x is the leading right singular vector of dL/dW up to a factor; of the
    factors that keep every pixel in [0, 1], the largest is taken. Which entry of x is which pixel, and by what scale
    and shift, is seen on probe images: anything that moves pixels and scales each by itself is undone. The rest of the
    network does not matter.

    Dropout between the image and the layer hides pixels. Which ones it kept follows from the layer's gradient; the
    others are filled in from their neighbours.
    """

    reference: ClassVar[str] = (
        "Phong et al. 2018, Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, IEEE TIFS, "
        "section III; Geiping et al. 2020, arXiv 2003.14053, proposition 3.1"
    )
    assumes: ClassVar[str] = "A linear layer that takes every pixel once and runs once; one image in one step."
    cost: ClassVar[str] = (
        "One product with the gradient of that layer, and four passes of a blank image up to that layer."
    )
    fails: ClassVar[str] = (
        "Networks that begin with convolutions (unsupported); noise on the gradient, which it passes on to the image."
    )
    updates: ClassVar[bool] = True

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if no linear layer takes the pixels, or none of its gradient was sent."""
        self._pixels(observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the image of every trial; nothing is drawn from rng."""
        layer, order, slope, shift = self._pixels(observation)
        weight, bias = (observation.gradient.get(f"{layer}.{part}") for part in ("weight", "bias"))
        assert weight is not None
        weight = weight.double()
        kept = kept_pixels(observation, layer)
        if kept is not None:  # the probes of ``pixel_layers`` run without dropout
            slope, shift = slope * kept, shift * kept
        if bias is not None and bool(bias.any()):
            taken = layer_input(weight, bias.double())
            left = unexplained(weight, bias.double(), taken)
        else:
            direction = layer_direction(weight)
            taken = direction * _largest(direction, slope, shift)[:, None]
            left = unexplained(weight, torch.einsum("tcs,ts->tc", weight, direction), direction)
        pixels = torch.empty_like(taken)
        pixels[:, order] = (
            (taken - shift) / slope if kept is None else (taken - shift) / torch.where(slope == 0, 1, slope)
        )
        images = pixels.view(observation.trials, *observation.image_shape)
        if kept is not None:
            seen = torch.empty_like(taken, dtype=torch.bool)
            seen[:, order] = kept != 0
            images = fill_in(images, seen.view_as(images), observation.mean_image)
        return Reconstruction(
            images=images.to(observation.dtype),
            labels=read_labels(observation),
            objective=left.to(observation.dtype),
            failed=~taken.any(1) | ~torch.isfinite(pixels).all(1),
            path="batched",
        )

    def _pixels(self, observation: Observation) -> tuple[str, Tensor, Tensor, Tensor]:
        """Return the first layer that takes the pixels and sent its weight's gradient, with ``pixel_layers``' words."""
        found = pixel_layers(observation)
        for name, (order, slope, shift) in found.items():
            if f"{name}.weight" in observation.gradient:
                return name, order, slope, shift
        if found:
            raise Unsupported(f"analytic needs the gradient of {', '.join(found)}, which was not sent")
        raise Unsupported("analytic needs a linear layer that takes every pixel, and this network has none")


def pixel_layers(observation: Observation) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return the linear layers that take the pixels themselves: entry i is pixel order[i] times slope[i] plus shift[i].

    Found on probe images, in evaluation mode: a normalisation by the statistics of the image itself counts as the one
    by running statistics. The secrets that the server does not know are zeros.

    Returns:
        By name: order [N] int64, a permutation of the N = C * H * W pixels; slope and shift [T, N] float64, T = 1 where
        all trials share their weights.
    """
    size = prod(observation.image_shape)
    layers = [name for name, layer in linears(observation.model).items() if layer.in_features == size]
    if not layers:
        return {}
    own = tensors_of(observation.model)
    device = observation.device
    model = copy.deepcopy(observation.model).eval()
    weights = {name: value for name, value in observation.weights.items() if name in own}
    rows = observation.trials if any(_apart(value, own[name]) for name, value in weights.items()) else 1
    orders = [torch.randperm(size, generator=generator("analytic", number)).to(device) for number in (0, 1)]
    probes = [torch.zeros(size), torch.ones(size), *((order + 0.5) / size for order in orders)]
    images = torch.stack([probe.double().to(device) for probe in probes]).view(4, 1, *observation.image_shape)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in layers}
    for row in range(rows):
        tensors = {name: _row(weights.get(name), value, row, device) for name, value in own.items()}
        for name in [name for name, views in found.items() if len(views) == row]:
            taken = [_taken(model, name, tensors, image) for image in images]
            view = _view([value for value in taken if value is not None and len(value) == size], orders)
            if view is not None:
                found[name].append(view)
    return {
        name: (views[0][0], torch.stack([view[1] for view in views]), torch.stack([view[2] for view in views]))
        for name, views in found.items()
        if len(views) == rows
    }


def kept_pixels(observation: Observation, layer: str) -> Tensor | None:
    """Return [T, N], by what dropout multiplies each entry of the input of a layer of ``pixel_layers``; 0 if dropped.

    None if nothing is drawn before the layer, or the draws do not follow from the gradient.
    """
    masks = read_draws(observation).masks
    if not masks:
        return None
    own, device = tensors_of(observation.model), observation.device
    model, still = copy.deepcopy(observation.model), copy.deepcopy(observation.model).eval()
    for module in model.modules():
        module.training &= not isinstance(module, nn.modules.batchnorm._NormBase)
    black = torch.zeros((1, *observation.image_shape), dtype=torch.float64, device=device)
    found = []
    for row in range(observation.trials):
        tensors = {name: _row(observation.weights.get(name), value, row, device) for name, value in own.items()}
        slopes = []
        for network in (model, still):
            taken = []
            for image in (black, black + 1):
                with Interception(Draws(None, row, masks)):
                    taken.append(_taken(network, layer, tensors, image))
            if taken[0] is None or taken[1] is None:
                return None
            slopes.append(taken[1] - taken[0])
        found.append(slopes[0] / slopes[1])
    factors = torch.stack(found)
    return None if bool((factors == 1).all()) else factors


def widths(observation: Observation) -> dict[str, int]:
    """Return how many values each linear layer takes of one blank image, in all; those that do not run are left out."""
    shapes = input_shapes(observation, (nn.Linear,))
    return {name: sum(map(prod, taken)) for name, taken in shapes.items()}


def input_shapes(observation: Observation, kinds: tuple[type[nn.Module], ...]) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes, without the batch, of what each layer of these kinds takes of one blank image.

    Layers come in the order in which they first run, each with a shape for every time that it runs.
    """
    own = tensors_of(observation.model)
    tensors = {name: _row(observation.weights.get(name), own[name], 0, observation.device) for name in own}
    model = copy.deepcopy(observation.model).eval()
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, kinds):
            layer.register_forward_pre_hook(partial(_note_shape, found, name))
    blank = torch.full((1, *observation.image_shape), 0.5, dtype=torch.float64, device=observation.device)
    with torch.no_grad(), contextlib.suppress(Exception):  # what ran before a network breaks on a blank image counts
        functional_call(model, tensors, (blank,))
    return found


def _note_shape(found: dict[str, list[tuple[int, ...]]], name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Note the shape of what a module takes."""
    found.setdefault(name, []).append(tuple(inputs[0].shape[1:]))


def _apart(value: Tensor, own: Tensor) -> bool:
    """Return whether trials have their own values of a tensor."""
    return value.ndim > own.ndim and len(value) > 1 and value.stride(0) != 0


class _Reached(Exception):
    """The layer that is looked at was reached."""


def _row(value: Tensor | None, own: Tensor, row: int, device: torch.device) -> Tensor:
    """Return a tensor of one trial's network in float64; zeros where it is not known."""
    if value is None:
        value = torch.zeros(own.shape, dtype=own.dtype, device=device)
    value = value[row if len(value) > 1 else 0] if value.ndim > own.ndim else value
    return value.double() if value.is_floating_point() else value.clone()


def _taken(model: nn.Module, name: str, tensors: Mapping[str, Tensor], image: Tensor) -> Tensor | None:
    """Return what a layer takes of an image when it first runs, flattened; None where it does not run."""
    values: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        values.append(inputs[0].detach().double().flatten())
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad(), contextlib.suppress(Exception):  # _Reached, or whatever is raised on the way to this layer
        functional_call(model, dict(tensors), (image,))
    handle.remove()
    return values[0] if values else None


def _view(taken: list[Tensor], orders: list[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return order, slope and shift from what a layer takes of black, white and two images of all-different values."""
    if len(taken) != 4:
        return None
    size = len(orders[0])
    shift, slope = taken[0], taken[1] - taken[0]
    if not bool(torch.isfinite(slope).all() & slope.ne(0).all()):
        return None
    places = []
    for value, order in zip(taken[2:], orders):
        rank = (value - shift) / slope * size - 0.5
        nearest = rank.round().long()
        if not bool(((rank - nearest).abs() < PIXEL_TOLERANCE).all() & (nearest >= 0).all() & (nearest < size).all()):
            return None
        places.append(order.argsort()[nearest])
    same = torch.equal(places[0], places[1]) and len(places[0].unique()) == size
    return (places[0], slope, shift) if same else None


def _largest(direction: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """Return [T], the factor of largest size with which no pixel of ``direction`` [T, N] leaves [0, 1].

    If a normalisation maps no grey of [0, 1] to 0, there is none, and 1 is returned.
    """
    ends = torch.stack([shift, shift + slope])
    low, high = ends.amin(0), ends.amax(0)
    found = torch.ones_like(direction[:, 0])
    best = torch.zeros_like(found)
    for sign in (1.0, -1.0):
        value = sign * direction
        small = value.abs() <= NEGLIGIBLE * value.abs().amax(1, keepdim=True)
        edge = torch.where(value > 0, high, low) / torch.where(small, torch.ones_like(value), value)
        size = torch.where(small, torch.inf, edge).amin(1)
        found, best = torch.where(size > best, sign * size, found), torch.maximum(best, size)
    return torch.where(torch.isfinite(found), found, torch.ones_like(found))
