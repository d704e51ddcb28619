"""Peel: the image in closed form, from the last layer back to the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.base import Attack, register
from leakbench.attacks.chain import Activation, Chain, Convolution, Layer, Normalisation, Reshape, Scaling, find_chain
from leakbench.attacks.matching import Positive, analytic_labels
from leakbench.attacks.undo import (
    Estimate,
    Prior,
    Solution,
    Standardised,
    undo_activation,
    undo_convolution,
    undo_linear,
    undo_normalisation,
    undo_normalised,
    undo_scaling,
)
from leakbench.chunk import SHARE, free_memory
from leakbench.errors import Unsupported
from leakbench.gradients.evaluate import tensors_of
from leakbench.models.surgery import linears
from leakbench.rng import Rng
from leakbench.types import Observation, Reconstruction

LIMIT = 12288
"""The most values that a layer may take: a system of N unknowns takes N^3 operations and ``COPIES`` N^2 numbers."""

COPIES = 7
"""How many matrices of the largest system are held for each trial."""

CONTRAST = 0.2
"""The standard deviation that is given to an image whose contrast a normalisation has removed."""

COLOUR = 0.2
"""How much less than their common part the differences between an image's colours are assumed to change."""

TINT = 0.15
"""The standard deviation that is assumed of the differences between an image's colours."""


