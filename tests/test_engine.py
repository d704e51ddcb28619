"""The engine: the same numbers however a run is cut, ordered or stopped; and what fails costs its own trials."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import own_attacks  # noqa: F401
import pandas as pd
import pytest
import torch
from conftest import COPIED, images_of
from torch import Tensor, nn

import leakbench
from leakbench import (
    Attack,
    Dataset,
    Defense,
    Gradient,
    LeakbenchError,
    Matrix,
    Metric,
    Observation,
    Reconstruction,
    Rng,
    Step,
    Unsupported,
    metrics,
)
from leakbench.api import Run
from leakbench.core.types import Uniform
from leakbench.engine.progress import NullProgress
from leakbench.engine.run import finished
from leakbench.plan.trial import Result
from leakbench.store import connection
from leakbench.store.run_file import FILE, Store
from leakbench.victim import Client, observe


@dataclass(frozen=True)
class Tiny(Dataset):
    """Smooth random images, 16 in all, in one of 4 classes."""

    name: ClassVar[str] = "tiny"
    size: int = 12
    channels: int = 1
    num_classes = 4

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    def __len__(self) -> int:
        return 16

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        coarse = [torch.rand(1, self.channels, 3, 3, generator=torch.Generator().manual_seed(i)) for i in indices]
        images = nn.functional.interpolate(torch.cat(coarse), size=self.size, mode="bilinear")
        return images, torch.tensor([index % 4 for index in indices])

    def mean(self) -> Tensor:
        return torch.full(self.image_shape, 0.5)


@dataclass(frozen=True)
class Thief(Attack):
    """Noise from the attacker's own source; subclasses misbehave."""

    name: ClassVar[str] = "thief"

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        return self.give(rng.uniform("image", observation.image_shape), observation, rng)

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Any:
        return Reconstruction(images)

    def rows(self, rng: Rng, image: int) -> list[int]:
        return [row for row, trial in enumerate(images_of(rng.keys)) if trial is not None and trial[1] == image]


@dataclass(frozen=True)
class Slow(Thief):
    name: ClassVar[str] = "slow"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        time.sleep(0.05 * len(images))
        return Reconstruction(images)


def one(index: int) -> Tensor:
    return Tiny().load([index])[0][0]


def plan(**axes: Any) -> Matrix:
    given = {"attacks": ["grey"], "defenses": ["none"], "models": ["lenet"], "datasets": [Tiny()], "images": 4}
    return Matrix(**{**given, "floors": False, **axes})


@pytest.fixture(autouse=True)
def no_assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path_factory.mktemp("cache")))


def go(matrix: Matrix, out: Path, **options: Any) -> pd.DataFrame:
    """Run a matrix and return its results by trial."""
    return leakbench.run(matrix, out, device="cpu", **options).results().set_index("trial")


def measured(results: pd.DataFrame) -> pd.DataFrame:
    """The part of the results that must not depend on how a run went: all but the time it took."""
    return results.drop(columns="seconds").sort_index()


def stored(out: Path, trials: Sequence[str]) -> dict[str, object]:
    """Everything that the run file holds of these trials."""
    db = sqlite3.connect(f"{(out / FILE).resolve().as_uri()}?mode=ro", uri=True)
    tables = {"trials": "id", "results": "trial_id", "scores": "trial_id", "images": "trial_id"}
    rows = {
        (table, trial): db.execute(f"SELECT * FROM {table} WHERE {key} = ? ORDER BY 1, 2", (trial,)).fetchall()
        for table, key in tables.items()
        for trial in trials
    }
    db.close()
    return rows


def done(out: Path) -> set[str]:
    with Store.open(out / FILE, readonly=True) as store:
        return store.done()


def close(a: pd.DataFrame, b: pd.DataFrame, rel: float) -> None:
    a, b = measured(a), measured(b)
    numbers = a.select_dtypes("float64").columns
    pd.testing.assert_frame_equal(a[numbers], b[numbers], rtol=rel, atol=1e-6)
    pd.testing.assert_frame_equal(a.drop(columns=numbers), b.drop(columns=numbers))


