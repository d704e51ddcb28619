"""Differences between defenses, and between attackers who know them and who do not."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from leakbench.analysis.paired import MAX_COMPARED, Pair
from leakbench.analysis.statistics import ALPHA, UNIT, holm
from leakbench.report.differences import differences, paired_table
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
    floor, group = frame["attack"] == "grey", frame["image"]
    return frame.assign(floor=floor, group=group, ssim_aligned=frame["psnr_aligned"] / 100)


def noisy(defense: str, image: int) -> float:
    rng = np.random.default_rng([image, sum(map(ord, defense))])
    return 20 - 5 * (defense == "noise") + image + rng.normal(0, 0.5)


def table(text: str, head: str = "") -> list[list[str]]:
    """The cells of the first table after a line."""
    lines = text.splitlines()
    lines = lines[lines.index(head) + 1 :] if head else lines
    first = next(place for place, line in enumerate(lines) if line.startswith("|"))
    own = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in own]


def test_defenses_are_compared_in_pairs_on_the_same_images() -> None:
    frame = results(noisy)
    text = differences(frame, BLOCK, METRICS, skips=False)
    ((name, images, mean, median, p, corrected, *rest),) = table(text, "dlg:")
    apart = np.array([noisy("none", i) - noisy("noise", i) for i in range(10)])
    assert (name, images) == ("none − noise", "10")
    assert mean.startswith(f"{apart.mean():+.3f} [+")
    assert median == f"{np.median(apart):+.3f}"
    expected = stats.wilcoxon(apart, method="exact").pvalue
    assert p == f"{expected:.3f}"
    assert corrected == f"**{holm([expected, expected])[0]:.3f}**"
    assert len(rest) == 4
    assert "Not significant" not in text
    assert "grey" not in text


def test_too_few_images_have_one_line_and_no_table() -> None:
    text = differences(results(noisy, images=4, attacks=("dlg", "ig")), BLOCK, METRICS[:2], skips=False)
    line = "Not significant at 4 images: with 1 test, p is at least 0.125."
    assert text.count(line) == 1
    assert "dlg and ig:" in text
    assert "none − noise" not in text
    assert "| none − noise" in differences(results(noisy, images=6), BLOCK, METRICS[:2], skips=False)


def test_a_difference_whose_interval_contains_0_is_not_bold() -> None:
    """Many small differences of one sign have a small p; one large one of the other sign has the interval reach 0."""
    apart = [0.1 + image / 1000 for image in range(15)] + [-3.0]
    index = pd.MultiIndex.from_arrays([range(16), range(16), [0] * 16], names=UNIT)
    second = pd.DataFrame({"psnr_aligned": 0.0}, index=index)
    cells, significant = paired_table([Pair("a − b", second.assign(psnr_aligned=apart), second)], ["psnr_aligned"])
    ((_, _, mean, _, p, corrected),) = table(cells)
    assert float(p) <= ALPHA
    assert "[−" in mean
    assert ", +" in mean
    assert (corrected, significant) == (p, 0)


def test_of_many_defenses_each_is_compared_with_none() -> None:
    few = (*(f"noise(scale={scale})" for scale in range(1, MAX_COMPARED)), "none")
    found = table(differences(results(noisy, few), BLOCK, METRICS, False), "dlg:")
    assert len(found) == MAX_COMPARED * (MAX_COMPARED - 1) // 2
    many = ("clip", *few)
    found = table(differences(results(noisy, many), BLOCK, METRICS, False), "dlg:")
    assert {row[0].partition(" − ")[0] for row in found} == {"none"}
    assert len(found) == len(many) - 1


def test_informed_attackers_are_compared_with_their_twins() -> None:
    frame = results(noisy, threats=("paper", "informed=true"), attacks=("dlg", "ig"))
    frame.loc[frame["threat"] == "informed=true", "psnr_aligned"] += 3
    text = differences(frame, ("samples", "lenet", "informed=true"), METRICS, False)
    found = table(text[text.index("by knowing the defense") :])
    assert [row[0] for row in found] == ["dlg, none", "dlg, noise", "ig, none", "ig, noise"]
    assert {row[2] for row in found} == {"+3.000 [+3.000, +3.000]"}
    assert "What an attacker gains by knowing" in text
    assert "by knowing" not in differences(frame, BLOCK, METRICS, False)


def test_a_twin_that_searches_for_the_secrets_is_compared_too() -> None:
    frame = results(noisy, threats=("paper", "optimises=true", "informed=true"))
    frame.loc[frame["threat"] == "informed=true", "psnr_aligned"] += 3
    frame.loc[frame["threat"] == "optimises=true", "psnr_aligned"] += 2
    text = differences(frame, ("samples", "lenet", "informed=true"), METRICS, False)
    found = table(text[text.index("by knowing the defense") :])
    over = ", over optimised secrets"
    assert [row[0] for row in found] == ["dlg, none", "dlg, noise", f"dlg, none{over}", f"dlg, noise{over}"]
    assert [row[2].partition(" ")[0] for row in found] == ["+3.000", "+3.000", "+1.000", "+1.000"]


def test_nothing_to_compare_is_nothing_said() -> None:
    assert differences(results(noisy, ("none",)), BLOCK, METRICS, False) == ""
    assert differences(results(noisy), ("samples", "lenet", "T1"), METRICS, False) == ""
    alone = results(noisy).query("defense == 'none' or image > 20")
    assert differences(alone, BLOCK, METRICS, False) == ""


def test_a_run_that_skipped_what_was_settled_compares_nothing() -> None:
    text = differences(results(noisy), BLOCK, METRICS, skips=True)
    assert "fewer and harder images" in text
    assert "|" not in text


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
    text = differences(frame, BLOCK, METRICS, skips=False)
    ((defense, attack, images, share, gain),) = table(text[text.index("**The leading attacker**") :])
    assert (defense, attack, images) == ("none", "peel", "10")
    assert share == "80 % [49, 94]"
    assert gain.startswith("+14.20 [+")  # 8 images by 18 dB, 2 by -1


def test_one_attacker_alone_leads_nothing() -> None:
    assert "leading" not in differences(results(noisy), BLOCK, METRICS, skips=False)
