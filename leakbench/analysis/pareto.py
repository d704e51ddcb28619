"""Utility against leakage: the points of a training study, and which of them are on the Pareto front."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from leakbench.core.files import StrictModel, first_fault
from leakbench.errors import BadOption

FILE = "tradeoff.json"
"""The name of a study's points in a run's folder."""

Proportion = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Interval(StrictModel):
    """A value with its 95 % interval, all in [0, 1]."""

    value: Proportion
    low: Proportion
    high: Proportion


class Point(StrictModel):
    """One defense at one strength.

    Attributes:
        label: how the point is called: its defense's spec.
        models: the specs under which the run has the attacked networks, one a seed.
        utility: such as the test accuracy; higher is better.
        leakage: such as the share of images recovered by the best attacker; lower is better.
    """

    label: str
    models: tuple[str, ...] = ()
    utility: Interval
    leakage: Interval


class Study(StrictModel):
    """What trainings and attacks say of utility and leakage: points that compare.

    Attributes:
        title: what is compared: dataset, model and stage of the training.
        utility: what the utility is, in words: the axis of the figure; likewise ``leakage``.
        note: how it was measured.
    """

    title: str
    utility: str
    leakage: str
    note: str = ""
    points: tuple[Point, ...]

    def front(self) -> list[Point]:
        """Return the points on the Pareto front, by utility."""
        kept = front([(point.utility.value, point.leakage.value) for point in self.points])
        return sorted((self.points[index] for index in kept), key=lambda point: point.utility.value)


class Studies(StrictModel):
    """The content of ``FILE``."""

    studies: tuple[Study, ...] = ()


def load(path: Path) -> tuple[Study, ...]:
    """Return the studies in a JSON file; none if there is no such file.

    Raises:
        BadOption: the file holds something else.
    """
    if not path.is_file():
        return ()
    try:
        return Studies.model_validate_json(path.read_bytes()).studies
    except ValidationError as error:
        raise BadOption(
            f"{path} holds no studies of utility and leakage: {first_fault(error)}; remove it, and "
            "`leakbench report` writes it again"
        ) from None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points (utility, leakage) that no other beats in one without being worse in the other.

    Args:
        points: higher utility and lower leakage are better; those with NaN are on no front.
    """

    def beaten(utility: float, leakage: float) -> bool:
        return any(
            other >= utility and less <= leakage and (other, less) != (utility, leakage) for other, less in points
        )

    return [place for place, point in enumerate(points) if not any(map(math.isnan, point)) and not beaten(*point)]
