"""The masks of ReLUs: which of them are open, from values, from sums of errors and from weight gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.peeling.correlation import Fitted, by_channel, by_image, least_squares, windows
from leakbench.attacks.peeling.knowledge import CLEAR, Knowledge
from leakbench.attacks.peeling.layers import Convolution

CERTAIN = 25.0
"""By how many standard deviations a value is positive whatever the error's own equations say."""

SHARP = 0.12
"""The standard deviation up to which the ratio of an error behind a ReLU to that in front of it decides the mask."""

MAX_CHANGED = 0.2
"""The share of a mask's entries above which a new decision is not believed."""

OUTLIER = 6.0
"""A channel whose sum is further off than this many times the median is left out when a factor is fitted."""

IMBALANCE = 1e-4
"""The part of a channel's root mean square error above which a wrong sum points to a wrong place of the mask."""

EXPLAINED = 0.02
"""The part of the wrong sum that may be left after a change of the mask at a doubtful place that explains it."""

SMALL = 0.01
"""The part of the root mean square up to which a value counts as near 0, whatever its deviation."""

EXACTLY = 1e-3
"""The part of the wrong sum that may be left after a change at a place whose value is near 0."""

MAX_DOUBTFUL = 12
"""Of how many places of a channel, those nearest to the threshold, every combination is tried if no single one explains
the wrong sum."""

NOT_OPEN = 2.0
"""A value below this many standard deviations is none of them."""

FEWEST = 8
"""How many negative values of a channel say how large its errors are."""

OUTLYING = 5.0
"""A channel is wrong if this many times as much is missing in its sum as in the median channel; an explanation must
leave at most one over this."""

SURE = 20.0
"""A combination must explain the wrong sum up to this many times what is left in the median channel."""

LEVELS = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 3000.0, 10000.0)
"""The thresholds that are tried for values that count as positive, in standard deviations (``fitting_mask``)."""


