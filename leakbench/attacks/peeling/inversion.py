"""The image whose forward pass gives recovered values: a search, which the values determine, for the last layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Self

import torch
from torch import Tensor

from leakbench.attacks.peeling.descent import Feature
from leakbench.attacks.peeling.lock import SIZES, Lock, find_locks, with_contrast_of_law, with_levels
from leakbench.attacks.peeling.network import Network
from leakbench.gradients.convolution import weight_gradient
from leakbench.optim import Evaluation, Recordable, Solution, Unknowns, descend, lbfgs

SPREAD = 0.05
"""The standard deviation of the starting image about grey."""


@dataclass(frozen=True)
class Search:
    """A search by Adam for an image.

    Attributes:
        times: how many times the steps of a search it takes.
        size: the first step size, which falls to a hundredth.
        smooth: the weight of total variation at first, which falls to 0 linearly: without it the search ends in a wrong
            image.
    """

    times: int
    size: float
    smooth: float


SEARCHES, NEAR = (Search(1, 0.1, 2.0), Search(5, 0.3, 2.0)), 0.02
"""The searches that are made until one comes near, and the relative squared misfit that counts as near. Below
normalisations by the image's own statistics, an image has no scale, and small steps lead nowhere."""

POOLED_SEARCHES, POOLED_NEAR = (Search(10, 0.03, 0.1), Search(5, 0.3, 1.0)), 1e-3
"""The same if there is a max-pool on the way: which value is the maximum changes with the image, and larger steps end
with wrong ones, unless small ones do not come near at all. Small ones are for key-locks and for values up to a
factor: below normalisations by the image's own statistics they do not come near, and elsewhere ``FADING`` takes their
place."""

FADING, FADING_STEPS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01), 0.3
"""The weights of total variation, relative to the misfit of a grey image, with which L-BFGS in turn begins below a
max-pool, and how many iterations it makes with each, relative to the steps of a search: from a smooth image, in which
the maxima of large features are found, to one with all detail. Adam needs ten times as many evaluations."""

AGAIN, AGAIN_TRADE = Search(1, 0.03, 0.0), 0.3
"""The second search below a max-pool, from what the first one found, to move maxima that are at wrong places; and the
weight of total variation relative to the misfit in it."""

NOISY, MAX_SMOOTH = 4.0, 0.3
"""The weight of total variation in the end, in relative errors of the values, and the largest one."""

CLEAN = 3e-5
"""The relative error of values up to which it is 0: rounding to single precision is no noise."""

CONTRAST = 0.25
"""The standard deviation of an image's values by which total variation is measured if contrast is not determined."""

PIECE = 20
"""How many iterations of L-BFGS a call makes."""

PROGRESS, MAX_PIECES = 0.8, 25
"""L-BFGS ends when as many iterations as a search has steps leave more than this part of the misfit; and the most
times that many that it makes."""

EXACT = 1e-11
"""The relative squared misfit below which the search ends: rounding to single precision leaves 1e-12."""

CLOSE = 1e-6
"""The relative squared misfit to exact values above which the image counts as wrong, and is searched for anew."""

TRADES = (3.0, 1.0)
"""The weights of total variation relative to the misfit in that second search: the first one for Adam, on the logarithm
of the misfit, and both in turn for L-BFGS. Values of a trained network leave many images nearly as good as the true
one, which is smoother; as the misfit falls, so does the weight."""

LOST, ELSEWHERE = 3e-4, Search(15, 0.3, 6.0)
"""The relative squared misfit to exact values above which a search below normalisations by the image's own statistics
ended in a wrong image, and begins elsewhere; and that search, of another length and smoothness. The true image leaves
1e-11."""

NO_CHANGE = 1e-12
"""The change of the relative squared misfit that counts as none."""

HISTORY = 50
"""How many pairs of L-BFGS are kept."""


CERTAIN = 10.0
"""How many times its error an exact value must be to count as other than 0: rounding makes positive values of some that
are 0 behind a ReLU, and these would be searched for in front of it, where they may be far below 0."""

BELOW = 1 - 1e-6
"""The part of a ReLU's ceiling from which on a value is at it, and only bounds what is in front of the ReLU."""

FEATURES = 3
"""From how many recovered values, the lowest ones, the image is searched for."""

