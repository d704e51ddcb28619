"""Differences between defenses, and between attackers who know them and who do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from leakbench.analysis.paired import ALL_PAIRS
from leakbench.analysis.statistics import holm, needed_images, paired_difference, wilcoxon_test
from leakbench.report.differences import differences
from leakbench.store.records import MetricInfo

METRICS = [MetricInfo("psnr", True, "dB", ""), MetricInfo("psnr_aligned", True, "dB", "")]
METRICS.append(MetricInfo("ssim_aligned", True, "-1 to 1", ""))
BLOCK = ("samples", "lenet", "paper")


def results(
    score: Callable[[str, int], float],
    defenses: tuple[str, ...] = ("none", "noise"),
    images: int = 10,
    threats: tuple[str, ...] = ("paper",),
    attacks: tuple[str, ...] = ("dlg",),
) -> pd.DataFrame:
    """Results of every attack behind every defense, and of a floor; ``score`` is that of a defense and an image."""
    rows = [
        {"attack": attack, "defense": defense, "threat": threat, "image": image, "psnr_aligned": score(defense, image)}
        for threat, attack, defense, image in itertools.product(threats, attacks, defenses, range(images))
    ]
    rows += [{"attack": "grey", "defense": "none", "threat": "paper", "image": i, "psnr_aligned": 9.0} for i in (0, 1)]
    frame = pd.DataFrame(rows).assign(dataset="samples", model="lenet", seed=0, status="ok")
    return frame.assign(floor=frame["attack"] == "grey", ssim_aligned=frame["psnr_aligned"] / 100)


def noisy(defense: str, image: int) -> float:
    rng = np.random.default_rng([image, sum(map(ord, defense))])
    return 20 - 5 * (defense == "noise") + image + rng.normal(0, 0.5)


def table(parts: list[str], head: str) -> list[list[str]]:
    (text,) = [part for part in parts if part.startswith(head)]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_defenses_are_compared_in_pairs_on_the_same_images() -> None:
    frame = results(noisy)
    parts = differences(frame, BLOCK, METRICS, skips=False)
    ((name, images, mean, median, p, corrected, *rest),) = table(parts, "dlg:")
    apart = np.array([noisy("none", i) - noisy("noise", i) for i in range(10)])
    assert (name, images) == ("none − noise", "10")
    assert mean.startswith(f"{apart.mean():+.3f} [+")
    assert median == f"{np.median(apart):+.3f}"
    expected = stats.wilcoxon(apart, method="exact").pvalue
    assert p == f"{expected:.3f}"
    assert corrected == f"**{holm([expected, expected])[0]:.3f}**"
    assert len(rest) == 4
    assert "Too few images" not in "".join(parts)
    assert not any(part.startswith("grey") for part in parts)


def test_what_so_few_images_cannot_show_is_said() -> None:
    parts = differences(results(noisy, images=4), BLOCK, METRICS, skips=False)
    ((_, _, _, _, p, corrected, *_),) = table(parts, "dlg:")
    assert (p, corrected) == ("0.125", "0.250")
    assert "**Too few images**: on 4 images no p of these 2 tests can be below 0.250" in "".join(parts)
    assert "at least 7" in "".join(parts)


def test_what_so_few_images_cannot_show_of_the_size_that_was_measured_is_said() -> None:
    """The row with fewer images is warned of, however many the others have."""
    rng = np.random.default_rng(0)
    small, frame = rng.normal(0.5, 1, 20), results(noisy, ("none", "noise", "clip"), images=20)
    base = frame["defense"] == "none"
    frame.loc[frame["defense"] == "clip", "psnr_aligned"] = frame["psnr_aligned"][base & ~frame["floor"]].array + small
    parts = differences(frame.drop(columns="ssim_aligned").assign(ssim_aligned=np.nan), BLOCK, METRICS, skips=False)
    apart = pd.Series(small, index=pd.MultiIndex.from_product([range(20), [0]], names=["image", "seed"]))
    needed = needed_images(paired_difference(apart, 0 * apart, wilcoxon_test), tests=3)
    assert "**Too few images for what was measured**" in "".join(parts)
    assert f"none − clip (psnr_aligned) on {needed}, not 20." in "".join(parts)
    few = frame[(frame["defense"] != "clip") | (frame["image"] < 3)]
    assert "**Too few images**: on 3 images no p of these" in "".join(differences(few, BLOCK, METRICS, skips=False))


def test_a_difference_whose_interval_covers_0_is_not_bold() -> None:
    parts = differences(results(lambda defense, image: 20 + (defense == "none") * (-1) ** image), BLOCK, METRICS, False)
    assert "**" not in "".join(map("".join, table(parts, "dlg:")))


def test_of_many_defenses_each_is_compared_with_none() -> None:
    few = (*(f"noise(scale={scale})" for scale in range(1, ALL_PAIRS)), "none")
    found = table(differences(results(noisy, few), BLOCK, METRICS, False), "dlg:")
    assert len(found) == ALL_PAIRS * (ALL_PAIRS - 1) // 2
    many = ("clip", *few)
    found = table(differences(results(noisy, many), BLOCK, METRICS, False), "dlg:")
    assert {row[0].partition(" − ")[0] for row in found} == {"none"}
    assert len(found) == len(many) - 1


def test_informed_attackers_are_compared_with_their_twins() -> None:
    frame = results(noisy, threats=("paper", "informed=true"), attacks=("dlg", "ig"))
    frame.loc[frame["threat"] == "informed=true", "psnr_aligned"] += 3
    parts = differences(frame, ("samples", "lenet", "informed=true"), METRICS, False)
    found = table(parts, "| difference")
    assert [row[0] for row in found] == ["dlg, none", "dlg, noise", "ig, none", "ig, noise"]
    assert {row[2] for row in found} == {"+3.000 [+3.000, +3.000]"}
    assert any("What an attacker gains by knowing" in part for part in parts)
    assert not any("by knowing" in part for part in differences(frame, BLOCK, METRICS, False))


def test_a_twin_that_searches_for_the_secrets_is_compared_too() -> None:
    frame = results(noisy, threats=("paper", "optimises=true", "informed=true"))
    frame.loc[frame["threat"] == "informed=true", "psnr_aligned"] += 3
    frame.loc[frame["threat"] == "optimises=true", "psnr_aligned"] += 2
    found = table(differences(frame, ("samples", "lenet", "informed=true"), METRICS, False), "| difference")
    over = ", over the search for the secrets"
    assert [row[0] for row in found] == ["dlg, none", "dlg, noise", f"dlg, none{over}", f"dlg, noise{over}"]
    assert [row[2].partition(" ")[0] for row in found] == ["+3.000", "+3.000", "+1.000", "+1.000"]


def test_nothing_to_compare_is_nothing_said() -> None:
    assert differences(results(noisy, ("none",)), BLOCK, METRICS, False) == []
    assert differences(results(noisy), ("samples", "lenet", "T1"), METRICS, False) == []
    alone = results(noisy).query("defense == 'none' or image > 20")
    assert differences(alone, BLOCK, METRICS, False) == []


def test_a_run_that_skipped_what_was_settled_compares_nothing() -> None:
    (caution,) = differences(results(noisy), BLOCK, METRICS, skips=True)
    assert "fewer and harder images" in caution


@pytest.mark.parametrize("metric", ["psnr_aligned", "ssim_aligned"])
def test_a_metric_that_is_missing_is_left_out(metric: str) -> None:
    frame = results(noisy)
    frame[metric] = np.nan
    ((*cells,),) = table(differences(frame, BLOCK, METRICS, False), "dlg:")
    assert len(cells) == 2 + 4


def test_the_leading_attacker_is_above_the_best_of_the_others_on_so_many_images() -> None:
    scores = {"dlg": [10.0] * 8 + [31, 31], "ig": [12.0] * 10, "peel": [30.0] * 10}
    frame = results(lambda defense, image: 0.0, defenses=("none",), attacks=("dlg", "ig", "peel"))
    own = ~frame["floor"]
    frame.loc[own, "psnr_aligned"] = [scores[a][i] for a, i in zip(frame["attack"][own], frame["image"][own])]
    parts = differences(frame, BLOCK, METRICS, skips=False)
    head = next(index for index, part in enumerate(parts) if part.startswith("**The leading attacker**"))
    ((defense, attack, images, share, gain),) = table(parts[head + 1 :], "|")
    assert (defense, attack, images) == ("none", "peel", "10")
    assert share == "80 % [49, 94]"
    assert gain.startswith("+14.20 [+")  # 8 images by 18 dB, 2 by -1


def test_one_attacker_alone_leads_nothing() -> None:
    assert not any("leading" in part for part in differences(results(noisy), BLOCK, METRICS, skips=False))
