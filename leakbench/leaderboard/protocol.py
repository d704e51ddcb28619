"""Protocols: which images, attackers, budgets and threat models an entry must have to be ranked with others."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pandas as pd

from leakbench import attacks, datasets, models
from leakbench.analysis.verdict import SUITE
from leakbench.core.text import english, plural
from leakbench.core.types import PRESETS
from leakbench.plan.matrix import Matrix, expand, load_suite, numbers_of, parse_threat
from leakbench.store.records import StoredComponent

SCALES = {"lenet-cifar10-1": "cpu", "relu-cifar10-1": "relu"}
"""The scale of the suite ``worst-case`` that each protocol is. A protocol that changes gets the next number."""


@dataclass(frozen=True)
class Protocol:
    """A protocol: a scale of the suite ``worst-case``, behind any defense.

    Attributes:
        name: its name, which ends in the number of its edition.
        scale: of the suite.
        command: what runs it behind a defense of one's own.
        matrix: of the scale; its defenses do not matter.
    """

    name: str
    scale: str
    command: str
    matrix: Matrix

    @property
    def words(self) -> str:
        """What the protocol fixes, in a sentence."""
        images, seeds = numbers_of(self.matrix.images), numbers_of(self.matrix.seeds)
        used = dict.fromkeys(attacks.spec(one) for stage in self.matrix.steps for one in stage.attacks)
        data, networks = (
            english(map(datasets.spec, self.matrix.datasets)),
            english(map(models.spec, self.matrix.models)),
        )
        return (
            f"{plural(len(images), 'image')} of {data} ({min(images)} to {max(images)}), "
            f"{plural(len(seeds), 'seed')}, the threat model paper, floors, {networks} as the network, and the "
            f"attackers {english(used)}, oblivious and adaptive; more steps and further attackers are allowed."
        )

    def covers(self, dataset: str, model: str) -> bool:
        """Return whether a dataset and a model, by their specs, are of the protocol."""
        return dataset in map(datasets.spec, self.matrix.datasets) and model in map(models.spec, self.matrix.models)

    def departures(
        self,
        planned: pd.DataFrame,
        components: Collection[StoredComponent],
        threshold: float,
        missing: Sequence[str],
    ) -> list[str]:
        """Return in which points the attacks on a defense differ from the protocol; none if they are of it.

        Args:
            planned: every planned trial behind the defense and of the floors, of a dataset and model that the protocol
                ``covers``.
            components: of the run.
            threshold: by which images were recovered.
            missing: the attackers of the protocol that did not run.
        """
        found = []
        own = planned[~planned["floor"]]
        granted = {
            replace(parse_threat(threat.partition(" [")[0]), informed=False, name="") for threat in own["threat"]
        }
        if granted != {replace(PRESETS["paper"], name="")}:
            found.append("it grants the attackers something else than the threat model paper")
        if len(own) == len(planned):
            found.append("it has no floors")
        if missing:
            found.append(f"these attackers did not run: {english(missing)}")
        wanted = set(itertools.product(numbers_of(self.matrix.images), numbers_of(self.matrix.seeds)))
        if set(zip(own["image"], own["seed"])) != wanted:
            found.append("it attacks other images or seeds")
        if threshold != self.matrix.threshold:
            found.append(f"its threshold is {threshold:g}, and not {self.matrix.threshold:g}")
        now = dict(self._versions())
        for one in components:
            version = now.get((one.kind, one.plain if one.kind != "attack" else one.name), one.version)
            if one.version != version and (own[one.kind] == one.spec).any():
                found.append(f"it has version {one.version} of {one.plain}, and the protocol has {version}")
        return found

    def _versions(self) -> Iterable[tuple[tuple[str, str], int]]:
        """Yield the version of each component."""
        for dataset in self.matrix.datasets:
            yield ("dataset", datasets.spec(dataset)), dataset.version
        for model in self.matrix.models:
            yield ("model", models.spec(model)), model.version
        for stage in self.matrix.steps:
            for attack in stage.attacks:
                yield ("attack", attack.name), attack.version


def judge(
    candidates: Sequence[tuple[Protocol, Sequence[str]]],
    planned: pd.DataFrame,
    components: Collection[StoredComponent],
    threshold: float,
) -> tuple[str, list[str]]:
    """Return the protocol that the attacks on a defense are of, empty for none, and how they differ from the nearest.

    Args:
        candidates: the protocols of the dataset and model, each with its attackers that did not run.
        planned: see ``Protocol.departures``; likewise ``components`` and ``threshold``.
    """
    found = [(one, one.departures(planned, components, threshold, missing)) for one, missing in candidates]
    if not found:
        return "", []
    nearest, departures = min(found, key=lambda pair: len(pair[1]))
    return ("" if departures else nearest.name), departures


@cache
def protocols() -> tuple[Protocol, ...]:
    """Return the protocols."""
    suite = load_suite(SUITE)
    return tuple(
        _protocol(name, scale, "" if suite["default"] == scale else f" --scale {scale}")
        for name, scale in SCALES.items()
    )


def _protocol(name: str, scale: str, option: str) -> Protocol:
    command = f"leakbench run matrix --suite {SUITE}{option} --plugin mine.py --defense none --defense mine"
    return Protocol(name, scale, command, Matrix(**expand(load_suite(SUITE), scale)[0]))
