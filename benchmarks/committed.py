"""The committed results of runs, as a run's file would give them to a report."""

from dataclasses import replace
from functools import cache

import pandas as pd

from benchmarks.speed.machine import ROOT
from leakbench import attacks, datasets, defenses, models
from leakbench.analysis.ensemble import RECOVERED
from leakbench.analysis.recovery import TARGET, judged
from leakbench.analysis.summary import rescored
from leakbench.core.component import as_json
from leakbench.core.types import ThreatModel
from leakbench.defenses.adaptive import CONTROLS, SIMULATE
from leakbench.defenses.base import by_informed
from leakbench.plan.matrix import RECOVERY, parse_threat
from leakbench.store.frames import from_csv
from leakbench.store.records import MetricInfo, StoredComponent

CELL = ["dataset", "model", "defense", "attack", "threat"]
METRIC = "psnr_aligned"
SCORES = ("psnr", METRIC, RECOVERY)
"""The metrics that figures are from."""
UNREAD = ("paper_", "lpips_")
"""How the columns begin that no figure is from."""


class Fault(Exception):
    """What is wrong with a mark, in one line."""


@cache
def load(files: str) -> pd.DataFrame:
    """Return a committed CSV, or several (``a + b``), with the columns that reports add to it.

    They are ``floor``, and the ``group`` of each image; failed trials have the score of a floor (``rescored``).

    Raises:
        Fault: there is no such CSV.
    """
    data = pd.concat([_read(name.strip()) for name in files.split(" + ")], ignore_index=True)
    if "attack" not in data:
        return data
    return rescored(data, [metric_of(name) for name in SCORES])


def _is_read(column: str) -> bool:
    return not column.startswith(UNREAD)


def _read(name: str) -> pd.DataFrame:
    """Return a CSV; of results, with the columns that reports add, and without those of controls."""
    if not (name.endswith(".csv") and (ROOT / name).is_file()):
        raise Fault(f"there is no file {name!r} that ends in .csv")
    columns = pd.read_csv(ROOT / name, nrows=0).columns
    return (
        from_csv(ROOT / name, _is_read)
        if "attack" in columns
        else pd.read_csv(ROOT / name, keep_default_na=False, na_values=[""], usecols=_is_read)
    )


def metric_of(name: str) -> MetricInfo:
    """Return a metric of which more is more leakage."""
    return MetricInfo(name, True, "", "")


def planned(results: pd.DataFrame) -> pd.DataFrame:
    """Return the results of an ensemble's run with the trials that it skipped, whose status is empty.

    Every attacker of the run attacks every image behind every defense, an adaptive one only if the defense states it;
    ``simulate`` needs no statement, but something to model.
    Trials on an image that a floor recovers are left out if they were not run: they do not count, and runs of older
    versions skipped them. Attackers come in the order of their attacks.
    """
    attacked = results[~results["floor"]]
    attackers = attacked[["attack", "threat"]].drop_duplicates().itertuples(index=False, name=None)
    roles = [(attack, parse_threat(threat)) for attack, threat in attackers]
    roles = list(
        dict.fromkeys((attack, threat if threat.informed == SIMULATE else _any(threat)) for attack, threat in roles)
    )
    cells = [
        {"dataset": dataset, "model": model, "defense": defense, "attack": attack, "threat": own.spec()}
        for dataset, model, defense in attacked[CELL[:3]].drop_duplicates().itertuples(index=False, name=None)
        for attack, threat in roles
        for own in (_stated(threat, defense) if threat.informed else [threat])
    ]
    every = pd.merge(pd.DataFrame(cells), attacked[["dataset", "group", *TARGET]].drop_duplicates(), on="dataset")
    skipped = every.merge(attacked[[*CELL, *TARGET]], how="left", indicator="met").query("met == 'left_only'")
    blank = {"status": "", "reason": "", "path": "", "floor": False}
    trials = pd.concat([results, skipped.drop(columns="met").assign(**blank)], ignore_index=True)
    trials = trials[(trials["status"] != "") | ~judged(trials, RECOVERED)["by_floor"]]
    return trials.sort_values("attack", key=lambda names: pd.factorize(names)[0], kind="stable", ignore_index=True)


def _any(threat: ThreatModel) -> ThreatModel:
    """Return a threat model that is adaptive by any attacker that a defense states, if it is adaptive."""
    return replace(threat, informed=bool(threat.informed))


def _stated(threat: ThreatModel, defense: str) -> list[ThreatModel]:
    """Return a threat model with each adaptive attacker that it means behind a defense."""
    if threat.informed == SIMULATE:
        return [] if defenses.parse(defense).name in CONTROLS else [threat]
    return [replace(threat, informed=one) for one in by_informed(defenses.parse(defense))]


def components(trials: pd.DataFrame) -> list[StoredComponent]:
    """Return what the specs of trials stand for, as far as reports need it."""
    registries = {"dataset": datasets, "model": models, "defense": defenses, "attack": attacks}
    specs = [(kind, spec) for kind in registries for spec in trials[kind].unique()]
    return [StoredComponent(kind, spec, 1, as_json(registries[kind].parse(spec).options())) for kind, spec in specs]
