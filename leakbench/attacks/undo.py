"""What each kind of layer gives away of its input, when its output and the error at its output are known.

Notation for one layer on one image: a its input, s = w * a + b its output, e = dL/ds the error there, and corr(e, a) =
dL/dw. T trials. Every value is held with its variance, from which the weight of the equations that it enters follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.chain import Activation, Convolution, Normalisation, Scaling
from leakbench.gradients.convolution import Geometry, convolve, input_gradient, weight_gradient

JITTERS = (1e-14, 1e-12, 1e-10)
"""What is added in turn to the diagonal, which is 1, of a system that rounding has made indefinite."""

DEAD = 25.0
"""A channel whose squared scale is less than this multiple of its noise tells nothing."""

GAIN = 0.2
"""The standard deviation of w * a that is assumed for a kernel of norm 1 on an image."""


@dataclass(frozen=True)
class Estimate:
    """Values [T, *shape] and their variances."""

    mean: Tensor
    variance: Tensor

    def view(self, shape: Sequence[int]) -> Estimate:
        """Return the same values in another shape, [T, *shape]."""
        return Estimate(*(value.reshape(len(value), *shape) for value in (self.mean, self.variance)))

    def scaled(self, factor: Tensor, shift: Tensor | float = 0.0) -> Estimate:
        """Return factor * values + shift."""
        return Estimate(factor * self.mean + shift, factor.square() * self.variance)


@dataclass(frozen=True)
class Prior:
    """What is assumed of an input a [n] beforehand: (a - mean)^T matrix (a - mean) is subtracted from 2 log p.

    Attributes:
        matrix: [n, n].
        mean: [n].
    """

    matrix: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Solution:
    """What a convolution gives away.

    Attributes:
        value: its input, [T, C, H, W]; behind a normalisation up to a factor, that of ``scale``.
        error: the error there, up to one over that factor.
        misfit: [T], how far the equations are from being met, in standard deviations (root mean square).
        scale: [T, O], the standard deviation of the output's channels in the input's unit; None without normalisation.
    """

    value: Estimate
    error: Estimate
    misfit: Tensor
    scale: Tensor | None = None


def undo_linear(
    weight: Tensor, by_weight: Tensor, by_bias: Tensor, precision: float
) -> tuple[Estimate, Estimate, Tensor]:
    """Return a linear layer's input f [T, D], the error dL/df there, and the gradient's relative noise [T].

    With d = dL/db: dL/dW = d f^T, so f = (dL/dW)^T d / |d|^2, and dL/df = W^T d. What dL/dW differs from d f^T by is noise.

    Args:
        weight: W [T, K, D].
        by_weight: dL/dW [T, K, D].
        by_bias: dL/db [T, K].
        precision: the least relative noise that is assumed.
    """
    d = by_bias[:, None]
    features = (d @ by_weight)[:, 0] / d.square().sum((1, 2))[:, None]
    rest = by_weight - by_bias[..., None] * features[:, None]
    measured = (rest.square().sum((1, 2)) / by_weight.square().sum((1, 2))).sqrt()
    noise = measured.clamp(min=precision)
    power = features.square()
    variance = noise.square()[:, None] * (power + power.mean(1, keepdim=True))
    error = (d @ weight)[:, 0]
    return (
        Estimate(features, variance),
        Estimate(error, noise.square()[:, None] * (d.square() @ weight.square())[:, 0]),
        noise,
    )


def undo_activation(layer: Activation, value: Estimate, error: Estimate) -> tuple[Estimate, Estimate]:
    """Return an activation's input, and the error there."""
    inputs, slope, bend = layer.invert(value.mean, value.variance.sqrt())
    variance = slope.square() * error.variance + (error.mean * bend).square() * value.variance
    return Estimate(inputs, value.variance / slope.square()), Estimate(slope * error.mean, variance)


def undo_scaling(
    layer: Scaling, value: Estimate, error: Estimate, tensors: Mapping[str, Tensor]
) -> tuple[Estimate, Estimate]:
    """Return the input of a public scaling of channels, and the error there."""
    scale, shift = (c[..., None, None] for c in layer.coefficients(tensors, value.mean))
    return value.scaled(1 / scale, -shift / scale), error.scaled(scale)


