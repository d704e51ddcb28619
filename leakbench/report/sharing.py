"""``sharing.md``: what sharing key-lock's key, lock or both is worth to an attacker, on the same images."""

import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

from leakbench.analysis.paired import Pair
from leakbench.analysis.statistics import UNIT, paired_difference
from leakbench.analysis.summary import summarise
from leakbench.core.text import name_of, number, slug, with_interval
from leakbench.metrics.aligned import align
from leakbench.plan.trial import MAX_PICTURE_ERROR
from leakbench.report.differences import paired_table
from leakbench.report.display import leakage_table, to_markdown
from leakbench.report.grids import picture
from leakbench.report.markdown import trained
from leakbench.report.run import RunData
from leakbench.report.study import StudyPage
from leakbench.store.records import Pictures
from leakbench.store.run_file import Store

FILE = "sharing.md"
"""The name of the report in a run's folder."""

GRANTS = {
    "T0": "nothing",
    "T1": "nothing, lock weights known",
    "T2": "nothing, lock weights known, key optimised",
    "T3": "key",
    "T4": "lock",
    "reveals=lock, informed=true": "lock, key derived",
    "T5": "both",
}
"""By threat model, what it shares of key-lock, in the order of the rows."""

CONTROLS = ("none", "norm-only")
"""The defenses beside key-lock: its ceiling, and its normalisation without its secret."""

MAX_IMAGES = 8
"""The most images of a grid."""

_SCORES = ("psnr", "ssim", "lpips_vgg", "psnr_aligned", "ssim_aligned", "paper_psnr")
_TESTED = ("psnr_aligned", "ssim_aligned")
_ARM = "arm"
_BLOCK = ["dataset", "model", "attack"]


def study(run: RunData, store: Store) -> StudyPage | None:
    """Return ``sharing.md`` with its grids; None unless key-lock was attacked under T3 and T4 (see ``GRANTS``)."""
    locked = run.results[run.results["defense"].map(name_of) == "keylock"]
    if not {"T3", "T4"} <= set(locked["threat"]):
        return None
    words, blocks, grids = trained(run.components), [], {}
    for index, (names, block) in enumerate(arms(run.results).groupby(_BLOCK, sort=False), 1):
        key = tuple(map(str, names))
        file = f"grids/sharing-{index:03}-{slug(key)}.png"
        pictures = store.images([trial for trial in grid(block).to_numpy().ravel() if isinstance(trial, str)])
        grids[file] = figure(block, pictures)
        faded = _faded(block, pictures)
        blocks.append((key, words.get(key[1], ""), file, faded, _scores(run, block), _tests(block), opposite(block)))
    return StudyPage(FILE, {"head": run.about(), "blocks": blocks}, grids)


