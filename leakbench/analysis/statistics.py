"""Intervals of means and shares over images, and paired tests on them; seeds of one image are one observation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Array = npt.NDArray[np.float64]
ImageIds = Sequence[int] | npt.NDArray[np.int64]

ALPHA = 0.05
"""A difference is statistically significant if its corrected p is at most this (and its interval leaves out 0)."""
ROUNDING = 1e-9
"""Scores that differ by at most this are the same: two versions of a library round differently."""


def bootstrap_interval(
    values: Sequence[float] | Array, images: ImageIds | None = None, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean: images are drawn anew, and in each of them its seeds.

    A resample draws as many images as there are, with replacement, and for every image drawn as many of its values as
    it has, with replacement. Its mean is over all values drawn.

    Args:
        values: [N] finite values.
        images: [N] the image of each value; None: every value has its own.
        seed: of the resampling, so that the same values always have the same interval.
        resamples: how often the images are drawn anew.

    Returns:
        (low, high); NaN if there are fewer than two images or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    groups = _groups(array, images)
    sizes = np.bincount(groups)
    if len(sizes) < 2 or not np.isfinite(array).all():
        return math.nan, math.nan
    centre = array.mean()
    weights = _weights(tuple(sizes.tolist()), seed, resamples)
    apart = array[np.argsort(groups, kind="stable")] - centre
    low, high = centre + np.percentile(weights @ apart / weights.sum(1), (2.5, 97.5))
    return float(low), float(high)


def _groups(values: Array, images: ImageIds | None) -> npt.NDArray[np.intp]:
    """Return [N], the number of each value's image, from 0 on without gaps."""
    return np.arange(len(values)) if images is None else np.unique(np.asarray(images), return_inverse=True)[1]


@lru_cache(maxsize=2)
def _weights(sizes: tuple[int, ...], seed: int, resamples: int) -> Array:
    """Return [resamples, N]: how often each value is drawn in each resample; image i has the next ``sizes[i]``."""
    rng = np.random.default_rng(seed)
    each = np.array(sizes)
    images = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), size=resamples)
    weights = np.repeat(images, each, axis=1).astype(np.float64)
    column = np.repeat(each, each)
    for size in np.unique(each[each > 1]):
        drawn = rng.multinomial(images[:, each == size] * size, np.full(size, 1 / size))
        weights[:, column == size] = drawn.reshape(resamples, -1)
    return weights


def wilson_interval(share: float, trials: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of independent trials (Wilson 1927, Probable inference, JASA 22).

    Args:
        share: in [0, 1]; of n trials it need not be a multiple of 1/n.
        trials: how many; for none the interval is [0, 1].
    """
    if trials == 0:
        return 0.0, 1.0
    z = float(stats.norm.ppf(0.975))
    extra = z * z / trials
    centre = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / trials + extra / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Difference:
    """A paired difference of two arms, on the same images and seeds.

    Attributes:
        images: how many images have both arms.
        mean: over all pairs, with ``low`` and ``high`` its 95 % interval (``bootstrap_interval``).
        median: over images, each by the mean of its seeds.
        p: of ``wilcoxon_test``.
    """

    images: int
    mean: float
    low: float
    high: float
    median: float
    p: float


def paired_difference(first: pd.Series, second: pd.Series) -> Difference:
    """Return the difference of two arms, first less second, over the (image, seed) pairs that have both.

    Args:
        first: values by (image, seed), NaN for a missing one; so is ``second``.
    """
    both = pd.concat([first, second], axis=1, keys=["first", "second"]).dropna()
    images = both.index.get_level_values("image").to_numpy()
    own, other = (both[arm].to_numpy(dtype=np.float64) for arm in ("first", "second"))
    array = np.zeros_like(own)
    np.subtract(own, other, out=array, where=~np.isclose(own, other, rtol=0, atol=ROUNDING))  # inf is close to inf
    if not len(array):
        return Difference(0, *[math.nan] * 5)
    means = _image_means(array, images)
    with np.errstate(invalid="ignore"):
        mean, median = float(array.mean()), float(np.median(means))
    return Difference(len(means), mean, *bootstrap_interval(array, images), median, wilcoxon_test(array, images))


def _image_means(values: Array, images: ImageIds | None) -> Array:
    """Return the mean of each image's values."""
    groups = _groups(values, images)
    with np.errstate(invalid="ignore"):
        means: Array = np.bincount(groups, weights=values) / np.bincount(groups)
    return means


def wilcoxon_test(values: Sequence[float] | Array, images: ImageIds | None = None) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test that images' mean differences lie symmetrically around 0.

    Exact up to 50 images without ties, and up to 13 with ties or zeros; the normal approximation beyond. Zeros keep
    their ranks (Pratt 1959). An infinite difference has the largest rank.

    Args:
        values: [N] differences.
        images: [N] the image of each; those of one image are averaged first. None: every value has its own.

    Returns:
        p in (0, 1]; NaN if there are fewer than two images or a mean is undefined.
    """
    means = _image_means(np.asarray(values, dtype=np.float64), images)
    if len(means) < 2 or np.isnan(means).any():
        return math.nan
    if not means.any():
        return 1.0
    return float(stats.wilcoxon(means, zero_method="pratt").pvalue)


def mcnemar_test(more: int, less: int) -> float:
    """Return the two-sided p of McNemar's exact test that changes one way are as likely as the other way; 1 of none."""
    return float(stats.binomtest(more, more + less).pvalue) if more + less else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for multiple tests (Holm 1979); NaN stays NaN and does not count."""
    order = sorted((p, index) for index, p in enumerate(values) if not math.isnan(p))
    corrected = list(values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected


def smallest_p(images: int, tests: int) -> float:
    """Return the smallest p that a paired test on this many images can have, after Holm's correction over all tests.

    If all n differences have one sign, the exact test of signed ranks has p = 2/2^n.
    """
    return min(1.0, tests * 2.0 ** (1 - images))
