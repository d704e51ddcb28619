"""The salt of a run: an attack's keys name no image and repeat no draw, and with the same salt a run is the same."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from conftest import SALT
from test_cli import cli, place, refused  # noqa: F401
from test_engine import Thief, Tiny, go, measured, no_assets, plan  # noqa: F401
from test_golden import MATRIX
from test_merge import rows
from test_training import arm, study
from torch import Tensor

import leakbench
from leakbench import Observation, Reconstruction, Rng, defenses, models
from leakbench.core.rng import check_salt, generator, new_salt, salted
from leakbench.engine.run import RunOptions
from leakbench.engine.worker import companions
from leakbench.errors import BadOption, LeakbenchError
from leakbench.leaderboard.entry import Entry, entries
from leakbench.leaderboard.verify import check as verify
from leakbench.report.run import UNSALTED
from leakbench.report.show import show
from leakbench.store.merge import merge
from leakbench.store.run_file import FILE, Store
from leakbench.training import train
from leakbench.training.arm import start
from leakbench.training.run import salt_of
from leakbench.victim import build

OTHER = "0123456789abcdef" * 2
GOLDEN = Path(__file__).parent / "golden"


# The derivation


def test_a_key_is_a_digest_that_depends_on_side_and_salt() -> None:
    keys = [salted("attack/0/tiny/5", side, salt) for side in ("attack", "client") for salt in (SALT, OTHER)]
    assert len({*keys, salted("attack/0/tiny/6", "attack", SALT)}) == 5
    assert all(len(key) == 32 and set(key) <= set("0123456789abcdef") for key in keys)
    assert salted("attack/0/tiny/5", "attack", SALT) == keys[0]
    assert salted("attack/0/tiny/5", "attack", "") == "attack/0/tiny/5"


def test_a_random_salt_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import secrets

    monkeypatch.setattr("leakbench.core.rng.secrets", secrets)
    salts = {new_salt() for _ in range(20)}
    assert len(salts) == 20
    for salt in salts:
        check_salt(salt)


@pytest.mark.parametrize("salt", ["5eed", SALT.upper(), SALT + "0", SALT[:-1] + "g", SALT + "\n", "none", " " * 32])
def test_what_is_no_salt_is_refused(salt: str) -> None:
    with pytest.raises(BadOption, match=r"must be 32 hex digits .* leave it out"):
        RunOptions(salt=salt)


# Cheats. Each is run on keys that are not salted too, where it succeeds: it is the salt that stops it.


@dataclass(frozen=True)
class ReadsKeys(Thief):
    """Looks the image up that its key names, or whose key it can compute."""

    name: ClassVar[str] = "reads-keys"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        grey = torch.full(observation.image_shape, 0.5)
        found = [self.known(key) for key in rng.keys]
        return Reconstruction(torch.stack([grey if index is None else one(index) for index in found]))

    def known(self, key: str) -> int | None:
        last = key.rpartition("/")[2]
        if "/" in key and last.isdecimal():
            return int(last)
        for index in range(16):
            plain = f"attack/0/tiny/{index}"
            guesses = {salted(plain, side, salt) for side in ("attack", "client") for salt in ("", "0" * 32, key)}
            if key in guesses:
                return index
        return None


@dataclass(frozen=True)
class ReplaysNoise(Thief):
    """Draws the client's noise again, and reports how much of what was sent is left without it."""

    name: ClassVar[str] = "replays-noise"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        left = [min(self.residual(observation, row, key) for key in self.guesses(k)) for row, k in enumerate(rng.keys)]
        return Reconstruction(images, findings={"left": torch.tensor(left)})

    @staticmethod
    def guesses(key: str) -> Iterator[str]:
        yield from (key, key.replace("attack", "client", 1))
        for index in range(16):
            yield f"client/0/tiny/{index}"
            yield from (
                salted(f"client/0/tiny/{index}", side, known) for side in ("attack", "client") for known in [key]
            )

    @staticmethod
    def residual(observation: Observation, row: int, key: str) -> float:
        drawn = generator(key, "release")
        left = sent = 0.0
        for value in observation.gradient.values():
            sent += float(value[row].square().sum())
            left += float((value[row] - torch.randn(value.shape[1:], generator=drawn)).square().sum())
        return left / sent


