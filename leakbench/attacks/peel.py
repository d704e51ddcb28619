"""Peel: the image in closed form, from the last layer back to the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.base import Attack, register
from leakbench.attacks.matching import Positive, analytic_labels
from leakbench.attacks.peeling.chain import Chain, find_chain
from leakbench.attacks.peeling.equations import Prior, Solution, undo_convolution, undo_normalised
from leakbench.attacks.peeling.layers import Activation, Convolution, Layer, Normalisation, Reshape, Scaling
from leakbench.attacks.peeling.undo import (
    Estimate,
    Noise,
    Standardised,
    undo_activation,
    undo_linear,
    undo_normalisation,
    undo_scaling,
)
from leakbench.core.component import LATER
from leakbench.core.device import SHARE, free_memory
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.evaluate import tensors_of
from leakbench.models.surgery import linears
from leakbench.observation import Observation

LIMIT = 12288
"""The most values that a layer may take: a system of N unknowns takes N^3 operations and ``COPIES`` N^2 numbers."""

COPIES = 7
"""How many matrices of the largest system are held for each trial."""

CONTRAST = 0.2
"""The standard deviation that is given to an image whose contrast a normalisation has removed."""

CLEAR = 0.2
"""The relative error up to which the contrast that the eps of a normalisation tells is taken."""

ROUNDS = 20
"""How often values of the linear layer's input that were withheld are guessed anew; they come ten times closer in
two to four rounds."""

SPREAD = 1.0
"""The standard deviation of a pixel about the public mean, which keeps what nothing else tells near it."""


@register("peel")
@dataclass(frozen=True)
class Peel(Attack):
    """Peel: closed form, layer by layer, through invertible activations and normalisations of unknown scale and shift.

    The lowest linear layer with a bias gives its input f = (dL/dW)^T d / |d|^2 and dL/df = W^T d, with d = dL/db. Below
    it each convolution gives its input a by weighted least squares on w * a = s - b and corr(e, a) = dL/dw together,
    with s its output and e the error there. Before a normalisation of one image they are w * a = sigma z + m and
    corr(h, a) = sigma dL/dw, with sigma and m of each channel unknown too; z is the standardised channel and h the
    error through the normalisation, so that neither key nor lock is needed. All in float64. An image that meets such a
    normalisation first has lost its contrast, but for what the normalisation's eps shows where scale and shift are
    public; elsewhere it is returned with the brightness of the public mean.

    Attributes:
        precision: the relative error that is assumed of the gradient, float32's by default; the larger one that the
            gradient of the linear layer shows by itself counts instead.
        roughness: the standard deviation by which neighbouring pixels are assumed to differ, for what equations leave
            open.
        colour: how much less the differences between an image's colours are assumed to change than their mean.
    """

    reference: ClassVar[str] = (
        "in the family of Zhu and Blaschko 2021, R-GAP, ICLR, arXiv 2010.07733; "
        "the way through a normalisation of unknown scale and shift is this package's own"
    )
    assumes: ClassVar[str] = (
        "A chain of linear layers, convolutions, invertible activations (sigmoid, tanh, leaky ReLU) and batch "
        "normalisation of one image; a gradient that is nearly exact."
    )
    cost: ClassVar[str] = (
        "One least-squares problem a layer, in float64; no search. Time grows with the cube of a layer's inputs."
    )
    fails: ClassVar[str] = (
        "ReLU, pooling and residual connections (unsupported); noise: 1e-3 of the gradient costs detail, a tenth all, "
        "behind a secret normalisation less; channels that a gate has shut are lost."
    )
    precision: Annotated[float, Field(gt=0, le=1)] = 3e-7
    roughness: Positive = 0.1
    colour: Positive = field(default=0.15, metadata=LATER)

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where the network is no chain of layers that can be undone."""
        served_chain(observation)

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Undo the layers down to the topmost convolution."""
        chain = served_chain(observation)
        convolutions = [index for index, layer in enumerate(chain.layers) if isinstance(layer, Convolution)]
        if not convolutions:
            return None
        self._peel(replace(chain, layers=chain.layers[convolutions[-1] :]), _rows(observation, 0, observation.trials))
        return observation.trials * _bytes(chain)

    def __call__(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the image of every trial; nothing is drawn from rng."""
        chain = served_chain(observation)
        trials = observation.trials
        size = observation.slots or max(1, int(SHARE * free_memory(observation.device) / _bytes(chain)))
        bounds = [(begin, min(begin + size, trials)) for begin in range(0, trials, size)]
        parts = [self._peel(chain, _rows(observation, *each)) for each in bounds]
        images = torch.cat([value for value, _ in parts]).view(trials, *observation.image_shape)
        return Reconstruction(
            images=images.to(observation.dtype),
            labels=read_labels(observation),
            objective=torch.cat([misfit for _, misfit in parts]).to(observation.dtype),
            failed=~torch.isfinite(images.flatten(1)).all(1),
            path="batched",
        )

    def _peel(self, chain: Chain, observation: Observation) -> tuple[Tensor, Tensor]:
        """Return the input of the lowest layer [T, ...], and the misfit [T] of the lowest convolution's equations."""
        tensors, sent, layers = observation.weights, observation.gradient, chain.layers
        curved = [isinstance(layer, Activation) for layer in layers if not isinstance(layer, Reshape)]
        value, error, noise = undo_linear(
            tensors[chain.weight],
            sent[chain.weight],
            sent[chain.bias],
            self.precision,
            never_zero=bool(curved) and curved[-1],
        )
        top = _State(value, error, torch.zeros_like(noise.relative))
        highest = max((index for index, layer in enumerate(layers) if isinstance(layer, Convolution)), default=0)
        state = self._undo(chain, observation, noise, top, highest, len(layers))
        guessed = value.variance.isinf()
        secret = any(isinstance(layer, Normalisation) and layer.secret for layer in layers[highest:])
        for _ in range(ROUNDS if bool(guessed.any()) and not secret else 0):
            features = state.value.mean
            for layer in layers[highest:]:
                features = layer.forward(features, tensors)
            value = replace(value, mean=torch.where(guessed, features.flatten(1), value.mean))
            state = self._undo(chain, observation, noise, replace(top, value=value), highest, len(layers))
        state = self._undo(chain, observation, noise, state, 0, highest)
        return state.value.mean, state.misfit

    def _undo(
        self, chain: Chain, observation: Observation, noise: Noise, state: _State, begin: int, end: int
    ) -> _State:
        """Go back from the output of layer ``end`` - 1 to the input of layer ``begin``."""
        tensors, sent = observation.weights, observation.gradient
        value, error, misfit = state.value, state.error, state.misfit
        output: Standardised | None = None
        for index, layer in reversed(list(enumerate(chain.layers[begin:end], begin))):
            if isinstance(layer, Reshape):
                value, error = value.view(layer.inputs), error.view(layer.inputs)
            elif isinstance(layer, Activation):
                value, error = undo_activation(layer, value, error)
            elif isinstance(layer, Scaling):
                value, error = undo_scaling(layer, value, error, tensors)
            elif isinstance(layer, Normalisation):
                output = undo_normalisation(layer, value, error, tensors)
            else:
                whole = prod(layer.inputs) == prod(observation.image_shape)
                image = whole and all(isinstance(lower, Reshape) for lower in chain.layers[:index])
                prior = self._prior(observation) if image else None
                kernel, by_weight = layer.kernel(tensors), layer.kernel(sent) if layer.weight in sent else None
                if output is None:
                    value, error = value.view(layer.outputs), error.view(layer.outputs)
                    if layer.bias is not None:
                        value = replace(value, mean=value.mean - tensors[layer.bias][..., None, None])
                    solution = undo_convolution(layer, kernel, value, error, by_weight, noise, prior)
                    value, error = solution.value, solution.error
                else:
                    solution = undo_normalised(layer, kernel, output, by_weight, noise, prior)
                    value, error = solution.value, solution.error
                    if image:
                        upper = chain.layers[index + 1]
                        assert isinstance(upper, Normalisation)
                        value = _exposed(output, solution, upper, observation.mean_image)
                    elif index:
                        unit = find_unit(chain.layers, index, output, solution, tensors, sent)[:, None, None, None]
                        value, error = value.scaled(unit), error.scaled(1 / unit)
                    output = None
                misfit = solution.misfit
        return _State(value, error, misfit)

    def _prior(self, observation: Observation) -> Prior:
        """Return what is assumed of an image: neighbouring pixels are alike, and their colours change together."""
        channels, height, width = observation.image_shape
        mean = observation.mean_image.double().flatten()
        eye = torch.eye(max(channels, height, width)).to(mean)
        common = torch.full_like(eye[:channels, :channels], 1 / channels)
        apart = eye[:channels, :channels] - common
        steps = common / (channels * self.roughness**2) + apart / (self.colour * self.roughness) ** 2
        across, down = (eye[:size, :size].diff(dim=0) for size in (width, height))
        change = torch.kron(eye[:height, :height], across.T @ across) + torch.kron(down.T @ down, eye[:width, :width])
        matrix = torch.kron(steps, change)
        matrix.diagonal().add_(1 / SPREAD**2)
        return Prior(matrix, mean)