def arms(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of key-lock and its controls with a column ``arm``, in the order of the report's rows.

    A control's arm is its name, whatever the threat model; key-lock's is what the threat model shares of it. If there
    are several key-locks, each has arms of its own.
    """
    attacked = results[~results["floor"].astype(bool)]
    names = attacked["defense"].map(name_of)
    found = attacked[names.isin([*CONTROLS, "keylock"])]
    locked = names[found.index] == "keylock"
    share = found["threat"].map(lambda threat: GRANTS.get(threat, threat))
    if found.loc[locked, "defense"].nunique() > 1:
        share = share + " (" + found["defense"] + ")"
    found = found.assign(**{_ARM: np.where(locked, share, found["defense"])})
    order = {name: place for place, name in enumerate((*CONTROLS, *GRANTS.values()))}
    rank = found[_ARM].map(lambda arm: order.get(re.split(r" [(\[]", arm)[0], len(order)))
    found = found.loc[rank.sort_values(kind="stable").index]
    return found.drop_duplicates([*_BLOCK, _ARM, "image", "seed"])


def grid(block: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of a grid, a row for each arm: of the first images by index, with the first seed."""
    first = block[block["seed"] == block["seed"].min()]
    trials = first.pivot(index=_ARM, columns="image", values="trial")
    return trials.loc[first[_ARM].drop_duplicates(), sorted(trials.columns)[:MAX_IMAGES]]


def figure(block: pd.DataFrame, pictures: Mapping[str, Pictures]) -> Figure:
    """Return a grid: the private images in the first row, then a row of reconstructions for each arm, with scores.

    Where a normalisation hides contrast, behind every defense but ``none``, a reconstruction is drawn after the best
    fit of brightness and contrast to the private image, as the aligned scores measure it; its label says so.
    """
    trials = grid(block)
    found = [[pictures.get(trial) for trial in row] for row in trials.to_numpy()]
    truths = [next((picture(pair.truth) for pair in column if pair), None) for column in zip(*found)]
    plain = block.drop_duplicates(_ARM).set_index(_ARM)["defense"] == "none"
    rows = [("private image", truths)]
    rows += [
        (arm, [picture(one.reconstruction if one else None) for one in row])
        if plain[arm]
        else (f"{arm} (aligned)", [_fitted(*pair) for pair in zip(row, truths)])
        for arm, row in zip(trials.index, found)
    ]
    captions = [[""] * len(truths), *([_caption(block, trial) for trial in row] for row in trials.to_numpy())]
    height, width = 0.3 + 1.15 * len(rows), 2.6 + 0.95 * len(truths)
    sheet = Figure(figsize=(width, height), dpi=96)
    panels = sheet.subplots(len(rows), len(truths), squeeze=False)
    sheet.subplots_adjust(2.5 / width, 0.25 / height, 1 - 0.1 / width, 1 - 0.1 / height, 0.05, 0.25)
    for (label, images), under, line in zip(rows, captions, panels):
        line[0].text(-0.1, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9, wrap=True)
        for panel, image, caption in zip(line, images, under):
            panel.set_axis_off()
            panel.text(0.5, -0.03, caption, transform=panel.transAxes, ha="center", va="top", fontsize=7)
            if image is not None:
                panel.imshow(np.asarray(image), interpolation="nearest")
    return sheet


def _fitted(found: Pictures | None, truth: Image.Image | None) -> Image.Image | None:
    """Return a picture after the best fit of brightness and contrast to the private image; as it is without one."""
    if found is not None and found.aligned is not None:
        return picture(found.aligned)
    image = picture(found.reconstruction if found else None)
    if image is None or truth is None or image.size != truth.size:
        return image
    pair = [torch.from_numpy(np.array(one.convert("RGB"), dtype=np.float64) / 255)[None] for one in (image, truth)]
    pixels = align(*pair)[0].mul(255).round().to(torch.uint8).numpy()
    return Image.fromarray(pixels)


def _faded(block: pd.DataFrame, pictures: Mapping[str, Pictures]) -> int:
    """Return how many aligned pictures of the grid are worse than their ``psnr_aligned``: the run lacks the better one.

    Runs before schema 6 have only the clamped pictures. Failed trials are scored as the grey image, whatever they show.
    """
    behind = block[(block["defense"] != "none") & (block["status"] == "ok")]
    behind = behind[behind["trial"].isin(grid(block).to_numpy().ravel())]
    if "psnr_aligned" not in behind:
        return 0
    count = 0
    for trial, score in zip(behind["trial"], behind["psnr_aligned"]):
        found = pictures.get(trial)
        truth = picture(found.truth) if found else None
        image = _fitted(found, truth)
        if image is None or truth is None or image.size != truth.size:
            continue
        error = np.asarray(image, dtype=np.float64) / 255 - np.asarray(truth.convert("RGB"), dtype=np.float64) / 255
        # the scored error, what ``worker.aligned`` lets a picture add to it, and the rounding of both pictures
        count += bool(np.sqrt(np.square(error).mean()) > 10 ** (-score / 20) + MAX_PICTURE_ERROR**0.5 + 1 / 255)
    return count


def _caption(block: pd.DataFrame, trial: object) -> str:
    """Return the aligned scores of a trial: PSNR in dB / SSIM; empty without a trial."""
    scores = block.loc[block["trial"] == trial, [name for name in _TESTED if name in block]]
    if scores.empty:
        return ""
    values = scores.iloc[0]
    return " / ".join(number(float(values[name]), 2 if "ssim" in name else 1) for name in values.index)


def _scores(run: RunData, block: pd.DataFrame) -> str:
    """Return the table of one attack: a row for each arm."""
    results = run.results
    place = results[["dataset", "model"]] == block[["dataset", "model"]].iloc[0]
    floors = results[results["floor"].astype(bool) & place.all(axis=1)].drop_duplicates(["attack", "image", "seed"])
    metrics = [m for name in _SCORES for m in run.metrics if m.name == name and block[name].notna().any()]
    # every arm as a defense under one threat model, so that the summary has a row for each, beside the same floors
    summary = summarise(pd.concat([floors, block.assign(defense=block[_ARM])]).assign(threat=""), metrics)
    shown = leakage_table(summary[~summary["floor"].astype(bool)], metrics, gains=("psnr",))
    return to_markdown(shown.drop(columns="attack").rename(columns={"defense": "shared"}), left=1)


def _tests(block: pd.DataFrame) -> str:
    """Return the paired differences between arms, with their tests."""
    cells = {str(arm): own.set_index(UNIT) for arm, own in block.groupby(_ARM, sort=False)}
    pairs = [Pair(_name(*names), *(cells[name] for name in names)) for names in _pairs(list(cells))]
    return paired_table(pairs, [name for name in _TESTED if name in block and block[name].notna().any()])[0]


def opposite(block: pd.DataFrame) -> list[str]:
    """Return the differences between arms that have opposite signs in ``psnr`` and ``psnr_aligned``.

    Both intervals exclude 0. Normalisation moves brightness and contrast, which only the raw metric counts.
    """
    names = ("psnr", "psnr_aligned")
    if not all(name in block and block[name].notna().any() for name in names):
        return []
    cells = {str(arm): own.set_index(UNIT) for arm, own in block.groupby(_ARM, sort=False)}
    found = []
    for first, second in _pairs(list(cells)):
        raw, aligned = (paired_difference(cells[first][name], cells[second][name]) for name in names)
        ends = [(one.low, one.high) for one in (raw, aligned)]
        if any(low > 0 for low, _ in ends) and any(high < 0 for _, high in ends):
            shown = [with_interval(one.mean, one.low, one.high, 1, sign=True) for one in (raw, aligned)]
            found.append(f"{_name(first, second)}: {shown[0]} dB raw, {shown[1]} dB aligned")
    return found


def _name(first: str, second: str) -> str:
    return f"{first} − {second}"


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the compared arms: the controls; each control with everything, the key and nothing; all grants."""
    controls = [name for name in names if name_of(name) in CONTROLS]
    granted = [name for name in names if name not in controls]
    known = [name for name in granted if name.partition(" (")[0] == GRANTS["T3"]]
    ends = dict.fromkeys([*granted[-1:], *known, *granted[:1]])
    pairs = [*itertools.pairwise(controls), *itertools.product(controls, ends)]
    return pairs + [(more, less) for less, more in itertools.combinations(granted, 2)]
