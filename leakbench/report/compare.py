"""``paper.md``: the figures of the FedKL paper beside those of a run, in its convention and the standard one."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources
from typing import Annotated

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from leakbench.analysis.summary import summarise
from leakbench.core.text import ABSENT, decimals, number, with_interval
from leakbench.report.markdown import trained
from leakbench.report.md import escape, table
from leakbench.store.records import MetricInfo, StoredComponent

_OURS = ("paper_mse", "paper_psnr", "psnr", "psnr_aligned", "ssim")
Positive = Annotated[float, Field(gt=0)]


class Figure(BaseModel):
    """One cell of a published table; what was not transcribed is None.

    Attributes:
        table: the table's number in the paper.
        page: its page.
        attack: the attack's name here; likewise model, dataset and defense.
        mse: the paper's "MSE", a root mean squared error on 0 to 255.
        psnr: the paper's "PSNR", computed from that root.
        standard: the PSNR in dB, in the standard convention, that ``mse`` implies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    table: str
    page: int | None = None
    attack: str
    model: str
    dataset: str
    defense: str
    mse: Positive | None = None
    psnr: Positive | None = None
    standard: Positive | None = None


class Accuracy(BaseModel):
    """A published test accuracy.

    Attributes:
        table: the table's number in the paper.
        mode: ``centralised`` or ``fedavg``.
        model: the model's name here; likewise dataset and defense.
        of: of what.
        percent: as printed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    table: str
    mode: str
    model: str
    dataset: str
    defense: str
    of: str
    percent: Positive


class Published(BaseModel):
    """The published figures and where they are from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: str
    figure: tuple[Figure, ...]
    accuracy: tuple[Accuracy, ...]


def published() -> Published:
    """Return the published figures that ship with the package."""
    text = (resources.files("leakbench") / "report" / "paper.toml").read_text(encoding="utf-8")
    return Published.model_validate(tomllib.loads(text))


def markdown(
    results: pd.DataFrame, metrics: Sequence[MetricInfo], paper: Published, components: Sequence[StoredComponent] = ()
) -> str:
    """Return the comparison; it depends on nothing but its arguments."""
    parts = ["# Beside the paper", f"Figures of {escape(paper.source)}.", _WORDS]
    ours = [metric for metric in metrics if metric.name in _OURS]
    summary = summarise(results, ours)
    cells = summary[~summary["floor"].astype(bool)]
    names = [metric.name for metric in ours if metric.name in cells]
    places = {name: decimals(cells[name]) for name in names}
    headers = ["table", "page", "attack", "model", "dataset", "defense", "paper's MSE", "paper's PSNR", "implied psnr"]
    headers += ["ours: attack", "model", "dataset", "defense", "threat model", "n", "failed"]
    headers += [f"ours: {escape(name)}" for name in names]
    rows = []
    matched = pd.Series(data=False, index=cells.index)
    for figure in paper.figure:
        left = [figure.table, _given(figure.page), figure.attack, figure.model, figure.dataset, figure.defense]
        left += [_given(figure.mse, ".2f"), _given(figure.psnr, ".2f"), _given(figure.standard, ".1f")]
        fits = _fits(cells, figure)
        matched |= fits
        rows += [[*left, *_ours(row, places)] for _, row in cells[fits].iterrows()]
        if not fits.any():
            rows.append([*left, "not in this run", *[""] * (len(headers) - len(left) - 1)])
    rows += [[*[ABSENT] * 9, *_ours(row, places)] for _, row in cells[~matched].iterrows()]
    parts.append(table(headers, rows, left=len(headers)))
    parts += [f"{escape(model)}: {words}" for model, words in trained(components).items()]
    return "\n\n".join(parts) + "\n"


_WORDS = f"""\
**paper's MSE** and **paper's PSNR** are as the paper lists them: its "MSE" is a root mean squared error on 0 to \
255 and its "PSNR" is computed from that root; set them beside **paper\\_mse** and **paper\\_psnr** alone. \
**implied psnr** is what the listed MSE says in the standard convention (20 log10(255/MSE), a lower bound of the \
mean over images); set it beside **psnr**. {ABSENT} on the left is a figure that was not transcribed, or that \
the paper does not have (arms and threat models of this run that it did not test); it is never filled in. \
Brackets are 95 % bootstrap intervals over images.

What to keep in mind: the paper's two arms differ in more than the lock (shortcuts, activations, normalisation), \
its attacker knows the lock's weights (T1 here), it scores single runs on 20 images, and reconstructions outside \
[0, 1] wrap around when they are stored. Here the arms differ in the defense alone; **norm-only** is the lock's \
normalisation without its secret."""


def _fits(cells: pd.DataFrame, figure: Figure) -> pd.Series:
    fits = pd.Series(data=True, index=cells.index)
    for axis in ("attack", "model", "dataset", "defense"):
        fits &= cells[axis].str.partition("(")[0] == getattr(figure, axis)
    return fits


def _given(value: float | None, code: str = "g") -> str:
    return ABSENT if value is None else format(value, code)


def _ours(row: pd.Series, places: dict[str, int | None]) -> list[str]:
    cells = [escape(row[axis]) for axis in ("attack", "model", "dataset", "defense", "threat")]
    cells += [str(row["n"]), str(row["failed"])]
    for name, place in places.items():
        text = with_interval(row[name], row[f"{name} low"], row[f"{name} high"], place)
        cells.append(text or number(row[name], place))
    return cells
