"""Shards, merging and checking: the parts are the whole, whatever was merged twice; and what is wrong is found."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pandas as pd
import pytest
from conftest import SALT
from test_cli import cli, place, refused  # noqa: F401
from test_engine import Counter, RaisesForOne, go, measured, no_assets, plan  # noqa: F401
from test_worst_case import Counts, Knows, Thief, ensemble

import leakbench
from leakbench import LeakbenchError
from leakbench.analysis.integrity import check
from leakbench.engine.shard import parse, part
from leakbench.errors import BadOption
from leakbench.store.merge import merge
from leakbench.store.run_file import FILE, Store


def rows(out: Path) -> dict[str, list[tuple]]:
    """All that a run file holds, sessions and the order of writing left out."""
    db = sqlite3.connect(out / FILE)
    own = {
        "trials": "trials.id, image, seed, settings FROM trials JOIN cells ON cells.id = cell_id",
        "results": "trial_id, status, reason, label, objective, evaluations, path, truth FROM results",
        "scores": "* FROM scores",
        "images": "* FROM images",
        "truths": "* FROM truths",
    }
    found = {name: sorted(db.execute(f"SELECT {what}"), key=repr) for name, what in own.items()}
    db.close()
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("images", [1, 5, 100])
def test_shards_have_every_trial_once_and_none_is_much_larger(count, images):
    trials = plan(
        attacks=["random", "grey", "mean"], defenses=["none", "noise"], images=min(images, 16), seeds=images
    ).trials()
    shards = []
    for place_ in range(1, count + 1):
        shards.append(part(trials, f"{place_}/{count}", ensemble=False))
        assert shards[-1] or images == 1
    assert sorted(trial.id for shard in shards for trial in shard) == sorted(trial.id for trial in trials)
    assert max(map(len, shards)) <= max(8, 2.5 * len(trials) / count)
    assert shards[0] == part(trials, f"1/{count}", ensemble=False)
    places = {trial.id: at for at, trial in enumerate(trials)}
    assert all(shard == sorted(shard, key=lambda trial: places[trial.id]) for shard in shards)


def test_of_an_ensemble_all_attacks_on_an_image_are_in_one_shard():
    trials = ensemble(Knows("0 2"), Counts("2 3"), Thief(), images=16, defenses=["none", "noise"], floors=True).trials()
    shards = [part(trials, f"{place_}/3", ensemble=True) for place_ in (1, 2, 3)]
    attacked = [[trial for trial in shard if not trial.cell.attack.floor] for shard in shards]
    assert sum(map(len, attacked)) == len({trial.id for shard in attacked for trial in shard}) == 2 * 3 * 16
    assert {trial.id for shard in shards for trial in shard} == {trial.id for trial in trials}
    targets = [{trial.target for trial in shard} for shard in attacked]
    assert sum(map(len, targets)) == len(set.union(*targets))
    for shard in shards:  # with the floors that recovered is judged by
        floors = {(trial.image, trial.cell.attack.name) for trial in shard if trial.cell.attack.floor}
        assert {trial.image for trial in shard} == {image for image, _ in floors}
        assert len(floors) == 3 * len({trial.image for trial in shard})


@pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "-1/4", "1/0", "a/b", "1/2/3", "١/2"])
def test_what_is_no_shard_is_refused(text):
    with pytest.raises(BadOption, match="must be i/n"):
        parse(text)


@pytest.mark.long
def test_shards_that_are_merged_are_the_run_in_one(tmp_path):
    matrix = plan(
        attacks=["random", RaisesForOne(), "mean"], defenses=["none", "noise(scale=0.1)"], images=9, floors=True
    )
    whole = go(matrix, tmp_path / "whole", chunk=2)
    for number in (1, 2, 3):
        seen = Counter()
        own = go(matrix, tmp_path / f"{number}", chunk=2, shard=f"{number}/3", salt=SALT, progress=seen)
        assert 0 < len(own) == sum(seen.chunks) < len(whole)
        assert check(tmp_path / f"{number}").missing == {}
    parts = [tmp_path / f"{number}" for number in (3, 1, 2)]
    first = merge(parts, tmp_path / "all")
    assert (first.added, first.planned) == (len(whole), len(whole))
    assert first.finished == len(whole) - 2  # RaisesForOne
    assert rows(tmp_path / "all") == rows(tmp_path / "whole")
    merged = leakbench.Run(tmp_path / "all").results().set_index("trial")
    pd.testing.assert_frame_equal(measured(merged), measured(whole))
    assert list(merged.index) == list(whole.index)
    before = (tmp_path / "all" / FILE).read_bytes()
    again = merge([*parts, tmp_path / "all", tmp_path / "all" / FILE], tmp_path / "all")
    assert again.added == 0
    assert rows(tmp_path / "all") == rows(tmp_path / "whole")
    with Store.open(tmp_path / "all" / FILE, readonly=True) as store:
        assert len(store.sessions()) == 3
    assert len(before) == len((tmp_path / "all" / FILE).read_bytes())
    assert len(go(matrix, tmp_path / "all", chunk=2)) == len(whole)


def test_a_result_takes_the_place_of_an_error_and_of_nothing_else(tmp_path):
    matrix = plan(attacks=["random"], images=3)
    for name in ("a", "b"):
        go(matrix, tmp_path / name)
    with sqlite3.connect(tmp_path / "a" / FILE) as db:
        bad = db.execute("SELECT trial_id FROM results ORDER BY trial_id").fetchone()
        db.execute("DELETE FROM scores WHERE trial_id = ?", bad)
        db.execute("DELETE FROM images WHERE trial_id = ?", bad)
        db.execute("UPDATE results SET status = 'error', reason = 'mine' WHERE trial_id = ?", bad)
        db.execute("UPDATE results SET seconds = 7.5 WHERE status = 'ok'")
    db.close()
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c").added == 3 + 1
    results = leakbench.Run(tmp_path / "c").results()
    assert set(results["status"]) == {"ok"}
    assert (results["seconds"] == 7.5).sum() == 2
    assert merge([tmp_path / "a"], tmp_path / "b").added == 0
    assert check(tmp_path / "c").code == 0
    assert check(tmp_path / "a").code == 1


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("UPDATE sessions SET matrix = json_set(matrix, '$.images', 99)", ["different matrices", "images: 2 and 99"]),
        ("UPDATE sessions SET version = '9.9'", ["leakbench 9.9", "leakbench 0"]),
        ("UPDATE sessions SET packages = json_set(packages, '$.torch', '1.2')", ["torch 1.2", "--force"]),
    ],
)
def test_runs_that_differ_are_refused_in_one_line_unless_told(tmp_path, sql, words):
    matrix = plan(attacks=["grey"], images=2)
    go(matrix, tmp_path / "a")
    go(matrix, tmp_path / "b")
    with sqlite3.connect(tmp_path / "a" / FILE) as db:
        db.execute(sql)
    db.close()
    with pytest.raises(LeakbenchError, match="--force") as told:
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert all(word in str(told.value) for word in words)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "c").exists()
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", force=True).added == 2


def test_nothing_is_merged_into_a_folder_that_is_being_run(tmp_path):
    matrix = plan(attacks=["grey"], images=2)
    go(matrix, tmp_path / "a")
    told = []

    class Second(Counter):
        def finish(self, results):
            with pytest.raises(LeakbenchError, match="another process") as refusal:
                merge([tmp_path / "a"], tmp_path / "b", force=True)
            told.append(str(refusal.value))
            super().finish(results)

    go(matrix, tmp_path / "b", progress=Second())
    assert told
    assert merge([tmp_path / "a"], tmp_path / "b").added == 0


ROWS = """
models = ["lenet"]
datasets = ["samples"]
floors = false
[[rows]]
attacks = ["grey"]
defenses = ["none"]
images = 1
[[rows]]
attacks = ["random"]
defenses = ["none", "noise(scale=0.01)"]
images = 12
"""


def test_a_shard_leaves_out_the_rows_of_which_it_has_nothing(cli, place):  # noqa: F811
    (place / "m.toml").write_text(ROWS)
    parts = [f"s{number}" for number in (1, 2, 3)]
    for number, out in enumerate(parts, 1):
        assert cli("run", "matrix", "m.toml", "--shard", f"{number}/3", "--salt", SALT, "--out", out).code == 0
    assert merge([place / out for out in parts], place / "all").planned == 25
    assert check(place / "all").code == 0
    refused(cli("run", "matrix", "m.toml", "--shard", "99/99", "--out", "none"), "would be empty")
    assert not (place / "none").exists()


def test_a_row_that_does_not_fit_is_refused_before_the_first_one_runs(cli, place):  # noqa: F811
    (place / "m.toml").write_text(ROWS.replace('"random"', '"ggl"'))
    refused(cli("run", "matrix", "m.toml", "--out", "none"), "ggl")
    assert not (place / "none").exists()


DAMAGES = {
    "settings": ("UPDATE cells SET settings = replace(settings, 'lenet', 'lenet-bn')", "does not match its settings"),
    "seed": ("UPDATE trials SET seed = 5 WHERE position = 0", "does not match its settings"),
    "picture": ("DELETE FROM images WHERE rowid = 1", "has no image"),
    "png": ("UPDATE images SET png = x'00' WHERE rowid = 2", "not a PNG"),
    "truth": ("UPDATE truths SET png = (SELECT png FROM images) WHERE rowid = 1", "does not match its SHA-256"),
    "scores": ("DELETE FROM scores WHERE trial_id = (SELECT id FROM trials)", "has no score"),
    "infinite": ("UPDATE scores SET value = 9e999 WHERE metric = 'psnr'", "its psnr is not finite"),
    "status": ("UPDATE results SET status = 'failed' WHERE rowid = 1", "without a reason"),
    "error": ("UPDATE results SET status = 'error', reason = 'x' WHERE rowid = 1", "has scores or an image"),
    "orphan": ("DELETE FROM truths", "refers to a missing row of truths"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    leakbench.run(plan(attacks=["random", "mean"], images=3), folder, device="cpu")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_faults_of_a_run_are_found(tmp_path, sound, damage):
    sql, words = DAMAGES[damage]
    (tmp_path / FILE).write_bytes((sound / FILE).read_bytes())
    assert check(tmp_path).code == 0
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute(sql)
    db.close()
    state = check(tmp_path)
    assert state.code == 3
    assert any(words in fault for fault in state.faults), state.faults


def test_the_command_says_what_is_missing_and_exits_accordingly(cli, place, sound):  # noqa: F811
    (place / "run").mkdir()
    file = place / "run" / FILE
    file.write_bytes((sound / FILE).read_bytes())
    done = cli("check", "run")
    assert (done.code, done.err) == (0, "")
    assert "6 trials planned, 6 ended (6 ok)" in done.out
    with sqlite3.connect(file) as db:
        for table in ("scores", "images", "results"):
            db.execute(f"DELETE FROM {table} WHERE trial_id IN (SELECT id FROM trials WHERE image = 1)")
    db.close()
    done = cli("check", file)
    assert done.code == 1
    assert "missing: 1 of random against none (paper), lenet on tiny" in done.out
    with file.open("r+b") as damaged:
        damaged.seek(8192)
        damaged.write(b"\xff" * 4096)
    done = cli("check", "run")
    assert done.code == 3
    assert done.err == ""
    refused(cli("check", "nowhere"), "no run file")
    refused(cli("merge", "nowhere", "-o", "c"), "no run file")
    assert not (place / "c").exists()
    refused(cli("run", "matrix", "--shard", "5/4"), "5/4")


def test_an_ensemble_counts_what_needs_no_result(tmp_path):
    matrix = ensemble(Knows("0 2"), Counts("2 3"), Thief(), floors=True)
    go(matrix, tmp_path)
    state = check(tmp_path)
    assert (state.code, state.skipped, state.missing) == (0, 5, {})
    assert json.loads(json.dumps(state.ended)) == {"ok": 19}
