"""The layer inputs of a ReLU network, from the lowest convolution whose gradient leaks its own input downwards.

Below a point at which the error is known, and as long as the masks of the ReLUs are known too, errors follow by the
backward pass, whatever the values. So each convolution's input is the solution of a linear least-squares problem. Its
sign is the mask of the ReLU that it comes from, and the descent continues below it. A decision is exact or wrong: as
long as it is exact, the error of a layer is the noise of that layer's own gradient, not the sum over those above.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from leakbench.attacks.peeling.correlation import Fitted, design, directions, least_norm, least_squares, windows
from leakbench.attacks.peeling.factors import NotFactorised
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.masks import factorise_masked
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.shifts import factorise_convolution
from leakbench.attacks.peeling.standard import Standard, relative_spreads, standardised

CLEAR = 5.0
"""By how many standard deviations a value must exceed 0 to count as positive."""

CERTAIN = 25.0
"""By how many standard deviations a value is positive whatever the error's own equations say."""

SHARP = 0.12
"""The standard deviation up to which the ratio of an error behind a ReLU to that in front of it decides the mask."""

MASK_ROUNDS = 3
"""How often the masks above a convolution are decided again from its weight gradient."""

MAX_CHANGED = 0.2
"""The share of a mask's entries above which a new decision is not believed."""

OUTLIER = 6.0
"""A channel whose sum is further off than this many times the median is left out when a factor is fitted."""

EVEN = 1e-6
"""How much, relative to the largest one, the errors of a channel may differ that count as the same."""

MAX_IMBALANCE = 0.02
"""How far, relative to the gradient of a shift, the sums of the error may be from it at a beginning."""

MAX_PLACES = 4096
"""The most positions of a channel that are solved for."""

MAX_OPEN = 1024
"""The most values of a layer's input that are found from the values above it, because its own equations are weak."""

EQUATIONS = 6
"""How many equations from above are used for each of these values."""

FEW = 1.5
"""With fewer equations than this many times the unknowns, weak directions are looked for."""

WEAK = 1e-3
"""The part of the largest singular value below which a direction counts as weak."""

IMBALANCE = 1e-4
"""The part of a channel's root mean square error above which a wrong sum points to a wrong place of the mask."""

EXPLAINED = 0.02
"""The part of the wrong sum that may be left after a change of the mask at a doubtful place that explains it."""

SMALL = 0.01
"""The part of the root mean square up to which a value counts as near 0, whatever its deviation."""

EXACTLY = 1e-3
"""The part of the wrong sum that may be left after a change at a place whose value is near 0."""

LEVELS = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 3000.0, 10000.0)
"""The thresholds that are tried for values that count as positive, in standard deviations (``fitting_mask``)."""

SETTLE_ROUNDS = 60
"""The most rounds in which values and statistics are found in turn."""

SETTLED = 1e-9
"""The relative change of a round after which nothing more is expected of another."""

ROUGHLY = 1e-5
"""The relative change that is small enough before eps is put back; after that, every round must still help."""

STALLED = 0.95
"""A round that changes at least this part of what the last one did does not help any more."""

SLOW = 0.7
"""A round that changes more than this part of what the last one did is damped."""

MIN_DAMPING = 0.3
"""The least part of a new guess that replaces the old one."""

MAX_DEVIATION = 0.1
"""How far, relative to their size, recovered values may be from the ones that follow from those below them."""


@dataclass(frozen=True)
class Feature:
    """The recovered output of a step.

    Attributes:
        place: the step's.
        value: [C, H, W] float64.
        deviation: of its values relative to their root mean square, as its own equations show it.
        check: how far it is from the values that follow from those below, relative to it; NaN if there are none.
        balance: how far the sums of the error below it are from the gradient of the shift there; NaN if not seen.
    """

    place: int
    value: Tensor
    deviation: float
    check: float
    balance: float


def beginnings(network: Network, sent: Collection[str]) -> list[int]:
    """Return the places of the convolutions at which a descent can begin, the lowest first.

    The gradient by the weight of such a convolution can give its input and the error at its output up to a factor
    (``shifts.py``), and the gradient of a shift below the ReLU that it comes from gives the factor.

    Args:
        network: its steps.
        sent: the names of the tensors whose gradient was sent.
    """
    found = []
    for place, step in enumerate(network.steps):
        layer = step.layer
        if layer is None or layer.weight not in sent or layer.geometry.groups > 1:
            continue
        channels, height, width = layer.inputs
        source = network.steps[step.inputs[0]]
        shifts = layer.geometry.stride == (1, 1) and layer.geometry.kernel != (1, 1) and channels >= height * width
        alone = source.kind == "relu" and source.users == (place,)
        if shifts and alone and network.shift(step.inputs[0]) in sent:
            found.append(place)
    return found


