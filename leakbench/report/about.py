"""What was run, when, where and with which versions: the head of a report."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from leakbench.core.text import ABSENT, number
from leakbench.report.md import escape, table
from leakbench.store.records import RunSession

MIXED = "This run mixes versions of leakbench"
"""What a report warns of where starts of a run were of different versions."""


def about(sessions: Sequence[RunSession], results: pd.DataFrame, planned: int) -> str:
    """Return the table of a run's starts in Markdown; arguments are those of ``facts``."""
    rows = [[label, escape(words)] for label, words in facts(sessions, results, planned)]
    head = table(["run", ""], rows, left=2)
    return f"{head}\n\n**{MIXED}**: trials of different starts may not compare." if mixed(sessions) else head


def facts(sessions: Sequence[RunSession], results: pd.DataFrame, planned: int) -> list[tuple[str, str]]:
    """Return what is said of a run's starts: labels and words.

    Args:
        sessions: every start of the run.
        results: one row per trial with a result (``Store.results``).
        planned: how many trials were planned.
    """
    counts = results["status"].value_counts()
    statuses = ", ".join(f"{counts[s]} {s}" for s in ("ok", "failed", "unsupported", "error") if s in counts)
    ended = f"{len(results)} of {planned} planned" + (f" ({statuses})" if statuses else "")
    found = [("trials", ended), ("time in trials", f"{number(results['seconds'].sum(), 1)} s")]
    for session in sessions:
        source = session.provenance
        commit = "no checkout" if source.commit is None else f"commit {source.commit[:12]}"
        dirty = " with uncommitted changes" if source.dirty else ""
        packages = ", ".join(f"{name} {version}" for name, version in source.packages.items())
        label = "" if len(sessions) == 1 else f", start {session.id}"
        found += [
            (f"command{label}", source.command),
            (f"time{label}", f"{session.started} to {session.ended or 'an unknown end: it was interrupted'}"),
            (f"device{label}", f"{source.device}, {source.threads} CPU threads"),
            (f"versions{label}", f"leakbench {source.version} ({commit}{dirty}), Python {source.python}"),
            (f"packages{label}", packages or ABSENT),
        ]
    return found


def mixed(sessions: Sequence[RunSession]) -> bool:
    """Return whether the starts were of different versions of leakbench."""
    return len({(s.provenance.version, s.provenance.commit, s.provenance.dirty) for s in sessions}) > 1
