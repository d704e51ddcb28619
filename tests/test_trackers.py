"""Runs are logged to experiment trackers, and a tracker that fails ends neither the run nor another tracker."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Self

import pytest
from typer.testing import CliRunner

import leakbench
from leakbench import Matrix, trackers
from leakbench.cli.main import app
from leakbench.engine.progress import NullProgress
from leakbench.errors import BadOption, LeakbenchError
from leakbench.trackers.base import RunOutcome, TrackedRun, Tracker

AXES = {"attacks": ["peel"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples(size=16)"]}
WORDS = "peel against none, lenet on samples(size=16)"


class Fake(Tracker):
    """A tracker that keeps what it is given."""

    opened: ClassVar[list[Fake]] = []
    breaks: ClassVar[str] = ""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.outcome: RunOutcome | None = None
        self.completed: bool | None = None

    @classmethod
    def open(cls, run: TrackedRun) -> Self:
        if cls.breaks == "open":
            raise OSError("no\nroute")
        own = cls(run)
        Fake.opened.append(own)
        return own

    def log(self, step: int, scores: Mapping[str, float]) -> None:
        if self.breaks == "log":
            raise ConnectionError("gone " * 200)
        self.rows.append((step, scores))

    def finish(self, outcome: RunOutcome) -> None:
        self.outcome = outcome

    def close(self, *, completed: bool) -> None:
        self.completed = completed


class Broken(Fake):
    breaks: ClassVar[str] = "log"


class Lines(NullProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("leakbench.trackers.fake")
    module.Fake, module.Broken = Fake, Broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "leakbench.trackers.fake", module)
    monkeypatch.setitem(sys.modules, "leakbench.trackers.broken", module)
    monkeypatch.setattr(trackers, "CLASSES", {**trackers.CLASSES, "fake": "Fake", "broken": "Broken"})
    monkeypatch.setattr(Fake, "opened", [])


def matrix(images: int) -> Matrix:
    return Matrix(**AXES, images=images)


def test_every_trial_is_logged_once_and_a_resumed_run_has_the_same_id(tmp_path: Path) -> None:
    leakbench.run(matrix(1), tmp_path, log=["fake"])
    run = leakbench.run(matrix(2), tmp_path, log=["fake"])
    first, second = Fake.opened
    assert first.run.id == second.run.id
    assert first.run.name == "matrix"
    assert '"lenet"' in first.run.config["models"]
    assert [step for step, _ in first.rows] == [1, 2, 3, 4]
    assert [step for step, _ in second.rows] == [5, 6, 7, 8]
    scored = dict(
        zip(run.results()["image"][run.results()["attack"] == "peel"], run.results().query("attack == 'peel'").psnr)
    )
    assert [row[f"psnr/{WORDS}"] for _, row in (*first.rows, *second.rows) if f"psnr/{WORDS}" in row] == [
        scored[0],
        scored[1],
    ]
    assert second.outcome is not None
    assert second.outcome.shares == {"none": 1.0}
    assert {path.name for path in second.outcome.pages} == {"report.md", "results.csv"}
    assert len(second.outcome.pictures) == 3
    assert (first.completed, second.completed) == (True, True)


def test_a_tracker_that_fails_is_named_and_left_out(tmp_path: Path) -> None:
    told = Lines()
    run = leakbench.run(matrix(1), tmp_path, log=["broken", "fake"], progress=told)
    broken, good = Fake.opened
    (line,) = [line for line in told.lines if "broken" in line]
    assert line.startswith("broken failed, and nothing more is logged to it: gone gone")
    assert len(line) < 400
    assert broken.outcome is None
    assert len(good.rows) == len(run.results()) == 4


def test_a_tracker_that_does_not_open_ends_the_run_before_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "breaks", "open")
    with pytest.raises(LeakbenchError, match=r"^--log broken does not begin: no route; mend this, or leave it out$"):
        leakbench.run(matrix(1), tmp_path, log=["broken"])
    assert leakbench.Run(tmp_path).results().empty


def test_a_stopped_run_is_closed_as_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Fake, step: int, scores: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fake, "log", stop)
    with pytest.raises(KeyboardInterrupt):
        leakbench.run(matrix(1), tmp_path, log=["fake"])
    assert Fake.opened[0].completed is False
    assert Fake.opened[0].outcome is None


def test_the_command_line_logs_all_matrices_of_a_run_to_one_tracker(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    row = 'attacks = ["peel"]\ndefenses = ["none"]\nmodels = ["lenet"]\nfloors = false\nimages = 1\n'
    rows = "".join(f'[[rows]]\ndatasets = ["samples(size={size})"]\n' for size in (16, 12))
    file.write_text(row + rows)
    line = ["run", "matrix", str(file), "--out", str(tmp_path / "out"), "--log", "fake"]
    result = CliRunner().invoke(app, line, catch_exceptions=False)
    assert result.exit_code == 0
    (one,) = Fake.opened
    assert [(step, sorted(row)[-1].partition("/")[2].rpartition(" ")[2]) for step, row in one.rows] == [
        (1, "samples(size=16)"),
        (2, "samples(size=12)"),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("comet", r"^tracker 'comet' is unknown; known: wandb, tensorboard, mlflow"), ("wandb", r"pip install wandb$")],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "leakbench.trackers.wandb", raising=False)
    with pytest.raises(BadOption, match=words):
        leakbench.run(matrix(1), tmp_path / "out", log=[name])
    assert not (tmp_path / "out").exists()


@pytest.mark.trackers
@pytest.mark.filterwarnings("ignore")
def test_mlflow_is_given_names_that_it_allows() -> None:
    extra("mlflow")
    from mlflow.utils.validation import _validate_metric_name

    from leakbench.trackers.mlflow import _name

    for words in ("folder(path=../../photos, size=16)", "a//b", "x/../y", "ig(steps=3) against none"):
        _validate_metric_name(_name(f"mse/{words}"))


def extra(name: str) -> object:
    return pytest.importorskip(name, reason=f"{name} is not installed; make test-extras")


@pytest.mark.trackers
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    extra("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = leakbench.run(matrix(1), tmp_path, log=["tensorboard"])
    leakbench.run(matrix(2), tmp_path, log=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    psnr = [round(event.value, 3) for event in events.Scalars(f"psnr/{WORDS}")]
    assert psnr == [round(value, 3) for value in run.results().query("attack == 'peel'").sort_values("image")["psnr"]]
    assert [event.value for event in events.Scalars("recovered/none")] == [1.0, 1.0]
    assert len(events.Tags()["images"]) == 3


@pytest.mark.trackers
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_one_run_with_metrics_and_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracked.db")
    monkeypatch.chdir(tmp_path)
    from mlflow import MlflowClient

    for images in (1, 2):
        leakbench.run(matrix(images), tmp_path / "out", log=["mlflow"])
    client = MlflowClient(f"sqlite:///{tmp_path}/tracked.db")
    (found,) = client.search_runs([client.get_experiment_by_name("leakbench").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.metrics["recovered/none"] == 1.0
    name = "psnr/peel against none_ lenet on samples_size_16_"
    assert len(client.get_metric_history(found.info.run_id, name)) == 2
    assert {one.path for one in client.list_artifacts(found.info.run_id)} == {"report.md", "results.csv", "grids"}


@pytest.mark.trackers
@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_a_run_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extra("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    told = Lines()
    leakbench.run(matrix(1), tmp_path, log=["wandb"], progress=told)
    assert not [line for line in told.lines if "wandb" in line]
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    media = {path.suffix for path in (folder / "files" / "media").rglob("*.*")}
    assert media == {".png", ".json"}  # the pictures and the table
    assert list(folder.glob("*.wandb"))