def recover(network: Network, sent: Mapping[str, Tensor], rng: torch.Generator) -> list[Feature]:
    """Return what can be recovered from the lowest convolution on that gives its own input; nothing if none does.

    Args:
        network: a trial's, in float64.
        sent: the trial's gradient, by name.
        rng: for the start of an eigenvalue solver.
    """
    exact = {name: value.double() for name, value in sent.items()}
    for place in beginnings(network, sent):
        layer = network.steps[place].layer
        assert layer is not None
        found = factorise_convolution(sent[layer.weight], _lattice(layer), rng)
        if isinstance(found, NotFactorised):
            continue
        for sign in (1.0, -1.0):
            descent = Descent(network, exact)
            if descent.begin(place, sign * found.errors[0]):
                return descent.features()
    for place in heads(network, sent):
        descent = Descent(network, exact)
        if descent.begin_at_head(place, rng):
            return descent.features()
    return []


def heads(network: Network, sent: Collection[str]) -> list[int]:
    """Return the places of the linear layers that take the means of a ReLU's channels, and sent what is needed.

    That is the gradient of their bias, and so the error at their input, and of a shift below the ReLU. With half as
    many channels as places, masks cannot be found.
    """
    found = []
    for place, step in enumerate(network.steps):
        if step.kind != "linear" or f"{step.name}.bias" not in sent:
            continue
        at = step.inputs[0]
        while network.steps[at].kind == "affine" and len(network.steps[at].inputs) == 1:
            (at,) = network.steps[at].inputs
        lowest = network.steps[at]
        channels, places = lowest.shape[:1], prod(lowest.shape[1:])
        pooled = channels == network.steps[step.inputs[0]].shape and 1 < places <= 2 * prod(channels)
        if pooled and lowest.kind == "relu" and lowest.slope == 0 and network.shift(at) in sent:
            found.append(place)
    return found


def _lattice(layer: Convolution) -> Lattice:
    g = layer.geometry
    padding = tuple((each, each) for each in g.padding)
    return Lattice(g.image, g.kernel, padding, g.stride, g.dilation, g.groups)


def fitting_mask(
    solution: Fitted, part: Tensor, rest: Tensor, sums: Tensor, slope: float = 0.0
) -> tuple[Tensor, float]:
    """Return the mask [C, H, W] of a ReLU with the factor f for which part * f + rest has these sums behind it.

    Values that are 0 are only seen as such up to their error, which need not be their deviation. Of masks with several
    thresholds, the one is taken whose sums fit best; then, in each channel, another one that fits much better there.

    Args:
        solution: the ReLU's output [C, H, W] with its deviations, up to a positive factor.
        part: [C, H, W], the part of the error at its output that is in one over that factor.
        rest: [C, H, W], the other part.
        sums: [C], the sums of the error behind the ReLU.
        slope: of the ReLU below 0.
    """
    masks = torch.stack([solution.value > level * solution.deviation for level in LEVELS])
    own, fixed = (torch.where(masks, each, slope * each).sum((2, 3)) for each in (part, rest))

    def fit(own: Tensor, wanted: Tensor) -> Tensor:
        return (own * wanted).sum(-1) / own.square().sum(-1)

    factors = fit(own, sums - fixed)
    misfits = (factors[:, None] * own + fixed - sums).norm(dim=1)
    best = int(torch.where(torch.isnan(misfits), torch.inf, misfits).argmin())
    each = (factors[best] * own + fixed - sums).abs()
    least = each.argmin(0)
    level = torch.where(each.amin(0) < 0.5 * each[best], least, best)
    chosen = level[None, :, None, None].expand(1, *masks.shape[1:])
    mask = masks.gather(0, chosen)[0]
    own, wanted = own.gather(0, level[None])[0], sums - fixed.gather(0, level[None])[0]
    # a wrong place of the mask spoils the sum of its channel only
    misfit = (fit(own, wanted) * own - wanted).abs()
    good = misfit <= OUTLIER * misfit.median()
    return mask, float(fit(own[good], wanted[good]))


