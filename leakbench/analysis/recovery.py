"""Which trials recover their image: the one rule that everything counts by."""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from leakbench.analysis.statistics import ROUNDING
from leakbench.core.text import english, plural
from leakbench.metrics.encoded import EncodedPSNR, EncodedPSNRFloor, EncodedSSIM, EncodedSSIMFloor
from leakbench.metrics.extremes import WorstAlignedSSIM
from leakbench.metrics.public import PublicSSIM
from leakbench.plan.matrix import RECOVERY
from leakbench.plan.trial import UNSEEN, target
from leakbench.store.run_file import Store

CLOSENESS = "psnr_aligned"
"""The second metric in which a reconstruction must be better than every floor."""

ENCODED = (EncodedSSIM.name, EncodedPSNR.name)
"""``RECOVERY`` and ``CLOSENESS`` against the image that the client trained on, if its defense changes the image."""

ENCODED_FLOORS = (EncodedSSIMFloor.name, EncodedPSNRFloor.name)
"""The best scores of the floors against that image."""

WORST = WorstAlignedSSIM.name
"""``RECOVERY`` of the image of a batch that leaks least."""

JUDGED = (RECOVERY, CLOSENESS, *ENCODED, *ENCODED_FLOORS, WORST)
"""The metrics by which a trial is judged."""

TARGET = ["image", "seed"]
"""The columns that name an attacked image."""

NEAR_PUBLIC = 0.6
"""The ``ssim_public`` from which a reconstruction is near a public image."""

_PLACE = ["dataset", *TARGET]


def judged(trials: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Return trials with three more columns, ``recovered``, ``by_floor`` and ``itself``.

    ``itself``: the trial did not fail, its ``RECOVERY`` score is at least the threshold, and it is better than the best
    floor on the same image and seed both in ``RECOVERY`` and in ``CLOSENESS``. A condition that was not measured (no
    floor was run, a metric is missing) does not count; ``caveat`` says so. ``recovered``: the same holds, or it holds
    for the image that the client trained on in place of the private one (a shift of it, a blend with another), above
    the scores of the floors against that image: it is what the gradient leaks. Runs of older versions have no such
    scores of the floors; their limits are those of the private image. ``by_floor``: a floor reaches the threshold on
    this image without any gradient, so that the image shows nothing about a leak.

    A batch counts as recovered if all of its images reach the threshold; ``recovered_share`` says how many did.

    Args:
        trials: with the columns dataset, defense, image, seed, status, floor and the metrics (``Store.trials``); floors
            are the same behind every defense, for every model and threat model.
        threshold: in [0, 1].
    """
    own = trials.reindex(columns=list(dict.fromkeys((*trials.columns, *JUDGED))))
    limits = best_floors(own, [RECOVERY, CLOSENESS]).reindex(pd.MultiIndex.from_frame(own[_PLACE]))
    worst = own[WORST].isna() | (own[WORST] >= threshold)
    itself = _above(own, limits, threshold) & worst
    behind = ["defense", *_PLACE]  # what a client trains on depends on its defense
    changed = best_floors(own, ENCODED, behind).reindex(pd.MultiIndex.from_frame(own[behind])).reset_index(drop=True)
    measured = own[list(ENCODED_FLOORS)].set_axis(ENCODED, axis=1).reset_index(drop=True)
    changed = pd.DataFrame(np.fmax(changed, measured), columns=list(ENCODED))
    changed = changed.fillna(limits.set_axis(ENCODED, axis=1).reset_index(drop=True))
    return trials.assign(
        recovered=itself | _above(own, changed, threshold),
        by_floor=limits[RECOVERY].to_numpy(dtype=float) >= threshold,
        itself=itself,
    )


def _above(trials: pd.DataFrame, limits: pd.DataFrame, threshold: float) -> pd.Series:
    """Return which trials did not fail, reach the threshold in the first metric, and exceed every known limit."""
    found = (trials["status"] == "ok") & (trials[limits.columns[0]] >= threshold)
    for metric in limits:
        score, limit = trials[metric].to_numpy(dtype=float), limits[metric].to_numpy(dtype=float)
        found &= pd.isna(score) | pd.isna(limit) | (score > limit + ROUNDING)
    return found


def best_floors(trials: pd.DataFrame, metrics: Sequence[str], place: Sequence[str] = _PLACE) -> pd.DataFrame:
    """Return the largest value of any floor in each metric, by dataset, image and seed."""
    floors = trials[trials["floor"].to_numpy(dtype=bool) & (trials["status"] == "ok")]
    return floors.groupby(list(place))[list(metrics)].max()


def caveat(trials: pd.DataFrame) -> str:
    """Return why to doubt that images count as recovered: a lesser rule, or memorised images; empty without a doubt."""
    return " ".join(filter(None, (_lesser_rule(trials), _memorised(trials), _unseen(trials))))


def _unseen(trials: pd.DataFrame) -> str:
    """Return a sentence on the defenses that may hide the image that the client trained on; empty without any."""
    hiding = trials.loc[trials["reason"] == UNSEEN, "defense"].drop_duplicates()
    return f"Behind {english(map(str, hiding))}, {UNSEEN}." if len(hiding) else ""


def _memorised(trials: pd.DataFrame) -> str:
    """Return a sentence on the images whose reconstruction is as near to a public image; empty without any."""
    if not {RECOVERY, PublicSSIM.name} <= set(trials):
        return ""
    attacked = trials[~trials["floor"].to_numpy(dtype=bool) & (trials["status"] == "ok")]
    near = attacked[(attacked[RECOVERY] >= NEAR_PUBLIC) & (attacked[PublicSSIM.name] >= NEAR_PUBLIC)]
    images = near["image"].nunique()
    if not images:
        return ""
    return (
        f"On {plural(images, 'image')}, a reconstruction that is near the private image is as near a public one "
        f"({PublicSSIM.name}): it may come from memory and not from the gradient."
    )


def _lesser_rule(trials: pd.DataFrame) -> str:
    """Return why images count as recovered by less than the whole rule, in one sentence; empty if they do not."""
    attacked = trials[~trials["floor"].to_numpy(dtype=bool) & trials["status"].isin(("ok", "failed"))]
    if attacked.empty:
        return ""
    if CLOSENESS not in trials or attacked[CLOSENESS].isna().all():
        return f"The run has no {CLOSENESS}: an image counts as recovered by {RECOVERY} only."
    places = attacked.drop_duplicates(_PLACE)
    known = best_floors(trials, [CLOSENESS]).dropna().index
    lacking = places[~pd.MultiIndex.from_frame(places[_PLACE]).isin(known)]["image"].nunique()
    if not lacking:
        return ""
    if lacking == places["image"].nunique():
        return "The run has no floor: an image counts as recovered by the threshold only."
    return f"No floor was run on {plural(lacking, 'image')}, which count as recovered by the threshold only."


def recovered_targets(store: Store, threshold: float) -> dict[str, set[str]]:
    """Return the images that attacks (floors are none) have recovered: ``Trial.target`` -> the trials that did so."""
    trials = judged(store.scored(JUDGED), threshold)
    found: dict[str, set[str]] = {}
    own = trials[trials["recovered"] & ~trials["floor"]]
    for trial, cell, image, seed in own[["trial", "cell", *TARGET]].itertuples(index=False, name=None):
        found.setdefault(target(json.loads(cell), image, seed), set()).add(trial)
    return found
