"""``report.tex`` and ``table6.tex``: a run's tables for a paper, in LaTeX with booktabs."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from leakbench.analysis.summary import BLOCK, summarise
from leakbench.core.text import ABSENT, decimals, english, number
from leakbench.report.markdown import Run
from leakbench.store.records import MetricInfo

MAIN = ("psnr", "ssim", "lpips_vgg", "psnr_aligned", "ssim_aligned")
"""The columns of ``report.tex``."""

PAPER = ("mse", "psnr", "lpips_vgg", "lpips_alex", "ssim")
"""The columns of ``table6.tex``: those of the paper, in the standard convention."""

ARMS = ("none", "norm-only", "keylock")
"""The defenses of ``table6.tex``: the paper's two, and key-lock's normalisation without its secret."""

_NAMES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "mse": "MSE",
    "lpips_vgg": "LPIPS-V",
    "lpips_alex": "LPIPS-A",
    "psnr_aligned": "PSNR, aligned (dB)",
    "ssim_aligned": "SSIM, aligned",
}
_SPECIAL = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "`": "\\textasciigrave{}",
    "−": "$-$",
    "∞": "$\\infty$",
    "↑": "$\\uparrow$",
    "↓": "$\\downarrow$",
    ABSENT: "--",
}


class Tex(str):
    """Text that is LaTeX already."""

    __slots__ = ()


def escape(text: object) -> str:
    """Return text that LaTeX sets as it is, in one line; a letter that its fonts lack is written as ``[U+4E2D]``."""
    if isinstance(text, Tex):
        return text
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return "".join(_SPECIAL.get(char) or _letter(char) for char in line)


def _letter(char: str) -> str:
    if char.isascii():
        return char
    plain = unicodedata.normalize("NFKD", char)
    base = "".join(c for c in plain if c.isascii() and c.isalnum())
    return base or f"[U+{ord(char):04X}]"


@dataclass(frozen=True)
class Line:
    """A row of a table: its names, and its cells in LaTeX; ``rule`` sets a line above it."""

    names: tuple[str, ...]
    cells: tuple[str, ...]
    rule: bool


@dataclass(frozen=True)
class Table:
    """What the template shows as one table: the headings of its names, and those of its columns of numbers."""

    caption: str
    label: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


def latex(run: Run) -> str:
    """Return ``report.tex``: a table for each dataset, model and threat model; it depends on its arguments alone."""
    shown = _metrics(run, MAIN)
    summary = summarise(run.results, shown)
    tables = [
        _block(block, shown, (str(key[0]), str(key[1]), str(key[2])), index)
        for index, (key, block) in enumerate(summary.groupby(list(BLOCK), sort=False))
    ]
    return _render(run, [table for table in tables if table.lines])


def table6(run: Run) -> str:
    """Return ``table6.tex``, in the layout of the paper's Table 6; empty for a run without key-lock or undefended."""
    shown = _metrics(run, PAPER)
    summary = summarise(run.results, shown)
    attacks = summary[~summary["floor"].astype(bool)]
    arms = {one.spec: one.name for one in run.components if one.kind == "defense"}
    attacks = attacks.assign(arm=attacks["defense"].map(arms))
    attacks = attacks[attacks["arm"].isin(ARMS)]
    if not {"none", "keylock"} <= set(attacks["arm"]) or not shown:
        return ""
    threats = attacks["threat"].nunique() > 1
    heads = ("attack", "model", "dataset", *(["threat model"] if threats else []), "defense")
    places = {metric.name: decimals(attacks[metric.name]) for metric in shown}
    lines: list[Line] = []
    for key, rows in attacks.groupby(["attack", "model", "dataset", "threat"], sort=False):
        own = rows.assign(rank=rows["arm"].map(ARMS.index)).sort_values("rank", kind="stable")
        columns = [
            _bold(own[one.name].astype(float).tolist(), places[one.name], least=True, higher=one.higher_is_better)
            for one in shown
        ]
        names = tuple(str(part) for part in key)[: len(heads) - 1]
        for place, defense in enumerate(own["defense"].astype(str)):
            cells = tuple(column[place] for column in columns)
            above = names if place == 0 else ("",) * len(names)
            lines.append(Line((*above, defense), cells, bool(lines) and place == 0))
    caption = (
        "Reconstructions without a defense, behind the key-lock's normalisation alone, and behind the key-lock. Means "
        "over images, in the standard convention; arrows point to more leakage. Bold: the least leakage."
    )
    return _render(run, [Table(caption, "tab:table6", heads, tuple(map(_head, shown)), tuple(lines))])


