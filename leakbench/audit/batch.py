"""The images of a recorded update of several images, from the layer that takes their pixels."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakbench.attacks.analytic import pixel_layers
from leakbench.attacks.disaggregation import disaggregate
from leakbench.audit.given import Update
from leakbench.audit.update_facts import UpdateFacts
from leakbench.core.rng import generator, seeded
from leakbench.engine.worker import png
from leakbench.errors import BadOption
from leakbench.gradients.counts import label_counts, label_counts_of_update
from leakbench.gradients.low_rank import LowRank
from leakbench.gradients.plain import without_checkpointing
from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM
from leakbench.metrics.members import MemberScores, matched
from leakbench.models.surgery import linears
from leakbench.observation import Observation

DISAGGREGATE = "disaggregate"
"""What pages call the way in which the images were derived."""

MIN_AGREEMENT = 0.97
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

    def compared(self, truth: Tensor) -> "ComparedBatch":
        """Return the images in the order of the private ones, with their scores.

        Args:
            truth: [B, C, H, W] in [0, 1], all private images of the client.

        Raises:
            BadOption: there are fewer private images than the update shows.
        """
        if len(truth) < len(self.images):
            raise BadOption(
                f"--truth has {len(truth)} images, and the update shows at least {len(self.images)}; give a folder of "
                "all images that the client trained on"
            )
        pairs = matched(self.images.to(truth), truth)
        small = min(truth.shape[-2:]) < AlignedSSIM.smallest
        ssim = torch.full((len(truth),), math.nan) if small else AlignedSSIM()(pairs, truth)
        return ComparedBatch(pairs, truth, MemberScores(ssim, True), MemberScores(AlignedPSNR()(pairs, truth), True))


@dataclass(frozen=True)
class ComparedBatch:
    """The images of a local training beside the private ones.

    Attributes:
        images: [B, C, H, W], those that are assigned to the private images; grey where there is none.
        truth: [B, C, H, W], the private images.
        ssim: ``ssim_aligned`` of each; NaN if images are too small for it.
        psnr: ``psnr_aligned`` of each.
    """

    images: Tensor
    truth: Tensor
    ssim: MemberScores
    psnr: MemberScores


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


PUBLIC_IMAGES = 32
"""The number of images of noise whose probabilities serve if the images themselves are not known."""

LEAST_COUNT = -0.75
"""A count below this contradicts the stated learning rate and steps."""


def estimated_counts(
    network: nn.Module, observation: Observation, update: Update, shown: UpdateFacts, batch: BatchFindings | None
) -> tuple[int, ...]:
    """Return how often each class occurs among the images of an update, by an estimate; empty if there is none.

    The probabilities are those of the recovered images, or of noise, at the weights before and after the training.

    Args:
        network: the network, with the weights before.
        observation: the update without weight decay, as an attacker sees it.
        update: the update as it was recorded.
        shown: what it shows by itself.
        batch: the images, if they follow from it.
    """
    one, last = shown.shown, next(reversed(list(linears(network))), "")
    bias = observation.gradient.get(f"{last}.bias")
    if one is None or shown.one_image is not False or shown.images is None or not one.conclusive:
        return ()
    if bias is None or not shown.zero_sum or bias.shape[1] != observation.num_classes:
        return ()
    known = batch is not None and batch.recovered
    with seeded("audit", "labels"):
        coarse = torch.rand(PUBLIC_IMAGES, observation.image_shape[0], 3, 3)
        noise = nn.functional.interpolate(coarse, observation.image_shape[1:])
        images = batch.images if batch is not None and known else noise
        try:
            public = _probabilities(network, images.to(observation.dtype), update)
        except Exception:  # whatever the user's network raises on a batch
            return ()
    change, count, unit = bias[0].double(), shown.images, observation.threat.unit
    if unit is not None and float((count * (public - change / unit)).min()) >= LEAST_COUNT:
        return tuple(label_counts(change / unit, public, count).tolist())
    found = label_counts_of_update(change, public, count) if unit is None else None
    return () if found is None else tuple(found.tolist())


def _probabilities(network: nn.Module, images: Tensor, update: Update) -> Tensor:
    """Return the mean probabilities [K] of images, the mean of those before and after an update of weights."""
    probe = copy.deepcopy(network)
    with torch.no_grad(), without_checkpointing():
        found = torch.softmax(probe(images).double(), 1).mean(0)
        if update.kind == "gradient":
            return found
        for name, change in update.change.items():
            probe.get_parameter(name).sub_(change.nan_to_num(0.0, 0.0, 0.0))
        return (found + torch.softmax(probe(images).double(), 1).mean(0)) / 2
