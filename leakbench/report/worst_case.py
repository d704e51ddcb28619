"""``worst-case.md``: the share of images that an ensemble of attackers recovers behind each defense, and its cost."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from leakbench.matrix import RECOVERY
from leakbench.report.stated import notes, stated
from leakbench.report.statistics import wilson_interval
from leakbench.report.text import ABSENT, english, escape, number, percent, table
from leakbench.store import Component, Session

UNSCORED = f"{RECOVERY} is not defined for images of fewer than 11 pixels a side"
_TARGET = ["image", "seed"]
_SCENE = ["dataset", "model"]


def threshold_of(sessions: Sequence[Session]) -> float | None:
    """Return from which score on an image counted as recovered in the last session; None where all trials were run."""
    try:
        value = json.loads(sessions[-1].provenance.matrix)["threshold"]
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return float(value)


@dataclass(frozen=True)
class Effort:
    """What one attacker did behind one defense.

    Attributes:
        attacker: the short name of an attack under a threat model.
        tried: trials that have a score.
        recovered: images (once for each seed) that this attacker was the first to recover.
        failed: trials that diverged, part of ``tried``.
        skipped: trials that were not run because another attacker had recovered the image.
        open: trials that have not ended yet.
        unscored: reason -> trials that ended without a score.
        evaluations: of the objective and its gradient, all trials together; None where the attack counts none.
        seconds: all trials together, those that ended without a score too.
    """

    attacker: str
    tried: int
    recovered: int
    failed: int
    skipped: int
    open: int
    unscored: Mapping[str, int]
    evaluations: int | None
    seconds: float


@dataclass(frozen=True)
class Standing:
    """What the ensemble recovers behind one defense, for one dataset and model.

    Attributes:
        images: those that at least one attacker could attack.
        targets: the same, once for each seed.
        share: of recovered images, each image by the share of its seeds; NaN without images.
        low: of the share's 95 % interval, Wilson's for so many trials as there are images; ``high`` likewise.
        efforts: of every attacker, in the order in which they came.
    """

    dataset: str
    model: str
    defense: str
    images: int
    targets: int
    share: float
    low: float
    high: float
    efforts: tuple[Effort, ...]

    @property
    def open(self) -> int:
        """How many trials have not ended yet."""
        return sum(effort.open for effort in self.efforts)


def standings(trials: pd.DataFrame, threshold: float) -> list[Standing]:
    """Return one standing for each dataset, model and defense, in each scene the least recovered first.

    Args:
        trials: every planned trial in the order of planning (``Store.trials``).
        threshold: in [0, 1], from which ``ssim_aligned`` on an image is recovered.
    """
    attacks = trials[~trials["floor"].to_numpy(dtype=bool)]
    names = _names(attacks)
    found = []
    for _, scene in attacks.groupby(_SCENE, sort=False):
        own = [_standing(block, threshold, names) for _, block in scene.groupby("defense", sort=False)]
        found += sorted(own, key=lambda standing: (math.isnan(standing.share), standing.share))
    return found


def _names(trials: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Return (attack, threat) -> a short name: the attack's, where no other attacker has that."""
    attackers = [(str(a), str(t)) for a, t in trials[["attack", "threat"]].drop_duplicates().itertuples(index=False)]
    short = {(attack, threat): attack.partition("(")[0] + _knowing(threat) for attack, threat in attackers}
    known = list(short.values())
    return {pair: name if known.count(name) == 1 else f"{pair[0]}, {pair[1]}" for pair, name in short.items()}


def _knowing(threat: str) -> str:
    """Return what a short name adds for an attacker who is informed of the defense: " (informed)" or " (NAME)"."""
    named = re.search(r"\binformed=([\w-]+)", threat)
    return "" if named is None else f" ({'informed' if named[1] == 'true' else named[1]})"


def _standing(block: pd.DataFrame, threshold: float, names: Mapping[tuple[str, str], str]) -> Standing:
    """Return the standing of one defense from its trials in the order of planning."""
    recovered = (block["status"] == "ok") & (block[RECOVERY] >= threshold)
    first = block[recovered].drop_duplicates(_TARGET)
    settled = pd.MultiIndex.from_frame(block[_TARGET]).isin(pd.MultiIndex.from_frame(first[_TARGET]))
    scored = block["status"].isin(("ok", "failed")) & block[RECOVERY].notna()
    targets = block[scored].drop_duplicates(_TARGET)
    hit = pd.MultiIndex.from_frame(targets[_TARGET]).isin(pd.MultiIndex.from_frame(first[_TARGET]))
    by_image = pd.Series(hit, index=targets["image"], dtype=float).groupby(level=0).mean()
    share = float(by_image.mean()) if len(by_image) else math.nan
    low, high = wilson_interval(share, len(by_image)) if len(by_image) else (math.nan, math.nan)
    waiting = block["status"] == ""
    efforts = []
    for (attack, threat), own in block.groupby(["attack", "threat"], sort=False):
        ended = own[scored[own.index]]
        lacking = own[(own["status"] != "") & ~scored[own.index]]
        reasons = lacking["reason"].where(lacking["reason"] != "", UNSCORED).value_counts(sort=False)
        counted = ended["evaluations"].dropna()
        efforts.append(
            Effort(
                attacker=names[str(attack), str(threat)],
                tried=len(ended),
                recovered=len(first.index.intersection(own.index)),
                failed=int((ended["status"] == "failed").sum()),
                skipped=int((waiting & settled)[own.index].sum()),
                open=int((waiting & ~settled)[own.index].sum()),
                unscored={str(reason): int(count) for reason, count in reasons.items()},
                evaluations=int(counted.sum()) if len(counted) else None,
                seconds=float(own["seconds"].sum()),
            )
        )
    dataset, model, defense = (str(block[axis].iloc[0]) for axis in (*_SCENE, "defense"))
    return Standing(dataset, model, defense, len(by_image), len(targets), share, low, high, tuple(efforts))


