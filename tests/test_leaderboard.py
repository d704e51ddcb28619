"""The leaderboard: entries are what a run says, and a check runs their trials again."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from test_cli import cli, place, refused  # noqa: F401
from test_html import ALIGNED, NASTY, Tags, scored
from test_report import run
from test_store import METRICS, TinyAttack, TinyDefense, named

from leakbench import attacks
from leakbench.analysis import verdict
from leakbench.leaderboard import protocol
from leakbench.leaderboard.entry import Entry, TrialOf, read, schema
from leakbench.leaderboard.verify import EntryCheck, Repeat
from leakbench.plan.matrix import load_suite
from leakbench.report.leaderboard import write
from leakbench.store.records import StoredComponent

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
        {"label": label, "models": ["lenet(init=default)"], "utility": {**values, "value": v}, "leakage": values}
        for label, v in (("none", 0.8), ("noise(scale=1.0)", 0.75))
    ]
    (place / "ran" / "tradeoff.json").write_text(
        json.dumps({"studies": [{"title": "t", "utility": "accuracy", "leakage": "share", "points": points}]})
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
    lacking = ["lb", "ig", "grnn", "ggl"]
    assert (none.missing, none.inconclusive, none.caveat) == (lacking, "", "")
    assert (noise.groups, noise.by_floor, noise.missing[:2]) == (2, 0, ["peel (simulate)", "lb"])
    assert (noise.adaptive, noise.unadaptive, none.unadaptive) == ((), "no adaptive attacker ran", "")
    page = (ran / "board" / "index.html").read_text()
    assert "not attacked adaptively <small>(no adaptive attacker ran)</small>" in page
    assert "default-src" in page
    assert "best of the attackers that ran. Not run: lb, ig, grnn and ggl." in page
    assert "<strong>inconclusive</strong>" not in page
    assert all(f"entries/{file.name}" in page for file in files)
    assert page.index("noise(scale=1.0)") < page.index('<td class="spec">none')
    assert (ran / "board" / "entry.schema.json").read_text() == schema()


def test_an_entry_without_a_positive_control_bears_a_mark_and_comes_last(cli, ran: Path, place: Path) -> None:  # noqa: F811
    alone = ("--attack", "peel", *MATRIX[:4], "--images", "2")
    assert cli("run", "matrix", *alone, "--defense", "noise", "--threshold", "0.6", "--out", "two").code == 0
    assert cli("leaderboard", "two", "--out", "marked").code == 0
    page = (place / "marked" / "index.html").read_text()
    assert "<strong>inconclusive</strong>" in page
    assert "there is no positive control, since none was not attacked" in page
    assert cli("leaderboard", "ran", "two", "--out", "both").code == 0
    page = (place / "both" / "index.html").read_text()
    assert re.findall(r'<tr><td class="spec">([^<]*[^< ])', page) == ["noise(scale=1.0)", "none", "noise"]


SUITE = {
    "name": "worst-case",
    "default": "tiny",
    "threshold": 0.6,
    "defenses": ["none"],
    "models": ["lenet"],
    "datasets": ["samples(size=12)"],
    "scale": {"tiny": {"images": 2, "stages": [{"attacks": ["analytic", "ig(steps=2)"], "threats": ["paper"]}]}},
}


def test_only_entries_of_a_protocol_are_ranked_and_others_say_how_they_differ(cli, place, monkeypatch):  # noqa: F811
    for module in ("leakbench.analysis.verdict", "leakbench.leaderboard.protocol"):
        monkeypatch.setattr(f"{module}.load_suite", lambda name: SUITE)
    monkeypatch.setattr("leakbench.leaderboard.protocol.SCALES", {"tiny-1": "tiny"})
    for cached in (verdict._suite, protocol.protocols):
        cached.cache_clear()
    line = ("run", "matrix", "--model", "lenet", "--dataset", "samples(size=12)", "--attack", "ig(steps=3)")
    whole = ("--attack", "analytic", "--threshold", "0.6")
    runs = {
        "whole": (*whole, "--images", "2"),
        "short": ("--threshold", "0.6", "--images", "2"),
        "lower": (*whole[:-1], "0.5", "--images", "2"),
    }
    for name, options in runs.items():
        assert cli(*line, "--defense", "none", *options, "--out", name, "--name", name).code == 0
    assert cli("leaderboard", *runs, "--out", "board").code == 0
    for cached in (verdict._suite, protocol.protocols):
        cached.cache_clear()
    found = {one.run: one for one in map(read, (place / "board" / "entries").iterdir())}
    assert {name: (one.protocol, one.departures) for name, one in found.items()} == {
        "whole": ("tiny-1", ()),
        "short": ("", ("these attackers did not run: analytic",)),
        "lower": ("", ("its threshold is 0.5, and not 0.6",)),
    }
    page = (place / "board" / "index.html").read_text()
    ranked, others = page.split('<section id="others">')
    assert re.findall("<td>(whole|short|lower)", ranked) == ["whole"]
    assert set(re.findall("<td>(whole|short|lower)", others)) == {"short", "lower"}
    assert "(run lower) is not of the protocol of this dataset and model: its threshold is 0.5, and not 0.6." in others


def test_another_version_of_an_attacker_is_not_of_the_protocol() -> None:
    (first, *_) = protocol.protocols()
    own = pd.DataFrame(
        {"image": first.matrix.images, "seed": 0, "attack": "peel", "dataset": "cifar10", "model": "lenet"}
    )
    own = own.assign(threat="paper", floor=False)
    own.loc[len(own)] = [*own.iloc[0][:-1], True]
    now = attacks.get("peel").version
    stored = [StoredComponent("attack", "peel", version, {}) for version in (now, now - 1)]
    assert first.departures(own, stored[:1], 0.6, []) == []
    words = f"it has version {now - 1} of peel, and the protocol has {now}"
    assert first.departures(own, stored[1:], 0.6, []) == [words]
    assert first.departures(own[1:], stored[:1], 0.6, []) == ["it attacks other images or seeds"]
    assert first.departures(own[:-1], stored[:1], 0.6, []) == ["it has no floors"]
    for threat in ("T5", "labels=known", "informed=true, statistics=exact", "server=imprint(bins=8)"):
        (words,) = first.departures(own.assign(threat=threat), stored[:1], 0.6, [])
        assert words == "it grants the attackers something else than the threat model paper"
    assert first.departures(own.assign(threat="informed=simulate"), stored[:1], 0.6, []) == []
    assert first.covers("cifar10", "lenet")
    assert not first.covers("cifar10", "resnet20")


def test_every_protocol_says_what_it_fixes_and_its_command_runs_it() -> None:
    for one in protocol.protocols():
        assert one.words.startswith(f"{len(one.matrix.images)} images of cifar10 (")
        _, _, _, _, *options = one.command.split()
        scale = options[options.index("--scale") + 1] if "--scale" in options else load_suite("worst-case")["default"]
        assert scale == one.scale


def test_entries_of_before_called_adaptive_attackers_informed(ran: Path) -> None:
    file = ran / "board" / "entries" / "old.json"
    entry = json.loads(sorted((ran / "board" / "entries").iterdir())[0].read_text())
    entry["best_attacker"] = entry["attackers"][0]["name"] = "lb (informed)"
    file.write_text(json.dumps(entry))
    assert (read(file).best_attacker, read(file).attackers[0].name) == ("lb (adaptive)", "lb (adaptive)")


def test_whatever_is_in_a_name_is_text_on_the_page_and_in_the_entries(tmp_path: Path) -> None:
    attack, defense = named(TinyAttack, "thief")(note=NASTY), named(TinyDefense, "guard")(note=NASTY)
    crossed = [scored(attack, defense, image, 0.7) for image in (0, 1)]
    run(tmp_path / NASTY.replace("/", "-"), crossed, [*METRICS, *ALIGNED])
    write([tmp_path / NASTY.replace("/", "-")], tmp_path / "board")
    page = tmp_path / "board" / "index.html"
    text = page.read_text(encoding="utf-8")
    assert len(Tags(text).texts("script")) == 1
    assert "<script>alert" not in text
    assert "<!--" not in text
    (entry,) = (tmp_path / "board" / "entries").iterdir()
    assert NASTY.partition(" {{")[0] in read(entry).defense.replace('\\"', '"')


def test_the_schema_names_every_field() -> None:
    described = json.loads(schema())
    assert set(described["required"]) >= {"defense", "recovered", "trials"}
    assert described["additionalProperties"] is False
    assert set(described["properties"]) == {field.alias or name for name, field in Entry.model_fields.items()}


def test_an_entry_is_checked_by_running_its_trials_again(cli, ran: Path) -> None:  # noqa: F811
    (file,) = [path for path in (ran / "board" / "entries").iterdir() if read(path).defense == "none"]
    done = cli("leaderboard", "check", file, "ran", "--sample", "2")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"of 2 trials run again \(--seed \d+\), 0 recover an image .*, and 0 no longer do", done.out)
    assert "no difference of scores can be significant on 2 independent images" in done.out
    assert done.out.endswith("the entry holds\n")
    entry = json.loads(file.read_text())
    file.write_text(json.dumps({**entry, "recovered": 0.0}))
    done = cli("leaderboard", "check", file, "ran", "--sample", "1")
    assert done.code == 1
    assert "differs from its run in recovered" in done.out
    for change, words in (({"recovered": 2}, "recovered"), ({"extra": 1}, "extra"), ({"schema": "x"}, "schema")):
        file.write_text(json.dumps({**entry, **change}))
        refused(cli("leaderboard", "check", file, "ran"), words, "not an entry of a leaderboard")
    file.write_text(json.dumps({**entry, "defense": "keylock"}))
    refused(cli("leaderboard", "check", file, "ran"), "no finished defense 'keylock'")


@pytest.mark.long
def test_an_entry_under_revealed_secrets_is_checked(cli, place: Path) -> None:  # noqa: F811
    more = ("--defense", "keylock", "--threat", "T4", "--attack", "peel", "--images", "2", "--threshold", "0.6")
    assert cli("run", "matrix", *MATRIX[:-2], *more, "--out", "ran").code == 0
    assert cli("leaderboard", "ran", "--out", "board").code == 0
    for file in (place / "board" / "entries").iterdir():
        done = cli("leaderboard", "check", file, "ran", "--sample", "1")
        assert (done.code, done.out.endswith("the entry holds\n")) == (0, True)


def test_leaderboard_without_run_or_folder_is_refused(cli, place: Path) -> None:  # noqa: F811
    refused(cli("leaderboard", "nowhere", "--out", "board"), "nowhere")
    refused(cli("leaderboard", "check", "a.json"), "leaderboard check")
    refused(cli("leaderboard", "check", "a.json", "ran"), "a.json")
    refused(cli("leaderboard", "ran"), "--out")


@pytest.mark.parametrize(("flips", "holds"), [(0, True), (6, True), (7, False)])
def test_a_sample_holds_unless_its_flips_go_one_way_beyond_chance(flips: int, holds: bool) -> None:
    def repeat(index: int) -> Repeat:
        of = TrialOf(id="0" * 16, attack="dlg", threat="paper", image=index, seed=0, status="ok", score=0.1)
        return Repeat(of, "ok", 0.9 if index < flips else 0.1, (False, index < flips), index)

    found = EntryCheck((), tuple(map(repeat, range(8))))
    assert (found.more, found.less, found.holds) == (flips, 0, holds)
    assert not EntryCheck(("recovered",), found.repeats).holds


def test_scores_that_all_rise_refute_and_noise_does_not() -> None:
    def sample(change: float) -> EntryCheck:
        trials = [
            TrialOf(id="0" * 16, attack="dlg", threat="paper", image=i, seed=0, status="ok", score=0.2)
            for i in range(16)
        ]
        again = [0.2 + change * (i % 5 + 1) for i in range(16)]
        return EntryCheck((), tuple(Repeat(one, "ok", again[one.image], (False, False), one.image) for one in trials))

    assert (sample(0.02).more, sample(0.02).holds) == (0, False)
    assert sample(0.001).holds


def test_what_an_attacker_serves_in_one_place_alone_refutes() -> None:
    refused = TrialOf(id="0" * 16, attack="dlg", threat="paper", image=0, seed=0, status="unsupported", score=None)
    assert EntryCheck((), (Repeat(refused, "unsupported", math.nan, (False, False), 0),)).holds
    assert not EntryCheck((), (Repeat(refused, "ok", 0.1, (False, False), 0),)).holds


def test_what_has_not_ended_or_broke_has_no_entry_and_is_named(cli, place: Path, monkeypatch) -> None:  # noqa: F811
    def broken(observation: object) -> None:
        raise RuntimeError("out of luck")

    more = ("--attack", "peel", "--images", "1", "--threshold", "0.6", "--out", "ran")
    assert cli("run", "matrix", *MATRIX[:-2], *more).code == 0
    monkeypatch.setattr("leakbench.attacks.peel.served_chain", broken)
    assert cli("run", "matrix", *MATRIX, *more).code == 0
    done = cli("leaderboard", "ran", "--out", "board")
    assert (done.code, len(list((place / "board" / "entries").iterdir()))) == (0, 1)
    line = "noise(scale=1.0), on samples(size=12), lenet(init=default) (run matrix): 1 trial ended in an error"
    assert line in done.err
    assert line in (place / "board" / "index.html").read_text()
    refused(cli("leaderboard", "ran", "--out", "board", "--sample", "3"), "--sample is an option of leaderboard check")


def test_a_network_that_a_server_crafted_gets_no_entry(cli, place: Path) -> None:  # noqa: F811
    line = ("--model", "lenet", "--dataset", "samples(size=12)", "--images", "1", "--defense", "none", "--out", "ran")
    for threat in ("server=imprint(bins=8)", "paper"):
        assert cli("run", "matrix", "--attack", "ig(steps=2)", "--threat", threat, *line).code == 0
    done = cli("leaderboard", "ran", "--out", "board")
    assert done.code == 0
    assert "left out: none, on samples(size=12), lenet, crafted by a malicious server: imprint(bins=8)" in done.err