class Counter(NullProgress):
    """What the engine tells: chunks, notes, and an interruption after so many chunks."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.chunks: list[int] = []
        self.notes: list[str] = []
        self.waiting = self.before = -1

    def start(self, waiting: Sequence[object], done: int) -> None:
        self.waiting, self.before = len(waiting), done

    def note(self, line: str) -> None:
        self.notes.append(line)

    def finish(self, results: Sequence[Result]) -> None:
        self.chunks.append(len(results))
        if len(self.chunks) == self.stop_after:
            raise KeyboardInterrupt


# Cut, order, stop and go on


def test_chunks_of_any_size_give_the_same_trials_and_bytes(tmp_path):
    defenses = ["none", "noise(scale=0.1)", "keylock(length=9)", "precode(k=6)"]
    floors = plan(attacks=["random", "mean", "grey"], defenses=defenses)
    one, three = go(floors, tmp_path / "1", chunk=1), go(floors, tmp_path / "3", chunk=3)
    assert len(one) == 48
    pd.testing.assert_frame_equal(measured(one), measured(three))
    with Store.open(tmp_path / "1" / FILE) as first, Store.open(tmp_path / "3" / FILE) as second:
        assert first.images(one.index) == second.images(one.index)


@pytest.mark.parametrize(
    ("attack", "defenses"),
    [
        ("ig(steps=3, signed=false)", ["none", "noise(scale=0.1)", "keylock(length=9)"]),
        ("dlg(steps=1, lr=0.01)", "none"),
    ],
)
def test_chunks_of_any_size_give_searches_the_same_start_and_steps(tmp_path, attack, defenses):
    matrix = plan(attacks=[attack], defenses=defenses, images=3)
    one, three = go(matrix, tmp_path / "1", chunk=1), go(matrix, tmp_path / "3", chunk=3)
    assert set(one["status"]) == {"ok"}
    close(one, three, rel=1e-3)


def test_the_order_of_the_axes_changes_nothing(tmp_path):
    axes = {
        "attacks": ["random", "ig(steps=2)"],
        "defenses": ["none", "noise(scale=0.01)"],
        "models": ["lenet", "lenet-bn"],
        "datasets": [Tiny(), Tiny(channels=3)],
    }
    forward = go(plan(**axes, images=2), tmp_path / "a", chunk=2)
    backward = go(plan(**{axis: values[::-1] for axis, values in axes.items()}, images=2), tmp_path / "b", chunk=2)
    assert len(forward) == 32
    pd.testing.assert_frame_equal(measured(forward), measured(backward))
    assert list(forward.index) != list(backward.index)

    floors = plan(attacks=["random", "mean"], images=[0, 7, 3, 15])
    forward = go(floors, tmp_path / "c", chunk=3)
    backward = go(plan(attacks=["random", "mean"], images=[15, 3, 7, 0]), tmp_path / "d", chunk=3)
    pd.testing.assert_frame_equal(measured(forward), measured(backward))


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_run_that_is_interrupted_goes_on(tmp_path, chunk):
    matrix = plan(attacks=["random", "ig(steps=2)"], defenses=["none", "keylock(length=9)"])
    whole = go(matrix, tmp_path / "whole", chunk=chunk)
    with pytest.raises(KeyboardInterrupt):
        go(matrix, tmp_path / "cut", chunk=chunk, progress=Counter(stop_after=3))
    before = done(tmp_path / "cut")
    kept = stored(tmp_path / "cut", sorted(before))
    assert 3 <= len(before) < len(whole)
    assert finished(tmp_path / "cut", matrix) == len(before)

    seen = Counter()
    again = go(matrix, tmp_path / "cut", chunk=chunk, progress=seen)
    assert (seen.before, seen.waiting) == (len(before), len(whole) - len(before))
    assert sum(seen.chunks) == seen.waiting
    assert stored(tmp_path / "cut", sorted(before)) == kept
    pd.testing.assert_frame_equal(measured(again), measured(whole))
    assert list(again.index) == list(whole.index)


def long_matrix() -> Matrix:
    return plan(attacks=[Slow(), "random"], defenses=["none", "noise(scale=0.01)"], images=16)


def run_long(out: Path) -> None:
    torch.set_num_threads(1)
    go(long_matrix(), out, chunk=2)


@pytest.mark.long
def test_a_run_that_is_killed_goes_on(tmp_path):
    out = tmp_path / "run"
    process = COPIED.Process(target=run_long, args=(out,))
    process.start()
    try:
        for _ in range(3000):
            # the commit of a chunk is seen from outside while the run goes on
            if not process.is_alive() or ((out / FILE).exists() and len(peek(out)) >= 6):
                break
            time.sleep(0.02)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    before = done(out)
    kept = stored(out, sorted(before))
    total = len(long_matrix().trials())
    assert 6 <= len(before) < total
    assert len(before) % 2 == 0  # whole chunks

    seen = Counter()
    results = go(long_matrix(), out, chunk=2, progress=seen)
    assert (seen.before, seen.waiting) == (len(before), total - len(before))
    assert list(results.index) == [trial.id for trial in sorted_like_results(long_matrix())]
    assert stored(out, sorted(before)) == kept
    assert set(results["status"]) == {"ok"}
    assert [path.name for path in out.iterdir()] == [FILE]


def peek(out: Path) -> list[tuple[str]]:
    db = sqlite3.connect(f"{(out / FILE).resolve().as_uri()}?mode=ro", uri=True)
    try:
        return db.execute("SELECT trial_id FROM results").fetchall()
    except sqlite3.OperationalError:  # not made yet
        return []
    finally:
        db.close()


def sorted_like_results(matrix: Matrix) -> list[Any]:
    """Trials in the order of the axes, with the images of one cell and seed together."""
    return list(matrix.trials())


def test_a_finished_run_does_nothing_and_a_larger_matrix_adds_trials(tmp_path):
    small = plan(attacks=["random", "grey"], images=3)
    first = go(small, tmp_path)
    kept = stored(tmp_path, first.index)
    seen = Counter()
    second = go(small, tmp_path, progress=seen)
    assert (seen.before, seen.waiting, seen.chunks) == (6, 0, [])
    pd.testing.assert_frame_equal(first, second)

    larger = plan(attacks=["mean", "random", "grey"], defenses=["none", "norm-only"], images=5)
    seen = Counter()
    third = go(larger, tmp_path, progress=seen)
    assert (seen.before, seen.waiting, sum(seen.chunks)) == (6, 24, 24)
    assert len(third) == 30
    assert stored(tmp_path, first.index) == kept
    pd.testing.assert_frame_equal(measured(third.loc[first.index]), measured(first))
    with Store.open(tmp_path / FILE) as store:
        assert len(store.sessions()) == 3
        assert all(session.ended for session in store.sessions())


# Components that misbehave


@dataclass(frozen=True)
class RaisesForOne(Thief):
    name: ClassVar[str] = "raises"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        if self.rows(rng, 2):
            raise ZeroDivisionError("a fraction\nof nothing")
        return Reconstruction(images)


@dataclass(frozen=True)
class DivergesForOne(Thief):
    name: ClassVar[str] = "diverges"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        images = images.clone()
        images[self.rows(rng, 2), 0, 0, 0] = float("nan")
        images[self.rows(rng, 3), 0, 1, 1] = float("-inf")
        return Reconstruction(images)


@dataclass(frozen=True)
class SaysFailed(Thief):
    name: ClassVar[str] = "says-failed"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        failed = torch.zeros(len(images), dtype=torch.bool)
        failed[self.rows(rng, 2)] = True
        return Reconstruction(images, failed=failed)


@dataclass(frozen=True)
class WrongShape(Thief):
    name: ClassVar[str] = "wrong-shape"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        return Reconstruction(images[..., :-1])


@dataclass(frozen=True)
class WrongType(Thief):
    name: ClassVar[str] = "wrong-type"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Tensor:
        return images


@dataclass(frozen=True)
class WrongLabels(Thief):
    name: ClassVar[str] = "wrong-objective"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        return Reconstruction(images, objective=torch.zeros(0))


def test_an_attack_that_raises_costs_that_trial_alone(tmp_path):
    matrix = plan(attacks=[RaisesForOne(), "grey"], images=5)
    results = go(matrix, tmp_path)
    bad = results[results["attack"] == "raises"].set_index("image")
    assert bad["status"].to_dict() == {0: "ok", 1: "ok", 2: "error", 3: "ok", 4: "ok"}
    assert bad.loc[2, "reason"] == "ZeroDivisionError: a fraction of nothing"
    assert pd.isna(bad.loc[2, "psnr"])
    assert bad.drop(index=2)["psnr"].notna().all()
    assert set(results[results["attack"] == "grey"]["status"]) == {"ok"}
    summary = Run(tmp_path).summary().set_index("attack")
    assert summary.loc["raises", ["n", "ok", "failed", "unsupported", "error"]].tolist() == [5, 4, 0, 0, 1]
    with Store.open(tmp_path / FILE) as store:
        (lost,) = bad.index[bad["status"] == "error"]
        (trial,) = [t.id for t in matrix.trials() if t.cell.attack == RaisesForOne() and t.image == lost]
        pictures = store.images([trial])[trial]
        assert pictures.reconstruction is None
        assert pictures.truth.startswith(b"\x89PNG")


@pytest.mark.parametrize("attack", [DivergesForOne(), SaysFailed()], ids=lambda attack: attack.name)
def test_an_attack_that_diverges_is_scored_as_the_grey_image(tmp_path, attack):
    results = go(plan(attacks=[attack, "grey"]), tmp_path)
    own = results[results["attack"] == attack.name].set_index("image")
    grey = results[results["attack"] == "grey"].set_index("image")
    failed = [2, 3] if isinstance(attack, DivergesForOne) else [2]
    assert own["status"].to_dict() == {image: "failed" if image in failed else "ok" for image in range(4)}
    assert all("grey" in reason for reason in own.loc[failed, "reason"])
    scores = [metric.name for metric in metrics.of_run() if grey[metric.name].notna().any()]
    assert {"mse", "psnr", "ssim", "psnr_aligned", "ssim_aligned", "paper_psnr"} <= set(scores)
    pd.testing.assert_frame_equal(own.loc[failed, scores], grey.loc[failed, scores])
    assert (own.loc[[0, 1], "mse"] != grey.loc[[0, 1], "mse"]).all()
    with Store.open(tmp_path / FILE) as store:
        ids = results.reset_index().set_index(["attack", "image"])["trial"]
        pictures = store.images(ids)
        for image in failed:
            assert pictures[ids[attack.name, image]].reconstruction == pictures[ids["grey", image]].reconstruction
    summary = Run(tmp_path).summary().set_index("attack")
    assert summary.loc[attack.name, ["n", "ok", "failed"]].tolist() == [4, 4 - len(failed), len(failed)]


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (WrongShape(), ["wrong-shape", "(2, 1, 12, 11)", "(2, 1, 12, 12)"]),
        (WrongType(), ["wrong-type", "Tensor", "return a Reconstruction"]),
        (WrongLabels(), ["wrong-objective", "objective of shape (0,)", "return (1,)"]),
    ],
    ids=["shape", "type", "objective"],
)
def test_an_attack_that_returns_another_type_is_an_error(tmp_path, attack, words):
    results = go(plan(attacks=[attack, "grey"], images=2, seeds=1), tmp_path, chunk=2)
    own = results[results["attack"] == attack.name]
    assert set(own["status"]) == {"error"}
    for reason in own["reason"]:
        for word in words:
            assert word.replace("(2, ", "(1, ") in reason
    assert set(results[results["attack"] == "grey"]["status"]) == {"ok"}


@dataclass(frozen=True)
class DefenseRaisesForOne(Defense):
    """Raises for an image that is not blank, drawn by its content."""

    name: ClassVar[str] = "raises-for-one"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        if torch.equal(step.images, one(1)[None]):
            raise RuntimeError("not this image")
        return step.gradient()


@dataclass(frozen=True)
class DefenseWrongShape(Defense):
    name: ClassVar[str] = "wrong-shape"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        return {name: value[:1] for name, value in step.gradient().items()}


@dataclass(frozen=True)
class DefenseUnknownName(Defense):
    name: ClassVar[str] = "unknown-name"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        return {f"my.{name}": value for name, value in step.gradient().items()}


@dataclass(frozen=True)
class DefenseSendsNothing(Defense):
    name: ClassVar[str] = "sends-nothing"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        return {}


def test_a_defense_that_raises_costs_its_own_trials(tmp_path):
    results = go(plan(attacks=["random"], defenses=[DefenseRaisesForOne(), "none"]), tmp_path)
    own = results[results["defense"] == "raises-for-one"].set_index("image")
    assert own["status"].to_dict() == {0: "ok", 1: "error", 2: "ok", 3: "ok"}
    assert own.loc[1, "reason"] == "the defense failed: 'raises-for-one' raised RuntimeError: not this image"
    assert set(results[results["defense"] == "none"]["status"]) == {"ok"}


@pytest.mark.parametrize(
    ("defense", "words"),
    [
        (DefenseWrongShape(), ["wrong-shape", "features.0.weight", "(1, 1, 5, 5)", "(12, 1, 5, 5)"]),
        (DefenseUnknownName(), ["unknown-name", "my.features.0.weight", "not a parameter"]),
        (DefenseSendsNothing(), ["withheld every parameter"]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_defense_that_breaks_its_contract_is_told_before_the_run(tmp_path, defense, words):
    seen = Counter()
    results = go(plan(defenses=["none", defense]), tmp_path, progress=seen)
    own = results[results["defense"] != "none"]
    assert set(own["status"]) == {"error"}
    assert set(results[results["defense"] == "none"]["status"]) == {"ok"}
    (line,) = [line for line in seen.notes if "the defense failed" in line]
    (reason,) = set(own["reason"])
    assert reason in line
    assert all(word in reason for word in words)
    with pytest.raises(LeakbenchError, match="the defense failed"):
        go(plan(defenses=["none", defense]), tmp_path / "strict", strict=True)


@dataclass(frozen=True)
class Faulty(Metric):
    """A metric; subclasses misbehave."""

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        raise ValueError("cannot\ncompare")


@dataclass(frozen=True)
class NoTensor(Faulty):
    """Returns one number for all."""

    def __call__(self, images: Tensor, truth: Tensor) -> Any:
        return torch.tensor(1.0)


@pytest.fixture
def metric(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Register one faulty metric for one test."""
    cls = request.param
    monkeypatch.setattr(cls, "name", "faulty", raising=False)
    metrics.names()
    monkeypatch.setitem(metrics.registry._classes, "faulty", cls)
    return "faulty"


