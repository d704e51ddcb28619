"""What a run sends to an experiment tracker, and the interface of one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pandas as pd


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker knows it.

    Attributes:
        name: the run's name.
        id: 16 hex digits, the same each time the run is resumed.
        config: its axes, versions and command line, as text.
        folder: its folder.
    """

    name: str
    id: str
    config: Mapping[str, str]
    folder: Path


@dataclass(frozen=True)
class RunOutcome:
    """What a run found, once all of its trials are finished and its report is written.

    Attributes:
        step: the number of finished trials.
        shares: the share of images in [0, 1] that any attacker recovers, by defense.
        table: the results, one row a trial.
        pictures: the heat maps, galleries and grids, as PNG files.
        pages: the report and the results, as Markdown and CSV files.
    """

    step: int
    shares: Mapping[str, float]
    table: pd.DataFrame
    pictures: Sequence[Path]
    pages: Sequence[Path]


class Tracker(ABC):
    """One run in one experiment tracker. Any exception of a method ends the tracking, and never the run."""

    @classmethod
    @abstractmethod
    def open(cls, run: TrackedRun) -> Self:
        """Begin to track a run, or resume the tracking of one of this id."""

    @abstractmethod
    def log(self, step: int, scores: Mapping[str, float]) -> None:
        """Record the scores of a trial; ``step`` counts the finished trials of the run."""

    @abstractmethod
    def finish(self, outcome: RunOutcome) -> None:
        """Record what the run found."""

    @abstractmethod
    def close(self, *, completed: bool) -> None:
        """End the tracking; ``completed`` is False if the run was stopped or failed."""
