"""The input of a convolution, from its output and the error there, by weighted least squares.

With a the input, s = w * a + b the output and e = dL/ds, forward and backward pass give two sets of equations that are
linear in a: w * a = s - b, and corr(e, a) = dL/dw. Each has a weight, one over its variance. T trials.

In matrices: F a = r and G a = g, with weights V and U, and a belief that a is normal with mean m and precision P. The
most probable a solves (F^T V F + G^T U G + P) a = F^T V r + G^T U g + P m. ``Equations.apply`` is (F, G), ``adjoint``
(F^T V, G^T U), ``gram`` the sum of the first two matrices; none of F and G is ever built. On a CPU conjugate gradients
solve it without ``gram``, in a quarter of the time; a GPU factors ``gram``, which takes fewer launches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from leakbench.attacks.peeling.correlation import taps
from leakbench.attacks.peeling.definite import conjugate_gradients, factor_and_solve
from leakbench.attacks.peeling.estimate import Estimate, GradientNoise, Standardised
from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.priors import Independent, Prior
from leakbench.gradients.bilinear import Form
from leakbench.gradients.convolution import convolution, input_gradient
from leakbench.gradients.lanes.layout import innermost
from leakbench.gradients.lanes.maps import enough

TEMPORARY_SHARE = 8
"""The temporaries of all trials' matrices take at most one of this many parts of the matrices' memory."""

OUTPUT_DEVIATION = 0.2
"""The standard deviation of w * a that is assumed before a normalisation of unknown scale, for a kernel of norm 1."""


@dataclass(frozen=True)
class InputSolution:
    """The input that a convolution leaks.

    Attributes:
        value: its input [T, C, H, W]; before a normalisation, in a unit of which nothing is known.
        error: the error there, in one over that unit.
        misfit: [T], how far the equations are from being met, in standard deviations (root mean square).
        scale: [T, O], the standard deviation sigma of the outputs' channels in the unit of the input, negative if
            that of the normalisation's scale was taken for its absolute value; None without a normalisation.
    """

    value: Estimate
    error: Estimate
    misfit: Tensor
    scale: Tensor | None = None


def undo_convolution(
    layer: Convolution,
    kernel: Tensor,
    output: Estimate,
    error: Estimate,
    by_weight: Tensor | None,
    noise: GradientNoise,
    prior: Prior | None,
    marginal: bool,
) -> InputSolution:
    """Return the input a of a convolution from w * a = s - b and corr(e, a) = dL/dw.

    Args:
        layer: the convolution.
        kernel: w, [T, O, C / groups, kh, kw].
        output: s - b, [T, O, h, w].
        error: e, [T, O, h, w].
        by_weight: dL/dw, shaped like the kernel; None if it was not sent.
        noise: of dL/dw.
        prior: of a; None for a weak one about zero.
        marginal: return marginal variances; otherwise conditional ones, each as if all other values were known. Those
            of an image (with a prior) are always conditional.
    """
    # the expected square of a, if its values are independent: that of w * a over |w|^2
    norms = kernel.square().sum((2, 3, 4))
    power = output.mean.square().mean((1, 2, 3)) / norms.mean(1)
    sent = torch.zeros_like(kernel) if by_weight is None else by_weight
    problem = _Problem(
        Equations.weighted(
            layer, kernel, output.variance, error, by_weight, noise, power, torch.ones_like(norms), norms > 0
        ),
        output.mean,
        sent,
        prior or _weak(layer, kernel),
        # the weak prior has variance 1, and is scaled to the size of a
        1 / power if prior is None else torch.ones_like(power),
    )
    marginal = marginal and prior is None
    if marginal or kernel.device.type != "cpu":
        a, variance = problem.factor(marginal)
    else:
        a, variance = problem.descend()
    shape = (len(a), *layer.inputs)
    return InputSolution(
        Estimate(a.view(shape), variance.view(shape)),
        _below(layer, kernel, error),
        problem.equations.misfit(*problem.residuals(a)),
    )


def undo_normalised(
    layer: Convolution,
    kernel: Tensor,
    output: Standardised,
    by_weight: Tensor | None,
    noise: GradientNoise,
    prior: Prior | None,
    marginal: bool,
) -> InputSolution:
    """Return the input a of a convolution before a normalisation, up to a factor.

    The equations are w * a = sigma z + m and corr(h, a) = sigma dL/dw: linear and homogeneous in a and in each output
    channel's sigma and m, which takes up the bias. The sigma of the clearest channel is set to 1.

    Args:
        layer: the convolution.
        kernel: w, [T, O, C / groups, kh, kw].
        output: z and h.
        by_weight: dL/dw, shaped like the kernel; None if it was not sent.
        noise: of dL/dw.
        prior: of a, whose mean and scale do not count; None for a weak one.
        marginal: as of ``undo_convolution``.
    """
    z = output.value.mean
    trials, channels = output.alive.shape
    norms = kernel.square().sum((2, 3, 4)).sqrt()
    # The equations are homogeneous: a = 0, sigma = 0 solves them. One sigma is fixed to exclude that, the clearest, as
    # the error of the fixed one becomes an error of all others.
    clearest = torch.where(output.alive, (1 / output.value.variance).mean((2, 3)), 0.0).argmax(1)
    norm = norms.gather(1, clearest[:, None])
    power = (OUTPUT_DEVIATION * norm[:, 0]) ** -2
    equations = Equations.weighted(
        layer, kernel, output.value.variance, output.error, by_weight, noise, power, norms / norm, output.alive
    )
    sent = torch.zeros_like(kernel) if by_weight is None else by_weight
    belief = prior or _weak(layer, kernel)
    count = prod(layer.inputs)
    parts = [count, channels, channels]  # the unknowns: a, sigma, m
    rows, fixed = torch.arange(trials, device=z.device), count + clearest

    def residuals(unknowns: Tensor) -> tuple[Tensor, Tensor]:
        a, sigma, shift = unknowns.split(parts, 1)
        forward, gradient = equations.apply(a)
        return (
            sigma[..., None, None] * z + shift[..., None, None] - forward,
            sigma[..., None, None, None] * sent - gradient,
        )

    def rest(unknowns: Tensor) -> Tensor:
        forward, gradient = residuals(unknowns)
        pull = belief.times(unknowns[:, :count]) / power[:, None]
        # sigma and m are on the other side of the equations than a, so their rows of the transpose are negative
        by_shift = equations.forward * forward
        by_scale = (by_shift * z).sum((2, 3)) + equations.gradient * (gradient * sent).sum((2, 3, 4))
        return torch.cat([equations.adjoint(forward, gradient) - pull, -by_scale, -by_shift.sum((2, 3))], 1)

    matrix = z.new_zeros(trials, sum(parts), sum(parts))
    matrix[:, :count, :count] = equations.gram().addcmul_(1 / power[:, None, None], belief.matrix())
    # The block of a is ``gram``. The few columns of sigma and m are read from the transposed map at unit vectors.
    for column in range(count, sum(parts)):
        unit = torch.zeros_like(matrix[:, 0])
        unit[:, column] = 1.0
        matrix[:, column] = matrix[:, :, column] = -rest(unit)
    own = matrix.diagonal(dim1=1, dim2=2)
    own.add_((own == 0).to(own))  # the sigma and m of a dead channel are in no equation
    # the fixed sigma leaves the system: its row and column become those of the identity, and its value stays 1
    matrix[rows, :, fixed] = matrix[rows, fixed] = 0.0
    matrix[rows, fixed, fixed] = 1.0
    start = torch.zeros_like(matrix[:, 0])
    start[rows, fixed] = 1.0

    def free(unknowns: Tensor) -> Tensor:
        return rest(unknowns) * (1 - start)

    unknowns, variance = factor_and_solve(matrix, free, start, inverse=marginal and prior is None)
    shape = (trials, *layer.inputs)
    sigma = unknowns.split(parts, 1)[1]
    inverse = torch.where(output.alive, 1 / sigma, 0.0)[..., None, None]
    return InputSolution(
        Estimate(unknowns[:, :count].reshape(shape), variance[:, :count].reshape(shape)),
        _below(layer, kernel, output.error.scaled(inverse)),
        equations.misfit(*residuals(unknowns)),
        sigma,
    )


def _weak(layer: Convolution, like: Tensor) -> Prior:
    """Return independent values of mean 0 and variance 1."""
    return Independent(like.new_zeros(prod(layer.inputs)))


def _below(layer: Convolution, kernel: Tensor, error: Estimate) -> Estimate:
    """Return the error at a convolution's input."""
    return Estimate(
        input_gradient(error.mean, kernel, layer.geometry),
        input_gradient(error.variance, _square(kernel), layer.geometry),
    )


