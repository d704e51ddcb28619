"""The scale and shift of a key-lock on the way to recovered values, which are searched for with the image.

The output gamma z + beta of a lock is searched for as gamma (z - m) + c, with m the mean of z in a channel at the
starting image, so that c is the channel's level there. Levels come first: without gamma the image does not matter, and
behind a ReLU a level is not negative, so that no channel falls silent on the way. The levels of half of the channels
make most of what is above, and an image that is searched for before they are known compensates for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from leakbench.attacks.peeling.network import Network
from leakbench.optim import Evaluation, Unknowns, lbfgs

ITERATIONS = 160
"""How many iterations of L-BFGS the levels take at most."""

SIZES = {"scale": 0.1, "level": 0.03}
"""The step sizes of Adam for scales and levels, relative to that of the image."""

Distance = Callable[[Unknowns], Tensor]


@dataclass(frozen=True)
class Lock:
    """A key-lock on the way.

    Attributes:
        place: its place.
        middle: [C], the mean of each normalised channel at the starting image.
        rectified: whether only ReLUs take its output.
    """

    place: int
    middle: Tensor
    rectified: bool

    def name(self, part: str) -> str:
        """Return what its ``scale`` or ``level`` is called among the unknowns."""
        return f"{part} {self.place}"

    def output(self, network: Network, value: Tensor, unknowns: Unknowns) -> Tensor:
        """Return its output [B, C, H, W] for its input, with the scale and the level among the unknowns [1, C]."""
        scale, level = (unknowns[self.name(part)][0] for part in SIZES)
        return network.rescaled(self.place, value, scale, level - scale * self.middle)

    def start(self, network: Network) -> dict[str, Tensor]:
        """Return scale and level [1, C] at the mean of the law of its scale and shift."""
        means = (drawn.detach().mean().expand_as(drawn)[None].clone() for drawn in network.coefficients(self.place))
        return {self.name(part): mean for part, mean in zip(SIZES, means)}


def find_locks(network: Network, places: Collection[int], images: Tensor) -> dict[int, Lock]:
    """Return the locks at some places, for starting images [B, C, H, W]."""
    found = {}
    for place in sorted(places):
        (source,) = network.steps[place].inputs
        with torch.no_grad():
            scale = torch.ones_like(network.coefficients(place)[0])
            normalised = network.rescaled(place, network.output(source, images), scale, torch.zeros_like(scale))
        users = [network.steps[user] for user in network.steps[place].users]
        rectified = all(user.kind == "relu" and user.slope == 0 for user in users)
        found[place] = Lock(place, normalised.mean((0, 2, 3)), rectified)
    return found


@dataclass(frozen=True)
class Levels:
    """A distance as a function of the levels of locks alone, whose scales are 0.

    Attributes:
        distance: of all unknowns.
        rest: the other unknowns.
        locks: the locks.
    """

    distance: Distance
    rest: Unknowns
    locks: Mapping[int, Lock]

    def whole(self, levels: Unknowns) -> dict[str, Tensor]:
        """Return all unknowns with these levels."""
        own = {
            lock.name("level"): levels[lock.name("level")].abs() if lock.rectified else levels[lock.name("level")]
            for lock in self.locks.values()
        }
        return {**self.rest, **own}

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [1]."""
        scales = {lock.name("scale"): torch.zeros_like(lock.middle)[None] for lock in self.locks.values()}
        return self.distance({**self.whole(unknowns), **scales})

    def select(self, rows: object) -> Self:
        """Return itself: there is one trial."""
        return self


def with_levels(
    distance: Distance, start: Unknowns, locks: Mapping[int, Lock], note: Callable[[str], None] | None
) -> tuple[dict[str, Tensor], int]:
    """Return the start with the levels of least distance, and the number of evaluations."""
    levels = Levels(distance, start, locks)
    found = lbfgs(
        levels,
        {lock.name("level"): start[lock.name("level")] for lock in locks.values()},
        steps=-(-ITERATIONS // 20),
        max_iter=20,
        tolerance_grad=0.0,
        line_search="strong-wolfe",
        note=note,
    )
    return levels.whole(found.unknowns), int(found.evaluations)


def with_contrast_of_law(network: Network, images: Tensor, unknowns: Unknowns, locks: Mapping[int, Lock]) -> Tensor:
    """Return images [B, C, H, W] with the contrast about grey that makes the scale of a lock as large as its law does.

    A factor of the contrast, and one over it of the scale, give the same values.
    """
    for lock in locks.values():
        drawn = network.coefficients(lock.place)[0].detach().square().mean().sqrt()
        images = 0.5 + (images - 0.5) * unknowns[lock.name("scale")].square().mean().sqrt() / drawn
    return images
