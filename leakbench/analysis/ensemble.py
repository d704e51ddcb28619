"""The best that an ensemble of attackers achieves, image by image, and which of its trials were skipped."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

import pandas as pd

from leakbench.analysis.failures import defense_failed
from leakbench.analysis.recovery import ENCODED, TARGET, judged
from leakbench.analysis.statistics import bootstrap_interval, share_interval, unit_means
from leakbench.core.text import name_of
from leakbench.defenses.adaptive import CONTROLS, DEFAULT_ATTACKER, SIMULATE
from leakbench.metrics.release import ReleaseCosine
from leakbench.plan.matrix import RECOVERY

RECOVERED = 0.6
"""The threshold of ``ssim_aligned`` (``recovery.judged``) in a run without one of its own."""

UNSCORED = f"{RECOVERY} is not defined for images of fewer than 11 pixels a side"


UNPROVEN = "Inconclusive: no attacker that has a score behind this defense recovers an image behind any other."
"""Why it shows nothing that no image was recovered (``EnsembleResult.unproven``)."""


@dataclass(frozen=True)
class AttackerStats:
    """The trials of one attacker against one defense, counted.

    Attributes:
        attacker: the short name of an attack under a threat model.
        tried: trials that have a score.
        recovered: images (each seed counts) that this attacker was the first to recover; those that a floor recovers
            are left out.
        failed: trials that diverged, part of ``tried``.
        skipped: trials that were not run because another attacker had recovered the image.
        open: trials that have not ended yet.
        unscored: reason -> trials that ended without a score.
        evaluations: of the objective and its gradient, over all trials; None if the attack counts none.
        seconds: over all trials, including those that ended without a score.
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
class EnsembleResult:
    """The share of images that an ensemble of attackers recovers behind one defense, for one dataset and model.

    Attributes:
        images: how many images at least one attacker could attack, without those that a floor recovers.
        groups: how many groups they are in (``Dataset.group``).
        targets: attacked pairs of image and seed, with those that a floor recovers.
        by_floor: how many images are left out because a floor recovers them, by the threshold alone.
        share: of recovered images, in [0, 1]: the mean over images of the share of their seeds; NaN without images.
        low: the lower end of the share's 95 % interval (``share_interval``); ``high`` is the upper end.
        attackers: the trials of every attacker, in the order in which they ran.
        adaptive: the names of the adaptive attackers that ran, or had nothing left to recover. If images were recovered
            behind some defense, only attacks count that recovered one of them, under any threat model.
        unadaptive: why no adaptive attacker ran; empty if one did, or if there is nothing to model (``CONTROLS``).
        last: other defenses were attacked adaptively and this one was not, so that it is ranked after them.
        broken: how many targets have a trial in which the defense failed.
        unproven: images were recovered behind other defenses, and by none of the attacks that have a score here.
        itself: the part of ``share`` of which the private image itself is recovered, and not only the image that the
            client trained on in its place; NaN if the defense changes no image.
        cosine: of what clients sent and their gradient without the defense (``ReleaseCosine``): the mean over images,
            and the ends of its 95 % interval; NaN if it was not measured.
    """

    dataset: str
    model: str
    defense: str
    images: int
    groups: int
    targets: int
    by_floor: int
    share: float
    low: float
    high: float
    attackers: tuple[AttackerStats, ...]
    adaptive: tuple[str, ...] = ()
    unadaptive: str = ""
    last: bool = False
    broken: int = 0
    unproven: bool = False
    itself: float = math.nan
    cosine: tuple[float, float, float] = (math.nan, math.nan, math.nan)

    @property
    def measured(self) -> bool:
        """Whether ``cosine`` is known."""
        return not math.isnan(self.cosine[0])

    @property
    def useless(self) -> bool:
        """Whether what clients sent does not correlate with their gradient: the interval of ``cosine`` contains 0."""
        mean, low, high = self.cosine
        return low <= 0 <= high or mean == 0

    @property
    def unranked(self) -> bool:
        """Whether the defense comes after those whose shares show how much they protect."""
        return self.last or self.unproven or self.useless

    @property
    def attacked_by(self) -> str:
        """Which adaptive attackers ran, in a few words."""
        return attacked_by(self.defense, self.adaptive)

    @property
    def open(self) -> int:
        """How many trials have not ended yet."""
        return sum(one.open for one in self.attackers)