def fitting_mask(
    solution: Fitted, part: Tensor, rest: Tensor, sums: Tensor, slope: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mask [B, C, H, W] of a ReLU, and factors f [B] for which part * f + rest has these sums behind it.

    Values that are 0 are only seen as such up to their error, which need not be their deviation. Of masks with several
    thresholds, the one is taken whose sums fit best; then, in each channel, another one that fits much better there.

    Args:
        solution: the ReLU's output [B, C, H, W] with its deviations, up to a positive factor of each image.
        part: [B, C, H, W], the part of the error at its output that is in one over that factor.
        rest: [B, C, H, W], the other part.
        sums: [C], the sums of the error behind the ReLU, added over the images; NaN where they were not sent.
        slope: of the ReLU below 0.
    """
    masks = torch.stack([solution.value > level * solution.deviation for level in LEVELS])
    own, fixed = (torch.where(masks, each, slope * each).sum((3, 4)).mT for each in (part, rest))
    wanted = sums - fixed.sum(2)
    there = torch.isfinite(sums)
    # of each level, sums [C, B] without the factors, and what they should be [C]
    factors = torch.stack([_fit(*each) for each in zip(own[:, there], wanted[:, there])])
    misfits = (torch.einsum("lcb,lb->lc", own, factors) - wanted)[:, there].norm(dim=1)
    best = int(torch.where(torch.isnan(misfits), torch.inf, misfits).argmin())
    each = (own @ factors[best] - wanted).abs()
    least = each.argmin(0)
    level = torch.where(there & (each.amin(0) < 0.5 * each[best]), least, best)
    channels = torch.arange(len(sums))
    mask = masks[level, :, channels].transpose(0, 1)
    own, wanted = own[level, channels], wanted[level, channels]
    # a wrong place of the mask spoils the sum of its channel only
    misfit = (own @ _fit(own, wanted) - wanted).abs()
    good = there & (misfit <= OUTLIER * misfit.nanmedian())
    return mask, _fit(own[good], wanted[good])


def _fit(own: Tensor, wanted: Tensor) -> Tensor:
    """Return the factors [B] with which sums [C, B] come nearest to [C]."""
    if own.shape[1] == 1:
        return (own * wanted[:, None]).sum(0) / own.square().sum(0)
    return torch.linalg.lstsq(own, wanted[:, None]).solution[:, 0]


def balanced(mask: Tensor, values: Fitted, error: Tensor, sums: Tensor) -> Tensor:
    """Return a ReLU's mask [B, C, H, W], changed at one place of a channel, or at a few, if that explains its sum.

    Args:
        mask: as it was decided.
        values: the ReLU's output; a place may be wrong if it is near 0, and nearer if it explains the sum less exactly.
        error: at the ReLU's output.
        sums: [C], what the sums of the error behind the ReLU must be; NaN where they are not known.
    """
    value, deviation = by_channel(values.value), by_channel(values.deviation)
    rows, errors = by_channel(mask).clone(), by_channel(error)
    size = errors.square().mean(1).sqrt()
    missing = sums - (rows * errors).sum(1)
    usual = missing.abs().nanmedian()
    least_wrong = torch.maximum(IMBALANCE * size, OUTLYING * usual)
    for channel in (missing.abs() > least_wrong).nonzero().flatten().tolist():
        ratio, most = (value[channel] / deviation[channel]).nan_to_num(), _left(missing[channel], usual)
        changed = threshold(ratio, rows[channel], errors[channel], missing[channel], most)
        rows[channel, changed] = ~rows[channel, changed]
    missing = sums - (rows * errors).sum(1)
    off = (torch.where(rows, -1.0, 1.0) * errors - missing[:, None]).abs()
    doubtful = (value.abs() < CERTAIN * deviation) & (off < EXPLAINED * missing.abs()[:, None])
    small = value.abs() < SMALL * value.square().mean().sqrt()
    small &= off < EXACTLY * missing.abs()[:, None]
    off = torch.where(doubtful | small, off, torch.inf)
    least, at = off.min(1)
    wrong = (missing.abs() > least_wrong) & torch.isfinite(least)
    rows[wrong, at[wrong]] = ~rows[wrong, at[wrong]]
    missing = sums - (rows * errors).sum(1)
    for channel in (missing.abs() > least_wrong).nonzero().flatten().tolist():
        ratio, most = (value[channel] / deviation[channel]).nan_to_num(), _left(missing[channel], usual)
        changed = combination(ratio, torch.where(rows[channel], -1.0, 1.0) * errors[channel], missing[channel], most)
        rows[channel, changed] = ~rows[channel, changed]
    return by_image(rows, mask)


def _left(missing: Tensor, usual: Tensor) -> Tensor:
    """Return what an explanation may leave of what is missing in a channel's sum."""
    return torch.minimum(SURE * usual, missing.abs() / OUTLYING)


def threshold(ratio: Tensor, mask: Tensor, error: Tensor, missing: Tensor, most: Tensor) -> Tensor:
    """Return the places whose change, with another threshold in this channel, explains what is missing; else none.

    Args:
        ratio: [N], the values in standard deviations.
        mask: [N], of the ReLU.
        error: [N], at its output.
        missing: in the sum of the error where the mask is open.
        most: that may be left of it.
    """
    near = ((ratio > NOT_OPEN) & (ratio < CERTAIN)).nonzero().flatten()
    order = near[ratio[near].argsort()]
    # with the first n of these closed and the others open
    change = (error[order] * ~mask[order]).sum() - F.pad(error[order].cumsum(0), (1, 0))
    off = (change - missing).abs()
    best = int(off.argmin())
    if not float(off[best]) < float(most):
        return near[:0]
    wanted = torch.arange(len(order)) >= best
    return order[wanted != mask[order]]


def combination(ratio: Tensor, change: Tensor, missing: Tensor, most: Tensor) -> Tensor:
    """Return the places whose change explains what is missing in a channel's sum, as few as possible; else none.

    Args:
        ratio: [N], the values in standard deviations; only places near the threshold may change.
        change: [N], what a change of the mask there adds to the sum.
        missing: in the sum.
        most: that may be left of it.
    """
    near = ((ratio > NOT_OPEN) & (ratio < CERTAIN)).nonzero().flatten()
    near = near[(ratio[near] / CLEAR).log().abs().argsort()[:MAX_DOUBTFUL]]
    subsets = (torch.arange(2 ** len(near))[:, None] >> torch.arange(len(near))) & 1
    off = (subsets.to(change) @ change[near] - missing).abs()
    count = torch.where(off < most, subsets.sum(1), len(near) + 1)
    best = int(count.argmin())
    return near[subsets[best].bool()] if int(count[best]) <= len(near) else near[:0]


def decide(known: Knowledge, place: int) -> None:
    """Decide the mask of a ReLU from its recovered output."""
    step = known.network.steps[place]
    if step.slope == 0:
        known.values[place] = calibrated(known.values[place])
    value = known.values[place]
    if step.slope == 0 and known.noisy:
        mask = log_odds(value) > 0
    else:
        mask = value.value > (0 if step.slope else CLEAR * value.deviation)
    known.masks[place] = mask & ~known.full(place)
    rebalance(known, place)


def log_odds(found: Fitted) -> Tensor:
    """Return log p(open) / p(closed) of a ReLU by its noisy output x [B, C, H, W], of standard deviation s.

    Open is as likely as closed before, and an open one's output half-normal of the layer's scale S:
    2 N(x; 0, S^2 + s^2) Phi(x S / (s sqrt(S^2 + s^2))) against N(x; 0, s^2). (A channel's own scale would be that of
    the noise where none is open.)
    """
    scale = (2 * found.value.clamp(min=0).square().mean()).sqrt().clamp(min=1e-300)
    own = found.deviation.square().clamp(min=1e-300)
    both = scale.square() + own
    likely = torch.special.log_ndtr(found.value * scale / (own * both).sqrt())
    return math.log(2) + 0.5 * ((own / both).log() + found.value.square() * (1 / own - 1 / both)) + likely


def calibrated(found: Fitted) -> Fitted:
    """Return a ReLU's output with deviations as large as its negative values, which are zeros, show them to be."""
    value, deviation = by_channel(found.value), by_channel(found.deviation)
    below = value < 0
    square = torch.where(below, value / deviation, 0.0).square().sum(1) / below.sum(1).clamp(min=1)
    wider = torch.where(below.sum(1) >= FEWEST, square.sqrt(), 1.0).clamp(min=1)
    return Fitted(found.value, found.deviation * wider[:, None, None])


def rebalance(known: Knowledge, place: int) -> None:
    """Change the mask of a ReLU at doubtful places that explain a wrong sum of the error behind it."""
    value, step, mask = known.values[place], known.network.steps[place], known.masks[place]
    known.forget(place)
    error, sums = known.error(place), known.sent.get(known.network.shift(place) or "")
    if error is not None and sums is not None:
        rest = sums - step.slope * error.sum((0, 2, 3))
        known.masks[place] = balanced(mask, value, (1 - step.slope) * error, rest)


def correct(known: Knowledge, place: int, layer: Convolution, at: int) -> bool:
    """Decide the mask above a convolution again from its weight gradient; return whether it changed.

    With the convolution's input known, each row of its weight gradient gives the error at its output. Divided by
    the error that an open ReLU would give, that is 1 where the ReLU is open and its slope below 0 where not.
    """
    found = known.gate(at)
    if found is None or found[0] not in known.masks:
        return False
    gate, gain, offset = found
    above = known.error(gate)
    assert above is not None
    value = known.values[place]
    if known.rectified(place):
        inputs = torch.where(value.value > CLEAR * value.deviation, value.value, 0.0)
    else:
        inputs = value.value
    matrix = windows(inputs, layer.geometry)
    live = matrix.norm(dim=0)
    live = live > 1e-3 * live.median()
    solved = least_squares(matrix[:, live], known.sent[layer.weight].flatten(1).T)
    if solved is None:
        return False
    full, fixed = (by_channel(each.expand_as(above))[:, live] for each in (gain * above, offset))
    ratio, spread = (solved.value.T - fixed) / full, solved.deviation.T / full.abs()
    mask, own = by_channel(known.masks[gate]), known.values.get(gate)
    slope, new = known.network.steps[gate].slope, mask.clone()
    sure = spread < SHARP
    if slope == 0 and known.noisy:
        odds = (ratio - 0.5) / spread.square()
        new[:, live] = (odds if own is None else odds + by_channel(log_odds(own))[:, live]) > 0
    else:
        new[:, live] = torch.where(sure, ratio > (1 + slope) / 2, mask[:, live])
    if own is not None:
        new |= by_channel((own.value > CERTAIN * own.deviation) & ~known.full(gate))
    new = no_worse(known, gate, mask, new)
    count = int((new != mask).sum())
    if count == 0 or count > MAX_CHANGED * mask.numel():
        return False
    known.masks[gate] = by_image(new, known.masks[gate])
    known.forget(gate)
    return True


def no_worse(known: Knowledge, gate: int, old: Tensor, new: Tensor) -> Tensor:
    """Return a ReLU's new mask [C, B * P], but the old one in channels whose sum of the error it would make worse."""
    error, sums = known.error(gate), known.sent.get(known.network.shift(gate) or "")
    if error is None or sums is None:
        return new
    slope, rows = known.network.steps[gate].slope, by_channel(error)
    before, after = ((torch.where(mask, rows, slope * rows).sum(1) - sums).abs() for mask in (old, new))
    worse = after > torch.maximum(before, 3 * before.nanmedian())
    return torch.where(worse[:, None], old, new)
