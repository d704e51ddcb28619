"""One display table: the rows of a summary as text cells, and these cells as Markdown, as LaTeX or for a terminal."""

import re
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text
from tabulate import tabulate

from leakbench.analysis.summary import blocks
from leakbench.core.text import ABSENT, decimals, number, with_interval
from leakbench.errors import one_line
from leakbench.store.records import MetricInfo

Bold = npt.NDArray[np.bool_]
"""Which cells are bold: [rows, columns] of a display table."""

_SPECIAL = re.compile(r"[&<>|`*\\$~#@]|\[(?=\^)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|(?<=:)//")
_TEX = {"−": "$-$", "∞": "$\\infty$", "↑": "$\\uparrow$", "↓": "$\\downarrow$", ABSENT: "--", "<": "\\textless{}"}
_TEX |= {">": "\\textgreater{}", "|": "\\textbar{}", "`": "\\textasciigrave{}"}

_CONSOLE = [
    MetricInfo(name, name != "lpips_vgg", "", "")
    for name in ("psnr", "psnr_aligned", "ssim", "lpips_vgg", "label_correct")
]
_SHORT = {"psnr_aligned ↑": "aligned ↑", "label_correct ↑": "label ↑", "psnr gain over floor": "gain"}


def leakage_table(
    block: pd.DataFrame, metrics: Sequence[MetricInfo], gains: Sequence[str] = (), interval: bool = True
) -> pd.DataFrame:
    """Return the leakage table of one dataset, model and threat model: text cells, a row per attack and defense.

    Args:
        block: rows of ``analysis.summary.summarise``.
        metrics: the columns, in order; one that the summary lacks has empty cells.
        gains: the metrics that are followed by a column with the gain over the best floor.
        interval: whether means have their 95 % interval.
    """
    rows = block.to_dict("records")
    columns: dict[str, list[str]] = {
        "attack": [f"{row['attack']} (floor)" if row["floor"] else str(row["attack"]) for row in rows],
        "defense": [str(row["defense"]) for row in rows],
        "n": [str(row["n"]) for row in rows],
        "failed": [str(row["failed"]) for row in rows],
        "no score": [unscored(row) for row in rows],
    }
    for metric in metrics:
        name = metric.name
        places = decimals(block[name]) if name in block else None
        columns[heading(metric)] = [mean_text(row, name, places, interval) for row in rows]
        if name in gains:
            columns[f"{name} gain over floor"] = [gain_text(row, name, places) for row in rows]
    return pd.DataFrame(columns, dtype=str)


def heading(metric: MetricInfo) -> str:
    """Return the heading of a metric's column: its name, and an arrow that points to more leakage."""
    return f"{metric.name} {'↑' if metric.higher_is_better else '↓'}"


def unscored(row: Mapping[Hashable, Any]) -> str:
    """Return how many trials of a row of the summary have no score, by status."""
    broken = int(row.get("broken", 0))
    counts = {"unsupported": row["unsupported"], "error": row["error"] - broken}
    words = [f"{count} {status}" for status, count in counts.items() if count]
    return ", ".join([*words, f"the defense failed in {broken}"] if broken else words) or "0"


def mean_text(row: Mapping[Hashable, Any], name: str, places: int | None, interval: bool = True) -> str:
    """Return a metric's mean, with the number of trials that it is over if some of the scored ones lack the metric."""
    if name not in row:
        return ""
    if pd.isna(row[name]):
        return ABSENT
    ends = (row[f"{name} low"], row[f"{name} high"])
    text = with_interval(row[name], *ends, places) if interval else number(row[name], places)
    return text if row[f"{name} n"] == row["ok"] + row["failed"] else f"{text} (n={row[f'{name} n']})"


def gain_text(row: Mapping[Hashable, Any], name: str, places: int | None) -> str:
    """Return a metric's gain over the best floor with its interval; ``floor`` for a floor."""
    if row["floor"]:
        return "floor"
    return with_interval(row[f"{name} gain"], row[f"{name} gain low"], row[f"{name} gain high"], places, sign=True)


def escape(text: object) -> str:
    """Return text that Markdown shows as it is, in one line, inside a table as well as outside."""
    return _SPECIAL.sub(lambda match: "".join(f"&#{ord(c)};" for c in match[0]), one_line(text))


