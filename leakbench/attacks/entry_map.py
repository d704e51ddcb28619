"""What moves the entries of a gradient and multiplies each by a factor: found by probing, and inverted.

A release that only permutes entries, within or across tensors, scales them, flips their signs, sends some as zero or
withholds some is a map from places to places with a factor each. It is found with gradients whose entries carry their
own index: the ratio of the outputs for g and for g (1 + digit / BASE) is one digit of the index of the entry that went
in, whatever the factor is. Other gradients, of several sizes, then verify the map.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakbench.core.types import Gradient

BASE = 64
"""Digits of an index are in this base; a ratio must be right to a quarter of 1 / BASE."""
MAX_ROUNDS = 48
"""Probes with new values for entries that were sent as zero, as all but the largest may be."""
MIN_KNOWN = 0.9
"""The share of entries whose place must be known after these probes, if the others are left out."""
SIZES = (1e-6, 1e-3, 1.0, 1e3)
"""The sizes of the gradients that verify a map: one that depends on the size is none."""
TOLERANCE = 1e-3
"""The relative error of an entry up to which a map is the release: a rounding to few bits is inverted too."""
SAME_FACTOR = 1e-6
"""Factors that differ by less, relative to their mean, are one factor."""

Send = Callable[[Gradient, int], Mapping[str, Tensor]]
"""(gradient, number) -> what is sent of it, per observed parameter; the number selects image, label and draws."""


@dataclass(frozen=True)
class EntryMap:
    """A release that moves entries and multiplies each by a factor; N entries go in, M come out.

    Attributes:
        source: [M] int64, the index of the entry that is sent at each place; -1 where it is not known.
        factor: [M] float64, what it is multiplied by.
        zeroes: some entries are sent as zero, so that a zero says nothing about the entry.
        shapes: the shapes of the tensors that go in; their entries are numbered through in this order.
    """

    source: Tensor
    factor: Tensor
    zeroes: bool
    shapes: Mapping[str, torch.Size]

    def inverse(self, sent: Mapping[str, Tensor]) -> Gradient:
        """Return the entries [*shape] that went in, NaN where they were not sent; a tensor without any is left out."""
        flat = torch.cat([value.flatten() for value in sent.values()])
        known = (self.source >= 0) & flat.isfinite()
        if self.zeroes:
            known &= flat != 0
        before = flat.new_full((sum(shape.numel() for shape in self.shapes.values()),), torch.nan)
        before[self.source[known]] = (flat[known].double() / self.factor[known]).to(flat.dtype)
        return {name: value for name, value in self._named(before).items() if not bool(value.isnan().all())}

    def identity(self, names: list[str]) -> bool:
        """Return whether everything that is sent, under these names, is sent as it is."""
        places = self._places()
        own = torch.cat([places[name] for name in names])
        return not self.zeroes and torch.equal(self.source, own) and bool((self.factor == 1).all())

    def _places(self) -> dict[str, Tensor]:
        """Return the index of each entry, [N of the tensor] by name."""
        count = sum(shape.numel() for shape in self.shapes.values())
        return {name: value.flatten() for name, value in self._named(torch.arange(count)).items()}

    def _named(self, flat: Tensor) -> Gradient:
        """Return all entries [N] as tensors by name."""
        parts = flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items())}


def find_map(send: Send, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> EntryMap | None:
    """Return the map that a release is, verified on gradients that it was not found with; None if it is no such map.

    Args:
        send: the release.
        shapes: those of the tensors that go in, by name.
        dtype: the type of their entries.
    """
    names = list(send(_probe(shapes, 0, 1.0, dtype), 0))
    sizes = [shapes[name].numel() for name in names]
    found = EntryMap(torch.full((sum(sizes),), -1), torch.ones(sum(sizes), dtype=torch.float64), False, shapes)
    for round_number in range(MAX_ROUNDS):
        more = _decode(send, shapes, dtype, round_number)
        if more is None or more.source.shape != found.source.shape:
            return None
        both = (found.source >= 0) & (more.source >= 0)
        if not torch.equal(found.source[both], more.source[both]):
            return None
        source = torch.where(more.source >= 0, more.source, found.source)
        factor = torch.where(found.source >= 0, found.factor, more.factor)
        found = replace(found, source=source, factor=factor, zeroes=found.zeroes or more.zeroes)
        if not more.zeroes or _completed(found, names):
            break
    found = _smoothed(found, sizes, names)
    return _verified(found, send, dtype)


def _decode(send: Send, shapes: Mapping[str, torch.Size], dtype: torch.dtype, number: int) -> EntryMap | None:
    """Return what one probe and its digits show of a map; None if the release sends no numbers."""
    count = sum(shape.numel() for shape in shapes.values())
    base = _probe(shapes, number, 1.0, dtype)
    flat = _flat(base)
    first = _flat(send(base, number))
    index, valid = torch.zeros(len(first), dtype=torch.int64), first.isfinite() & (first != 0)
    place = 1
    while place < count:
        digit = torch.arange(count).div(place, rounding_mode="floor") % BASE
        marked = _split((flat * (1 + digit.double() / BASE)).to(dtype), shapes)
        other = _flat(send(marked, number))
        if len(other) != len(first):
            return None
        read = (other / torch.where(valid, first, 1.0) - 1) * BASE
        valid &= read.isfinite() & ((read - read.round()).abs() < 0.25) & (read.round() >= 0) & (read.round() < BASE)
        index += place * torch.where(valid, read.round(), 0.0).long()
        place *= BASE
    valid &= index < count
    source = torch.where(valid, index, -1)
    factor = first / flat[index.clamp(max=count - 1)]
    return EntryMap(source, torch.where(valid, factor, 1.0), bool((first == 0).any()), shapes)


def _completed(found: EntryMap, names: list[str]) -> bool:
    """Return whether more probes show nothing new: all is known, or of each tensor that its entries stay in place."""
    own = torch.cat([found._places()[name] for name in names])
    known = found.source >= 0
    if bool(known.all()):
        return True
    sizes = [found.shapes[name].numel() for name in names]
    some = all(bool(part.any()) for part in known.split(sizes))
    return some and torch.equal(found.source[known], own[known])


def _smoothed(found: EntryMap, sizes: list[int], names: list[str]) -> EntryMap:
    """Return the map with one factor for each tensor that has one, and entries that no probe showed put in there."""
    places, rows = found._places(), []
    for source, factor, name in zip(found.source.split(sizes), found.factor.split(sizes), names):
        known = source >= 0
        if bool(known.any()):
            mean = factor[known].mean()
            if bool(((factor[known] - mean).abs() <= SAME_FACTOR * mean.abs()).all()):
                factor = torch.where(torch.ones_like(known), mean if bool((factor[known] != 1).any()) else 1.0, factor)
                if found.zeroes and torch.equal(source[known], places[name][known]):
                    source = places[name]
        rows.append((source, factor))
    return replace(found, source=torch.cat([row[0] for row in rows]), factor=torch.cat([row[1] for row in rows]))


def _verified(found: EntryMap, send: Send, dtype: torch.dtype) -> EntryMap | None:
    """Return a map that holds on gradients of several sizes, by other draws and on other images; None if it does not.

    Places whose source is not known must be sent as zero, or as no number; a few may not, if no probe showed them.
    """
    known = found.source >= 0
    if not bool(known.any()):
        return None
    unseen = found.zeroes and float(known.double().mean()) >= MIN_KNOWN
    for number, size in enumerate(SIZES, MAX_ROUNDS):
        gradient = _probe(found.shapes, number, size, dtype)
        sent = _flat(send(gradient, number))
        if len(sent) != len(known):
            return None
        expected = _flat(gradient)[found.source.clamp(min=0)] * found.factor
        zero = sent == 0
        right = torch.where(known, (sent - expected).abs() <= TOLERANCE * expected.abs(), ~sent.isfinite() | unseen)
        if not bool((right | zero).all()):
            return None
        found = replace(found, zeroes=found.zeroes or bool((zero & known & (expected != 0)).any()))
    return found


def _probe(shapes: Mapping[str, torch.Size], number: int, size: float, dtype: torch.dtype) -> Gradient:
    """Return random entries of either sign, whose sizes differ from tensor to tensor and from entry to entry."""
    rng = torch.Generator().manual_seed(1 + number)
    found = {}
    for name, shape in shapes.items():
        own = torch.randn((), generator=rng) + torch.randn(shape, generator=rng)
        sign = torch.randint(2, shape, generator=rng) * 2 - 1
        found[name] = (size * sign * own.exp()).to(dtype)
    return found


def _flat(gradient: Mapping[str, Tensor]) -> Tensor:
    """Return all entries as one tensor in float64."""
    return torch.cat([value.flatten().double() for value in gradient.values()])


def _split(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Gradient:
    """Return the entries of tensors of these shapes by name."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items())}
