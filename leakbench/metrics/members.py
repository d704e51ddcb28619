"""Scores of a batch: which reconstruction is of which image, and the scores of the matched pairs.

An attack on a batch returns images in no order. One assignment, by the error that a fit of brightness and contrast
leaves, pairs them with the private images; every metric is computed on these pairs, and floors are matched likewise.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.metrics.aligned import AlignedSSIM, centred, nearness
from leakbench.metrics.base import Metric, register

RECOVERED = 0.6
"""The ``ssim_aligned`` from which on an image counts in ``recovered_share``: the usual threshold."""

MAX_DECOYS = 1000
"""The most public images among which a reconstruction must identify its own."""

CHUNK_PIXELS = 2**22
"""How many values of decoys are compared at once."""

GREY = 0.5
"""The grey level in place of an image that was not returned."""


@dataclass(frozen=True)
class ScoredBatches:
    """The batches of T clients after the assignment.

    Attributes:
        images: [T, B, C, H, W], the reconstructions in the order of the private images; grey where none is left.
        truth: [T, B, C, H, W] in [0, 1].
        inferred: [T, M] int64, the labels that the attack inferred or was given, in any order; None if it names none.
        labels: [T, B] int64, the true ones.
        decoys: [P, C, H, W] in [0, 1], public images of the same kind, none of which is private
            (``Dataset.unattacked``).
        values: the members' values [T, B] of each metric by name.
    """

    images: Tensor
    truth: Tensor
    inferred: Tensor | None
    labels: Tensor
    decoys: Tensor
    values: Mapping[str, Tensor]


class BatchMetric(Metric):
    """A measure of a whole batch; only runs with clients of several images have it.

    Attributes:
        usual: whether every such run has it; otherwise only one that names it (``--metric NAME``).
    """

    higher_is_better: ClassVar[bool] = True
    default: ClassVar[bool] = False
    usual: ClassVar[bool] = True

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: one image is no batch."""
        return torch.full((len(truth),), torch.nan, dtype=torch.float64, device=truth.device)

    @abstractmethod
    def of_batches(self, scored: ScoredBatches) -> Tensor:
        """Return [T] float64, NaN for none."""


@dataclass(frozen=True)
class MemberScores:
    """The values of one metric for the images of a batch.

    Attributes:
        values: [B], those of the matched pairs.
        higher_is_better: whether a higher value means more leakage.
    """

    values: Tensor
    higher_is_better: bool

    @property
    def mean(self) -> float:
        """The mean of all images."""
        return float(self.values.mean())

    @property
    def best(self) -> float:
        """The value of the image that leaks most; to be read beside a floor's, which matching lifts, too."""
        return float(self.values.max() if self.higher_is_better else self.values.min())

    @property
    def worst(self) -> float:
        """The value of the image that leaks least."""
        return float(self.values.min() if self.higher_is_better else self.values.max())

    def share(self, threshold: float) -> float:
        """Return the share of images whose value is at the threshold or better: with ``ssim_aligned``, recovered."""
        reached = self.values >= threshold if self.higher_is_better else self.values <= threshold
        return float(reached.double().mean())


