"""``paper.md``: the figures of the FedKL paper beside those of a run, in its convention and the standard one."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Annotated, Any, ClassVar

import pandas as pd
from pydantic import Field

from leakbench.analysis.summary import summarise
from leakbench.core.files import StrictModel
from leakbench.core.text import ABSENT, FEDKL, decimals, name_of
from leakbench.report.display import mean_text
from leakbench.report.markdown import trained
from leakbench.report.study import StudyPage
from leakbench.store.records import MetricInfo, StoredComponent

_AXES = ("attack", "model", "dataset", "defense")
_OURS = ("paper_mse", "paper_psnr", "psnr", "psnr_aligned", "ssim")
_Positive = Annotated[float, Field(gt=0)]


class PublishedFigure(StrictModel):
    """One cell of a published table; a value that was not transcribed is None.

    Attributes:
        table: the table's number in the paper.
        page: its page.
        attack: the attack's name here; likewise model, dataset and defense.
        mse: the paper's "MSE", a root mean squared error on 0 to 255.
        psnr: the paper's "PSNR", computed from that root.
        standard: the PSNR in dB, in the standard convention, that ``mse`` implies.
    """

    table: str
    page: int | None = None
    attack: str
    model: str
    dataset: str
    defense: str
    mse: _Positive | None = None
    psnr: _Positive | None = None
    standard: _Positive | None = None


class PublishedAccuracy(StrictModel):
    """A published test accuracy.

    Attributes:
        table: the table's number in the paper.
        mode: ``centralised`` or ``fedavg``.
        model: the model's name here; likewise dataset and defense.
        of: the network or the secrets that the accuracy is of.
        percent: as printed.
    """

    table: str
    mode: str
    model: str
    dataset: str
    defense: str
    of: str
    percent: _Positive


class Published(StrictModel):
    """The published figures, their source, and the recipe of the trainings that is published with them."""

    source: ClassVar[str] = f"{FEDKL}v2"
    recipe: dict[str, Any]
    figure: tuple[PublishedFigure, ...]
    accuracy: tuple[PublishedAccuracy, ...]


def published() -> Published:
    """Return the published figures that ship with the package."""
    text = (resources.files("leakbench") / "report" / "paper.toml").read_text(encoding="utf-8")
    return Published.model_validate(tomllib.loads(text))


def study(
    results: pd.DataFrame, metrics: Sequence[MetricInfo], paper: Published, components: Sequence[StoredComponent] = ()
) -> StudyPage:
    """Return ``paper.md``, the comparison; it depends on nothing but its arguments."""
    summary = summarise(results, [metric for metric in metrics if metric.name in _OURS])
    cells = summary[~summary["floor"].astype(bool)]
    places = {metric.name: decimals(cells[metric.name]) for metric in metrics if metric.name in cells}
    ours: dict[tuple[str, ...], list[dict[str, object]]] = {}
    for row in cells.to_dict("records"):
        names = {f"our {axis}": row[axis] for axis in _AXES}
        counts = {"threat model": row["threat"], "n": row["n"], "failed": row["failed"]}
        means = {f"our {name}": mean_text(row, name, place) for name, place in places.items()}
        ours.setdefault(_names(row), []).append(names | counts | means)
    missing: list[dict[str, object]] = [{"our attack": "not in this run"}]
    rows = [_printed(one) | own for one in paper.figure for own in ours.get(_names(one.model_dump()), missing)]
    published = {_names(one.model_dump()) for one in paper.figure}
    others = [own for names, group in ours.items() if names not in published for own in group]
    rows += [dict.fromkeys(_printed(paper.figure[0]), ABSENT) | own for own in others]
    return StudyPage("paper.md", {"source": paper.source, "rows": rows, "trained": trained(components)})


def _names(specs: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the names of a cell's components, without their options."""
    return tuple(name_of(str(specs[axis])) for axis in _AXES)


def _printed(one: PublishedFigure) -> dict[str, object]:
    """Return a published figure as cells."""
    return {
        "table": one.table,
        "page": one.page or ABSENT,
        **{axis: getattr(one, axis) for axis in _AXES},
        "paper's MSE": ABSENT if one.mse is None else f"{one.mse:.2f}",
        "paper's PSNR": ABSENT if one.psnr is None else f"{one.psnr:.2f}",
        "implied psnr": ABSENT if one.standard is None else f"{one.standard:.1f}",
    }
