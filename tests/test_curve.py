"""The course of a search: which evaluations are kept, what solvers note of them, what run files and pages show."""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path

import pytest
import torch
from test_html import ALIGNED, Tags, scored
from test_optim import Rows, rosenbrock, starts, torch_lbfgs
from test_report import DLG, GREY, NONE, run
from test_store import METRICS

from leakbench.analysis.integrity import check
from leakbench.core.loss_curve import MAX_POINTS, Curve, decoded, marks
from leakbench.core.rng import Rng
from leakbench.errors import ForeignRun
from leakbench.optim import descend, lbfgs
from leakbench.optim.evolve import evolve
from leakbench.report import write
from leakbench.report.files import write_figures
from leakbench.store.merge import merge
from leakbench.store.run_file import FILE, Store


@pytest.mark.parametrize(
    ("limit", "every"), [(1, 1), (2, 1), (300, 1), (7500, 1), (25000, 50), (30, 50), (2**32 - 1, 1)]
)
def test_marks_are_even_by_their_logarithms_and_end_at_the_limit(limit: int, every: int) -> None:
    found = marks(limit, every)
    assert found[-1] == limit
    assert list(found) == sorted(set(found))
    assert len(found) <= MAX_POINTS
    assert all(mark % every == 0 or mark == limit for mark in found)
    if limit == 7500:
        ratios = [after / before for before, after in itertools.pairwise(found[8:])]
        assert max(ratios) / min(ratios) < 1.1


def test_what_is_kept_is_read_again() -> None:
    values = torch.tensor([[3.0, 2.0, 1.0], [3.0, math.nan, math.inf], [math.nan] * 3])
    one, other, none = Curve(3, 1, values).rows()
    assert decoded(one) == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert (decoded(other), none) == ([(1, 3.0)], b"")
    for bad in (b"", b"abc", struct.pack("<II", 0, 0), struct.pack("<II", 3, 4), struct.pack("<II4f", 3, 1, *range(4))):
        with pytest.raises(ValueError, match="a loss curve of"):
            decoded(bad)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("slots", [None, 2])
def test_a_solver_notes_the_objective_at_its_marks(slots: int | None) -> None:
    objective = Rows(rosenbrock, torch.tensor([1.0, 5.0, 20.0, 50.0, 100.0]))
    found = lbfgs(objective, starts(5), steps=4, max_iter=5, slots=slots).curve
    assert found is not None
    places = marks(found.limit)
    for row in range(5):
        _, seen = torch_lbfgs(objective, starts(5), row, steps=4, max_iter=5, history_size=100)
        for place, value in zip(places, found.values[row].tolist()):
            if place <= len(seen) and math.isfinite(value):
                assert value == pytest.approx(seen[place - 1], rel=1e-6)
        assert math.isfinite(float(found.values[row, 0]))
    course = descend(objective, starts(5), steps=60, lr={"u": 0.01, "v": 0.01}).curve
    again = descend(objective, starts(5), steps=marks(60)[9], lr={"u": 0.01, "v": 0.01})
    assert course is not None
    assert torch.equal(course.values[:, 9], again.value)
    evolved = evolve(objective, starts(5), Rng(tuple("abcde")), budget=23, popsize=5)
    assert evolved.curve is not None
    assert marks(23, 5)[-1] == 23
    assert bool((evolved.curve.values.diff(dim=1) <= 0).all())
    assert torch.equal(evolved.curve.values[:, -1], evolved.value)


@pytest.mark.long
def test_curves_go_through_the_run_file_into_the_page_and_the_figures(tmp_path: Path) -> None:
    curve = Curve(300, 1, torch.logspace(2, -3, len(marks(300)))[None]).rows()[0]
    results = [scored(GREY, NONE, i, 0.3) for i in range(2)]
    results += [scored(DLG, NONE, i, 0.9, curve=curve if i else b"") for i in range(2)]
    run(tmp_path / "a", results, [*METRICS, *ALIGNED])
    merge([tmp_path / "a"], tmp_path / "b")
    with Store.open(tmp_path / "b" / FILE) as store:
        ((trial, points),) = store.curves().items()
        assert [place for place, _ in points] == list(marks(300))
        data = Tags(write(tmp_path / "b", {"html"})[0].read_text()).data()["trials"]
        shown = data["curve"][data["id"].index(trial)]
        assert data["marks"] == [list(marks(300))]
        assert (shown[0], shown[1], shown[-1]) == (0, 100, 0.001)
        assert data["curve"].count(None) == 3
        names = [path.name for path in write_figures(tmp_path / "b")]
        assert {"objective-001-d-m-paper.pdf", "objective-001-d-m-paper.svg"} <= set(names)
        store._db.execute("UPDATE results SET curve = x'00' WHERE trial_id = ?", (trial,))
        with pytest.raises(ForeignRun, match="a loss curve of 1 bytes"):
            store.curves()
    assert f"trial {trial}: malformed curve in column curve" in check(tmp_path / "b").faults
