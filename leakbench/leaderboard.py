"""Check an entry of a leaderboard: hold it against its run, and run a sample of its trials again."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from leakbench import engine
from leakbench.errors import BadOption
from leakbench.matrix import RECOVERY, Matrix
from leakbench.progress import Silent
from leakbench.report import utility
from leakbench.report.again import spec_of
from leakbench.report.leaderboard import Entry, TrialOf, entries
from leakbench.report.statistics import ALPHA
from leakbench.store import FILE, Store


@dataclass(frozen=True)
class Repeat:
    """A trial and what came of it again: ``score`` is ``ssim_aligned``, NaN where there was none."""

    trial: TrialOf
    status: str
    score: float


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        differing: the fields in which the entry is not what the run says.
        repeats: the sample.
        threshold: from which an image is recovered.
    """

    differing: tuple[str, ...]
    repeats: tuple[Repeat, ...]
    threshold: float

    @property
    def more(self) -> int:
        """How many trials recover their image again, though the entry has it that they did not."""
        return sum(not self._before(one) and self._after(one) for one in self.repeats)

    @property
    def less(self) -> int:
        """How many trials recovered their image in the entry, and do not again."""
        return sum(self._before(one) and not self._after(one) for one in self.repeats)

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p that flips go either way alike."""
        flips = self.more + self.less
        return 1.0 if not flips else float(stats.binomtest(self.more, flips).pvalue)

    @property
    def holds(self) -> bool:
        """Whether the entry is what its run says, and the sample comes out as it did but for chance."""
        return not self.differing and self.p > ALPHA

    def _before(self, one: Repeat) -> bool:
        return one.trial.status == "ok" and (one.trial.score or 0.0) >= self.threshold

    def _after(self, one: Repeat) -> bool:
        return one.status == "ok" and one.score >= self.threshold


def check(
    entry: Entry, run: Path, *, sample: int = 8, seed: int = 0, device: str = "auto", progress: Silent | None = None
) -> Check:
    """Hold an entry against the run that it is of, and run a sample of its trials again.

    Every trial that is run again has the id that the entry names, so its settings are the same to the last option; in
    float32 two machines agree on how often images are recovered, not on each.

    Args:
        entry: the entry.
        run: the folder of the run.
        sample: how many trials, drawn at random from those with a score.
        seed: of the draw.
        device: see ``engine.run``.
        progress: see ``engine.run``.

    Raises:
        BadOption: the run has no such defense, or its trials cannot be made again with this leakbench.
    """
    with Store.open(run / FILE, readonly=True) as store:
        components = {(one.kind, one.spec): one for one in store.components()}
        mine = [
            other
            for other in entries(store, run.resolve().name, utility.load(run / utility.FILE))
            if (other.dataset, other.model, other.defense) == (entry.dataset, entry.model, entry.defense)
        ]
        planned = store.trials().set_index("trial")
    if not mine:
        raise BadOption(
            f"the run {str(run)!r} has no finished defense {entry.defense!r} on {entry.dataset}, {entry.model}; give "
            "the run that the entry is of"
        )
    recorded = mine[0].model_dump()
    differing = tuple(name for name, value in entry.model_dump().items() if value != recorded[name])
    scored = [trial for trial in entry.trials if trial.status in ("ok", "failed") and trial.id in planned.index]
    if not scored:
        raise BadOption(
            f"none of the entry's trials with a score is in the run {str(run)!r}; give the run that it is of"
        )
    chosen = random.Random(seed).sample(scored, min(sample, len(scored)))
    repeats = []
    with tempfile.TemporaryDirectory() as folder:
        for place, trial in enumerate(chosen):
            row = planned.loc[trial.id]
            axes = {
                f"{axis}s": [spec_of(components[axis, str(row[axis])])]
                for axis in ("attack", "defense", "model", "dataset")
            }
            matrix = Matrix(
                **axes, threats=[str(row["threat"])], images=[trial.image], seeds=[trial.seed], floors=False
            )
            (made,) = matrix.trials()
            if made.id != trial.id:
                raise BadOption(
                    f"trial {trial.id} ({trial.attack}) has other settings here (as {made.id}): it takes the "
                    f"leakbench, data and plugins that made it: {', '.join(entry.versions)}"
                )
            again = engine.run(matrix, Path(folder) / str(place), device=device, progress=progress).results().iloc[0]
            score = float(again[RECOVERY])
            repeats.append(Repeat(trial, str(again["status"]), score))
    return Check(differing, tuple(repeats), entry.threshold)


def words(found: Check) -> Sequence[str]:
    """Return what a check found, line by line."""
    lines = [f"the entry is not what its run says: {name} differs" for name in found.differing]
    for one in found.repeats:
        before = math.nan if one.trial.score is None else one.trial.score
        lines.append(
            f"{one.trial.id} {one.trial.attack}, image {one.trial.image}: "
            f"{RECOVERY} {before:.3f} ({one.trial.status}), again {one.score:.3f} ({one.status})"
        )
    lines.append(
        f"of {len(found.repeats)} trials run again, {found.more} recover an image that was not recovered, and "
        f"{found.less} no longer do (McNemar's p {found.p:.2g})"
    )
    lines.append("the entry holds" if found.holds else "the entry does not hold")
    return lines