@dataclass(frozen=True)
class Standardised:
    """What a normalisation y = gamma z + beta gives away.

    Attributes:
        value: z [T, C, H, W].
        error: h = gamma (e - mean(e) - z mean(e z)); the error at the normalisation's input is h / sigma.
        alive: [T, C], the channels whose gamma tells z from noise.
    """

    value: Estimate
    error: Estimate
    alive: Tensor


def undo_normalisation(
    layer: Normalisation, value: Estimate, error: Estimate, tensors: Mapping[str, Tensor]
) -> Standardised:
    """Return what is known of a normalisation's input u = sigma z + m, up to the sigma and m of each channel.

    A secret gamma and beta are the standard deviation and the mean of the channel, because z has mean 0 and variance 1.
    """
    y = value.mean
    if layer.secret:
        beta, gamma = y.mean((2, 3)), y.flatten(2).std(2, unbiased=False)
    else:
        gamma, beta = layer.coefficients(tensors, y)
    alive = gamma.square() > DEAD * value.variance.mean((2, 3))
    gamma, beta = torch.where(alive, gamma, 1.0)[..., None, None], beta[..., None, None]
    live = alive[..., None, None]
    z = torch.where(live, (y - beta) / gamma, 0.0)
    cross = (error.mean * z).mean((2, 3), keepdim=True)
    h = gamma * (error.mean - error.mean.mean((2, 3), keepdim=True) - z * cross)
    noise = value.variance / gamma.square()
    return Standardised(
        Estimate(z, noise),
        Estimate(torch.where(live, h, 0.0), gamma.square() * (error.variance + cross.square() * noise)),
        alive,
    )


def undo_convolution(
    layer: Convolution,
    kernel: Tensor,
    value: Estimate,
    error: Estimate,
    by_weight: Tensor | None,
    noise: Tensor,
    prior: Prior | None,
) -> Solution:
    """Return the input of a convolution by weighted least squares on w * a = s - b and corr(e, a) = dL/dw.

    Args:
        layer: the convolution.
        kernel: w, [T, O, C / groups, kh, kw].
        value: s - b, [T, O, h, w].
        error: e, [T, O, h, w].
        by_weight: dL/dw, shaped like the kernel; None where it was not sent.
        noise: [T], the relative noise of dL/dw.
        prior: of the input; None for a weak one about zero, which needs no variances afterwards.
    """
    squares = kernel.square().sum((2, 3, 4))
    power = value.mean.square().mean((1, 2, 3)) / squares.mean(1)
    equations = _Equations.of(layer, kernel, value.variance, error, by_weight, noise, power, torch.ones_like(squares))
    matrix = equations.gram()
    sent = torch.zeros_like(kernel) if by_weight is None else by_weight
    right = equations.adjoint(value.mean, sent)
    if prior is None:
        matrix.diagonal(dim1=1, dim2=2).add_(1 / power[:, None])
    else:
        matrix += prior.matrix
        right = right + prior.matrix @ prior.mean

    def rest(a: Tensor) -> Tensor:
        forward, gradient = equations.apply(a)
        pull = a / power[:, None] if prior is None else (a - prior.mean) @ prior.matrix
        return equations.adjoint(value.mean - forward, sent - gradient) - pull

    a, variance = solve_definite(matrix, right, rest, with_variance=prior is None)
    forward, gradient = equations.apply(a)
    shape = (len(a), *layer.inputs)
    return Solution(
        Estimate(a.view(shape), variance.view(shape)),
        _below(layer, kernel, error),
        equations.misfit(value.mean - forward, sent - gradient),
    )


