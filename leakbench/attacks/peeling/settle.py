"""A ReLU's output below normalisations by the image's own statistics: a fixed point of values and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isnan, prod

import torch
from torch import Tensor, nn

from leakbench.attacks.peeling.correlation import (
    Directions,
    Fitted,
    by_channel,
    by_image,
    design,
    directions,
    joined,
    least_squares,
)
from leakbench.attacks.peeling.factors import NotFactorised
from leakbench.attacks.peeling.gates import balanced, fitting_mask
from leakbench.attacks.peeling.knowledge import Knowledge, Reader
from leakbench.attacks.peeling.standard import Standard, relative_spreads, standardised
from leakbench.core.device import free_memory

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

WEAK = 1e-2
"""The part of the largest singular value below which a direction is found from the open ReLUs above: errors of the
statistics grow in it, and values and statistics would not settle."""

MAX_IMBALANCE = 0.02
"""How far, relative to the gradient of a shift, the sums of the error below a leaky ReLU may be from it."""

FINER = (6e-3, 6e-4, 6e-5)
"""The relative steps in which a factor is looked for about the best one so far, ten to each side."""

HALVINGS = 60
"""How often an interval is halved that holds an unknown constant of a channel."""

COPIES = 6
"""How many matrices of equations are held at a time."""

ROOM = 0.05
"""How far below a ReLU's ceiling, relative to it, all values must be whose scale follows from sums of the error: these
are taken as if the ReLU had none."""

AT_CEILING = NotFactorised("the input reaches the ceiling of its ReLU, where that has no derivative")
UNSETTLED = NotFactorised("input and statistics did not settle")
NO_FACTOR = NotFactorised("no scale of the input agrees with the gradient of the shift below")


def settle(known: Knowledge, place: int, readers: Sequence[Reader]) -> NotFactorised | None:
    """Recover a ReLU's output below normalisations by the image's own statistics; return why it cannot be, if so.

    It may also be the output of a leaky ReLU, or that of a max-pool of a ReLU's. The errors below them depend on the
    values themselves: values and statistics are a fixed point, which is found up to a factor first, without eps. The
    factor follows from the gradient of the shift below, and eps is put back. What was known of the step before stays if
    it cannot be.
    """
    before = dict(known.values), dict(known.masks), dict(known.standards)
    refused = _settled(known, place, readers)
    if refused is not None:
        known.values, known.masks, known.standards = before
        known.forget(place)
    return refused


def _settled(known: Knowledge, place: int, readers: Sequence[Reader]) -> NotFactorised | None:
    """Recover a ReLU's output as ``settle`` does; if it cannot be, what is known of the step is no solution."""
    step = known.network.steps[place]
    # a max-pool sends its errors to other places, but their sums are the same
    gate = step.inputs[0] if step.kind == "max-pool" else place
    leaky = step.kind == "relu" and step.slope > 0
    shift = known.sent.get(known.network.shift(gate) or "") if known.rectified(place) or leaky else None
    if shift is None:
        return NotFactorised("the input is no ReLU's above a shift whose gradient was sent, and has no scale")
    middle = mean_of(known, step.inputs[0]) if leaky else None
    begun = all(each.normalisation in known.standards for each in readers)
    if not begun:
        guess(known, readers)
    for exact in (True,) if begun else (False, True):
        value, last, damping = None, torch.inf, 1.0
        for _ in range(SETTLE_ROUNDS):
            matrix, right = known.equations(readers)
            if not bool(matrix.isfinite().all()):
                return UNSETTLED
            own = directions(matrix, right)
            # above a leaky ReLU's input, values say all of the statistics, which settle without more
            found, null = determined(own) if leaky else sharpened(known, place, readers, own)
            if len(null) > 1 or (len(null) and leaky and middle is None):
                return NotFactorised(f"the equations leave {len(null)} values of each channel of the input open")
            solution = known.shaped(place, found)
            pattern = null.view(-1, known.images, *step.shape[1:])
            new = solution.value if leaky else lowered(solution.value, pattern).clamp(min=0)
            change = float("inf") if value is None else float((new - value).norm() / new.norm())
            damping = max(MIN_DAMPING, 0.7 * damping) if change > SLOW * last else damping
            stalled = change < ROUGHLY and change > STALLED * last
            done = change < (SETTLED if exact else ROUGHLY) or stalled
            value, last = new, change
            known.values[place] = Fitted(new, solution.deviation)
            if exact and not rescale(known, place, shift, readers, pattern, near=True):
                return NO_FACTOR
            for each in readers:
                standardise(known, each, known.values[place].value, exact, damping)
            if done:
                break
        if not exact and not rescale(known, place, shift, readers, pattern):
            return NO_FACTOR
    solution = known.values[place]
    if not float(solution.deviation.norm()) < MAX_DEVIATION * float(solution.value.norm()):
        return UNSETTLED
    if leaky and not known.balance(place) < MAX_IMBALANCE:
        return NO_FACTOR
    return AT_CEILING if bool(known.full(place, ROOM).any()) else None