def balanced(mask: Tensor, values: Fitted, error: Tensor, sums: Tensor) -> Tensor:
    """Return a ReLU's mask [C, H, W], changed at one place of a channel if that explains its sum.

    Args:
        mask: as it was decided.
        values: the ReLU's output; a place may be wrong if it is near 0, and nearer if it explains the sum less exactly.
        error: at the ReLU's output.
        sums: [C], what the sums of the error behind the ReLU must be.
    """
    value, deviation = values.value.flatten(1).abs(), values.deviation.flatten(1)
    rows, size = mask.flatten(1), error.flatten(1).square().mean(1).sqrt()
    missing = sums - (rows * error.flatten(1)).sum(1)
    off = (torch.where(rows, -1.0, 1.0) * error.flatten(1) - missing[:, None]).abs()
    doubtful = (value < CERTAIN * deviation) & (off < EXPLAINED * missing.abs()[:, None])
    small = (value < SMALL * value.square().mean().sqrt()) & (off < EXACTLY * missing.abs()[:, None])
    off = torch.where(doubtful | small, off, torch.inf)
    least, at = off.min(1)
    wrong = (missing.abs() > IMBALANCE * size) & torch.isfinite(least)
    rows = rows.clone()
    rows[wrong, at[wrong]] = ~rows[wrong, at[wrong]]
    return rows.view_as(mask)


def _lowered(value: Tensor, null: Tensor) -> Tensor:
    """Return values [C, H, W] less so much of an undetermined pattern [n, H, W], n <= 1, that the least of them is 0.

    A normalisation above a convolution of stride 2 removes a constant at the positions that only its middle tap reads.
    Outputs of a ReLU are 0 at some of them.
    """
    if not len(null):
        return value
    pattern = null[0] * null[0].sum().sign()
    inside = pattern > 0.5 * pattern.amax()
    least = (value[:, inside] / pattern[inside]).amin(1)
    return value - least[:, None, None] * torch.where(inside, pattern, 0.0)