def _square(kernel: Tensor) -> Tensor:
    """Return the squares of a kernel, held once if all trials share it."""
    return kernel[:1].square().expand_as(kernel) if kernel.stride(0) == 0 else kernel.square()


def _converted(kernel: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a kernel in another type, held once if all trials share it."""
    return kernel[:1].to(dtype).expand_as(kernel) if kernel.stride(0) == 0 else kernel.to(dtype)


@dataclass(frozen=True)
class Equations:
    """The equations w * a = r and corr(e, a) = g, as matrices of a [T, n], with a weight each.

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
    def weighted(
        cls,
        layer: Convolution,
        kernel: Tensor,
        variance: Tensor,
        error: Estimate,
        by_weight: Tensor | None,
        noise: GradientNoise,
        power: Tensor,
        size: Tensor,
        alive: Tensor,
    ) -> Equations:
        """Weigh the equations.

        Args:
            layer: the convolution.
            kernel: w.
            variance: of r, before it is multiplied by ``size``, [T, O, h, w].
            error: e.
            by_weight: g, before it is multiplied by ``size``; None if there are no such equations.
            noise: of g.
            power: [T], the expected square of a.
            size: [T, O].
            alive: [T, O], the channels that hold information.
        """
        # The second equations are inexact by the noise of g, and by that of e times values of a. The infinite variance
        # of a guess gives the weight 0.
        forward = 1 / (size.square()[..., None, None] * variance)
        gradient = torch.zeros_like(size)
        if by_weight is not None:
            spread = power[:, None] * error.variance.sum((2, 3))
            gradient = 1 / (size.square() * noise.variance(by_weight)[:, None] + spread)
        forward, gradient = torch.where(alive[..., None, None], forward, 0.0), torch.where(alive, gradient, 0.0)
        return cls(layer, kernel, error.mean, forward, gradient)

    @cached_property
    def _maps(self) -> Form:
        return convolution(self.layer.geometry, len(self.kernel))

    def apply(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return w * a and corr(e, a)."""
        image = a.reshape(len(a), *self.layer.inputs)
        return self._maps.by_output(image, self.kernel), self._maps.by_weight(image, self.error)

    def adjoint(self, forward: Tensor, gradient: Tensor) -> Tensor:
        """Return [T, n], the transpose of ``apply`` on rows [T, O, h, w] and [T, O, C / groups, kh, kw], weighted."""
        out = self._maps.by_input(self.kernel, self.forward * forward)
        out = out + self._maps.by_input(self.gradient[..., None, None, None] * gradient, self.error)
        return out.flatten(1)

    def diagonal(self) -> Tensor:
        """Return that of ``gram``, [T, n]."""
        geometry = self.layer.geometry
        out = input_gradient(self.forward, _square(self.kernel), geometry)
        ones = self.gradient[..., None, None, None].expand_as(self.kernel).contiguous()
        return (out + input_gradient(self.error.square(), ones, geometry)).flatten(1)

    def single(self, unit: Tensor) -> Equations:
        """Return them in float32, with weights over ``unit`` [T]."""
        return replace(
            self,
            kernel=_converted(self.kernel, torch.float32),
            error=self.error.float(),
            forward=(self.forward / unit[:, None, None, None]).float(),
            gradient=(self.gradient / unit[:, None]).float(),
        )

    def laid_out(self) -> Equations:
        """Return them as the compiled kernels take them without a copy, where there are any: with the trials innermost.

        Vectors that are laid out so keep it from one product to the next.
        """
        if not enough(len(self.kernel), self.kernel):
            return self
        return replace(
            self,
            kernel=innermost(self.kernel),
            error=innermost(self.error),
            forward=innermost(self.forward),
            gradient=innermost(self.gradient),
        )

    def gram(self) -> Tensor:
        """Return [T, n, n], ``adjoint`` of ``apply``."""
        geometry, (channels, height, width) = self.layer.geometry, self.layer.inputs
        trials, places, share = len(self.kernel), height * width, channels // geometry.groups
        count = channels * places
        out = self.kernel.new_zeros(trials, count, count)
        squares = out.view(trials, channels, places, channels, places)
        # G^T U G: a kernel's tap reads one channel, so channels do not mix, and those of a group have the same block
        blocks = self._gradient_blocks()
        for channel in range(channels):
            squares[:, channel, :, channel] = blocks[:, channel // share]

        # F^T V F: each window of w * a adds the outer product of its kernel, at the places of the inputs that it covers
        # (channel and tap, of a group)
        read = taps(geometry, self.kernel.device)
        first = places * torch.arange(share, device=read.device)
        inputs = (first[:, None, None] + read.clamp(max=places - 1)).flatten(0, 1).mT
        inside = (read < places).repeat(share, 1).mT
        kernels = self.kernel.reshape(trials, geometry.groups, -1, inputs.shape[1])
        weights = self.forward.reshape(trials, geometry.groups, kernels.shape[2], -1).mT
        # for all trials and groups, as many windows at a time as keep temporaries below one matrix, or an eighth of all
        most = count**2 * max(1, trials // TEMPORARY_SHARE) // (trials * geometry.groups)
        at_once = max(1, most // inputs.shape[1] ** 2)
        groups = share * places * (count + 1) * torch.arange(geometry.groups, device=read.device)[:, None]
        for begin in range(0, len(inputs), at_once):
            part = slice(begin, begin + at_once)
            entries = (inputs[part, :, None] * count + inputs[part, None]).flatten() + groups
            kernel = kernels[:, :, None] * inside[part, None]
            square = (kernel * weights[:, :, part, :, None]).mT @ kernel
            out.view(trials, -1).scatter_add_(1, entries.flatten().expand(trials, -1), square.flatten(1))
        return out

    def _gradient_blocks(self) -> Tensor:
        """Return [T, groups, H W, H W], the contribution of corr(e, a) to ``gram`` for a channel of each group."""
        geometry, (trials, outputs) = self.layer.geometry, self.gradient.shape
        places = geometry.image[0] * geometry.image[1]
        # rows of G: for each output channel and tap, the error e laid out over the places of the image that the tap met
        index = taps(geometry, self.kernel.device)
        shape = (trials, outputs, *index.shape)
        rows = self.error.new_zeros(*shape[:3], places + 1)
        rows = rows.scatter(3, index.expand(shape), self.error.reshape(trials, outputs, 1, -1).expand(shape))
        rows = rows[..., :places] * self.gradient.sqrt()[..., None, None]
        rows = rows.reshape(trials, geometry.groups, -1, places)
        return rows.mT @ rows

    def misfit(self, forward: Tensor, gradient: Tensor) -> Tensor:
        """Return [T], the root mean square of residuals in standard deviations."""
        weights = self.gradient[..., None, None, None]
        total = (self.forward * forward.square()).sum((1, 2, 3)) + (weights * gradient.square()).sum((1, 2, 3, 4))
        count = (self.forward > 0).sum((1, 2, 3)) + gradient[0, 0].numel() * (self.gradient > 0).sum(1)
        return (total / count).sqrt()


@dataclass(frozen=True)
class _Problem:
    """The normal equations of one convolution's input.

    Attributes:
        equations: with their weights.
        output: r, [T, O, h, w].
        sent: g, [T, O, C / groups, kh, kw].
        prior: of a.
        trust: [T], by which the prior's precision is multiplied.
    """

    equations: Equations
    output: Tensor
    sent: Tensor
    prior: Prior
    trust: Tensor

    def residuals(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the equations leave at a [T, n]."""
        forward, gradient = self.equations.apply(a)
        return self.output - forward, self.sent - gradient

    def rest(self, a: Tensor) -> Tensor:
        """Return the right-hand side minus the left-hand side, from residuals: more exact than the matrix is."""
        return self.equations.adjoint(*self.residuals(a)) - self.trust[:, None] * self.prior.times(a - self.prior.mean)

    def factor(self, marginal: bool) -> tuple[Tensor, Tensor]:
        """Return a and its variances [T, n], by Cholesky factors."""
        matrix = self.equations.gram().addcmul_(self.trust[:, None, None], self.prior.matrix())
        return factor_and_solve(matrix, self.rest, torch.zeros_like(matrix[:, 0]), inverse=marginal)

    def descend(self) -> tuple[Tensor, Tensor]:
        """Return a and its conditional variances [T, n], by conjugate gradients.

        A trial that they do not solve is factored.
        """
        diagonal = self.equations.diagonal() + self.trust[:, None] * self.prior.diagonal()
        if enough(len(diagonal), diagonal):
            diagonal = innermost(diagonal)
        # float32 holds neither the weights, 1e14 and more, nor their products; a unit for each trial cancels
        unit = diagonal.mean(1)
        scale = (unit[:, None] / diagonal).sqrt().float()
        single, trust = self.equations.single(unit).laid_out(), (self.trust / unit).float()[:, None]

        def product(direction: Tensor) -> Tensor:
            a = scale * direction
            return scale * torch.addcmul(single.adjoint(*single.apply(a)), trust, self.prior.times(a))

        a, solved = conjugate_gradients(product, self.rest, diagonal)
        variance = 1 / diagonal
        for trial in (~solved).nonzero()[:, 0].tolist():
            a[trial], variance[trial] = (each[0] for each in self._of(trial).factor(marginal=False))
        return a, variance

    def _of(self, trial: int) -> _Problem:
        """Return the equations of one trial."""
        own = slice(trial, trial + 1)
        of = self.equations
        equations = replace(
            of, kernel=of.kernel[own], error=of.error[own], forward=of.forward[own], gradient=of.gradient[own]
        )
        return replace(self, equations=equations, output=self.output[own], sent=self.sent[own], trust=self.trust[own])
