"""Utility against leakage: what is attacked, what counts as recovered, what is on the front."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_training import SMALL
from typer.testing import CliRunner

from leakbench.analysis import pareto as utility
from leakbench.analysis.pareto import front
from leakbench.cli.main import app
from leakbench.errors import BadOption
from leakbench.leaderboard.entry import entries
from leakbench.report import tradeoff as report
from leakbench.report import write
from leakbench.report.study import Value
from leakbench.report.tradeoff import AttackedDefense, AttackedStage
from leakbench.store.run_file import FILE, Store
from leakbench.training import records, train
from leakbench.training.settings import Tradeoff
from leakbench.training.tradeoff import arms_of, attack, targets_of

ATTACK: dict[str, Any] = {"attacks": ["peel"], "threats": ["paper", "informed=true"], "images": [0, 5]}


def study(**options: Any) -> Tradeoff:
    return Tradeoff(**{**SMALL, "datasets": ["samples(size=16, channels=1)"], "attack": ATTACK, **options})


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Leave LPIPS out."""
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path_factory.mktemp("home")))


def test_the_front_holds_what_nothing_else_beats() -> None:
    assert front([(0.9, 0.5), (0.8, 0.5), (0.8, 0.2), (0.7, 0.2), (0.9, 0.6), (0.1, 0.0)]) == [0, 2, 5]
    assert front([(0.5, 0.5), (0.5, 0.5)]) == [0, 1]
    assert front([(math.nan, 0.1), (0.2, math.nan), (0.1, 0.9)]) == [2]


def test_a_distance_beyond_the_floor_leaks_no_less_than_the_floor() -> None:
    def point(name: str, accuracy: float, distance: float) -> AttackedDefense:
        one = Value(accuracy, accuracy, accuracy)
        return AttackedDefense(name, one, 0.1, Value(0, 0, 0), Value(distance, distance, distance), 2, 2, 0, "", 0)

    stage = AttackedStage(
        "d", "m", "best", (point("far", 0.5, 0.9), point("floor", 0.6, 0.7), point("near", 0.9, 0.1)), 0.6
    )
    assert stage.front("LPIPS") == [1, 2]
    assert replace(stage, floor=math.nan).front("LPIPS") == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attack": {**ATTACK, "models": ["lenet"]}}, "leave models out of"),
        ({"attack": {**ATTACK, "images": 0}}, "images=0 is not valid"),
        ({"attack": {**ATTACK, "images": [1]}}, "image 1 of 'samples' is not a test image"),
        ({"attack": {**ATTACK, "images": 50}}, "more than the 13 test images"),
        ({"attack": {"attacks": ["pel"]}}, "did you mean 'peel'"),
        ({"stages": ["half"]}, "stages="),
        ({"models": ["two-pixels"]}, "takes no weights="),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_trained(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    from dataclasses import dataclass

    from torch import nn

    from leakbench import Model, models

    @models.register("two-pixels")
    @dataclass(frozen=True)
    class TwoPixels(Model):
        def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], num_classes))

    with pytest.raises(BadOption, match=words):
        train(arms_of([study(**options)]), tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_different_thresholds_are_refused(tmp_path: Path) -> None:
    rows = [study(attack={**ATTACK, "threshold": 0.5}), study(attack=ATTACK, seeds=[1])]
    with pytest.raises(BadOption, match=r"threshold=0\.6 of one row and 0\.5"):
        train(arms_of(rows), tmp_path)
    with pytest.raises(BadOption, match=r"threshold=0\.6 of one row and 0\.5"):
        attack(rows, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_checkpoints_are_attacked_and_drawn_against_their_accuracy(tmp_path: Path) -> None:
    plans = [study(defenses=["none", "noise(scale=10)"], stages=["initial", "best"], rounds=1)]
    train(arms_of(plans), tmp_path)
    targets = attack(plans, tmp_path)
    assert [(one.stage, one.defense) for one in targets] == [
        (stage, defense) for defense in ("none", "noise(scale=10.0)") for stage in ("initial", "best")
    ]
    with Store.open(tmp_path / FILE, readonly=True) as store:
        results = store.results()
    scenes = report.attacked_stages(results, records(tmp_path), targets, 0.6)
    assert [scene.stage for scene in scenes] == ["initial", "best"]
    for scene in scenes:
        plain, noisy = scene.points
        assert (plain.share.mean, plain.images, plain.strongest) == (1, 2, "peel")
        assert noisy.share.mean == 0
        assert 0 < plain.share.low < plain.share.high == 1
        (record,) = [one for one in records(tmp_path) if one.specs["defense"] == "none"]
        assert plain.accuracy.mean == record.outcome.chosen().accuracy("test")
    report.write(tmp_path)
    text = (tmp_path / "tradeoff.md").read_text()
    assert "**Attacked at stage best**" in text
    assert len(list((tmp_path / "tradeoff").glob("*.png"))) == 1
    first, last = utility.load(tmp_path / utility.FILE)
    assert (first.title, last.title) == (
        "samples(size=16, channels=1) · lenet · stage initial",
        first.title[:-7] + "best",
    )
    for shown, scene in zip((first, last), scenes):
        assert [point.label for point in shown.points] == ["none", "noise(scale=10.0)"]
        assert [point.leakage.value for point in shown.points] == [one.share.mean for one in scene.points]
        assert [point.utility.value for point in shown.points] == [one.accuracy.mean for one in scene.points]
    text = write(tmp_path, {"html"})[0].read_text()
    assert text.index("Utility against leakage") < text.index("Best of the attackers that ran")
    with Store.open(tmp_path / FILE, readonly=True) as store:
        board, _ = entries(store, "run", (first, last))
    costs = {one.defense: one.accuracy for one in board}
    for point in first.points:
        cost = costs[point.label]
        assert cost is not None
        assert (cost.accuracy, cost.without) == (point.utility.value, first.points[0].utility.value)
    before = len(results)
    assert attack(plans, tmp_path) == targets
    assert targets_of(tmp_path) == (0.6, targets)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        assert len(store.results()) == before


def test_what_could_not_be_attacked_is_said(tmp_path: Path) -> None:
    plans = [study(defenses=["none", "soteria"], stages=["best"], rounds=1)]
    train(arms_of(plans), tmp_path)
    assert [one.defense for one in attack(plans, tmp_path)] == ["none"]
    report.write(tmp_path)
    text = (tmp_path / "tradeoff.md").read_text()
    assert "- soteria, seed 0, stage best: unsupported: soteria is defined for one image" in text


@pytest.mark.long
def test_the_command_goes_from_training_to_the_picture(tmp_path: Path) -> None:
    file, out = tmp_path / "small.toml", tmp_path / "out"
    file.write_text(
        'models = ["lenet"]\ndatasets = ["samples(size=16, channels=1)"]\ndefenses = ["none", "precode(k=5)"]\n'
        "rounds = 1\nbatch = 16\n"
        'lr = 0.05\nstages = ["100 %"]\n[attack]\nattacks = ["peel"]\nimages = 1\nfloors = false\nthreshold = 0.5\n'
    )
    result = CliRunner().invoke(app, ["run", "tradeoff", str(file), "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("tradeoff.md", "accuracy.md", "report.md"):
        assert (out / name).exists()
    assert "SSIM of at least 0.5 after alignment" in " ".join((out / "tradeoff.md").read_text().split())
    text = (out / "tradeoff.md").read_text()
    (out / "tradeoff.md").unlink()
    assert CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False).exit_code == 0
    assert (out / "tradeoff.md").read_text() == text