@dataclass(frozen=True)
class ReplaysWeights(Thief):
    """Draws the weights of every image's client, and looks up the image whose weights they are."""

    name: ClassVar[str] = "replays-weights"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        grey = torch.full(observation.image_shape, 0.5)
        found = [self.known(observation, row) for row in range(observation.trials)]
        return Reconstruction(torch.stack([grey if index is None else one(index) for index in found]))

    @staticmethod
    def known(observation: Observation, row: int) -> int | None:
        model = models.parse("lenet(fresh=true)")
        for index in range(16):
            key = f"weights/0/tiny/{index}"
            drawn = build(model, defenses.parse("none"), observation.image_shape, observation.num_classes, key)
            if all(torch.equal(value, observation.weights[name][row]) for name, value in drawn.named_parameters()):
                return index
        return None


@dataclass(frozen=True)
class CountsRows(Thief):
    """Takes the position in the batch for the index of the image."""

    name: ClassVar[str] = "counts-rows"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        return Reconstruction(torch.stack([one(row) for row in range(len(images))]))


def one(index: int) -> Tensor:
    return Tiny().load([index])[0][0]


@pytest.mark.long
@pytest.mark.parametrize(
    ("cheat", "model"),
    [(ReadsKeys(), "lenet"), (ReplaysWeights(), "lenet(fresh=true)"), (CountsRows(), "lenet")],
    ids=["keys", "weights", "rows"],
)
def test_a_cheat_that_looks_the_image_up_finds_none(tmp_path: Path, cheat: Thief, model: str) -> None:
    matrix = plan(attacks=[cheat], defenses=["none", "noise(scale=1.0)"], models=[model], images=16)
    found = {salt: go(matrix, tmp_path / (salt or "plain"), salt=salt, chunk=16) for salt in ("", SALT, OTHER)}
    exact = {salt: int((results["mse"] < 1e-9).sum()) for salt, results in found.items()}
    assert exact[""] == 32
    limit = 6 if cheat.name == "counts-rows" else 0  # by chance, one image in sixteen is at its place
    assert max(exact[SALT], exact[OTHER]) <= limit


def test_a_cheat_that_replays_the_clients_generator_gets_no_draw(tmp_path: Path) -> None:
    matrix = plan(attacks=[ReplaysNoise()], defenses=["noise(scale=1.0)"])
    left = {}
    for salt in ("", SALT):
        go(matrix, tmp_path / (salt or "plain"), salt=salt)
        with Store.open(tmp_path / (salt or "plain") / FILE) as store:
            left[salt] = store.findings()["value"]
    assert len(left[""]) == len(left[SALT]) == 4
    assert left[""].max() < 0.2
    assert left[SALT].min() > 1.5  # two independent draws: twice the noise


def test_companions_depend_on_the_salt() -> None:
    trials = plan(defenses=["mixup"], datasets=[Tiny()], images=16).trials()
    chosen = [[companions(trial, salt) for trial in trials] for salt in ("", SALT, OTHER)]
    assert chosen[0] != chosen[1] != chosen[2] != chosen[0]
    assert all(trial.image not in own for each in chosen for trial, own in zip(trials, each))


def test_clients_of_observe_draw_by_a_salt_that_attacks_do_not_have() -> None:
    images, labels = Tiny().load(range(2))
    network = build(models.parse("lenet"), defenses.parse("none"), (1, 12, 12), 4, "weights")

    def noise(**options: Any) -> list[float]:
        seen = leakbench.observe(network, images, labels, defense="noise(scale=1.0)", **options)
        return [ReplaysNoise.residual(seen, row, f"client/0/{row}") for row in range(2)]

    assert max(noise(salt="")) < 0.2
    assert min(noise()) > 1.5
    assert noise(salt=OTHER) == noise(salt=OTHER) != noise(salt=SALT)
    with pytest.raises(BadOption, match="32 hex digits"):
        noise(salt="x")


@pytest.mark.parametrize("stage", ["initial", "trained"])
def test_the_secrets_of_a_checkpoint_cannot_be_drawn_again(tmp_path: Path, stage: str) -> None:
    """The attacks of a trade-off meet the key of a training, and its first lock."""
    own = replace(arm("keylock(length=9)"), salt="")
    held = {}
    for salt in ("", SALT):
        session = start(replace(own, salt=salt))
        private = session.trainee.private()
        drawn = {
            **session.trainee.draw(session.trainee.keys, "training", own.seed, "key", 0),
            **session.trainee.draw(session.trainee.locks, "training", own.seed, "lock"),
        }
        names = [one.name for one in session.trainee.keys] if stage == "trained" else list(private)
        held[salt] = [torch.equal(private[name], drawn[name]) for name in names]
    assert all(held[""])
    assert not any(held[SALT])


