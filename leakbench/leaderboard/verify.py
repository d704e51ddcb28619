"""Verify an entry of a leaderboard: compare it with its run, and run a sample of its trials again."""

import math
import random
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from leakbench.analysis import pareto as utility
from leakbench.analysis.recovery import CLOSENESS, judged
from leakbench.analysis.reproduce import owners, spec_of
from leakbench.analysis.statistics import ALPHA, holm, sign_flip_test, wilcoxon_test
from leakbench.core.lock import remove_abandoned, temporary_folder
from leakbench.engine import run as engine
from leakbench.engine.progress import NullProgress
from leakbench.engine.run import RunOptions
from leakbench.errors import BadOption, LeakbenchError
from leakbench.leaderboard.entry import Entry, TrialOf, entries
from leakbench.plan.matrix import RECOVERY, Matrix
from leakbench.plan.trial import split_label
from leakbench.store.records import PluginFile
from leakbench.store.run_file import FILE, Store


@dataclass(frozen=True)
class Repeat:
    """A trial and its second outcome.

    Attributes:
        trial: as the entry has it.
        status: of the second outcome.
        score: its ``ssim_aligned``, NaN if there is none.
        recovered: whether the trial recovered its image in the run, and whether it does now (``analysis.recovery``).
        group: of the image.
    """

    trial: TrialOf
    status: str
    score: float
    recovered: tuple[bool, bool]
    group: int

    @property
    def before(self) -> float:
        """The score in the entry, NaN if there is none."""
        return math.nan if self.trial.score is None else self.trial.score


MIN_SAMPLE = 7
"""With fewer groups no difference of a sample can be significant, in either of its two tests (``smallest_p``)."""

SCORE_TOLERANCE = 0.01
"""Scores that differ by less count as equal."""


NEW_FIELDS = {"protocol", "departures"}
"""What entries of before protocols do not state."""


@dataclass(frozen=True)
class EntryCheck:
    """The outcome of the verification of an entry.

    Attributes:
        differing: the fields in which the entry differs from the run.
        repeats: the sample, run again.
        seed: the seed by which the sample was drawn.
    """

    differing: tuple[str, ...]
    repeats: tuple[Repeat, ...]
    seed: int = 0

    @property
    def changed(self) -> list[Repeat]:
        """The trials that are unsupported in one of the two outcomes only."""
        return [one for one in self.repeats if (one.trial.status == "unsupported") != (one.status == "unsupported")]

    @property
    def more(self) -> int:
        """How many trials recover their image now and did not in the entry."""
        return [one.recovered for one in self.repeats].count((False, True))

    @property
    def less(self) -> int:
        """How many trials recovered their image in the entry and do not now."""
        return [one.recovered for one in self.repeats].count((True, False))

    @property
    def flips(self) -> float:
        """The two-sided p of the exact sign-flip test of ``more`` against ``less``, by group."""
        changes = [int(now) - int(before) for before, now in (one.recovered for one in self.repeats)]
        return sign_flip_test(changes, [one.group for one in self.repeats])

    @property
    def scores(self) -> float:
        """The two-sided p of Wilcoxon's test of the scores; differences below ``SCORE_TOLERANCE`` count as none."""
        changes = np.array([one.score - one.before for one in self.repeats])
        groups = np.array([one.group for one in self.repeats])
        scored = ~np.isnan(changes)
        changes[np.abs(changes) < SCORE_TOLERANCE] = 0.0
        p = wilcoxon_test(changes[scored], groups[scored]) if scored.any() else math.nan
        return 1.0 if math.isnan(p) else p

    @property
    def holds(self) -> bool:
        """Whether the entry equals its run, and neither test of the sample is significant (Holm's correction)."""
        return not self.differing and not self.changed and min(holm([self.flips, self.scores])) > ALPHA


