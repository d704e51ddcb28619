"""The image below a max-pool, whose output and error are known: a search for it and for the routing of the maxima.

The first layers are a convolution, a normalisation, a ReLU and a max-pool, so that the pool's output y is the maximum
of z, which is nearly linear in the image, over each window. Which position that maximum is at is not
known. Three things limit it. At every position, z is at most the least y of the windows that hold it, and a maximum can
only be where that bound is y. If two windows have the same y, their maximum is at a position of both. And the error at
the pool's output, sent on to those positions, must give the weight gradient of the convolution.

The search is in two stages: Adam on the image, with soft routings by its z that harden slowly; then routings sampled
window by window (Gibbs sampling, by z and by what they do to the weight gradient), and L-BFGS on the image, in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.attacks.peeling.correlation import by_channel, windows
from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.standard import Standard, standardised
from leakbench.optim import Evaluation, Recordable, Unknowns, descend, lbfgs

EQUAL = 1e-5
"""Outputs of the pool that differ by less than this, relative to their root mean square, count as the same."""

SPREAD = 0.02
"""The standard deviation of the starting image about grey."""

STEP = 0.03
"""Adam's first step size, which falls to a hundredth."""

TIMES = 5
"""How many times the steps of a search for an image the first stage takes."""

SOFT = (1.0, 0.01)
"""The widths of the soft routing in the first stage, relative to the root mean square of y: the first, and the last."""

SMOOTH = 0.3
"""The weight of total variation in the first stage, times the width."""

BEGIN = 0.4
"""The share of the first stage after which the weight gradient counts."""

GRADIENT = 0.05
"""Its weight in the first stage."""

ROUNDS = 18
"""How often routings and image are improved in turn in the second stage."""

SAMPLED = (0.05, 0.005)
"""The widths of the second stage."""

SAMPLED_SMOOTH = 0.7
"""The weight of total variation in the second stage, times the width."""

SAMPLED_GRADIENT = (0.2, 0.5)
"""The weights of the weight gradient in the second stage: the first, and the last. Larger ones make it greedy."""

BOUND = 2.0
"""The weight of what z exceeds its upper bounds by."""

SWEEPS = 5
"""How often all routings are sampled in a round; the first ``BURN`` sweeps do not count."""

BURN = 2

ITERATIONS = 50
"""Of L-BFGS in each round."""

MAX_WINDOWS = 4096
"""The most windows of all images together; time grows with them."""

CONTRAST = 0.25
"""The standard deviation of an image's values by which total variation is measured if contrast is not determined."""


