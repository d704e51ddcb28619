"""What breaks its contract costs itself alone, or is refused in one line before anything is written."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch
from conftest import hang
from test_cli import SMALL, cli, place, refused, written  # noqa: F401
from test_engine import (  # noqa: F401
    Counter,
    Faulty,
    Thief,
    Tiny,
    close,
    go,
    metric,
    no_assets,
    one,
    plan,
)

import leakbench
from leakbench import Attack, Defense, Gradient, LeakbenchError, Reconstruction, Step, Unsupported
from leakbench.analysis.integrity import check
from leakbench.store.run_file import FILE


@dataclass(frozen=True)
class DefenseRaises(Defense):
    name: ClassVar[str] = "raises"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        raise RuntimeError("no release today")


def test_a_run_killed_before_its_file_had_content_is_started_again(tmp_path):
    (tmp_path / FILE).touch()
    assert len(go(plan(), tmp_path)) == 4


def test_a_defense_that_always_raises_costs_its_own_trials(tmp_path):
    results = go(plan(attacks=["random"], defenses=["none", DefenseRaises()]), tmp_path)
    assert results.groupby("defense")["status"].unique().map(list).to_dict() == {"raises": ["error"], "none": ["ok"]}
    (reason,) = set(results[results["defense"] == "raises"]["reason"])
    assert reason == "the defense failed: 'raises' raised RuntimeError: no release today"


@dataclass(frozen=True)
class DefenseExits(Defense):
    """Ends the process, where it is not ``blank`` for all images but the blank one that is tried before a run."""

    name: ClassVar[str] = "exits"
    blank: bool = True

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        if self.blank or not bool((step.images == 0.5).all()):
            sys.exit(0)
        return step.gradient()


@pytest.mark.parametrize("blank", [True, False], ids=["at once", "in a trial"])
def test_a_defense_that_exits_costs_its_own_trials(tmp_path, blank):
    results = go(plan(attacks=["random", "ig(steps=2)"], defenses=["none", DefenseExits(blank)]), tmp_path)
    own = results[results["defense"] != "none"]
    assert (len(own), set(own["status"])) == (8, {"error"})
    assert set(own["reason"]) == {"the defense failed: 'exits' raised SystemExit: 0"}
    assert set(results[results["defense"] == "none"]["status"]) == {"ok"}


@dataclass(frozen=True)
class DefenseBreaks(Defense):
    """Sends something else than its network's gradient for one image."""

    name: ClassVar[str] = "breaks"
    how: str = "shape"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        gradient = step.gradient()
        if not torch.equal(step.images, one(1)[None]):
            return gradient
        return {} if self.how == "nothing" else {name: value[:1] for name, value in gradient.items()}


