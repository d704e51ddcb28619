"""Pairs of cells that differ in one respect only, for paired tests."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from leakbench.analysis.statistics import UNIT
from leakbench.analysis.summary import BLOCK
from leakbench.plan.matrix import parse_threat

METRICS = {"psnr_aligned": "dB", "ssim_aligned": ""}
"""The metrics in which cells are compared, with their units; in both, a higher value is more leakage."""

MAX_COMPARED = 5
"""Up to this many defenses are all compared in pairs; of more, each is compared with the first one only."""


class Pair(NamedTuple):
    """A difference: its name, and the results of both cells by ``UNIT``."""

    name: str
    first: pd.DataFrame
    second: pd.DataFrame


def attacks_of(results: pd.DataFrame, block: tuple[str, str, str]) -> pd.DataFrame:
    """Return the results of a dataset, model and threat model, without those of floors."""
    return results[(results[list(BLOCK)] == list(block)).all(axis=1) & ~results["floor"].to_numpy(dtype=bool)]


def _cells(results: pd.DataFrame, axis: str) -> dict[str, pd.DataFrame]:
    return {str(name): cell.set_index(UNIT) for name, cell in results.groupby(axis, sort=False)}


def defense_pairs(results: pd.DataFrame) -> list[Pair]:
    """Return the pairs of defenses of one attack; the first defense of many is ``none`` if it was run."""
    cells = _cells(results, "defense")
    names = sorted(cells, key=lambda name: name != "none")
    pairs = list(itertools.combinations(names, 2))
    if len(names) > MAX_COMPARED:
        pairs = [(names[0], other) for other in names[1:]]
    return [Pair(f"{first} − {second}", cells[first], cells[second]) for first, second in pairs]


def informed_pairs(results: pd.DataFrame, block: tuple[str, str, str], own: pd.DataFrame) -> list[Pair]:
    """Return every attack of an adaptive threat model with its oblivious twins, behind each defense.

    One twin draws the secrets that it is not given at random; the other, if it was run, optimises them.
    """
    dataset, model, threat = block
    granted = parse_threat(threat)
    if not granted.informed:
        return []
    oblivious = {"": replace(granted, informed=False)}
    if not granted.optimises:
        oblivious[", over optimised secrets"] = replace(granted, informed=False, optimises=True)
    pairs = []
    for over, twin in oblivious.items():
        twins = attacks_of(results, (dataset, model, twin.spec()))
        for attack, cells in own.groupby("attack", sort=False):
            other = _cells(twins[twins["attack"] == attack], "defense")
            pairs += [
                Pair(f"{attack}, {defense}{over}", cell, other[defense])
                for defense, cell in _cells(cells, "defense").items()
                if defense in other
            ]
    return pairs
