"""Trap weights: the images of a batch, from the rows of a layer that are active for one of them only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.attacks.base import Attack, register
from leakbench.attacks.crafted_rows import PixelRows, different, pixel_rows, proved, reconstruction
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.observation import Observation

INSIDE = 0.02
"""Pixels of a reconstruction may lie this far outside of [0, 1]."""


@register("trap")
@dataclass(frozen=True)
class TrapAttacker(Attack):
    """Trap weights: each row's gradient of the weight over that of the bias, where one image of the batch is active.

    A row that is active for several images shows a mixture of them. Images come first that are proved, without a
    private image: at most of the rows that show it, an image has the error that was observed, for one of the labels.
    Those that several rows show come next. No crafted weights are needed, but the rows of an ordinary layer are active
    for half of the images.
    """

    reference: ClassVar[str] = (
        "Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov and Papernot 2023, When the Curious Abandon Honesty: "
        "Federated Learning Is Not Private, IEEE EuroS&P, arXiv 2112.02918"
    )
    assumes: ClassVar[str] = "A linear layer that takes every pixel before a ReLU, crafted (server=trap); one step."
    cost: ClassVar[str] = (
        "Up to a second or two; most of it is the proof, which takes a pass of every reconstruction, and one backwards "
        "for each class."
    )
    fails: ClassVar[str] = (
        "Images for which no row is active alone: most of them in large batches; noise; several steps."
    )
    updates: ClassVar[bool] = True
    batches: ClassVar[bool] = True

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if no layer takes the pixels, or its gradient was not sent."""
        pixel_rows(observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the images of every trial, proved ones first; nothing is drawn from rng."""
        read, active = [], []
        for t, rows in enumerate(pixel_rows(observation)):
            read.append(read_traps(observation, t, rows, observation.count))
            active.append(float((rows.errors.abs() > rows.least).sum()))
        return reconstruction(observation, read, {"rows_active": active})


def read_traps(observation: Observation, t: int, rows: PixelRows, batch: int) -> tuple[Tensor, Tensor]:
    """Return one trial's different reconstructions [N, C, H, W], proved ones first, and which are proved [N]."""
    at = (rows.errors.abs() > rows.least).nonzero()[:, 0]
    if not len(at):
        return rows.change.new_zeros(0, *observation.image_shape), torch.zeros(0, dtype=torch.bool)
    pixels = rows.pixels(rows.change[at], rows.errors[at])
    inside = ((pixels > -INSIDE) & (pixels < 1 + INSIDE)).all(1)
    at, pixels = at[inside], pixels[inside]
    images = pixels.view(-1, *observation.image_shape)
    right, _ = proved(observation, t, rows, images, at, rows.errors[at], batch)
    _, alike = different(images, ())
    right = (alike & right).sum(1) * 2 > alike.sum(1)
    chosen, _ = different(images, torch.argsort(right * 2.0 * len(at) + alike.sum(1), descending=True).tolist())
    return images[chosen], right[chosen]
