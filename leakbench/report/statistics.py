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