def undo_normalised(
    layer: Convolution,
    kernel: Tensor,
    output: Standardised,
    by_weight: Tensor | None,
    noise: Tensor,
    prior: Prior | None,
) -> Solution:
    """Return the input of a convolution before a normalisation, up to a factor.

    The equations w * a = sigma z + m and corr(h, a) = sigma dL/dw are linear and homogeneous in a and in each output
    channel's sigma and m (which takes up the bias). The sigma of the clearest channel is set to 1.

    Args:
        layer: the convolution.
        kernel: w, [T, O, C / groups, kh, kw].
        output: what the normalisation gives away.
        by_weight: dL/dw, shaped like the kernel; None where it was not sent.
        noise: [T], the relative noise of dL/dw.
        prior: of the input in its own unit, about a mean of zero; None for a weak one.
    """
    trials, outputs = output.alive.shape
    unclear = torch.where(output.alive, output.value.variance.mean((2, 3)), torch.inf)
    clearest = unclear.argmin(1)
    size = kernel.square().sum((2, 3, 4)).sqrt()
    size = size / size.gather(1, clearest[:, None])
    unit = 1 / (GAIN * kernel.square().sum((2, 3, 4)).sqrt().gather(1, clearest[:, None])[:, 0])
    power = unit.square()
    equations = _Equations.of(
        layer, kernel, output.value.variance, output.error, by_weight, noise, power, size, output.alive
    )
    z = output.value.mean
    sent = torch.zeros_like(kernel) if by_weight is None else by_weight
    # the unknowns are a, then every sigma, then every m
    count = prod(layer.inputs)
    matrix = z.new_zeros(trials, count + 2 * outputs, count + 2 * outputs)
    matrix[:, :count, :count] = equations.gram()
    if prior is None:
        matrix[:, :count, :count].diagonal(dim1=1, dim2=2).add_(1 / power[:, None])
    else:
        matrix[:, :count, :count] += prior.matrix / power[:, None, None]
    for channel in range(outputs):
        one = torch.zeros_like(size)
        one[:, channel] = 1
        one_f, one_g = one[..., None, None], one[..., None, None, None]
        by_scale = equations.adjoint(-one_f * z, -one_g * sent)
        by_shift = equations.adjoint(-one_f * torch.ones_like(z), torch.zeros_like(sent))
        for column, values in ((count + channel, by_scale), (count + outputs + channel, by_shift)):
            matrix[:, :count, column] = values
            matrix[:, column, :count] = values
    forward, gradient = equations.forward, equations.gradient[..., None, None, None]
    scales, shifts = slice(count, count + outputs), slice(count + outputs, None)
    diagonal = torch.diag_embed((forward * z.square()).sum((2, 3)) + (gradient * sent.square()).sum((2, 3, 4)))
    matrix[:, scales, scales] = diagonal
    matrix[:, shifts, shifts] = torch.diag_embed(forward.sum((2, 3)))
    matrix[:, scales, shifts] = matrix[:, shifts, scales] = torch.diag_embed((forward * z).sum((2, 3)))
    own = matrix.diagonal(dim1=1, dim2=2)
    own.add_((own == 0).to(own))  # a dead channel's

    fixed = count + clearest
    rows = torch.arange(trials, device=z.device)
    right = -matrix[rows, :, fixed]
    right[rows, fixed] = 1.0
    matrix[rows, :, fixed] = 0.0
    matrix[rows, fixed, :] = 0.0
    matrix[rows, fixed, fixed] = 1.0

    def residuals(unknowns: Tensor) -> tuple[Tensor, Tensor]:
        a, sigma, shift = unknowns.split([count, outputs, outputs], 1)
        by_forward, by_gradient = equations.apply(a)
        return (
            sigma[..., None, None] * z + shift[..., None, None] - by_forward,
            sigma[..., None, None, None] * sent - by_gradient,
        )

    def rest(unknowns: Tensor) -> Tensor:
        a = unknowns[:, :count]
        by_forward, by_gradient = residuals(unknowns)
        pull = (a if prior is None else a @ prior.matrix) / power[:, None]
        weighted = forward * by_forward
        out = torch.cat(
            [
                equations.adjoint(by_forward, by_gradient) - pull,
                -(weighted * z).sum((2, 3)) - (gradient * by_gradient * sent).sum((2, 3, 4)),
                -weighted.sum((2, 3)),
            ],
            1,
        )
        out[rows, fixed] = 0.0
        return out

    unknowns, variance = solve_definite(matrix, right, rest, with_variance=prior is None)
    sigma = unknowns[:, scales]
    by_forward, by_gradient = residuals(unknowns)
    shape = (trials, *layer.inputs)
    inverse = torch.where(output.alive, 1 / sigma, 0.0)[..., None, None]
    return Solution(
        Estimate(unknowns[:, :count].reshape(shape), variance[:, :count].reshape(shape)),
        _below(layer, kernel, output.error.scaled(inverse)),
        equations.misfit(by_forward, by_gradient),
        sigma,
    )


