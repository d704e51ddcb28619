"""The trials that are errors of their defense: they say nothing about what it protects."""

from dataclasses import dataclass

import pandas as pd

from leakbench.errors import DEFENSE_FAILED


@dataclass(frozen=True)
class DefenseFailure:
    """A defense that failed.

    Attributes:
        defense: its spec.
        failed: the trials in which it failed, those of floors included.
        trials: all that have ended.
        reason: of the first of these trials.
    """

    defense: str
    failed: int
    trials: int
    reason: str


def defense_failed(trials: pd.DataFrame) -> pd.Series:
    """Return for each trial whether it is an error of its defense: it raised one, or sent no gradient."""
    return (trials["status"] == "error") & trials["reason"].str.startswith(DEFENSE_FAILED)


def defense_failures(trials: pd.DataFrame) -> list[DefenseFailure]:
    """Return each defense that failed in some of these trials, in their order."""
    ended = trials[trials["status"] != ""]
    found = []
    for defense, own in ended.groupby("defense", sort=False):
        reasons = own.loc[defense_failed(own), "reason"].tolist()
        if reasons:
            first = reasons[0].removeprefix(DEFENSE_FAILED)
            found.append(DefenseFailure(str(defense), len(reasons), len(own), first))
    return found