# The salt of a run


def test_the_same_salt_gives_the_same_run_and_another_one_other_draws(tmp_path: Path) -> None:
    matrix = plan(attacks=["random", "ig(steps=2)"], defenses=["none", "noise(scale=0.1)", "mixup"], images=5)
    first = go(matrix, tmp_path / "first", salt=OTHER)
    again = go(matrix, tmp_path / "again", salt=OTHER)
    other = go(matrix, tmp_path / "other", salt=SALT)
    assert rows(tmp_path / "first") == rows(tmp_path / "again")
    pd.testing.assert_frame_equal(measured(first), measured(again))
    assert list(other.index) == list(first.index)
    assert (other["mse"] != first["mse"]).all()


def test_a_resumed_run_has_its_own_salt(tmp_path: Path) -> None:
    matrix = plan(attacks=["random", "ig(steps=2)"], defenses=["noise(scale=0.1)"], images=6)
    go(matrix, tmp_path / "one", salt=OTHER, chunk=2)
    go(plan(attacks=["random"], defenses=["noise(scale=0.1)"], images=6), tmp_path / "parts", salt=OTHER, chunk=2)
    go(matrix, tmp_path / "parts", chunk=2)  # is told no salt
    assert rows(tmp_path / "one")["scores"] == rows(tmp_path / "parts")["scores"]
    with Store.open(tmp_path / "parts" / FILE) as store:
        assert [session.provenance.salt for session in store.sessions()] == [OTHER, OTHER]


def test_a_run_is_not_resumed_with_another_salt(tmp_path: Path) -> None:
    go(plan(), tmp_path, salt=OTHER)
    before = (tmp_path / FILE).read_bytes()
    for salt in (SALT, ""):
        with pytest.raises(BadOption, match=f"--salt '{salt}': .* has the salt '{OTHER}'; leave --salt out"):
            go(plan(images=5), tmp_path, salt=salt)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_shard_begins_only_with_a_salt(tmp_path: Path) -> None:
    matrix = plan(attacks=["random", "ig(steps=2)"], images=8)
    with pytest.raises(BadOption, match=r"all shards of a matrix need the same one; .*--salt [0-9a-f]{32}$"):
        go(matrix, tmp_path / "1", shard="1/2")
    assert not (tmp_path / "1" / FILE).exists()
    whole = go(matrix, tmp_path / "whole", salt=OTHER, chunk=1)
    for number in (1, 2):
        go(matrix, tmp_path / f"{number}", shard=f"{number}/2", salt=OTHER, chunk=1)
        go(matrix, tmp_path / f"{number}", shard=f"{number}/2", chunk=1)  # resumed, without the option
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    assert rows(tmp_path / "all") == rows(tmp_path / "whole")
    assert len(whole) == 16


def test_runs_of_two_salts_are_not_merged(tmp_path: Path) -> None:
    matrix = plan(images=8)
    for number, salt in ((1, OTHER), (2, SALT)):
        go(matrix, tmp_path / f"{number}", shard=f"{number}/2", salt=salt)
    for force in (False, True):
        with pytest.raises(LeakbenchError) as caught:
            merge([tmp_path / "1", tmp_path / "2"], tmp_path / "all", force=force)
        line = str(caught.value)
        assert OTHER in line
        assert SALT in line
        assert "run one of them again with the --salt of the other" in line
        assert "\n" not in line
    assert not (tmp_path / "all" / FILE).exists()
    merge([tmp_path / "1"], tmp_path / "all")
    with pytest.raises(LeakbenchError, match="a run has one"):
        merge([tmp_path / "2"], tmp_path / "all")


def test_show_prints_a_command_that_makes_the_same_trial(cli: Any, place: Path) -> None:  # noqa: F811
    command = ["run", "matrix", "--attack", "ig(steps=2)", "--defense", "noise(scale=0.1)", "--model", "lenet"]
    axes = ["--dataset", "samples", "--images", "2", "--no-floors", "--device", "cpu", "--salt", OTHER]
    assert cli(*command, *axes, "--out", "x").code == 0
    first = rows(place / "x")
    shown = cli("show", "x", first["trials"][0][0])
    assert f"--salt {OTHER}" in shown.out
    with Store.open(place / "x" / FILE, readonly=True) as store:
        words = show(store, first["trials"][0][0]).command.split(" ", 1)[1]
    again = cli(*shlex.split(words))
    assert again.code == 0
    trial = first["trials"][0][0]
    repeated = rows(place / f"runs/again-{trial}")
    assert repeated["scores"] == [row for row in first["scores"] if row[0] == trial]
    refused(cli("run", "matrix", "--salt", "1"), "salt '1' must be 32 hex digits")
    assert OTHER in (place / "x" / "report.md").read_text(encoding="utf-8")


