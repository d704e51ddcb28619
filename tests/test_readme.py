"""The README tells the truth: its links lead somewhere and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "reports/README.md", "reports/first-matrix/report.md"]
)
def test_every_relative_link_leads_to_a_file(page):
    file = ROOT / page
    links = re.findall(r"\]\(([^)#:]+)\)", file.read_text(encoding="utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_every_committed_report_stays_small():
    for folder in (ROOT / "reports").iterdir():
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6_000_000


def test_every_report_of_a_run_has_its_results():
    pages = ("report.md", "worst-case.md", "weights.md", "sharing.md", "tradeoff.md")
    folders = {file.parent for page in pages for file in (ROOT / "reports").rglob(page)}
    lacking = {folder.name for folder in folders if not (folder / "results.csv").exists()}
    assert lacking == {"mnist", "cifar10"}  # reports of generators


def test_the_python_lines_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "leakbench.run" in code]
    block = block.replace("steps=50", "steps=2").replace('datasets=["samples"]', 'datasets=["samples"], images=1')
    scope: dict[str, object] = {}
    exec(block, scope)
    assert len(scope["table"]) == 1 * 2 + 3
    assert tuple(scope["guess"].images.shape) == (2, 3, 32, 32)


def test_the_defenses_that_state_no_adaptive_attacker_are_those_that_are_named():
    from leakbench import defenses
    from leakbench.defenses.adaptive import CONTROLS

    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"A defense that states\s+none (\([^)]*\) is simulated.*?) such a cell", text, re.DOTALL)
    own = {name: defenses.get(name) for name in defenses.names()}
    silent = {name for name, cls in own.items() if cls.__module__.startswith("leakbench.") and not cls().attackers()}
    assert set(re.findall(r"`([^`]+)`", named)) == silent == CONTROLS | {"ats", "local-norm"}


def test_the_defense_of_the_readme_runs(tmp_path, monkeypatch):
    import leakbench
    from leakbench.core.registry import load_plugin

    (block,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "@defenses.register" in code]
    (tmp_path / "half.py").write_text(block)
    monkeypatch.setattr(leakbench.defenses.registry, "_classes", dict(leakbench.defenses.registry._classes))
    load_plugin(tmp_path / "half.py")
    matrix = leakbench.Matrix(
        attacks=["idlg(steps=1)"], defenses=["half"], models=["lenet"], datasets=["samples"], images=1, floors=False
    )
    assert leakbench.run(matrix, tmp_path / "run").results()["status"].tolist() == ["ok"]
