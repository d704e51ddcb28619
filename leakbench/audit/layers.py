"""Which layers of a network leak: their shares of the gradient, and what linear layers leak in closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakbench.attacks.analytic import pixel_layers, widths
from leakbench.attacks.batch_labels import classifiers
from leakbench.attacks.peel import read_labels
from leakbench.audit.exposure import LayerExposure, exposures
from leakbench.gradients.linear import layer_direction, layer_input, unexplained
from leakbench.gradients.losses import head_of
from leakbench.models.surgery import linears
from leakbench.observation import Observation

RESIDUAL_TOLERANCE = 1e-3
"""The input of a linear layer counts as exact up to this share of the gradient's norm that no single input explains."""

MIN_FURTHER_ROWS = 10 * RESIDUAL_TOLERANCE
"""The share of the gradient's norm that must lie outside its dependent rows, for several images to be noticed."""


@dataclass(frozen=True)
class LayerShare:
    """One layer's share of what attacks match.

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
    """What a linear layer leaks in closed form: its input, for every image.

    Attributes:
        layer: its name.
        inputs: how many values it takes.
        images: how many images were observed.
        residual: the share of the norm of the layer's gradient that no single input explains, the largest of all
            images: 0 for one image in one step without noise, larger if images were mixed or noise was added.
        conclusive: whether several images would leave a residual. They leave none if the rows of the gradient are
            multiples of each other for any batch: two outputs, or a single row that is not zero.
        error: the relative error of the input against the truth, the largest of all images; NaN without a truth.
        pixels: whether the input is the image: its pixels, each moved, scaled and shifted in a public way.
        factor: whether the input is known up to a factor only, since no gradient of a bias was sent.
    """

    layer: str
    inputs: int
    images: int
    residual: float
    conclusive: bool
    error: float
    pixels: bool
    factor: bool

    @property
    def exact(self) -> bool:
        """Whether the input follows from what was sent, judged by the truth if it is known."""
        known = self.conclusive if math.isnan(self.error) else self.error <= RESIDUAL_TOLERANCE
        return known and self.residual <= RESIDUAL_TOLERANCE


@dataclass(frozen=True)
class InferredLabels:
    """The labels that follow in closed form from what was sent.

    Attributes:
        inferred: one for each image; None if no rule applies.
        correct: how many are correct; None without the true labels.
        counts: of an update of several images, how often each class occurs, by an estimate; empty if there is none.
        counted: how many of these labels are right, whatever their order; None without the true labels.
        among: how many labels the images have; 0 if that is not known.
        layer: the layer whose errors of each image show the counts; empty if they follow from the last bias.
        having: of an update of several images and the binary cross-entropy of several outputs, how many images have
            each class, by an estimate; empty if there is none.
        present: of one image and the binary cross-entropy of several outputs, the classes that it has; empty if it has
            one, or if they do not follow.
    """

    inferred: tuple[int, ...] | None
    correct: int | None
    counts: tuple[int, ...] = ()
    counted: int | None = None
    among: int = 0
    present: tuple[int, ...] = ()
    layer: str = ""
    having: tuple[int, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """The share that is correct, 0 to 1; None if that is not known."""
        if self.counted is not None:
            return self.counted / max(1, self.among)
        return None if self.inferred is None or self.correct is None else self.correct / max(1, len(self.inferred))


@dataclass(frozen=True)
class ClosedFormLeaks:
    """What leaks from what was sent without any optimisation.

    Attributes:
        layers: the trained layers, in order of registration.
        forms: the inputs of linear layers.
        labels: the labels.
        exposures: the inputs of convolutions, in order of execution.
        untested: why the convolutions were not tested; empty if they were.
    """

    layers: tuple[LayerShare, ...]
    forms: tuple[ClosedForm, ...]
    labels: InferredLabels
    exposures: tuple[LayerExposure, ...] = ()
    untested: str = ""

    @property
    def exposed(self) -> list[LayerExposure]:
        """The convolutions whose input follows from their own gradient for every image that was tried."""
        return [one for one in self.exposures if one.everywhere]

    @property
    def derived(self) -> list[LayerExposure]:
        """The further convolutions whose input follows for every image that was tried, from those of others."""
        return [one for one in self.exposures if one.known and not one.everywhere]

    @property
    def unordered(self) -> list[LayerExposure]:
        """The 1x1 convolutions whose input follows from their own gradient in unknown order of the positions."""
        return [one for one in self.exposures if one.unordered]

    @classmethod
    def of(
        cls, sent: Observation, inputs: Mapping[str, Sequence[Tensor]] | None, labels: Sequence[int] | None
    ) -> ClosedFormLeaks:
        """Return what leaks from gradients; it is checked against the true inputs and labels if these are known."""
        own = tuple(exposures(sent, inputs))
        return cls(tuple(shares(sent)), tuple(closed_forms(sent, inputs)), labels_of(sent, labels), own)


def shares(observation: Observation) -> list[LayerShare]:
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
            LayerShare(
                layer=layer or "(the network itself)",
                kind=type(modules[layer]).__name__,
                parameters=sum(sizes[name] for name in sent),
                withheld=sum(size for name, size in sizes.items() if name not in sent),
                share=float((part / total.clamp(min=torch.finfo(total.dtype).tiny)).mean()),
            )
        )
    return found


def closed_forms(observation: Observation, truth: Mapping[str, Sequence[Tensor]] | None) -> list[ClosedForm]:
    """Return the inputs that linear layers leak, in float64: see ``layer_input`` and ``layer_direction``.

    A layer that runs on several vectors (tokens) leaks none of them and is left out, as is a layer that sent nothing.

    Args:
        observation: what the server saw.
        truth: layer -> its true inputs, one for each image, each [.., inputs]; None if they are not known.
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
                residual=float(unexplained(weight, by_bias, value).max()),
                conclusive=_conclusive(weight),
                error=max(errors, default=math.nan),
                pixels=name in pixels,
                factor=sent is None,
            )
        )
    return found