@dataclass(frozen=True)
class _State:
    """How far it has gone: a layer's output, the error there, and the misfit [T] of the last equations."""

    value: Estimate
    error: Estimate
    misfit: Tensor


def find_unit(
    layers: Sequence[Layer],
    index: int,
    output: Standardised,
    solution: Solution,
    tensors: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
) -> Tensor:
    """Return [T], the unit in which a solution has the input of the normalised convolution ``layers[index]``.

    That input is an activation's output f(y), and something is known of y (``_clue``):

    - ``shift``: y is normalised with a public beta, and has the mean beta in each channel;
    - ``bias``: y is a convolution's output, and the sum of the error there over a channel is the bias's gradient;
    - ``eps``: y is normalised with secrets, but the convolution's own normalisation is public, and its eps is just
      seen: z has the mean square v / (v + eps) in a channel of variance v. This tells the unit to some per mille.
    """
    clue, activation, lower = _clue(layers, index, sent)
    a, e = solution.value.mean, solution.error.mean
    if clue == "eps":
        upper = layers[index + 1]
        assert isinstance(upper, Normalisation)
        return _unit_by_eps(output, solution, upper.eps)[0]
    margin = torch.full_like(a, 1e-12)

    def mismatch(unit: Tensor) -> Tensor:
        y, slope, _ = activation.invert(unit[:, None, None, None] * a, margin)
        if isinstance(lower, Normalisation):
            gamma, beta = lower.coefficients(tensors, y)
            spread = y.flatten(2).std(2, unbiased=False) - gamma.abs()
            # which eps makes inexact; it counts where f is so straight that the mean tells little
            return (y.mean((2, 3)) - beta).square().sum(1) + 1e-8 * spread.square().sum(1)
        assert isinstance(lower, Convolution)
        assert lower.bias is not None
        return ((e * slope).sum((2, 3)) / unit[:, None] - sent[lower.bias]).square().sum(1)

    return _search(mismatch, 1 / a.square().mean((1, 2, 3)).sqrt())


