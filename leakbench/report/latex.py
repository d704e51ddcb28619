"""``report.tex`` and ``table6.tex``: a run's tables for a paper, in LaTeX with booktabs."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from leakbench.analysis.ensemble import RECOVERED
from leakbench.analysis.summary import blocks
from leakbench.core.text import ABSENT, decimals, number
from leakbench.errors import one_line
from leakbench.metrics import NOT_LEAKAGE
from leakbench.report.display import Bold, heading, leakage_table, to_latex
from leakbench.report.page import sentence
from leakbench.report.run import RunData
from leakbench.report.scenes import worst_cases
from leakbench.store.records import MetricInfo

REPORT_METRICS = ("psnr", "ssim", "lpips_vgg", "psnr_aligned", "ssim_aligned")
"""The columns of ``report.tex``."""

PAPER_METRICS = ("mse", "psnr", "lpips_vgg", "lpips_alex", "ssim")
"""The columns of ``table6.tex``: those of the paper, in the standard convention."""

ARMS = ("none", "norm-only", "keylock")
"""The defenses of ``table6.tex``: the paper's two, and key-lock's normalisation without its secret."""


def latex(run: RunData) -> str:
    """Return ``report.tex``: images recovered by dataset and model, then scores by threat model too.

    It depends on its arguments only.
    """
    skips = run.threshold is not None
    metrics, caption = _metrics(run, REPORT_METRICS), sentence("captions.tex.j2", "report", skips)
    recovered = _recovered(run)
    tables: list[str] = []
    for (dataset, model, threat), block in blocks(run.summary):
        defenses = block["defense"].drop_duplicates().tolist()
        ranked = block.assign(rank=block["defense"].map(defenses.index)).sort_values("rank", kind="stable")
        shown = leakage_table(ranked, metrics)
        shown.insert(0, "defense", shown.pop("defense"))
        title, label = f"{model} on {dataset}, threat model {threat}", f"tab:leakage-{len(tables) + 1}"
        own = ranked["defense"].where(~ranked["floor"].astype(bool))  # the rows of floors are in no group
        bold = None if skips else _best(ranked, metrics, own, shown, most=True)
        tables.append(to_latex(shown, caption, label, title, bold=bold))
    return _file(run, [*recovered, *tables])


def _recovered(run: RunData) -> list[str]:
    """Return a table of the images recovered behind each defense, for each dataset and model."""
    tables: list[str] = []
    for scene in worst_cases(run):
        rows = [
            {
                "defense": row.result.defense,
                "recovered": sentence("share.j2", "share", row.result),
                "95 % interval": "" if math.isnan(row.result.share) else _interval(row.result.low, row.result.high),
                "by": row.by or ABSENT,
                "attacked adaptively by": row.result.attacked_by,
            }
            for row in scene.defenses
        ]
        if rows:
            label, title = f"tab:recovered-{len(tables) + 1}", f"{scene.model} on {scene.dataset}"
            threshold = RECOVERED if run.threshold is None else run.threshold
            tables.append(
                to_latex(pd.DataFrame(rows), sentence("captions.tex.j2", "recovered", threshold), label, title)
            )
    return tables


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def table6(run: RunData) -> str:
    """Return ``table6.tex``, in the layout of the paper's Table 6; empty for a run without key-lock or undefended."""
    metrics = _metrics(run, PAPER_METRICS)
    arms = {one.spec: one.name for one in run.components if one.kind == "defense" and one.name in ARMS}
    summary = run.summary
    rows = summary[~summary["floor"].astype(bool) & summary["defense"].isin(list(arms))]
    if not {"none", "keylock"} <= set(rows["defense"].map(arms)) or not metrics:
        return ""
    names = ["attack", "model", "dataset", *(["threat"] if rows["threat"].nunique() > 1 else [])]
    rows = rows.assign(rank=[ARMS.index(arms[defense]) for defense in rows["defense"]])
    group = rows.groupby(["attack", "model", "dataset", "threat"], sort=False).ngroup()
    rows = rows.assign(group=group).sort_values(["group", "rank"], kind="stable")
    shown = rows[[*names, "defense"]].rename(columns={"threat": "threat model"}).reset_index(drop=True)
    for metric in metrics:
        places = decimals(rows[metric.name])
        shown[heading(metric)] = [number(value, places) for value in rows[metric.name]]
    bold = _best(rows, metrics, rows["group"], shown, most=False)
    caption = sentence("captions.tex.j2", "table6")
    return _file(run, [to_latex(shown, caption, "tab:table6", group=len(names), bold=bold)])


def _metrics(run: RunData, names: Sequence[str]) -> list[MetricInfo]:
    valued = (one for one in run.metrics if one.name in run.results and run.results[one.name].notna().any())
    known = {one.name: one for one in valued if one.name not in NOT_LEAKAGE}
    return [known[name] for name in names if name in known] or list(known.values())[: len(names)]


def _best(
    rows: pd.DataFrame, metrics: Sequence[MetricInfo], groups: pd.Series, shown: pd.DataFrame, most: bool
) -> Bold:
    """Return which cells have the most (or the least) leakage of their group, if it has several rows.

    Values that read the same as the best one are bold too. Nothing is bold whose gain over the floor is not above 0, or
    whose interval contains 0.
    """
    bold = np.zeros(shown.shape, dtype=bool)
    several = groups.map(groups.value_counts()).gt(1).to_numpy()
    for metric in metrics:
        places = decimals(rows[metric.name])
        best = rows.groupby(groups)[metric.name].transform("max" if metric.higher_is_better == most else "min")
        same = [number(a, places) == number(b, places) != ABSENT for a, b in zip(rows[metric.name], best)]
        above = ~((rows[f"{metric.name} gain"] <= 0) | (rows[f"{metric.name} gain low"] <= 0)).to_numpy(dtype=bool)
        bold[:, shown.columns.get_loc(heading(metric))] = several & above & np.array(same, dtype=bool)
    return bold


def _file(run: RunData, tables: Sequence[str]) -> str:
    commands = " and ".join(dict.fromkeys(one_line(session.provenance.command) for session in run.sessions))
    head = f"% Run {one_line(run.name)}, made by: {commands or '--'}"
    head = head.encode("ascii", "backslashreplace").decode()
    return "\n".join([head, "% Needs the packages booktabs and graphicx; \\input this file.", "", *tables])
