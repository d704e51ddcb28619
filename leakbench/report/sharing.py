"""``sharing.md``: what sharing key-lock's key, lock or both is worth to an attacker, on the same images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leakbench.analysis.statistics import ALPHA, holm, paired_difference, sign_flip_test
from leakbench.analysis.summary import summarise
from leakbench.core.text import decimals, p_value, slug, with_interval
from leakbench.report.differences import warning
from leakbench.report.grids import picture
from leakbench.report.markdown import trained
from leakbench.report.md import escape, table
from leakbench.store.records import MetricInfo, Pictures, StoredComponent

GRANTS = {
    "T0": "nothing",
    "T1": "nothing, lock weights known",
    "T2": "nothing, lock weights known, key sought",
    "T3": "key",
    "T4": "lock",
    "reveals=lock, informed=true": "lock, key worked out",
    "T5": "both",
}
"""Threat model -> what it shares of key-lock, in the order of the rows."""

CONTROLS = ("none", "norm-only")
"""The defenses beside key-lock: its ceiling, and its normalisation without its secret."""

IMAGES = 8
"""At most so many images stand in a grid."""

_SCORES = ("psnr", "ssim", "lpips_vgg", "psnr_aligned", "ssim_aligned", "paper_psnr")
_TESTED = ("psnr", "psnr_aligned")
_ARM = "arm"


@dataclass(frozen=True)
class Grid:
    """One picture: what an attack makes of some images under every grant, and the truth below.

    Attributes:
        key: dataset, model and attack.
        file: the file's name.
        rows: what stands before each row, and its trials by image (None where there is no picture).
    """

    key: tuple[str, str, str]
    file: str
    rows: tuple[tuple[str, tuple[str | None, ...]], ...]

    @property
    def trials(self) -> list[str]:
        """The trials whose pictures are needed."""
        return [trial for _, row in self.rows for trial in row if trial is not None]


def compares(results: pd.DataFrame) -> bool:
    """Return whether a run attacks key-lock with the key shared and with the lock shared."""
    locked = results[results["defense"].str.partition("(")[0] == "keylock"]
    return {"T3", "T4"} <= set(locked["threat"])


def arms(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of key-lock and its controls with a column ``arm``, in the order of the report's rows.

    A control's arm is its name, whatever the threat model; key-lock's is what the threat model shares of it.
    """
    names = results["defense"].str.partition("(")[0]
    control = names.isin(CONTROLS) & ~results["floor"].astype(bool)
    locked = (names == "keylock") & ~results["floor"].astype(bool)
    found = results[control | locked].copy()
    share = found["threat"].map(lambda threat: GRANTS.get(threat, threat))
    found[_ARM] = np.where(control[found.index], found["defense"], share)
    several = found.loc[locked[found.index], "defense"].nunique() > 1
    if several:  # of several key-locks each has arms of its own
        found.loc[locked, _ARM] = found[_ARM] + " (" + found["defense"] + ")"
    order = {name: place for place, name in enumerate((*CONTROLS, *GRANTS.values()))}
    found["rank"] = [order.get(arm.partition(" (")[0], len(order)) for arm in found[_ARM]]
    found = found.sort_values("rank", kind="stable").drop(columns="rank")
    return found.drop_duplicates(["dataset", "model", "attack", _ARM, "image", "seed"])


def grids(results: pd.DataFrame) -> list[Grid]:
    """Return one grid for each dataset, model and attack: the first images by index, of the first seed."""
    found: list[Grid] = []
    for key, block in _blocks(results):
        first = block[block["seed"] == block["seed"].min()]
        images = sorted(first["image"].unique())[:IMAGES]
        rows = []
        for arm, cells in first.groupby(_ARM, sort=False):
            trial = cells.set_index("image")["trial"]
            rows.append((str(arm), tuple(trial.get(image) for image in images)))
        found.append(Grid(key, f"sharing-{len(found) + 1:03}-{slug(key)}.png", tuple(rows)))
    return found


def png(grid: Grid, pictures: Mapping[str, Pictures]) -> bytes:
    """Return a grid as a PNG: a row of reconstructions for each arm, and the private images in the last row."""
    columns = max(len(row) for _, row in grid.rows)
    truth: list[bytes | None] = [None] * columns
    lines: list[tuple[str, list[bytes | None]]] = []
    for label, row in grid.rows:
        line: list[bytes | None] = []
        for column, trial in enumerate(row):
            pair = pictures.get(trial) if trial is not None else None
            line.append(pair.reconstruction if pair else None)
            truth[column] = truth[column] or (pair.truth if pair else None)
        lines.append((label, line))
    lines.append(("truth", truth))
    figure = Figure(figsize=(2.6 + 0.95 * columns, 0.3 + 0.95 * len(lines)), dpi=96)
    canvas = FigureCanvasAgg(figure)
    width, height = figure.get_size_inches()
    for (top, (label, line)), left in itertools.product(enumerate(lines), range(columns)):
        box = ((2.5 + 0.95 * left) / width, 1 - (0.2 + 0.95 * (top + 1)) / height, 0.9 / width, 0.9 / height)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        image = picture(line[left])
        if image is not None:
            axes.imshow(np.asarray(image), interpolation="nearest", aspect="equal")
        if left == 0:
            figure.text(2.4 / width, box[1] + box[3] / 2, label, ha="right", va="center", fontsize=9, wrap=True)
    stream = BytesIO()
    canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def markdown(
    results: pd.DataFrame,
    metrics: Sequence[MetricInfo],
    pages: Sequence[Grid] = (),
    components: Sequence[StoredComponent] = (),
    head: str = "",
) -> str:
    """Return the study's report, with the table of its run (``about``) as its head.

    It depends on nothing but its arguments.
    """
    parts = ["# What key-lock's secrets are worth", head, _WORDS]
    blocks = list(_blocks(results))
    if not blocks:
        return (
            "\n\n".join([*parts, "No trial of key-lock or its controls has ended yet: there is nothing to show."])
            + "\n"
        )
    known = {metric.name: metric for metric in metrics}
    names = [name for name in _SCORES if name in known and results[name].notna().any()]
    words = trained(components)
    for key, block in blocks:
        parts += ["## " + ", ".join(map(escape, key)), words.get(key[1], "")]
        parts += [f"![{escape(' · '.join(key))}](grids/{page.file})" for page in pages if page.key == key]
        parts.append(_scores(results, key, block, [known[name] for name in names]))
        parts += [_tests(block, known[name]) for name in names if name in _TESTED]
    return "\n\n".join(part for part in parts if part) + "\n"