@dataclass(frozen=True)
class Stem:
    """The first layers of a network up to a max-pool.

    Attributes:
        network: its steps.
        places: of the convolution and of what is between it and the ReLU.
        pool: the place of the max-pool.
        layer: the convolution.
        before: the places of what scales the image before the convolution, such as an input normalisation.
    """

    network: Network
    places: tuple[int, ...]
    pool: int
    layer: Convolution
    before: tuple[int, ...] = ()

    @property
    def needs(self) -> set[str]:
        """The tensors whose gradients are used."""
        top = self.network.steps[self.places[-1]]
        own = {f"{top.name}.weight", f"{top.name}.bias"} if top.kind == "normalisation" else set()
        return {self.layer.weight} | own

    def inputs(self, images: Tensor) -> Tensor:
        """Return what the convolution takes of images [B, C, H, W]."""
        for place in self.before:
            images = self.network.forward(place, [images])
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Return z [O, B * h * w], the input of the ReLU by channel, for images [B, C, H, W]."""
        for place in (*self.before, *self.places):
            images = self.network.forward(place, [images])
        return by_channel(images)

    def gain(self, images: Tensor, known: Pooled) -> tuple[Tensor, Tensor]:
        """Return gain [O, 1] and offset [O, N], with which errors at the ReLU's input are sent on to the convolution's.

        Args:
            images: [B, C, H, W].
            known: of the windows.
        """
        steps = self.network.steps
        if steps[self.places[-1]].kind == "normalisation":
            module = self.network.module(self.places[-1])
            assert isinstance(module, nn.BatchNorm2d)
            z, spread = standardised(self.network.forward(self.places[0], [self.inputs(images)]), module.eps)
            standard = Standard(z, spread, module.weight, known.products)
            return standard.gain[0, :, :1, 0], by_channel(standard.offset(known.sums))
        error = images.new_ones((1, *steps[self.places[-1]].shape))
        for place in reversed(self.places[1:]):
            error = self.network.backward(place, steps[place].inputs[0], error)
        gain = error[0, :, :1, 0]
        return gain, gain.new_zeros(len(gain), known.bound.shape[1])


def find_stem(network: Network, pool: int) -> Stem | None:
    """Return the first layers of a network up to the max-pool at a place, if they are such as can be searched through.

    Args:
        network: its steps, in float64.
        pool: the place of a step.
    """
    steps = network.steps
    if steps[pool].kind != "max-pool":
        return None
    at = steps[pool].inputs[0]
    if steps[at].kind != "relu" or steps[at].slope or len(steps[at].users) != 1:
        return None
    (at,) = steps[at].inputs
    places = [at]
    own = steps[at].kind == "normalisation"
    while steps[at].kind == ("normalisation" if own else "scaling") and len(steps[at].users) == 1:
        (at,) = steps[at].inputs
        places.append(at)
        if own:
            break
    layer = steps[at].layer
    if layer is None or layer.geometry.groups > 1 or len(steps[at].users) != 1:
        return None
    (at,) = steps[at].inputs
    before: list[int] = []
    while steps[at].kind in ("affine", "scaling") and len(steps[at].inputs) == len(steps[at].users) == 1:
        before.insert(0, at)
        (at,) = steps[at].inputs
    if steps[at].kind != "image" or any(steps[each].shape != steps[at].shape for each in before):
        return None
    return Stem(network, tuple(reversed(places)), pool, layer, tuple(before))


@dataclass(frozen=True)
class Pooled:
    """What is known of the windows of a max-pool: Q windows and N positions of all images, O channels.

    Attributes:
        value: y [O, Q]; 0 where no position is positive.
        error: [O, Q], the error that each window sends on to its maximum.
        places: [K, Q], the positions of each window; N for none.
        bound: [O, N], the upper bounds of z.
        candidate: [K, O, Q], the positions that can be the maximum of an active window.
        gradient: [O, C * taps], the weight gradient of the convolution.
        sums: [O], the gradient by the shift of a normalisation by the images' own statistics; zeros if there is none.
        products: [O], the same by its scale.
    """

    value: Tensor
    error: Tensor
    places: Tensor
    bound: Tensor
    candidate: Tensor
    gradient: Tensor
    sums: Tensor
    products: Tensor

    @property
    def active(self) -> Tensor:
        """[O, Q], the windows with a positive value."""
        return self.value > 0

    @cached_property
    def size(self) -> Tensor:
        """The root mean square of the values of active windows."""
        return self.value[self.active].square().mean().sqrt()

    def gather(self, z: Tensor) -> Tensor:
        """Return [K, O, Q], the values of z [O, N] at the positions of each window; 0 for none."""
        return F.pad(z, (0, 1))[:, self.places].transpose(0, 1)

    def fit(self, z: Tensor, width: float | Tensor) -> Tensor:
        """Return [K, O, Q], how far z [O, N] is from y at the candidates, as the logarithm of a probability."""
        far = -((self.value - self.gather(z)) / (width * self.size)).square()
        return far.masked_fill(~self.candidate, -1e9)

    def routed(self, routing: Tensor) -> Tensor:
        """Return the errors [O, N] at the ReLU's input for routings [K, O, Q]."""
        sent = self.error.new_zeros(len(self.error), self.bound.shape[1] + 1)
        for place, share in zip(self.places, routing):
            sent.index_add_(1, place, share * self.error)
        return sent[:, :-1]

    def to(self, like: Tensor) -> Pooled:
        """Return the same on the device and of the type of a tensor."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(like) for name, value in own.items() if value.is_floating_point()}
        kept = {name: own[name].to(like.device) for name in ("places", "candidate")}
        return replace(self, **moved, **kept)


def pooled(stem: Stem, value: Tensor, error: Tensor, sent: Mapping[str, Tensor]) -> Pooled:
    """Return what is known of a max-pool's windows.

    Args:
        stem: the layers below.
        value: the pool's output [B, O, h, w], with exact zeros.
        error: there.
        sent: the gradient by name; that by the convolution's weight is needed, and those by scale and shift of a
            normalisation by the images' own statistics.
    """
    images, channels = value.shape[:2]
    height, width = stem.network.steps[stem.network.steps[stem.pool].inputs[0]].shape[1:]
    count = height * width
    ones = torch.eye(count, dtype=torch.float64).view(count, 1, height, width)
    member = (stem.network.forward(stem.pool, [ones]) > 0).flatten(1).T
    most = int(member.sum(1).max())
    own = torch.where(member, torch.arange(count), count).sort(1).values[:, :most].T
    total = images * count
    parts = [torch.where(own < count, own + image * count, total) for image in range(images)]
    places, y = torch.cat(parts, 1), by_channel(value)
    bound = y.new_full((channels, total + 1), torch.inf)
    for place in places:
        bound.scatter_reduce_(1, place.expand(channels, -1), y, "amin")
    bound[:, -1] = -torch.inf
    active = y > 0
    tolerance = EQUAL * y[active].square().mean().sqrt()
    possible = (bound[:, places].transpose(0, 1) >= y - tolerance) & active
    candidate = possible & _shared(member, own, y, tolerance, images)
    candidate = torch.where(candidate.any(0), candidate, possible)
    name = stem.network.steps[stem.places[-1]].name
    sums, products = (sent.get(f"{name}.{own}", y.new_zeros(channels)).double() for own in ("bias", "weight"))
    gradient = sent[stem.layer.weight].double().flatten(1)
    return Pooled(y, by_channel(error), places, bound[:, :-1], candidate, gradient, sums, products)


def _shared(member: Tensor, own: Tensor, y: Tensor, tolerance: Tensor, images: int) -> Tensor:
    """Return [K, O, Q], the positions that are in all overlapping windows of the same y.

    Args:
        member: [P, N], the positions of each window of one image.
        own: [K, P], the same as places.
        y: [O, B * P].
        tolerance: up to which values are the same.
        images: B.
    """
    overlap = (member.double() @ member.double().T > 0) & ~torch.eye(len(member), dtype=torch.bool)
    window, other = overlap.nonzero(as_tuple=True)
    outside = ~F.pad(member, (0, 1))[other[None].expand(len(own), -1), own[:, window]]
    found = []
    for values in y.chunk(images, 1):
        same = (values[:, window] - values[:, other]).abs() < tolerance
        contradictions = torch.zeros(len(own), *values.shape)
        contradictions.index_add_(2, window, (outside[:, None] & same).float())
        found.append(contradictions == 0)
    return torch.cat(found, 2)


@dataclass(frozen=True)
class PooledMatch(Recordable):
    """How far images [1, B, C, H, W] are from what is known of a max-pool's windows.

    Attributes:
        stem: the layers below, in the images' floating type.
        known: of the windows.
        steps: in which the routing hardens from the first width to the last.
        routing: [K, O, Q], fixed; None for soft ones by the image itself.
        smooth: the weight of total variation for a fixed routing.
        weight: of the weight gradient for a fixed routing.
        present: the width of soft routings and the weight of the weight gradient in an evaluation that is recorded, as
            ``prepare`` sets them on the device; None: they follow from the number of the evaluation.
    """

    stem: Stem
    known: Pooled
    steps: int = 1
    routing: Tensor | None = None
    smooth: float = 0.0
    weight: float = 0.0
    present: tuple[Tensor, Tensor] | None = None

    def buffered(self) -> Self:
        """Return the objective with the width and the weight on the device."""
        return replace(self, present=(self.known.value.new_ones(()), self.known.value.new_zeros(())))

    def prepare(self, evaluation: Evaluation) -> None:
        """Set the width and the weight."""
        for own, value in zip(self.present or (), self._annealed(evaluation)):
            own.fill_(value)

    def _annealed(self, evaluation: Evaluation) -> tuple[float, float]:
        """Return the width of soft routings, and the weight of the weight gradient beside them."""
        done = (evaluation if isinstance(evaluation, int) else evaluation[0]) / self.steps
        return _between(SOFT, done), GRADIENT if done > BEGIN else 0.0

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [1]."""
        images = unknowns["image"].flatten(0, 1)
        known, z = self.known, self.stem.forward(images)
        routing, power = self.routing, 4
        smooth: float | Tensor = self.smooth
        weight: float | Tensor = self.weight
        if routing is None:
            width, weight = self.present or self._annealed(evaluation)
            with torch.no_grad():
                routing = torch.softmax(known.fit(z, width), 0) * known.active
            power, smooth = 2, SMOOTH * width
        sure = routing.amax(0) ** power
        far = (sure * (routing * (known.value - known.gather(z)).square()).sum(0)).sum()
        above = (z - known.bound).relu().square().sum()
        total = (far + BOUND * above) / known.value.square().sum()
        if isinstance(weight, Tensor) or weight:
            total = total + weight * misfit_of_gradient(self.stem, known, images, routing)
        outside = ((images - 1).relu().square() + (-images).relu().square()).mean()
        rough = variation(images)
        if self.stem.network.steps[self.stem.places[-1]].kind == "normalisation":
            rough = rough * CONTRAST / images.std()  # which is not determined, and must not fall
        return (total + smooth * rough + outside)[None]

    def select(self, rows: Sequence[int]) -> Self:
        """Return itself: there is one trial."""
        return self


