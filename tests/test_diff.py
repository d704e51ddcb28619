"""One trial on the screen, and what changed between two runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
from pathlib import Path

import pandas as pd
import pytest
from test_cli import cli, place, refused  # noqa: F401
from test_store import Guard, TinyAttack, TinyDefense, provenance, ready, result, trial

from leakbench.errors import BadOption
from leakbench.plan.trial import Result
from leakbench.report.diff import ComparedRun, Comparison, _ensembles, diff
from leakbench.report.show import find, show
from leakbench.store.records import RunSession, TrialRecord
from leakbench.store.run_file import FILE, Store

SMALL = ("--model", "lenet", "--dataset", "samples(size=12)", "--defense", "keylock(length=9)", "--attack")


@pytest.fixture
def ran(cli, place: Path) -> Path:  # noqa: F811
    """A run of two cells, one of which needs options, and of floors."""
    more = ("--attack", "idlg(steps=1)", "--threat", "labels=known, reveals=key", "--images", "2,4", "--seeds", "1,")
    assert cli("run", "matrix", *SMALL, "ig(steps=2, tv=0.01)", *more, "--out", "ran").code == 0
    return place / "ran"


def test_show_says_everything_of_a_trial_and_its_command_makes_it_again(cli, ran: Path) -> None:  # noqa: F811
    with Store.open(ran / FILE, readonly=True) as store:
        rows = store.results()
        row = rows[(rows["attack"] == "ig(steps=2, tv=0.01)") & (rows["image"] == 4)].iloc[0]
        floor = rows[rows["floor"] & (rows["image"] == 4)]["ssim"].max()
        metrics = [metric.name for metric in store.metrics() if row[metric.name] == row[metric.name]]
    done = cli("show", ran, row["trial"][:10])
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    for words in (row["trial"], "keylock(length=9)", "steps=2", "index 4", "seed 1", "Revealed secrets: key"):
        assert words in " ".join(done.out.split()), words
    shown = {line.split()[0]: line.split()[1:3] for line in lines if line.split() and line.split()[0] in metrics}
    assert set(shown) == set(metrics)
    assert float(shown["ssim"][0].replace("−", "-")) == pytest.approx(row["ssim"], abs=1e-3)
    assert float(shown["ssim"][1].replace("−", "-")) == pytest.approx(floor, abs=1e-3)
    assert "dB" in done.out
    (command,) = [line for line in lines if line.startswith("leakbench run matrix")]
    again = cli(*shlex.split(command)[1:])
    assert again.code == 0
    with Store.open(ran.parent / f"runs/again-{row['trial']}" / FILE, readonly=True) as store:
        made = store.results()
    assert made["trial"].tolist() == [row["trial"]]
    assert made["ssim"].tolist() == [row["ssim"]]


def test_a_trial_is_found_by_the_first_digits_of_its_id(cli, place: Path) -> None:  # noqa: F811
    store, _ = ready(place)
    store.add_trials([trial(image) for image in range(20)])
    known = sorted(store.planned())
    twin = next(one[0] for one, other in itertools.pairwise(known) if one[0] == other[0])
    assert find(store, known[0].upper()) == known[0]
    store.close()
    refused(cli("show", place, "xyz"), "no trial", "'xyz'", "first digits")
    refused(cli("show", place, ""), "no trial", "first digits")
    refused(cli("show", place, twin), "trials of", "more digits")
    refused(cli("show", place / "nowhere", "a"), "nowhere")


def test_a_trial_that_was_planned_or_has_no_score_is_shown_too(tmp_path: Path) -> None:
    store, session = ready(tmp_path)
    waiting, broken = trial(0), trial(1)
    store.add_trials([waiting, broken])
    store.write([result(broken, status="unsupported", reason="no path", scores={}, reconstruction=None)], session)
    with store:
        planned, ended = show(store, waiting.id), show(store, broken.id)
    assert planned.metrics is None
    assert dict(planned.facts)["status"].startswith("planned, not run")
    assert ended.metrics is None
    assert dict(ended.facts)["status"] == "unsupported: no path"


def arm(folder: Path, name: str, results: list[Result]) -> ComparedRun:
    store, session = ready(folder / name)
    store.write(results, session)
    with store:
        return ComparedRun.of(name, store)


def scored(
    score: float, image: int, defense: TinyDefense | None = None, status: str = "ok", step: float = 0.1
) -> Result:
    of = trial(image, attack=TinyAttack(step), defense=defense)
    return result(of, status=status, scores={"psnr": score})


@pytest.fixture(autouse=True)
def by_psnr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare by the one metric that these runs have."""
    monkeypatch.setattr("leakbench.report.diff.METRICS", {"psnr": "dB"})
    monkeypatch.setattr("leakbench.report.differences.METRICS", {"psnr": "dB"})