@pytest.mark.parametrize("metric", [Faulty, NoTensor], indirect=True, ids=lambda cls: cls.__name__)
def test_a_metric_that_fails_is_left_out_and_told(tmp_path, metric):
    seen = Counter()
    results = go(plan(), tmp_path / "run", progress=seen)
    assert set(results["status"]) == {"ok"}
    assert results["psnr"].notna().all()
    assert results["faulty"].isna().all()
    lines = [line for line in seen.notes if "'faulty' left out" in line]
    assert lines
    assert "\n" not in "".join(lines)
    with pytest.raises(LeakbenchError) as told:
        go(plan(), tmp_path / "strict", strict=True)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attacks": [RaisesForOne()]}, "ZeroDivisionError: a fraction of nothing"),
        ({"attacks": [WrongShape()]}, "wrong-shape"),
        ({"attacks": [WrongType()]}, "return a Reconstruction"),
        ({"defenses": [DefenseRaisesForOne()]}, "RuntimeError: not this image"),
    ],
    ids=["attack raises", "attack shape", "attack type", "defense raises"],
)
def test_strict_stops_at_the_first_error_with_one_line(tmp_path, changes, word):
    with pytest.raises(LeakbenchError) as told:
        go(plan(**changes), tmp_path, strict=True)
    assert word in str(told.value)
    assert "lenet on tiny" in str(told.value)
    assert "\n" not in str(told.value)