def test_a_run_of_before_keeps_its_keys_and_says_so(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "finished.sqlite", tmp_path / FILE)
    results = leakbench.run(leakbench.Matrix(**MATRIX), tmp_path, device="cpu").results()  # test_golden resumes a half
    go(plan(), tmp_path / "new")
    with Store.open(tmp_path / FILE, readonly=True) as store:
        assert store.salt() == ""
        shown = show(store, results["trial"][0])
    assert ("salt", UNSALTED) in shown.facts
    assert "--salt ''" in shown.command
    leakbench.Run(tmp_path).report(["md", "html"])
    leakbench.Run(tmp_path / "new").report(["md", "html"])
    for page in ("report.md", "report.html"):
        assert UNSALTED in (tmp_path / page).read_text(encoding="utf-8")
        assert UNSALTED not in (tmp_path / "new" / page).read_text(encoding="utf-8")
        assert SALT in (tmp_path / "new" / page).read_text(encoding="utf-8")


def test_sessions_of_two_salts_are_no_run(tmp_path: Path) -> None:
    go(plan(), tmp_path, salt=OTHER)
    go(plan(images=5), tmp_path)
    with Store.open(tmp_path / FILE) as store, store.transaction() as db:
        db.execute("UPDATE sessions SET salt = ? WHERE id = 2", (SALT,))
    with pytest.raises(leakbench.LeakbenchError, match="2 salts"):
        go(plan(images=6), tmp_path)
    with Store.open(tmp_path / FILE) as store, store.transaction() as db:
        db.execute("UPDATE sessions SET salt = ?", ("x" * 100,))
    with pytest.raises(leakbench.LeakbenchError, match="must be 32 hex digits"):
        go(plan(images=6), tmp_path)


@pytest.mark.long
def test_an_entry_is_checked_with_its_own_salt_or_with_another(tmp_path: Path) -> None:
    matrix = plan(attacks=["ig(steps=2)"], defenses=["noise(scale=0.1)"], images=8, datasets=["samples"])
    go(matrix, tmp_path, salt=OTHER, chunk=1)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        ((entry,), _) = entries(store, "run")
    assert entry.salt == OTHER
    same = verify(entry, tmp_path, seed=0, sample=3, device="cpu")
    assert [one.score for one in same.repeats] == [one.before for one in same.repeats]
    other = verify(entry, tmp_path, seed=0, sample=3, device="cpu", salt=SALT)
    assert all(one.score != one.before for one in other.repeats)
    older = json.loads(entry.model_dump_json(by_alias=True))
    del older["salt"]
    assert Entry.model_validate(older).salt == ""
    assert verify(Entry.model_validate(older), tmp_path, seed=0, sample=1, device="cpu").differing == ("salt",)


# The salt of trainings


def secrets_of(out: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    (file,) = out.glob("arms/*/initial.safetensors")
    return [value for name, value in sorted(load_file(file).items()) if "lock" in name or "key" in name]


def test_trainings_have_one_salt(tmp_path: Path) -> None:
    arms = study(defenses=["keylock(length=9)"], rounds=1).arms()
    train(arms, tmp_path / "first", salt=OTHER)
    train(arms, tmp_path / "again", salt=OTHER)
    (record,) = train(arms, tmp_path / "other")
    first, again, other = (secrets_of(tmp_path / name) for name in ("first", "again", "other"))
    assert len(first) == 1
    assert all(torch.equal(*pair) for pair in zip(first, again))
    assert not any(torch.equal(*pair) for pair in zip(first, other))
    assert (record.provenance.salt, salt_of(tmp_path / "other"), salt_of(tmp_path / "none")) == (SALT, SALT, None)
    with pytest.raises(BadOption, match=f"the trainings in .* have the salt '{SALT}'"):
        train(study(defenses=["none"], rounds=1).arms(), tmp_path / "other", salt=OTHER)
    (tmp_path / "other" / "salt.json").unlink()
    assert salt_of(tmp_path / "other") == ""  # as trainings of before have it
    with pytest.raises(BadOption, match="have the salt ''"):
        train(arms, tmp_path / "other", salt=OTHER)