def determined(found: Directions) -> tuple[Fitted, Tensor]:
    """Return the solution [B * J, C] of least norm, and an orthonormal basis [n, B * J] of what it leaves open."""
    rank = int((found.size > 0).sum())
    return found.solution(rank), found.basis[rank:]


def sharpened(known: Knowledge, place: int, readers: Sequence[Reader], found: Directions) -> tuple[Fitted, Tensor]:
    """Return the solution and what it leaves open (``determined``), with more of what is known above.

    Weak directions are found together with what is known above: where the ReLU above a normalisation is open, the
    normalised value is known, and it is linear in the convolution's input, up to the mean of the channel.
    If there are too many for the memory, they stay as they are.
    """
    rank, strong = int((found.size > 0).sum()), int((found.size > WEAK * found.size[0]).sum())
    whole, null = determined(found)
    if strong == rank:
        return whole, null
    base, weak = found.solution(strong), found.basis[strong:rank]
    steps = known.network.steps
    channels, shape = steps[place].shape[0], (known.images, *steps[place].shape)
    outputs = known.images * sum(prod(steps[each.place].shape) for each in readers)
    unknowns = len(weak) * channels
    if 8 * unknowns * (prod(shape) + COPIES * outputs) > free_memory(torch.device("cpu")):
        return whole, null
    moved = torch.zeros(len(weak), channels, *shape, dtype=torch.float64)
    for channel in range(channels):
        moved[:, channel, :, channel] = weak.view(-1, known.images, *shape[2:])
    rows, wanted = [], []
    for each in readers:
        assert each.normalisation is not None
        open_ = open_values(known, each.normalisation)
        if open_ is None:
            continue
        mask, z = (by_channel(own) for own in open_)
        spread = known.standards[each.normalisation].spread[:, None]
        out = by_channel(known.network.forward(each.place, [known.shaped(place, base).value]))
        lone = known.network.forward(each.place, [moved.flatten(0, 2)])
        lone = lone - known.network.forward(each.place, [torch.zeros(shape, dtype=torch.float64)])[:1]
        columns = lone.view(len(weak) * channels, known.images, *lone.shape[1:]).transpose(1, 2).flatten(2)
        # [N, O, B P] and [O, B P] less the means of what is open
        parts = torch.cat([columns, (spread * z - out)[None]]) / spread
        count = mask.sum(1, keepdim=True).clamp(min=1)
        parts = torch.where(mask, parts - torch.where(mask, parts, 0.0).sum(2, keepdim=True) / count, 0.0)
        rows.append(parts[:-1, mask].T)
        wanted.append(parts[-1, mask])
    upper = least_squares(torch.cat(rows), torch.cat(wanted)[:, None]) if rows else None
    if upper is None:
        return whole, null
    # both, weighted by their noise: that of the upper ones is what is left of them
    left = (torch.cat(wanted) - torch.cat(rows) @ upper.value[:, 0]).square().mean().sqrt().clamp(min=1e-300)
    own = (found.size[strong:rank, None] / found.noise.sqrt()).flatten()
    joint = torch.cat([torch.cat(rows) / left, torch.diag(own)])
    right = torch.cat([torch.cat(wanted) / left, own * found.value[strong:rank].flatten()])
    return joined(base, weak, joint, right) or whole, null


def guess(known: Knowledge, readers: Sequence[Reader]) -> None:
    """Guess the statistics of the normalisations above convolutions whose input is not known, up to a factor."""
    errors = []
    for each in readers:
        assert each.normalisation is not None
        module = known.network.module(each.normalisation)
        assert isinstance(module, nn.BatchNorm2d)
        scale, products = module.weight.detach(), known.sent[f"{known.network.steps[each.normalisation].name}.weight"]
        z = scale.new_zeros(known.images, *known.network.steps[each.normalisation].shape)
        open_ = open_values(known, each.normalisation)
        if open_ is not None:
            mask, value = open_
            shut = (~mask).sum((0, 2, 3), keepdim=True).clamp(min=1)
            z = torch.where(mask, value, -torch.where(mask, value, 0.0).sum((0, 2, 3), keepdim=True) / shut)
            z = z - z.mean((0, 2, 3), keepdim=True)
        known.standards[each.normalisation] = Standard(z, torch.ones_like(scale), scale, products)
        known.forget(each.normalisation)
        error = known.error(each.place)
        assert error is not None
        errors.append(design(error, each.layer.geometry).view(*each.rows(known.sent).shape[:2], -1))
    spreads = relative_spreads(errors, [each.rows(known.sent) for each in readers])
    for each, spread in zip(readers, spreads):
        assert each.normalisation is not None
        known.standards[each.normalisation] = replace(known.standards[each.normalisation], spread=spread)
        known.forget(each.normalisation)