@dataclass(frozen=True)
class _Reader:
    """A convolution that takes a step's output.

    Attributes:
        place: its place.
        layer: its geometry.
        normalisation: the place of the normalisation by the image's own statistics above it; None if none is.
    """

    place: int
    layer: Convolution
    normalisation: int | None

    @property
    def equations(self) -> int:
        """How many equations its weight gradient is for each channel of its input."""
        return self.layer.outputs[0] * prod(self.layer.geometry.kernel)

    def rows(self, sent: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient by its weight as [O, K, C]."""
        return sent[self.layer.weight].flatten(2).transpose(1, 2)


class Descent:
    """The knowledge of one trial's values, masks and errors, which grows from the top downwards.

    Args:
        network: the trial's, in float64.
        sent: the trial's gradient in float64, by name.
    """

    def __init__(self, network: Network, sent: Mapping[str, Tensor]) -> None:
        self.network, self.sent = network, sent
        self.values: dict[int, Fitted] = {}
        self.masks: dict[int, Tensor] = {}
        self._standards: dict[int, Standard] = {}
        self._pinned: dict[int, Tensor] = {}
        self._errors: dict[int, Tensor | None] = {}

    def pin(self, place: int, error: Tensor) -> int:
        """State the error [O, h, w] at a step's output, and at the steps above as far as it determines theirs.

        Returns:
            The highest of these steps.
        """
        steps = self.network.steps
        error = error[None]
        self._pinned[place] = error
        while len(steps[place].users) == 1:
            (above,) = steps[place].users
            link = self._link(above, place)
            if link is None or not bool(link[0].all()):
                break
            place, error = above, (error - link[1]) / link[0]
            self._pinned[place] = error
        self._errors = {}
        return place

    def error(self, place: int) -> Tensor | None:
        """Return the error [1, ...] at a step's output; None if it does not follow from what is known."""
        if place in self._pinned:
            return self._pinned[place]
        if place not in self._errors:
            users = self.network.steps[place].users
            parts = [self._below(user, place) for user in users]
            known = [part for part in parts if part is not None]
            self._errors[place] = sum(known[1:], known[0]) if parts and len(known) == len(parts) else None
        return self._errors[place]

    def begin(self, place: int, error: Tensor) -> bool:
        """Begin at a convolution whose error [O, h, w] is known up to a factor, and descend.

        The gradient of a shift below the ReLU that gives the input is the sum of the error there: it gives the factor.

        Returns:
            Whether the factor could be found, and the error's sums agree with that gradient.
        """
        steps = self.network.steps
        (source,) = steps[place].inputs
        step = steps[source]
        sent = self.sent.get(self.network.shift(source) or "") if step.kind == "relu" else None
        if sent is None or step.users != (place,):
            return False
        layer = steps[place].layer
        assert layer is not None
        for last in (False, False, True):
            self.pin(place, error)
            self.masks.clear()
            self._solve(source, self._readers(source))
            if source not in self.values:
                return False
            below = self.network.backward(place, source, error[None])[0]
            rough = self.values[source]
            self.masks[source], factor = fitting_mask(rough, below, torch.zeros_like(below), sent, step.slope)
            self.values[source] = Fitted(rough.value / factor, rough.deviation / factor)
            error = factor * error
            if not last:
                # an input with exact zeros gives a better error, and that with exact zeros a better input
                better = least_squares(
                    windows(self.clean(source), layer.geometry), self.sent[layer.weight].flatten(1).T
                )
                if better is not None:
                    clear = better.value.abs() > CLEAR * better.deviation
                    error = torch.where(clear, better.value, 0.0).T.reshape(error.shape)
        top = self.pin(place, error)
        self._balance(source)
        if not self.balance(source) < MAX_IMBALANCE:
            return False
        (above,) = steps[place].users if len(steps[place].users) == 1 else (place,)
        if steps[above].kind == "normalisation" and f"{steps[above].name}.weight" in self.sent:
            module = self.network.module(above)
            assert isinstance(module, nn.BatchNorm2d)
            z, spread = standardised(self.network.forward(place, [self.clean(source)[None]])[0], module.eps)
            products = self.sent[f"{steps[above].name}.weight"]
            self._standards[above] = Standard(z, spread, module.weight.detach(), products)
            top = self.pin(place, error)
        self._descend(top)
        return True

    def begin_at_head(self, place: int, rng: torch.Generator) -> bool:
        """Begin at a linear layer above average pooling, and descend; return whether the mask below it was found.

        The error is the same at all positions of a channel, so the gradient of the shift below the ReLU gives the
        number of open positions, and the weight gradient of the convolution there which they are (``masks.py``).
        """
        steps = self.network.steps
        error = self.sent[f"{steps[place].name}.bias"][None]
        self._pinned[steps[place].inputs[0]] = self.network.backward(place, steps[place].inputs[0], error)
        for at in reversed(range(place)):
            layer = steps[at].layer
            if layer is None or layer.geometry.stride != (1, 1) or layer.geometry.kernel == (1, 1):
                continue
            found = self._gate(at)
            above = None if found is None else self.error(found[0])
            if found is None or above is None or layer.geometry.groups > 1 or layer.weight not in self.sent:
                continue
            gate, gain, _ = found
            values, sums = (gain * above)[0].flatten(1), self.sent.get(self.network.shift(gate) or "")
            even = float((values - values[:, :1]).abs().max()) <= EVEN * float(values.abs().max())
            if sums is None or not even or steps[gate].slope:
                continue
            counts = (sums / above[0, :, 0, 0]).nan_to_num(0.0, 0.0, 0.0)
            factors = factorise_masked(self.sent[layer.weight], _lattice(layer), values[:, 0], counts, rng)
            if isinstance(factors, NotFactorised):
                continue
            self.masks[gate] = factors.errors[0] != 0
            self._forget(gate)
            self._descend(gate)
            return True
        return False

    def _descend(self, top: int) -> None:
        """Recover the outputs of the steps below a place at which the error is known, as far as possible."""
        for place in reversed(range(top)):
            step = self.network.steps[place]
            if step.kind == "image":
                continue
            readers = self._readers(place)
            if readers and place not in self.values:
                self._solve(place, readers)
            if step.kind == "relu" and place in self.values and place not in self.masks:
                self._decide(place)

    def features(self) -> list[Feature]:
        """Return the recovered values, the highest first."""
        found = []
        for place in sorted(self.values, reverse=True):
            value = self.clean(place)
            size = value.square().mean().sqrt()
            deviation = float(self.values[place].deviation.square().mean().sqrt() / size)
            found.append(Feature(place, value, deviation, self._check(place), self.balance(place)))
        return found

    def clean(self, place: int) -> Tensor:
        """Return the values [C, H, W] of a step, with zeros where a ReLU of slope 0 gave them."""
        value = self.values[place].value
        if place in self.masks and self.network.steps[place].slope == 0:
            return torch.where(self.masks[place], value, 0.0)
        return value

    def predict(self, place: int) -> Tensor | None:
        """Return the output [1, ...] of a step as it follows from the recovered values below; None if it does not."""
        step = self.network.steps[place]
        if step.kind not in ("convolution", "scaling", "normalisation", "affine"):
            return None
        inputs = []
        for each in step.inputs:
            value = self.clean(each)[None] if each in self.values else self.predict(each)
            if value is None:
                return None
            inputs.append(value)
        return self.network.forward(place, inputs)

    def balance(self, place: int) -> float:
        """Return how far the sums of the error below a ReLU are from the gradient of the shift there, relative to it.

        NaN if no shift is there, or its gradient was not sent.
        """
        step = self.network.steps[place]
        if step.kind != "relu" or place not in self.masks:
            return float("nan")
        (below,) = step.inputs
        sent, error = self.sent.get(self.network.shift(place) or ""), self._below(place, below)
        if sent is None or error is None:
            return float("nan")
        return float((error.sum((0, 2, 3)) - sent).norm() / sent.norm())

    def _below(self, user: int, place: int) -> Tensor | None:
        """Return the part of the error at a step's output that comes through one of its users."""
        error, kind = self.error(user), self.network.steps[user].kind
        if error is None:
            return None
        if kind == "relu":
            mask = self.masks.get(user)
            return None if mask is None else torch.where(mask, error, self.network.steps[user].slope * error)
        if kind == "normalisation":
            return self._standards[user].backward(error) if user in self._standards else None
        if kind in ("convolution", "linear", "scaling", "affine"):
            return self.network.backward(user, place, error)
        return None

    def _link(self, user: int, place: int) -> tuple[Tensor, Tensor] | None:
        """Return gain and offset [1, ...] if the error at ``place`` is gain * error + offset of that at its user."""
        steps = self.network.steps
        if user in self._standards:
            sums = self.sent.get(steps[user].shift or "")
            standard = self._standards[user]
            return None if sums is None else (standard.gain, standard.offset(sums))
        gain = self.network.factor(user, place)
        return None if gain is None else (gain, torch.zeros_like(gain))

    def _gate(self, place: int) -> tuple[int, Tensor, Tensor] | None:
        """Return the ReLU to which a convolution's output leads, and gain and offset of the error there (``_link``)."""
        steps, gain = self.network.steps, torch.ones((1, 1, 1, 1), dtype=torch.float64)
        offset = torch.zeros_like(gain)
        while len(steps[place].users) == 1:
            (above,) = steps[place].users
            if steps[above].kind == "relu":
                return above, gain, offset
            link = self._link(above, place)
            if link is None:
                return None
            place, gain, offset = above, gain * link[0], offset + gain * link[1]
        return None

    def _readers(self, place: int) -> list[_Reader]:
        """Return the convolutions that take a step's output and whose equations are known.

        Those below a normalisation by the image's own statistics count, if the error above it is known.
        """
        found = []
        steps = self.network.steps
        for user in steps[place].users:
            layer = steps[user].layer
            if layer is None or layer.geometry.groups > 1 or layer.weight not in self.sent:
                continue
            above = steps[user].users[0] if len(steps[user].users) == 1 else user
            if user not in self._pinned and steps[above].kind == "normalisation":
                if f"{steps[above].name}.weight" in self.sent and self.error(above) is not None:
                    found.append(_Reader(user, layer, above))
            elif self.error(user) is not None:
                found.append(_Reader(user, layer, None))
        return found

    def _solve(self, place: int, readers: list[_Reader]) -> None:
        """Recover a step's output from the equations of the convolutions that take it; correct the masks above."""
        normal = [each for each in readers if each.normalisation is not None]
        if normal and len(normal) < len(readers):
            return
        for _ in range(MASK_ROUNDS):
            if normal:
                if not self._settle(place, readers):
                    return
            else:
                found = self._complete(place, readers)
                if found is None:
                    return
                self.values[place] = self._shaped(place, found)
            changed = [self._correct(place, each.layer, each.place) for each in readers]
            if not any(changed):
                return

    def _equations(self, readers: list[_Reader]) -> tuple[Tensor, Tensor]:
        """Return the equations [R, J] of the convolutions for each channel of their input, and the gradients [R, C]."""
        errors = [self.error(each.place) for each in readers]
        matrices = [design(error[0], each.layer.geometry) for each, error in zip(readers, errors) if error is not None]
        return torch.cat(matrices), torch.cat([each.rows(self.sent).flatten(0, 1) for each in readers])

    def _complete(self, place: int, readers: list[_Reader]) -> Fitted | None:
        """Return a step's output [J, C] from the equations of its readers and, where these are weak, the values above.

        A convolution of stride 2 reads a quarter of the positions by its middle tap only, whose equations can be too
        few. What is above the step is known where a ReLU is open there, and is linear in the step's output.
        """
        channels, places = self.network.steps[place].shape[0], prod(self.network.steps[place].shape[1:])
        if sum(each.equations for each in readers) <= places - MAX_OPEN // channels or places > MAX_PLACES:
            return None
        matrix, right = self._equations(readers)
        found = least_squares(matrix, right)
        if found is not None and len(matrix) > FEW * places:
            return found
        parts = directions(matrix, right)
        strong = int((parts.size > WEAK * parts.size[0]).sum())
        strong = max(strong, places - MAX_OPEN // channels)
        if strong == places:
            return parts.solution(places)
        if not bool((parts.size[:strong] > 0).all()):
            return None
        weak = parts.basis[strong:]
        particular = Fitted(parts.basis.T @ parts.value, parts.solution(strong).deviation)
        above = self._above(place, particular.value.T, weak)
        if above is None:
            return found
        # the coordinates [n, C] in the weak directions, from what is above, and from their own equations
        jacobian, residual, weight = above
        own = parts.size[strong:, None] / parts.noise.sqrt()
        rows = torch.cat([weight[:, None] * jacobian, torch.diag(own.flatten())])
        solved = least_squares(rows, torch.cat([weight * residual, torch.zeros_like(own.flatten())])[:, None])
        if solved is None:
            return found
        change, spread = (each.view(len(weak), channels) for each in (solved.value, solved.deviation))
        variance = particular.deviation.square() + weak.T.square() @ spread.square()
        return Fitted(particular.value + weak.T @ change, variance.sqrt())

    def _above(self, place: int, value: Tensor, weak: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return how the open ReLUs above a step depend on its output [C, J] in directions [n, J].

        Returns:
            The derivatives [R, n * C] of the inputs of open ReLUs, how far these are from what the values say [R], and
            one over the standard deviation of that [R]. None if nothing above is known.
        """
        steps = self.network.steps
        shape = steps[place].shape
        gates = [at for at in sorted(self._reached(place)) if at in self.values and at in self.masks]
        jacobians, residuals, weights = [], [], []
        for gate in gates:
            (before,) = steps[gate].inputs
            base = self._follow(before, place, value.view(1, *shape))
            if base is None:
                continue
            (open_,) = self.masks[gate].flatten().nonzero(as_tuple=True)
            open_ = open_[:: max(1, len(gates) * len(open_) // (EQUATIONS * len(weak) * shape[0]))]
            known = self.values[gate]
            residuals.append((known.value - base[0]).flatten()[open_])
            weights.append(1 / known.deviation.flatten()[open_])
            columns = []
            for direction in weak:
                moved = torch.zeros(shape[0], *shape, dtype=torch.float64)
                moved[range(shape[0]), range(shape[0])] = direction.view(shape[1:])
                changed = self._follow(before, place, value.view(1, *shape) + moved)
                assert changed is not None
                columns.append((changed - base).flatten(1)[:, open_])
            jacobians.append(torch.cat(columns).T)
        if not jacobians:
            return None
        return torch.cat(jacobians), torch.cat(residuals), torch.cat(weights)

    def _reached(self, place: int) -> set[int]:
        """Return the ReLUs that a step's output reaches through affine steps."""
        found, unseen = set(), [place]
        while unseen:
            for user in self.network.steps[unseen.pop()].users:
                if self.network.steps[user].kind == "relu":
                    found.add(user)
                elif self.network.steps[user].kind in ("convolution", "scaling", "affine"):
                    unseen.append(user)
        return found

    def _follow(self, at: int, place: int, value: Tensor) -> Tensor | None:
        """Return the outputs [N, ...] of a step for outputs [N, C, H, W] of the step at ``place`` below it."""
        if at == place:
            return value
        if at in self.values:
            return self.clean(at)[None].expand(len(value), -1, -1, -1)
        step = self.network.steps[at]
        if step.kind not in ("convolution", "scaling", "affine"):
            return None
        inputs = [self._follow(each, place, value) for each in step.inputs]
        known = [each for each in inputs if each is not None]
        return self.network.forward(at, known) if len(known) == len(inputs) else None

    def _shaped(self, place: int, found: Fitted) -> Fitted:
        shape = self.network.steps[place].shape
        return Fitted(*(each.T.reshape(shape) for each in (found.value, found.deviation)))

    def _settle(self, place: int, readers: list[_Reader]) -> bool:
        """Recover a ReLU's output below normalisations by the image's own statistics; return whether it converged.

        The errors below them depend on the values themselves: values and statistics are a fixed point, which is found
        up to a factor first, without eps. The factor follows from the gradient of the shift below, and eps is put back.
        """
        step = self.network.steps[place]
        shift = self.sent.get(self.network.shift(place) or "") if step.kind == "relu" else None
        if shift is None or step.slope:
            return False
        begun = all(each.normalisation in self._standards for each in readers)
        if not begun:
            self._guess(readers)
        for exact in (True,) if begun else (False, True):
            value, last, damping = None, torch.inf, 1.0
            for _ in range(SETTLE_ROUNDS):
                found, null = least_norm(*self._equations(readers))
                if len(null) > 1:
                    return False
                solution = self._shaped(place, found)
                new = _lowered(solution.value, null.view(-1, *step.shape[1:])).clamp(min=0)
                change = float("inf") if value is None else float((new - value).norm() / new.norm())
                damping = max(MIN_DAMPING, 0.7 * damping) if change > SLOW * last else damping
                stalled = change < ROUGHLY and change > STALLED * last
                done = change < (SETTLED if exact else ROUGHLY) or stalled
                value, last = new, change
                self.values[place] = Fitted(new, solution.deviation)
                if exact and not self._rescale(place, shift, readers):
                    return False
                for each in readers:
                    self._standardise(each, self.values[place].value, exact, damping)
                if done:
                    break
            if not exact and not self._rescale(place, shift, readers):
                return False
        solution = self.values[place]
        if not float(solution.deviation.norm()) < MAX_DEVIATION * float(solution.value.norm()):
            del self.values[place], self.masks[place]
            return False
        return True

    def _guess(self, readers: list[_Reader]) -> None:
        """Guess the statistics of the normalisations above convolutions whose input is not known, up to a factor."""
        errors = []
        for each in readers:
            assert each.normalisation is not None
            module = self.network.module(each.normalisation)
            assert isinstance(module, nn.BatchNorm2d)
            scale, products = module.weight.detach(), self.sent[f"{self.network.steps[each.normalisation].name}.weight"]
            z = scale.new_zeros(self.network.steps[each.normalisation].shape)
            known = self._seen(each.normalisation)
            if known is not None:
                mask, seen = known
                shut = (~mask).sum((1, 2), keepdim=True).clamp(min=1)
                z = torch.where(mask, seen, -torch.where(mask, seen, 0.0).sum((1, 2), keepdim=True) / shut)
                z = z - z.mean((1, 2), keepdim=True)
            self._standards[each.normalisation] = Standard(z, torch.ones_like(scale), scale, products)
            self._forget(each.normalisation)
            error = self.error(each.place)
            assert error is not None
            errors.append(design(error[0], each.layer.geometry).view(*each.rows(self.sent).shape[:2], -1))
        spreads = relative_spreads(errors, [each.rows(self.sent) for each in readers])
        for each, spread in zip(readers, spreads):
            assert each.normalisation is not None
            self._standards[each.normalisation] = replace(self._standards[each.normalisation], spread=spread)
            self._forget(each.normalisation)

    def _seen(self, place: int) -> tuple[Tensor, Tensor] | None:
        """Return where the ReLU right above a normalisation is open, and the normalised values there; None without."""
        users = self.network.steps[place].users
        gate = users[0] if len(users) == 1 else place
        if self.network.steps[gate].kind != "relu" or gate not in self.masks:
            return None
        module = self.network.module(place)
        assert isinstance(module, nn.BatchNorm2d)
        scale, shift = (each.detach()[:, None, None] for each in (module.weight, module.bias))
        return self.masks[gate] & (scale != 0), (self.values[gate].value - shift) / scale

    def _standardise(self, reader: _Reader, value: Tensor, exact: bool, damping: float) -> None:
        """Set the statistics of the normalisation above a convolution by its input [C, H, W]."""
        at = reader.normalisation
        assert at is not None
        module = self.network.module(at)
        assert isinstance(module, nn.BatchNorm2d)
        outputs = self.network.forward(reader.place, [value[None]])[0]
        z, spread = standardised(outputs, module.eps if exact else 0.0)
        known = self._seen(at)
        z = z if known is None else torch.where(*known, z)
        old = self._standards[at]
        z = damping * z + (1 - damping) * old.z
        self._standards[at] = replace(old, z=z - z.mean((1, 2), keepdim=True), spread=spread)
        self._forget(at)

    def _rescale(self, place: int, shift: Tensor, readers: list[_Reader]) -> bool:
        """Scale a ReLU's output so that the error below it has the sums that the gradient of the shift there gives."""
        whole = self.error(place)
        if whole is None:
            return False
        parts = []
        for each in readers:
            error = self.error(each.place)
            assert error is not None
            parts.append(self.network.backward(each.place, place, error))
        part = sum(parts[1:], parts[0])
        solution = self.values[place]
        mask, factor = fitting_mask(solution, part[0], (whole - part)[0], shift)
        if not factor > 0:
            return False
        mask = balanced(mask, solution, (factor * part + whole - part)[0], shift)
        self.masks[place] = mask
        self.values[place] = Fitted(solution.value / factor, solution.deviation / factor)
        for each in readers:
            assert each.normalisation is not None
            old = self._standards[each.normalisation]
            self._standards[each.normalisation] = replace(old, spread=old.spread / factor)
            self._forget(each.normalisation)
        return True

    def _forget(self, place: int) -> None:
        """Forget the errors of the steps below a place, at which something has changed."""
        self._errors = {at: error for at, error in self._errors.items() if at >= place}

    def _decide(self, place: int) -> None:
        """Decide the mask of a ReLU from its recovered output."""
        value, step = self.values[place], self.network.steps[place]
        mask = value.value > (0 if step.slope else CLEAR * value.deviation)
        self.masks[place] = mask
        self._balance(place)

    def _balance(self, place: int) -> None:
        """Change the mask of a ReLU at doubtful places that explain a wrong sum of the error behind it."""
        value, step, mask = self.values[place], self.network.steps[place], self.masks[place]
        self._forget(place)
        error, sums = self.error(place), self.sent.get(self.network.shift(place) or "")
        if error is not None and sums is not None:
            rest = sums - step.slope * error[0].sum((1, 2))
            self.masks[place] = balanced(mask, value, (1 - step.slope) * error[0], rest)

    def _correct(self, place: int, layer: Convolution, at: int) -> bool:
        """Decide the mask above a convolution again from its weight gradient; return whether it changed.

        With the convolution's input known, each row of its weight gradient gives the error at its output. Divided by
        the error that an open ReLU would give, that is 1 where the ReLU is open and its slope below 0 where not.
        """
        found = self._gate(at)
        if found is None or found[0] not in self.masks:
            return False
        gate, gain, offset = found
        above = self.error(gate)
        assert above is not None
        value, step = self.values[place], self.network.steps[place]
        rectified = step.kind == "relu" and step.slope == 0
        inputs = torch.where(value.value > CLEAR * value.deviation, value.value, 0.0) if rectified else value.value
        matrix = windows(inputs, layer.geometry)
        live = matrix.norm(dim=0)
        live = live > 1e-3 * live.median()
        solved = least_squares(matrix[:, live], self.sent[layer.weight].flatten(1).T)
        if solved is None:
            return False
        full, fixed = ((each.expand_as(above))[0].flatten(1)[:, live] for each in (gain * above, offset))
        ratio, spread = (solved.value.T - fixed) / full, solved.deviation.T / full.abs()
        mask, own = self.masks[gate].flatten(1), self.values.get(gate)
        sure = spread < SHARP
        new = mask.clone()
        new[:, live] = torch.where(sure, ratio > (1 + self.network.steps[gate].slope) / 2, mask[:, live])
        if own is not None:
            new |= (own.value > CERTAIN * own.deviation).flatten(1)
        new = self._no_worse(gate, mask, new)
        count = int((new != mask).sum())
        if count == 0 or count > MAX_CHANGED * mask.numel():
            return False
        self.masks[gate] = new.view_as(self.masks[gate])
        self._forget(gate)
        return True

    def _no_worse(self, gate: int, old: Tensor, new: Tensor) -> Tensor:
        """Return a ReLU's new mask [C, P], but the old one in channels whose sum of the error it would make worse."""
        error, sums = self.error(gate), self.sent.get(self.network.shift(gate) or "")
        if error is None or sums is None:
            return new
        slope, rows = self.network.steps[gate].slope, error[0].flatten(1)
        before, after = ((torch.where(mask, rows, slope * rows).sum(1) - sums).abs() for mask in (old, new))
        return torch.where((after <= torch.maximum(before, 3 * before.median()))[:, None], new, old)

    def _check(self, place: int) -> float:
        """Return how far the ReLUs right above a step are from what follows from the step and those below."""
        worst = float("nan")
        for user in self.network.steps[place].users:
            found = self._gate(user) if self.network.steps[user].kind == "convolution" else None
            if found is None or found[0] not in self.values:
                continue
            (before,) = self.network.steps[found[0]].inputs
            follows = self.predict(before)
            if follows is not None:
                value = self.clean(found[0])
                far = float((self.network.forward(found[0], [follows])[0] - value).norm() / value.norm())
                worst = far if not worst > far else worst
        return worst
