"""``tradeoff.md``: utility against leakage, one point a defense, with intervals and the Pareto front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from leakbench.analysis import pareto
from leakbench.analysis.recovery import caveat, judged
from leakbench.analysis.statistics import UNIT, bootstrap_interval
from leakbench.analysis.summary import rescored
from leakbench.analysis.verdict import CONTROL, control_flaw
from leakbench.core.text import name_of, slug
from leakbench.errors import CorruptAsset
from leakbench.plan.matrix import RECOVERY
from leakbench.report.accuracy import interval
from leakbench.report.figure import GREY, key_below, plain, saved
from leakbench.report.files import replace
from leakbench.report.page import render_markdown, sentence
from leakbench.report.study import Value
from leakbench.report.utility import draw_points
from leakbench.store.run_file import FILE as RUN
from leakbench.store.run_file import Store
from leakbench.training import TrainingRecord, records
from leakbench.training.tradeoff import TARGETS_FILE, Target, targets_of

FILE = "tradeoff.md"
"""The name of the report in a run's folder."""
DISTANCE = "lpips_vgg"
"""The distance that is drawn beside the share of images recovered, if its weights are available."""

_UNITS = {
    "recovered": "images recovered, %",
    "LPIPS": "LPIPS (VGG) of the best reconstruction\n(less is nearer: it leaks more)",
}


@dataclass(frozen=True)
class AttackedDefense:
    """A defense at one stage of its training: a point of the figure.

    Attributes:
        defense: its spec.
        accuracy: of the trained network on the test images, in [0, 1].
        before: that of the attacked checkpoint.
        share: the share of the attacked images that at least one attacker recovered, in [0, 1].
        distance: the mean over images of the least ``lpips_vgg`` of any attacker; NaN without its weights.
        images: how many images were attacked, seeds counted separately, without those that a floor recovers.
        groups: how many groups they are in; as many as there are images if each is its own.
        by_floor: how many are left out, since a floor recovers them.
        strongest: the attack that recovered most images; empty if none recovered any.
        failed: trials that ended without a score.
        models: the specs under which the run has the attacked checkpoints, one per seed.
    """

    defense: str
    accuracy: Value
    before: float
    share: Value
    distance: Value
    images: int
    groups: int
    by_floor: int
    strongest: str
    failed: int
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttackedStage:
    """The points that compare: those of one dataset, model and stage; and the least distance of a floor."""

    dataset: str
    model: str
    stage: str
    points: tuple[AttackedDefense, ...]
    floor: float
    caveat: str = ""

    @property
    def inconclusive(self) -> str:
        """Why no defense can be called better than another, in one sentence; empty if one can."""
        return control_flaw([point.share.mean for point in self.points if name_of(point.defense) == CONTROL])

    def leakages(self) -> dict[str, list[Value]]:
        """Return the measures of leakage by name, each with the value of every point."""
        found = {"recovered": [point.share for point in self.points]}
        distances = [point.distance for point in self.points]
        return found if all(math.isnan(value.mean) for value in distances) else found | {"LPIPS": distances}

    def front(self, name: str) -> list[int]:
        """Return the places of the points on the front of utility and a measure of leakage.

        A larger distance is less leakage, up to that of the best floor, which leaks nothing.
        """
        most = math.inf if math.isnan(self.floor) else self.floor
        leakages = [value.mean if name == "recovered" else -min(value.mean, most) for value in self.leakages()[name]]
        return pareto.front([(point.accuracy.mean, leakage) for point, leakage in zip(self.points, leakages)])


def write(out: Path | str) -> list[Path]:
    """Write ``tradeoff.md`` with ``tradeoff/*.png`` from the trainings and the run in ``out``; return paths.

    The points are also written to ``tradeoff.json``, from which the page of the run, its figures and a leaderboard take
    them.

    Raises:
        CorruptAsset: there is no trade-off in ``out``.
        ForeignRun: there is no readable run file in ``out``.
    """
    out = Path(out)
    threshold, targets = targets_of(out)
    with Store.open(out / RUN, readonly=True) as store:
        results = rescored(store.results(), store.metrics())
    found = records(out)
    stages = attacked_stages(results, found, targets, threshold)
    written = [replace(out / pareto.FILE, studies(stages, threshold).model_dump_json(indent=1).encode() + b"\n")]
    pictures = []
    for index, names in enumerate(dict.fromkeys((stage.dataset, stage.model) for stage in stages), 1):
        group = [stage for stage in stages if (stage.dataset, stage.model) == names]
        file = f"tradeoff/tradeoff-{index:02}-{slug(names)}.png"
        written.append(replace(out / file, saved(figure(group))))
        pictures.append((file, f"{names[1]} on {names[0]}", group))
    text = render_markdown(
        "tradeoff.md.j2",
        name=out.resolve().name,
        threshold=threshold,
        pictures=pictures,
        missing=left_out(found, targets),
    )
    return [*written, replace(out / FILE, text.encode())]


def has_points(out: Path) -> bool:
    """Return whether a run's folder holds a trade-off."""
    return (out / TARGETS_FILE).exists()