def to_markdown(shown: pd.DataFrame, left: int = 2, bold: Bold | None = None) -> str:
    """Return a display table in Markdown; empty for a table without rows.

    Args:
        shown: text cells, not escaped; headings may repeat.
        left: how many of the first columns are aligned to the left.
        bold: which cells are bold; None for none.
    """
    cells = [[escape(cell) for cell in row] for row in shown.to_numpy().tolist()]
    for row, column in np.argwhere(bold) if bold is not None else ():
        cells[row][column] = f"**{cells[row][column]}**"
    return aligned([[escape(head) for head in shown.columns], *cells], left)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows of Markdown as a table under the first one, aligned as in ``to_markdown``; empty without others."""
    align = ["left" if column < left else "right" for column in range(len(rows[0]))]
    cells = rows[1:]
    return tabulate(cells, rows[0], tablefmt="pipe", disable_numparse=True, colalign=align) if cells else ""


def per_cent(value: float, low: float, high: float, places: int = 2) -> str:
    """Return a share in [0, 1] with its interval, in per cent without the sign."""
    return with_interval(100 * value, 100 * low, 100 * high, places)


def to_latex(
    shown: pd.DataFrame, caption: str, label: str, title: str = "", group: int = 1, bold: Bold | None = None
) -> str:
    """Return a display table in LaTeX with booktabs, no wider than the page (``graphicx``).

    Args:
        shown: text cells, not escaped, under headings that are unique.
        caption: in LaTeX already; so is ``label``.
        title: a heading over all columns, as text.
        group: rows with the same first ``group`` cells are a group: these cells are printed once, a space is below.
        bold: which cells are bold.
    """
    names = shown.iloc[:, :group]
    repeated = (names == names.shift()).all(axis=1)
    cells = shown.copy()
    cells.loc[repeated, names.columns] = ""
    if title:
        cells.columns = pd.MultiIndex.from_product([[title], cells.columns])
    style = cells.style.format(_tex, escape="latex").format_index(_tex, escape="latex", axis=1).hide(axis="index")
    if bold is not None:
        style = style.apply(lambda _: np.where(bold, "textbf:--rwrap;", ""), axis=None)
    lines = style.to_latex(
        environment="table*",
        position_float="centering",
        caption=caption,
        label=label,
        hrules=True,
        multicol_align="l",
        column_format="l" * (group + 1) + "r" * (shown.shape[1] - group - 1),
    ).splitlines()
    first = lines.index("\\midrule") + 1
    for row in np.flatnonzero(~repeated)[:0:-1]:
        lines.insert(first + row, "\\addlinespace")
    text = (
        "\n".join(lines)
        .replace("\\centering", "\\centering\n\\footnotesize")
        .replace("\\end{tabular}", "\\end{tabular}}")
    )
    fit = "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%\n"
    return text.replace("\\begin{tabular}", f"{fit}\\begin{{tabular}}") + "\n"


def _tex(text: object) -> str:
    """Return escaped text in one line; a letter that LaTeX's fonts lack is written as ``[U+4E2D]``."""
    return "".join(_TEX.get(char) or (char if char.isascii() else _ascii(char)) for char in one_line(text))


def _ascii(char: str) -> str:
    base = "".join(c for c in unicodedata.normalize("NFKD", char) if c.isascii() and c.isalnum())
    return base or f"[U+{ord(char):04X}]"


def to_console(shown: pd.DataFrame, title: str = "", caption: str = "", left: int = 2) -> Table:
    """Return a display table for a terminal; the rows of floors are dim.

    Args:
        shown: text cells, not escaped.
        title: the heading above the table; ``caption`` is the text below it.
        left: how many of the first columns are aligned to the left.
    """
    out = Table(
        title=Text(one_line(title)) if title else None,
        title_justify="left",
        title_style="bold",
        caption=caption or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for place, head in enumerate(shown.columns):
        number = place >= left
        out.add_column(Text(one_line(head)), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in shown.to_numpy().tolist():
        out.add_row(*(Text(one_line(cell)) for cell in row), style="dim" if row[0].endswith(" (floor)") else "")
    return out


def console_table(summary: pd.DataFrame) -> list[Table]:
    """Return a compact table for each dataset, model and threat model of ``summarise``'s summary."""
    tables = []
    shown = [metric for metric in _CONSOLE if metric.name in summary and summary[metric.name].notna().any()]
    for names, block in blocks(summary):
        table = leakage_table(block, shown, ["psnr"], interval=False).rename(columns=_SHORT)
        if (table["no score"] == "0").all():
            table = table.drop(columns="no score")
        caption = "means; gain: psnr over the best floor, with its 95 % interval; report.md has every metric"
        tables.append(to_console(table, " · ".join(names), caption))
    return tables