def _metrics(run: Run, names: Sequence[str]) -> list[MetricInfo]:
    known = {one.name: one for one in run.metrics if one.name in run.results and run.results[one.name].notna().any()}
    return [known[name] for name in names if name in known] or list(known.values())[: len(names)]


def _block(block: pd.DataFrame, shown: Sequence[MetricInfo], key: tuple[str, str, str], index: int) -> Table:
    """Return the table of one block: behind each defense every attack, the strongest in bold."""
    places = {metric.name: decimals(block[metric.name]) for metric in shown}
    lines: list[Line] = []
    for number_of, (defense, rows) in enumerate(block.groupby("defense", sort=False)):
        texts_of = []
        for metric in shown:
            values = rows[metric.name].astype(float).tolist()
            several = len(rows) > 1 and not rows["floor"].astype(bool).any()
            texts = _bold(values, places[metric.name], least=False, higher=metric.higher_is_better, on=several)
            lows, highs = (rows[f"{metric.name} {end}"].astype(float).tolist() for end in ("low", "high"))
            texts_of.append([_ranged(*cell, places[metric.name]) for cell in zip(texts, lows, highs)])
        for place, (_, row) in enumerate(rows.iterrows()):
            attack = f"{row['attack']} (floor)" if row["floor"] else str(row["attack"])
            unscored = int(row["unsupported"] + row["error"])
            counts = (f"{row['n']}", f"{row['failed']}" + (f" + {unscored} without a score" if unscored else ""))
            cells = (*counts, *(texts[place] for texts in texts_of))
            names = (str(defense) if place == 0 else "", attack)
            lines.append(Line(names, cells, number_of > 0 and place == 0))
    dataset, model, threat = key
    caption = (
        f"{model} on {dataset}, threat model {threat}: means over images with 95 % bootstrap intervals. Bold: the "
        "strongest attack behind each defense. Arrows point to more leakage. Diverged trials are scored as the grey "
        "image and stay in the means."
    )
    columns = ("n", "diverged", *map(_head, shown))
    return Table(caption, f"tab:leakage-{index + 1}", ("defense", "attack"), columns, tuple(lines))


def _head(metric: MetricInfo) -> str:
    return f"{_NAMES.get(metric.name, metric.name)} {'↑' if metric.higher_is_better else '↓'}"


def _bold(values: Sequence[float], places: int | None, least: bool, higher: bool, on: bool = True) -> list[str]:
    """Return numbers in LaTeX, the one of least (or of most) leakage in bold, and what reads the same."""
    texts = [number(value, places) for value in values]
    known = [value for value in values if not math.isnan(value)]
    if not known or not on:
        return [escape(text) for text in texts]
    best = number(min(known) if least == higher else max(known), places)
    return [f"\\textbf{{{escape(text)}}}" if text == best else escape(text) for text in texts]


def _ranged(text: str, low: float, high: float, places: int | None) -> str:
    if math.isnan(low) or math.isnan(high):
        return text
    return f"{text} {{\\scriptsize[{escape(number(low, places))}, {escape(number(high, places))}]}}"


def _render(run: Run, tables: Sequence[Table]) -> str:
    environment = Environment(
        loader=PackageLoader("leakbench.report", "pages"),
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        undefined=StrictUndefined,
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    sources = list(dict.fromkeys(session.provenance.command for session in run.sessions))
    text = environment.get_template("table.tex.j2").render(
        name=run.name, command=english(sources) if sources else ABSENT, tables=tables, Tex=Tex
    )
    return re.sub(r"\n{3,}", "\n\n", text)
