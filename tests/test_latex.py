"""Tables in LaTeX and figures as PDF and SVG: balanced, escaped, bold where they should be, the same each time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_html import ALIGNED, NASTY, point, scored
from test_report import DLG, GREY, IG, NOISE, NONE, run
from test_store import METRICS, TinyDefense, named

from leakbench.analysis.pareto import FILE as STUDY
from leakbench.report import write, write_figures
from leakbench.report.display import to_latex

KEYLOCK, NORM = named(TinyDefense, "keylock")(scale=1.0), named(TinyDefense, "norm-only")()
SPECIAL = set("&%$#_{}~^\\")


def tex(folder: Path, results) -> dict[str, str]:
    run(folder, results, [*METRICS, *ALIGNED])
    return {path.name: path.read_text() for path in write(folder, {"latex"})}


def balanced(text: str) -> None:
    """Braces match, environments nest, every row has as many cells as its table has columns, and all is ASCII."""
    assert text.isascii()
    bare = re.sub(r"(?<!\\)%.*", "", text.replace("\\\\", "\n").replace("\\{", "").replace("\\}", ""))
    depth = 0
    for char in bare:
        depth += {"{": 1, "}": -1}.get(char, 0)
        assert depth >= 0
    assert depth == 0
    stack: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", bare):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert rows
        for row in rows:
            if row.startswith("\\multicolumn"):
                assert row.startswith(f"\\multicolumn{{{len(columns)}}}")
                continue
            assert len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1, row


def cell(text: str) -> str:
    """A text as it is in a table."""
    lines = to_latex(pd.DataFrame([[text, "1"]], columns=["a", "b"]), "c", "l").splitlines()
    return lines[lines.index("\\midrule") + 1].removesuffix(" & 1 \\\\")


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_escaped_text_is_balanced_ascii(text):
    found = cell(text)
    assert found.isascii()
    balanced(found)
    assert "\n" not in found


def test_special_characters_are_set_as_they_are():
    assert cell("50 % of_a {b} & $x^2$ ~ #1") == (
        "50 \\% of\\_a \\{b\\} \\& \\$x\\textasciicircum 2\\$ \\textasciitilde \\space \\#1"
    )
    assert cell("−1 ∞ – é 中 <|>") == "$-$1 $\\infty$ -- e [U+4E2D] \\textless{}\\textbar{}\\textgreater{}"


def test_the_strongest_attack_behind_each_defense_is_bold(tmp_path):
    results = [scored(GREY, NONE, i, 0.1) for i in range(4)]
    results += [scored(DLG, d, i, 0.3) for d in (NONE, NOISE) for i in range(4)]
    results += [scored(IG, NONE, i, 0.2) for i in range(4)] + [scored(IG, NOISE, i, 0.4) for i in range(4)]
    files = tex(tmp_path, results)
    assert list(files) == ["report.tex"]
    text = files["report.tex"]
    balanced(text)
    bold = [line for line in text.splitlines() if "\\textbf" in line]
    assert len(bold) == 2
    assert bold[0].startswith("none & dlg")
    assert bold[1].startswith(" & ig(step=0.01)")
    assert bold[0].count("\\textbf") == 3  # of psnr and both aligned metrics
    assert "\\textbf{3.000 [3.000, 3.000]}" in bold[0]
    assert "grey (floor)" in text


def test_nothing_at_or_below_the_floor_is_bold(tmp_path):
    results = [scored(GREY, NONE, i, 0.3) for i in range(4)] + [scored(DLG, NONE, i, 0.2) for i in range(4)]
    results += [scored(IG, NONE, i, 0.1) for i in range(4)]
    assert "\\textbf" not in tex(tmp_path, results)["report.tex"]


def test_table_6_has_the_arms_of_the_paper(tmp_path):
    arms = ((NONE, 0.9), (NORM, 0.5), (KEYLOCK, 0.1), (NOISE, 0.05))
    results = [scored(DLG, defense, i, value) for defense, value in arms for i in range(3)]
    text = tex(tmp_path, results)["table6.tex"]
    balanced(text)
    rows = [line for line in text.splitlines() if line.endswith("\\\\")][1:]
    assert [row.split(" & ")[3] for row in rows] == ["none", "norm-only", "keylock(scale=1.0)"]
    assert ["\\textbf" in row for row in rows] == [False, False, True]
    assert "0.900 & \\textbf" not in rows[2]
    assert rows[2].count("\\textbf") == 2  # the largest mse, the smallest psnr


def test_strange_runs_have_tables(tmp_path):
    guard = named(TinyDefense, "guard")(note=NASTY)
    for index, results in enumerate(([], [scored(DLG, guard, 0, 0.5)], [scored(DLG, guard, 0, 0.5, status="error")])):
        for text in tex(tmp_path / str(index), results).values():
            balanced(text)


@pytest.mark.long
def test_figures_are_the_same_each_time(tmp_path):
    results = [scored(a, d, i, 0.3 + 0.1 * i) for a in (GREY, DLG) for d in (NONE, NOISE) for i in range(3)]
    results.append(scored(DLG, named(TinyDefense, "guard")(note=NASTY + " $x$"), 0, 0.9))
    run(tmp_path, results, [*METRICS, *ALIGNED])
    points = [point("a $x$ 中", 0.9, 0.9).model_dump(), point("b", 0.5, 0.1).model_dump()]
    study = {"title": "t", "utility": "accuracy", "leakage": "recovered", "points": points}
    (tmp_path / STUDY).write_text(json.dumps({"studies": [study]}))
    first = {path.name: path.read_bytes() for path in write_figures(tmp_path)}
    assert {name.partition(".")[0] for name in first} == {
        "worst-case-001-d-m",
        *(f"{kind}-001-d-m" for kind in ("heatmap", "images-ssim-aligned", "images-psnr-aligned", "threshold")),
        "grid-001-d-m-paper-seed0",
        "utility-01-t",
    }
    for name, data in first.items():
        assert data.startswith(b"%PDF-" if name.endswith(".pdf") else b"<?xml"), name
        assert b"/CreationDate" not in data
    assert {path.name: path.read_bytes() for path in write_figures(tmp_path)} == first


@pytest.mark.parametrize("status", ["ok", "error"])
def test_a_run_of_one_trial_has_figures(tmp_path, status):
    run(tmp_path, [scored(DLG, NONE, 0, 0.5, status=status)], [*METRICS, *ALIGNED])
    assert len(write_figures(tmp_path)) == (12 if status == "ok" else 2)  # without a score there is only the grid