def _conclusive(weight: Tensor) -> bool:
    """Return whether several images would leave a residual in dL/dW [T, C, S]: it has at least two independent rows.

    The derivatives of the cross-entropy with respect to the logits sum to zero, and with them the rows of the last
    layer's gradient: two of those rows are dependent, and only a third one counts.
    """
    size = weight.flatten(1).norm(dim=1)
    rows = weight.norm(dim=2).sort(dim=1, descending=True).values
    dependent = weight.sum(1).norm(dim=1) <= RESIDUAL_TOLERANCE * size
    rest = torch.where(dependent, rows[:, 2:].norm(dim=1), rows[:, 1:].norm(dim=1))
    return bool((rest > MIN_FURTHER_ROWS * size).all())


def _error(value: Tensor, real: Tensor, factor: bool) -> float:
    """Return the relative error of a layer's input, after the best factor if the factor is not known."""
    value, real = value.cpu(), real.flatten().double()
    value = value * (value @ real) if factor else value
    size = float(real.norm())
    return float((value - real).norm()) / size if size else float(value.norm())


def last_in_use(network: nn.Module, observation: Observation) -> str:
    """Return the name of the last linear layer whose bias or weight changed; empty without one.

    A head that is registered and not in use, such as an auxiliary one, has a gradient of zeros.
    """
    for name in reversed(linears(network)):
        sent = [observation.gradient.get(f"{name}.{part}") for part in ("weight", "bias")]
        if any(one is not None and bool(one.any()) for one in sent):
            return name
    return ""


def classes_present(observation: Observation) -> tuple[int, ...]:
    """Return the classes of the one image of a network that is trained by the binary cross-entropy of its outputs.

    The derivative by the logit of a class is negative if, and only if, the image has it; it is that by the last bias.
    """
    if not head_of(observation.model).several or observation.trials != 1:
        return ()
    last = next(iter(classifiers(observation, observation.num_classes)), "")
    bias = observation.gradient.get(f"{last}.bias")
    if bias is None:
        return ()
    return tuple((bias[0] < 0).nonzero().flatten().tolist())


def labels_of(observation: Observation, truth: Sequence[int] | None) -> InferredLabels:
    """Return the labels that follow from the gradient of the last layer; granted labels are not used."""
    present = classes_present(observation)
    if len(present) > 1:
        return InferredLabels(None, None, present=present)
    read = read_labels(observation)
    if read is None:
        return InferredLabels(None, None)
    values = tuple(int(label) for label in read)
    return InferredLabels(values, None if truth is None else sum(a == b for a, b in zip(values, truth)))
