"""The head of a report: commands, times, devices and versions of a run."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from leakbench.core.text import number
from leakbench.report.page import render_markdown
from leakbench.store.records import RunSession


def about(sessions: Sequence[RunSession], results: pd.DataFrame, planned: int) -> str:
    """Return the table of a run's starts in Markdown; arguments are those of ``facts``."""
    return render_markdown("about.md.j2", facts=facts(sessions, results, planned), mixed=mixed(sessions)).rstrip()


def facts(sessions: Sequence[RunSession], results: pd.DataFrame, planned: int) -> list[tuple[str, str]]:
    """Return labels and words on a run's starts: trials, time, commands, versions and devices.

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
        label = "" if len(sessions) == 1 else f", start {session.id}"
        words = {
            "command": session.provenance.command,
            "time": f"{session.started} to {session.ended or 'an unknown end, because it was interrupted'}",
            **session.provenance.describe(),
        }
        found += [(f"{name}{label}", text) for name, text in words.items()]
    return found


def mixed(sessions: Sequence[RunSession]) -> bool:
    """Return whether the starts were made by different versions of leakbench."""
    return len({session.provenance.code for session in sessions}) > 1