def open_values(known: Knowledge, place: int) -> tuple[Tensor, Tensor] | None:
    """Return where the ReLU right above a normalisation is open, and the normalised values there; None without.

    A leaky ReLU gives them everywhere.
    """
    users = known.network.steps[place].users
    gate = users[0] if len(users) == 1 else place
    if known.network.steps[gate].kind != "relu" or gate not in known.masks:
        return None
    module = known.network.module(place)
    assert isinstance(module, nn.BatchNorm2d)
    scale, shift = (each.detach()[:, None, None] for each in (module.weight, module.bias))
    value, mask, slope = known.values[gate].value, known.masks[gate], known.network.steps[gate].slope
    if slope:
        value, mask = unbent(value, slope), torch.ones_like(mask)
    return mask & (scale != 0), (value - shift) / scale


def standardise(known: Knowledge, reader: Reader, value: Tensor, exact: bool, damping: float) -> None:
    """Set the statistics of the normalisation above a convolution by its input [B, C, H, W]."""
    at = reader.normalisation
    assert at is not None
    module = known.network.module(at)
    assert isinstance(module, nn.BatchNorm2d)
    outputs = known.network.forward(reader.place, [value])
    z, spread = standardised(outputs, module.eps if exact else 0.0)
    open_ = open_values(known, at)
    z = z if open_ is None else torch.where(*open_, z)
    old = known.standards[at]
    z = damping * z + (1 - damping) * old.z
    known.standards[at] = replace(old, z=z - z.mean((0, 2, 3), keepdim=True), spread=spread)
    known.forget(at)


def rescale(
    known: Knowledge, place: int, shift: Tensor, readers: Sequence[Reader], pattern: Tensor, near: bool = False
) -> bool:
    """Scale a ReLU's output so that the error below it has the sums that the gradient of the shift there gives.

    Args:
        known: of the trial; the output is known up to a factor.
        place: of the ReLU.
        shift: [C], that gradient.
        readers: the convolutions that take the output.
        pattern: [n, B, H, W], n <= 1, that their equations leave open. Of a leaky ReLU's output, so much of it is added
            that the ReLU's input has the mean that is known.
        near: the output has its scale, but for small errors.
    """
    whole = known.error(place)
    if whole is None:
        return False
    parts = []
    for each in readers:
        error = known.error(each.place)
        assert error is not None
        parts.append(known.network.backward(each.place, place, error))
    part = sum(parts[1:], parts[0])
    solution, slope = known.values[place], known.network.steps[place].slope
    middle = mean_of(known, known.network.steps[place].inputs[0]) if slope and len(pattern) else None
    if middle is not None:
        factor = 1.0 if near else _factor(solution.value, part, whole - part, shift, pattern[0], slope, middle)
        value = centred(solution.value, pattern[0], slope, factor, middle)
        solution = Fitted(value, solution.deviation)
    # one factor for all images, whose statistics are common: to the fit they are parts of one image
    joint, (found,) = fitting_mask(
        Fitted(_as_one(solution.value), _as_one(solution.deviation)),
        _as_one(part),
        _as_one(whole - part),
        shift,
        slope,
    )
    if not float(found) > 0:
        return False
    if slope:
        error = (1 - slope) * (found * part + whole - part)
        rest = shift - slope * (found * part + whole - part).sum((0, 2, 3))
        mask = balanced(solution.value > 0, solution, error, rest)
    else:
        mask = balanced(by_image(joint[0], part), solution, found * part + whole - part, shift)
    known.masks[place] = mask
    known.values[place] = Fitted(solution.value / found, solution.deviation / found)
    for each in readers:
        assert each.normalisation is not None
        old = known.standards[each.normalisation]
        known.standards[each.normalisation] = replace(old, spread=old.spread / found)
        known.forget(each.normalisation)
    return True


