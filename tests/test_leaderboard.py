"""The leaderboard: entries are what a run says, and a check runs their trials again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import cli, place, refused  # noqa: F401

from leakbench.leaderboard import Check, Repeat
from leakbench.report.leaderboard import Entry, TrialOf, read, schema

MATRIX = (
    "--model",
    "lenet(init=default)",
    "--dataset",
    "samples(size=12)",
    "--defense",
    "none",
    "--defense",
    "noise(scale=1.0)",
)


@pytest.fixture
def ran(cli, place: Path) -> Path:  # noqa: F811
    """A run of a closed form behind two defenses, with the study of one defense's accuracy."""
    more = ("--attack", "peel", "--images", "2", "--threshold", "0.6", "--out", "ran")
    assert cli("run", "matrix", *MATRIX, *more).code == 0
    values = {"value": 0.8, "low": 0.7, "high": 0.9}
    points = [
        {"label": label, "utility": {**values, "value": v}, "leakage": values}
        for label, v in (("none", 0.8), ("noise(scale=1.0)", 0.75))
    ]
    (place / "ran" / "tradeoff.json").write_text(
        json.dumps({"utility": "accuracy", "leakage": "share", "points": points})
    )
    assert cli("leaderboard", "ran", "--out", "board").code == 0
    return place


def test_entries_are_what_the_run_says(ran: Path) -> None:
    files = sorted((ran / "board" / "entries").iterdir())
    found = {one.defense: one for one in map(read, files)}
    none, noise = found["none"], found["noise(scale=1.0)"]
    assert (none.recovered, none.best_attacker, none.images, none.floor) == (1.0, "peel", 2, 0.0)
    assert (noise.recovered, noise.best_attacker) == (0.0, None)
    assert noise.accuracy is not None
    assert (noise.accuracy.accuracy, noise.accuracy.without) == (0.75, 0.8)
    assert [trial.image for trial in none.trials] == [0, 1]
    assert none.settings["defense"] == {"version": none.settings["defense"]["version"]}
    page = (ran / "board" / "index.html").read_text()
    assert "default-src" in page
    assert all(f"entries/{file.name}" in page for file in files)
    assert page.index("noise(scale=1.0)") < page.index('<td class="spec">none')
    assert (ran / "board" / "entry.schema.json").read_text() == schema()


def test_the_schema_names_every_field() -> None:
    described = json.loads(schema())
    assert set(described["required"]) >= {"defense", "recovered", "trials"}
    assert described["additionalProperties"] is False
    assert set(described["properties"]) == {field.alias or name for name, field in Entry.model_fields.items()}


def test_an_entry_is_checked_by_running_its_trials_again(cli, ran: Path) -> None:  # noqa: F811
    (file,) = [path for path in (ran / "board" / "entries").iterdir() if read(path).defense == "none"]
    done = cli("leaderboard", "check", file, "ran", "--sample", "2")
    assert (done.code, done.err) == (0, "")
    assert "of 2 trials run again, 0 recover an image that was not recovered, and 0 no longer do" in done.out
    assert done.out.endswith("the entry holds\n")
    entry = json.loads(file.read_text())
    file.write_text(json.dumps({**entry, "recovered": 0.0}))
    done = cli("leaderboard", "check", file, "ran", "--sample", "1")
    assert done.code == 1
    assert "recovered differs" in done.out
    for change, words in (({"recovered": 2}, "recovered"), ({"extra": 1}, "extra"), ({"schema": "x"}, "schema")):
        file.write_text(json.dumps({**entry, **change}))
        refused(cli("leaderboard", "check", file, "ran"), words, "no entry of a leaderboard")
    file.write_text(json.dumps({**entry, "defense": "keylock"}))
    refused(cli("leaderboard", "check", file, "ran"), "no finished defense 'keylock'")


def test_what_no_run_or_no_folder_is_given_for_is_refused(cli, place: Path) -> None:  # noqa: F811
    refused(cli("leaderboard", "nowhere", "--out", "board"), "nowhere")
    refused(cli("leaderboard", "check", "a.json"), "leaderboard check")
    refused(cli("leaderboard", "check", "a.json", "ran"), "a.json")
    refused(cli("leaderboard", "ran"), "--out")


@pytest.mark.parametrize(("flips", "holds"), [(0, True), (5, True), (6, False)])
def test_a_sample_holds_unless_its_flips_go_one_way_beyond_chance(flips: int, holds: bool) -> None:
    def repeat(index: int) -> Repeat:
        of = TrialOf(id="0" * 16, attack="dlg", threat="paper", image=index, seed=0, status="ok", score=0.1)
        return Repeat(of, "ok", 0.9 if index < flips else 0.1)

    found = Check((), tuple(map(repeat, range(8))), 0.6)
    assert (found.more, found.less, found.holds) == (flips, 0, holds)
    assert not Check(("recovered",), found.repeats, 0.6).holds
