"""``results.csv``: one row per trial."""

from __future__ import annotations

import pandas as pd

from leakbench.store import AFTER, BEFORE


def csv(results: pd.DataFrame) -> str:
    """Return the results as CSV: ``BEFORE``, the metrics, then reason, objective and evaluations."""
    metrics = [column for column in results.columns if column not in BEFORE + AFTER]
    columns = [*BEFORE, *metrics, "reason", "objective", "evaluations"]
    return str(results[columns].to_csv(index=False, lineterminator="\n"))
