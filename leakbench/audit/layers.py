"""Which layers of a network leak: where the gradient's size lies, and what linear layers give away in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.attacks.analytic import pixel_layers, widths
from leakbench.attacks.peel import read_labels
from leakbench.gradients.linear import layer_direction, layer_input, unexplained
from leakbench.models.surgery import linears
from leakbench.observation import Observation

EXACT = 1e-3
"""The part of a linear layer's gradient that no single input explains, up to which its input is taken for exact."""

SPREAD = 10 * EXACT
"""The part of a layer's gradient that further rows must hold, for a mixture of inputs to leave more than ``EXACT``."""


@dataclass(frozen=True)
class Share:
    """One layer's part of what attacks match.

    Attributes:
        layer: its name.
        kind: its class.
        parameters: how many were sent.
        withheld: how many were not.
        share: of the squared norm of all that was sent, mean over images; 0 to 1.
    """

    layer: str
    kind: str
    parameters: int
    withheld: int
    share: float


@dataclass(frozen=True)
class ClosedForm:
    """What a linear layer gives away without any search: its input, for every image.

    Attributes:
        layer: its name.
        inputs: how many values it takes.
        images: how many images were observed.
        leftover: the part of the norm of the layer's gradient that no single input explains, the largest of all images:
            0 for one image in one step without noise, and larger where several were mixed, or noise was added.
        tells: whether several images would leave something over. Rows that are multiples of each other whatever the
            images leave nothing: the two of a classifier of two classes, or the only one that is not zero.
        error: the relative error of the input against the truth, the largest of all images; NaN without a truth.
        pixels: whether the input is the image: its pixels, each moved, scaled and shifted in a way that is public.
        factor: whether the input is known but for a factor, since no gradient of a bias was sent.
    """

    layer: str
    inputs: int
    images: int
    leftover: float
    tells: bool
    error: float
    pixels: bool
    factor: bool

    @property
    def exact(self) -> bool:
        """Whether the input follows from what was sent: as far as the gradient says by itself, or else the truth."""
        return self.leftover <= EXACT and (self.tells if math.isnan(self.error) else self.error <= EXACT)


@dataclass(frozen=True)
class Labels:
    """The labels that are read off what was sent.

    Attributes:
        read: one an image; None where none can be read.
        right: how many are; None without a truth.
    """

    read: tuple[int, ...] | None
    right: int | None


def shares(observation: Observation) -> list[Share]:
    """Return every layer's part of what was sent, in order of registration."""
    modules = dict(observation.model.named_modules())
    squares = {name: value.double().flatten(1).square().sum(1) for name, value in observation.gradient.items()}
    total = torch.stack(list(squares.values())).sum(0)
    layers: dict[str, list[str]] = {}
    for name, parameter in observation.model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    found = []
    for layer, names in layers.items():
        sent = [name for name in names if name in squares]
        sizes = {name: observation.model.get_parameter(name).numel() for name in names}
        part = torch.stack([squares[name] for name in sent]).sum(0) if sent else torch.zeros_like(total)
        found.append(
            Share(
                layer=layer or "(the network itself)",
                kind=type(modules[layer]).__name__,
                parameters=sum(sizes[name] for name in sent),
                withheld=sum(size for name, size in sizes.items() if name not in sent),
                share=float((part / total.clamp(min=torch.finfo(total.dtype).tiny)).mean()),
            )
        )
    return found


def closed_forms(observation: Observation, truth: Mapping[str, Sequence[Tensor]] | None) -> list[ClosedForm]:
    """Return what linear layers give away of their inputs, in float64: see ``layer_input`` and ``layer_direction``.

    A layer that runs on several vectors (tokens) gives none of them away, and is left out, as is one that sent nothing.

    Args:
        observation: what was seen.
        truth: layer -> the inputs that it really had, one an image, each [.., inputs]; None where they are not known.
    """
    pixels, taken = pixel_layers(observation), widths(observation)
    found = []
    for name, layer in linears(observation.model).items():
        weight, bias = (observation.gradient.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None or not bool(weight.any()) or taken.get(name) != layer.in_features:
            continue
        inputs = None if truth is None else truth.get(name)
        if inputs is not None and any(real.numel() != layer.in_features for real in inputs):
            continue
        weight = weight.double()
        sent = None if bias is None or not bool(bias.any()) else bias.double()
        value = layer_direction(weight) if sent is None else layer_input(weight, sent)
        by_bias = torch.einsum("tcs,ts->tc", weight, value) if sent is None else sent
        errors = [] if inputs is None else [_error(*each, sent is None) for each in zip(value, inputs)]
        found.append(
            ClosedForm(
                layer=name,
                inputs=layer.in_features,
                images=observation.trials,
                leftover=float(unexplained(weight, by_bias, value).max()),
                tells=_tells(weight),
                error=max(errors, default=math.nan),
                pixels=name in pixels,
                factor=sent is None,
            )
        )
    return found


def _tells(weight: Tensor) -> bool:
    """Return whether enough rows of dL/dW [T, C, S] count: two that are independent, so three where they sum to zero.

    The derivatives of the cross-entropy by the logits sum to zero, and so do the rows of a classifier's gradient.
    """
    size = weight.flatten(1).norm(dim=1)
    rows = weight.norm(dim=2).sort(dim=1, descending=True).values
    dependent = weight.sum(1).norm(dim=1) <= EXACT * size
    rest = torch.where(dependent, rows[:, 2:].norm(dim=1), rows[:, 1:].norm(dim=1))
    return bool((rest > SPREAD * size).all())


def _error(value: Tensor, real: Tensor, factor: bool) -> float:
    """Return the relative error of a layer's input, after the best factor where that is not known."""
    value, real = value.cpu(), real.flatten().double()
    value = value * (value @ real) if factor else value
    size = float(real.norm())
    return float((value - real).norm()) / size if size else float(value.norm())


def labels_of(observation: Observation, truth: Sequence[int] | None) -> Labels:
    """Return the labels that the gradient of the last layer gives away, without those that were granted."""
    read = read_labels(observation)
    if read is None:
        return Labels(None, None)
    values = tuple(int(label) for label in read)
    return Labels(values, None if truth is None else sum(a == b for a, b in zip(values, truth)))