# Memory


@dataclass(frozen=True)
class Hungry(Thief):
    """Admits so many trials at a time."""

    name: ClassVar[str] = "hungry"
    sizes: ClassVar[list[int]] = []
    kind: str = "cuda"
    most: int = 2

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise {
                "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"),
                "python": MemoryError(),
            }[self.kind]
        return Reconstruction(images)


@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
def test_a_chunk_that_does_not_fit_into_memory_is_halved(tmp_path, kind):
    Hungry.sizes.clear()
    seen = Counter()
    results = go(plan(attacks=[Hungry(kind)], images=8), tmp_path, chunk=8, progress=seen)
    assert set(results["status"]) == {"ok"}
    assert len(results) == 8
    assert Hungry.sizes == [8, 4, 2, 2, 4, 2, 2]
    assert list(dict.fromkeys(line for line in seen.notes if "memory" in line)) == [
        "8 trials at a time do not fit into memory; trying 4",
        "4 trials at a time do not fit into memory; trying 2",
    ]


def test_a_trial_that_never_fits_into_memory_is_an_error(tmp_path):
    results = go(plan(attacks=[Hungry(most=0)], images=3), tmp_path)
    assert list(results["status"]) == ["error"] * 3
    assert set(results["reason"]) == {"out of memory"}


