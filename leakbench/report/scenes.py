"""The worst case behind each defense: what pages, figures and the leaderboard show of an ensemble of attackers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd

from leakbench.analysis.ensemble import RECOVERED, SCENE, EnsembleResult, floor_share
from leakbench.analysis.failures import DefenseFailure, defense_failures
from leakbench.analysis.recovery import caveat, judged
from leakbench.analysis.summary import strongest
from leakbench.analysis.verdict import inconclusive, missing_attackers
from leakbench.plan.matrix import RECOVERY
from leakbench.report.markdown import notes
from leakbench.report.run import RunData

GainInterval = tuple[float, float, float]
"""A mean gain in dB with the ends of its interval."""


@dataclass(frozen=True)
class DefenseRow:
    """One defense of a worst case.

    Attributes:
        result: the share that the ensemble of attackers recovers.
        by: the attackers that recover most, and how many images.
        missing: the attackers of the suite that did not run.
        gain: that of the strongest attacker over the best floor in ``psnr_aligned``; None without one.
        attacker: the strongest attacker; empty if none exceeds the floor.
    """

    result: EnsembleResult
    by: str
    missing: tuple[str, ...]
    gain: GainInterval | None
    attacker: str


@dataclass(frozen=True)
class WorstCase:
    """The worst case behind each defense, for one dataset and model.

    Attributes:
        defenses: the one that leaks least comes first.
        floor: the share of images on which the best floor reaches the threshold; None without a floor.
        low: the lower end of the axis of gains; ``high`` is the upper end.
        note: what a reader must know of the dataset's images; may be empty.
        inconclusive: why no defense can be called better than another, in one sentence; empty if one can.
        caveat: why to doubt that images count as recovered; empty without a doubt.
        failures: the defenses that failed.
    """

    dataset: str
    model: str
    defenses: tuple[DefenseRow, ...]
    floor: float | None
    low: float
    high: float
    note: str
    inconclusive: str = ""
    caveat: str = ""
    failures: tuple[DefenseFailure, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every attacker of the suite ran behind every defense, so that this is the worst case."""
        return not any(row.missing for row in self.defenses)

    @property
    def unproven(self) -> list[EnsembleResult]:
        """The results of defenses that only attackers without a positive control have scores of."""
        return [row.result for row in self.defenses if row.result.unproven]

    @property
    def known(self) -> list[EnsembleResult]:
        """The results with a share, least recovered first, ``last`` ones last.

        Those that failed, or are ``unproven`` or ``useless``, are left out.
        """
        every = [row.result for row in self.defenses]
        return [one for one in every if not (math.isnan(one.share) or one.broken or one.unproven or one.useless)]

    @property
    def oblivious(self) -> bool:
        """Whether several defenses have shares, and no adaptive attacker ran behind any that has something to model."""
        defended = [one for one in self.known if one.adaptive or one.unadaptive]
        return len(self.known) > 1 and bool(defended) and not any(one.adaptive for one in defended)

    @property
    def useless(self) -> list[EnsembleResult]:
        """The results of defenses whose clients send nothing that correlates with their gradient."""
        return [row.result for row in self.defenses if row.result.useless]

    @property
    def least(self) -> list[EnsembleResult]:
        """The results of the defenses that leak least; several if their shares are equal."""
        return _equal(self.known[:1], self.known)

    @property
    def most(self) -> list[EnsembleResult]:
        """The results of the defenses that leak most; several if their shares are equal."""
        return _equal(sorted(self.known, key=lambda one: one.share)[-1:], self.known)

    @property
    def near(self) -> list[EnsembleResult]:
        """The other results whose intervals overlap with that of the least."""
        least = self.least
        return [one for one in self.known if one not in least and one.low <= least[0].high]


def _equal(one: Sequence[EnsembleResult], others: Sequence[EnsembleResult]) -> list[EnsembleResult]:
    return [other for other in others if (other.share, other.images) == (one[0].share, one[0].images)]


