"""What is known of one trial of a ReLU network: values, masks and errors of its steps, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from leakbench.attacks.peeling.correlation import Fitted, by_image, design
from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.standard import Standard

CLEAR = 5.0
"""By how many standard deviations a value must exceed 0 to count as positive."""

AT_CEILING = 1e-6
"""The least relative distance from a ReLU's ceiling of a value that counts as below it."""


@dataclass(frozen=True)
class Reader:
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


class Knowledge:
    """The knowledge of one trial's values, masks and errors [B, ...], which grows from the top downwards.

    Args:
        network: the trial's, in float64.
        sent: the trial's gradient in float64, by name; NaN in entries that were not sent.
        images: how many images were trained on at a time (B).
        spreads: the standard deviation of an entry's error in tensors of which it is known, by name.
        noisy: whether the gradient has more noise than rounding. Only then do deviations tell the odds of a mask.
    """

    def __init__(
        self,
        network: Network,
        sent: Mapping[str, Tensor],
        images: int = 1,
        spreads: Mapping[str, float] | None = None,
        noisy: bool = False,
    ) -> None:
        self.network, self.sent, self.images = network, sent, images
        self.spreads, self.noisy = spreads or {}, noisy
        self.values: dict[int, Fitted] = {}
        self.missing: dict[int, str] = {}  # why a step's output is not among the values
        self.followed: set[int] = set()  # the places of values that the forward pass gave
        self.masks: dict[int, Tensor] = {}
        self.standards: dict[int, Standard] = {}
        self.pinned: dict[int, Tensor] = {}
        self.errors: dict[int, Tensor | None] = {}

    def pin(self, place: int, error: Tensor) -> int:
        """State the error [B, O, h, w] at a step's output, and at the steps above as far as it determines theirs.

        Returns:
            The highest of these steps.
        """
        steps = self.network.steps
        self.pinned[place] = error
        while len(steps[place].users) == 1:
            (above,) = steps[place].users
            link = self.link(above, place)
            if link is None or not bool(link[0].all()):
                break
            place, error = above, (error - link[1]) / link[0]
            self.pinned[place] = error
        self.errors = {}
        return place

    def complete(self, name: str | None) -> bool:
        """Return whether all of a tensor's gradient was sent."""
        return name in self.sent and bool(torch.isfinite(self.sent[name or ""]).all())

    def error(self, place: int) -> Tensor | None:
        """Return the error [B, ...] at a step's output; None if it does not follow from what is known."""
        for at in self._unseen(place):
            users = self.network.steps[at].users
            parts = [self._below(user, at) for user in users]
            known = [part for part in parts if part is not None]
            self.errors[at] = sum(known[1:], known[0]) if parts and len(known) == len(parts) else None
        return self.pinned[place] if place in self.pinned else self.errors[place]

    def _unseen(self, place: int) -> list[int]:
        """Return a step and those above whose error was not asked for yet, the highest first, so that none recurses."""
        found: set[int] = set()
        waiting = [place]
        while waiting:
            at = waiting.pop()
            if at not in found and at not in self.pinned and at not in self.errors:
                found.add(at)
                waiting += self.network.steps[at].users
        return sorted(found, reverse=True)

    def clean(self, place: int) -> Tensor:
        """Return the values [B, C, H, W] of a step, with zeros where a ReLU of slope 0 gave them."""
        found = self.values[place]
        if place in self.masks and self.network.steps[place].slope == 0:
            return self._capped(place, torch.where(self.masks[place], found.value, 0.0))
        if self.network.steps[place].kind == "max-pool" and self.rectified(place):
            return self._capped(place, torch.where(found.value > CLEAR * found.deviation, found.value, 0.0))
        return found.value

    def _capped(self, place: int, value: Tensor) -> Tensor:
        """Return values with a ReLU's ceiling where it gave them."""
        ceiling = self.network.ceiling(place)
        return value if math.isinf(ceiling) else torch.where(self.full(place), ceiling, value)

    def full(self, place: int, margin: float = 0.0) -> Tensor:
        """Return where a step's recovered output is at the ceiling of its ReLU, up to errors and a relative margin.

        Its derivative is 0 there, as where it is 0.
        """
        found, ceiling = self.values[place], self.network.ceiling(place)
        return found.value >= ceiling * (1 - max(margin, AT_CEILING)) - CLEAR * found.deviation

    def rectified(self, place: int) -> bool:
        """Return whether a step's output is that of a ReLU with slope 0, or the maxima of one's."""
        step = self.network.steps[place]
        if step.kind == "max-pool":
            return self.rectified(step.inputs[0])
        return step.kind == "relu" and step.slope == 0

    def predict(self, place: int) -> Tensor | None:
        """Return the output [B, ...] of a step as it follows from the recovered values below; None if it does not."""
        step = self.network.steps[place]
        if step.kind not in ("convolution", "scaling", "normalisation", "affine"):
            return None
        inputs = []
        for each in step.inputs:
            value = self.clean(each) if each in self.values else self.predict(each)
            if value is None:
                return None
            inputs.append(value)
        return self.network.forward(place, inputs)

    def balance(self, place: int) -> float:
        """Return how far the sums of the error below a ReLU are from the gradient of the shift there, relative to it.

        That is beyond what noise of a known size explains. NaN if no shift is there, or its gradient was not sent.
        """
        step = self.network.steps[place]
        if step.kind != "relu" or place not in self.masks:
            return float("nan")
        (below,) = step.inputs
        name = self.network.shift(place) or ""
        sent, error = self.sent.get(name), self._below(place, below)
        if sent is None or error is None:
            return float("nan")
        there = torch.isfinite(sent)
        far = (error.sum((0, 2, 3)) - sent)[there].square().sum() - int(there.sum()) * self.spreads.get(name, 0.0) ** 2
        return float(far.clamp(min=0).sqrt() / sent[there].norm())

    def link(self, user: int, place: int) -> tuple[Tensor, Tensor] | None:
        """Return gain and offset [1 or B, ...] if the error here is gain * error + offset of its user's."""
        steps = self.network.steps
        if user in self.standards:
            sums = self.sent.get(steps[user].shift or "")
            standard = self.standards[user]
            return None if sums is None else (standard.gain, standard.offset(sums))
        gain = self.network.factor(user, place)
        return None if gain is None else (gain, torch.zeros_like(gain))

    def gate(self, place: int) -> tuple[int, Tensor, Tensor] | None:
        """Return the ReLU to which a convolution's output leads, and gain and offset of the error there (``link``)."""
        steps, gain = self.network.steps, torch.ones((1, 1, 1, 1), dtype=torch.float64)
        offset = torch.zeros_like(gain)
        while len(steps[place].users) == 1:
            (above,) = steps[place].users
            if steps[above].kind == "relu":
                return above, gain, offset
            link = self.link(above, place)
            if link is None:
                return None
            place, gain, offset = above, gain * link[0], offset + gain * link[1]
        return None

    def readers(self, place: int) -> list[Reader]:
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
            if user not in self.pinned and steps[above].kind == "normalisation":
                names = (f"{steps[above].name}.weight", layer.weight)
                if all(map(self.complete, names)) and self.error(above) is not None:
                    found.append(Reader(user, layer, above))
            elif self.error(user) is not None:
                found.append(Reader(user, layer, None))
        return found

    def equations(self, readers: Sequence[Reader]) -> tuple[Tensor, Tensor]:
        """Return the equations [R, B * J] of the convolutions for each channel of their input, and gradients [R, C].

        Equations of several convolutions are divided by the noise of their gradients, relative to the least one.
        """
        errors = [self.error(each.place) for each in readers]
        matrices = [design(error, each.layer.geometry) for each, error in zip(readers, errors) if error is not None]
        right = [each.rows(self.sent).flatten(0, 1) for each in readers]
        spreads = [self.spreads.get(each.layer.weight, 0.0) for each in readers]
        if min(spreads) > 0:
            weights = [min(spreads) / each for each in spreads]
            matrices, right = ([weight * own for weight, own in zip(weights, each)] for each in (matrices, right))
        return torch.cat(matrices), torch.cat(right)

    def shaped(self, place: int, found: Fitted) -> Fitted:
        """Return a solution [B * J, C] in the shape [B, C, H, W] of a step's output."""
        like = found.value.new_empty(self.images, *self.network.steps[place].shape)
        return Fitted(*(by_image(each.T, like) for each in (found.value, found.deviation)))

    def forget(self, place: int) -> None:
        """Forget the errors of the steps below a place, at which something has changed."""
        self.errors = {at: error for at, error in self.errors.items() if at >= place}

    def _below(self, user: int, place: int) -> Tensor | None:
        """Return the part of the error at a step's output that comes through one of its users."""
        error, kind = self.error(user), self.network.steps[user].kind
        if error is None:
            return None
        if kind == "relu":
            mask = self.masks.get(user)
            return None if mask is None else torch.where(mask, error, self.network.steps[user].slope * error)
        if kind == "normalisation":
            return self.standards[user].backward(error) if user in self.standards else None
        if kind in ("convolution", "linear", "scaling", "affine"):
            return self.network.backward(user, place, error)
        return None
