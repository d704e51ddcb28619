"""Deterministic sharding of a matrix, for machines that share no file system."""

import hashlib
from collections.abc import Sequence

from leakbench.engine.batch_size import ALWAYS_TOGETHER
from leakbench.errors import BadOption
from leakbench.plan.trial import Trial, target


def parse(text: str) -> tuple[int, int]:
    """Return (i, n) of ``i/n``, from 1/n to n/n.

    Raises:
        BadOption: it has another form.
    """
    first, slash, second = text.partition("/")
    if slash and first.isascii() and second.isascii() and first.isdigit() and second.isdigit():
        place, count = int(first), int(second)
        if 1 <= place <= count:
            return place, count
    raise BadOption(f"shard {text!r} must be i/n, from 1/n to n/n, such as 3/16")


def part(trials: Sequence[Trial], shard: str, *, ensemble: bool) -> list[Trial]:
    """Return the trials of a shard, in their order; each trial of a matrix is in one of its n shards.

    A cell with enough images and seeds is cut into n pieces, one for each shard, so that all shards take equally long.
    A smaller cell is cut into pieces that still fill a chunk, which a hash assigns to shards; a shard may be empty. In
    an ensemble, whose attacks skip images that another one has recovered, all trials on one image behind one defense
    are in the same shard. The floors on this image, by which recovered is judged, are in each shard that attacks it, so
    that a floor's trial may be in several shards.

    Args:
        trials: all planned trials.
        shard: ``i/n``.
        ensemble: whether the matrix has a threshold.

    Raises:
        BadOption: see ``parse``.
    """
    place, count = parse(shard)
    groups: dict[str, dict[tuple[int, int], list[Trial]]] = {}
    for trial in trials:
        key = target(trial.cell.settings, 0, 0) if ensemble else trial.cell.key
        groups.setdefault(key, {}).setdefault((trial.seed, trial.image), []).append(trial)
    own: set[str] = set()
    dealt: list[tuple[str, list[list[Trial]]]] = []
    for key, units in groups.items():
        alike = list(units.values())
        pieces = min(len(alike), max(-(-len(alike) // ALWAYS_TOGETHER), -(-count // len(groups))))
        if len(alike) >= count * ALWAYS_TOGETHER or pieces > count:
            own |= {trial.id for unit in _piece(alike, place - 1, count) for trial in unit}
        else:
            dealt += [(f"{key}/{number}", _piece(alike, number, pieces)) for number in range(pieces)]
    dealt.sort(key=lambda piece: hashlib.sha256(piece[0].encode()).digest())
    own |= {trial.id for _, piece in dealt[place - 1 :: count] for unit in piece for trial in unit}
    attacked = {_image(trial) for trial in trials if ensemble and trial.id in own}
    return [trial for trial in trials if trial.id in own or (trial.cell.attack.floor and _image(trial) in attacked)]


def _image(trial: Trial) -> tuple[str, int, int]:
    return trial.cell.specs["dataset"], trial.image, trial.seed


def _piece(units: list[list[Trial]], number: int, pieces: int) -> list[list[Trial]]:
    return units[number * len(units) // pieces : (number + 1) * len(units) // pieces]