# What cannot be served


@dataclass(frozen=True)
class Picky(Thief):
    """Serves some networks, and says so before the run or in it."""

    name: ClassVar[str] = "picky"
    serves: str = "classifier"
    early: bool = True

    def check(self, observation: Observation) -> None:
        if self.early:
            self._look(observation)

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        self._look(observation)
        return Reconstruction(images)

    def _look(self, observation: Observation) -> None:
        if not any(name.startswith(self.serves) for name in observation.gradient):
            raise Unsupported(f"no {self.serves} here; choose another model")


@pytest.mark.parametrize("strict", [False, True])
def test_an_attack_that_supports_no_cell_is_refused_before_writing(tmp_path, strict):
    with pytest.raises(Unsupported, match=r"picky.*no nowhere here; choose another model"):
        go(plan(attacks=["grey", Picky("nowhere")]), tmp_path / "run", strict=strict)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("early", [True, False])
def test_an_attack_that_serves_some_cells_leaves_rows_for_the_others(tmp_path, early):
    matrix = plan(
        attacks=["grey", Picky(early=early)], models=["lenet", nn.Sequential(nn.Flatten(), nn.Linear(144, 4))]
    )
    results = go(matrix, tmp_path / "run")
    own = results[results["attack"].str.startswith("picky")]
    assert own.groupby("model")["status"].unique().map(list).to_dict() == {
        "lenet": ["ok"],
        "module(label=Sequential)": ["unsupported"],
    }
    assert set(own[own["status"] == "unsupported"]["reason"]) == {"no classifier here; choose another model"}
    assert own[own["status"] == "unsupported"]["psnr"].isna().all()
    assert set(results[results["attack"] == "grey"]["status"]) == {"ok"}
    summary = Run(tmp_path / "run").summary()
    counts = summary[summary["attack"].str.startswith("picky")].set_index("model")
    assert counts["unsupported"].tolist() == [0, 4]
    with pytest.raises(LeakbenchError, match="no classifier here; choose another model"):
        go(matrix, tmp_path / "strict", strict=True)
    assert not (early and (tmp_path / "strict").exists())