def _factor(
    value: Tensor, part: Tensor, rest: Tensor, sums: Tensor, pattern: Tensor, slope: float, middle: Tensor
) -> float:
    """Return the factor of a leaky ReLU's output, for which its mask and the sums of the error below it agree best.

    Args:
        value: [B, C, H, W], the output times the factor, less some of the pattern.
        part: [B, C, H, W], the part of the error at the output that is in one over the factor.
        rest: the other part.
        sums: [C], of the error below the ReLU.
        pattern: see ``centred``, as are the others.
    """
    there = sums.isfinite()

    def far(factor: float) -> float:
        mask = centred(value, pattern, slope, factor, middle) > 0
        error = factor * part + rest
        return float((torch.where(mask, error, slope * error).sum((0, 2, 3)) - sums)[there].norm())

    rough = centred(value, pattern, slope, torch.nan, middle)
    own, fixed = (torch.where(rough > 0, each, slope * each).sum((0, 2, 3))[there] for each in (part, rest))
    first = float(own @ (sums[there] - fixed) / own.square().sum())
    best = min((abs(first) * 10 ** (step / 40) for step in range(-40, 41)), key=far)
    for finer in FINER:
        best = min((best * (1 + finer * step) for step in range(-10, 11)), key=far)
    return best


def unbent(value: Tensor, slope: float) -> Tensor:
    """Return the input of a leaky ReLU for its output."""
    return torch.where(value > 0, value, value / slope)


def mean_of(known: Knowledge, place: int) -> Tensor | None:
    """Return the means [C] of the channels of a step that normalises by the images' own statistics, or adds such steps.

    They are the normalisation's shifts. None of another step.
    """
    network, step = known.network, known.network.steps[place]
    if step.kind == "normalisation":
        module = network.module(place)
        assert isinstance(module, nn.BatchNorm2d)
        return module.bias.detach()
    if step.kind != "affine" or len(step.inputs) < 2:
        return None
    means = [mean_of(known, each) for each in step.inputs]
    factors = [network.factor(place, each) for each in step.inputs]
    if not all(factor is not None and bool((factor == 1).all()) for factor in factors):
        return None
    there = [each for each in means if each is not None]
    return sum(there[1:], there[0]) if len(there) == len(means) else None


def centred(value: Tensor, pattern: Tensor, slope: float, factor: float, middle: Tensor) -> Tensor:
    """Return a leaky ReLU's output [B, C, H, W] with so much of a pattern [B, H, W] that its input has known means.

    Args:
        value: factor times the output, less some of the pattern.
        pattern: nearly constant where it is not 0.
        slope: of the ReLU below 0.
        factor: NaN if it is not known: where the pattern is, values then have the mean of the others.
        middle: [C], the means of the ReLU's input.
    """
    pattern = pattern * pattern.sum().sign()
    inside = (pattern > 0.5 * pattern.amax())[:, None]
    others = (~inside).sum().clamp(min=1)
    if isnan(factor):
        amount = (value * ~inside).sum((0, 2, 3)) / others - (value * inside).sum((0, 2, 3)) / inside.sum()
        return value + torch.where(inside, amount[:, None, None], 0.0)
    size = value.abs().amax() / slope + factor * middle.abs().amax()
    low, high = -size * torch.ones_like(middle), size * torch.ones_like(middle)
    for _ in range(HALVINGS):
        amount = (low + high) / 2
        moved = value + torch.where(inside, amount[:, None, None], 0.0)
        above = unbent(moved, slope).mean((0, 2, 3)) > factor * middle
        low, high = torch.where(above, low, amount), torch.where(above, amount, high)
    return value + torch.where(inside, ((low + high) / 2)[:, None, None], 0.0)


def _as_one(values: Tensor) -> Tensor:
    """Return values [B, C, H, W] as those of one image [1, C, B * H, W]."""
    return values.transpose(0, 1).flatten(1, 2)[None]


def lowered(value: Tensor, null: Tensor) -> Tensor:
    """Return values [B, C, H, W] less so much of an undetermined pattern [n, B, H, W], n <= 1, that their least is 0.

    A normalisation above a convolution of stride 2 removes a constant at the positions that only its middle tap reads.
    Outputs of a ReLU are 0 at some of them.
    """
    if not len(null):
        return value
    pattern = null[0] * null[0].sum().sign()
    inside = pattern > 0.5 * pattern.amax()
    least = (value.transpose(0, 1)[:, inside] / pattern[inside]).amin(1)
    return value - least[:, None, None] * torch.where(inside, pattern, 0.0)[:, None]