def _clue(
    layers: Sequence[Layer], index: int, sent: Mapping[str, Tensor]
) -> tuple[Literal["shift", "bias", "eps"], Activation, Layer]:
    """Return what tells the unit of a normalised convolution's input, and the activation and the layer below.

    Raises:
        Unsupported: nothing does.
    """
    lower, activation = layers[index - 2 : index] if index > 1 else (None, None)
    upper = layers[index + 1]
    if isinstance(activation, Activation):
        if isinstance(lower, Normalisation) and not lower.secret:
            return "shift", activation, lower
        if isinstance(lower, Convolution) and lower.bias in sent:
            return "bias", activation, lower
        if isinstance(lower, Normalisation) and isinstance(upper, Normalisation) and not upper.secret:
            return "eps", activation, lower
    raise Unsupported(
        f"peel cannot tell the scale of the input of {layers[index].name}, whose output is normalised: below must be "
        "an activation on a normalisation or on a convolution with a bias, and not both normalisations may be secret"
    )


def _unit_by_eps(output: Standardised, solution: Solution, eps: float) -> tuple[Tensor, Tensor]:
    """Return the unit [T] with 1 - mean(z^2) = eps / (unit * scale)^2 in each channel, and its relative error [T].

    NaN and negative where eps cannot be seen.
    """
    z, scale = output.value.mean, solution.scale
    assert scale is not None
    missing = 1 - z.square().mean((2, 3))
    expected = torch.where(output.alive, eps / scale.square(), 0.0)
    variance = 4 * (z.square() * output.value.variance).mean((2, 3)) / z[0, 0].numel()
    trust = torch.where(output.alive, 1 / variance, 0.0)
    weight = (trust * expected.square()).sum(1)
    inverse_square = (trust * expected * missing).sum(1) / weight
    return inverse_square.rsqrt(), weight.rsqrt() / (2 * inverse_square)


