"""How each layer of a chain is undone: the state at its input from that at its output; T trials."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from math import prod

import torch
from torch import Tensor

from leakbench.attacks.peeling.equations import undo_convolution, undo_normalised
from leakbench.attacks.peeling.estimate import Estimate, GradientNoise, Standardised
from leakbench.attacks.peeling.layers import (
    Activation,
    ChainLayer,
    Convolution,
    Dropout,
    Normalisation,
    Reshape,
    Scaling,
)
from leakbench.attacks.peeling.priors import Smooth
from leakbench.attacks.peeling.scale import expose, find_unit

DEAD_CHANNEL = 9.0
"""A channel whose squared scale is less than this multiple of its noise holds no information."""


@dataclass(frozen=True)
class State:
    """The knowledge between two layers.

    Attributes:
        value: the output of the layer below.
        error: dL/dvalue.
        misfit: [T], of the last equations that were solved.
        standardised: below a normalisation, what it leaks of its input, which value and error do not describe.
    """

    value: Estimate
    error: Estimate
    misfit: Tensor
    standardised: Standardised | None = None


@dataclass(frozen=True)
class Known:
    """The attacker's knowledge at every layer.

    Attributes:
        tensors: the network's public tensors, name -> [T, *shape].
        sent: the gradient, name -> [T, *shape].
        noise: of the gradient.
        prior: of the image.
        marginal: a layer's input has marginal variances; otherwise conditional ones.
        below: the layers below the one that is undone, from the image on.
    """

    tensors: Mapping[str, Tensor]
    sent: Mapping[str, Tensor]
    noise: GradientNoise
    prior: Smooth
    marginal: bool
    below: Sequence[ChainLayer] = ()


@singledispatch
def undo(layer: ChainLayer, state: State, known: Known) -> State:
    """Return the state at a layer's input from that at its output."""
    raise TypeError(f"{type(layer).__name__} cannot be undone")


@undo.register
def _(layer: Reshape, state: State, known: Known) -> State:
    return replace(state, value=state.value.view(layer.inputs), error=state.error.view(layer.inputs))


@undo.register
def _(layer: Activation, state: State, known: Known) -> State:
    value, error = state.value, state.error
    # a guess has an infinite variance; here it is used as if it were exact, for want of anything better
    variance = torch.where(value.variance.isinf(), 0.0, value.variance)
    inputs, slope, bend = layer.invert(value.mean, variance.sqrt())
    # to first order: x = f^-1(y) has the variance of y over f'(x)^2, and the error f'(x) e also depends on y by df'/dy
    spread = slope.square() * error.variance + (error.mean * bend).square() * variance
    return replace(
        state,
        value=Estimate(inputs, value.variance / slope.square()),
        error=Estimate(slope * error.mean, spread),
    )


@undo.register
def _(layer: Dropout, state: State, known: Known) -> State:
    """Return the kept values times 1 - p. The error at a dropped value is 0, so a guess of it is in no equation."""
    value, error = state.value, state.error
    kept, scale = layer.mask(value.mean, known.tensors), 1 - layer.p
    count = kept.flatten(1).sum(1).clamp(min=1)
    middle = (scale * value.mean * kept).flatten(1).sum(1) / count
    guess = middle.view(-1, *[1] * (value.mean.ndim - 1))
    return replace(
        state,
        value=Estimate(
            torch.where(kept, scale * value.mean, guess), torch.where(kept, scale**2 * value.variance, torch.inf)
        ),
        error=Estimate(error.mean * kept / scale, error.variance * kept / scale**2),
    )


@undo.register
def _(layer: Scaling, state: State, known: Known) -> State:
    scale, shift = (c[..., None, None] for c in layer.coefficients(known.tensors, state.value.mean))
    return replace(state, value=state.value.scaled(1 / scale, -shift / scale), error=state.error.scaled(scale))


@undo.register
def _(layer: Normalisation, state: State, known: Known) -> State:
    """Return what is known of a normalisation's input whatever the sigma and the m of each channel.

    A secret gamma and beta are the standard deviation and the mean of the channel, because z has mean 0 and variance 1
    (up to eps, and to gamma's sign, which sigma then takes over).
    """
    value, error = state.value, state.error
    y = value.mean
    if layer.secret:
        beta, gamma = y.mean((2, 3)), y.flatten(2).std(2, unbiased=False)
    else:
        gamma, beta = layer.coefficients(known.tensors, y)
    seen = value.variance.isfinite()
    variance = torch.where(seen, value.variance, 0.0)
    # a gate that has shut, or a gamma near 0, leaves noise in a channel: dividing by gamma would only enlarge it
    alive = gamma.square() * seen.sum((2, 3)) > DEAD_CHANNEL * variance.sum((2, 3))
    live = alive[..., None, None]
    gamma, beta = torch.where(alive, gamma, 1.0)[..., None, None], beta[..., None, None]
    z = torch.where(live, (y - beta) / gamma, 0.0)
    # the backward pass of a normalisation, but for the factor 1 / sigma: sigma is not known yet
    cross = (error.mean * z).mean((2, 3), keepdim=True)
    h = gamma * (error.mean - error.mean.mean((2, 3), keepdim=True) - z * cross)
    standardised = Standardised(
        Estimate(z, value.variance / gamma.square()),
        Estimate(torch.where(live, h, 0.0), gamma.square() * error.variance + cross.square() * variance),
        alive,
        None if layer.secret else layer.eps,
    )
    return replace(state, standardised=standardised)


@undo.register
def _(layer: Convolution, state: State, known: Known) -> State:
    tensors, sent = known.tensors, known.sent
    image = prod(layer.inputs) == known.prior.mean.numel() and all(isinstance(lower, Reshape) for lower in known.below)
    prior = known.prior if image else None
    kernel, by_weight = layer.kernel(tensors), layer.kernel(sent) if layer.weight in sent else None
    output = state.standardised
    if output is None:
        value, error = state.value.view(layer.outputs), state.error.view(layer.outputs)
        if layer.bias is not None:
            value = replace(value, mean=value.mean - tensors[layer.bias][..., None, None])
        solution = undo_convolution(layer, kernel, value, error, by_weight, known.noise, prior, known.marginal)
        return State(solution.value, solution.error, solution.misfit)
    solution = undo_normalised(layer, kernel, output, by_weight, known.noise, prior, known.marginal)
    value, error = solution.value, solution.error
    if image:
        value = expose(output, solution, known.prior.image)
    elif known.below:
        unit = find_unit(layer, known.below, output, solution, tensors, sent)[:, None, None, None]
        value, error = value.scaled(unit), error.scaled(1 / unit)
    return State(value, error, solution.misfit)