def attacked_by(defense: str, adaptive: Sequence[str]) -> str:
    """Return which adaptive attackers ran behind a defense, in a few words."""
    if name_of(defense) in CONTROLS:
        return "nothing to model"
    only = list(adaptive) == [SIMULATE]
    return f"{SIMULATE} only" if only else ", ".join(adaptive) or "not attacked adaptively"


SCENE = attrgetter("dataset", "model")
"""The dataset and the model of a result; results of the same ones follow each other."""


def ensemble_results(trials: pd.DataFrame, threshold: float) -> list[EnsembleResult]:
    """Return one result for each dataset, model and defense; the least recovered defense of a model comes first.

    If some defenses were attacked adaptively and others were not, these come last, with those that only attacks without
    a positive control have scores of (``EnsembleResult.unproven``), and those that send nothing of their gradient
    (``EnsembleResult.useless``).
    One that failed in some trials comes after all others: what is recovered behind it does not count as protection.

    Args:
        trials: every planned trial in the order of planning (``Store.trials``).
        threshold: in [0, 1]; see ``recovery.judged``.
    """
    attacks = by_server(judged(trials, threshold)[~trials["floor"].to_numpy(dtype=bool)])
    names = attacker_names(attacks)
    found = []
    for _, scene in attacks.groupby(["dataset", "model"], sort=False):
        proven = set(scene.loc[scene["recovered"] & ~scene["by_floor"], "attack"])
        own = [_ensemble_result(block, names, proven) for _, block in scene.groupby("defense", sort=False)]
        some = any(one.adaptive for one in own)
        own = [replace(one, last=some and bool(one.unadaptive)) for one in own]
        found += sorted(own, key=lambda one: (one.broken > 0, one.unranked, math.isnan(one.share), one.share))
    return found


