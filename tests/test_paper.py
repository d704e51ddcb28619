"""The figures of the FedKL paper: all of them, in its convention, and beside those of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from leakbench.report import compare, files
from leakbench.store.frames import from_csv

REPORTS = Path(__file__).parents[1] / "reports"
PAPER = compare.published()


def rows_of(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]


def test_every_printed_figure_is_there() -> None:
    assert sum(len(one.scores) for one in PAPER.table6) == 130
    assert len(PAPER.table1) == 47
    assert sum(len((one.accuracy, one.gap)) for one in PAPER.table3) == 110
    assert list(PAPER.proportions.values()) == ["22.43", "10.49", "6.46", "1.15", "0.61", "0.097"]
    for table in (PAPER.table1, PAPER.table3, PAPER.table6):
        places = [(one.place, getattr(one, "key_source", ""), getattr(one, "training", "")) for one in table]
        assert len(set(places)) == len(places)


def test_the_figures_obey_the_papers_own_convention() -> None:
    """PSNR is 10 log10(255^2 / MSE), up to the mean over images: that of logarithms is at least that of the mean."""
    for one in PAPER.table6:
        stated = 10 * math.log10(255**2 / float(one.mse))
        assert stated - 0.04 <= float(one.psnr) <= stated + 8
        if one.keylock == "with":
            assert float(one.psnr) == pytest.approx(stated, abs=0.16)
        assert one.implied == pytest.approx(2 * stated - 48.131, abs=0.001)
    random = {one.place: float(one.accuracy) for one in PAPER.table3 if one.key_source == "random"}
    for row in PAPER.table3:
        assert float(row.gap) == pytest.approx(float(row.accuracy) - random[row.place], abs=0.011)


def test_what_is_set_beside_a_figure_has_its_place_and_grants_no_key() -> None:
    results = from_csv(REPORTS / "table6" / "results.csv")
    text = files.comparison(results).markdown
    scores, others = rows_of(text, "In the paper's convention"), rows_of(text, "Rows that the paper does not have")
    lines = [row for row in scores if row[4] == "paper"]
    assert [row[-5:] for row in lines] == [list(one.scores) for one in PAPER.table6]
    ours = [row for row in scores if row[4] == "this run"]
    assert {row[6] for row in ours} == {"T0", "T1", "T0, T1"}
    assert {row[6] for row in ours if row[5].endswith(", none")} == {"T0, T1", "T1"}  # the same trials
    assert all(cell for row in ours for cell in row[-5:])
    assert sum(row[4] == "not in this run" for row in scores) == 26 - 10
    assert {row[4] for row in others} == {"T0", "T1", "T5"}
    assert {row[3] for row in others if row[4] != "T5" and not row[0].startswith("ggl")} == {"norm-only"}
    start = scores.index(next(row for row in scores if row[:4] == ["grnn", "lenet", "mnist, 32", "with"]))
    assert [row[4] for row in scores[start : start + 3]] == ["paper", "this run", "this run"]
    assert scores[start][9:] == ["103.46", "28.00", "0.69", "0.45", "0.108"]


def test_images_of_another_size_are_not_set_beside_a_figure() -> None:
    places = {compare.place_of(specs(dataset), ("model", "dataset")) for dataset in ("mnist", "mnist(size=32)")}
    assert places == {("lenet", "mnist", "28", "with"), ("lenet", "mnist", "32", "with")}
    large = compare.place_of(specs("imagenet(path=data/imagenet, size=256)"), ("model", "dataset"))
    assert large == ("lenet", "imagenet", "256", "with")
    assert compare.place_of({**specs("samples"), "defense": "clip"}, ("dataset",)) == ("samples", "", "")


def specs(dataset: str) -> dict[str, str]:
    return {"model": "lenet(init=default)", "dataset": dataset, "defense": "keylock(lock_init=uniform)"}


def test_the_committed_comparison_is_that_of_the_committed_results(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_bytes((REPORTS / "table6" / "results.csv").read_bytes())
    written = files.write_comparison(tmp_path)
    assert written.read_text(encoding="utf-8") == (REPORTS / "table6" / "paper.md").read_text(encoding="utf-8")
