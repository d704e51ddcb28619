"""Intervals of means and shares over images, and paired tests on them, by groups of images that are alike.

The independent observations are the groups (``Dataset.group``): crops of one photograph are one group, seeds of one
image too. In a dataset without groups, every image is its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Array = npt.NDArray[np.float64]
Ids = Sequence[int] | npt.NDArray[np.int64]
"""The image, or the group of images, of each value: [N]."""

ALPHA = 0.05
"""A difference is statistically significant if its corrected p is at most this (and its interval leaves out 0)."""
MAX_TIED = 13
"""The most groups of which the signed-rank test tries every sign; with more, it does so only without ties and zeros."""
ROUNDING = 1e-9
"""Scores that differ by at most this are the same: two versions of a library round differently."""


def bootstrap_interval(
    values: Sequence[float] | Array,
    images: Ids | None = None,
    groups: Ids | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean.

    A resample draws as many images as there are, with replacement, and for every image drawn as many of its values as
    it has, with replacement. If groups hold several images, it draws whole groups instead (the cluster bootstrap). Its
    mean is over all values drawn.

    Args:
        values: [N] finite values.
        images: [N] the image of each value; None: every value has its own.
        groups: [N] the group of each value; None: every image is its own.
        seed: of the resampling, so that the same values always have the same interval.
        resamples: how often it is drawn anew.

    Returns:
        (low, high); NaN if there are fewer than two images (or groups) or a value is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    within = groups is None or not clustered(images, groups)
    units = _numbered(array, images if within else groups)
    sizes = np.bincount(units)
    if len(sizes) < 2 or not np.isfinite(array).all():
        return math.nan, math.nan
    centre = array.mean()
    weights = _weights(tuple(sizes.tolist()), seed, resamples, within)
    apart = array[np.argsort(units, kind="stable")] - centre
    low, high = centre + np.percentile(weights @ apart / weights.sum(1), (2.5, 97.5))
    return float(low), float(high)


def clustered(images: Ids | None, groups: Ids) -> bool:
    """Return whether any group holds several images; ``images`` [N] and ``groups`` [N] are those of N values."""
    several = len(groups) if images is None else len(np.unique(np.asarray(images)))
    return len(np.unique(np.asarray(groups))) < several


def _numbered(values: Array, units: Ids | None) -> npt.NDArray[np.intp]:
    """Return [N], the number of each value's unit (image or group), from 0 on without gaps."""
    return np.arange(len(values)) if units is None else np.unique(np.asarray(units), return_inverse=True)[1]


@lru_cache(maxsize=2)
def _weights(sizes: tuple[int, ...], seed: int, resamples: int, within: bool) -> Array:
    """Return [resamples, N]: how often each value is drawn in each resample; unit i has the next ``sizes[i]``.

    The values of a unit that is drawn are drawn anew too, if ``within``; else each is drawn as often as the unit.
    """
    rng = np.random.default_rng(seed)
    each = np.array(sizes)
    units = rng.multinomial(len(each), np.full(len(each), 1 / len(each)), size=resamples)
    weights = np.repeat(units, each, axis=1).astype(np.float64)
    column = np.repeat(each, each)
    for size in np.unique(each[each > 1]) if within else ():
        drawn = rng.multinomial(units[:, each == size] * size, np.full(size, 1 / size))
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


def effective_groups(sizes: Sequence[int]) -> float:
    """Return how many independent observations groups of these sizes are worth if images of one group are the same.

    (sum of sizes)^2 / sum of squared sizes (Kish 1965, Survey Sampling): the number of groups if all are of one size,
    and fewer if a few groups hold most of the images.
    """
    each = np.asarray(sizes, dtype=np.float64)
    return float(each.sum() ** 2 / np.square(each).sum()) if len(each) else 0.0


