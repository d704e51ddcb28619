"""Scores of a batch: which reconstruction is of which image, and the scores of the matched pairs.

An attack on a batch returns images in no order. One assignment, by the error that a fit of brightness and contrast
leaves, pairs them with the private images; every metric is computed on these pairs, and floors are matched likewise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GREY = 0.5
"""The grey level in place of an image that was not returned."""


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
    guess, real = (_centred(one.double().flatten(1)) for one in (images, truth))
    guess = guess / guess.abs().amax(1, keepdim=True).clamp(min=torch.finfo(guess.dtype).tiny)
    size = guess.norm(dim=1, keepdim=True)
    guess = torch.where(size > 0, guess / torch.where(size > 0, size, 1.0), 0.0)
    return ((real.square().sum(1) - (guess @ real.T).square()) / real.shape[1]).clamp(min=0)


def _centred(pixels: Tensor) -> Tensor:
    pixels = torch.where(torch.isfinite(pixels).all(1, keepdim=True), pixels, 0.0)
    return pixels - pixels.mean(1, keepdim=True)


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
