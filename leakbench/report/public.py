"""The table of controls and of reconstructions that are near a public image: what an attacker may have memorised."""

import pandas as pd

from leakbench.analysis.ensemble import RECOVERED
from leakbench.analysis.recovery import judged
from leakbench.analysis.summary import blocks
from leakbench.core.text import ABSENT, decimals, number
from leakbench.metrics.public import PublicSSIM
from leakbench.plan.matrix import RECOVERY
from leakbench.report.run import RunData
from leakbench.store.frames import ended

_SHOWN = ("psnr", RECOVERY, PublicSSIM.name)


def public_table(results: pd.DataFrame, controls: pd.DataFrame, threshold: float | None) -> pd.DataFrame:
    """Return a table of text with a row for each attack and control behind each defense; empty without the metric.

    ``recovered`` counts trials that recover their image (``judged``), and ``memorised`` those of them whose
    reconstruction is as near to a public image. Of controls, ``memorised`` counts all that reach the threshold in both.

    Args:
        results: the trials of one dataset, model and threat model, each row with a result.
        controls: those of controls.
        threshold: that of the run; None for the usual one.
    """
    least = RECOVERED if threshold is None else threshold
    if not {PublicSSIM.name, RECOVERY} <= set(results):
        return pd.DataFrame()
    attacks = judged(results, least)[~results["floor"].to_numpy(dtype=bool)].assign(kind="")
    rows = pd.concat([attacks, controls.assign(kind=" (control)", recovered=controls[RECOVERY] >= least)])
    if not rows[PublicSSIM.name].notna().any():
        return pd.DataFrame()
    shown = [name for name in _SHOWN if name in rows]
    places = {name: decimals(rows[name].dropna()) for name in shown}
    table = []
    for (attack, kind, defense), own in rows.groupby(["attack", "kind", "defense"], sort=False):
        hit = own["recovered"].to_numpy(dtype=bool)
        near = hit & (own[PublicSSIM.name] >= least)
        means = [ABSENT if own[name].isna().all() else number(own[name].mean(), places[name]) for name in shown]
        counts = ["not counted" if kind else str(int(hit.sum())), str(int(near.sum()))]
        table.append([f"{attack}{kind}", defense, str(own["image"].nunique()), *means, *counts])
    return pd.DataFrame(table, columns=["attack", "defense", "images", *shown, "recovered", "memorised"])


def public_tables(run: RunData) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Return the table of each dataset, model and threat model that has one."""
    controls = ended(run.controls)
    every = pd.concat([run.results, controls]) if len(controls) else run.results
    found = []
    for block, rows in blocks(every):
        own = rows["trial"].isin(controls["trial"]).to_numpy(dtype=bool)
        table = public_table(rows[~own], rows[own], run.threshold)
        found += [(block, table)] if len(table) else []
    return found