WORST = 8.0
"""How many times the least error of these the error of a value may be, unless it is rounding."""

MAX_ERROR = 0.1
"""The largest relative error of a value that is used, and the largest contradiction to the values below."""

UNCHECKED = 1e-3
"""The largest relative error of a value of a descent that no value below confirms."""


def chosen(features: Sequence[Feature]) -> list[Feature]:
    """Return the recovered values from which an image is searched for: the lowest ones that nothing contradicts.

    Args:
        features: the recovered values, the highest first.
    """
    good = [
        each
        for each in features
        if each.deviation < MAX_ERROR
        and (each.check < MAX_ERROR or (isnan(each.check) and (each.free or each.deviation < UNCHECKED)))
        and not each.balance > MAX_ERROR
    ]
    lowest = good[-FEATURES:]
    least = min((each.deviation for each in lowest), default=0.0)
    return [each for each in lowest if each.deviation <= max(WORST * least, CLEAN)]


@dataclass(frozen=True)
class Below:
    """The weight gradients of the convolutions below a recovered value through which all of the image goes.

    Attributes:
        place: of the value.
        error: the derivative of the loss by it [1, C, H, W].
        gradients: by the weight of the convolution at each place.
    """

    place: int
    error: Tensor
    gradients: Mapping[int, Tensor]

    def misfit(self, network: Network, values: Mapping[int, Tensor]) -> Tensor:
        """Return how far the weight gradients are from those that values of the steps give, squared and relative.

        Errors at the convolutions depend on the image only by the masks of ReLUs, which have no slope.
        """
        convolutions = [values[place] for place in self.gradients]
        errors = torch.autograd.grad((values[self.place] * self.error).sum(), convolutions, retain_graph=True)
        total = torch.zeros_like(self.error[0, 0, 0, 0])
        for (place, sent), error in zip(self.gradients.items(), errors):
            (source,), layer = network.steps[place].inputs, network.steps[place].layer
            assert layer is not None
            made = weight_gradient(values[source], error, layer.geometry, 1)[0]
            total = total + (made - sent).square().sum() / sent.square().sum()
        return total / len(self.gradients)


def find_below(network: Network, features: Sequence[Feature], sent: Mapping[str, Tensor]) -> Below | None:
    """Return the weight gradients below the lowest recovered value that cuts a network in two; None without any.

    Args:
        network: without normalisations by the image's own statistics below, as errors must not depend on values.
        features: recovered values, the highest first.
        sent: the trial's gradient, by name.
    """
    steps = network.steps
    for feature in reversed(features):
        way = network.below(feature.place)
        if feature.error is None or any(steps[each].kind == "normalisation" for each in way) or way & network.locked:
            continue
        above = [each for place in range(feature.place + 1, len(steps)) for each in steps[place].inputs]
        layers = {place: steps[place].layer for place in sorted(way)}
        gradients = {place: sent[layer.weight] for place, layer in layers.items() if layer and layer.weight in sent}
        known = {place: each for place, each in gradients.items() if bool(each.any())}
        if known and all(each >= feature.place for each in above):
            return Below(feature.place, feature.error, known)
    return None


