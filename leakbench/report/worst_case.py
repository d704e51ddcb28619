"""``worst-case.md``: the share of images that an ensemble of attackers recovers behind each defense, and its cost."""

import math
from collections.abc import Sequence
from itertools import groupby

import pandas as pd

from leakbench.analysis.ensemble import SCENE, TARGET, EnsembleResult, attacker_names, ensemble_results
from leakbench.core.text import ABSENT, english, number, percent, plural
from leakbench.plan.matrix import RECOVERY
from leakbench.report.display import to_markdown
from leakbench.report.markdown import notes, options, stated
from leakbench.report.page import render_markdown
from leakbench.report.run import RunData


def ranking(trials: pd.DataFrame, threshold: float) -> str:
    """Return the table of each dataset and model as Markdown: every defense, the least recovered first."""
    scenes = [
        {"dataset": dataset, "model": model, "headline": _headline(list(own))}
        for (dataset, model), own in groupby(ensemble_results(trials, threshold), SCENE)
    ]
    return render_markdown("ranking.md.j2", scenes=scenes).strip()


def markdown(run: RunData, threshold: float) -> str:
    """Return the report of an ensemble; it depends on nothing but its arguments.

    Args:
        run: all that the report shows.
        threshold: in [0, 1]; an image is recovered if its ``ssim_aligned`` is at least this.
    """
    trials, components = run.trials, run.components
    images, scenes = notes(components), []
    for (dataset, model), results in groupby(ensemble_results(trials, threshold), SCENE):
        own = list(results)
        here = trials[(trials["dataset"] == dataset) & (trials["model"] == model)]
        scenes.append(
            {
                "dataset": dataset,
                "model": model,
                "images": images.get(dataset, ""),
                "headline": _headline(own),
                "floors": _floors(here, threshold),
                "attackers": _attackers(own),
                "reasons": _reasons(own),
            }
        )
    attackers = attacker_names(trials[~trials["floor"].to_numpy(dtype=bool)])
    return render_markdown(
        "worst_case.md.j2",
        name=run.name,
        threshold=threshold,
        scenes=scenes,
        attackers=[[short, attack, run.threats.get(threat, threat)] for (attack, threat), short in attackers.items()],
        components=[[one.kind, one.spec, options(one)] for one in components if one.kind in ("attack", "defense")],
        stated=stated(components),
        ABSENT=ABSENT,
    )


def _headline(found: Sequence[EnsembleResult]) -> str:
    """Return the table that ranks the defenses."""
    rows = []
    for one in found:
        evaluations = sum(stats.evaluations or 0 for stats in one.attackers)
        seconds = sum(stats.seconds for stats in one.attackers)
        by = [f"{stats.attacker} {stats.recovered}" for stats in one.attackers if stats.recovered]
        by += [f"{plural(one.open, 'trial')} to go"] if one.open else []
        cost = (f"{evaluations / one.targets:,.0f}", number(seconds / one.targets, 1)) if one.targets else [ABSENT] * 2
        rows.append([one.defense, _share(one), ", ".join(by) or ABSENT, str(one.images), *cost])
    headings = ["defense", "recovered", "by attacker", "images", "evaluations an image", "seconds an image"]
    return to_markdown(pd.DataFrame(rows, columns=headings), left=3)


def _share(one: EnsembleResult) -> str:
    if math.isnan(one.share):
        return ABSENT if one.open else "no attacker supports it"
    if one.open:
        return f"{percent(one.share)} so far"
    return f"{percent(one.share)} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def _floors(trials: pd.DataFrame, threshold: float) -> list[tuple[str, int, int]]:
    """Return how many images each floor recovers without any gradient, and of how many."""
    floors = trials[trials["floor"].to_numpy(dtype=bool) & (trials["status"] == "ok")]
    floors = floors.drop_duplicates(["attack", *TARGET])
    return [
        (str(name), int((own[RECOVERY] >= threshold).sum()), len(own))
        for name, own in floors.groupby("attack", sort=False)
    ]


def _attackers(found: Sequence[EnsembleResult]) -> list[list[object]]:
    """Return a row for every attacker of every defense."""
    rows: list[list[object]] = []
    for defense, stats in [(one.defense, stats) for one in found for stats in one.attackers]:
        counts = [stats.recovered, stats.tried, stats.skipped, stats.failed, sum(stats.unscored.values())]
        evaluations = ABSENT if stats.evaluations is None else f"{stats.evaluations:,}"
        rows.append([defense, stats.attacker, *counts, evaluations, number(stats.seconds, 1)])
    return rows


def _reasons(found: Sequence[EnsembleResult]) -> list[list[str]]:
    """Return why attackers have no score: each reason once, with its defenses."""
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for one in found:
        for stats in one.attackers:
            for reason, count in stats.unscored.items():
                groups.setdefault((stats.attacker, reason), {})[one.defense] = count
    return [
        [attacker, english(counts), reason, str(sum(counts.values()))] for (attacker, reason), counts in groups.items()
    ]
