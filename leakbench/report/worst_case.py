"""``worst-case.md``: the share of images that an ensemble of attackers recovers behind each defense, and its cost."""

from collections.abc import Sequence
from itertools import groupby

import pandas as pd

from leakbench.analysis.ensemble import SCENE, TARGET, EnsembleResult, attacker_names, ensemble_results
from leakbench.core.text import english
from leakbench.plan.matrix import RECOVERY
from leakbench.report.markdown import notes, options, stated
from leakbench.report.page import render_markdown
from leakbench.report.run import RunData


def ranking(trials: pd.DataFrame, threshold: float) -> str:
    """Return the table of each dataset and model as Markdown: every defense, the least recovered first."""
    scenes = [
        {"dataset": dataset, "model": model, "results": list(own)}
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
                "results": own,
                "floors": _floors(here, threshold),
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
    )


def _floors(trials: pd.DataFrame, threshold: float) -> list[tuple[str, int, int]]:
    """Return how many images each floor recovers without any gradient, and of how many."""
    floors = trials[trials["floor"].to_numpy(dtype=bool) & (trials["status"] == "ok")]
    floors = floors.drop_duplicates(["attack", *TARGET])
    return [
        (str(name), int((own[RECOVERY] >= threshold).sum()), len(own))
        for name, own in floors.groupby("attack", sort=False)
    ]


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