def _search(mismatch: Callable[[Tensor], Tensor], about: Tensor) -> Tensor:
    """Return [T], the positive number of least mismatch [T], on ever finer grids of its logarithm about another [T]."""
    centre, width, points = about.log(), 6.0, 121
    for _ in range(12):
        grid = torch.stack([centre + step for step in torch.linspace(-width, width, points).tolist()])
        values = torch.stack([mismatch(place.exp()) for place in grid])
        best = torch.where(torch.isnan(values), torch.inf, values).argmin(0)
        centre = grid.gather(0, best[None])[0]
        width, points = 2 * width / (points - 1), 21
    return centre.exp()


def _exposed(output: Standardised, solution: Solution, norm: Normalisation, mean_image: Tensor) -> Estimate:
    """Return images in their own unit, where the normalisation is public and its eps is seen well enough.

    Elsewhere contrast is lost: they get the usual one, and the brightness of the public mean.
    """
    value = solution.value
    middle = value.mean.mean((1, 2, 3), keepdim=True)
    usual = CONTRAST / value.mean.std((1, 2, 3), unbiased=False, keepdim=True)
    lost = value.scaled(usual, float(mean_image.mean()) - usual * middle)
    if norm.secret:
        return lost
    unit, error = (each[:, None, None, None] for each in _unit_by_eps(output, solution, norm.eps))
    seen = value.scaled(unit)
    clear = (error > 0) & (error < CLEAR)
    return Estimate(torch.where(clear, seen.mean, lost.mean), torch.where(clear, seen.variance, lost.variance))


def served_chain(observation: Observation) -> Chain:
    """Return the chain of an observation; raise Unsupported where it cannot be undone."""
    chain = find_chain(observation)
    for index, layer in enumerate(chain.layers):
        if not isinstance(layer, Convolution):
            continue
        unknowns = prod(layer.inputs)
        if unknowns > LIMIT:
            raise Unsupported(
                f"peel solves for up to {LIMIT} values at once, and {layer.name} takes {unknowns}; use smaller images"
            )
        if all(isinstance(lower, Reshape) for lower in chain.layers[:index]):
            continue  # what its equations leave open of an image, the prior fills
        known = prod(layer.outputs)
        if layer.weight in observation.gradient:
            taps = prod(layer.geometry.kernel) * layer.outputs[0] // layer.geometry.groups
            known += layer.inputs[0] * min(taps, layer.inputs[1] * layer.inputs[2])
        if known < unknowns:
            raise Unsupported(f"peel has {known} equations for the {unknowns} values that {layer.name} takes")
        if isinstance(chain.layers[index + 1] if index + 1 < len(chain.layers) else None, Normalisation):
            _clue(chain.layers, index, observation.gradient)
    return chain


def _bytes(chain: Chain) -> int:
    """Return how many bytes the largest system takes for each trial."""
    sizes = [prod(layer.inputs) for layer in chain.layers if isinstance(layer, Convolution)]
    return 8 * COPIES * max(sizes, default=1) ** 2


def _rows(observation: Observation, begin: int, end: int) -> Observation:
    """Return the observation of some trials in float64; what all trials share is still held once."""
    own = tensors_of(observation.model)

    def part(name: str, value: Tensor) -> Tensor:
        if value.ndim > own[name].ndim:
            shared = value.stride(0) == 0
            value = value[begin:end]
            if shared:
                return value[:1].double().expand(value.shape)
        return value.double() if value.is_floating_point() else value

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
