"""Intervals of a mean over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def bootstrap_interval(
    values: Sequence[float] | Array,
    images: Sequence[int] | npt.NDArray[np.int64] | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean, resampling images with all their seeds.

    Args:
        values: [N] finite values.
        images: [N] the image of each value; values of one image are drawn together. None: every value has its own.
        seed: of the resampling, so that the same values always have the same interval.
        resamples: how often the images are drawn anew.

    Returns:
        (low, high); NaN where there are fewer than two images or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    groups = np.arange(len(array)) if images is None else np.unique(np.asarray(images), return_inverse=True)[1]
    count = np.bincount(groups).astype(np.float64)
    if len(count) < 2 or not np.isfinite(array).all():
        return math.nan, math.nan
    centre = array.mean()
    total = np.bincount(groups, weights=array - centre)
    draws = _draws(len(count), seed, resamples)
    low, high = centre + np.percentile((draws @ total) / (draws @ count), (2.5, 97.5))
    return float(low), float(high)


@lru_cache(maxsize=4)
def _draws(images: int, seed: int, resamples: int) -> Array:
    """Return [resamples, images]: how often each image is drawn in each resample."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)


def sign_flip_test(
    values: Sequence[float] | Array,
    images: Sequence[int] | npt.NDArray[np.int64] | None = None,
    seed: int = 0,
    resamples: int = 20_000,
) -> float:
    """Return the two-sided p of a paired permutation test that the mean difference is 0.

    Under that hypothesis an image's mean difference is as likely as its opposite. All signs are tried up to 14 images
    (the smallest p is then 2/2^n), and so many random ones beyond.

    Args:
        values: [N] finite differences.
        images: [N] the image of each; those of one image are averaged first. None: every value has its own.
        seed: of the random signs, so that the same values always have the same p.
        resamples: how many random signs.

    Returns:
        p in (0, 1]; NaN where there are fewer than two images or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    groups = np.arange(len(array)) if images is None else np.unique(np.asarray(images), return_inverse=True)[1]
    count = np.bincount(groups)
    if len(count) < 2 or not np.isfinite(array).all():
        return math.nan
    means = np.bincount(groups, weights=array) / count
    observed = abs(means.sum())
    if len(means) <= 14:
        signs = 1.0 - 2.0 * ((np.arange(2 ** len(means))[:, None] >> np.arange(len(means))) & 1)
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(means)))
        extra = 1  # the observed signs are one of those that could have been drawn
    slack = 1e-12 * np.abs(means).sum()  # sums in another order differ in their last digits
    as_extreme = int((np.abs(signs @ means) >= observed - slack).sum())
    return (as_extreme + extra) / (len(signs) + extra)


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for being so many (Holm 1979); NaN stays NaN and does not count."""
    order = sorted((p, index) for index, p in enumerate(values) if not math.isnan(p))
    corrected = list(values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected
