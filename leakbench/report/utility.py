"""Utility against leakage: what a training study measured of each defense, and which are on the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leakbench.errors import BadOption

FILE = "tradeoff.json"
"""The name of a study's points in a run's folder."""

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Interval(BaseModel):
    """A value with its 95 % interval, all in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: Share
    low: Share
    high: Share


class Point(BaseModel):
    """One defense at one strength.

    Attributes:
        label: how the point is called, its defense's spec for example.
        utility: such as the test accuracy; higher is better.
        leakage: such as the share of images recovered by the best attacker; lower is better.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    label: str
    utility: Interval
    leakage: Interval


class Study(BaseModel):
    """What a training study says of utility and leakage.

    Attributes:
        utility: what the utility is, in words: the axis of the figure; likewise ``leakage``.
        note: how it was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    utility: str
    leakage: str
    note: str = ""
    points: tuple[Point, ...]


def load(path: Path) -> Study | None:
    """Return the study in a JSON file; None where there is no such file.

    Raises:
        BadOption: the file is no study.
    """
    if not path.is_file():
        return None
    try:
        return Study.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadOption(f"{path} is no study of utility and leakage: {where}: {first['msg']}; write it again") from None


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats: none leaks less at the same utility or more; by utility."""

    def beaten(one: Point) -> bool:
        return any(
            other.utility.value >= one.utility.value
            and other.leakage.value <= one.leakage.value
            and (other.utility.value, other.leakage.value) != (one.utility.value, one.leakage.value)
            for other in points
        )

    return sorted((one for one in points if not beaten(one)), key=lambda one: one.utility.value)
