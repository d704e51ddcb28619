"""What sets defenses apart, and informed attackers from oblivious ones: paired differences on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from leakbench.analysis.paired import METRICS, Pair, _attacks, _defenses, _informed
from leakbench.analysis.statistics import (
    ALPHA,
    POWER,
    Difference,
    bootstrap_interval,
    holm,
    least_images,
    needed_images,
    paired_difference,
    smallest_p,
    wilson_interval,
)
from leakbench.analysis.statistics import wilcoxon_test as test
from leakbench.core.text import ABSENT, decimals, number, p_value, with_interval
from leakbench.report.md import escape, table
from leakbench.store.records import MetricInfo

NAMED = 5
"""Of so many differences it is said on how many images they would be shown."""

MOST = 10_000
"""A difference that takes more images than this is as good as none."""


_SKIPPED = (
    "What one attacker had recovered was not attacked again: the means of later ones are over fewer and harder images, "
    "and defenses are not compared by them. `worst-case.md` has the ranking."
)


def differences(
    results: pd.DataFrame, block: tuple[str, str, str], metrics: Sequence[MetricInfo], skips: bool
) -> list[str]:
    """Return the Markdown on the differences of one dataset, model and threat model.

    For each attack, defenses are compared in pairs; behind each defense, an informed attacker with the same attacker
    uninformed, and the leading attacker with the best of the others. Wilcoxon signed-rank tests on images, with Holm's
    correction over all tests of a table.

    Args:
        results: those of the whole run (``Store.results``).
        block: the dataset, the model and the threat model.
        metrics: those of the run.
        skips: whether trials on settled images were skipped, so that attacks ran on different images.
    """
    own = _attacks(results, block)
    if skips:
        return [_SKIPPED] if len(own) else []
    names = [metric.name for metric in metrics if metric.name in METRICS and own[metric.name].notna().any()]
    between = [
        f"{escape(attack)}:\n\n{found}"
        for attack, cells in own.groupby("attack", sort=False)
        if (found := paired_table(_defenses(cells), names)[0])
    ]
    informed, _ = paired_table(_informed(results, block, own), names)
    leading = _leading(own) if "psnr_aligned" in names else ""
    if not (between or informed or leading):
        return []
    parts = [WORDS] if between or informed else []
    if between:
        parts.append("**Differences between defenses**, by attack; above 0, more leaks behind the first one:")
        parts += between
    if informed:
        parts.append("**What an attacker gains by knowing the defense**, over the same attack that does not:")
        parts.append(informed)
    if leading:
        parts.append(_LEADING)
        parts.append(leading)
    return parts


WORDS = (
    "Differences are paired by image and seed. **mean** has its 95 % bootstrap interval; **median** is over images, "
    "each by the mean of its seeds; **p** is that of a two-sided Wilcoxon signed-rank test on these, **(Holm)** "
    f"corrected for all tests of the table. Bold: shown, since that p is at most {ALPHA:g} and the interval leaves 0 "
    "out. All else is not told apart by so few images, which does not make it equal."
)


_LEADING = (
    "**The leading attacker** behind each defense: the one that is most often above all others of this table, by "
    "psnr_aligned, on the same image (each by the mean of its seeds); and by how much it is above, or below, the best "
    "of the others there. It is picked by the images that it is then counted on, which is kind to it where the lead is "
    "short. Intervals of shares are Wilson's."
)


def _leading(own: pd.DataFrame) -> str:
    """Return the table of leading attackers; empty where no two attackers met the same image behind a defense."""
    found = []
    for defense, cells in own.groupby("defense", sort=False):
        means = cells.pivot_table(index="image", columns="attack", values="psnr_aligned", aggfunc="mean", sort=False)
        means = means.dropna()  # pivot_table leaves out attackers without any value
        if len(means.columns) < 2 or means.empty:
            continue
        gains = {name: means[name] - means.drop(columns=name).max(axis=1) for name in means.columns}
        attack, gain = max(gains.items(), key=lambda item: ((item[1] > 0).mean(), item[1].mean()))
        share = float((gain > 0).mean())
        shares = [f"{100 * value:.0f}" for value in (share, *wilson_interval(share, len(gain)))]
        found.append((escape(defense), escape(attack), len(gain), "{} % [{}, {}]".format(*shares), gain))
    places = decimals([float(gain.mean()) for *_, gain in found])
    lines = [
        [*map(str, row), with_interval(float(gain.mean()), *bootstrap_interval(gain.to_numpy()), places, sign=True)]
        for *row, gain in found
    ]
    headers = ["defense", "attack", "images", "above all others on", "over the best other: mean, dB"]
    return table(headers, lines, left=2) if lines else ""


def paired_table(pairs: Sequence[Pair], metrics: Sequence[str]) -> tuple[str, int]:
    """Return the table of differences, with a warning where so few images cannot show any, and how many are shown.

    The text is empty where no pair has an image.
    """
    found = {
        metric: [paired_difference(first[metric], second[metric], test) for _, first, second in pairs]
        for metric in metrics
    }
    rows = [index for index in range(len(pairs)) if any(found[metric][index].images for metric in metrics)]
    if not rows:
        return "", 0
    every = [found[metric][index].p for metric in metrics for index in rows]
    adjusted = dict(zip(((metric, index) for metric in metrics for index in rows), holm(every)))
    headers = ["difference", "images"]
    for metric in metrics:
        unit = f", {METRICS[metric]}" if METRICS[metric] else ""
        headers += [f"{escape(metric)}: mean{unit}", "median", "p", "p (Holm)"]
    places = {metric: decimals([found[metric][index].mean for index in rows]) for metric in metrics}
    lines, shown = [], 0
    for index in rows:
        line = [escape(pairs[index][0]), str(max(found[metric][index].images for metric in metrics))]
        for metric in metrics:
            line += _cell(found[metric][index], adjusted[metric, index], places[metric])
            shown += _shown(found[metric][index], adjusted[metric, index])
        lines.append(line)
    tests = sum(not math.isnan(p) for p in every)
    unshown = [
        (f"{escape(pairs[index][0])} ({escape(metric)})", found[metric][index])
        for metric in metrics
        for index in rows
        if not _shown(found[metric][index], adjusted[metric, index])
    ]
    return f"{table(headers, lines, left=1)}{warning(unshown, tests)}", shown


def _shown(one: Difference, adjusted: float) -> bool:
    """Return whether a difference is shown: its corrected p is small, and its interval leaves 0 out."""
    return adjusted <= ALPHA and (one.low > 0 or one.high < 0)


def _cell(one: Difference, adjusted: float, places: int | None) -> list[str]:
    corrected = f"**{p_value(adjusted)}**" if _shown(one, adjusted) else p_value(adjusted)
    mean = with_interval(one.mean, one.low, one.high, places, sign=True)
    median = number(one.median, places, sign=True)
    return [mean, median, p_value(one.p), corrected] if one.images else [ABSENT] * 4


def too_few(images: int, tests: int) -> str:
    """Return a paragraph where no difference, however large, could be shown on so many images."""
    if not tests or smallest_p(images, tests) <= ALPHA:
        return ""
    return (
        f"\n\n**Too few images**: on {images} image{'s' * (images != 1)} no p of these {tests} tests can be below "
        f"{p_value(smallest_p(images, tests))}, whatever the attack; it takes at least {least_images(tests)}."
    )


def warning(unshown: Sequence[tuple[str, Difference]], tests: int) -> str:
    """Return a paragraph where images are too few to show a difference of any size, or of the size that was measured.

    Args:
        unshown: what each difference is called that none of so many tests showed.
        tests: how many tests the table has.
    """
    unshown = [(name, one) for name, one in unshown if one.images]
    if not unshown or not tests:
        return ""
    needs = sorted((needed_images(one, tests), name, one.images) for name, one in unshown)
    short = [f"{name} on {need:.0f}, not {own}" for need, name, own in needs if own < need <= MOST]
    said = too_few(min(one.images for _, one in unshown), tests)
    if short:
        rest = f"; and {len(short) - NAMED} more" if len(short) > NAMED else ""
        said += (
            "\n\n**Too few images for what was measured**: if a difference is real and of the size that it has here, "
            f"{100 * POWER:.0f} % of such runs would show it on about so many images: {'; '.join(short[:NAMED])}{rest}."
        )
    return said