def test_what_changed_beyond_chance_is_shown_by_cell(tmp_path: Path) -> None:
    other = TinyDefense(1.0)
    one = arm(tmp_path, "old", [scored(10 + i, i, guard) for guard in (None, other) for i in range(9)])
    moved = [scored(10 + i + (i % 3) + 1, i) for i in range(9)]
    still = [scored(10 + i + (-1) ** i, i, other) for i in range(8)]
    two = arm(tmp_path, "new", [*moved, *still, scored(5, 20, other)])
    found = diff(one, two)
    assert found.significant == 1
    assert "**1 statistically significant difference**, in 2 cells with 17 trials" in found.text
    first, second = [line for line in found.text.splitlines() if "| +" in line or "| −" in line or "+0.00" in line][:2]
    assert "+2.000 [+" in first
    assert "**0.0" in first
    assert "**" not in second
    lines = found.text.splitlines()
    assert any(line.startswith("| old") and line.split("|")[3].strip() == "1" for line in lines)
    assert any(line.startswith("| new") and line.split("|")[3].strip() == "1" for line in lines)
    assert "uncommitted" in found.text


def test_the_same_run_differs_in_nothing(tmp_path: Path) -> None:
    one, two = (arm(tmp_path, name, [scored(10 + i, i) for i in range(9)]) for name in "ab")
    found = diff(one, two)
    assert found.significant == 0
    assert "The scores of 9 of these are the same but for rounding" in found.text
    assert "only one run has" not in found.text


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    """Two versions of the library of a metric round differently."""
    before, after = (
        [scored(10 + i + bit, i) for i in range(40)] + [scored(5 + bit, 50, TinyDefense(1.0))] for bit in (0.0, 1e-13)
    )
    found = diff(arm(tmp_path, "a", before), arm(tmp_path, "b", after))
    assert found.significant == 0
    assert "The scores of 41 of these are the same but for rounding" in found.text


def test_cells_of_one_name_are_paired_and_their_settings_named(tmp_path: Path) -> None:
    class Newer(Guard):
        name = "tiny-defense"
        version = 2

    one = arm(tmp_path, "old", [scored(10, i, Guard()) for i in range(3)])
    two = arm(tmp_path, "new", [scored(10, i, Newer(), status="failed") for i in range(3)])
    text = diff(one, two).text
    assert "| defense.version | 1" in " ".join(text.split())
    assert "ok → failed" in text
    assert "Not significant at 3 images" in text


def test_runs_with_nothing_in_common_cannot_be_compared(tmp_path: Path) -> None:
    one = arm(tmp_path, "old", [scored(10, 0)])
    two = arm(tmp_path, "new", [scored(10, 0, step=0.2)])
    with pytest.raises(BadOption, match="no trial of old has a matching trial in new"):
        diff(one, two)


def test_runs_with_only_floors_in_common_are_said_not_to_be_compared(tmp_path: Path) -> None:
    class Still(TinyAttack):
        name, floor = "still", True

    floor = [result(trial(i, attack=Still()), scores={"psnr": 9.0}) for i in range(2)]
    one, two = arm(tmp_path, "old", [*floor, scored(10, 0)]), arm(tmp_path, "new", [*floor, scored(10, 0, step=0.2)])
    text = diff(one, two).text
    assert "**Nothing was compared**: the runs have no trial of an attack in common" in text
    assert "significant difference" not in text


def test_the_exit_code_says_whether_a_difference_is_shown(cli, place: Path, monkeypatch) -> None:  # noqa: F811
    ran = place / "ran"
    arm(place, "ran", [scored(10, 0)])
    same = cli("diff", ran, ran)
    assert (same.code, same.err) == (0, "")
    assert same.out.startswith("# ")
    monkeypatch.setattr("leakbench.report.diff.diff", lambda *arms: Comparison("text\n", 2))
    assert cli("diff", ran, ran).code == 1
    refused(cli("diff", ran, place), "run.sqlite")


def skipping(name: str, recovered: int, threshold: float | None = 0.6) -> ComparedRun:
    """A run that attacked no image again that the first of two attackers had recovered: so many of ten."""
    rows = [("dlg", i, "ok", 0.9 if i < recovered else 0.1) for i in range(10)]
    rows += [("ig", i, "ok" if i >= recovered else "", 0.2 if i >= recovered else math.nan) for i in range(10)]
    trials = pd.DataFrame(rows, columns=["attack", "image", "status", "ssim_aligned"])
    same = {"dataset": "d", "model": "m", "defense": "none", "threat": "paper", "seed": 0, "floor": False}
    matrix = json.dumps({"name": name} if threshold is None else {"name": name, "threshold": threshold})
    session = RunSession(1, dataclasses.replace(provenance(), matrix=matrix), "", "")
    trials = trials.assign(trial=list(map(str, range(20))), group=trials["image"], **same)
    record = TrialRecord("{}", "", 0, 1, "", specs={"dataset": "d", "model": "m", "defense": "none"})
    return ComparedRun(name, trials, dict.fromkeys(trials["trial"], record), [], [session])


def test_runs_that_skipped_are_compared_by_what_all_attackers_recover() -> None:
    text, shown = _ensembles(skipping("old", 1), skipping("new", 9))
    assert shown == 1
    (row,) = [line for line in text.splitlines() if line.startswith("| d, m, none")]
    assert [cell.strip() for cell in row.split("|")[2:8]] == ["10", "10 %", "90 %", "8", "0", "0.008"]
    assert _ensembles(skipping("old", 4), skipping("new", 6))[1] == 0
    assert _ensembles(skipping("old", 4, None), skipping("new", 6, None)) == ("", 0)
    text, shown = _ensembles(skipping("old", 4), skipping("new", 6, 0.8))
    assert (shown, "from 0.6 on in old, and from 0.8 in new" in text) == (0, True)
