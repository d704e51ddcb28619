"""The tables that a run prints when it ends."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from leakbench.analysis.summary import BLOCK
from leakbench.core.text import decimals, number, with_interval
from leakbench.errors import one_line

_SHOWN = {"psnr": "psnr", "psnr_aligned": "aligned", "ssim": "ssim", "lpips_vgg": "lpips_vgg", "label_correct": "label"}
"""Metric -> its heading; the report has every metric, and says what each means."""


def console_table(summary: pd.DataFrame) -> list[Table]:
    """Return a compact table for each dataset, model and threat model of ``summarise``'s summary."""
    tables = []
    shown = {name: head for name, head in _SHOWN.items() if name in summary and summary[name].notna().any()}
    for key, block in summary.groupby(list(BLOCK), sort=False):
        table = Table(
            title=Text(one_line(" · ".join(map(str, key)))),
            title_justify="left",
            title_style="bold",
            caption="means; gain: psnr over the best floor, with its 95 % interval; report.md has every metric",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for header in ("attack", "defense"):
            table.add_column(header, overflow="fold")
        missing = bool((block["unsupported"] + block["error"]).any())
        gains = "psnr" in shown and block["psnr gain"].notna().any()
        for header in ("n", "failed", *(["no score"] if missing else []), *shown.values()):
            table.add_column(header, justify="right", no_wrap=True)
        if gains:
            table.add_column("gain", justify="right")
        places = {name: decimals(block[name]) for name in shown}
        for row in block.to_dict("records"):
            unscored = ", ".join(f"{row[status]} {status}" for status in ("unsupported", "error") if row[status])
            attack = one_line(row["attack"])
            cells = [Text(f"{attack} (floor)" if row["floor"] else attack), Text(one_line(row["defense"]))]
            cells += [Text(str(row["n"])), Text(str(row["failed"]), style="red" if row["failed"] else "")]
            cells += [Text(unscored or "0", style="red" if unscored else "")] if missing else []
            cells += [Text(number(row[name], places[name])) for name in shown]
            if gains:
                interval = (row["psnr gain"], row["psnr gain low"], row["psnr gain high"])
                cells.append(Text("" if row["floor"] else with_interval(*interval, 1, sign=True)))
            table.add_row(*cells, style="dim" if row["floor"] else "")
        tables.append(table)
    return tables