def misfit_of_gradient(stem: Stem, known: Pooled, images: Tensor, routing: Tensor) -> Tensor:
    """Return how far the weight gradient of the convolution is from that of images and routings, squared, relative."""
    gain, offset = stem.gain(images, known)
    left = (gain * known.routed(routing) + offset) @ windows(
        stem.inputs(images), stem.layer.geometry
    ).T - known.gradient
    return left.square().sum() / known.gradient.square().sum()


def variation(images: Tensor) -> Tensor:
    """Return the mean length of the colours' gradient in images [B, C, H, W]."""
    across, down = F.pad(images.diff(dim=3), (0, 1)), F.pad(images.diff(dim=2), (0, 0, 0, 1))
    return ((across.square() + down.square()).sum(1) + 1e-6).sqrt().mean()


def _between(ends: tuple[float, float], share: float) -> float:
    """Return the value at a share of the way from one end to the other, in equal ratios."""
    return ends[0] * (ends[1] / ends[0]) ** min(share, 1.0)


def sample(stem: Stem, known: Pooled, images: Tensor, width: float, rng: torch.Generator) -> Tensor:
    """Return the mean routings [K, O, Q] of some sweeps of Gibbs sampling, given images [B, C, H, W].

    A window's maximum is at a candidate with a probability by how near z is to y there, and by how near the weight
    gradient then is to the one that was sent, in units of what is left of it. Channels are independent of each other.
    The draws are made on the CPU, so that they are the same on every device.
    """
    matrix = windows(stem.inputs(images), stem.layer.geometry)
    fit = known.fit(stem.forward(images), width)
    soft = torch.softmax(fit, 0) * known.active
    chosen = soft.argmax(0)
    fixed = F.one_hot(chosen, len(soft)).permute(2, 0, 1).to(soft) * known.active
    gain, offset = stem.gain(images, known)
    errors = gain * known.error
    left = (gain * known.routed(fixed) + offset) @ matrix.T - known.gradient
    spread = float(left.square().mean().sqrt())
    open_ = (known.candidate.sum(0) > 1) & (soft.amax(0) < 0.9999)
    patches = F.pad(matrix, (0, 1))[:, known.places].permute(2, 1, 0).contiguous()  # [Q, K, C * taps]
    products = patches @ patches.mT
    logits, taken = fit.permute(2, 1, 0).contiguous(), torch.zeros_like(fit)
    order = open_.any(0).nonzero().flatten().tolist()
    rows = torch.arange(len(chosen), device=chosen.device)
    for sweep in range(SWEEPS):
        wide = spread * (1 if sweep >= BURN else 3 - 2 * sweep / BURN)
        waiting = [torch.empty(logits.shape[1:], dtype=logits.dtype).exponential_(generator=rng) for _ in order]
        moved = torch.stack(waiting).to(logits.device) if waiting else logits
        for at, draws in zip(order, moved):
            error, patch, now, product = errors[:, at, None], patches[at], chosen[:, at], products[at]
            seen, square = left @ patch.T, product.diagonal()
            change = 2 * error * (seen - seen[rows, now, None])
            change = change + error.square() * (square + square[now, None] - 2 * product[now])
            chance = torch.softmax(logits[at] - change / (2 * wide * wide), 1)
            new = torch.where(open_[:, at], (chance / draws).argmax(1), now)  # torch.multinomial
            left += error * (patch[new] - patch[now])
            chosen[:, at] = new
            if sweep >= BURN:
                taken[:, :, at] += chance.T
        if sweep + 1 >= BURN:
            spread = 0.5 * spread + 0.5 * float(left.square().mean().sqrt())
    return torch.where(open_, taken / (SWEEPS - BURN), fixed) * known.active