def attacked_stages(
    results: pd.DataFrame, found: Sequence[TrainingRecord], targets: Sequence[Target], threshold: float
) -> list[AttackedStage]:
    """Return the points by dataset, model and stage, in the order in which they were run."""
    results = judged(results, threshold)
    by_folder = {one.folder.name: one for one in found}
    grouped: dict[tuple[str, str, str], dict[str, list[Target]]] = {}
    for target in targets:
        one = by_folder.get(target.arm)
        if one is None:
            raise CorruptAsset(f"the training {target.arm!r} that was attacked is gone; start the trade-off again")
        key = (one.specs["dataset"], one.specs["model"], target.stage)
        grouped.setdefault(key, {}).setdefault(target.defense, []).append(target)
    stages = []
    for (dataset, model, stage), arms in grouped.items():
        floors = results[results["model"].isin([t.model for own in arms.values() for t in own]) & results["floor"]]
        floor = float(floors.groupby("attack")[DISTANCE].mean().min()) if DISTANCE in floors else math.nan
        points = [_point(results, own, [by_folder[one.arm] for one in own]) for own in arms.values()]
        own = results[results["model"].isin([t.model for targets in arms.values() for t in targets])]
        stages.append(AttackedStage(dataset, model, stage, tuple(points), floor, caveat(own)))
    return stages


def _point(results: pd.DataFrame, targets: Sequence[Target], arms: Sequence[TrainingRecord]) -> AttackedDefense:
    """Return the point of a defense from the judged results of the run."""
    models = [target.model for target in targets]
    own = results[results["model"].isin(models) & (results["defense"] == targets[0].defense) & ~results["floor"]]
    scored = own[own["status"].isin(["ok", "failed"])]
    measured = scored[scored[RECOVERY].notna()]  # images of fewer than 11 pixels a side have no SSIM
    counted = measured[~measured["by_floor"]]
    hits = counted.groupby(["model", *UNIT])["recovered"].any()
    images, groups = (counted[level].nunique() for level in ("image", "group"))
    distance = Value()
    if DISTANCE in scored and scored[DISTANCE].notna().any():
        least = scored.groupby(["model", *UNIT])[DISTANCE].min().dropna()
        units = (least.index.get_level_values(level).to_numpy() for level in ("image", "group"))
        distance = Value(float(least.mean()), *bootstrap_interval(least.to_numpy(), *units))
    by = counted.loc[counted["recovered"], "attack"].value_counts().sort_index()
    return AttackedDefense(
        defense=targets[0].defense,
        accuracy=interval(arms),
        before=float(np.mean([target.accuracy for target in targets])),
        share=Value.of_share(hits),
        distance=distance,
        images=len(hits),
        groups=len(hits) if images == groups else groups,
        by_floor=len(measured[measured["by_floor"]].drop_duplicates(["model", *UNIT])),
        strongest="" if by.empty else str(by.idxmax()),
        failed=int((~own["status"].isin(["ok", "failed", "unsupported"])).sum()),
        models=tuple(models),
    )


def left_out(found: Sequence[TrainingRecord], targets: Sequence[Target]) -> list[str]:
    """Return a line on each training without a checkpoint of a stage at which others were attacked, with the reason."""
    attacked = {(target.arm, target.stage) for target in targets}
    lines = []
    for one in found:
        for stage in dict.fromkeys(target.stage for target in targets):
            if (one.folder.name, stage) not in attacked:
                why = f"{one.outcome.status}: {one.outcome.reason}" if one.outcome.reason else "not in this study"
                lines.append(f"{one.specs['defense']}, seed {one.seed}, stage {stage}: {why}")
    return lines


def studies(stages: Sequence[AttackedStage], threshold: float) -> pareto.Studies:
    """Return the points of every stage that have an accuracy and a share of images recovered."""
    return pareto.Studies(
        studies=tuple(
            pareto.Study(
                title=f"{stage.dataset} · {stage.model} · stage {stage.stage}",
                utility="test accuracy of the trained network",
                leakage="images recovered by at least one attacker",
                note=sentence("tradeoff.note.j2", "note", stage, threshold),
                points=tuple(
                    pareto.Point(
                        label=point.defense,
                        models=point.models,
                        utility=_interval(point.accuracy),
                        leakage=_interval(point.share),
                    )
                    for point in stage.points
                    if not (math.isnan(point.accuracy.mean) or math.isnan(point.share.mean))
                ),
            )
            for stage in stages
        )
    )


def _interval(value: Value) -> pareto.Interval:
    return pareto.Interval(value=value.mean, low=value.low, high=value.high)


def figure(stages: Sequence[AttackedStage]) -> Figure:
    """Return utility against leakage: a column for each stage, a row for each measure of leakage."""
    rows = max((list(stage.leakages()) for stage in stages), key=len)
    drawn = Figure(figsize=(max(8.4, 5.6 * len(stages)), 3.9 * len(rows) + 1.2), layout="constrained")
    panels = drawn.subplots(len(rows), len(stages), squeeze=False, sharex=True, sharey="row")
    for stage, column in zip(stages, panels.T):
        labels = [point.defense for point in stage.points]
        utility = 100 * np.array([point.accuracy for point in stage.points])
        for name, values in stage.leakages().items():
            panel = column[rows.index(name)]
            shown = np.array(values) * (100 if name == "recovered" else 1)
            draw_points(
                panel, labels, utility, shown, stage.front(name), inverted=name == "LPIPS"
            )  # leaks more: upwards
            if name == "LPIPS" and not math.isnan(stage.floor):
                panel.axhline(stage.floor, color=GREY, linestyle="--", linewidth=1)
        column[0].set_title(plain(f"attacked at stage: {stage.stage}"), fontsize=10)
        column[-1].set_xlabel("test accuracy of the trained network, %")
    for name, panel in zip(rows, panels[:, 0]):
        panel.set_ylabel(_UNITS[name])
    key_below(drawn, panels, columns=min(4, 1 + len(stages)))
    drawn.suptitle(plain(f"{stages[0].model} on {stages[0].dataset}: utility against leakage"), fontsize=11)
    return drawn
