"""The layer inputs of a ReLU network, from the lowest convolution whose gradient leaks its own input downwards.

Below a point at which the error is known, and as long as the masks of the ReLUs are known too, errors follow by the
backward pass, whatever the values. So each convolution's input is the solution of a linear least-squares problem. Its
sign is the mask of the ReLU that it comes from, and the descent continues below it. A decision is exact or wrong: as
long as it is exact, the error of a layer is the noise of that layer's own gradient, not the sum over those above.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from leakbench.attacks.peeling.averages import open_averaged
from leakbench.attacks.peeling.beginnings import beginnings, factorisable, flat_heads, heads, lattice_of, opens
from leakbench.attacks.peeling.completion import factorise_incomplete
from leakbench.attacks.peeling.correlation import FLOOR, Fitted, by_image, least_squares, windows
from leakbench.attacks.peeling.factors import ConvolutionFactors, NotFactorised
from leakbench.attacks.peeling.gates import decide, fitting_mask, rebalance
from leakbench.attacks.peeling.knowledge import CLEAR, Knowledge
from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.masks import factorise_masked, factorise_valued
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.settle import AT_CEILING, ROOM
from leakbench.attacks.peeling.shifts import factorise_convolution
from leakbench.attacks.peeling.standard import Standard, standardised
from leakbench.attacks.peeling.upwards import complete_above
from leakbench.attacks.peeling.values import solve
from leakbench.gradients.linear import layer_input

EVEN = 1e-6
"""How much, relative to the largest one, the errors of a channel may differ that count as the same."""

MAX_IMBALANCE = 0.02
"""How far, relative to the gradient of a shift, the sums of the error may be from it at a beginning."""

CLEAN, NOISY = 1e-4, 3.0
"""The relative misfit of a factorised gradient below which it has no noise, and how many times as much as that of a
noisy one the sums may be off."""

MAX_DEVIATION = 0.1
"""How far, relative to its size, the input that a linear layer's gradient gives may be from exact."""

MAX_UNSURE = 0.2
"""The standard deviation up to which a number of open positions is rounded."""

MAX_COMPLETED = 36
"""The most positions of an input for which missing entries are completed: time grows with their fourth power."""

NOT_COMPLETE = NotFactorised("only some entries of the gradient were sent")

ALONE = 3
"""How many convolutions' inputs are factorised if no descent begins at one."""


@dataclass(frozen=True)
class Feature:
    """The recovered output of a step.

    Attributes:
        place: the step's.
        value: [B, C, H, W] float64; NaN where it does not follow, if it is free.
        deviation: of its values relative to their root mean square, as its own equations show it.
        check: how far it is from the values that follow from those below, relative to it; NaN if there are none.
        balance: how far the sums of the error below it are from the gradient of the shift there; NaN if not seen.
        error: the derivative of the loss by the value; None if it does not follow.
        free: the value is known only up to a factor.
    """

    place: int
    value: Tensor
    deviation: float
    check: float
    balance: float
    error: Tensor | None
    free: bool = False


@dataclass(frozen=True)
class Recovered:
    """What a descent recovered.

    Attributes:
        features: the recovered values, the highest first.
        reason: where and why it ended, a line; empty if it reached the image.
    """

    features: Sequence[Feature]
    reason: str


