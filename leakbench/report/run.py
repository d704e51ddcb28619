"""All of a run that a report shows, read from its file once, and the head of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import pandas as pd

from leakbench.analysis.ensemble import RECOVERED, EnsembleResult, ensemble_results
from leakbench.analysis.summary import STATUSES, rescored, summarise
from leakbench.core.text import english, number
from leakbench.plan.matrix import RECOVERY
from leakbench.plan.trial import split_label
from leakbench.report.page import render_markdown
from leakbench.store.frames import AFTER, BEFORE, ended
from leakbench.store.records import (
    MetricInfo,
    Pictures,
    PluginFile,
    RunSession,
    StoredComponent,
    run_name,
    threshold_of,
)
from leakbench.store.run_file import Store

_FEW = 3
"""With more starts than these, their times are one line."""
UNSALTED = "none: the keys were not salted, so that an attack could have read dataset and image from them"
"""The words on a run of before there were salts."""

PicturesOf = Callable[[Sequence[str]], Mapping[str, Pictures]]
"""From trials to their pictures (``Store.images``)."""

ObjectiveCurves = Mapping[str, Sequence[tuple[int, float]]]
"""By trial: the objective at some evaluations (``Store.curves``)."""


@dataclass(frozen=True)
class Picture:
    """A grid that the report shows: the block that it belongs to, its path from the report, its title and its seed."""

    block: tuple[str, str, str]
    path: str
    title: str
    seed: int = 0


@dataclass(frozen=True)
class RunData:
    """All of a run that a report shows.

    Attributes:
        name: the run's name.
        trials: every planned trial in the order of planning (``Store.trials``).
        threats: (threat model, dataset's label) -> what it grants, in words (``Store.threats``).
        components: what each spec stands for.
        plugins: the files of components that are not part of leakbench.
        controls: every planned trial of a control (``Store.controls``).
    """

    name: str
    sessions: Sequence[RunSession]
    trials: pd.DataFrame
    metrics: Sequence[MetricInfo]
    threats: Mapping[tuple[str, str], str]
    components: Sequence[StoredComponent] = ()
    plugins: Sequence[PluginFile] = ()
    controls: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*BEFORE, *AFTER]))
    findings: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["trial", "name", "value"]))

    @property
    def threshold(self) -> float | None:
        """The score from which on an image counted as recovered and was skipped; None if every trial was run."""
        return threshold_of(self.sessions)

    @classmethod
    def of(cls, store: Store, folder: str) -> RunData:
        """Return what a report shows of an open run; ``folder`` is the name of a run that has none of its own."""
        sessions, metrics, threats = store.sessions(), store.metrics(), store.threats()
        parts = (store.components(), store.plugins(), store.controls(), store.findings())
        return cls(run_name(sessions, folder), sessions, store.trials(), metrics, threats, *parts)

    @cached_property
    def grants(self) -> Mapping[str, Mapping[str, str]]:
        """Threat model -> what it grants, in words -> the clients of whom it is said; empty if of all."""
        found: dict[str, dict[str, list[str]]] = {}
        for (threat, dataset), words in self.threats.items():
            client = split_label(dataset)[1] or "clients of one image"
            clients = found.setdefault(threat, {}).setdefault(words, [])
            clients += [] if client in clients else [client]
        return {
            threat: {words: english(clients) if len(kinds) > 1 else "" for words, clients in kinds.items()}
            for threat, kinds in found.items()
        }

    @cached_property
    def results(self) -> pd.DataFrame:
        """One row per trial with a result (``Store.results``), failed ones with a floor's scores (``rescored``)."""
        return rescored(ended(self.trials), self.metrics)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per cell, with the columns of every metric (``summarise``)."""
        return summarise(self.results, self.metrics)

    @cached_property
    def ensembles(self) -> Sequence[EnsembleResult]:
        """What all attackers together recover (``ensemble_results``), by ``RECOVERED`` in a run without a threshold."""
        trials = self.trials if RECOVERY in self.trials else self.trials.assign(**{RECOVERY: math.nan})
        return ensemble_results(trials, RECOVERED if self.threshold is None else self.threshold)

    @cached_property
    def planned(self) -> int:
        """How many trials were planned, without those that are skipped."""
        skips = () if self.threshold is None else self.ensembles
        return len(self.trials) - sum(stats.skipped for one in skips for stats in one.attackers)

    @property
    def mixed(self) -> bool:
        """Whether the starts were made by different versions of leakbench."""
        return len({session.provenance.code for session in self.sessions}) > 1

    def facts(self) -> list[tuple[str, str]]:
        """Return labels and words on the run's starts: trials, time, commands, versions and devices."""
        counts = self.results["status"].value_counts()
        statuses = ", ".join(f"{counts[status]} {status}" for status in STATUSES if status in counts)
        ended = f"{len(self.results)} of {self.planned} planned" + (f" ({statuses})" if statuses else "")
        found = [("trials", ended), ("time in trials", f"{number(self.results['seconds'].sum(), 1)} s")]
        found += _start_facts(self.sessions)
        if self.plugins:
            found.append(("not part of leakbench", "; ".join(one.words for one in self.plugins)))
        return found

    def about(self) -> str:
        """Return the table of the run's starts in Markdown."""
        return render_markdown("about.md.j2", facts=self.facts(), mixed=self.mixed).rstrip()


def _start_facts(sessions: Sequence[RunSession]) -> list[tuple[str, str]]:
    """Return labels and words on when, by what and where a run was started; what several starts share is said once."""
    by_name: dict[str, dict[str, list[int]]] = {}
    for session in sessions:
        provenance = session.provenance
        words = {"command": provenance.command, **provenance.describe(), "salt": provenance.salt or UNSALTED}
        for name, text in words.items():
            by_name.setdefault(name, {}).setdefault(text, []).append(session.id)
    times = [f"{one.started} to {one.ended or 'an unknown end, because it was interrupted'}" for one in sessions]
    found = [
        ("time" if len(times) == 1 else f"time, start {one.id}", text)
        for one, text in zip(sessions, times, strict=True)
    ]
    if len(sessions) > _FEW:
        interrupted = sum(one.ended is None for one in sessions)
        cut = f", {interrupted} of them interrupted" if interrupted else ""
        last = max(one.ended or one.started for one in sessions)
        found = [("time", f"{sessions[0].started} to {last}: {len(sessions)} starts{cut}")]
    for name, texts in by_name.items():
        for text, ids in texts.items():
            found.append((name if len(ids) == len(sessions) else f"{name}, {_named_starts(ids)}", text))
    return found


def _named_starts(ids: Sequence[int]) -> str:
    """Return the numbers of starts in words: ``start 3``, ``starts 1 to 4 and 6``."""
    runs = [[one for _, one in run] for _, run in groupby(enumerate(ids), lambda pair: pair[1] - pair[0])]
    words = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return ("start " if len(ids) == 1 else "starts ") + english(words)