_WORDS = """\
Rows are what the server is given of the key-lock, on the same images, weights and starts: **nothing** (the \
threat model T0); **nothing, lock weights known** (T1: the attacker draws its own key, as FedKL's released code \
runs); **key** (T3: and the lock's weights); **lock** (T4: the lock's weights and gradients, to an attacker that \
does not look at what they imply); **lock, key worked out** (the same to one that divides a row of the lock's \
gradient by that of its bias, which is the key); **both** (T5). **none** and **norm-only** are the controls: no \
defense, and the key-lock's normalisation with scale 1 and shift 0. So none − norm-only is what normalising one \
image hides, norm-only − key (or − both, whichever is smaller) what the lock destroys even with everything \
revealed, and key − nothing (or both − nothing, whichever is larger) what secrecy hides.

Who is given more can leave it aside. So where a row that shares more scores lower (both below key, say), the \
attack makes poor use of what it was given; that is no protection. Matching the lock's gradients as well, for \
one, can slow a search that would succeed without them.

Means have 95 % bootstrap intervals over images (and over the seeds of each). Differences are paired by \
image; p is that of a two-sided sign-flip permutation test on the images' mean differences, and Holm's \
correction is over all pairs of one table. With n images no p is below 2/2ⁿ: few images cannot show much."""


def _blocks(results: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    for key, block in arms(results).groupby(["dataset", "model", "attack"], sort=False):
        dataset, model, attack = (str(part) for part in key)
        yield (dataset, model, attack), block


def _scores(
    results: pd.DataFrame, key: tuple[str, str, str], block: pd.DataFrame, metrics: Sequence[MetricInfo]
) -> str:
    """Return the table of one attack: a row for each arm, and the best floor of every metric below."""
    floors = results[results["floor"].astype(bool) & (results[["dataset", "model"]] == list(key[:2])).all(axis=1)]
    # every arm as a defense under one threat model, so that the summary has a row for each, beside the same floors
    joined = pd.concat([floors.drop_duplicates(["attack", "image", "seed"]), block.assign(defense=block[_ARM])])
    summary = summarise(joined.assign(threat=""), metrics)
    rows = summary[~summary["floor"].astype(bool)]
    places = {metric.name: decimals(rows[metric.name]) for metric in metrics}
    headers = ["shared", "n", "failed"]
    headers += [f"{escape(metric.name)} {'↑' if metric.higher_is_better else '↓'}" for metric in metrics]
    headers += ["psnr gain over floor"] if "psnr" in places else []
    lines = []
    for _, row in rows.iterrows():
        line = [escape(row["defense"]), str(row["n"]), str(row["failed"])]
        for name, place in places.items():
            line.append(with_interval(row[name], row[f"{name} low"], row[f"{name} high"], place))
        if "psnr" in places:
            gain = (row["psnr gain"], row["psnr gain low"], row["psnr gain high"])
            line.append(with_interval(*gain, places["psnr"], sign=True))
        lines.append(line)
    return table(headers, lines, left=1)


def _tests(block: pd.DataFrame, metric: MetricInfo) -> str:
    """Return the paired differences between all arms in one metric, with their tests."""
    values = block.pivot(index=["image", "seed"], columns=_ARM, values=metric.name)
    pairs = _pairs(block[_ARM].drop_duplicates().tolist())
    found = [paired_difference(values[first], values[second], sign_flip_test) for first, second in pairs]
    if not found:
        return ""
    places = decimals([one.mean for one in found])
    names = [f"{escape(first)} − {escape(second)}" for first, second in pairs]
    corrected = holm([one.p for one in found])
    lines = [
        [
            name,
            str(one.images),
            with_interval(one.mean, one.low, one.high, places, sign=True),
            p_value(one.p),
            p_value(adjusted),
        ]
        for name, one, adjusted in zip(names, found, corrected)
    ]
    unshown = [(name, one) for name, one, adjusted in zip(names, found, corrected) if not adjusted <= ALPHA]
    title = f"**Paired differences in {escape(metric.name)}**:"
    shown = table(["difference", "images", "mean", "p", "p (Holm)"], lines, left=1)
    return f"{title}\n\n{shown}{warning(unshown, len(found))}"


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return what is compared: the controls; each of them with everything, the key and nothing shared; all grants."""
    controls = [name for name in names if name.partition("(")[0] in CONTROLS]
    granted = [name for name in names if name not in controls]
    pairs = [(first, second) for first, second in itertools.pairwise(controls)]
    known = [name for name in granted if name.partition(" (")[0] == GRANTS["T3"]]
    ends = dict.fromkeys([*granted[-1:], *known, *granted[:1]])
    pairs += [(control, arm) for control in controls for arm in ends]
    return pairs + [(more, less) for less, more in itertools.combinations(granted, 2)]