def recover(
    network: Network,
    sent: Mapping[str, Tensor],
    rng: torch.Generator,
    images: int = 1,
    spreads: Mapping[str, float] | None = None,
) -> Recovered:
    """Return what can be recovered from the lowest convolution on that gives its own input; nothing if none does.

    Args:
        network: a trial's, in float64.
        sent: the trial's gradient, by name; NaN in entries that were not sent.
        rng: for the start of an eigenvalue solver, and for the search that tells images apart.
        images: how many images were trained on at a time. Their order is not known.
        spreads: the standard deviation of an entry's error in tensors of which it is known.
    """
    exact = {name: value.double() for name, value in sent.items()}
    reason = "no convolution behind a ReLU has as many channels as places"
    noisy: list[Recovered] = []
    for place in beginnings(network, sent, images):
        layer = network.steps[place].layer
        assert layer is not None
        whole = bool(torch.isfinite(sent[layer.weight]).all())
        found = factorise_convolution(sent[layer.weight], lattice_of(layer), rng, images) if whole else NOT_COMPLETE
        if isinstance(found, NotFactorised):
            reason = f"{layer.name}: {found.reason}"
            continue
        reason = f"{layer.name}: no scale of its input agrees with the gradient of the shift below"
        for sign in (1.0, -1.0) if images == 1 else (1.0,):
            known = Knowledge(network, exact, images, spreads, found.misfit >= CLEAN)
            if not begin(known, place, sign * found.errors, max(MAX_IMBALANCE, NOISY * found.misfit)):
                reason = known.missing.get(network.steps[place].inputs[0], reason)
                continue
            if found.misfit < CLEAN and images == 1 and (top := complete_above(known)) is not None:
                descend(known, top)
            result = _recovered(known)
            if found.misfit < CLEAN:
                return result
            noisy.append(result)
            reason = f"{layer.name}: too much noise to descend from it"
            break
        if noisy and any(usable(each) for each in noisy[-1].features):
            break  # higher convolutions, of fewer positions, bear more noise
    for place, at in flat_heads(network, sent) if images == 1 else ():
        known = Knowledge(network, exact, images, spreads)
        refused = begin_at_flat_head(known, place, at)
        if refused is None:
            return _recovered(known)
        reason = refused
    for place in heads(network, sent) if images == 1 else ():
        known = Knowledge(network, exact, images, spreads)
        refused = begin_at_head(known, place, rng)
        if refused is None:
            noisy.append(_recovered(known))
            break
        reason = refused
    return max(noisy, key=_depth, default=Recovered((), reason))


def _depth(found: Recovered) -> tuple[int, float]:
    """Return how far below a descent found usable values, and how exact the lowest one is; more is better."""
    lowest = min((each for each in found.features if usable(each)), key=lambda each: each.place, default=None)
    if lowest is None:
        return -sys.maxsize, -min((each.deviation for each in found.features), default=math.inf)
    return -lowest.place, -lowest.deviation


def _recovered(known: Knowledge) -> Recovered:
    found = features(known)
    missing = [place for place in known.missing if place not in known.values]
    return Recovered(found, known.missing[max(missing)] if missing else _hidden(known))


def _hidden(known: Knowledge) -> str:
    """Return which step hides the error below the lowest value; empty if that is the first layer's."""
    steps = known.network.steps
    hidden = [
        place
        for place in range(min(known.values, default=0))
        if steps[place].kind != "image" and known.error(place) is None
    ]
    if not hidden:
        return ""
    above = [user for user in steps[max(hidden)].users if known.error(user) is not None]
    name = steps[max(above, default=max(hidden))].name
    return f"{name}: the error below it does not follow, as its masks or positions are not known"


def inputs_alone(network: Network, sent: Mapping[str, Tensor], rng: torch.Generator) -> list[Feature]:
    """Return the inputs, up to a factor each, of the lowest convolutions that give their own; the highest first.

    Whatever is above and below them does not matter. One image.

    Args:
        network: a trial's.
        sent: the trial's gradient, by name; NaN in entries that were not sent. Of inputs of layers that have some,
            channels that do not follow are NaN.
        rng: for the start of an eigenvalue solver.
    """
    features: dict[int, Feature] = {}
    for place in factorisable(network, sent):
        layer, (source,) = network.steps[place].layer, network.steps[place].inputs
        assert layer is not None
        if source in features:
            continue
        lattice = lattice_of(layer)
        there = torch.isfinite(sent[layer.weight])
        if bool(there.all()):
            found = factorise_convolution(sent[layer.weight], lattice, rng)
        elif lattice.inputs <= MAX_COMPLETED and bool(there.any()):
            found = factorise_incomplete(sent[layer.weight], there, lattice, rng)
        else:
            continue
        if isinstance(found, NotFactorised):
            continue
        missing = float("nan")
        spread = float(found.variance.nanmean().sqrt())  # the root mean square of the inputs is 1
        features[source] = Feature(source, found.inputs, spread, missing, missing, None, free=True)
        if len(features) == ALONE:
            break
    return [features[source] for source in sorted(features, reverse=True)]


