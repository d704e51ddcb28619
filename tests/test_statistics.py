"""Intervals and paired tests: against scipy, against closed forms, and by how often they are right."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from leakbench.analysis.statistics import (
    UNIT,
    bootstrap_interval,
    effective_groups,
    holm,
    paired_difference,
    share_interval,
    sign_flip_test,
    smallest_p,
    wilcoxon_test,
    wilson_interval,
)

# Shares


@given(trials=st.integers(1, 200), data=st.data())
def test_the_wilson_interval_is_scipys(trials: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, trials))
    expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson_interval(hits / trials, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_groups_are_worth_their_number_if_all_are_of_one_size() -> None:
    assert effective_groups([3] * 7) == pytest.approx(7)
    assert effective_groups([1] * 10) == 10
    assert effective_groups([8, 1, 1]) == pytest.approx(100 / 66)
    assert effective_groups([]) == 0


def test_the_wilson_interval_of_no_trial_is_everything() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


# Bootstrap


def test_seeds_are_drawn_within_the_images_that_are_drawn() -> None:
    """Images alike and seeds apart: an interval over images alone would have no width."""
    images = np.repeat(np.arange(10), 4)
    values = np.tile([0.0, 0.0, 1.0, 1.0], 10)
    low, high = bootstrap_interval(values, images)
    expected = bootstrap_interval(values)  # nothing sets the images apart, so that all 40 values are alike
    assert (low, high) == pytest.approx(expected, abs=0.06)
    assert high - low > 0.2


def test_the_variance_of_resamples_is_that_of_both_levels() -> None:
    """Var = (sum over images of mean deviations^2 / I + mean over images of Var(seeds) / n) / I."""
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(30), 5)
    values = np.repeat(rng.normal(0, 1, 30), 5) + rng.normal(0, 2, 150)
    table = values.reshape(30, 5)
    expected = (table.mean(1).var() + table.var(1).mean() / 5) / 30
    low, high = bootstrap_interval(values, images, resamples=20_000)
    assert (high - low) / (2 * stats.norm.ppf(0.975)) == pytest.approx(expected**0.5, rel=0.05)


def test_images_with_different_numbers_of_seeds_keep_their_weight() -> None:
    images = [0, 1, 1, 1, 2, 2, 1]  # in no order
    values = [5.0, 1.0, 1.0, 1.0, 3.0, 3.0, 1.0]
    low, high = bootstrap_interval(values, images)
    assert (low, high) == (1.0, 5.0)
    order = np.argsort(images, kind="stable")
    assert bootstrap_interval(np.array(values)[order], np.array(images)[order]) == pytest.approx((low, high))


def test_one_seed_an_image_is_the_plain_bootstrap() -> None:
    values = np.random.default_rng(4).normal(0, 1, 25)
    found = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert bootstrap_interval(values, resamples=20_000) == pytest.approx((found.low, found.high), abs=0.03)
    assert bootstrap_interval(values, np.arange(25)) == bootstrap_interval(values)


def test_the_nested_interval_covers_the_mean_at_least_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    images = np.repeat(np.arange(12), 3)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(np.repeat(rng.normal(2, 1, 12), 3) + rng.normal(0, 1, 36), images)
        covered += low <= 2 <= high
    assert covered / 300 >= 0.95 - 3 * (0.05 * 0.95 / 300) ** 0.5


# Wilcoxon


@pytest.mark.parametrize("size", [2, 5, 12, 30])
def test_wilcoxon_without_ties_is_exact(size: int) -> None:
    values = np.random.default_rng(size).normal(0.3, 1, size)
    assert wilcoxon_test(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_wilcoxon_with_ties_and_zeros_tries_every_sign() -> None:
    values = np.array([0.0, 1.0, 1.0, 2.0, -1.0, 3.0])
    ranks = stats.rankdata(np.abs(values))
    signs = 1 - 2 * ((np.arange(2**6)[:, None] >> np.arange(6)) & 1)
    sums = (signs * np.where(values == 0, 0, ranks)).sum(1)
    observed = (np.sign(values) * ranks).sum()
    assert wilcoxon_test(values) == pytest.approx((np.abs(sums) >= abs(observed)).mean())


def test_wilcoxon_edges() -> None:
    assert wilcoxon_test([0.0, 0.0, 0.0]) == 1.0
    assert wilcoxon_test([1.0, 2.0, 3.0, 4.0]) == 2 / 2**4
    assert wilcoxon_test([1.0, 2.0, math.inf, 4.0]) == 2 / 2**4
    assert math.isnan(wilcoxon_test([1.0]))
    assert math.isnan(wilcoxon_test([]))
    assert math.isnan(wilcoxon_test([1.0, math.nan]))
    assert wilcoxon_test([1.0, 3.0, 2.0, 2.0], [0, 0, 1, 1]) == 2 / 2**2


def test_wilcoxon_keeps_its_level() -> None:
    rng = np.random.default_rng(7)
    rejected = np.mean([wilcoxon_test(rng.standard_t(2, 12)) <= 0.05 for _ in range(200)])
    assert 0 < rejected <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


# Few images


@pytest.mark.parametrize("tests", [1, 3, 20])
def test_the_smallest_p_is_reached(tests: int) -> None:
    for images in (4, 9):
        p = wilcoxon_test(np.arange(1.0, images + 1))
        assert holm([p] + [1.0] * (tests - 1))[0] == pytest.approx(smallest_p(images, tests))


# Paired differences


def series(values: dict[tuple[int, int], float]) -> pd.Series:
    index = [(image, image, seed) for image, seed in values]
    return pd.Series(values.values(), index=pd.MultiIndex.from_tuples(index, names=UNIT))


def test_a_paired_difference_is_over_the_pairs_that_have_both() -> None:
    first = series({(0, 0): 5.0, (0, 1): 7.0, (1, 0): 9.0, (2, 0): 4.0, (3, 0): math.nan})
    second = series({(2, 0): 4.0, (1, 0): 1.0, (0, 1): 3.0, (0, 0): 3.0, (4, 0): 8.0})
    found = paired_difference(first, second)
    assert found.images == 3
    assert found.mean == pytest.approx((2 + 4 + 8 + 0) / 4)
    assert found.median == 3.0
    assert found.low <= found.mean <= found.high
    assert found.p == wilcoxon_test([3.0, 8.0, 0.0])


def test_equal_infinities_differ_by_nothing_and_no_pair_is_no_difference() -> None:
    both = series({(0, 0): math.inf, (1, 0): 2.0})
    found = paired_difference(both, series({(0, 0): math.inf, (1, 0): 1.0}))
    assert (found.images, found.mean, found.median) == (2, 0.5, 0.5)
    none = paired_difference(both, series({(7, 0): 1.0}))
    assert none.images == 0
    assert math.isnan(none.mean)
    assert math.isnan(none.p)


# Groups

SIZES = (8, 6, 5, 4, 4, 3, 2)
"""How many of 32 images each of 7 photographs has."""
GROUPS = np.repeat(np.arange(7), SIZES)


def flips(count: int) -> np.ndarray:
    """Return [2^count, count], all signs."""
    return 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)


def test_groups_that_all_agree_have_wilsons_interval_over_groups() -> None:
    assert share_interval(np.ones(32), GROUPS) == pytest.approx((0.646, 1.0), abs=1e-3)
    assert share_interval(np.zeros(32), GROUPS) == pytest.approx((0.0, 0.354), abs=1e-3)
    assert share_interval(np.ones(32), np.arange(32)) == wilson_interval(1.0, 32)
    assert share_interval(np.ones(32)) == wilson_interval(1.0, 32)
    assert share_interval([1.0, 1.0, 0.0], [4, 4, 4]) == pytest.approx(wilson_interval(2 / 3, 1))
    assert all(math.isnan(end) for end in share_interval([]))


def test_a_share_with_groups_is_the_cluster_bootstrap_and_never_narrower_than_wilsons() -> None:
    """What was recovered behind prune of each photograph: 23 of 32 images."""
    recovered, sizes = (8, 3, 2, 2, 4, 4, 0), (8, 3, 4, 2, 4, 5, 6)
    hits = np.concatenate([np.arange(size) < hit for hit, size in zip(recovered, sizes)]).astype(float)
    low, high = share_interval(hits, np.repeat(np.arange(7), sizes))
    assert hits.mean() == pytest.approx(0.719, abs=0.001)
    assert (low, high) == pytest.approx((0.39, 0.97), abs=0.04)
    assert low <= wilson_interval(hits.mean(), 7)[0]
    assert low < wilson_interval(hits.mean(), 32)[0] - 0.1
    assert high > wilson_interval(hits.mean(), 32)[1] + 0.1


def test_one_image_less_does_not_make_an_interval_of_groups_narrower() -> None:
    ends = [share_interval(np.arange(32) >= missed, GROUPS)[0] for missed in range(9)]
    assert ends == sorted(ends, reverse=True)


def test_the_cluster_bootstrap_is_that_of_all_draws_of_groups() -> None:
    values = np.random.default_rng(8).normal(0, 1, 32) + np.repeat(np.random.default_rng(9).normal(0, 2, 7), SIZES)
    sums = np.bincount(GROUPS, values)
    draws = np.stack(np.meshgrid(*[np.arange(7)] * 7, indexing="ij"), -1).reshape(-1, 7)
    means = sums[draws].sum(1) / np.array(SIZES)[draws].sum(1)
    expected = np.percentile(means, (2.5, 97.5))
    assert bootstrap_interval(values, np.arange(32), GROUPS, resamples=20_000) == pytest.approx(expected, abs=0.05)
    shuffled = np.random.default_rng(0).permutation(32)
    again = bootstrap_interval(values[shuffled], shuffled, GROUPS[shuffled], resamples=20_000)
    assert again == pytest.approx(expected, abs=0.05)


def test_images_that_are_their_own_groups_have_the_interval_that_they_had() -> None:
    rng = np.random.default_rng(10)
    images, values = np.repeat(np.arange(9), 3), rng.normal(0, 1, 27)
    assert bootstrap_interval(values, images, images + 100) == bootstrap_interval(values, images)
    assert all(math.isnan(end) for end in bootstrap_interval(values, images, np.zeros(27, dtype=int)))


def test_wilcoxon_by_group_tries_every_sign_of_the_group_means() -> None:
    values = np.random.default_rng(11).normal(0.4, 1, 32)
    means = np.array([values[group == GROUPS].mean() for group in range(7)])
    ranks = stats.rankdata(np.abs(means))
    sums = (flips(7) * ranks).sum(1)
    expected = (np.abs(sums) >= abs((np.sign(means) * ranks).sum())).mean()
    assert wilcoxon_test(values, GROUPS) == pytest.approx(expected)
    assert wilcoxon_test(np.ones(32) + values / 100, GROUPS) == 2 / 2**7  # 32 images of one sign are 7 observations


def test_a_paired_difference_counts_groups() -> None:
    index = pd.MultiIndex.from_arrays([GROUPS, np.arange(32), np.zeros(32, int)], names=UNIT)
    values = np.random.default_rng(12).normal(1, 1, 32)
    found = paired_difference(pd.Series(values, index), pd.Series(0.0, index))
    assert (found.images, found.groups) == (32, 7)
    assert found.p == wilcoxon_test(values, GROUPS)
    assert (found.low, found.high) == bootstrap_interval(values, np.arange(32), GROUPS)
    assert found.median == pytest.approx(np.median(values))


@given(st.lists(st.integers(-1, 1), min_size=7, max_size=30), st.integers(0, 2**32))
def test_sign_flips_of_groups_are_all_tried(changes: list[int], seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, 7, len(changes))
    sums = np.bincount(groups, weights=changes, minlength=7)
    expected = (np.abs((flips(7) * sums).sum(1)) >= abs(sums.sum())).mean()
    assert sign_flip_test(changes, groups) == pytest.approx(expected)


def test_sign_flips_are_scipys_and_without_groups_mcnemars() -> None:
    changes = np.array([1, 1, 1, -1, 0, 1, 1, 0, 0, 1, 1, 1])
    groups = np.array([0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6])
    sums = np.bincount(groups, weights=changes)
    found = stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(changes, groups) == pytest.approx(found.pvalue)
    assert sign_flip_test(changes) == pytest.approx(stats.binomtest(8, 9).pvalue)
    assert sign_flip_test([0, 0]) == 1.0
    assert sign_flip_test([]) == 1.0
    assert sign_flip_test([1] * 40 + [-1] * 10) == pytest.approx(stats.binomtest(40, 50).pvalue)