def attacker_names(trials: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Return (attack, threat) -> a short name: the attack without options, or both specs if another has that name."""
    attackers = [(str(a), str(t)) for a, t in trials[["attack", "threat"]].drop_duplicates().itertuples(index=False)]
    short = {(attack, threat): name_of(attack) + _adaptive(threat) for attack, threat in attackers}
    known = list(short.values())
    return {pair: name if known.count(name) == 1 else f"{pair[0]}, {pair[1]}" for pair, name in short.items()}


def _adaptive(threat: str) -> str:
    """Return what the short name of an adaptive attacker adds: " (adaptive)" or " (NAME)"."""
    named = informed_of(threat)
    return f" ({'adaptive' if named == 'true' else named})" if named else ""


def informed_of(threat: str) -> str:
    """Return ``informed`` of a threat model's spec; empty for an oblivious attacker."""
    named = re.search(r"\binformed=([\w-]+)", threat)
    return "" if named is None else named[1]


def server_of(threat: str) -> str:
    """Return the malicious server that a threat model's spec names; empty for an honest one."""
    named = re.search(r"\bserver=([\w-]+(?:\([^)]*\))?)", threat)
    return "" if named is None else named[1]


def by_server(trials: pd.DataFrame) -> pd.DataFrame:
    """Return trials whose column ``model`` tells a network that a malicious server crafted from the honest one."""
    servers = trials["threat"].astype(str).map(server_of)
    models = trials["model"].astype(str)
    return trials.assign(model=models.where(servers == "", models + ", crafted by a malicious server: " + servers))


def _ensemble_result(
    block: pd.DataFrame, names: Mapping[tuple[str, str], str], proven: Collection[str]
) -> EnsembleResult:
    """Return the result of one defense from its judged trials in the order of planning.

    Args:
        block: the trials.
        names: of attackers (``attacker_names``).
        proven: the attacks that recovered an image behind any defense.
    """
    recovered = block["recovered"]
    first = block[recovered & ~block["by_floor"]].drop_duplicates(TARGET)
    known = recovered.groupby([block[axis] for axis in TARGET]).transform("any")
    scored = block["status"].isin(("ok", "failed")) & block[RECOVERY].notna()
    targets = block[scored & ~block["by_floor"]].drop_duplicates(TARGET)
    by_image = unit_means(known[targets.index].to_numpy(dtype=float), targets["image"].to_numpy())
    share = float(by_image.mean()) if len(by_image) else math.nan
    changes = ENCODED[0] in block and bool(block[ENCODED[0]].notna().any())
    itself = block["itself"].groupby([block[axis] for axis in TARGET]).transform("any")[targets.index]
    groups = targets.drop_duplicates("image").sort_values("image")["group"].to_numpy()
    low, high = share_interval(by_image, groups)
    waiting = block["status"] == ""
    attackers, adaptive, refused, scoring = [], dict[str, None](), list[str](), set[str]()
    for (attack, threat), own in block.groupby(["attack", "threat"], sort=False):
        ended = own[scored[own.index]]
        lacking = own[(own["status"] != "") & ~scored[own.index]]
        reasons = lacking["reason"].where(lacking["reason"] != "", UNSCORED).value_counts(sort=False)
        counted = ended["evaluations"].dropna()
        attackers.append(
            AttackerStats(
                attacker=names[str(attack), str(threat)],
                tried=len(ended),
                recovered=len(first.index.intersection(own.index)),
                failed=int((ended["status"] == "failed").sum()),
                skipped=int((waiting & known)[own.index].sum()),
                open=int((waiting & ~known)[own.index].sum()),
                unscored={str(reason): int(count) for reason, count in reasons.items()},
                evaluations=int(counted.sum()) if len(counted) else None,
                seconds=float(own["seconds"].sum()),
            )
        )
        informed, scored_any = informed_of(str(threat)), bool(attackers[-1].tried or attackers[-1].skipped)
        scoring |= {str(attack)} if scored_any else set()
        if informed and scored_any and (attack in proven or attackers[-1].skipped or not proven):
            adaptive[DEFAULT_ATTACKER if informed == "true" else informed] = None
        elif informed:
            nothing = [f"{attack} recovers no image behind any defense"] if scored_any else []
            refused += [*attackers[-1].unscored, *nothing]
    dataset, model, defense = (str(block[axis].iloc[0]) for axis in ("dataset", "model", "defense"))
    return EnsembleResult(
        dataset=dataset,
        model=model,
        defense=defense,
        images=len(by_image),
        groups=len(set(groups)),
        targets=len(block[scored].drop_duplicates(TARGET)),
        by_floor=block.loc[scored & block["by_floor"], "image"].nunique(),
        share=share,
        low=low,
        high=high,
        attackers=tuple(attackers),
        adaptive=tuple(adaptive),
        unadaptive="" if adaptive or name_of(defense) in CONTROLS else next(iter(refused), "no adaptive attacker ran"),
        broken=len(block[defense_failed(block)].drop_duplicates(TARGET)),
        unproven=bool(proven and scoring and len(by_image)) and not scoring & set(proven),
        itself=float(itself.groupby(targets["image"]).mean().mean()) if changes else math.nan,
        cosine=_cosine(block),
    )


def _cosine(trials: pd.DataFrame) -> tuple[float, float, float]:
    """Return the mean of ``ReleaseCosine`` over the images of one defense's trials, with its interval."""
    name = ReleaseCosine.name
    known = trials.dropna(subset=name).drop_duplicates(TARGET) if name in trials else trials[:0]
    if known.empty:
        return math.nan, math.nan, math.nan
    own = known[name].to_numpy(dtype=float)
    return float(own.mean()), *bootstrap_interval(own, known["image"].to_numpy(), known["group"].to_numpy())


def floor_share(trials: pd.DataFrame, threshold: float) -> float:
    """Return the share of images on which the best floor reaches the threshold: the mean over images of their seeds.

    It is NaN without floors.

    Args:
        trials: those of one dataset and model (``Store.trials``); a floor counts once, whatever the threat model.
        threshold: in [0, 1].
    """
    floors = trials[trials["floor"].to_numpy(dtype=bool) & trials["status"].isin(("ok", "failed"))]
    floors = floors.drop_duplicates(["attack", *TARGET])
    hit = ((floors[RECOVERY] >= threshold) & (floors["status"] == "ok")).groupby([floors["attack"], floors["image"]])
    shares = hit.mean().groupby(level=0).mean()
    return float(shares.max()) if len(shares) else math.nan