def recover_everywhere(network: Network, sent: Mapping[str, Tensor], rng: torch.Generator) -> list[Feature]:
    """Return what can be recovered from every convolution that gives its own input; the highest first.

    Descents from higher ones do not matter to an image, but say which other layers' inputs follow: in a DenseNet, a
    descent ends where features are joined. One image.

    Args:
        network: a trial's, in float64.
        sent: the trial's gradient, by name; NaN in entries that were not sent.
        rng: for the start of an eigenvalue solver.
    """
    exact = {name: value.double() for name, value in sent.items()}
    found = {each.place: each for each in recover(network, sent, rng).features}
    for place in beginnings(network, sent):
        layer = network.steps[place].layer
        assert layer is not None
        if network.steps[place].inputs[0] in found or not bool(torch.isfinite(sent[layer.weight]).all()):
            continue
        own = factorise_convolution(sent[layer.weight], lattice_of(layer), rng)
        if isinstance(own, NotFactorised) or own.misfit >= CLEAN:
            continue
        known = Knowledge(network, exact)
        if begin(known, place, own.errors):
            found = {each.place: each for each in features(known)} | found
    return [found[place] for place in sorted(found, reverse=True)]


def usable(feature: Feature) -> bool:
    """Return whether a recovered value is near the truth, as far as its equations and the values below show it."""
    return feature.deviation < MAX_DEVIATION and feature.check < MAX_DEVIATION


def begin(known: Knowledge, place: int, error: Tensor, most: float = MAX_IMBALANCE) -> bool:
    """Begin at a convolution whose error [B, O, h, w] is known up to a factor of each image, and descend.

    The gradient of a shift below the ReLU that gives the input is the sum of the error there: it gives the factors.

    Returns:
        Whether the factors could be found, and the error's sums agree with that gradient up to ``most``, relative.
    """
    steps = known.network.steps
    (source,) = steps[place].inputs
    step = steps[source]
    sent = known.sent.get(known.network.shift(source) or "") if step.kind == "relu" else None
    if sent is None or step.users != (place,):
        return False
    layer = steps[place].layer
    assert layer is not None
    for last in (False, False, True):
        known.pin(place, error)
        known.masks.clear()
        solve(known, source, known.readers(source), torch.inf)
        if source not in known.values:
            return False
        below = known.network.backward(place, source, error)
        rough = known.values[source]
        known.masks[source], factors = fitting_mask(rough, below, torch.zeros_like(below), sent, step.slope)
        if not bool((torch.isfinite(factors) & (factors != 0)).all()):
            return False
        factor = factors.view(-1, 1, 1, 1)
        known.values[source] = Fitted(rough.value / factor, rough.deviation / factor)
        error = factor * error
        if not last:
            # an input with exact zeros gives a better error, and that with exact zeros a better input
            better = least_squares(windows(known.clean(source), layer.geometry), known.sent[layer.weight].flatten(1).T)
            if better is not None:
                clear = better.value.abs() > CLEAR * better.deviation
                error = by_image(torch.where(clear, better.value, 0.0).T, error)
    top = known.pin(place, error)
    rebalance(known, source)
    if bool(known.full(source, ROOM).any()):
        known.missing[source] = f"{layer.name}: {AT_CEILING.reason}"
        return False
    if not known.balance(source) < most:
        return False
    (above,) = steps[place].users if len(steps[place].users) == 1 else (place,)
    if steps[above].kind == "normalisation" and f"{steps[above].name}.weight" in known.sent:
        module = known.network.module(above)
        assert isinstance(module, nn.BatchNorm2d)
        z, spread = standardised(known.network.forward(place, [known.clean(source)]), module.eps)
        products = known.sent[f"{steps[above].name}.weight"]
        known.standards[above] = Standard(z, spread, module.weight.detach(), products)
        top = known.pin(place, error)
    descend(known, top)
    return True