def restore_pooled(
    stem: Stem,
    known: Pooled,
    noise: Tensor,
    rng: torch.Generator,
    steps: int,
    note: Callable[[str], None] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Return images [B, C, H, W] below a max-pool, the misfit [1] of its output, and the number of evaluations.

    Args:
        stem: the layers up to the pool, in the floating type in which to search.
        known: of the pool's windows.
        noise: [B, C, H, W] standard normal, from which the search starts about grey.
        rng: of the sampling, on the CPU.
        steps: of a search for an image; the first stage takes ``TIMES`` as many.
        note: called with a line if a search cannot be recorded on a GPU.
    """
    known = known.to(noise)
    count = TIMES * steps
    found = descend(
        PooledMatch(stem, known, count),
        {"image": 0.5 + SPREAD * noise[None]},
        steps=count,
        lr={"image": STEP},
        milestones=range(1, count),
        decay=0.01 ** (1 / count),
        note=note,
    )
    image, spent = found.unknowns["image"], int(found.evaluations)
    for turn in range(ROUNDS):
        share = turn / (ROUNDS - 1)
        width = _between(SAMPLED, share)
        with torch.no_grad():
            routing = sample(stem, known, image[0], width, rng)
        weight = _between(SAMPLED_GRADIENT, share)
        found = lbfgs(
            PooledMatch(stem, known, 1, routing, SAMPLED_SMOOTH * width, weight),
            {"image": image},
            steps=1,
            max_iter=ITERATIONS,
            history=20,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search="strong-wolfe",
            note=note,
        )
        image, spent = found.unknowns["image"], spent + int(found.evaluations)
    with torch.no_grad():
        reached = known.gather(stem.forward(image[0])).amax(0).relu()
        misfit = (reached - known.value).square().sum() / known.value.square().sum()
    return image[0], misfit[None], spent