def worst_cases(run: RunData) -> list[WorstCase]:
    """Return the worst case behind each defense, for each dataset and model."""
    trials = run.trials
    skips = run.threshold is not None
    threshold = RECOVERED if run.threshold is None else run.threshold
    images, gains = notes(run.components), {} if skips else _gains(run)
    if RECOVERY not in trials:
        trials = trials.assign(**{RECOVERY: math.nan})
    hits = judged(trials, threshold)
    hits = hits[hits["recovered"] & ~hits["by_floor"] & ~hits["floor"].to_numpy(dtype=bool)]
    every, found = run.ensembles, []
    flaws, missing = inconclusive(every, run.components), missing_attackers(trials, run.components, threshold)
    for (dataset, model), results in groupby(every, SCENE):
        rows = []
        for one in results:
            attacker, gain = gains.get((dataset, model, one.defense), ("", None))
            by = _first_recovered(one) if skips else _most_recovered(one, hits)
            rows.append(DefenseRow(one, by, tuple(missing[dataset, model, one.defense]), gain, attacker))
        rows.sort(key=_leakage)
        here = trials[(trials["dataset"] == dataset) & (trials["model"] == model)]
        floor = floor_share(here, threshold)
        ends = [end for row in rows for end in row.gain or () if math.isfinite(end)]
        axis = (min([0.0, *ends]), max([1.0, *ends]))
        shown = None if math.isnan(floor) else floor
        words = (images.get(dataset, ""), flaws[dataset, model], caveat(here))
        failures = tuple(defense_failures(here))
        found.append(WorstCase(dataset, model, tuple(rows), shown, *axis, *words, failures))
    return found


def _leakage(row: DefenseRow) -> tuple[bool, bool, bool, float, float]:
    """Return the key that sorts defenses: failed ones last; before them the ``unranked`` ones."""
    share = row.result.share
    return (
        row.result.broken > 0,
        row.result.unranked,
        math.isnan(share),
        0.0 if math.isnan(share) else share,
        -math.inf if row.gain is None else row.gain[0],
    )


def _gains(run: RunData) -> Mapping[tuple[str, str, str], tuple[str, GainInterval]]:
    """Return (dataset, model, defense) -> the attacker that gains most under any threat model, and its gain."""
    if not any(metric.name == "psnr_aligned" for metric in run.metrics) or "psnr_aligned" not in run.results:
        return {}
    best = strongest(run.summary, "psnr_aligned")
    best = best.sort_values("gain", ascending=False, kind="stable").drop_duplicates(["dataset", "model", "defense"])
    return {
        (row["dataset"], row["model"], row["defense"]): (
            "" if row["floor"] else f"{row['attack']}, {row['threat']}",
            (row["gain"], row["low"], row["high"]),
        )
        for row in best.to_dict("records")
    }


def _first_recovered(one: EnsembleResult) -> str:
    """Return which attackers were the first to recover images, in a run that skips recovered images."""
    return ", ".join(f"{stats.attacker}: {stats.recovered}" for stats in one.attackers if stats.recovered)


def _most_recovered(one: EnsembleResult, hits: pd.DataFrame) -> str:
    """Return the three attackers that recover most, from the trials of the run that recovered their image."""
    own = hits[(hits[["dataset", "model", "defense"]] == [one.dataset, one.model, one.defense]).all(axis=1)]
    counts = own.groupby(["attack", "threat"], sort=False).size().sort_values(ascending=False, kind="stable").head(3)
    several = own["threat"].nunique() > 1
    return ", ".join(
        f"{attack}{f' ({threat})' if several else ''}: {count}"
        for attack, threat, count in counts.reset_index(name="count").itertuples(index=False, name=None)
    )


def along(value: float, low: float, high: float) -> str:
    """Return the place of a value on an axis from ``low`` to ``high``, in per cent of its width, inside a margin."""
    inside = min(max(value, low), high) if math.isfinite(value) else high
    return f"{2 + 96 * (inside - low) / ((high - low) or 1):.2f}%"
