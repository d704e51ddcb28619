"""Which inputs of convolutions follow from what was sent, without a search (``factorise_convolution``)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from leakbench.attacks.analytic import input_shapes
from leakbench.attacks.peeling.factors import NotFactorised
from leakbench.attacks.peeling.lattice import CONVOLUTIONS, Lattice
from leakbench.attacks.peeling.shifts import factorise_convolution
from leakbench.core.rng import generator
from leakbench.errors import Unsupported
from leakbench.observation import Observation

MAX_IMAGES = 2
"""The number of images that are tried: whether a layer is exposed depends more on its size than on the image."""

MAX_ERROR = 1e-2
"""The distance from the true input, relative to its norm, up to which a layer counts as exposed if that is known."""

SHOWN_CHANNELS = 16
"""The number of channels whose features are drawn, those with the largest norms."""


@dataclass(frozen=True)
class LayerExposure:
    """Whether the input of a convolution follows from the gradient of its weight by itself.

    Attributes:
        layer: its name.
        kernel: the size of its kernel, such as (3, 3).
        inputs: (C, H, W) of its input.
        images: how many images were tried.
        exposed: for how many of them the input follows, up to a positive factor.
        reason: why it does not follow, for the first image for which that is so; empty if there is none.
        error: the relative error of the input against the truth after the best factor, the largest of the exposed
            images; NaN without a truth or an exposed image.
        features: channels of the recovered input of the first exposed image as a PNG, and of the true one beside it if
            that is known; None if nothing is exposed.
    """

    layer: str
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    images: int
    exposed: int
    reason: str
    error: float
    features: bytes | None

    @property
    def everywhere(self) -> bool:
        """Whether the input follows for every image that was tried."""
        return self.exposed == self.images > 0


def exposures(observation: Observation, truth: Mapping[str, Sequence[Tensor]] | None) -> list[LayerExposure]:
    """Return every convolution that sent the gradient of its weight and runs once, in order of execution.

    Args:
        observation: what the server saw.
        truth: layer -> its true inputs, flattened, one for each image; None if they are not known.
    """
    shapes = input_shapes(observation, CONVOLUTIONS)
    found = []
    for layer, taken in shapes.items():
        if len(taken) == 1 and f"{layer}.weight" in observation.gradient:
            module = observation.model.get_submodule(layer)
            found.append(_exposure(observation, layer, module, taken[0], None if truth is None else truth.get(layer)))
    return found


def _exposure(
    observation: Observation, layer: str, module: nn.Module, shape: tuple[int, ...], truth: Sequence[Tensor] | None
) -> LayerExposure:
    gradient = observation.gradient[f"{layer}.weight"]
    images = min(observation.trials, MAX_IMAGES)
    recovered, reasons, errors, pictures = 0, [], [], []
    for image in range(images):
        value = _input(gradient[image], module, shape, layer)
        if isinstance(value, str):
            reasons.append(value)
            continue
        real = None if truth is None else truth[image].double().cpu()
        error = math.nan
        if real is not None:
            if real.numel() != value.numel():
                reasons.append("it runs on several inputs")
                continue
            error = _error(value.flatten(), real)
            if error > MAX_ERROR:
                reasons.append(f"what follows from the gradient is {error:.2g} from the true input")
                continue
        recovered += 1
        errors.append(error)
        pictures.append(_drawn(value, None if real is None else real.view_as(value)))
    return LayerExposure(
        layer=layer,
        kernel=tuple(gradient.shape[3:]),
        inputs=shape,
        images=images,
        exposed=recovered,
        reason=reasons[0] if reasons else "",
        error=max(errors, default=math.nan),
        features=pictures[0] if pictures else None,
    )


def _input(gradient: Tensor, module: nn.Module, shape: tuple[int, ...], layer: str) -> Tensor | str:
    """Return the input [C, *image] up to a factor, or the reason why it does not follow."""
    try:
        lattice = Lattice.of(module, shape[1:])
    except Unsupported as error:
        return str(error)
    found = factorise_convolution(gradient, lattice, generator("audit", layer))
    if isinstance(found, NotFactorised):
        return found.reason
    if found.phases > 1 or found.groups > 1:
        return "it follows in parts only: each group and sub-lattice has a factor of its own"
    return found.inputs[0]


def _error(value: Tensor, real: Tensor) -> float:
    """Return the distance from the truth after the best factor, relative to the truth's norm."""
    factor = (value @ real) / (value @ value)
    size = float(real.norm())
    return float((factor * value - real).norm()) / size if size else math.inf


def _drawn(value: Tensor, real: Tensor | None) -> bytes | None:
    """Return the largest channels [C, H, W] in one row, each from its least to its largest value; the truth below."""
    if value.dim() != 3:
        return None
    chosen = value.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:SHOWN_CHANNELS]
    rows = [_row(each[chosen]) for each in (value, real) if each is not None]
    image = Image.fromarray(np.concatenate(rows, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _row(channels: Tensor) -> np.ndarray:
    """Return channels [K, H, W] beside each other as bytes, with a line of white between and around them."""
    low, high = channels.amin((1, 2), keepdim=True), channels.amax((1, 2), keepdim=True)
    scaled = (channels - low) / (high - low).clamp(min=torch.finfo(channels.dtype).tiny)
    grey = (255 * scaled).round().to(torch.uint8)
    return nn.functional.pad(grey, (1, 1, 1, 1), value=255).permute(1, 0, 2).flatten(1).numpy()
