"""Imprint: the images of a batch, from a layer whose rows measure one functional with different thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.attacks.base import Attack, register
from leakbench.attacks.crafted_rows import PixelRows, different, pixel_rows, proved, reconstruction, wanted
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.models.crafted import expected_alone
from leakbench.observation import Observation

PARALLEL = 0.98
"""The cosine from which on two rows measure the same functional; a server may have disguised them by noise."""

MIN_BINS = 2
"""A layer with fewer parallel rows is no imprint."""


@register("imprint")
@dataclass(frozen=True)
class ImprintAttacker(Attack):
    """Imprint: of a batch, each image that is alone in its bin, from the differences of neighbouring rows' gradients.

    The rows of the layer are sorted by their thresholds. Row r has the gradient sum_i e_i x_i over the images above its
    threshold; that of the next one lacks the images in between. If it is one image, the difference of the weights'
    gradients over that of the biases' is this image. An image is alone with probability (1 - 1/K)^(B-1) for K bins of
    equal mass. Which reconstructions are images of the batch, and not mixtures, is proved without a private image: an
    image must have at that layer the error that was observed, for one of the labels.
    """

    reference: ClassVar[str] = (
        "Fowl, Geiping, Czaja, Goldblum and Goldstein 2022, Robbing the Fed: Directly Obtaining Private Data in "
        "Federated Learning with Modified Models, ICLR, arXiv 2110.13057"
    )
    assumes: ClassVar[str] = "A malicious server (server=imprint) and one step on each batch."
    cost: ClassVar[str] = (
        "Up to a second or two; most of it is the proof, which takes a pass of every reconstruction, and one backwards "
        "for each class."
    )
    fails: ClassVar[str] = (
        "Images with as many in their bin; noise on the gradient above an image's error; several steps."
    )
    updates: ClassVar[bool] = True
    batches: ClassVar[bool] = True

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if no layer that takes the pixels is imprinted, or its gradient was not sent."""
        for rows in pixel_rows(observation):
            imprinted(rows)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the images of every trial, proved ones and those with the largest errors first; draws nothing."""
        read = []
        findings: dict[str, list[float]] = {"bins_hit": [], "expected_share": []}
        for t, rows in enumerate(pixel_rows(observation)):
            images, right, bins = read_imprint(observation, t, rows, observation.count)
            read.append((images, right))
            findings["bins_hit"].append(float(len(images)))
            findings["expected_share"].append(expected_alone(bins, wanted(observation, images)))
        return reconstruction(observation, read, findings)


def imprinted(rows: PixelRows) -> Tensor:
    """Return the indices of the rows that measure one functional, sorted by their thresholds from the lowest on.

    Raises:
        Unsupported: there are none.
    """
    norms = rows.weight.norm(dim=1)
    unit = rows.weight / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
    alike = unit @ unit.T >= PARALLEL
    group = alike[alike.sum(1).argmax()].nonzero()[:, 0]
    if len(group) < MIN_BINS:
        raise Unsupported(
            f"the rows of {rows.layer!r} do not measure one functional of the image; use a threat model with "
            "server=imprint"
        )
    return group[(-rows.bias[group] / norms[group]).argsort()]


def read_imprint(observation: Observation, t: int, rows: PixelRows, batch: int) -> tuple[Tensor, Tensor, int]:
    """Return one trial's reconstructions, proved ones first and then by the sizes of their errors.

    Returns:
        Different images [N, C, H, W] of the bins with an error; which are proved [N]; the number of bins.
    """
    order = imprinted(rows)
    change, errors = rows.change[order], rows.errors[order]
    sums = change - torch.cat([change[1:], torch.zeros_like(change[:1])])
    sizes = errors - torch.cat([errors[1:], torch.zeros_like(errors[:1])])
    live = sizes.abs() > rows.least
    sums, sizes, at = sums[live], sizes[live], order[live]
    images = rows.pixels(sums, sizes).view(-1, *observation.image_shape)
    right, _ = proved(observation, t, rows, images, at, sizes, batch)
    most = float(sizes.abs().max()) if len(sizes) else 0.0
    first, _ = different(images, torch.argsort(sizes.abs().cpu() + 2 * most * right, descending=True).tolist())
    return images[first], right[first], len(order)
