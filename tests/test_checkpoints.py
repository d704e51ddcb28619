"""Trained weights: what a file states of its training, where that is kept, and what every report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_engine import plan
from test_models import make
from torch import nn

import leakbench
from leakbench import models, report
from leakbench.errors import BadOption, CorruptAsset, LeakbenchError, MissingAsset
from leakbench.models.weights import TRAINING, Checkpoint, Training, save, stated
from leakbench.store.run_file import FILE, Store

SHAPE = (1, 33, 33)
TRAINED = Training("epoch 12 of 200", 0.8125, "cifar10")
NARROW = {name: {"width": 2} for name in ("convnet", "resnet18", "resnet32", "resnet34")} | {
    "vgg16": {"width": 2, "hidden": 4},
    "vit": {"patch": 11},
}
LOADING = [name for name in models.names() if "weights" in models.registry.fields(models.get(name))]
WORDS = "stage epoch 12 of 200, test accuracy 81.25 % on cifar10"
SILENCE = "the file states neither stage nor accuracy"


@pytest.fixture(autouse=True)
def no_assets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path_factory.mktemp("cache")))


def write(network: nn.Module, path: Path, **changes: Any) -> str:
    words: dict[str, Any] = {"stage": TRAINED.stage, "test_accuracy": TRAINED.test_accuracy, "dataset": TRAINED.dataset}
    save(network, path, **{**words, **changes})
    return str(path)


def one_line(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


# The file


@pytest.mark.parametrize("name", LOADING)
def test_every_model_loads_what_was_saved_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    def build(options: dict[str, object], seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return models.registry.build(name, {**NARROW.get(name, {}), **options}).build(SHAPE, 5)

    trained, drawn = build({}, 1), build({}, 2)
    path = write(trained, tmp_path / "new" / "net.safetensors")
    loaded = build({"weights": path}, 2).state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())
    assert not all(torch.equal(value, loaded[key]) for key, value in drawn.state_dict().items())
    assert models.registry.build(name, {"weights": path}).checkpoint() == Checkpoint(path, TRAINED)
    assert models.parse(name).checkpoint() is None


def test_there_are_models_that_load() -> None:
    assert {"lenet", "lenet-bn", "resnet20", "vgg16", *NARROW} <= set(LOADING)


def test_the_same_weights_and_words_are_the_same_bytes(tmp_path: Path) -> None:
    files = [Path(write(make("lenet-bn", SHAPE, seed=1), tmp_path / f"{at}.safetensors")) for at in range(4)]
    assert len({file.read_bytes() for file in files}) == 1
    other = Path(write(make("lenet-bn", SHAPE, seed=1), tmp_path / "other.safetensors", stage="untrained"))
    assert other.read_bytes() != files[0].read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted([*files, other]), "no draft is left"


def test_tied_and_transposed_tensors_are_saved(tmp_path: Path) -> None:
    first = nn.Linear(3, 3)
    network = nn.Sequential(first, first, nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last))
    path = write(network, tmp_path / "net.safetensors")
    assert stated(path) == Checkpoint(path, TRAINED)


def test_a_file_that_states_nothing(tmp_path: Path) -> None:
    state = make("lenet", SHAPE).state_dict()
    save_file(state, tmp_path / "bare.safetensors")
    save_file(state, tmp_path / "other.safetensors", {"format": "pt", "stage": "of somebody else's"})
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "net.pt")
    for name in ("bare.safetensors", "other.safetensors", "net.pt"):
        path = str(tmp_path / name)
        assert stated(path) == Checkpoint(path, None)


@pytest.mark.parametrize(
    "words",
    [
        {"test_accuracy": 81.25},
        {"test_accuracy": -0.01},
        {"test_accuracy": float("nan")},
        {"test_accuracy": "0.8"},
        {"stage": " "},
        {"stage": 12},
        {"dataset": ""},
    ],
)
def test_words_that_do_not_fit_are_refused_in_writing_and_in_reading(words: dict[str, object], tmp_path: Path) -> None:
    (name,) = words
    network, path = make("lenet", SHAPE), tmp_path / "net.safetensors"
    with pytest.raises(BadOption, match=name) as error:
        write(network, path, **words)
    one_line(error, repr(words[name]))
    assert not path.exists()
    text = json.dumps({"stage": "late", "test_accuracy": 0.5, "dataset": "mnist", **words})
    save_file(network.state_dict(), path, {TRAINING: text})
    with pytest.raises(CorruptAsset, match=name) as error:
        stated(str(path))
    one_line(error, str(path), "leakbench.models.weights.save")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"stage": "x"}', '{"epoch": 3}', "[" * 100_000])
def test_what_is_no_statement_is_told(text: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(make("lenet", SHAPE).state_dict(), path, {TRAINING: text})
    with pytest.raises(CorruptAsset) as error:
        stated(str(path))
    one_line(error, str(path), "leakbench.models.weights.save")


def test_a_file_that_cannot_be_read_or_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingAsset, match="does not exist"):
        stated(str(tmp_path / "none.safetensors"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(CorruptAsset) as error:
        stated(str(tmp_path / "junk.safetensors"))
    one_line(error, "junk.safetensors")
    with pytest.raises(BadOption, match=r"\.safetensors"):
        write(make("lenet", SHAPE), tmp_path / "net.pt")
    with pytest.raises(LeakbenchError) as error:
        write(make("lenet", SHAPE), tmp_path / "junk.safetensors" / "net.safetensors")
    one_line(error, "cannot be written")


# The run and its reports


def spec(path: str) -> str:
    return models.spec(models.registry.build("lenet", {"weights": path}))


@pytest.mark.long
def test_reports_say_what_was_attacked_without_the_files(tmp_path: Path) -> None:
    network = make("lenet", (1, 12, 12), 4)
    told = write(network, tmp_path / "told.safetensors")
    silent = str(tmp_path / "silent.safetensors")
    save_file({name: value + 0.01 for name, value in network.state_dict().items()}, silent)
    arms = {"defenses": ["none", "keylock(length=5)"], "threats": ["T3", "T4"]}  # a study of sharing
    matrix = plan(models=["lenet", spec(told), spec(silent)], attacks=["idlg(steps=1)"], images=1, **arms)
    out = tmp_path / "run"
    leakbench.run(matrix, out, device="cpu")
    Path(told).unlink()
    Path(silent).unlink()
    report.write(out, {"md"})
    report.write_comparison(out)
    for name in ("report.md", "sharing.md", "paper.md"):
        lines = (out / name).read_text().splitlines()
        assert f"{told}, {WORDS}." in "\n".join(lines), name
        assert f"{silent}; {SILENCE}." in "\n".join(lines), name
        assert sum("rained weights:" in line for line in lines) == 2, name
    sections = (out / "report.md").read_text().split("\n## ")
    (own,) = [section for section in sections if section.startswith("tiny, lenet(weights") and "told" in section[:200]]
    assert WORDS in own
    assert SILENCE not in own
    assert "without a defense" in sections[-1]


def test_a_report_without_trained_weights_does_not_speak_of_them(tmp_path: Path) -> None:
    leakbench.run(plan(images=1), tmp_path, device="cpu").report(["md"])
    assert "rained weights" not in (tmp_path / "report.md").read_text()


def test_a_file_that_changed_between_two_starts_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    for seed, accuracy in ((1, 0.25), (2, 0.75)):
        write(make("lenet", (1, 12, 12), 4, seed), path, test_accuracy=accuracy)
        leakbench.run(plan(models=[spec(str(path))], images=1), tmp_path / "run", device="cpu")
    with Store.open(tmp_path / "run" / FILE, readonly=True) as store:
        found = {one.spec: one.checkpoint for one in store.components() if one.kind == "model"}
        assert list(found) == list(dict.fromkeys(store.results()["model"]))
    accuracies = [one.training.test_accuracy for one in found.values() if one is not None and one.training is not None]
    assert accuracies == [0.25, 0.75]
    report.write(tmp_path / "run", {"md"})
    text = (tmp_path / "run" / "report.md").read_text()
    assert text.index("accuracy 25.00 %") < text.index("accuracy 75.00 %")


def test_a_run_of_a_file_that_states_nonsense_is_refused_before_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    text = json.dumps({"stage": "late", "test_accuracy": 81.25, "dataset": "mnist"})
    save_file(make("lenet", (1, 12, 12), 4).state_dict(), path, {TRAINING: text})
    with pytest.raises(CorruptAsset, match=r"test_accuracy=81\.25"):
        leakbench.run(plan(models=[spec(str(path))]), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
