"""The masks of a ReLU below average pooling, from the averages, the error there and a weight gradient below.

The pool's output f and the error e at the ReLU's output are known, the error a multiple of the pool's. The ReLU's
input is z = W x + b with the input x of the convolution below, and its mask m is 1 where z > 0. Where f is 0, so is m.
Elsewhere a window's average does not say which of its positions are open. Three things do, and all are linear in x for
given masks, or in m for a given x: the averages A (m z) = f, the weight gradient dL/dW = (m e) x^T, and the gradient of
the shift, sum_p m e.

So x and m are found in turn: x by least squares of averages and weight gradient together; m by Gibbs sampling position
by position, of all channels at once, by the sign of z and by what is left of the two gradients. Equations count by what
is left of them in each channel, which falls to rounding once the masks are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.peeling.correlation import design, windows
from leakbench.attacks.peeling.knowledge import CLEAR, Knowledge
from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.network import Network
from leakbench.core.rng import generator

MAX_PLACES = 1024
"""The most positions of a ReLU's channel, and of the input of the convolution below, for which masks are searched."""

ROUNDS = 60
"""How often inputs and masks are found in turn, at most."""

PATIENCE, HELPS = 15, 0.9
"""The search ends after as many rounds that leave no less than this part of the least misfit so far."""

SWEEPS, BURN = 5, 2
"""Sweeps of Gibbs sampling in a round, and those of them that do not count."""

SHIFT = 10.0
"""How many times as much as one of a weight's equations the equation of the shift counts: it has no error of x."""

ROUGH = 0.3
"""What is taken to be left of the equations at first, relative to their right-hand sides."""

SHARED = 0.1
"""The part of the mean of what is left in all channels that counts in each: none is trusted without limit."""

RIDGE = 1e-8
"""What is added to the normal equations, relative to their diagonal."""

ITERATIONS, SOLVED = 200, 1e-11
"""The most iterations of conjugate gradients in a round, and the relative residual at which they end."""

MAX_MISFIT = 3e-3
"""The relative misfit of averages and gradient up to which masks are taken: a wrong one in a thousand leaves 1e-2."""

LEAST = 1e-14
"""Numbers below this are rounding."""


@dataclass(frozen=True)
class Averaged:
    """A ReLU whose output is averaged, and the layers below it.

    Attributes:
        gate: the place of the ReLU.
        pool: that of the averages.
        ways: those from the convolution up to the ReLU's input, which scale and shift its output.
        layer: the convolution.
        source: the place of its input.
        weights: [Q, P], of each position in each average.
    """

    gate: int
    pool: int
    ways: tuple[int, ...]
    layer: Convolution
    source: int
    weights: Tensor


def averaging(network: Network, place: int) -> Tensor | None:
    """Return the weights [Q, P] with which a step averages P positions of each channel to Q; None if it does not."""
    step = network.steps[place]
    if step.kind != "affine" or len(step.inputs) != 1 or len(step.shape) != 3:
        return None
    before = network.steps[step.inputs[0]].shape
    count, outputs = prod(before[1:]), prod(step.shape[1:])
    if len(before) != 3 or before[0] != step.shape[0] or not outputs < count <= MAX_PLACES:
        return None
    lone = torch.eye(count, dtype=torch.float64).view(count, 1, *before[1:])
    found = torch.cat([network.forward(place, [each.expand(1, *before)])[:, 0] for each in lone]).flatten(1).T
    example = torch.randn(1, *before, generator=generator("averaging"), dtype=torch.float64)
    made = network.forward(place, [example]).flatten(2)
    same = torch.allclose(example.flatten(2) @ found.T, made, rtol=1e-9, atol=1e-12)
    return found if same and bool((found >= 0).all()) else None