def _below(layer: Convolution, kernel: Tensor, error: Estimate) -> Estimate:
    """Return the error at a convolution's input."""
    square = kernel[:1].square().expand_as(kernel) if kernel.stride(0) == 0 else kernel.square()
    return Estimate(
        input_gradient(error.mean, kernel, layer.geometry), input_gradient(error.variance, square, layer.geometry)
    )


@dataclass(frozen=True)
class _Equations:
    """The equations of a convolution, w * a = r and corr(e, a) = g, each with a weight: one over its variance.

    Attributes:
        layer: the convolution.
        kernel: w, [T, O, C / groups, kh, kw].
        error: e, [T, O, h, w].
        forward: the weights of the first, [T, O, h, w].
        gradient: the weights of the second, [T, O].
    """

    layer: Convolution
    kernel: Tensor
    error: Tensor
    forward: Tensor
    gradient: Tensor

    @classmethod
    def of(
        cls,
        layer: Convolution,
        kernel: Tensor,
        variance: Tensor,
        error: Estimate,
        by_weight: Tensor | None,
        noise: Tensor,
        power: Tensor,
        size: Tensor,
        alive: Tensor | None = None,
    ) -> _Equations:
        """Weigh the equations.

        Args:
            layer: the convolution.
            kernel: w.
            variance: of r where ``size`` is 1, [T, O, h, w].
            error: e.
            by_weight: g where ``size`` is 1; None where there are no such equations.
            noise: [T], the relative noise of g.
            power: [T], the expected square of a.
            size: [T, O], what the right-hand sides are multiplied by.
            alive: [T, O], the channels that tell anything; None for all.
        """
        forward = 1 / (size.square()[..., None, None] * variance)
        if by_weight is None:
            gradient = torch.zeros_like(size)
        else:
            scatter = noise.square() * by_weight.square().mean((1, 2, 3, 4))
            spread = power[:, None] * error.variance.sum((2, 3))
            gradient = 1 / (size.square() * scatter[:, None] + spread)
        if alive is not None:
            forward, gradient = torch.where(alive[..., None, None], forward, 0.0), torch.where(alive, gradient, 0.0)
        return cls(layer, kernel, error.mean, forward, gradient)

    def apply(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return w * a and corr(e, a) for a [T, n]."""
        image = a.reshape(len(a), *self.layer.inputs)
        return (
            convolve(image, self.kernel, self.layer.geometry),
            weight_gradient(image, self.error, self.layer.geometry),
        )

    def adjoint(self, forward: Tensor, gradient: Tensor) -> Tensor:
        """Return [T, n], the transpose of ``apply`` on weighted rows [T, O, h, w] and [T, O, C / groups, kh, kw]."""
        geometry = self.layer.geometry
        out = input_gradient(self.forward * forward, self.kernel, geometry)
        out = out + input_gradient(self.error, self.gradient[..., None, None, None] * gradient, geometry)
        return out.flatten(1)

    def gram(self) -> Tensor:
        """Return [T, n, n], ``adjoint`` of ``apply`` as matrices."""
        geometry, (channels, height, width) = self.layer.geometry, self.layer.inputs
        places, count = height * width, channels * height * width
        trials = len(self.kernel)
        eye = torch.eye(count, dtype=self.kernel.dtype, device=self.kernel.device).view(count, *self.layer.inputs)
        shared = self.kernel.stride(0) == 0 or trials == 1
        out = eye.new_empty(trials, count, count)
        responses = None
        for trial in range(trials):
            kernel = self.kernel[trial : trial + 1].expand(count, *self.kernel.shape[1:])
            if responses is None or not shared:
                responses = convolve(eye, kernel, geometry)
            out[trial] = input_gradient(responses * self.forward[trial], kernel, geometry).flatten(1)
        blocks = self._gradient_blocks()
        each = channels // geometry.groups
        squares = out.view(trials, channels, places, channels, places)
        for channel in range(channels):
            squares[:, channel, :, channel] += blocks[:, channel // each]
        return out

    def _gradient_blocks(self) -> Tensor:
        """Return [T, groups, H W, H W]: the second equations' share for a channel, the same throughout a group."""
        geometry = self.layer.geometry
        places = geometry.image[0] * geometry.image[1]
        index = _taps(geometry, self.kernel.device)
        trials, outputs = self.gradient.shape
        taps, windows = index.shape
        shape = (trials, outputs, taps, windows)
        rows = self.error.new_zeros(trials, outputs, taps, places + 1)
        values = self.error.reshape(trials, outputs, 1, windows).expand(shape)
        rows = rows.scatter(3, index.expand(shape), values)[..., :places] * self.gradient.sqrt()[..., None, None]
        rows = rows.reshape(trials, geometry.groups, -1, places)
        return rows.mT @ rows

    def misfit(self, forward: Tensor, gradient: Tensor) -> Tensor:
        """Return [T], the root mean square of residuals in standard deviations."""
        weights = self.gradient[..., None, None, None]
        total = (self.forward * forward.square()).sum((1, 2, 3)) + (weights * gradient.square()).sum((1, 2, 3, 4))
        each = gradient[0, 0].numel()
        count = (self.forward > 0).sum((1, 2, 3)) + each * (self.gradient > 0).sum(1)
        return (total / count).sqrt()


def _taps(geometry: Geometry, device: torch.device) -> Tensor:
    """Return [kh kw, h w]: the place of the image that each tap of the kernel meets in each window.

    Places outside of the image have the index H W.
    """
    height, width = geometry.image
    places = torch.arange(1, height * width + 1, dtype=torch.float64, device=device).view(1, 1, height, width)
    windows = F.unfold(places, geometry.kernel, geometry.dilation, geometry.padding, geometry.stride)[0].long() - 1
    return torch.where(windows < 0, height * width, windows)


def solve_definite(
    matrix: Tensor, right: Tensor, rest: Callable[[Tensor], Tensor], with_variance: bool
) -> tuple[Tensor, Tensor]:
    """Solve symmetric positive definite systems, with two steps of iterative refinement.

    Args:
        matrix: [T, n, n]; overwritten.
        right: [T, n].
        rest: returns the residual [T, n] of a solution [T, n], more precisely than the matrix does.
        with_variance: return the inverse's diagonal, which takes three times as long.

    Returns:
        The solution [T, n], NaN where the matrix is not positive definite, and the inverse's diagonal [T, n] or zeros.
    """
    scale = torch.rsqrt(matrix.diagonal(dim1=1, dim2=2))
    matrix *= scale[:, :, None]
    matrix *= scale[:, None, :]
    factor, info = torch.linalg.cholesky_ex(matrix)
    for jitter in JITTERS:
        if not bool((info > 0).any()):
            break
        matrix.diagonal(dim1=1, dim2=2).add_(jitter)
        again, status = torch.linalg.cholesky_ex(matrix)
        factor = torch.where((info > 0)[:, None, None], again, factor)
        info = torch.where(info > 0, status, info)

    def back(rows: Tensor) -> Tensor:
        return scale * torch.cholesky_solve((scale * rows)[..., None], factor)[..., 0]

    found = back(right)
    for _ in range(2):
        found = found + back(rest(found))
    found = torch.where((info > 0)[:, None], torch.nan, found)
    if not with_variance:
        return found, torch.zeros_like(found)
    return found, scale.square() * torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
