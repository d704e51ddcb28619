"""``paper.md``: every figure of the FedKL paper beside those of a run, in its convention and the standard one."""

import csv
import math
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pandas as pd
from pydantic import Field

from leakbench.analysis.summary import summarise
from leakbench.core.files import StrictModel
from leakbench.core.registry import split_options
from leakbench.core.text import ABSENT, FEDKL, decimals, name_of
from leakbench.report.display import mean_text
from leakbench.report.markdown import trained
from leakbench.report.study import StudyPage
from leakbench.store.records import MetricInfo, StoredComponent

PAPER_SCORES = {"paper_mse": 2, "paper_psnr": 2, "paper_lpips_vgg": 2, "paper_lpips_alex": 2, "paper_ssim": 3}
"""The metrics of table 6 in the order of its columns, with the number of decimals that it prints."""
STANDARD_SCORES = ("psnr", "psnr_aligned", "ssim", "ssim_aligned")
GRANTED = ("paper", "T0", "T1")
"""The threat models whose rows are set beside a figure: what the paper states, and what its released code runs."""
SIDES = {"mnist": "28", "fashion-mnist": "28", "cifar10": "32", "cifar100": "32", "imagenet": "224"}
"""The side of a dataset's images if its spec states no size."""
IMAGES = "20"
"""Images that each score of the paper is a mean of."""

Printed = Annotated[str, Field(pattern=r"^-?\d+(\.\d+)?$")]
"""A figure as it is printed."""
Lock = Literal["without", "with"]
Row = TypeVar("Row", bound=StrictModel)


class PublishedScores(StrictModel):
    """A row of table 6.

    Attributes:
        attack: the attack's name here; likewise model and dataset.
        resolution: the side of the images.
        keylock: without or with key-lock.
        mse: the paper's "MSE", a root mean squared error on 0 to 255.
        psnr: the paper's "PSNR", computed from that root.
        lpips_vgg: LPIPS with VGG; likewise ``lpips_alex``, with AlexNet.
        ssim: the structural similarity.
    """

    attack: str
    model: str
    resolution: str
    dataset: str
    keylock: Lock
    mse: Printed
    psnr: Printed
    lpips_vgg: Printed
    lpips_alex: Printed
    ssim: Printed

    @property
    def scores(self) -> tuple[str, ...]:
        """The five scores, in the order of ``PAPER_SCORES``."""
        return self.mse, self.psnr, self.lpips_vgg, self.lpips_alex, self.ssim

    @property
    def place(self) -> tuple[str, ...]:
        """What a cell of a run must have for its scores to be set beside these: attack, model, dataset, side, lock."""
        return self.attack, self.model, self.dataset, self.resolution, self.keylock

    @property
    def implied(self) -> float:
        """The PSNR in dB, in the standard convention, that ``mse`` implies: a lower bound of the mean over images."""
        return 20 * math.log10(255 / float(self.mse))


class PublishedAccuracy(StrictModel):
    """A row of table 1: a test accuracy in per cent.

    Attributes:
        training: ``centralized``, ``federated``, or ``reference`` for a figure that the paper takes from elsewhere.
        keylock: without or with key-lock.
        model: the model's name here; likewise dataset.
        resolution: the side of the images.
        accuracy: in per cent.
    """

    training: Literal["centralized", "federated", "reference"]
    keylock: Lock
    model: str
    resolution: str
    dataset: str
    accuracy: Printed

    @property
    def place(self) -> tuple[str, ...]:
        """What a training must have: mode, model, dataset, side, lock."""
        return MODES[self.training], self.model, self.dataset, self.resolution, self.keylock


class PublishedSource(StrictModel):
    """A row of table 3: the accuracy of a global model that was trained behind key-lock, by the key in use.

    Attributes:
        model: the model's name here; likewise dataset.
        resolution: the side of the images.
        key_source: ``client 0`` to ``client 2``, their ``average``, or ``random``.
        accuracy: in per cent.
        gap: the accuracy minus that of ``random``, in points.
        parameter_proportion_percent: the lock's share of the model's parameters.
    """

    model: str
    resolution: str
    dataset: str
    key_source: str
    accuracy: Printed
    gap: Printed
    parameter_proportion_percent: Printed

    @property
    def place(self) -> tuple[str, ...]:
        """What a training must have: mode, model, dataset, side, lock."""
        return "fedavg", self.model, self.dataset, self.resolution, "with"


MODES = {"centralized": "centralised", "federated": "fedavg", "reference": "centralised"}
"""The mode of a training here, by its name in table 1."""


class Published(StrictModel):
    """The published figures, and the recipe of the trainings that is published with them."""

    source: ClassVar[str] = f"{FEDKL}v2"
    recipe: dict[str, Any]
    table1: tuple[PublishedAccuracy, ...]
    table3: tuple[PublishedSource, ...]
    table6: tuple[PublishedScores, ...]

    @property
    def proportions(self) -> dict[str, str]:
        """The lock's share of the parameters in per cent, by model."""
        return {one.model: one.parameter_proportion_percent for one in self.table3}


