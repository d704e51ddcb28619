"""The best that an ensemble of attacks achieves, image by image, and which of its trials were skipped."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from leakbench.analysis.statistics import wilson_interval
from leakbench.plan.matrix import RECOVERY

UNSCORED = f"{RECOVERY} is not defined for images of fewer than 11 pixels a side"


_TARGET = ["image", "seed"]


_SCENE = ["dataset", "model"]


@dataclass(frozen=True)
class Effort:
    """What one attacker did behind one defense.

    Attributes:
        attacker: the short name of an attack under a threat model.
        tried: trials that have a score.
        recovered: images (once for each seed) that this attacker was the first to recover.
        failed: trials that diverged, part of ``tried``.
        skipped: trials that were not run because another attacker had recovered the image.
        open: trials that have not ended yet.
        unscored: reason -> trials that ended without a score.
        evaluations: of the objective and its gradient, all trials together; None where the attack counts none.
        seconds: all trials together, those that ended without a score too.
    """

    attacker: str
    tried: int
    recovered: int
    failed: int
    skipped: int
    open: int
    unscored: Mapping[str, int]
    evaluations: int | None
    seconds: float


@dataclass(frozen=True)
class Standing:
    """What the ensemble recovers behind one defense, for one dataset and model.

    Attributes:
        images: those that at least one attacker could attack.
        targets: the same, once for each seed.
        share: of recovered images, each image by the share of its seeds; NaN without images.
        low: of the share's 95 % interval, Wilson's for so many trials as there are images; ``high`` likewise.
        efforts: of every attacker, in the order in which they came.
    """

    dataset: str
    model: str
    defense: str
    images: int
    targets: int
    share: float
    low: float
    high: float
    efforts: tuple[Effort, ...]

    @property
    def open(self) -> int:
        """How many trials have not ended yet."""
        return sum(effort.open for effort in self.efforts)


def standings(trials: pd.DataFrame, threshold: float) -> list[Standing]:
    """Return one standing for each dataset, model and defense, in each scene the least recovered first.

    Args:
        trials: every planned trial in the order of planning (``Store.trials``).
        threshold: in [0, 1], from which ``ssim_aligned`` on an image is recovered.
    """
    attacks = trials[~trials["floor"].to_numpy(dtype=bool)]
    names = _names(attacks)
    found = []
    for _, scene in attacks.groupby(_SCENE, sort=False):
        own = [_standing(block, threshold, names) for _, block in scene.groupby("defense", sort=False)]
        found += sorted(own, key=lambda standing: (math.isnan(standing.share), standing.share))
    return found


def _names(trials: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Return (attack, threat) -> a short name: the attack's, where no other attacker has that."""
    attackers = [(str(a), str(t)) for a, t in trials[["attack", "threat"]].drop_duplicates().itertuples(index=False)]
    short = {(attack, threat): attack.partition("(")[0] + _knowing(threat) for attack, threat in attackers}
    known = list(short.values())
    return {pair: name if known.count(name) == 1 else f"{pair[0]}, {pair[1]}" for pair, name in short.items()}


def _knowing(threat: str) -> str:
    """Return what a short name adds for an attacker who is informed of the defense: " (informed)" or " (NAME)"."""
    named = re.search(r"\binformed=([\w-]+)", threat)
    return "" if named is None else f" ({'informed' if named[1] == 'true' else named[1]})"


def _standing(block: pd.DataFrame, threshold: float, names: Mapping[tuple[str, str], str]) -> Standing:
    """Return the standing of one defense from its trials in the order of planning."""
    recovered = (block["status"] == "ok") & (block[RECOVERY] >= threshold)
    first = block[recovered].drop_duplicates(_TARGET)
    settled = pd.MultiIndex.from_frame(block[_TARGET]).isin(pd.MultiIndex.from_frame(first[_TARGET]))
    scored = block["status"].isin(("ok", "failed")) & block[RECOVERY].notna()
    targets = block[scored].drop_duplicates(_TARGET)
    hit = pd.MultiIndex.from_frame(targets[_TARGET]).isin(pd.MultiIndex.from_frame(first[_TARGET]))
    by_image = pd.Series(hit, index=targets["image"], dtype=float).groupby(level=0).mean()
    share = float(by_image.mean()) if len(by_image) else math.nan
    low, high = wilson_interval(share, len(by_image)) if len(by_image) else (math.nan, math.nan)
    waiting = block["status"] == ""
    efforts = []
    for (attack, threat), own in block.groupby(["attack", "threat"], sort=False):
        ended = own[scored[own.index]]
        lacking = own[(own["status"] != "") & ~scored[own.index]]
        reasons = lacking["reason"].where(lacking["reason"] != "", UNSCORED).value_counts(sort=False)
        counted = ended["evaluations"].dropna()
        efforts.append(
            Effort(
                attacker=names[str(attack), str(threat)],
                tried=len(ended),
                recovered=len(first.index.intersection(own.index)),
                failed=int((ended["status"] == "failed").sum()),
                skipped=int((waiting & settled)[own.index].sum()),
                open=int((waiting & ~settled)[own.index].sum()),
                unscored={str(reason): int(count) for reason, count in reasons.items()},
                evaluations=int(counted.sum()) if len(counted) else None,
                seconds=float(own["seconds"].sum()),
            )
        )
    dataset, model, defense = (str(block[axis].iloc[0]) for axis in (*_SCENE, "defense"))
    return Standing(dataset, model, defense, len(by_image), len(targets), share, low, high, tuple(efforts))


def floor_share(trials: pd.DataFrame, threshold: float) -> float:
    """Return the share of images that the best floor by itself recovers, each image by its seeds; NaN without one.

    Args:
        trials: those of one dataset and model (``Store.trials``); a floor counts once, whatever the threat model.
        threshold: see ``standings``.
    """
    floors = trials[trials["floor"].to_numpy(dtype=bool) & trials["status"].isin(("ok", "failed"))]
    floors = floors.drop_duplicates(["attack", *_TARGET])
    hit = ((floors[RECOVERY] >= threshold) & (floors["status"] == "ok")).groupby([floors["attack"], floors["image"]])
    shares = hit.mean().groupby(level=0).mean()
    return float(shares.max()) if len(shares) else math.nan


def skipped(trials: pd.DataFrame, threshold: float) -> int:
    """Return how many planned trials need not be run, since another one has recovered the image."""
    return sum(effort.skipped for one in standings(trials, threshold) for effort in one.efforts)


RECOVERED = 0.6
"""From which ``ssim_aligned`` on an image counts as recovered where the run states no threshold of its own."""