@pytest.mark.parametrize("how", ["shape", "nothing"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_defense_that_releases_wrong_shapes_costs_one_image(tmp_path, how, chunk):
    matrix = plan(attacks=["ig(steps=2)"], defenses=[DefenseBreaks(how), "none"], images=3)
    results = go(matrix, tmp_path, chunk=chunk)
    own = results[results["defense"] != "none"].set_index("image")
    assert own["status"].to_dict() == {0: "ok", 1: "error", 2: "ok"}
    assert set(results[results["defense"] == "none"]["status"]) == {"ok"}


def test_strict_tells_of_a_defense_that_always_raises_in_one_line(tmp_path):
    with pytest.raises(LeakbenchError, match="RuntimeError: no release today"):
        go(plan(defenses=[DefenseRaises()]), tmp_path, strict=True)


class TooFew(Faulty):
    """Returns no value for the last row."""

    def __call__(self, images, truth):
        return torch.ones(len(images) - 1)


class TooMany(Faulty):
    """Returns two values a row."""

    def __call__(self, images, truth):
        return torch.ones(2 * len(images))


class OneRow(Faulty):
    """Fails for one image."""

    def __call__(self, images, truth):
        if any(torch.equal(row, one(2)) for row in truth):
            raise ValueError("not this image")
        return torch.ones(len(images))


@pytest.mark.parametrize("metric", [TooFew, TooMany], indirect=True, ids=lambda cls: cls.__name__)
def test_a_metric_that_returns_another_number_of_values_is_left_out(tmp_path, metric):  # noqa: F811
    seen = Counter()
    results = go(plan(), tmp_path / "run", progress=seen)
    assert set(results["status"]) == {"ok"}
    assert results["faulty"].isna().all()
    assert [line for line in seen.notes if "'faulty' left out" in line]


@pytest.mark.parametrize("metric", [OneRow], indirect=True)
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_metric_that_fails_for_one_image_is_left_out_for_that_image(tmp_path, metric, chunk):  # noqa: F811
    results = go(plan(), tmp_path, chunk=chunk).set_index("image")
    assert results["faulty"].isna().to_dict() == {0: False, 1: False, 2: True, 3: False}


class Seed(Faulty):
    """Has a name that is taken."""


def test_a_metric_named_like_a_column_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(Seed, "name", "seed")
    monkeypatch.setitem(leakbench.metrics.registry._classes, "seed", Seed)
    with pytest.raises(LeakbenchError, match="'seed'"):
        go(plan(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_seed_of_more_than_64_bits_is_refused_before_writing(tmp_path):
    with pytest.raises(LeakbenchError, match="seed"):
        leakbench.run(plan(seeds=[2**64]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_noise_that_is_drawn_anew_does_not_depend_on_the_chunk(tmp_path):
    matrix = plan(attacks=["dlg(steps=1, lr=0.01)"], defenses=["precode(k=6)"], images=3)
    alone, together = go(matrix, tmp_path / "1", chunk=1), go(matrix, tmp_path / "3", chunk=3)
    close(alone, together, rel=1e-2)


class Plain(Attack):
    """Is no dataclass: it was never registered."""

    name: ClassVar[str] = "plain"

    def run(self, observation, rng):
        return Reconstruction(rng.uniform("image", observation.image_shape))


def test_an_unregistered_component_works_or_is_refused(tmp_path):
    assert set(go(plan(attacks=[Plain()]), tmp_path)["status"]) == {"ok"}


@dataclass(frozen=True)
class PathData(Tiny):
    """Has an option that is no JSON value."""

    name: ClassVar[str] = "path-data"
    folder: Path = Path("here")


def test_an_option_that_is_a_path_identifies_a_trial(tmp_path):
    assert len(go(plan(datasets=[PathData()]), tmp_path)) == 4


@dataclass(frozen=True)
class ListData(Tiny):
    """Has an option that cannot be hashed."""

    name: ClassVar[str] = "list-data"
    sizes: list[int] | None = None


def test_an_option_that_is_a_list_works_or_is_refused_in_one_line(tmp_path):
    try:
        results = go(plan(datasets=[ListData(sizes=[1, 2])]), tmp_path)
    except LeakbenchError:
        return
    assert len(results) == 4


@dataclass(frozen=True)
class DataRaises(Tiny):
    """Cannot be read."""

    name: ClassVar[str] = "raises"

    def load(self, indices):
        raise KeyError("gone")


@dataclass(frozen=True)
class DataBytes(Tiny):
    """Ranges to 255."""

    name: ClassVar[str] = "bytes"

    def load(self, indices):
        images, labels = super().load(indices)
        return images * 255, labels


@dataclass(frozen=True)
class DataShape(Tiny):
    """Has images of another shape than it says."""

    name: ClassVar[str] = "shape"

    def load(self, indices):
        images, labels = super().load(indices)
        return images[..., :-1], labels


@dataclass(frozen=True)
class DataLabels(Tiny):
    """Has labels of a fifth class."""

    name: ClassVar[str] = "labels"

    def load(self, indices):
        images, labels = super().load(indices)
        return images, labels + 1


@pytest.mark.parametrize("data", [DataRaises, DataBytes, DataShape, DataLabels])
def test_a_dataset_that_breaks_its_contract_is_refused_before_writing(tmp_path, data):
    with pytest.raises(LeakbenchError, match=data.name) as told:
        go(plan(datasets=[data()]), tmp_path / "run")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class PickyOne(Thief):
    """Cannot serve one image."""

    name: ClassVar[str] = "picky-one"

    def give(self, images, observation, rng):
        if self.rows(rng, 2):
            raise Unsupported("not this one; choose another")
        return Reconstruction(images)


@pytest.mark.parametrize("chunk", [1, 4])
def test_what_cannot_be_served_does_not_depend_on_the_chunk(tmp_path, chunk):
    results = go(plan(attacks=[PickyOne()]), tmp_path, chunk=chunk).set_index("image")
    assert results["status"].to_dict() == {0: "ok", 1: "ok", 2: "unsupported", 3: "ok"}


def test_floors_are_scored_where_the_first_defense_cannot_be(tmp_path):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 4))
    matrix = plan(attacks=["ig(steps=2)"], models=[network], defenses=["keylock", "none"], floors=True)
    results = go(matrix, tmp_path)
    assert "ok" in set(results[results["floor"]]["status"])


def test_two_files_of_one_name_that_register_one_name_are_refused(cli, place):  # noqa: F811
    text = (
        "from leakbench import Defense, defenses\n\n\n@defenses.register('mine')\nclass Mine(Defense):\n    '''{}'''\n"
    )
    for folder in ("a", "b"):
        (place / folder).mkdir()
        (place / folder / "mine.py").write_text(text.format(folder))
    refused(cli("list", "defenses", "--plugin", "a/mine.py", "--plugin", "b/mine.py"), "registered twice")


def test_a_file_that_exits_is_refused(cli, place):  # noqa: F811
    (place / "exits.py").write_text("raise SystemExit('not today')\n")
    refused(cli("list", "defenses", "--plugin", "exits.py"), "exits.py", "not today")


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started with SIGINT ignored (behind a shell's &)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_a_library_makes_of_ctrl_c_while_it_is_loaded_is_a_stop(cli, place, interruptible):  # noqa: F811
    (place / "slow.py").write_text(
        "import os, signal\n\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n"
        "    raise RecursionError('as numpy does') from None\n"
    )
    done = cli("list", "defenses", "--plugin", "slow.py")
    assert (done.code, done.err.splitlines()) == (130, [done.err.strip()])
    assert done.err.startswith("stopped")


def test_a_name_that_leads_elsewhere_is_refused(cli, place):  # noqa: F811
    refused(cli("run", "matrix", *SMALL, "--images", 1, "--name", "../../outside"), "outside")
    assert written(place) == []


def test_true_is_no_number_of_images(cli, place):  # noqa: F811
    (place / "m.toml").write_text(
        'attacks = ["mean"]\ndefenses = ["none"]\nmodels = ["lenet"]\ndatasets = ["samples"]\nimages = true\n'
    )
    refused(cli("run", "matrix", "m.toml"), "images")


@pytest.mark.parametrize("metric", [Faulty], indirect=True)
def test_a_metric_that_always_fails_is_told_once(tmp_path, metric):  # noqa: F811
    seen = Counter()
    go(plan(), tmp_path, chunk=1, progress=seen)
    assert len([line for line in seen.notes if "'faulty'" in line]) == 1


def test_a_plugin_option_without_a_docstring_is_listed(cli, place):  # noqa: F811
    (place / "bare.py").write_text(
        "from leakbench import Defense, defenses\n\n@defenses.register('bare')\nclass Bare(Defense):\n    pass\n"
    )
    done = cli("list", "defenses", "--plugin", "bare.py")
    assert done.code == 0
    block = done.out.split("\nbare\n")[1]
    assert "What a client does to hide its data" not in block
    assert "Bare()" not in block


def test_two_networks_of_one_class_are_two_models(tmp_path):
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 4)) for _ in range(2)]
    both = go(plan(attacks=["ig(steps=2)"], models=networks, images=2), tmp_path / "both")
    apart = [go(plan(attacks=["ig(steps=2)"], models=[n], images=2), tmp_path / str(i)) for i, n in enumerate(networks)]
    assert len(both) == 4
    for alone in apart:
        assert both.loc[alone.index, "psnr"].tolist() == alone["psnr"].tolist()
        assert both.loc[alone.index, "objective"].tolist() == alone["objective"].tolist()
    assert len(set(both["model"])) == 2


@dataclass(frozen=True)
class DefenseNan(Defense):
    """Sends no numbers for one image."""

    name: ClassVar[str] = "nan"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        scale = float("nan") if torch.equal(step.images, one(1)[None]) else 1.0
        return {name: scale * value for name, value in step.gradient().items()}


def test_a_defense_that_returns_nan_fails_for_that_image_alone(tmp_path):
    results = go(plan(attacks=["ig(steps=2)"], defenses=[DefenseNan(), "none"], images=3), tmp_path)
    status = results.set_index(["defense", "image"])["status"].to_dict()
    assert status.pop(("nan", 1)) == "error"
    assert set(status.values()) == {"ok"}
    assert check(tmp_path).code in (0, 1)


@dataclass(frozen=True)
class DefenseHangs(Defense):
    """Does not come back, from the blank image that is tried before a run on."""

    name: ClassVar[str] = "hangs"
    folder: str = ""

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        hang(self.folder)
        raise AssertionError


@pytest.mark.long
def test_a_defense_that_hangs_is_stopped_and_costs_its_own_trials(tmp_path, hanging):
    matrix = plan(attacks=["random"], defenses=[DefenseHangs(str(hanging)), "none"], images=1)
    results = go(matrix, tmp_path / "run", time_limit=1)
    results = results.set_index(results["defense"].str.partition("(")[0])
    assert results["status"].to_dict() == {"hangs": "error", "none": "ok"}
    assert "timed out after 1 s" in results["reason"]["hangs"]


@dataclass(frozen=True)
class Greedy(Thief):
    """Takes 300 MiB a trial of a process that may take 1 GiB more than it has."""

    name: ClassVar[str] = "greedy"

    def give(self, images, observation, rng):
        resource = pytest.importorskip("resource")
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2**30, hard))
        try:
            torch.empty(len(images), 300 * 2**20, dtype=torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return Reconstruction(images)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only here the address space of a process is limited")
def test_a_worker_that_runs_out_of_memory_tries_fewer_trials_at_a_time(tmp_path):
    seen = Counter()
    results = go(plan(attacks=[Greedy()], images=8), tmp_path, chunk=8, time_limit=600, progress=seen)
    assert set(results["status"]) == {"ok"}
    assert "8 trials at a time do not fit into memory; trying 4" in seen.notes


@dataclass(frozen=True)
class GreedyOnGpu(Thief):
    """Takes a fifth of the GPU's memory a trial."""

    name: ClassVar[str] = "greedy-on-gpu"

    def give(self, images, observation, rng):
        _, whole = torch.cuda.mem_get_info()
        torch.empty(len(images), whole // 5, dtype=torch.uint8, device=images.device)
        return Reconstruction(images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_a_gpu_that_runs_out_of_memory_is_given_fewer_trials_at_a_time(tmp_path):
    seen = Counter()
    leakbench.run(plan(attacks=[GreedyOnGpu()], images=8), tmp_path, device="cuda", chunk=8, progress=seen)
    assert set(leakbench.Run(tmp_path).results()["status"]) == {"ok"}
    assert "8 trials at a time do not fit into memory; trying 4" in seen.notes


def test_a_folder_is_run_by_one_process_at_a_time(tmp_path):
    matrix = plan(attacks=["random"], images=2)

    class Second(Counter):
        def start(self, waiting, done):
            with pytest.raises(LeakbenchError, match="being run by another process"):
                go(matrix, tmp_path)
            super().start(waiting, done)

    assert len(go(matrix, tmp_path, progress=Second())) == 2
    assert len(go(plan(attacks=["random"], images=3), tmp_path)) == 3
