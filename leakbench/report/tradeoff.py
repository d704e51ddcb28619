"""``tradeoff.md``: utility against leakage, one point a defense, with intervals and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leakbench.analysis import pareto as utility
from leakbench.analysis.statistics import bootstrap_interval, wilson_interval
from leakbench.core.text import ABSENT, english, number, slug, with_interval
from leakbench.errors import CorruptAsset
from leakbench.plan.matrix import RECOVERY
from leakbench.report import accuracy as accuracies
from leakbench.report.files import replace
from leakbench.report.grids import plain
from leakbench.report.md import escape, table
from leakbench.store.run_file import FILE as RUN
from leakbench.store.run_file import Store
from leakbench.training import TrainingRecord, records
from leakbench.training.tradeoff import TARGETS_FILE, Target, targets_of

FILE = "tradeoff.md"
"""The name of the report in a run's folder."""
DISTANCE = "lpips_vgg"
"""The distance that is drawn beside the share of images recovered, where its weights are at hand."""


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A defense at one stage of its training.

    Attributes:
        defense: its spec.
        accuracy: of the trained network on the test images, in [0, 1].
        before: that of the attacked checkpoint.
        share: of the attacked images, how many at least one attacker recovered.
        distance: the mean over images of the least ``lpips_vgg`` of any attacker; NaN without its weights.
        images: how many images were attacked, seeds counted apart.
        strongest: who recovered most.
        failed: trials that ended without a score.
        models: the specs under which the run has the attacked checkpoints, one a seed.
    """

    defense: str
    accuracy: Value
    before: float
    share: Value
    distance: Value
    images: int
    strongest: str
    failed: int
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scene:
    """The points that compare: one dataset, model and stage; and the least distance of a floor."""

    dataset: str
    model: str
    stage: str
    points: tuple[Point, ...]
    floor: float


def write(out: Path | str) -> list[Path]:
    """Write ``tradeoff.md`` with ``tradeoff/*.png`` from the trainings and the run in ``out``; return paths.

    The points go to ``tradeoff.json`` too, from which the page of the run, its figures and a leaderboard take them.

    Raises:
        CorruptAsset: there is no trade-off in ``out``.
        ForeignRun: there is no readable run file in ``out``.
    """
    out = Path(out)
    threshold, targets = targets_of(out)
    with Store.open(out / RUN, readonly=True) as store:
        results = store.results()
    found = records(out)
    scenes = scenes_of(results, found, targets, threshold)
    written = [replace(out / utility.FILE, studies(scenes, threshold).model_dump_json(indent=1).encode() + b"\n")]
    groups: dict[tuple[str, str], list[Scene]] = {}
    for scene in scenes:
        groups.setdefault((scene.dataset, scene.model), []).append(scene)
    pictures = []
    for index, (names, group) in enumerate(groups.items(), 1):
        path = out / "tradeoff" / f"tradeoff-{index:02}-{slug(names)}.png"
        written.append(replace(path, png(group)))
        pictures.append((path.name, group))
    written.append(
        replace(out / FILE, markdown(pictures, threshold, out.resolve().name, left_out(found, targets)).encode())
    )
    return written


def has_points(out: Path) -> bool:
    """Return whether a run's folder holds a trade-off."""
    return (out / TARGETS_FILE).exists()


def scenes_of(
    results: pd.DataFrame, found: Sequence[TrainingRecord], targets: Sequence[Target], threshold: float
) -> list[Scene]:
    """Return the points by dataset, model and stage, in the order in which they were run."""
    by_folder = {one.folder.name: one for one in found}
    grouped: dict[tuple[str, str, str], dict[str, list[Target]]] = {}
    for target in targets:
        one = by_folder.get(target.arm)
        if one is None:
            raise CorruptAsset(f"the training {target.arm!r} that was attacked is gone; start the trade-off again")
        key = (one.specs["dataset"], one.specs["model"], target.stage)
        grouped.setdefault(key, {}).setdefault(target.defense, []).append(target)
    scenes = []
    for (dataset, model, stage), arms in grouped.items():
        floors = results[results["model"].isin([t.model for own in arms.values() for t in own]) & results["floor"]]
        floor = math.nan
        if DISTANCE in floors and floors[DISTANCE].notna().any():
            floor = float(floors.groupby("attack")[DISTANCE].mean().min())
        points = tuple(_point(results, own, [by_folder[one.arm] for one in own], threshold) for own in arms.values())
        scenes.append(Scene(dataset, model, stage, points, floor))
    return scenes


def _point(results: pd.DataFrame, targets: Sequence[Target], arms: Sequence[TrainingRecord], threshold: float) -> Point:
    value, low, high = accuracies.interval(arms)
    models = [target.model for target in targets]
    own = results[results["model"].isin(models) & (results["defense"] == targets[0].defense) & ~results["floor"]]
    scored = own[own["status"].isin(["ok", "failed"])]
    measured = scored[scored[RECOVERY].notna()]  # images of fewer than 11 pixels a side have no SSIM
    recovered = measured.assign(hit=measured[RECOVERY] >= threshold)
    hits = recovered.groupby(["model", "seed", "image"])["hit"].any()
    share = float(hits.mean()) if len(hits) else math.nan
    places = len(set(hits.index.get_level_values("image")))
    spread = wilson_interval(share, places) if len(hits) else (math.nan, math.nan)
    by = recovered[recovered["hit"]].groupby("attack")["image"].count()
    distance = Value(math.nan, math.nan, math.nan)
    if DISTANCE in scored and scored[DISTANCE].notna().any():
        least = scored.groupby(["model", "seed", "image"])[DISTANCE].min().dropna()
        images = least.index.get_level_values("image").to_numpy()
        distance = Value(float(least.mean()), *bootstrap_interval(least.to_numpy(), images))
    return Point(
        defense=targets[0].defense,
        accuracy=Value(value, low, high),
        before=float(np.mean([target.accuracy for target in targets])),
        share=Value(share, *spread),
        distance=distance,
        images=len(hits),
        strongest="" if by.empty else str(by.idxmax()),
        failed=int((~own["status"].isin(["ok", "failed", "unsupported"])).sum()),
        models=tuple(models),
    )


def left_out(found: Sequence[TrainingRecord], targets: Sequence[Target]) -> list[str]:
    """Return one line on each training that has no checkpoint of a stage at which others were attacked, and why."""
    attacked = {(target.arm, target.stage) for target in targets}
    lines = []
    for one in found:
        for stage in dict.fromkeys(target.stage for target in targets):
            if (one.folder.name, stage) not in attacked:
                why = f"{one.outcome.status}: {one.outcome.reason}" if one.outcome.reason else "not in this study"
                lines.append(f"- {escape(one.specs['defense'])}, seed {one.seed}, stage {escape(stage)}: {escape(why)}")
    return lines


def studies(scenes: Sequence[Scene], threshold: float) -> utility.Studies:
    """Return the points of every scene that have a share of images recovered."""
    found = []
    for scene in scenes:
        points = tuple(
            utility.Point(
                label=point.defense,
                models=point.models,
                utility=_interval(point.accuracy),
                leakage=_interval(point.share),
            )
            for point in scene.points
            if not (math.isnan(point.accuracy.mean) or math.isnan(point.share.mean))
        )
        note = (
            f"{scene.model} on {scene.dataset}, attacked at stage {scene.stage} of its training behind each defense. "
            f"An image counts as recovered where its SSIM after alignment is at least {threshold:g}. The accuracy is "
            "that of the best round of the training, whatever the stage."
        )
        found.append(
            utility.Study(
                title=f"{scene.dataset} · {scene.model} · stage {scene.stage}",
                utility="test accuracy of the trained network",
                leakage="images recovered by at least one attacker",
                note=note,
                points=points,
            )
        )
    return utility.Studies(studies=tuple(found))


def _interval(value: Value) -> utility.Interval:
    return utility.Interval(value=value.mean, low=value.low, high=value.high)


def _axes(scene: Scene) -> dict[str, list[Value]]:
    """Return what is drawn against the accuracy: leakage by name, each point's value."""
    drawn = {"share": [point.share for point in scene.points]}
    if any(not math.isnan(point.distance.mean) for point in scene.points):
        drawn["distance"] = [point.distance for point in scene.points]
    return drawn


def _on_front(scene: Scene, name: str, values: Sequence[Value]) -> list[int]:
    """Return the front; a distance leaks less where it is larger, up to that of the best floor, which leaks nothing."""
    most = math.inf if math.isnan(scene.floor) else scene.floor
    leakages = [value.mean if name == "share" else -min(value.mean, most) for value in values]
    return utility.front([(point.accuracy.mean, leakage) for point, leakage in zip(scene.points, leakages)])


def markdown(
    pictures: Sequence[tuple[str, Sequence[Scene]]], threshold: float, name: str, missing: Sequence[str] = ()
) -> str:
    """Return the report; it depends on nothing but its arguments. ``missing`` are lines of ``left_out``."""
    parts = [f"# Utility against leakage: {escape(name)}", _words(threshold)]
    for file, scenes in pictures:
        title = f"{scenes[0].model} on {scenes[0].dataset}"
        parts += [f"## {escape(title)}", f"![{escape(title)}](tradeoff/{file})"]
        for scene in scenes:
            parts += [f"**Attacked at stage {escape(scene.stage)}**:", _table(scene)]
    if missing:
        parts += ["**Not attacked**:", "\n".join(missing)]
    parts.append(
        "Trainings, curves and what a thief gets: [accuracy.md](accuracy.md). Every attack: [report.md](report.md)."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _words(threshold: float) -> str:
    return f"""\
One point a defense and strength. **accuracy** is that of the network trained behind it, at its best round, on the \
test images, in per cent, with a 95 % Wilson interval. **recovered** is the share of the attacked images of which at \
least one attacker, oblivious or informed, found a reconstruction with an SSIM of at least {threshold:g} after \
alignment; its interval is Wilson's over images. **LPIPS** (VGG) is that of the best reconstruction of any attacker, \
image by image, the mean over images with a 95 % bootstrap interval: 0 is exact, and the dashed line is the best \
floor, a guess without the gradient, beyond which nothing leaks. Where a reconstruction was found, later attackers \
were spared if the run has a threshold, so that LPIPS there is an upper bound.

The attacked images are test images, which no network was trained on. A point is **on the front** (●, line) where no \
other one has both at least its accuracy and at most its leakage, by the points alone; where intervals overlap, the \
order is not shown. Each stage is a checkpoint of the same training: leakage changes as a network learns, and the \
accuracy that a defense costs is that of the end."""


def _table(scene: Scene) -> str:
    axes = _axes(scene)
    fronts = {name: set(_on_front(scene, name, values)) for name, values in axes.items()}
    headers = [
        "defense",
        "accuracy",
        "of the checkpoint",
        "n",
        "recovered",
        "LPIPS",
        "on the front",
        "who recovers most",
    ]
    rows = []
    for index, point in enumerate(scene.points):
        names = {"share": "recovered", "distance": "LPIPS"}
        marks = [names[name] for name, kept in fronts.items() if index in kept]
        value, share = point.accuracy, point.share
        rows.append(
            [
                escape(point.defense),
                with_interval(100 * value.mean, 100 * value.low, 100 * value.high, 2),
                number(100 * point.before, 2),
                str(point.images),
                with_interval(100 * share.mean, 100 * share.low, 100 * share.high, 0),
                with_interval(point.distance.mean, point.distance.low, point.distance.high, 3),
                english(marks) if marks else ABSENT,
                escape(point.strongest) or ABSENT,
            ]
        )
    text = table(headers, rows, left=1)
    failed = sum(point.failed for point in scene.points)
    return f"{text}\n\n{failed} trials ended in an error and are not counted." if failed else text


_UNITS = {"share": "images recovered, %", "distance": "LPIPS (VGG) of the best reconstruction\n← leaks more"}


def png(scenes: Sequence[Scene]) -> bytes:
    """Return utility against leakage as a PNG: a column for each stage, a row for each measure of leakage."""
    rows = max((list(_axes(scene)) for scene in scenes), key=len)
    figure = Figure(figsize=(max(8.4, 5.6 * len(scenes)), 3.9 * len(rows) + 1.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), len(scenes), squeeze=False, sharex=True, sharey="row")
    for column, scene in enumerate(scenes):
        for row, name in enumerate(rows):
            panel = panels[row][column]
            if name in _axes(scene):
                _draw(panel, scene, name, _axes(scene)[name])
            if row == 0:
                panel.set_title(plain(f"attacked at stage: {scene.stage}"), fontsize=10)
            if column == 0:
                panel.set_ylabel(_UNITS[name])
            if row == len(rows) - 1:
                panel.set_xlabel("test accuracy of the trained network, %")
            panel.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 1 + len(scenes)), fontsize=9)
    figure.suptitle(plain(f"{scenes[0].model} on {scenes[0].dataset}: utility against leakage"), fontsize=11)
    stream = BytesIO()
    canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _draw(panel: Any, scene: Scene, name: str, values: Sequence[Value]) -> None:
    scale = 100 if name == "share" else 1
    kept = _on_front(scene, name, values)
    for index, (point, value) in enumerate(zip(scene.points, values)):
        if math.isnan(value.mean) or math.isnan(point.accuracy.mean):
            continue
        x, y = 100 * point.accuracy.mean, scale * value.mean
        across = [[x - 100 * point.accuracy.low], [100 * point.accuracy.high - x]]
        along = np.nan_to_num(np.array([[y - scale * value.low], [scale * value.high - y]])).clip(min=0)
        colour = accuracies.COLOURS[index % len(accuracies.COLOURS)]
        marker = "osD^vPX*"[(index + index // len(accuracies.COLOURS)) % 8]
        face = colour if index in kept else "white"
        panel.errorbar(
            x,
            y,
            along,
            np.array(across).clip(min=0),
            fmt=marker,
            color=colour,
            markerfacecolor=face,
            markersize=7,
            capsize=3,
            linewidth=1.2,
            label=plain(point.defense),
        )
    line = sorted((100 * scene.points[index].accuracy.mean, scale * values[index].mean) for index in kept)
    if len(line) > 1:
        panel.plot(*zip(*line), color="#5b5b5b", linewidth=1, zorder=0)
    if name == "distance" and not math.isnan(scene.floor):
        panel.axhline(scene.floor, color="#5b5b5b", linestyle="--", linewidth=1)
