"""The documentation tells the truth: its commands and its Python run, and its reference is that of the code."""

from __future__ import annotations

import csv
import re
import shlex
import sys
from pathlib import Path

import pytest

from leakbench.cli.main import main
from tools import reference

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


@pytest.fixture
def registries(monkeypatch):
    """Leave the registries as they were, whatever plugins a page registers."""
    import leakbench

    for registry in (leakbench.attacks.registry, leakbench.defenses.registry):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@pytest.mark.docs
def test_the_tutorial_runs_as_written(tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path / "cache"))  # no LPIPS, which takes as long as the rest
    ran = 0
    for kind, title, text in BLOCK.findall((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        if title:
            Path(title).write_text(text, encoding="utf-8")
        elif kind == "python":
            exec(text, {})
        for line in text.splitlines() if kind == "sh" else ():
            assert line.startswith("leakbench "), line
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            with pytest.raises(SystemExit) as end:
                main()
            assert end.value.code == 0, line
            ran += 1
    assert ran >= 6
    for folder in ("first", "threats", "mine", "largest", "python"):
        assert (tmp_path / "runs" / folder / "run.sqlite").is_file()
    text = (tmp_path / "runs" / "largest" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^\| largest +\| 100 % \[34, 100\] +\| lb \(simulate\) 2 +\|", text, re.M)
    assert list((tmp_path / "runs" / "largest" / "figures").glob("heatmap-*.pdf"))


@pytest.mark.docs
def test_the_notebook_runs_and_shows_pictures(tmp_path, monkeypatch):
    import nbclient  # make docs installs both
    import nbformat

    book = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") for cell in book.cells), "commit the notebook without outputs"
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [set(output.data) for cell in book.cells for output in cell.get("outputs", ()) if "data" in output]
    assert [sorted(kinds - {"text/plain"}) for kinds in shown] == [
        ["text/html"],
        ["image/png"],
        ["image/png"],
        ["image/png"],
        ["text/html"],
    ]
    assert (tmp_path / "runs" / "notebook" / "run.sqlite").is_file()


def test_the_closed_form_runs_as_written(capsys):
    ((_, _, text),) = BLOCK.findall((DOCS / "closed-forms.md").read_text(encoding="utf-8"))
    exec(text, {})
    error = re.match(r"tensor\(([\d.e+-]+)", capsys.readouterr().out)
    assert error is not None
    assert float(error[1]) < 1e-5


@pytest.mark.parametrize("name", sorted(reference.pages()))
def test_the_reference_is_what_the_code_says(name):
    written = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert written == reference.pages()[name], "run `make reference`"


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert named == pages | {"reports/README.md"}  # from it every report is linked


def test_every_report_is_linked_from_the_list_of_reports():
    reports = DOCS.parent / "reports"
    text = (reports / "README.md").read_text(encoding="utf-8")
    linked = {(reports / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)]+)\)", text)}
    folders = {page.parent for page in reports.rglob("*.md")} - {reports}
    assert {str(one) for one in folders if not any(link.is_relative_to(one) for link in linked)} == set()


def test_the_page_on_gpus_has_the_committed_counts():
    page = (DOCS / "gpu.md").read_text(encoding="utf-8")
    for file, words, numbers in (
        ("clients", ("defense",), ("launches", "launches_each", "waits", "waits_each")),
        ("launches", ("attack", "defense", "model"), ("launches_before", "waits_before", "launches", "waits")),
    ):
        with (DOCS.parent / "tests" / "device" / f"{file}.csv").open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                named = [
                    f"`{re.sub(r'[(]?(steps|budget)={}(, |[)]?)', lambda m: m[0][:1] * (m[2] == ', '), row[key])}`"
                    for key in words
                ]
                counts = [f"{int(row[key]):,}" if row[key].isdigit() else row[key] for key in numbers]
                assert f"| {' | '.join([*named, *counts])} |\n" in page


def test_the_citation_names_the_version():
    import leakbench

    assert f"\nversion: {leakbench.__version__}\n" in (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
