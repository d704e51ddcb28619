"""How long the searches of an audit may take, from one evaluation of each."""

import contextlib
from collections import Counter

from leakbench import attacks
from leakbench.core.rng import Rng
from leakbench.core.text import english, plural
from leakbench.engine.progress import duration
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix


def expected_time(matrix: Matrix, seen: Observation) -> str:
    """Return in one line how long the searches of a matrix take at most, about; empty if there is no search.

    Args:
        matrix: the trials of the audit, all of one network.
        seen: what the server sees of the attacked images behind one of its defenses, on the device of the audit.
    """
    counts = Counter(attacks.spec(trial.cell.attack) for trial in matrix.trials())
    seconds: dict[str, float] = {}
    for spec, count in counts.items():
        attack = attacks.parse(spec)
        with contextlib.suppress(Exception):  # it fails again, and is recorded, when its trials run
            found = attack.seconds(seen, Rng(tuple(map(str, range(seen.trials))), seen.device))
            if found is not None:
                seconds[spec] = found * count / seen.trials
    if not seconds:
        return ""
    each = english(f"{spec} {duration(value)}" for spec, value in seconds.items())
    total, images = duration(sum(seconds.values())), plural(seen.trials * max(seen.count, 1), "image")
    return (
        f"expected time: at most about {total} of searches for {images} ({each}), "
        "and the closed forms; images that one attack recovers are skipped by the next"
    )
