"""Paired differences on the same images: between defenses, and between adaptive and oblivious attackers."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from leakbench.analysis.paired import METRICS, Pair, attacks_of, defense_pairs, informed_pairs
from leakbench.analysis.statistics import (
    ALPHA,
    Difference,
    bootstrap_interval,
    holm,
    paired_difference,
    share_interval,
    smallest_p,
)
from leakbench.core.text import ABSENT, decimals, in_groups, number, p_value, plural, with_interval
from leakbench.report.display import to_markdown
from leakbench.report.page import render_markdown
from leakbench.store.records import MetricInfo


def differences(results: pd.DataFrame, block: tuple[str, str, str], metrics: Sequence[MetricInfo], skips: bool) -> str:
    """Return the Markdown on the differences of one dataset, model and threat model; empty if nothing compares.

    For each attack, defenses are compared in pairs; behind each defense, an adaptive attacker is compared with the same
    attacker without knowledge of the defense, and the leading attacker with the best of the others.

    Args:
        results: those of the whole run (``Store.results``).
        block: the dataset, the model and the threat model.
        metrics: those of the run.
        skips: whether images that were already recovered were skipped, so that attacks ran on different images.
    """
    own = attacks_of(results, block)
    names = [metric.name for metric in metrics if metric.name in METRICS and own[metric.name].notna().any()]
    between: dict[str, list[str]] = {}  # table, or the one sentence of several attacks -> the attacks
    informed, leading = "", list[list[object]]()
    if not skips:
        for attack, cells in own.groupby("attack", sort=False):
            between.setdefault(paired_table(defense_pairs(cells), names)[0], []).append(str(attack))
        informed, _ = paired_table(informed_pairs(results, block, own), names)
        leading = _leading(own) if "psnr_aligned" in names else []
    between.pop("", None)
    return render_markdown(
        "differences.md.j2",
        skips=skips and len(own) > 0,
        tested=any("\n" in text for text in (*between, informed)),
        between=between,
        informed=informed,
        leading=leading,
        alpha=ALPHA,
    ).strip()


def _leading(own: pd.DataFrame) -> list[list[object]]:
    """Return the rows of leading attackers; empty if no two attackers met the same image behind a defense."""
    found = []
    for defense, cells in own.groupby("defense", sort=False):
        means = cells.pivot_table(
            index=["group", "image"], columns="attack", values="psnr_aligned", aggfunc="mean", sort=False
        )
        means = means.dropna()  # pivot_table leaves out attackers without any value
        if len(means.columns) < 2 or means.empty:
            continue
        gains = {name: means[name] - means.drop(columns=name).max(axis=1) for name in means.columns}
        attack, gain = max(gains.items(), key=lambda item: ((item[1] > 0).mean(), item[1].mean()))
        share = float((gain > 0).mean())
        groups = gain.index.get_level_values("group").to_numpy()
        ends = share_interval((gain > 0).tolist(), groups)
        shares = [f"{100 * value:.0f}" for value in (share, *ends)]
        images = in_groups(len(gain), len(set(groups)))
        lead = (float(gain.mean()), *bootstrap_interval(gain.to_numpy(), groups=groups))
        found.append((defense, attack, images, "{} % [{}, {}]".format(*shares), lead))
    places = decimals([lead[0] for *_, lead in found])
    return [[*row, with_interval(*lead, places, sign=True)] for *row, lead in found]


def paired_table(pairs: Sequence[Pair], metrics: Sequence[str]) -> tuple[str, int]:
    """Return the table of paired differences in Markdown, and how many of them are statistically significant.

    If there are too few images for any difference to be significant, the text is one sentence that says so. It is empty
    if no pair has an image.
    """
    found = {
        metric: [paired_difference(pair.first[metric], pair.second[metric]) for pair in pairs] for metric in metrics
    }
    rows = [row for row in range(len(pairs)) if any(found[metric][row].images for metric in metrics)]
    every = [found[metric][row].p for metric in metrics for row in rows]
    if not rows:
        return "", 0
    counts = [max((found[metric][row].images, found[metric][row].groups) for metric in metrics) for row in rows]
    if sentence := too_few(*max(counts, key=lambda count: count[1]), sum(not math.isnan(p) for p in every)):
        return sentence, 0
    adjusted = dict(zip(((metric, row) for metric in metrics for row in rows), holm(every)))
    headings = ["difference", "images"]
    cells = [[pairs[row].name, in_groups(*count)] for row, count in zip(rows, counts)]
    bold = np.zeros((len(rows), 2 + 4 * len(metrics)), dtype=bool)
    for metric in metrics:
        unit = f", {METRICS[metric]}" if METRICS[metric] else ""
        places = decimals([found[metric][row].mean for row in rows])
        headings += [f"{metric}: mean{unit}", "median", "p", "p (Holm)"]
        for line, row in enumerate(rows):
            cells[line] += _cells(found[metric][row], adjusted[metric, row], places)
            bold[line, len(headings) - 1] = significant(found[metric][row], adjusted[metric, row])
    return to_markdown(pd.DataFrame(cells, columns=headings), left=1, bold=bold), int(bold.sum())


def significant(one: Difference, adjusted: float) -> bool:
    """Return whether a difference is statistically significant: a small corrected p, and an interval without 0."""
    return adjusted <= ALPHA and (one.low > 0 or one.high < 0)


def _cells(one: Difference, adjusted: float, places: int | None) -> list[str]:
    """Return a difference's mean with its interval, its median, its p and that after correction."""
    if not one.images:
        return [ABSENT] * 4
    mean = with_interval(one.mean, one.low, one.high, places, sign=True)
    return [mean, number(one.median, places, sign=True), p_value(one.p), p_value(adjusted)]


def too_few(images: int, groups: int, tests: int) -> str:
    """Return a sentence if no difference, however large, can be significant on so few groups of images."""
    least = smallest_p(groups, max(1, tests))
    if least <= ALPHA:
        return ""
    counted = in_groups(images, groups, "image")
    return f"Not significant at {counted}: with {plural(tests, 'test')}, p is at least {p_value(least)}."
