"""``worst-case.md``: the share of images that an ensemble of attackers recovers behind each defense, and its cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from leakbench.analysis.ensemble import TARGET, EnsembleResult, attacker_names, ensemble_results
from leakbench.core.text import ABSENT, english, number, percent
from leakbench.plan.matrix import RECOVERY
from leakbench.report.markdown import notes, stated
from leakbench.report.md import escape, table
from leakbench.store.records import StoredComponent


def ranking(trials: pd.DataFrame, threshold: float) -> str:
    """Return the table of each dataset and model as Markdown: every defense, the least recovered first."""
    parts = []
    for (dataset, model), own in _scenes(ensemble_results(trials, threshold)).items():
        parts += [f"{escape(dataset)}, {escape(model)}:", _headline(own)]
    return "\n\n".join(parts)


def markdown(
    name: str,
    trials: pd.DataFrame,
    threshold: float,
    threats: Mapping[str, str],
    components: Sequence[StoredComponent] = (),
) -> str:
    """Return the report of an ensemble; it depends on nothing but its arguments.

    Args:
        name: the run's.
        trials: every planned trial in the order of planning (``Store.trials``).
        threshold: in [0, 1], from which ``ssim_aligned`` on an image is recovered.
        threats: threat model -> what it grants, in words.
        components: what each spec stands for.
    """
    parts = [f"# Worst case: {escape(name)}", _words(threshold)]
    scenes, images = _scenes(ensemble_results(trials, threshold)), notes(components)
    for (dataset, model), own in scenes.items():
        here = trials[(trials[["dataset", "model"]] == [dataset, model]).all(axis=1)]
        parts += [f"## {escape(dataset)}, {escape(model)}", escape(images.get(dataset, ""))]
        parts += [_headline(own), _floors(here, threshold)]
        parts += ["### What each attacker did", _attackers(own), _reasons(own)]
    if not scenes:
        return "\n\n".join([*parts, "No attack was planned: there is nothing to show."]) + "\n"
    return "\n\n".join(part for part in [*parts, _legend(trials, threats, components)] if part) + "\n"


def _scenes(found: Sequence[EnsembleResult]) -> dict[tuple[str, str], list[EnsembleResult]]:
    scenes: dict[tuple[str, str], list[EnsembleResult]] = {}
    for standing in found:
        scenes.setdefault((standing.dataset, standing.model), []).append(standing)
    return scenes


def _words(threshold: float) -> str:
    return (
        "A defense is worth what it withstands of the best attacker. Attackers come in the order of the matrix, in "
        "the suite those first that evaluate the fewest gradients. An image is **recovered** where the reconstruction "
        f"of one of them has an SSIM of at least {threshold:g} after the best fit of brightness and contrast to the "
        "private image. What is recovered is settled: later attackers are not run on it. So the private image decides "
        "which trials are run, as it decides every score; no attacker sees it, and what an attacker returns does not "
        "depend on it.\n\n"
        "The least recovered defense comes first. Brackets hold 95 % intervals (Wilson's, for as many trials as there "
        "are images: seeds of one image are not independent); defenses whose intervals overlap are not told apart. "
        "A defense that withstands these attackers may still fall to another one."
    )


def _headline(found: Sequence[EnsembleResult]) -> str:
    rows = []
    for one in found:
        evaluations = sum(effort.evaluations or 0 for effort in one.attackers)
        seconds = sum(effort.seconds for effort in one.attackers)
        by = [f"{escape(effort.attacker)} {effort.recovered}" for effort in one.attackers if effort.recovered]
        left = [f"{one.open} trial{'s' * (one.open > 1)} to go"] if one.open else []
        rows.append(
            [
                escape(one.defense),
                _share(one),
                ", ".join(by + left) or ABSENT,
                str(one.images),
                _whole(evaluations / one.targets) if one.targets else ABSENT,
                number(seconds / one.targets, 1) if one.targets else ABSENT,
            ]
        )
    headers = ["defense", "recovered", "by attacker", "images", "evaluations an image", "seconds an image"]
    return table(headers, rows, left=3)


def _share(one: EnsembleResult) -> str:
    if math.isnan(one.share):
        return ABSENT if one.open else "no attacker serves it"
    if one.open:
        return f"{percent(one.share)} so far"
    return f"{percent(one.share)} [{100 * one.low:.0f}, {100 * one.high:.0f}]"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _floors(trials: pd.DataFrame, threshold: float) -> str:
    """Return how many images count as recovered without any gradient."""
    floors = trials[trials["floor"].to_numpy(dtype=bool) & (trials["status"] == "ok")]
    floors = floors.drop_duplicates(["attack", *TARGET])
    counts = [
        f"{escape(name)} {int((own[RECOVERY] >= threshold).sum())} of {len(own)}"
        for name, own in floors.groupby("attack", sort=False)
    ]
    if not counts:
        return "No floor was run: add `random`, `grey` and `mean` to see what counts as recovered without a gradient."
    return f"Without any gradient, the floors recover: {', '.join(counts)}."


def _attackers(found: Sequence[EnsembleResult]) -> str:
    rows = []
    for one in found:
        for effort in one.attackers:
            missing = sum(effort.unscored.values())
            rows.append(
                [
                    escape(one.defense),
                    escape(effort.attacker),
                    str(effort.recovered),
                    str(effort.tried),
                    str(effort.skipped),
                    str(effort.failed),
                    str(missing),
                    ABSENT if effort.evaluations is None else _whole(effort.evaluations),
                    number(effort.seconds, 1),
                ]
            )
    headers = ["defense", "attacker", "recovered", "tried", "skipped", "failed", "no score", "evaluations", "seconds"]
    return table(headers, rows, left=2)


def _reasons(found: Sequence[EnsembleResult]) -> str:
    """Return why attackers have no score, each reason once with the defenses that it holds for."""
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for one in found:
        for effort in one.attackers:
            for reason, count in effort.unscored.items():
                groups.setdefault((effort.attacker, reason), {})[one.defense] = count
    rows = [
        [escape(attacker), english(map(escape, counts)), escape(reason), str(sum(counts.values()))]
        for (attacker, reason), counts in groups.items()
    ]
    title = "**Attackers without a score, and why**:"
    return f"{title}\n\n{table(['attacker', 'defense', 'reason', 'trials'], rows, left=3)}" if rows else ""


def _legend(trials: pd.DataFrame, threats: Mapping[str, str], components: Sequence[StoredComponent]) -> str:
    attacks = trials[~trials["floor"].to_numpy(dtype=bool)]
    rows = [
        [escape(name), escape(attack), escape(threats.get(threat, threat))]
        for (attack, threat), name in attacker_names(attacks).items()
    ]
    words = (
        "Images count once for each seed where an attacker's are counted. **tried**: trials with a score. **skipped**: "
        "trials that were not run, since another attacker had recovered the image. **failed**: trials, among those "
        "tried, that diverged; they recover nothing. **no score**: the attacker does not serve the case, or broke. "
        "**evaluations** count the objective and its gradient; what an attack does beside that, such as the least "
        f"squares of a closed form, shows in the **seconds** alone ({ABSENT}: it counts none). Both are of all trials "
        "together there, and in the first table a mean over images and seeds."
    )
    options = [
        [one.kind, escape(one.spec), escape(", ".join(f"{name}={json.dumps(to)}" for name, to in one.options.items()))]
        for one in components
        if one.kind in ("attack", "defense")
    ]
    attackers = table(["attacker", "attack", "threat model"], rows, left=3)
    meanings = table(["kind", "name", "options"], options, left=3)
    parts = ("## How to read this", words, attackers, meanings, stated(components))
    return "\n\n".join(part for part in parts if part)