def share_interval(values: Sequence[float] | Array, groups: Ids | None = None) -> tuple[float, float]:
    """Return the 95 % interval of the mean of images' values in [0, 1], such as the share of images recovered.

    It is Wilson's interval over images. If groups hold several images, it is the union of Wilson's interval over the
    groups and of the cluster bootstrap: few groups make the bootstrap too narrow, and if all of them agree it has no
    width; Wilson's does not know that groups differ in size.

    Args:
        values: [N] one value of each image.
        groups: [N] the group of each image; None: every image is its own.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return math.nan, math.nan
    share = float(array.mean())
    if groups is None or not clustered(None, groups):
        return wilson_interval(share, len(array))
    low, high = wilson_interval(share, len(np.unique(np.asarray(groups))))
    ends = bootstrap_interval(array, groups=groups)
    return float(np.fmin(low, ends[0])), float(np.fmax(high, ends[1]))


@dataclass(frozen=True)
class Difference:
    """A paired difference of two arms, on the same images and seeds.

    Attributes:
        images: how many images have both arms.
        groups: how many groups they are in.
        mean: over all pairs, with ``low`` and ``high`` its 95 % interval (``bootstrap_interval``).
        median: over images, each by the mean of its seeds.
        p: of ``wilcoxon_test``, by group.
    """

    images: int
    groups: int
    mean: float
    low: float
    high: float
    median: float
    p: float


UNIT = ["group", "image", "seed"]
"""The index of values that are compared in pairs: columns of the results."""


def paired_difference(first: pd.Series, second: pd.Series) -> Difference:
    """Return the difference of two arms, first less second, over the (image, seed) pairs that have both.

    Args:
        first: values by ``UNIT``, NaN for a missing one; so is ``second``.
    """
    both = pd.concat([first, second], axis=1, keys=["first", "second"]).dropna()
    images, groups = (both.index.get_level_values(level).to_numpy() for level in ("image", "group"))
    own, other = (both[arm].to_numpy(dtype=np.float64) for arm in ("first", "second"))
    array = np.zeros_like(own)
    np.subtract(own, other, out=array, where=~np.isclose(own, other, rtol=0, atol=ROUNDING))  # inf is close to inf
    if not len(array):
        return Difference(0, 0, *[math.nan] * 5)
    means = unit_means(array, images)
    with np.errstate(invalid="ignore"):
        mean, median = float(array.mean()), float(np.median(means))
    low, high = bootstrap_interval(array, images, groups)
    return Difference(len(means), len(np.unique(groups)), mean, low, high, median, wilcoxon_test(array, groups))


def unit_means(values: Array, units: Ids | None) -> Array:
    """Return the mean of the values of each unit (image or group), in the order of the units."""
    numbers = _numbered(values, units)
    with np.errstate(invalid="ignore"):
        means: Array = np.bincount(numbers, weights=values) / np.bincount(numbers)
    return means


def wilcoxon_test(values: Sequence[float] | Array, groups: Ids | None = None) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test that groups' mean differences lie symmetrically around 0.

    Exact up to 50 groups without ties, and up to 13 with ties or zeros; the normal approximation beyond. Zeros keep
    their ranks (Pratt 1959). An infinite difference has the largest rank.

    Args:
        values: [N] differences.
        groups: [N] the group of each (or the image); those of one group are averaged first. None: every value has its
            own.

    Returns:
        p in (0, 1]; NaN if there are fewer than two groups or a mean is undefined.
    """
    means = unit_means(np.asarray(values, dtype=np.float64), groups)
    if len(means) < 2 or np.isnan(means).any():
        return math.nan
    if len(means) <= MAX_TIED:
        ranks = 2 * stats.rankdata(np.abs(means))  # twice, so that the rank of a tie is a whole number
        return sign_flip_test((np.sign(means) * ranks).astype(np.int64))
    return 1.0 if not means.any() else float(stats.wilcoxon(means, zero_method="pratt").pvalue)


def sign_flip_test(changes: Sequence[int] | npt.NDArray[np.int64], groups: Ids | None = None) -> float:
    """Return the two-sided p of the exact sign-flip test that changes one way are as likely as the other way.

    The changes of a group have their signs flipped together; p is the share of all 2^G flips whose sum is at least as
    far from 0. With a group of its own for each change this is McNemar's exact test.

    Args:
        changes: [N] -1, 0 or 1 (any integer).
        groups: [N] the group of each; None: every change is its own.
    """
    array = np.asarray(changes, dtype=np.int64)
    sums = np.bincount(_numbered(array.astype(np.float64), groups), weights=array).astype(int) if len(array) else array
    chances, reach = np.ones(1), 0  # of each sum from -reach to reach
    for size in (abs(int(one)) for one in sums if one):
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[2 * size :] += chances / 2
        chances, reach = wider, reach + size
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(int(sums.sum()))
    return min(1.0, float(chances[far].sum()))


def holm(values: Sequence[float]) -> list[float]:
    """Return p values corrected for multiple tests (Holm 1979); NaN stays NaN and does not count."""
    order = sorted((p, index) for index, p in enumerate(values) if not math.isnan(p))
    corrected = list(values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected


def smallest_p(groups: int, tests: int) -> float:
    """Return the smallest p that a paired test on this many groups can have, after Holm's correction over all tests.

    If all n differences have one sign, the exact test of signed ranks has p = 2/2^n.
    """
    return min(1.0, tests * 2.0 ** (1 - groups))