def find_averaged(network: Network, gate: int) -> Averaged | None:
    """Return a ReLU whose output is only averaged, above a convolution whose outputs are at most scaled and shifted."""
    steps = network.steps
    if steps[gate].kind != "relu" or steps[gate].slope or len(steps[gate].users) != 1:
        return None
    (pool,) = steps[gate].users
    ways: list[int] = []
    (at,) = steps[gate].inputs
    while steps[at].layer is None:
        if len(steps[at].inputs) != 1 or len(steps[at].users) != 1 or network.factor(at, steps[at].inputs[0]) is None:
            return None
        ways.insert(0, at)
        (at,) = steps[at].inputs
    layer, (source,) = steps[at].layer, steps[at].inputs
    assert layer is not None
    if layer.geometry.groups > 1 or len(steps[at].users) != 1 or steps[source].kind == "image":
        return None
    weights = averaging(network, pool)
    return None if weights is None else Averaged(gate, pool, (at, *ways), layer, source, weights)


def open_averaged(known: Knowledge, gate: int) -> str | None:
    """Find the mask of a ReLU of one image whose averages are known; return why it cannot be, if so.

    What is not of that kind, or of which too little is known, is left as it is.
    """
    error = known.error(gate)
    if known.images > 1 or error is None or not known.values.keys() & set(known.network.steps[gate].users):
        return None
    found = find_averaged(known.network, gate)
    if found is None or not known.complete(found.layer.weight):
        return None
    gain = known.gate(found.ways[0])
    assert gain is not None
    places, equations = prod(found.layer.inputs[1:]), found.layer.outputs[0] * prod(found.layer.geometry.kernel)
    if places > MAX_PLACES:
        return f"{found.layer.name}: {places} values in each channel of the input are more than {MAX_PLACES}"
    averages = found.layer.outputs[0] * len(found.weights)
    if equations * found.layer.inputs[0] + averages < prod(found.layer.inputs):
        return f"{found.layer.name}: its equations and the averages above do not determine its input"
    problem = _Problem.of(known, found, error, gain[1])
    mask, misfit = problem.solve(generator("averages", found.layer.name))
    if not misfit < MAX_MISFIT:
        return f"{found.layer.name}: no masks that give the averages above and its gradient were found"
    known.masks[gate] = mask.view_as(error)
    known.forget(gate)
    return None


