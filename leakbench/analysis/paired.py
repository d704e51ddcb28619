"""Pairs of cells that differ in one respect alone, for paired tests."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pandas as pd

from leakbench.analysis.summary import BLOCK
from leakbench.plan.matrix import parse_threat

METRICS = {"psnr_aligned": "dB", "ssim_aligned": ""}
"""The metrics in which arms are compared, with their units; in both, more is more leakage."""


ALL_PAIRS = 5
"""Of up to so many defenses every pair is compared; of more, each with the first one alone."""


Pair = tuple[str, pd.DataFrame, pd.DataFrame]
"""What a difference is called, and the results of both arms by (image, seed)."""


def _attacks(results: pd.DataFrame, block: tuple[str, str, str]) -> pd.DataFrame:
    """Return the results of a block that are no floor's."""
    return results[(results[list(BLOCK)] == list(block)).all(axis=1) & ~results["floor"].to_numpy(dtype=bool)]


def _cells(results: pd.DataFrame, axis: str) -> dict[str, pd.DataFrame]:
    return {str(name): cell.set_index(["image", "seed"]) for name, cell in results.groupby(axis, sort=False)}


def _defenses(results: pd.DataFrame) -> list[Pair]:
    """Return the pairs of defenses of one attack: all of few, and of many each with ``none``, or else the first."""
    cells = _cells(results, "defense")
    names = sorted(cells, key=lambda name: name != "none")
    if len(names) <= ALL_PAIRS:
        pairs = list(itertools.combinations(names, 2))
    else:
        pairs = [(names[0], other) for other in names[1:]]
    return [(f"{first} − {second}", cells[first], cells[second]) for first, second in pairs]


def _informed(results: pd.DataFrame, block: tuple[str, str, str], own: pd.DataFrame) -> list[Pair]:
    """Return every attack of an informed threat model with its oblivious twins, behind each defense.

    One twin draws the secrets that it is not told, the other, where it was run, searches for them.
    """
    dataset, model, threat = block
    granted = parse_threat(threat)
    if not granted.informed:
        return []
    oblivious = {"": replace(granted, informed=False)}
    if not granted.optimises:
        oblivious[", over the search for the secrets"] = replace(granted, informed=False, optimises=True)
    pairs = []
    for over, twin in oblivious.items():
        twins = _attacks(results, (dataset, model, twin.spec()))
        for attack, cells in own.groupby("attack", sort=False):
            other = _cells(twins[twins["attack"] == attack], "defense")
            pairs += [
                (f"{attack}, {defense}{over}", cell, other[defense])
                for defense, cell in _cells(cells, "defense").items()
                if defense in other
            ]
    return pairs