@dataclass(frozen=True)
class Match(Recordable):
    """How far the values of images [1, B, C, H, W] on the way are from recovered ones, squared and relative.

    Attributes:
        network: of the images' floating type.
        features: what was recovered.
        smooth: the weight of total variation at first; it falls to ``last`` within ``anneal`` evaluations.
        anneal: see ``smooth``.
        last: the weight in the end, for values with noise.
        trade: if positive, the weight relative to the misfit, of which the logarithm counts.
        below: weight gradients that count as well.
        locks: on the way, by their places.
        exact: the recovered values have no noise: what is above them is computed from them, not from the image.
        present: the weight of total variation in an evaluation that is recorded, as ``prepare`` sets it on the device;
            None: it follows from the number of the evaluation.
    """

    network: Network
    features: Sequence[Feature]
    smooth: float = 0.0
    anneal: int = 1
    last: float = 0.0
    trade: float = 0.0
    below: Below | None = None
    locks: Mapping[int, Lock] = field(default_factory=dict)
    exact: bool = False
    present: Tensor | None = None

    def buffered(self) -> Self:
        """Return the objective with the weight of total variation on the device."""
        return replace(self, present=self.features[0].value.new_zeros(()))

    def prepare(self, evaluation: Evaluation) -> None:
        """Set the weight of total variation."""
        if self.present is not None:
            self.present.fill_(self._weight(evaluation))

    def _weight(self, evaluation: Evaluation) -> float:
        done = evaluation if isinstance(evaluation, int) else evaluation[0]
        return max(self.smooth * (1 - done / self.anneal), self.last)

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [1]."""
        image = unknowns["image"].flatten(0, 1)
        total = self.distance(unknowns)
        locked = bool(self.locks)
        if locked:  # the lock's scale undoes any contrast: the image's must not fall, nor leave [0, 1]
            total = total + (image - image.clamp(0, 1)).square().mean()
        weight = self._weight(evaluation) if self.present is None else self.present
        if self.present is None and not weight and not self.trade:
            return total
        rough = image.diff(dim=3).abs().mean() + image.diff(dim=2).abs().mean()
        if locked or (self.trade and self.own_statistics()):
            rough = rough * CONTRAST / image.std()
        return (total + EXACT).log() + self.trade * rough if self.trade else total + weight * rough

    def select(self, rows: Sequence[int]) -> Self:
        """Return itself: there is one trial."""
        return self

    def misfit(self, unknowns: Unknowns) -> float:
        """Return the misfit without total variation."""
        with torch.no_grad():
            return float(replace(self, below=None).distance(unknowns))

    def own_statistics(self) -> bool:
        """Return whether a normalisation by the image's own statistics is on the way, so that contrast is lost."""
        way = self.network.below(*(feature.place for feature in self.features))
        return any(self.network.steps[place].kind == "normalisation" for place in way)

    def distance(self, unknowns: Unknowns) -> Tensor:
        """Return the misfit [1], with that of the weight gradients that count."""
        steps, image = self.network.steps, unknowns["image"].flatten(0, 1)
        wanted = {feature.place: feature.value for feature in self.features}
        free = {feature.place for feature in self.features if feature.free}
        needed = self.network.below(*(feature.place for feature in self.features))
        values: dict[int, Tensor] = {}
        total = image.new_zeros(1)
        for place in sorted(needed):
            step = steps[place]
            inputs = [values[each] for each in step.inputs]
            if place in self.locks:
                values[place] = self.locks[place].output(self.network, inputs[0], unknowns)
            else:
                values[place] = image if step.kind == "image" else self.network.forward(place, inputs)
            if place not in wanted:
                continue
            target, reached = wanted[place], values[place]
            if place in free:
                seen = torch.isfinite(target)
                target, reached = torch.where(seen, target, 0.0), torch.where(seen, reached, 0.0)
                # one minus the squared cosine, without its rounding
                factor = (reached * target).sum() / reached.square().sum()
                total = total + (factor * reached - target).square().sum() / varied(wanted[place])
                continue
            # in front of a ReLU there is a slope where the value is wrongly 0, and 0 only bounds what is in front
            if step.kind == "relu" and step.slope == 0:
                reached = torch.where((target > 0) & (target < BELOW * step.ceiling), inputs[0], reached)
            elif step.kind == "max-pool" and steps[step.inputs[0]].kind == "relu" and steps[step.inputs[0]].slope == 0:
                gate = steps[step.inputs[0]]
                pooled = self.network.forward(place, [values[gate.inputs[0]]])
                reached = torch.where((target > 0) & (target < BELOW * gate.ceiling), pooled, reached)
            total = total + (reached - target).square().sum() / target.square().sum()
            if self.exact:
                values[place] = target
        return total if self.below is None else total + self.below.misfit(self.network, values)


def varied(target: Tensor) -> Tensor:
    """Return the sum of squared differences of values [B, C, H, W] from their channels' means, without those of NaN.

    Values of an activation that is never 0, such as a sigmoid, hardly differ: relative to their size, all images would
    be near. If there is no difference, as with one position, the sum of the squares.
    """
    seen = torch.isfinite(target)
    middle = target.nanmean((2, 3), keepdim=True)
    differing = torch.where(seen, target - middle, 0.0).square().sum()
    return torch.where(differing > 0, differing, torch.where(seen, target, 0.0).square().sum())