def floor_share(trials: pd.DataFrame, threshold: float) -> float:
    """Return the share of images that the best floor by itself recovers, each image by its seeds; NaN without one.

    Args:
        trials: those of one dataset and model (``Store.trials``); a floor counts once, whatever the threat model.
        threshold: see ``standings``.
    """
    floors = trials[trials["floor"].to_numpy(dtype=bool) & trials["status"].isin(("ok", "failed"))]
    floors = floors.drop_duplicates(["attack", *_TARGET])
    hit = ((floors[RECOVERY] >= threshold) & (floors["status"] == "ok")).groupby([floors["attack"], floors["image"]])
    shares = hit.mean().groupby(level=0).mean()
    return float(shares.max()) if len(shares) else math.nan


def skipped(trials: pd.DataFrame, threshold: float) -> int:
    """Return how many planned trials need not be run, since another one has recovered the image."""
    return sum(effort.skipped for one in standings(trials, threshold) for effort in one.efforts)


def ranking(trials: pd.DataFrame, threshold: float) -> str:
    """Return the table of each dataset and model as Markdown: every defense, the least recovered first."""
    parts = []
    for (dataset, model), own in _scenes(standings(trials, threshold)).items():
        parts += [f"{escape(dataset)}, {escape(model)}:", _headline(own)]
    return "\n\n".join(parts)


def markdown(
    name: str,
    trials: pd.DataFrame,
    threshold: float,
    threats: Mapping[str, str],
    components: Sequence[Component] = (),
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
    scenes, images = _scenes(standings(trials, threshold)), notes(components)
    for (dataset, model), own in scenes.items():
        here = trials[(trials[_SCENE] == [dataset, model]).all(axis=1)]
        parts += [f"## {escape(dataset)}, {escape(model)}", escape(images.get(dataset, ""))]
        parts += [_headline(own), _floors(here, threshold)]
        parts += ["### What each attacker did", _attackers(own), _reasons(own)]
    if not scenes:
        return "\n\n".join([*parts, "No attack was planned: there is nothing to show."]) + "\n"
    return "\n\n".join(part for part in [*parts, _legend(trials, threats, components)] if part) + "\n"


def _scenes(found: Sequence[Standing]) -> dict[tuple[str, str], list[Standing]]:
    scenes: dict[tuple[str, str], list[Standing]] = {}
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


def _headline(found: Sequence[Standing]) -> str:
    rows = []
    for one in found:
        evaluations = sum(effort.evaluations or 0 for effort in one.efforts)
        seconds = sum(effort.seconds for effort in one.efforts)
        by = [f"{escape(effort.attacker)} {effort.recovered}" for effort in one.efforts if effort.recovered]
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


def _share(one: Standing) -> str:
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
    floors = floors.drop_duplicates(["attack", *_TARGET])
    counts = [
        f"{escape(name)} {int((own[RECOVERY] >= threshold).sum())} of {len(own)}"
        for name, own in floors.groupby("attack", sort=False)
    ]
    if not counts:
        return "No floor was run: add `random`, `grey` and `mean` to see what counts as recovered without a gradient."
    return f"Without any gradient, the floors recover: {', '.join(counts)}."


def _attackers(found: Sequence[Standing]) -> str:
    rows = []
    for one in found:
        for effort in one.efforts:
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


def _reasons(found: Sequence[Standing]) -> str:
    """Return why attackers have no score, each reason once with the defenses that it holds for."""
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for one in found:
        for effort in one.efforts:
            for reason, count in effort.unscored.items():
                groups.setdefault((effort.attacker, reason), {})[one.defense] = count
    rows = [
        [escape(attacker), english(map(escape, counts)), escape(reason), str(sum(counts.values()))]
        for (attacker, reason), counts in groups.items()
    ]
    title = "**Attackers without a score, and why**:"
    return f"{title}\n\n{table(['attacker', 'defense', 'reason', 'trials'], rows, left=3)}" if rows else ""


def _legend(trials: pd.DataFrame, threats: Mapping[str, str], components: Sequence[Component]) -> str:
    attacks = trials[~trials["floor"].to_numpy(dtype=bool)]
    rows = [
        [escape(name), escape(attack), escape(threats.get(threat, threat))]
        for (attack, threat), name in _names(attacks).items()
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