@dataclass(frozen=True)
class _Problem:
    """The equations of a convolution's input and of the mask above it: O channels, P positions, Q averages.

    Attributes:
        network: the steps.
        averaged: which of them.
        averages: f [O, Q], zeros where they are not clearly positive.
        error: [O, P] at the convolution's output where the ReLU is open.
        gradient: [O, C * K] by the convolution's weight.
        sums: [O], what the errors of the open positions add up to; NaN where it is not known.
        allowed: [O, P], whether all averages of a position are positive.
        nonnegative: whether the convolution's input is.
    """

    network: Network
    averaged: Averaged
    averages: Tensor
    error: Tensor
    gradient: Tensor
    sums: Tensor
    allowed: Tensor
    nonnegative: bool

    @classmethod
    def of(cls, known: Knowledge, found: Averaged, error: Tensor, gain: Tensor) -> _Problem:
        """Return the equations as they follow from what is known."""
        value = known.values[found.pool]
        averages = torch.where(value.value > CLEAR * value.deviation, value.value, 0.0)[0].flatten(1)
        part_of = found.weights > 0
        allowed = ((averages == 0).double() @ part_of.double() == 0) & part_of.any(0)
        errors, gains = error[0].flatten(1), gain.expand_as(error)[0].flatten(1)
        sums = known.sent.get(known.network.shift(found.gate) or "")
        even = bool((gains == gains[:, :1]).all())
        sums = torch.full_like(errors[:, 0], torch.nan) if sums is None or not even else gains[:, 0] * sums
        gradient = known.sent[found.layer.weight].flatten(1)
        positive = _nonnegative(known, found.source)
        return cls(known.network, found, averages, gains * errors, gradient, sums, allowed, positive)

    def solve(self, rng: torch.Generator) -> tuple[Tensor, float]:
        """Return the mask [O, P], and the relative misfit of averages and gradient with it, the larger of the two."""
        share, mask = self.allowed.double(), self.allowed
        inputs = torch.zeros((1, *self.averaged.layer.inputs), dtype=torch.float64)
        left = self._level(ROUGH * self.gradient, self.gradient)
        far = self._level(ROUGH * self.averages, self.averages)
        misfit, least, since = torch.inf, torch.inf, 0
        for _ in range(ROUNDS):
            inputs = self._inputs(share, inputs, left, far)
            z = self._outputs(inputs)[0].flatten(1)
            rest = (z.clamp(min=0) * self.allowed) @ self.averaged.weights.T - self.averages
            far = self._level(rest, self.averages)
            share, left, missing = self._masks(inputs, z, rest, rng)
            before, mask = mask, share > 0.5
            misfit = max(
                float(missing.norm() / self.gradient.norm()),
                float(rest.norm() / self.averages.norm().clamp(min=LEAST)),
            )
            if bool((z >= self.network.steps[self.averaged.gate].ceiling).any()):
                misfit = torch.inf  # errors are 0 there, too
            settled = misfit < MAX_MISFIT and torch.equal(mask, before)
            least, since = (misfit, 0) if misfit < HELPS * least else (least, since + 1)
            if settled or since == PATIENCE:
                break
        return mask, misfit

    def _level(self, rest: Tensor, size: Tensor) -> Tensor:
        """Return [O], the root mean square of what is left of equations [O, N]; rounding at least."""
        common = rest.square().mean() + (LEAST * size).square().mean() + 1e-300
        return (rest.square().mean(1) + SHARED * common).sqrt()

    def _outputs(self, inputs: Tensor) -> Tensor:
        """Return the ReLU's input [1, O, h, w] for the convolution's."""
        for place in self.averaged.ways:
            inputs = self.network.forward(place, [inputs])
        return inputs

    def _below(self, error: Tensor) -> Tensor:
        """Return the derivative by the convolution's input, for that by the ReLU's [1, O, h, w]."""
        for place in reversed(self.averaged.ways):
            error = self.network.backward(place, self.network.steps[place].inputs[0], error)
        return error

    def _inputs(self, share: Tensor, begin: Tensor, left: Tensor, far: Tensor) -> Tensor:
        """Return the convolution's input [1, C, H, W] by all equations for masks [O, P].

        Args:
            share: the masks, from 0 to 1.
            begin: the input from which conjugate gradients begin.
            left: [O], the standard deviations of the equations of the weight gradient.
            far: [O], those of the averages.
        """
        layer, weights = self.averaged.layer, self.averaged.weights
        shape = (1, *self.network.steps[self.averaged.gate].shape)
        matrix = design((share * self.error).view(shape), layer.geometry)
        right = self.gradient.view(layer.outputs[0], layer.inputs[0], -1).transpose(1, 2).flatten(0, 1)
        rows = left.square().reciprocal().repeat_interleave(len(matrix) // len(left))[:, None]
        own = matrix.T @ (rows * matrix)
        ridge = RIDGE * float(own.diagonal().mean())
        zero = self._outputs(torch.zeros_like(begin))

        def up(rest: Tensor) -> Tensor:
            """Return the derivative by the input for that by the averages [O, Q]."""
            return self._below(((rest / far.square()[:, None]) @ weights * share).view(shape))

        def product(value: Tensor) -> Tensor:
            made = ((self._outputs(value) - zero)[0].flatten(1) * share) @ weights.T
            return (own @ value[0].flatten(1).T).T.view_as(value) + up(made) + ridge * value

        middle = up((zero[0].flatten(1) * share) @ weights.T - self.averages)
        wanted = (matrix.T @ (rows * right)).T.view_as(begin) - middle
        # the averages' part of the normal equations, in the mean over positions, for the preconditioner
        example = torch.randn(begin.shape, generator=generator("preconditioner"), dtype=torch.float64)
        usual = float((example * product(example)).sum() / example.square().sum()) - float(own.diagonal().mean())
        factor = torch.linalg.cholesky(own + max(usual, ridge, LEAST) * torch.eye(len(own)).to(own))

        def eased(rest: Tensor) -> Tensor:
            return torch.cholesky_solve(rest[0].flatten(1).T, factor).T.view_as(rest)

        value, rest = begin, wanted - product(begin)
        direction = step = eased(rest)
        size, least = (rest * step).sum(), SOLVED**2 * (wanted * eased(wanted)).sum()
        for _ in range(ITERATIONS):
            if not float(size) > float(least):
                break
            moved = product(direction)
            length = size / (direction * moved).sum()
            value, rest = value + length * direction, rest - length * moved
            step = eased(rest)
            before, size = size, (rest * step).sum()
            direction = step + size / before * direction
        return value.clamp(min=0) if self.nonnegative else value

    def _masks(self, inputs: Tensor, z: Tensor, rest: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return how often each position is open [O, P], by Gibbs sampling, and what is left of the gradient then.

        Args:
            inputs: of the convolution.
            z: [O, P], the ReLU's input.
            rest: [O, Q], what is left of the averages.
            rng: of the draws.

        Returns:
            The shares; the standard deviations [O] of the gradient's equations; what is left of it [O, C * K], by the
            last draw.
        """
        columns = windows(inputs, self.averaged.layer.geometry)
        size = SHIFT * columns.square().mean().sqrt()
        columns = torch.cat([columns, size.expand(1, columns.shape[1])])
        known = self.sums.isfinite()
        right = torch.cat([self.gradient, torch.where(known, size * self.sums, 0.0)[:, None]], 1)
        usable = torch.ones_like(right)
        usable[:, -1] = known.to(usable)
        errors, square, products = self.error, columns.square().sum(0), columns.T @ columns
        # of channels whose sum is not known, that equation is left out
        alone = (1 - usable[:, -1:]) * size**2
        active = self.averages > 0
        width = 2 * rest[active].square().mean().sqrt().clamp(min=LEAST)
        signs = z.sign() * z.square() / (2 * width**2)
        now = ((z > 0) & self.allowed).double()
        left = (right - (now * errors) @ columns.T) * usable
        spread = left.square().mean().sqrt().clamp(min=LEAST * float(right.square().mean().sqrt()) + 1e-300)
        seen, counted = left @ columns, torch.zeros_like(now)
        for sweep in range(SWEEPS):
            for place in torch.randperm(len(square), generator=rng).tolist():
                error, own = errors[:, place], square[place] - alone[:, 0]
                toward = seen[:, place] + now[:, place] * error * own
                logit = (2 * error * toward - error.square() * own) / (2 * spread**2) + signs[:, place]
                chance = torch.sigmoid(logit) * self.allowed[:, place]
                draws = torch.rand(len(chance), generator=rng, dtype=torch.float64)
                change = (draws < chance).double() - now[:, place]
                seen = seen - (change * error)[:, None] * (products[place] - alone)
                now[:, place] += change
                if sweep >= BURN:
                    counted[:, place] += chance
            left = (right - (now * errors) @ columns.T) * usable
            spread = left.square().mean().sqrt().clamp(min=LEAST * float(right.square().mean().sqrt()) + 1e-300)
        share = self._one_open(counted / (SWEEPS - BURN), z)
        return share, self._level(left, right), left[:, :-1]

    def _one_open(self, share: Tensor, z: Tensor) -> Tensor:
        """Return shares [O, P] with an open position, that of the largest z, in each window of a positive average."""
        part_of = self.averaged.weights > 0
        count, most = len(part_of), int(part_of.sum(1).max())
        total = part_of.shape[1]
        own = torch.where(part_of, torch.arange(total), total).sort(1).values[:, :most]  # [Q, K]
        values = F.pad(z, (0, 1), value=-torch.inf)[:, own]
        shares = F.pad(share, (0, 1))[:, own]
        shut = (self.averages > 0) & (shares.amax(2) < 0.5)
        at = own[torch.arange(count), values.argmax(2)]  # [O, Q]
        rows, which = shut.nonzero(as_tuple=True)
        share = share.clone()
        share[rows, at[rows, which]] = 1.0
        return share


def _nonnegative(known: Knowledge, place: int) -> bool:
    """Return whether a step's output is that of a ReLU, its maxima or its averages."""
    step = known.network.steps[place]
    averaged = averaging(known.network, place) is not None and known.rectified(step.inputs[0])
    return known.rectified(place) or averaged
