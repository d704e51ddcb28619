"""The unit of a convolution's input that equations before a normalisation give up to a factor only; T trials."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from leakbench.attacks.peeling.equations import InputSolution
from leakbench.attacks.peeling.estimate import Estimate, Standardised
from leakbench.attacks.peeling.layers import Activation, ChainLayer, Convolution, Normalisation
from leakbench.errors import Unsupported

USUAL_CONTRAST = 0.2
"""The standard deviation that is given to an image whose contrast a normalisation has removed."""

MAX_UNIT_ERROR = 0.2
"""The relative error up to which the contrast that a normalisation's eps reveals is used."""


def find_unit(
    layer: Convolution,
    below: Sequence[ChainLayer],
    output: Standardised,
    solution: InputSolution,
    tensors: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
) -> Tensor:
    """Return [T], the unit in which a solution has the input of a normalised convolution.

    That input is an activation's output f(y), and something is known of y (``clue``):

    - ``shift``: y is normalised with a public beta, and has the mean beta in each channel;
    - ``bias``: y is a convolution's output, and the sum of the error there over a channel is the bias's gradient;
    - ``eps``: y is normalised with secrets, but the convolution's own normalisation is public, and its eps is just
      seen: z has the mean square v / (v + eps) in a channel of variance v. The unit follows to some per mille.
    """
    kind, activation, lower = clue(layer, below, output.eps is not None, sent)
    a, e = solution.value.mean, solution.error.mean
    if kind == "eps":
        return _unit_by_eps(output, solution)[0]
    margin = torch.full_like(a, 1e-12)

    def mismatch(unit: Tensor) -> Tensor:
        y, slope, _ = activation.invert(unit[:, None, None, None] * a, margin)
        if isinstance(lower, Normalisation):
            gamma, beta = lower.coefficients(tensors, y)
            spread = y.flatten(2).std(2, unbiased=False) - gamma.abs()
            # eps makes the spread inexact: it has a small weight, for an f so straight that the mean says little
            return (y.mean((2, 3)) - beta).square().sum(1) + 1e-8 * spread.square().sum(1)
        assert isinstance(lower, Convolution)
        assert lower.bias is not None
        # dL/db is the sum of the error there, which is e f'(y), and e is in one over the unit
        return ((e * slope).sum((2, 3)) / unit[:, None] - sent[lower.bias]).square().sum(1)

    return _search(mismatch, 1 / a.square().mean((1, 2, 3)).sqrt())


def clue(
    layer: Convolution, below: Sequence[ChainLayer], public: bool, sent: Mapping[str, Tensor]
) -> tuple[Literal["shift", "bias", "eps"], Activation, ChainLayer]:
    """Return how the unit of a normalised convolution's input is found, and the activation and the layer below.

    Args:
        layer: the convolution.
        below: the layers below it.
        public: the normalisation above it is public.
        sent: the gradient.

    Raises:
        Unsupported: the unit cannot be found.
    """
    lower, activation = below[-2:] if len(below) > 1 else (None, None)
    if isinstance(activation, Activation):
        if isinstance(lower, Normalisation) and not lower.secret:
            return "shift", activation, lower
        if isinstance(lower, Convolution) and lower.bias in sent:
            return "bias", activation, lower
        if isinstance(lower, Normalisation) and public:
            return "eps", activation, lower
    raise Unsupported(
        f"peel cannot infer the scale of the input of {layer.name}, whose output is normalised: below must be "
        "an activation on a normalisation or on a convolution with a bias, and not both normalisations may be secret"
    )


def _unit_by_eps(output: Standardised, solution: InputSolution) -> tuple[Tensor, Tensor]:
    """Return the unit [T] with 1 - mean(z^2) = eps / (unit * scale)^2 in each channel, and its relative error [T].

    NaN and negative if eps cannot be seen.
    """
    z, scale, eps = output.value.mean, solution.scale, output.eps
    assert scale is not None
    assert eps is not None
    missing = 1 - z.square().mean((2, 3))
    expected = torch.where(output.alive, eps / scale.square(), 0.0)
    # channels are averaged with weights of one over their variance; z^2 has 4 z^2 times the variance of z
    variance = 4 * (z.square() * output.value.variance).mean((2, 3)) / z[0, 0].numel()
    trust = torch.where(output.alive, 1 / variance, 0.0)
    weight = (trust * expected.square()).sum(1)
    inverse_square = (trust * expected * missing).sum(1) / weight
    return inverse_square.rsqrt(), weight.rsqrt() / (2 * inverse_square)


def _search(mismatch: Callable[[Tensor], Tensor], about: Tensor) -> Tensor:
    """Return the positive numbers [T] of least mismatch [T], on ever finer grids of their logarithm."""
    centre, width, points = about.log(), 6.0, 121
    for _ in range(12):
        grid = torch.stack([centre + step for step in torch.linspace(-width, width, points).tolist()])
        values = torch.stack([mismatch(place.exp()) for place in grid])
        best = torch.where(torch.isnan(values), torch.inf, values).argmin(0)
        centre = grid.gather(0, best[None])[0]
        width, points = 2 * width / (points - 1), 21
    return centre.exp()


def expose(output: Standardised, solution: InputSolution, mean_image: Tensor) -> Estimate:
    """Return images in their own unit, if the normalisation is public and its eps is seen well enough.

    Otherwise contrast is lost: they get the usual one, and the brightness of the public mean.
    """
    value = solution.value
    middle = value.mean.mean((1, 2, 3), keepdim=True)
    usual = USUAL_CONTRAST / value.mean.std((1, 2, 3), unbiased=False, keepdim=True)
    lost = value.scaled(usual, float(mean_image.mean()) - usual * middle)
    if output.eps is None:
        return lost
    unit, error = (each[:, None, None, None] for each in _unit_by_eps(output, solution))
    seen = value.scaled(unit)
    clear = (error > 0) & (error < MAX_UNIT_ERROR)
    return Estimate(torch.where(clear, seen.mean, lost.mean), torch.where(clear, seen.variance, lost.variance))
