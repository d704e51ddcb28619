"""``worst-case.md``: the share of images that an ensemble of attackers recovers behind each defense, and its cost."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from leakbench.analysis.ensemble import SCENE, EnsembleResult, attacker_names, ensemble_results
from leakbench.analysis.failures import defense_failures
from leakbench.analysis.recovery import TARGET, caveat
from leakbench.analysis.verdict import Scene, inconclusive, missing_attackers
from leakbench.core.text import english
from leakbench.plan.matrix import RECOVERY
from leakbench.report.markdown import notes, options, stated
from leakbench.report.page import render_markdown
from leakbench.report.run import RunData
from leakbench.store.records import StoredComponent


def ranking(trials: pd.DataFrame, components: Sequence[StoredComponent], threshold: float) -> str:
    """Return the table of each dataset and model as Markdown: every defense, the least recovered first."""
    return render_markdown("ranking.md.j2", scenes=_scenes(trials, components, threshold)).strip()


def _scenes(trials: pd.DataFrame, components: Sequence[StoredComponent], threshold: float) -> list[dict[str, Any]]:
    """Return what the pages show of each dataset and model."""
    images, scenes, found = notes(components), [], ensemble_results(trials, threshold)
    flaws, missing = inconclusive(found, components), missing_attackers(trials, components, threshold)
    for (dataset, model), results in groupby(found, SCENE):
        own = list(results)
        here = trials[(trials["dataset"] == dataset) & (trials["model"] == model)]
        scenes.append(
            {
                "dataset": dataset,
                "model": model,
                "images": images.get(dataset, ""),
                "results": own,
                "inconclusive": flaws[dataset, model],
                "missing": _missing(missing, (dataset, model)),
                "caveat": caveat(here),
                "floors": _floors(here, threshold),
                "failures": defense_failures(here),
                "reasons": _reasons(own),
            }
        )
    return scenes


def _granted(run: RunData, threat: str) -> str:
    """Return what a threat model grants, in words, and of which clients if it is not the same for all."""
    kinds = run.grants.get(threat, {threat: ""})
    return " ".join(f"{clients}: {words}" if clients else words for words, clients in kinds.items())


def _missing(missing: Mapping[Scene, Sequence[str]], scene: tuple[str, str]) -> list[tuple[str, list[str]]]:
    """Return the attackers of the suite that did not run, each list once, with the defenses that it is for."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for (dataset, model, defense), lacking in missing.items():
        if lacking and (dataset, model) == scene:
            groups.setdefault(tuple(lacking), []).append(defense)
    return [(english(lacking), defenses) for lacking, defenses in groups.items()]


def markdown(run: RunData, threshold: float) -> str:
    """Return the report of an ensemble; it depends on nothing but its arguments.

    Args:
        run: all that the report shows.
        threshold: in [0, 1]; see ``recovery.judged``.
    """
    trials, components = run.trials, run.components
    scenes = _scenes(trials, components, threshold)
    attackers = attacker_names(trials[~trials["floor"].to_numpy(dtype=bool)])
    return render_markdown(
        "worst_case.md.j2",
        name=run.name,
        threshold=threshold,
        scenes=scenes,
        complete=not any(scene["missing"] for scene in scenes),
        attackers=[[short, attack, _granted(run, threat)] for (attack, threat), short in attackers.items()],
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
