"""What an attack with a generator has from the gradient: its gain over its floor and its control, pair by pair."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from leakbench.analysis.statistics import UNIT, paired_difference
from leakbench.store.records import MetricInfo, StoredComponent

CONTROL, GENERATOR, NONE = "control", "generator", "none"
"""The options of attacks that this rests on, and the value of the first for no control."""


@dataclass(frozen=True)
class ControlGain:
    """The gain of an attack over a floor or a control, on the same images and seeds.

    Attributes:
        attack: its spec.
        defense: the defense's spec.
        control: the spec of the floor or control: a floor that draws from the same generator, or the attack
            itself with another gradient.
        values: metric -> (mean, low, high) with the 95 % interval; above 0 means that more leaks.
    """

    attack: str
    defense: str
    control: str
    values: Mapping[str, tuple[float, float, float]]


def control_gains(
    results: pd.DataFrame, components: Sequence[StoredComponent], metrics: Sequence[MetricInfo]
) -> list[ControlGain]:
    """Return the gains of every attack with a generator over its floors and controls, behind each defense.

    Args:
        results: the trials of one dataset, model and threat model (``Store.results``), floors behind each defense.
        components: what each spec stands for.
        metrics: those to compare in.
    """
    floors = set(results.loc[results["floor"].to_numpy(dtype=bool), "attack"])
    cells = {key: cell.set_index(UNIT) for key, cell in results.groupby(["attack", "defense"], sort=False)}
    found = []
    for attack, control in _pairs(components, floors):
        for defense in results.loc[results["attack"] == attack, "defense"].drop_duplicates():
            if (control, defense) not in cells:
                continue
            values = {}
            for metric in (one for one in metrics if one.name in results):
                sign = 1 if metric.higher_is_better else -1
                own, other = (sign * cells[name, defense][metric.name] for name in (attack, control))
                gain = paired_difference(own, other.reindex(own.index))
                if not math.isnan(gain.mean):
                    values[metric.name] = (gain.mean, gain.low, gain.high)
            if values:
                found.append(ControlGain(attack, str(defense), control, values))
    return found


def _pairs(components: Sequence[StoredComponent], floors: set[str]) -> Iterator[tuple[str, str]]:
    """Yield each attack with a generator that is no control, with each floor and control that it is compared with."""
    attacks = [one for one in components if one.kind == "attack" and GENERATOR in one.options]
    for attack in attacks:
        if attack.spec in floors or attack.options.get(CONTROL, NONE) != NONE:
            continue
        for other in attacks:
            same_floor = other.spec in floors and other.options[GENERATOR] == attack.options[GENERATOR]
            plain = {**other.options, CONTROL: NONE}
            if same_floor or (other.options.get(CONTROL, NONE) != NONE and plain == dict(attack.options)):
                yield attack.spec, other.spec