def aligned_errors(images: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of each reconstruction to each image after the best brightness and contrast.

    It is var(t) (1 - rho^2), with rho the correlation of the pixels, and var(t) for a constant or non-finite image.

    Args:
        images: [M, C, H, W], of any range.
        truth: [B, C, H, W].

    Returns:
        [M, B] float64.
    """
    guess, real = (centred(one.double().flatten(1)) for one in (images, truth))
    guess = guess / guess.abs().amax(1, keepdim=True).clamp(min=torch.finfo(guess.dtype).tiny)
    size = guess.norm(dim=1, keepdim=True)
    guess = torch.where(size > 0, guess / torch.where(size > 0, size, 1.0), 0.0)
    return ((real.square().sum(1) - (guess @ real.T).square()) / real.shape[1]).clamp(min=0)


def assign(images: Tensor, truth: Tensor) -> Tensor:
    """Return for each image the reconstruction that is assigned to it, with the least sum of ``aligned_errors``.

    Args:
        images: [M, C, H, W] reconstructions, M <= B: of more, the truth would select the best.
        truth: [B, C, H, W] in [0, 1].

    Returns:
        [B] int64; -1 where none is left.

    Raises:
        ValueError: there are more reconstructions than images, or they have other shapes.
    """
    if images.shape[1:] != truth.shape[1:] or len(images) > len(truth):
        raise ValueError(
            f"reconstructions of shape {list(images.shape)} cannot be assigned to images of shape {list(truth.shape)}; "
            "give at most as many, of the same size"
        )
    from scipy.optimize import linear_sum_assignment  # takes half a second

    rows, columns = linear_sum_assignment(aligned_errors(images, truth).cpu().numpy())
    found = torch.full((len(truth),), -1, dtype=torch.int64, device=truth.device)
    found[torch.as_tensor(columns, device=truth.device)] = torch.as_tensor(rows, device=truth.device)
    return found


def matched(images: Tensor, truth: Tensor) -> Tensor:
    """Return the reconstructions [B, C, H, W] in the order of the images; grey where none is left (see ``assign``)."""
    places = assign(images, truth)
    grey = torch.full_like(truth, GREY, dtype=images.dtype)
    return torch.where((places >= 0)[:, None, None, None], images[places.clamp(min=0)], grey) if len(images) else grey


def count_overlap(found: Tensor, true: Tensor) -> Tensor:
    """Return the share of a batch's labels that are right, whatever their order.

    Args:
        found: [..., K], how often each label was inferred.
        true: [..., K], how often it occurs; of the same sum, above 0.

    Returns:
        [...] float64 in [0, 1].
    """
    return torch.minimum(found, true).double().sum(-1) / true.double().sum(-1)


@register("label_counts")
@dataclass(frozen=True)
class LabelCounts(BatchMetric):
    """The share of a batch's labels that were inferred, whatever their order."""

    convention: ClassVar[str] = "0 to 1: 1 - sum |n' - n| / (2 B) over the counts; none if the attack names no labels"
    reference: ClassVar[str] = "definition"

    def of_batches(self, scored: ScoredBatches) -> Tensor:
        """Return the overlap of the counts."""
        if scored.inferred is None:
            return self(scored.images, scored.truth)
        classes = 1 + int(torch.cat([scored.inferred, scored.labels], 1).max())
        found, true = (torch.nn.functional.one_hot(own, classes).sum(1) for own in (scored.inferred, scored.labels))
        return count_overlap(found, true)


@register("recovered_share")
@dataclass(frozen=True)
class RecoveredShare(BatchMetric):
    """The share of a batch's images whose reconstruction has an aligned SSIM of 0.6 or more."""

    convention: ClassVar[str] = f"0 to 1, ssim_aligned of at least {RECOVERED:g}; to be read beside the floors'"
    reference: ClassVar[str] = "definition"

    def of_batches(self, scored: ScoredBatches) -> Tensor:
        """Return the share."""
        values = scored.values.get(AlignedSSIM.name)
        none = self(scored.images, scored.truth)
        if values is None:
            return none
        shares = (values >= RECOVERED).double().mean(1)
        return torch.where(values.isnan().any(1), none.to(shares), shares)


@register("identified")
@dataclass(frozen=True)
class Identified(BatchMetric):
    """The share of images whose reconstruction correlates most with its own, of the batch and public decoys.

    Decoys are images of the dataset's other split or other public ones (``Dataset.unattacked``).
    """

    version: ClassVar[int] = 2
    convention: ClassVar[str] = (
        f"0 to 1; nearest by squared correlation, of the batch and up to {MAX_DECOYS:,} public images, such as "
        "those of the other split"
    )
    reference: ClassVar[str] = "definition"

    def of_batches(self, scored: ScoredBatches) -> Tensor:
        """Return the share."""
        guess = centred(scored.images.flatten(0, 1).double().flatten(1))
        others = guess.new_zeros(len(guess))
        known, several = scored.decoys[:MAX_DECOYS], max(1, CHUNK_PIXELS // guess.shape[1])
        for start in range(0, len(known), several):
            decoys = known[start : start + several].to(scored.truth)
            others = torch.maximum(others, nearness(guess, decoys).amax(1))
        guess, others = (one.unflatten(0, scored.truth.shape[:2]) for one in (guess, others))
        return torch.stack([_identified(*batch) for batch in zip(guess, others, scored.truth)])


def _identified(guess: Tensor, others: Tensor, truth: Tensor) -> Tensor:
    within = nearness(guess, truth)
    own = within.argmax(1) == torch.arange(len(truth), device=within.device)
    return (own & (within.diagonal() >= others) & guess.any(1)).double().mean()