def published() -> Published:
    """Return the published figures that ship with the package."""
    folder = resources.files("leakbench") / "report"
    recipe = tomllib.loads((folder / "paper.toml").read_text(encoding="utf-8"))
    rows = {
        name: tuple(csv.DictReader((folder / f"paper-{name}.csv").read_text(encoding="utf-8").splitlines()))
        for name in ("table1", "table3", "table6")
    }
    return Published.model_validate(recipe | rows)


def place_of(specs: Mapping[Any, Any], axes: Sequence[str]) -> tuple[str, ...]:
    """Return what is compared with a published place: names of components, the images' side, and without or with lock.

    Args:
        specs: the specs of a cell or a training, by axis.
        axes: the axes whose names come first; ``dataset`` is the last one of them.
    """
    lock = {"none": "without", "keylock": "with"}.get(name_of(str(specs["defense"])), "")
    return (*(name_of(str(specs[axis])) for axis in axes), _side(str(specs["dataset"])), lock)


def _side(spec: str) -> str:
    """Return the side of a dataset's images, from its spec; empty if the spec does not state it."""
    name, bracket, options = spec.partition("(")
    stated = split_options(options.removesuffix(")"), spec) if bracket and options.endswith(")") else {}
    return stated.get("size", SIDES.get(name.strip(), ""))


def study(
    results: pd.DataFrame, metrics: Sequence[MetricInfo], paper: Published, components: Sequence[StoredComponent] = ()
) -> StudyPage:
    """Return ``paper.md``, the comparison with table 6; it depends on nothing but its arguments."""
    shown = [metric for metric in metrics if metric.name in (*PAPER_SCORES, *STANDARD_SCORES)]
    summary = summarise(results, shown)
    cells = summary[~summary["floor"].astype(bool)]
    places = PAPER_SCORES | {name: decimals(cells[name]) for name in STANDARD_SCORES if name in cells}
    beside: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    others = []
    wanted = {one.place for one in paper.table6}
    for row in cells.to_dict("records"):
        place = place_of(row, ("attack", "model", "dataset"))
        scores = {name: mean_text(row, name, digits) for name, digits in places.items()}
        names = {axis: row[axis] for axis in ("attack", "model", "dataset", "defense", "threat", "n", "failed")}
        if place in wanted and row["threat"] in GRANTED:
            beside.setdefault(place, []).append(names | scores)
        else:
            others.append(names | scores)
    own = {place: _merged(rows) for place, rows in beside.items()}
    return StudyPage(
        "paper.md",
        {
            "source": paper.source,
            "scores": [line for one in paper.table6 for line in _scores(one, own.get(one.place, ()))],
            "standard": [line for one in paper.table6 for line in _standard(one, own.get(one.place, ()))],
            "others": [_ours(one, (*PAPER_SCORES, *STANDARD_SCORES)) for one in others],
            "missing": sum(one.place not in own for one in paper.table6),
            "count": len(paper.table6),
            "trained": trained(components),
        },
    )


def _merged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows, those that differ only in the threat model as one: without a defense nothing is granted."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(value for axis, value in row.items() if axis != "threat"), []).append(row)
    return [one[0] | {"threat": ", ".join(row["threat"] for row in one)} for one in found.values()]


def _cell(one: PublishedScores) -> dict[str, object]:
    return {
        "attack": one.attack,
        "model": one.model,
        "dataset": f"{one.dataset}, {one.resolution}",
        "key-lock": one.keylock,
    }


HEADINGS = dict(zip(PAPER_SCORES, ("MSE", "PSNR", "LPIPS VGG", "LPIPS AlexNet", "SSIM")))
"""The paper's headings, by the metric here."""


def _ours(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, object]:
    """Return a cell of the run: specs, counts, and the scores by the paper's headings or by their own."""
    specs = {axis: row[axis] for axis in ("attack", "model", "dataset", "defense", "threat")}
    counts = {"n": row["n"], "failed": row["failed"]}
    return specs | counts | {HEADINGS.get(name, name): row.get(name, "") for name in names}


def _beside(
    one: PublishedScores, rows: Sequence[Mapping[str, Any]], listed: Mapping[str, object]
) -> list[dict[str, object]]:
    """Return the paper's line, and a line for each cell of the run beside it."""
    blank: dict[str, object] = dict.fromkeys(_cell(one), "")
    found = [_cell(one) | {"from": "paper", "settings": "", "threat": "", "n": IMAGES, "failed": ""} | dict(listed)]
    for row in rows:
        settings = ", ".join(str(row[axis]) for axis in ("attack", "model", "dataset", "defense"))
        counts = {"threat": row["threat"], "n": row["n"], "failed": row["failed"]}
        scores = {heading: row.get(name, "") for name, heading in HEADINGS.items() if heading in listed}
        scores |= {name: row.get(name, "") for name in STANDARD_SCORES if name in listed}
        found.append(blank | {"from": "this run", "settings": settings} | counts | scores)
    if not rows:
        found.append(blank | {"from": "not in this run"})
    return found


def _scores(one: PublishedScores, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    return _beside(one, rows, dict(zip(HEADINGS.values(), one.scores)))


def _standard(one: PublishedScores, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """The same lines in the standard convention; only lines with a cell of the run."""
    implied = dict.fromkeys(STANDARD_SCORES, ABSENT) | {"psnr": f"at least {one.implied:.1f}"}
    return _beside(one, rows, implied) if rows else []