def begin_at_head(known: Knowledge, place: int, rng: torch.Generator) -> str | None:
    """Begin at a linear layer above average pooling, and descend; return why the mask below it was not found, if so.

    The error is the same at all positions of a channel, so the gradient of the shift below the ReLU gives the
    number of open positions, and the weight gradient of the convolution there which they are (``masks.py``). Behind
    noise, or if that gradient was withheld, the number is not known, and the weight gradient decides all masks.
    """
    steps = known.network.steps
    reason = f"{steps[place].name}: the masks of the ReLU below do not follow from it"
    top = steps[place].inputs[0]
    error, exact = head_error(known, place)
    if error is None:
        return f"{steps[place].name}: the gradients of its weight and bias were not sent, or are not finite"
    bias = known.sent.get(f"{steps[place].name}.bias")
    sized = bias is not None and bool(bias.isfinite().any())
    known.noisy = not exact
    known.pinned[top] = known.network.backward(place, top, error[None])
    for at in reversed(range(place)):
        layer = steps[at].layer
        found = known.gate(at) if layer is not None and opens(layer) else None
        above = None if found is None else known.error(found[0])
        if layer is None or found is None or above is None:
            continue
        gate, gain, _ = found
        values = (gain * above)[0].flatten(1)
        even = float((values - values[:, :1]).abs().max()) <= EVEN * float(values.abs().max())
        if not even or steps[gate].slope:
            continue
        factors = _masked(known, layer, gate, values[:, 0], above[0, :, 0, 0], rng, exact)
        if isinstance(factors, NotFactorised):
            reason = f"{layer.name}: {factors.reason}"
            continue
        mask, sums = factors.errors != 0, known.sent.get(known.network.shift(gate) or "")
        made, seen = (mask * above).sum((0, 2, 3)), torch.zeros_like(values[:, 0], dtype=torch.bool)
        if sums is not None:
            seen = sums.isfinite() & (made != 0)
        if sums is not None and bool(seen.any()):  # by more equations than the head's few
            known.pinned[top] = known.pinned[top] * (made[seen] @ sums[seen]) / made[seen].square().sum()
            known.errors = {}
        elif not sized:
            reason = f"{layer.name}: nothing that was sent gives the size of its input"
            continue
        known.masks[gate] = mask
        known.forget(gate)
        descend(known, gate)
        return None
    return reason


def _masked(
    known: Knowledge,
    layer: Convolution,
    gate: int,
    values: Tensor,
    above: Tensor,
    rng: torch.Generator,
    exact: bool,
) -> ConvolutionFactors | NotFactorised:
    """Return what the weight gradient of a convolution gives whose errors are one value a channel times a mask.

    Args:
        known: of the trial.
        layer: the convolution.
        gate: the place of the ReLU above it, whose mask that is.
        values: [O], the errors at the convolution's output where the ReLU is open.
        above: [O], the errors at the ReLU's output.
        rng: for the start of an eigenvalue solver.
        exact: the errors have no noise but rounding.
    """
    own, lattice = known.sent.get(layer.weight), lattice_of(layer)
    if own is None or not bool(own.isfinite().any()):
        return NotFactorised("the gradient of its weight was not sent, or is not finite")
    shift = known.network.shift(gate) or ""
    sums = known.sent.get(shift)
    counts = torch.full_like(values, torch.nan)
    if sums is not None:
        if exact:
            opened = (sums / above).nan_to_num(0.0, 0.0, 0.0)
            factors = factorise_masked(own, lattice, values, opened, rng)
            if isinstance(factors, ConvolutionFactors):
                return factors
        sure = known.spreads.get(shift, torch.inf) < MAX_UNSURE * above.abs()
        counts = torch.where(sure, (sums / above).round().clamp(0, lattice.outputs), torch.nan)
    return factorise_valued(own.nan_to_num(0.0), lattice, values, counts, rng, exact)