def check(
    entry: Entry,
    run: Path,
    *,
    sample: int = 16,
    seed: int | None = None,
    device: str = "auto",
    salt: str | None = None,
    progress: NullProgress | None = None,
) -> EntryCheck:
    """Compare an entry with its run, and run a sample of its trials again.

    Every trial that is run again has the id in the entry, so all its settings are the same; by default it has the
    entry's salt, so all its draws are too. Another salt reveals an attack that knows the entry's. In float32, two
    machines agree on how often images are recovered, but not on each image.

    Args:
        entry: the entry.
        run: the folder of the run.
        sample: the number of trials, drawn at random from those of the entry.
        seed: the seed by which they are drawn; None for a random one.
        device: see ``engine.run``.
        salt: of the repeated trials; None for that of the entry.
        progress: see ``engine.run``.

    Raises:
        BadOption: the run has no such defense, or its trials cannot be made again with this leakbench.
        LeakbenchError: a trial ends in an error here, so that the entry cannot be verified.
    """
    with Store.open(run / FILE, readonly=True) as store:
        components = {(one.kind, one.spec): one for one in store.components()}
        mine = [
            other
            for other in entries(store, run.resolve().name, utility.load(run / utility.FILE))[0]
            if (other.dataset, other.model, other.defense) == (entry.dataset, entry.model, entry.defense)
        ]
        planned, records = store.trials().set_index("trial"), store.records()
    if not mine:
        raise BadOption(
            f"the run {str(run)!r} has no finished defense {entry.defense!r} on {entry.dataset}, {entry.model}; give "
            "the run of the entry"
        )
    recorded = mine[0].model_dump()
    unstated = NEW_FIELDS - entry.model_fields_set
    differing = tuple(
        name
        for name, value in entry.model_dump().items()
        if name != "run" and name not in unstated and value != recorded[name]
    )
    known = [trial for trial in entry.trials if trial.id in planned.index]
    if not known:
        raise BadOption(f"none of the entry's trials is in the run {str(run)!r}; give the run of the entry")
    seed = secrets.randbits(32) if seed is None else seed
    chosen = random.Random(seed).sample(known, min(sample, len(known)))
    repeats: list[Repeat] = []
    used: set[PluginFile] = set()
    remove_abandoned()
    with temporary_folder("check") as folder:
        for place, trial in enumerate(chosen):
            row = planned.loc[trial.id]
            threat, own = str(row["threat"]), components["defense", str(row["defense"])]
            axes = {
                f"{axis}s": [spec_of(components[axis, str(row[axis])])]
                for axis in ("attack", "defense", "model", "dataset")
            }
            axes["defenses"] += owners(components.values(), own, threat)
            client = split_label(str(row["dataset"]))[1] or "local"
            images = [trial.image, *records[trial.id].others]
            matrix = Matrix(**axes, threats=[threat], clients=[client], images=images, seeds=[trial.seed], floors=False)
            made = [one.id for one in matrix.trials()]
            if trial.id not in made:
                raise BadOption(
                    f"trial {trial.id} ({trial.attack}) has other settings here (id {made[0]}); use the "
                    f"leakbench, data and plugins that made the entry: {', '.join(entry.versions)}"
                )
            options = RunOptions(device, salt=entry.salt if salt is None else salt)
            out = engine.run(matrix, folder / str(place), options, progress=progress)
            with Store.open(out / FILE, readonly=True) as store:
                done = store.results()
                used |= {one for one in store.plugins() if one.kind in ("attack", "generator")}
            again = done[done["trial"] == trial.id].iloc[0]
            if again["status"] == "error":
                raise LeakbenchError(
                    f"trial {trial.id} ({trial.attack}) ends in an error here ({again['reason']}), so that the entry "
                    "cannot be verified; fix the error, or check on another machine"
                )
            now = planned.copy()
            for column in ("status", RECOVERY, CLOSENESS):
                now.loc[trial.id, column] = again[column]
            before, after = (bool(judged(one, entry.threshold).loc[trial.id, "recovered"]) for one in (planned, now))
            score, group = float(again[RECOVERY]), int(str(row["group"]))
            repeats.append(Repeat(trial, str(again["status"]), score, (before, after), group))
    stated = {PluginFile(**one.model_dump()) for one in entry.plugins}
    differing += tuple(f"plugins: here, the file is {one.words}" for one in sorted(used - stated, key=str))
    return EntryCheck(differing, tuple(repeats), seed)
