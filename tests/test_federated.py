"""Federated training on Flower: the average, the tensors that stay with a client, and clients that fail."""

# ruff: noqa: E402 (what is imported below needs Flower)

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

pytest.importorskip("flwr")

from test_training import Stop, numbers, study

pytestmark = pytest.mark.fl

from leakbench import defenses
from leakbench.core.registry import load_plugin
from leakbench.defenses import Defense
from leakbench.flower.simulation import SimulatedGrid
from leakbench.report import accuracy as report
from leakbench.training import NullTrainingProgress, TrainingRecord, federated, train
from leakbench.training.arm import Round, start
from leakbench.training.clients import begin, local_round
from leakbench.training.data import partition
from leakbench.training.federated import CLIENTS_FOLDER
from leakbench.training.files import RECORD, STATE, plain
from leakbench.training.run import ARMS_FOLDER


def fedavg(**options: Any) -> Any:
    return study(**{"mode": "fedavg", "lr": 0.1, "batch": 8, **options})


def test_a_round_is_the_mean_of_what_clients_sent_by_their_images(tmp_path: Path) -> None:
    (arm,) = fedavg(rounds=2, clients=3, defenses=["norm-only"]).arms()
    train([arm], tmp_path)
    session = start(arm)
    trainee, data = session.trainee, session.data
    shared = trainee.shared()
    kept = [begin(trainee, client, session.arm, session.initial) for client in range(3)]
    for number in (1, 2):
        sent = []
        for client, rows in enumerate(partition(data.train.labels, arm.recipe, 0)):
            one, kept[client] = local_round(
                trainee,
                data.train.take(rows),
                arm.recipe,
                kept[client],
                shared,
                client=client,
                number=number,
                seed=0,
                classes=2,
            )
            sent.append(one)
        assert len({one.examples for one in sent}) == 1
        shared = {name: torch.stack([one.shared[name].float() for one in sent]).mean(0) for name in shared}
    from safetensors.torch import load_file

    stored = load_file(tmp_path / ARMS_FOLDER / arm.folder / "100-percent.safetensors")
    for name, value in shared.items():
        torch.testing.assert_close(stored[name].float(), value, rtol=1e-4, atol=1e-6)


def test_federated_training_learns_and_clients_keep_their_own_keys(tmp_path: Path) -> None:
    arms = fedavg(rounds=6, defenses=["none", "keylock(length=16)"], thief=3).arms()
    plain, locked = train(arms, tmp_path / "a")
    assert plain.outcome.chosen().accuracy("test") >= 0.9
    assert [view.name for view in plain.outcome.chosen().views] == ["global"]
    assert [view.name for view in locked.outcome.chosen().views] == ["client 1", "client 2", "client 3"]
    found = {theft.kind: theft.correct for theft in locked.outcome.thefts}
    assert list(found["own key and lock"]) == [view.test.correct for view in locked.outcome.chosen().views]
    assert {kind: len(correct) for kind, correct in found.items()} == {
        "own key and lock": 3,
        "another client's key and lock": 3,
        "another client's key, own lock": 6,
        "fresh key, initial lock": 3,
        "fresh key, fresh lock": 3,
        "zero lock": 3,
    }
    again = train(arms, tmp_path / "b")
    assert [numbers(one) for one in again] == [numbers(plain), numbers(locked)]
    text = report.write(tmp_path / "a")[-1].read_text()
    assert "| keylock(length=16) | 0" in " ".join(text.split()).replace(
        "| keylock(length=16) |  0", "| keylock(length=16) | 0"
    )
    assert "3 clients (IID)" in text


def test_no_message_holds_a_secret_or_momentum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    names: set[str] = set()
    original = SimulatedGrid.send_and_receive

    def watch(self: SimulatedGrid, messages: Any, *, timeout: float | None = None) -> Any:
        messages = list(messages)
        replies = list(original(self, messages, timeout=timeout))
        for message in [*messages, *replies]:
            for record in message.content.array_records.values():
                names.update(record)
                seen.extend(array.data for array in record.values())
        return replies

    monkeypatch.setattr(SimulatedGrid, "send_and_receive", watch)
    private: list[Tensor] = []

    class Watch(NullTrainingProgress):
        def round(self, one: Round) -> None:
            for path in (tmp_path / ARMS_FOLDER).glob(f"*/{CLIENTS_FOLDER}/*.pt"):
                state = torch.load(path, weights_only=True)
                private.extend([*state["private"].values(), *state["momentum"].values()])

    train(fedavg(rounds=2, defenses=["keylock(length=16)"]).arms(), tmp_path, progress=Watch())
    assert len(private) >= 3 * 5
    assert names == set(start(fedavg(defenses=["keylock(length=16)"]).arms()[0]).trainee.shared())
    assert not any("key" in name or "scale" in name or "shift" in name for name in names)
    wire = b"".join(seen)
    for value in private:
        if value.abs().max() > 0:
            assert value.numpy().tobytes() not in wire


def test_a_resumed_federated_training_gives_the_same_numbers(tmp_path: Path) -> None:
    arms = fedavg(rounds=5, clients=4, fraction=0.5, defenses=["keylock(length=16)"]).arms()
    whole = train(arms, tmp_path / "whole")
    for after in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            train(arms, tmp_path / "cut", progress=Stop(after))
        folder = tmp_path / "cut" / ARMS_FOLDER / arms[0].folder
        assert (folder / STATE).exists()
        assert not (folder / RECORD).exists()
    files = {path.name for path in (folder / CLIENTS_FOLDER).glob("*.pt")}
    torch.save({"private": {}, "momentum": {}}, folder / CLIENTS_FOLDER / "0-4.pt")  # of a round that did not end
    assert files
    cut = train(arms, tmp_path / "cut")
    assert numbers(cut[0]) == numbers(whole[0])
    assert not (folder / CLIENTS_FOLDER).exists()