def test_a_model_and_a_defense_that_do_not_go_together_are_unsupported(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))
    results = go(plan(models=[network], defenses=["none", "keylock"]), tmp_path)
    assert results.groupby("defense")["status"].unique().map(list).to_dict() == {
        "none": ["ok"],
        "keylock": ["unsupported"],
    }
    assert results[results["defense"] == "keylock"]["reason"].str.contains("convolution").all()


# Pairs


@dataclass(frozen=True)
class Spy(Thief):
    """Notes what it is shown."""

    name: ClassVar[str] = "spy"
    shown: ClassVar[list[tuple[str, dict[str, Tensor], Tensor]]] = []

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        start = rng.normal("image", observation.image_shape)
        for row, key in enumerate(rng.keys):
            weights = {name: value[row].clone() for name, value in observation.weights.items() if value.ndim > 1}
            self.shown.append((key, weights, start[row]))
        return Reconstruction(images)


@dataclass(frozen=True)
class Spy2(Spy):
    name: ClassVar[str] = "spy2"


@pytest.mark.parametrize("fresh", [False, True])
def test_a_row_shares_image_weights_and_start(tmp_path, fresh):
    Spy.shown.clear()
    go(
        plan(
            attacks=[Spy(), Spy2()],
            defenses=["none", "noise(scale=0.01)", "norm-only"],
            models=[f"lenet(fresh={str(fresh).lower()})"],
            images=2,
            seeds=2,
        ),
        tmp_path,
    )
    assert len(Spy.shown) == 2 * 3 * 2 * 2
    rows: dict[str, list[tuple[dict[str, Tensor], Tensor]]] = {}
    for key, weights, start in Spy.shown:
        rows.setdefault(key, []).append((weights, start))
    assert len(rows) == 4
    firsts = []
    for members in rows.values():
        assert len(members) == 6
        own = {name: value for name, value in members[0][0].items() if name.startswith("classifier")}
        assert own
        for weights, start in members:
            assert torch.equal(start, members[0][1])
            for name, value in own.items():
                assert torch.equal(weights[name], value)
        firsts.append((own["classifier.weight"], members[0][1]))
    starts = {tuple(start.flatten().tolist()) for _, start in firsts}
    assert len(starts) == 4
    assert len({tuple(weight.flatten().tolist()) for weight, _ in firsts}) == (4 if fresh else 2)