def certain(feature: Feature) -> Tensor:
    """Return recovered values with 0 for those that rounding does not tell from it; noisy or free ones as they are."""
    if feature.free or feature.deviation > CLEAN:
        return feature.value
    rounding = feature.deviation * feature.value.square().mean().sqrt()
    return torch.where(feature.value.abs() < CERTAIN * rounding, 0.0, feature.value)


def roughest(features: Sequence[Feature]) -> float:
    """Return the weight of total variation for values with noise: without, the search would fit the noise."""
    least = min(each.deviation for each in features)
    return min(NOISY * least, MAX_SMOOTH) if least > CLEAN else 0.0


def invert(
    network: Network,
    features: Sequence[Feature],
    noise: Tensor,
    steps: int,
    sent: Mapping[str, Tensor] | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Return the images [B, C, H, W] that give recovered values best, the misfit [1] and the number of evaluations.

    Args:
        network: of the floating type in which to search.
        features: recovered values, of which there is at least one.
        noise: [B, C, H, W] standard normal, from which the search starts about grey.
        steps: the unit in which searches are counted. The first one is by Adam, while total variation is annealed, or
            by L-BFGS below a max-pool (``FADING``). L-BFGS without it follows, until as many iterations bring nothing
            more. If the image is then wrong, another search keeps total variation; below normalisations by the image's
            own statistics, a longer one begins elsewhere.
        sent: the gradient of the one image, by name: in the former, the weight gradients of the first layers count.
        note: called with a line if a search cannot be recorded on a GPU.
    """
    way = network.below(*(each.place for each in features))
    pooled = any(network.steps[place].kind == "max-pool" for place in way)
    # elsewhere such values are rare, and images no nearer
    features = [replace(each, value=(certain(each) if pooled else each.value).to(noise)) for each in features]
    start = {"image": 0.5 + SPREAD * noise[None]}
    locks = find_locks(network, way & network.locked, start["image"][0])
    start |= {name: value for lock in locks.values() for name, value in lock.start(network).items()}
    last, unit, spent = roughest(features), 1.0, 0
    known = not locks and not any(each.free for each in features)  # with their contrast
    # below a max-pool, values that stand for themselves bring nothing: there is one
    exact = known and not pooled and last == 0
    match = Match(network, seen(network, features) if exact else features, last=last, locks=locks, exact=exact)
    if locks:
        start, spent = with_levels(match.distance, start, locks, note)
        unit = match.misfit(start)
    searches: Sequence[Search]
    searches, enough = (POOLED_SEARCHES, POOLED_NEAR) if pooled else (SEARCHES, NEAR)
    searches = searches[1:] if known and pooled else searches
    own_statistics = match.own_statistics()
    faded = known and pooled and not own_statistics
    near, least = start, torch.inf
    if faded:
        near, count = _by_fading(match, start, steps, note)
        spent += count
        least = match.misfit(near)
    for search in searches:
        if least < max(unit * enough, sum(2 * each.deviation**2 for each in features)):
            break
        found, count = _by_annealing(match, start, search, steps, note, unit)
        spent += count
        if (misfit := match.misfit(found)) < least:
            near, least = found, misfit
    best, count = _by_lbfgs(match, near, steps, note)
    spent += count
    if own_statistics and known:
        # no weight gradient counts; below a max-pool, another start is no better
        for again in (-noise, noise.flip(2, 3)) if exact else ():
            if match.misfit(best) < LOST:
                break
            found, count = _by_annealing(match, {"image": 0.5 + SPREAD * again[None]}, ELSEWHERE, steps, note)
            spent += count
            found, count = _by_lbfgs(match, found, steps, note)
            spent += count
            best = min(best, found, key=match.misfit)
    elif last == 0 and match.misfit(best) > CLOSE:
        below = find_below(network, features, sent or {})
        if below is not None:
            gradients = {place: each.to(noise) for place, each in below.gradients.items()}
            below = replace(below, error=below.error.to(noise), gradients=gradients)
        begin, search, weight = (best, AGAIN, AGAIN_TRADE) if faded else (start, searches[-1], TRADES[0])
        # errors go back through all values to the image
        whole = replace(match, features=features, exact=False) if below is not None else match
        traded = replace(whole, trade=weight, below=below)
        found, count = _by_adam(traded, begin, search.times * steps, search.size, note)
        spent += count
        for trade in TRADES:
            found, count = _by_lbfgs(match, found, steps, note, trade)
            spent += count
        best = min(best, found, key=match.misfit)
    images = with_contrast_of_law(network, best["image"][0], best, locks)
    if own_statistics and known:
        images = within(images)
    return images, torch.tensor([match.misfit(best)]).to(noise), spent


Note = Callable[[str], None] | None


def seen(network: Network, features: Sequence[Feature]) -> list[Feature]:
    """Return the recovered values that depend on the image in another way than through others of them."""
    places = {each.place for each in features}
    found = []
    for each in features:
        below, unseen = set[int](), list(network.steps[each.place].inputs)
        while unseen:
            at = unseen.pop()
            if at not in below and at not in places:
                below.add(at)
                unseen += network.steps[at].inputs
        if any(network.steps[at].kind == "image" for at in below):
            found.append(each)
    return found


def within(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] of unknown brightness and contrast, with as little of both changed as keeps [0, 1]."""
    low, high = images.amin(), images.amax()
    images = (images - low) / (high - low).clamp(min=1)
    return images + low.clamp(min=0).minimum((1 - images.amax()).clamp(min=0))


def _by_annealing(
    match: Match, start: Unknowns, search: Search, steps: int, note: Note, unit: float = 1.0
) -> tuple[Unknowns, int]:
    """Return what a search by Adam finds while total variation falls to 0, and the number of evaluations.

    Args:
        match: what to minimise.
        start: where.
        search: its length, step size and weight of total variation.
        steps: the unit of its length.
        note: see ``invert``.
        unit: of the misfit.
    """
    count = search.times * steps
    return _by_adam(replace(match, smooth=unit * search.smooth, anneal=count), start, count, search.size, note)


def _by_adam(match: Match, start: Unknowns, steps: int, size: float, note: Note) -> tuple[Unknowns, int]:
    """Return what Adam finds with a step size that falls to a hundredth, and the number of evaluations."""
    found = descend(
        match,
        start,
        steps=steps,
        lr={name: size * SIZES.get(name.partition(" ")[0], 1.0) for name in start},
        milestones=range(1, steps),
        decay=0.01 ** (1 / steps),
        note=note,
    )
    return found.unknowns, int(found.evaluations)


def _by_fading(match: Match, start: Unknowns, steps: int, note: Note) -> tuple[Unknowns, int]:
    """Return what L-BFGS finds while the weight of total variation falls, and the number of evaluations."""
    found, spent, grey = start, 0, match.misfit(start)
    for weight in FADING:
        faded = replace(match, last=max(match.last, weight * grey))
        piece = _piece(faded, found, round(FADING_STEPS * steps), note)
        found, spent = piece.unknowns, spent + int(piece.evaluations)
    return found, spent


def _piece(match: Match, start: Unknowns, steps: int, note: Note) -> Solution:
    """Return what at least ``steps`` iterations of L-BFGS find; fewer if they come to rounding."""
    return lbfgs(
        match,
        start,
        steps=max(1, -(-steps // PIECE)),
        max_iter=PIECE,
        history=HISTORY,
        tolerance_grad=0.0,
        tolerance_change=NO_CHANGE,
        line_search="strong-wolfe",
        stop_below=EXACT,
        stop_every=1,
        note=note,
    )


def _by_lbfgs(match: Match, start: Unknowns, steps: int, note: Note, trade: float = 0.0) -> tuple[Unknowns, int]:
    """Return what L-BFGS finds until as many iterations as steps bring nothing more, and the number of evaluations.

    Args:
        match: what to minimise.
        start: where.
        steps: iterations in a piece.
        note: see ``invert``.
        trade: if positive, total variation has this weight relative to the misfit at the beginning of a piece.
    """
    found, spent, before = start, 0, torch.inf
    for _ in range(MAX_PIECES):
        misfit = match.misfit(found)
        if misfit < EXACT or misfit > PROGRESS * before:
            break
        before = misfit
        piece = _piece(replace(match, last=max(match.last, trade * misfit)), found, steps, note)
        found, spent = piece.unknowns, spent + int(piece.evaluations)
    return found, spent
