"""The summary of a run: every attack behind every defense, its means, and its gain over the best floor."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from leakbench.analysis.failures import defense_failed
from leakbench.analysis.recovery import TARGET
from leakbench.analysis.statistics import UNIT, Array, bootstrap_interval
from leakbench.store.records import MetricInfo

BLOCK = ("dataset", "model", "threat")
"""What one table is about."""

ANY = "(any)"
"""What a floor has in the defense's place: it uses no gradient, so it is the same behind every defense."""

LABEL = "label_correct"
"""The metric that is not about images."""

STATUSES = ("ok", "failed", "unsupported", "error")


def blocks(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Yield each dataset, model and threat model with its rows, in the order in which they are first met."""
    for (dataset, model, threat), own in rows.groupby(list(BLOCK), sort=False):
        yield (str(dataset), str(model), str(threat)), own


def without_repeats(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results with each floor once: behind ``ANY`` defense, taken from the first defense that scored it."""
    floor = results["floor"].to_numpy(dtype=bool)
    if not floor.any():
        return results
    unscored = results["status"].isin(("unsupported", "error"))
    floors = results[floor].assign(defense=ANY, unscored=unscored[floor]).sort_values("unscored", kind="stable")
    floors = floors.drop_duplicates([*BLOCK, "attack", "image", "seed"]).drop(columns="unscored").sort_index()
    return pd.concat([floors, results[~floor]])


def rescored(results: pd.DataFrame, metrics: Sequence[MetricInfo]) -> pd.DataFrame:
    """Return the results in which each failed trial has the score of the best floor in place of the grey image's.

    An attacker whose attack diverged still has the floors. The floor is chosen for each dataset and metric by its mean
    over all images, which needs no private image, and gives its score on the trial's image and seed. Without a floor's
    score the trial keeps its own; so does ``LABEL``, since an attack that diverged may have inferred the label.
    """
    floor = results["floor"].to_numpy(dtype=bool)
    failed = (results["status"] == "failed").to_numpy() & ~floor
    if not failed.any():
        return results
    found = results.copy()
    for dataset in results.loc[failed, "dataset"].unique():
        here = (results["dataset"] == dataset).to_numpy()
        floors = results[here & floor & (results["status"] == "ok").to_numpy()].drop_duplicates(["attack", *TARGET])
        rows = found.index[here & failed]
        wanted = pd.MultiIndex.from_frame(results.loc[rows, TARGET])
        for metric in (one for one in metrics if one.name in results and one.name != LABEL and len(floors)):
            table = floors.pivot(index=TARGET, columns="attack", values=metric.name)
            name, values = _best_floor({str(name): table[name].to_numpy() for name in table}, metric)
            if name:
                best = pd.Series(values, table.index).reindex(wanted).to_numpy()
                found.loc[rows, metric.name] = np.where(np.isnan(best), found.loc[rows, metric.name], best)
    return found


def summarise(results: pd.DataFrame, metrics: Sequence[MetricInfo]) -> pd.DataFrame:
    """Return one row per dataset, model, threat, attack and defense; floors come first and once.

    ``n`` trials ended, of which ``ok``, ``failed``, ``unsupported`` and ``error``; of the errors, ``broken`` are those
    of the defense. For every metric M: ``M`` is its
    mean over the ``M n`` trials that have it (failed ones by ``rescored``), ``M low`` and ``M high`` its 95 % interval;
    ``M gain`` is the mean over (image, seed) pairs of the leakage beyond the floor ``M floor``, positive
    if the attack leaks more, with ``M gain low`` and ``M gain high``. The floor is the one with the best mean over the
    same pairs; floors themselves have no gain.
    """
    rows = []
    for key, block in blocks(without_repeats(rescored(results, metrics))):
        floors = {str(name): _paired(part) for name, part in block[block["floor"]].groupby("attack", sort=False)}
        ranks = [pd.factorize(block[axis])[0] for axis in ("attack", "defense")]
        for _, cell in block.groupby(ranks):
            attack, defense = cell[["attack", "defense"]].iloc[0]
            row: dict[str, Any] = dict(zip(BLOCK, key)) | {"attack": attack, "defense": defense}
            row |= {"floor": defense == ANY, "n": len(cell)}
            row |= {status: int((cell["status"] == status).sum()) for status in STATUSES}
            row["broken"] = int(defense_failed(cell).sum())
            paired = _paired(cell)
            below = {} if row["floor"] else {name: floor.reindex(paired.index) for name, floor in floors.items()}
            for metric in metrics:
                row |= _measure(paired, below, metric)
            rows.append(row)
    columns = [*BLOCK, "attack", "defense", "floor", "n", *STATUSES, "broken"]
    columns += [column for metric in metrics for column in _columns(metric.name)]
    return pd.DataFrame(rows, columns=columns)


def strongest(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return, per dataset, model, threat and defense, the attack that gains most over its best floor.

    Where no attack beats its floor, the floor is the strongest attack and the gain is 0: an attacker can always
    return the floor, so that no defense is ranked as leaking less than that.
    """
    columns = {f"{metric} gain": "gain", f"{metric} gain low": "low", f"{metric} gain high": "high"}
    cells = summary[~summary["floor"].astype(bool)].rename(columns=columns).dropna(subset="gain")
    best = cells.loc[cells.groupby([*BLOCK, "defense"], sort=False)["gain"].idxmax()].reset_index(drop=True)
    at_floor = best["gain"] <= 0
    best = best.assign(attack=best["attack"].mask(at_floor, best[f"{metric} floor"]), floor=at_floor)
    best.loc[at_floor, list(columns.values())] = (0.0, math.nan, math.nan)
    return best[[*BLOCK, "defense", "attack", "floor", *columns.values()]]


def _paired(cell: pd.DataFrame) -> pd.DataFrame:
    return cell.set_index(UNIT)


def _columns(metric: str) -> list[str]:
    parts = ("", " low", " high", " n", " gain", " gain low", " gain high", " floor")
    return [f"{metric}{part}" for part in parts]


def _measure(cell: pd.DataFrame, floors: Mapping[str, pd.DataFrame], metric: MetricInfo) -> dict[str, Any]:
    """Return the metric's columns for one cell; each floor has the cell's (image, seed) pairs as its rows."""
    values = cell[metric.name].to_numpy(dtype=np.float64)
    images, groups = (cell.index.get_level_values(level).to_numpy() for level in ("image", "group"))
    has = ~np.isnan(values)
    below = {name: floor[metric.name].to_numpy(dtype=np.float64) for name, floor in floors.items()}
    name, floor = _best_floor({name: np.where(has, floor, np.nan) for name, floor in below.items()}, metric)
    pairs = has & ~np.isnan(floor) if name else np.zeros_like(has)
    gain = gains(values[pairs], floor[pairs], metric) if name else values[pairs]
    found = (
        _mean(values[has]),
        *bootstrap_interval(values[has], images[has], groups[has]),
        int(has.sum()),
        _mean(gain),
        *bootstrap_interval(gain, images[pairs], groups[pairs]),
        name,
    )
    return dict(zip(_columns(metric.name), found))


def _best_floor(floors: Mapping[str, Array], metric: MetricInfo) -> tuple[str, Array]:
    """Return the floor with the best mean, among those that were scored on the most pairs; ("", []) without any."""
    counts = {name: int((~np.isnan(floor)).sum()) for name, floor in floors.items()}
    most = max(counts.values(), default=0)
    if most == 0:
        return "", np.empty(0)
    sign = 1 if metric.higher_is_better else -1
    candidates = [name for name, count in counts.items() if count == most]
    best = max(candidates, key=lambda name: sign * _mean(floors[name][~np.isnan(floors[name])]))
    return best, floors[best]


def gains(values: Array, floor: Array, metric: MetricInfo) -> Array:
    """Return how much more than the floor leaks, per pair; equal infinities differ by nothing."""
    gain = np.zeros_like(values)
    np.subtract(values, floor, out=gain, where=values != floor)
    return gain if metric.higher_is_better else -gain


def _mean(values: Array) -> float:
    if not len(values):
        return math.nan
    with np.errstate(invalid="ignore"):
        return float(values.mean())
