"""The images of a recorded update of several images, from the layer that takes their pixels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.attacks.analytic import pixel_layers
from leakbench.attacks.disaggregation import disaggregate
from leakbench.audit.given import Update
from leakbench.audit.update_facts import UpdateFacts
from leakbench.core.rng import generator
from leakbench.engine.worker import png
from leakbench.gradients.low_rank import LowRank
from leakbench.observation import Observation

DISAGGREGATE = "disaggregate"
"""What pages call the way in which the images were derived."""

MIN_AGREEMENT = 0.9
"""The images count as recovered if this share of units is switched on where, and only where, there is an error."""


@dataclass(frozen=True)
class BatchFindings:
    """The images of a local training that follow from one layer in closed form.

    Attributes:
        layer: its name.
        images: [N, C, H, W], in no order; values in [0, 1] if they are right.
        found: how many of the N columns of errors were found.
        agreement: the least share of units, over all images, that is on where and only where there is an error.
    """

    layer: str
    images: Tensor
    found: int
    agreement: float

    @property
    def recovered(self) -> bool:
        """Whether the update itself shows that the images are right."""
        return self.found == len(self.images) and self.agreement >= MIN_AGREEMENT

    def pictures(self) -> tuple[bytes, ...]:
        """Return each image as a PNG."""
        return tuple(png(image) for image in self.images)


def batch_findings(observation: Observation, update: Update, shown: UpdateFacts) -> BatchFindings | None:
    """Return the images of an update that shows several; None if no layer leaks them.

    Args:
        observation: the update without weight decay, as an attacker sees it.
        update: the update as it was recorded.
        shown: what it shows by itself.
    """
    one = shown.shown
    if one is None or not one.pixels or one.rank < 2 or not one.conclusive:
        return None
    weight, bias = (f"{one.layer}.{part}" for part in ("weight", "bias"))
    if bias not in observation.gradient or not bool(torch.isfinite(observation.gradient[bias]).all()):
        return None
    rank = LowRank(one.rank, one.rank, 0.0, one.noise)
    change, offset = (observation.gradient[name][0].double() for name in (weight, bias))
    found = disaggregate(change, offset, rank, generator("audit", DISAGGREGATE))
    if found is None:
        return None
    before = [(update.before[weight].double(), update.before[bias].double())]
    if update.kind != "gradient":
        before.append((before[0][0] - update.change[weight].double(), before[0][1] - update.change[bias].double()))
    order, slope, shift = pixel_layers(observation)[one.layer]
    pixels = torch.empty_like(found.inputs)
    pixels[:, order] = (found.inputs - shift) / slope
    images = pixels.view(-1, *observation.image_shape).float()
    if not bool(torch.isfinite(images).all()):
        return None
    return BatchFindings(one.layer, images, found.found, found.agreement(*before))