@register("peel")
@dataclass(frozen=True)
class Peel(Attack):
    """Peel: closed form, layer by layer, through invertible activations and normalisations of unknown scale and shift.

    The lowest linear layer with a bias gives its input f = (dL/dW)^T d / |d|^2 and dL/df = W^T d, with d = dL/db. Below
    it each convolution gives its input a by weighted least squares on w * a = s - b and corr(e, a) = dL/dw together,
    with s its output and e the error there. Before a normalisation of one image they are w * a = sigma z + m and
    corr(h, a) = sigma dL/dw, with sigma and m of each channel unknown too; z is the standardised channel and h the
    error through the normalisation, so that neither key nor lock is needed. All in float64. The contrast of an image
    that meets such a normalisation first is lost: it is returned with the brightness of the public mean.

    Attributes:
        precision: the relative error that is assumed of the gradient, float32's by default; the larger one that the
            gradient of the linear layer shows by itself counts instead.
        roughness: the standard deviation by which neighbouring pixels are assumed to differ, for what equations leave
            open.
    """

    reference: ClassVar[str] = (
        "in the family of Zhu and Blaschko 2021, R-GAP, ICLR, arXiv 2010.07733; "
        "the way through a normalisation of unknown scale and shift is this package's own"
    )
    precision: Annotated[float, Field(gt=0, le=1)] = 3e-7
    roughness: Positive = 0.1

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where the network is no chain of layers that can be undone."""
        _supported(observation)

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Undo the layers down to the topmost convolution."""
        chain = _supported(observation)
        convolutions = [index for index, layer in enumerate(chain.layers) if isinstance(layer, Convolution)]
        if not convolutions:
            return None
        self._peel(replace(chain, layers=chain.layers[convolutions[-1] :]), _rows(observation, 0, observation.trials))
        return observation.trials * _bytes(chain)

    def __call__(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the image of every trial; nothing is drawn from rng."""
        chain = _supported(observation)
        trials = observation.trials
        size = observation.slots or max(1, int(SHARE * free_memory(observation.device) / _bytes(chain)))
        bounds = [(begin, min(begin + size, trials)) for begin in range(0, trials, size)]
        parts = [self._peel(chain, _rows(observation, *each)) for each in bounds]
        images = torch.cat([value for value, _ in parts]).view(trials, *observation.image_shape)
        failed = ~torch.isfinite(images.flatten(1)).all(1)
        return Reconstruction(
            images=images.to(observation.dtype),
            labels=read_labels(observation),
            objective=torch.cat([misfit for _, misfit in parts]).to(observation.dtype),
            failed=failed,
            path="batched",
        )

    def _peel(self, chain: Chain, observation: Observation) -> tuple[Tensor, Tensor]:
        """Return the input of the lowest layer [T, ...], and the misfit [T] of its equations."""
        tensors, sent = observation.weights, observation.gradient
        value, error, noise = undo_linear(tensors[chain.weight], sent[chain.weight], sent[chain.bias], self.precision)
        misfit = torch.zeros_like(noise)
        output: Standardised | None = None
        for index in reversed(range(len(chain.layers))):
            layer = chain.layers[index]
            if isinstance(layer, Reshape):
                value, error = value.view(layer.inputs), error.view(layer.inputs)
            elif isinstance(layer, Activation):
                value, error = undo_activation(layer, value, error)
            elif isinstance(layer, Scaling):
                value, error = undo_scaling(layer, value, error, tensors)
            elif isinstance(layer, Normalisation):
                output = undo_normalisation(layer, value, error, tensors)
            else:
                kernel, by_weight = layer.kernel(tensors), layer.kernel(sent) if layer.weight in sent else None
                prior = self._prior(layer, observation) if index == 0 else None
                if output is None:
                    value, error = value.view(layer.outputs), error.view(layer.outputs)
                    if layer.bias is not None:
                        value = replace(value, mean=value.mean - tensors[layer.bias][..., None, None])
                    solution = undo_convolution(layer, kernel, value, error, by_weight, noise, prior)
                    value, error = solution.value, solution.error
                else:
                    solution = undo_normalised(layer, kernel, output, by_weight, noise, prior)
                    if index == 0:
                        value, error = _exposed(solution.value, observation.mean_image), solution.error
                    else:
                        factor = find_factor(chain.layers, index, output, solution, tensors, sent)
                        value, error = solution.value.scaled(factor), solution.error.scaled(1 / factor)
                    output = None
                misfit = solution.misfit
        return value.mean, misfit

    def _prior(self, layer: Convolution, observation: Observation) -> Prior:
        """Return what is assumed of an image: neighbours are alike, in their colours even more, and colours are pale."""
        channels, height, width = layer.inputs
        like = next(iter(observation.weights.values()))
        across, down = _path(width, like), _path(height, like)
        eyes = torch.eye(width).to(across), torch.eye(height).to(across)
        change = torch.kron(eyes[1], across) + torch.kron(down, eyes[0])
        common = torch.full((channels, channels), 1 / channels).to(across)
        apart = torch.eye(channels).to(across) - common
        steps = common / (channels * self.roughness**2) + apart / (COLOUR * self.roughness) ** 2
        matrix = torch.kron(steps, change)
        matrix += torch.kron(common / channels + apart / TINT**2, torch.eye(height * width).to(across))
        mean = observation.mean_image.double() if channels == len(observation.mean_image) else torch.zeros(layer.inputs)
        return Prior(matrix, mean.to(across).flatten())


def find_factor(
    layers: Sequence[Layer],
    index: int,
    output: Standardised,
    solution: Solution,
    tensors: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
) -> Tensor:
    """Return [T, 1, 1, 1]: the factor between a solution's value and the input of the normalised convolution.

    The input is an activation's output f(y), and y is a layer's of which something is known (``_hold``):

    - a public shift beta of a normalisation: y has the mean beta in each channel;
    - the gradient of a convolution's bias, which is the sum of the error at y over the channel;
    - where neither is, a scale at which the upper normalisation's eps is just seen: z has the mean square
      v / (v + eps) in a channel of variance v (at float32 to some per mille).
    """
    kind, activation, lower = _hold(layers, index, sent)
    a, e = solution.value.mean, solution.error.mean
    if kind == "eps":
        upper = layers[index + 1]
        assert isinstance(upper, Normalisation) and solution.scale is not None
        return _by_eps(output, solution.scale, upper.eps)[:, None, None, None]
    margin = torch.full_like(a, 1e-12)

    def mismatch(factor: Tensor) -> Tensor:
        y, slope, _ = activation.invert(factor[:, None, None, None] * a, margin)
        if isinstance(lower, Normalisation):
            gamma, beta = lower.coefficients(tensors, y)
            spread = y.flatten(2).std(2, unbiased=False) - gamma.abs()
            # which eps makes inexact: for activations with which the mean tells nothing
            return (y.mean((2, 3)) - beta).square().sum(1) + 1e-8 * spread.square().sum(1)
        assert isinstance(lower, Convolution) and lower.bias is not None
        total = (e * slope).flatten(2).sum(2) / factor[:, None]
        return (total - sent[lower.bias]).square().sum(1)

    return _search(mismatch, 1 / a.square().mean((1, 2, 3)).sqrt())[:, None, None, None]


def _hold(layers: Sequence[Layer], index: int, sent: Mapping[str, Tensor]) -> tuple[str, Activation, Layer]:
    """Return by what the factor at a normalised convolution is found, and the activation and the layer below it.

    Raises:
        Unsupported: nothing tells the factor.
    """
    name = layers[index].name
    below = layers[max(0, index - 2) : index]
    if len(below) == 2 and isinstance(below[1], Activation):
        lower, activation = below
        if isinstance(lower, Normalisation) and not lower.secret:
            return "shift", activation, lower
        if isinstance(lower, Convolution) and lower.bias in sent:
            return "bias", activation, lower
        upper = layers[index + 1]
        if isinstance(lower, Normalisation) and isinstance(upper, Normalisation) and not upper.secret:
            return "eps", activation, lower
    raise Unsupported(
        f"peel cannot tell the scale of what goes into {name}, which is normalised: below it must be an activation on a "
        "normalisation or on a convolution with a bias, and not both normalisations may be secret"
    )


def _by_eps(output: Standardised, scale: Tensor, eps: float) -> Tensor:
    """Return [T], the factor from 1 - mean(z^2) = eps / (v + eps), v + eps = (factor * scale)^2, by least squares."""
    z = output.value.mean
    missing = 1 - z.square().mean((2, 3))
    weight = 1 / (z.square() * output.value.variance).mean((2, 3))
    expected = torch.where(output.alive, eps / scale.square(), 0.0)
    weight = torch.where(output.alive, weight, 0.0)
    inverse = (weight * expected * missing).sum(1) / (weight * expected.square()).sum(1)
    return inverse.rsqrt()


def _search(mismatch: Callable[[Tensor], Tensor], unit: Tensor) -> Tensor:
    """Return [T], the factor with the smallest mismatch [T], on ever finer grids of its logarithm around a unit [T]."""
    centre, width, points = torch.zeros_like(unit), 6.0, 121
    for _ in range(12):
        grid = [centre + step for step in torch.linspace(-width, width, points).tolist()]
        values = torch.stack([mismatch(unit * place.exp()) for place in grid])
        best = torch.where(torch.isnan(values), torch.inf, values).argmin(0)
        centre = torch.stack(grid).gather(0, best[None])[0]
        width, points = 2 * width / (points - 1), 21
    return unit * centre.exp()


def _exposed(value: Estimate, mean_image: Tensor) -> Estimate:
    """Return images of unknown contrast with the public mean's brightness and the usual contrast."""
    middle = value.mean.mean((1, 2, 3), keepdim=True)
    scale = CONTRAST / value.mean.std((1, 2, 3), unbiased=False, keepdim=True)
    return value.scaled(scale, float(mean_image.mean()) - scale * middle)


def _path(length: int, like: Tensor) -> Tensor:
    """Return the matrix of the sum of squared differences between neighbours in a row of this length."""
    steps = torch.eye(length, device=like.device, dtype=torch.float64).diff(dim=0)
    return steps.T @ steps


def _supported(observation: Observation) -> Chain:
    """Return the chain of an observation; raise Unsupported where it cannot be undone."""
    chain = find_chain(observation)
    layers = chain.layers
    for index, layer in enumerate(layers):
        if not isinstance(layer, Convolution):
            continue
        unknowns = prod(layer.inputs)
        if unknowns > LIMIT:
            raise Unsupported(
                f"peel solves for up to {LIMIT} values at once, and {layer.name} takes {unknowns}; use smaller images"
            )
        if index == 0:
            continue  # what is open of an image, its prior fills
        taps = prod(layer.geometry.kernel) * layer.outputs[0] // layer.geometry.groups
        places = layer.inputs[1] * layer.inputs[2]
        known = prod(layer.outputs) + (
            layer.inputs[0] * min(taps, places) if layer.weight in observation.gradient else 0
        )
        if known < unknowns:
            raise Unsupported(
                f"peel has {known} equations for the {unknowns} values that {layer.name} takes; it loses information"
            )
        if isinstance(layers[index + 1] if index + 1 < len(layers) else None, Normalisation):
            _hold(layers, index, observation.gradient)
    return chain


def _bytes(chain: Chain) -> int:
    """Return how many bytes the largest system takes for each trial."""
    sizes = [prod(layer.inputs) for layer in chain.layers if isinstance(layer, Convolution)]
    return 8 * COPIES * max(sizes, default=1) ** 2


def _rows(observation: Observation, begin: int, end: int) -> Observation:
    """Return the observation of some trials in float64; what all trials share is still held once."""
    own = tensors_of(observation.model)

    def part(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point() or value.ndim == own[name].ndim:
            return value.double() if value.is_floating_point() else value
        rows = value[begin:end]
        return rows[:1].double().expand(rows.shape) if rows.stride(0) == 0 else rows.double()

    return replace(
        observation,
        weights={name: part(name, value) for name, value in observation.weights.items()},
        gradient={name: part(name, value) for name, value in observation.gradient.items()},
    )


def read_labels(observation: Observation) -> Tensor | None:
    """Return [T] int64: the granted labels, or the class whose logit the loss falls with; None where that is not sent.

    With a hard label and cross-entropy, only the true class has a negative derivative by its logit, which is that by
    the last layer's bias.
    """
    if observation.labels is not None:
        return observation.labels
    for name, layer in reversed(linears(observation.model).items()):
        bias = observation.gradient.get(f"{name}.bias")
        if bias is not None and layer.out_features == observation.num_classes and bool(bias.any()):
            return bias.argmin(1)
    with contextlib.suppress(Unsupported):
        return analytic_labels(observation)
    return None