def test_the_seed_changes_weights_start_and_draws(tmp_path):
    matrix = plan(attacks=["random", "idlg(steps=1)"], defenses=["noise(scale=0.1)"], images=1, seeds=3)
    results = go(matrix, tmp_path)
    assert results[results["attack"] == "random"]["mse"].nunique() == 3
    assert results[results["attack"] != "random"]["objective"].nunique() == 3


@pytest.mark.parametrize("labels", ["inferred", "known"])
def test_an_attack_sees_the_label_only_where_it_is_granted(labels):
    image = one(0)
    threat = leakbench.ThreatModel(labels=labels)
    from leakbench import defenses, models

    first, second = (
        observe(models.parse("lenet"), defenses.parse("none"), threat, [Client(image, label, "w", "c")], 4, image * 0)
        for label in (0, 1)
    )
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert not all(torch.equal(first.gradient[name], second.gradient[name]) for name in first.gradient)
    assert (first.secrets, first.image_shape, first.num_classes) == (second.secrets, second.image_shape, 4)
    if labels == "inferred":
        assert first.labels is None
        assert second.labels is None
    else:
        assert (first.labels.tolist(), second.labels.tolist()) == ([0], [1])


# One's own network; the results


def test_ones_own_network_in_a_matrix(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(100, 4)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    matrix = plan(attacks=["ig(steps=2)", "grey"], models=[network, "lenet"], defenses=["none", "keylock(length=9)"])
    results = go(matrix, tmp_path)
    assert len(results) == 32
    assert set(results["status"]) <= {"ok", "failed"}
    assert set(results["model"]) == {"module(label=Sequential)", "lenet"}
    own = results[(results["model"] != "lenet") & (results["attack"] != "grey") & (results["defense"] == "none")]
    assert set(own["status"]) == {"ok"}
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert {trial.id for trial in matrix.trials()} == set(results.index)
    with torch.no_grad():
        network[0].bias += 1
    assert not {trial.id for trial in plan(models=[network]).trials()} & set(results.index)


def test_the_columns_of_the_results(tmp_path):
    results = leakbench.run(plan(attacks=["grey", "ig(steps=1)"], seeds=[4]), tmp_path).results()
    assert list(results.columns) == [
        *("trial", "dataset", "model", "defense", "attack", "threat", "image", "seed", "status", "seconds"),
        *("mse", "psnr", "ssim", "lpips_vgg", "lpips_alex", "psnr_aligned", "ssim_aligned", "label_correct"),
        *("paper_mse", "paper_psnr", "paper_ssim", "paper_lpips_vgg", "paper_lpips_alex"),
        *("psnr_encoded", "ssim_encoded", "psnr_encoded_floor", "ssim_encoded_floor", "release_cosine"),
        *("reason", "objective", "evaluations", "floor", "path", "group"),
    ]
    row = results[results["attack"] == "ig(steps=1)"].iloc[1]
    assert row["dataset"] == "tiny"
    assert row["model"] == "lenet"
    assert row["defense"] == "none"
    assert row["threat"] == "paper"
    assert (row["image"], row["seed"]) == (1, 4)
    assert row["status"] in ("ok", "failed")
    assert row["seconds"] > 0
    assert row["evaluations"] >= 1
    assert row["path"] in ("lanes", "batched")
    assert 0 <= row["mse"] <= 1
    assert row["psnr"] == pytest.approx(-10 * torch.log10(torch.tensor(row["mse"], dtype=torch.float64)).item())
    assert not row["floor"]
    assert results[results["attack"] == "grey"]["floor"].all()
    assert results[["lpips_vgg", "lpips_alex", "paper_lpips_vgg", "paper_lpips_alex"]].isna().all(axis=None)


def test_a_metric_without_its_weights_is_told_once_with_the_command(tmp_path):
    seen = Counter()
    go(plan(images=2), tmp_path, chunk=1, progress=seen)
    lines = [line for line in seen.notes if "assets fetch" in line]
    assert len(lines) == len(set(lines))
    assert {"lpips-alex", "lpips-vgg"} == {trunk for trunk in ("lpips-alex", "lpips-vgg") if trunk in str(lines)}


def test_named_metrics_change_no_trial_and_stay_when_a_run_is_resumed(tmp_path):
    plain = go(plan(images=2), tmp_path / "plain")
    assert not {"gmsd", "fsim"} & set(plain.columns)
    go(plan(images=1, metrics=["gmsd"]), tmp_path / "named")
    resumed = go(plan(images=2), tmp_path / "named")
    assert resumed["gmsd"].between(0, 1).all()
    assert measured(resumed).drop(columns="gmsd").equals(measured(plain))
    seen = Counter()
    again = go(plan(images=3, metrics=["fsim"]), tmp_path / "named", progress=seen)
    assert again["gmsd"].notna().all()
    assert again["fsim"].notna().sum() == 1
    assert [line for line in seen.notes if "'fsim' is new to this run" in line]


def test_a_named_metric_needs_images_of_its_size():
    with pytest.raises(LeakbenchError, match="metric 'vif' is not defined for 12 x 12 images: 41 x 41 pixels") as told:
        plan(metrics=["gmsd", "vif"])
    assert "\n" not in str(told.value)
    mixed = plan(datasets=[Tiny(), Tiny(size=48)], metrics=["vif"])
    assert mixed.describe()["metrics"] == ["vif"]
    assert "metrics" not in plan().describe()


# Bad input: one line, and nothing written


def refused(matrix: Matrix, tmp_path: Path, *words: str, **options: Any) -> None:
    """Assert that a run is refused with one line that holds these words, and that nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LeakbenchError) as told:
        leakbench.run(matrix, tmp_path / "run", **options)
    message = str(told.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_refused(tmp_path):
    refused(plan(images=[0, 16]), tmp_path, "16", "'tiny'", "from 0 to 15")
    refused(plan(images=17), tmp_path, "16", "'tiny'", "from 0 to 15")
    refused(plan(), tmp_path, "chunk=0", "at least 1", chunk=0)
    refused(plan(), tmp_path, "'gpu'", "cpu", device="gpu")
    refused(plan(), tmp_path, "'mps'", "cpu", device="mps")
    refused(plan(threats=[{"reveals": ["key"]}]), tmp_path, "'key'", "not a secret")
    refused(plan(defenses=["keylock"], threats=[{"reveals": ["kee"]}]), tmp_path, "'kee'", "key", "lock")
    refused(plan(attacks=["ig(steps=2)"], threats=["weights"]), tmp_path, "unknown learning rate", "rate=known")
    refused(plan(datasets=[Tiny(size=6)]), tmp_path, "8x8", "6x6")
    refused(plan(datasets=["mnist"]), tmp_path, "mnist", "leakbench assets fetch mnist")
    refused(plan(models=["lenet(weights=none-such.pt)"]), tmp_path, "none-such.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_absent_is_refused(tmp_path, device):
    refused(plan(), tmp_path, device, "--device cpu", device=device)


@pytest.mark.parametrize("content", [b"not a database, but a text", b"SQLite format 3\0 and no more"])
def test_a_foreign_file_is_left_as_it_is(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(LeakbenchError) as told:
        leakbench.run(plan(), tmp_path)
    assert str(tmp_path / FILE) in str(told.value)
    assert "\n" not in str(told.value)
    assert (tmp_path / FILE).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_foreign_database_is_left_as_it_is(tmp_path):
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("CREATE TABLE mine (x)")
    db.commit()
    db.close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(LeakbenchError, match="leakbench did not write"):
        leakbench.run(plan(), tmp_path)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(plan(), tmp_path, str(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


# Disk


def test_a_run_file_that_reaches_its_quota_keeps_whole_chunks(tmp_path, monkeypatch):
    configure = connection._configure

    def small(db: sqlite3.Connection, readonly: bool) -> None:
        configure(db, readonly)
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 12}")

    matrix = plan(attacks=["random"], datasets=[Tiny(size=24, channels=3)], images=16)
    with monkeypatch.context() as patched:
        patched.setattr(connection, "_configure", small)
        with pytest.raises(LeakbenchError, match="free space on its disk and resume"):
            go(matrix, tmp_path, chunk=2)
    before = done(tmp_path)
    assert len(before) < 16
    assert len(before) % 2 == 0
    assert len(go(matrix, tmp_path, chunk=2)) == 16


# Pieces


def test_uniform_starts_depend_on_trial_and_purpose():
    rng = Rng(("a", "b"))
    start = rng.uniform("image", (2, 2))
    assert torch.equal(start, rng.uniform("image", (2, 2)))
    assert not torch.equal(start[0], start[1])
    assert torch.equal(rng.select([1]).uniform("image", (2, 2))[0], start[1])
    draw = Uniform(2, 3).draw((50,), rng.generators("image")[0])
    assert bool(((draw >= 2) & (draw < 3)).all())