@defenses.register("fails-sometimes")
@dataclass(frozen=True)
class FailsSometimes(Defense):
    """Raises for updates that are drawn to."""

    share: float = 0.5

    def release(self, step: Any, rng: torch.Generator) -> Any:
        if float(torch.rand((), generator=rng)) < self.share:
            raise ValueError("out of\nluck")
        return step.gradient()


def test_a_client_that_fails_is_counted_and_reported(tmp_path: Path) -> None:
    arms = fedavg(rounds=4, defenses=["fails-sometimes(share=0.3)", "fails-sometimes(share=1.0)", "soteria"]).arms()
    some, all_of_them, refused = train(arms, tmp_path)
    failures = [failure for one in some.outcome.rounds for failure in one.failures]
    assert some.outcome.status == "ok"
    assert failures
    assert all("failed to train in round" in failure and "ValueError: out of" in failure for failure in failures)
    assert [one.number for one in some.outcome.rounds] == [1, 2, 3, 4]
    assert all_of_them.outcome.status == "error"
    assert all_of_them.outcome.reason == "RuntimeError: every client failed: ValueError: out of"
    assert (refused.outcome.status, refused.outcome.reason) == (
        "unsupported",
        "soteria is defined for one image, and the batch has 3",
    )
    text = report.write(tmp_path)[-1].read_text()
    line = f"{len(failures)} times, a client failed to train and had no part in the average; the first reason: "
    assert line + failures[0] in text
    numbers_told = {int(failure.split()[1]) for failure in failures}
    assert numbers_told <= {1, 2, 3}  # as in every table


def test_a_round_that_a_client_cannot_test_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = federated.view

    def fails(session: Any, name: str, *key: object) -> Any:
        if key[:1] == (0,) and key[1] in (1, 3):  # the first client, in rounds 1 and 3
            raise ValueError("the battery is empty")
        return original(session, name, *key)

    options: dict[str, Any] = {"rounds": 3, "defenses": ["keylock(length=16)"]}
    (whole,) = train(fedavg(**options).arms(), tmp_path / "whole")
    monkeypatch.setattr(federated, "view", fails)
    (one,) = train(fedavg(**options).arms(), tmp_path / "cut")
    assert [each.failures for each in one.outcome.rounds] == [()] * 3
    told = [each.untested for each in one.outcome.rounds]
    assert told[0] == ("client 1 failed to evaluate in round 1: ValueError: the battery is empty",)
    assert [len(each) for each in told] == [1, 0, 1]
    assert [view.name for view in one.outcome.rounds[0].views] == ["client 2", "client 3"]
    assert one.outcome.best == 2
    # checkpoints hold the first client's secrets, and its accuracy stands beside them
    assert one.outcome.stages[:-1] == whole.outcome.stages[:-1]
    assert TypeAdapter(Round).validate_python(plain(one.outcome.rounds[0])) == one.outcome.rounds[0]
    text = report.write(tmp_path / "cut")[-1].read_text()
    assert "2 times, a client could not test the model" in text
    assert "had no part in the average" not in text


def test_some_clients_take_part_in_a_round_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[int]] = []
    original = SimulatedGrid.send_and_receive

    def watch(self: SimulatedGrid, messages: Any, *, timeout: float | None = None) -> Any:
        messages = list(messages)
        if messages and messages[0].metadata.message_type.startswith("train"):
            taken.append([message.metadata.dst_node_id for message in messages])
        return original(self, messages, timeout=timeout)

    monkeypatch.setattr(SimulatedGrid, "send_and_receive", watch)
    (arm,) = fedavg(rounds=6, clients=5, fraction=0.4).arms()
    train([arm], tmp_path / "a")
    first, taken[:] = list(taken), []
    train([arm], tmp_path / "b")
    assert first == taken
    assert {len(clients) for clients in first} == {2}
    assert len({tuple(sorted(clients)) for clients in first}) > 1
    assert replace(arm, seed=1).id != arm.id


def test_a_record_of_before_is_read_again(tmp_path: Path) -> None:
    found: list[TrainingRecord] = train(fedavg(rounds=1).arms(), tmp_path)
    assert [numbers(one) for one in train(fedavg(rounds=1).arms(), tmp_path)] == [numbers(found[0])]


PLUGIN = """
from dataclasses import dataclass
from leakbench import Defense, defenses

@defenses.register("halved-in-a-file")
@dataclass(frozen=True)
class Halved(Defense):
    def release(self, step, rng):
        return {name: value.half().float() for name, value in step.gradient().items()}
"""


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_processes_of_ray_load_plugins_and_compute_as_this_one(tmp_path: Path) -> None:
    file = tmp_path / "halved.py"
    file.write_text(PLUGIN)
    load_plugin(file)
    arms = fedavg(rounds=1, datasets=["samples(size=16, channels=1)"], defenses=["halved-in-a-file"]).arms()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (here,), (there,) = train(arms, tmp_path / "a"), train(arms, tmp_path / "b", workers=2)
    finally:
        torch.set_num_threads(threads)
    assert (there.outcome.status, there.outcome.reason) == ("ok", "")
    assert numbers(there) == numbers(here)
    gc.collect()  # Ray leaves /dev/null open
