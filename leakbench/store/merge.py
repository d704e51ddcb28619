"""Several runs of one matrix (shards, or the same run on several machines) as one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from leakbench.core.lock import alone
from leakbench.errors import BadOption, LeakbenchError
from leakbench.store.connection import decoding
from leakbench.store.run_file import FILE, Store


@dataclass(frozen=True)
class MergeResult:
    """What came of a merge.

    Attributes:
        added: results that the merged run did not have before.
        finished: results that it has now, errors left out.
        planned: trials that it has now.
    """

    added: int
    finished: int
    planned: int


def merge(runs: Sequence[Path], out: Path, *, force: bool = False) -> MergeResult:
    """Add the trials and results of runs to the run in ``out``, which is made where there is none.

    A trial that has a result keeps it, unless it is an error and another run has more. Merging again changes nothing; a
    merge that was killed is started again.

    Args:
        runs: folders of runs, or run files.
        out: the folder of the merged run.
        force: merge runs of different matrices, or of different versions of what the numbers depend on, all the same.

    Raises:
        LeakbenchError: one line on what differs, or another process works in ``out``; nothing was written then.
    """
    if not runs:
        raise BadOption("no run is given; give the folders of at least one")
    target = out / FILE
    with contextlib.ExitStack() as stack:
        files = [run / FILE if run.is_dir() else run for run in runs]
        sources = [stack.enter_context(Store.open(file, readonly=True)) for file in files]
        exists = target.exists()
        if exists:
            stack.enter_context(alone(out))
        before = [stack.enter_context(Store.open(target, readonly=True))] if exists else []
        if not force:
            _check([*before, *sources])
        merged = stack.enter_context(Store.open(target) if exists else Store.create(target))
        if not exists:
            stack.enter_context(alone(out))
        others = [source for source in sources if not (exists and source.path.samefile(target))]
        added = sum(merged.absorb(source) for source in others)
        return MergeResult(added, len(merged.done()), len(merged.planned()))


def _check(stores: Sequence[Store]) -> None:
    """Raise LeakbenchError where runs differ in matrix or version."""
    matrices = [_matrices(store) for store in stores]
    most = max(matrices, key=len)
    for store, own in zip(stores, matrices):
        if not own <= most:
            other = stores[matrices.index(most)]
            raise LeakbenchError(
                f"{store.path} and {other.path} are runs of different matrices ({_difference(own, most)}); "
                "give --force to merge them all the same"
            )
    versions: dict[str, tuple[Path, str]] = {}
    for store in stores:
        for session in store.sessions():
            for name, version in {"leakbench": session.provenance.version, **session.provenance.packages}.items():
                path, first = versions.setdefault(name, (store.path, version))
                if version != first:
                    raise LeakbenchError(
                        f"{path} was made with {name} {first} and {store.path} with {name} {version}; "
                        "give --force to merge them all the same"
                    )


def _matrices(store: Store) -> set[str]:
    """Return the matrices of a run as JSON, without the run's name."""
    with decoding(store.path):
        found = [json.loads(session.provenance.matrix).items() for session in store.sessions()]
    return {json.dumps({key: value for key, value in axes if key != "name"}, sort_keys=True) for axes in found}


def _difference(first: set[str], second: set[str]) -> str:
    """Say in which axis two runs differ."""
    one, other = json.loads(min(first - second)), json.loads(min(second - first or second))
    for axis in {**one, **other}:
        if one.get(axis) != other.get(axis):
            return f"{axis}: {json.dumps(one.get(axis))} and {json.dumps(other.get(axis))}"
    return "one has more of them"