def head_error(known: Knowledge, place: int) -> tuple[Tensor | None, bool]:
    """Return the error [K] at a linear layer's output of one image, None without any, and whether it is exact.

    The gradient of the layer's weight is that error times the layer's input, which is not negative. Behind noise, its
    first singular vector is nearer to the error than the gradient of the bias, which gives its size.
    """
    name = known.network.steps[place].name
    given = (known.sent.get(f"{name}.{part}") for part in ("bias", "weight"))
    there = (None if each is None or not bool(each.isfinite().any()) else each for each in given)
    bias, by_weight = (None if each is None else each.nan_to_num(0.0) for each in there)
    if by_weight is None:
        return bias, known.complete(f"{name}.bias")
    left, singular, right = torch.linalg.svd(by_weight, full_matrices=False)
    if bias is None:
        return left[:, 0] * right[0].sum().sign(), False  # the size follows from the gradient of a shift
    clean = known.complete(f"{name}.bias") and (len(singular) < 2 or float(singular[1]) < CLEAN * float(singular[0]))
    return (bias, True) if clean else (left[:, 0] * (left[:, 0] @ bias), False)


def begin_at_flat_head(known: Knowledge, place: int, at: int) -> str | None:
    """Begin at a linear layer that takes all values of the step ``at``, and descend; return why not, if so.

    With d = dL/db: dL/dW = d f^T, so f = (dL/dW)^T d / |d|^2, and the error at f is W^T d.
    """
    steps = known.network.steps
    name = steps[place].name
    by_weight, error = known.sent[f"{name}.weight"], known.sent[f"{name}.bias"]
    power = error.square().sum()
    if not (known.complete(f"{name}.weight") and known.complete(f"{name}.bias")):
        return f"{name}: {NOT_COMPLETE.reason}"
    if not float(power) > 0:
        return f"{name}: the gradient of its bias is zero"
    value = layer_input(by_weight[None], error[None])
    rest = (by_weight - error[:, None] * value).square().mean() + FLOOR**2 * by_weight.square().mean()
    top = steps[place].inputs[0]
    known.pinned[top] = known.network.backward(place, top, error[None])
    if not float((rest / power).sqrt()) < MAX_DEVIATION * float(value.square().mean().sqrt()):
        return f"{name}: the gradient of its weight is not that of one input"
    # flattening only orders values anew, so that its transpose is its inverse; it may repeat them, too
    while top != at:
        (lower,) = steps[top].inputs
        times = prod(steps[top].shape) // prod(steps[lower].shape)
        value, top = known.network.backward(top, lower, value) / times, lower
    known.values[at] = Fitted(value, torch.full_like(value, float((rest / power).sqrt())))
    if steps[at].kind == "relu":
        decide(known, at)
        if known.balance(at) > MAX_IMBALANCE:
            return f"{name}: its input contradicts the gradient of the shift below"
    descend(known, at)
    return None


def descend(known: Knowledge, top: int) -> None:
    """Recover the outputs of the steps below a place at which the error is known, as far as possible."""
    for place in reversed(range(top)):
        step = known.network.steps[place]
        if step.kind == "image":
            continue
        readers = known.readers(place)
        if readers and place not in known.values:
            solve(known, place, readers)
        if step.kind == "relu" and place in known.values and place not in known.masks:
            decide(known, place)
        if step.kind == "relu" and place not in known.values and place not in known.masks:
            refused = open_averaged(known, place)
            if refused is not None:
                known.missing[place] = refused


def features(known: Knowledge) -> list[Feature]:
    """Return the recovered values, the highest first; not those that the forward pass gave from others."""
    found = []
    for place in sorted(known.values.keys() - known.followed, reverse=True):
        value = known.clean(place)
        size = value.square().mean().sqrt()
        deviation = float(known.values[place].deviation.square().mean().sqrt() / size)
        found.append(Feature(place, value, deviation, check(known, place), known.balance(place), known.error(place)))
    return found


def check(known: Knowledge, place: int) -> float:
    """Return how far the ReLUs right above a step are from what follows from the step and those below."""
    worst = float("nan")
    for user in known.network.steps[place].users:
        found = known.gate(user) if known.network.steps[user].kind == "convolution" else None
        if found is None or found[0] not in known.values or found[0] in known.followed:
            continue
        (before,) = known.network.steps[found[0]].inputs
        follows = known.predict(before)
        if follows is not None:
            value = known.clean(found[0])
            far = float((known.network.forward(found[0], [follows]) - value).norm() / value.norm())
            worst = far if not worst > far else worst
    return worst
