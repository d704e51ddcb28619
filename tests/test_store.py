"""The run file: what is written is what is read, whatever happens in between."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Sequence
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import COPIED, SALT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from leakbench.analysis.integrity import check
from leakbench.attacks import Attack
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction, ThreatModel
from leakbench.datasets import Dataset
from leakbench.defenses import Defense
from leakbench.errors import ForeignRun, LeakbenchError
from leakbench.metrics import Metric
from leakbench.models import Model
from leakbench.observation import Observation
from leakbench.plan.trial import Cell, Result, Trial, trial_id
from leakbench.report.files import write
from leakbench.store import schema
from leakbench.store.frames import AFTER, BEFORE
from leakbench.store.merge import merge
from leakbench.store.provenance import Provenance
from leakbench.store.run_file import FILE, Store

SCHEMAS = Path(__file__).parent / "schemas"
"""A file of each schema, written by the leakbench that had it."""


@dataclasses.dataclass(frozen=True)
class TinyData(Dataset):
    """Nothing."""

    classes: int = 2
    image_shape = (3, 4, 4)

    @property
    def num_classes(self) -> int:
        return self.classes

    def __len__(self) -> int:
        return 1000

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def mean(self) -> Tensor:
        return torch.full((3, 4, 4), 0.5)


@dataclasses.dataclass(frozen=True)
class TinyModel(Model):
    """Nothing."""

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TinyDefense(Defense):
    """Nothing."""

    scale: float = 0.0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class TinyAttack(Attack):
    """Nothing."""

    step: float = 0.1
    note: str = ""

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        raise NotImplementedError


class Score(Metric):
    """Nothing."""

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        raise NotImplementedError


def named(base: type[Any], name: str, **attributes: object) -> type[Any]:
    """A component class under a name, without a place in any registry."""
    return type(name, (base,), {"name": name, **attributes})


Data, Net, Guard, Thief = (
    named(TinyData, "tiny-data"),
    named(TinyModel, "tiny-model"),
    named(TinyDefense, "tiny-defense"),
    named(TinyAttack, "tiny-attack"),
)
METRICS = [
    named(Score, "psnr", higher_is_better=True, convention="dB")(),
    named(Score, "mse", convention="0 to 1")(),
]


def trial(image: int = 0, seed: int = 0, attack: Attack | None = None, defense: Defense | None = None) -> Trial:
    return Trial(Cell(Data(), Net(), defense or Guard(), attack or Thief(), ThreatModel()), image, seed)


def png(seed: int, size: int = 4) -> bytes:
    out = BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def result(of: Trial, **changes: Any) -> Result:
    plain = Result(
        trial=of,
        status="ok",
        reason="",
        seconds=0.5,
        scores={"psnr": 10.0 + of.image, "mse": 0.1},
        reconstruction=png(of.image),
        truth=png(1000 + of.image),
        label=1,
    )
    return dataclasses.replace(plain, **changes)


def provenance() -> Provenance:
    return Provenance("0.1", "abc", True, {"torch": "2"}, "3.11", "cpu", 2, "leakbench run x", '{"name": "x"}')


def ready(path: Path) -> tuple[Store, int]:
    store = Store.create(path / FILE)
    store.record_metrics(METRICS, {"psnr": "a note"})
    return store, store.start_session(provenance())


def test_results_come_back_as_they_were_written(tmp_path):
    store, session = ready(tmp_path / "new" / "folder")
    first, second = trial(1), trial(0)
    store.add_trials([first, second])
    store.write([result(first, objective=0.25, evaluations=7, path="batched")], session)
    store.write([result(second, status="error", reason="why", scores={}, reconstruction=None)], session)
    store.end_session(session)
    store.close()
    with Store.open(tmp_path / "new" / "folder" / FILE, readonly=True) as again:
        frame = again.results()
        pictures = again.images([first.id, second.id, "unknown"])
        (recorded,) = again.sessions()
        metrics = again.metrics()
    assert list(frame.columns) == [*BEFORE, "psnr", "mse", *AFTER]
    assert frame["trial"].tolist() == [second.id, first.id]
    assert frame["status"].tolist() == ["error", "ok"]
    assert frame["reason"].tolist() == ["why", ""]
    assert np.isnan(frame["psnr"][0])
    assert frame["psnr"][1] == 11.0
    assert frame["evaluations"].isna().tolist() == [True, False]
    assert frame["evaluations"][1] == 7
    assert frame["objective"][1] == 0.25
    assert pictures[first.id].reconstruction == png(1)
    assert pictures[first.id].truth == png(1001)
    assert pictures[second.id].reconstruction is None
    assert "unknown" not in pictures
    assert recorded.provenance == provenance()
    assert recorded.ended is not None
    assert [(m.name, m.higher_is_better, m.convention, m.note) for m in metrics] == [
        ("psnr", True, "dB", "a note"),
        ("mse", False, "0 to 1", ""),
    ]
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [FILE]


def test_planning_twice_changes_nothing(tmp_path):
    store, session = ready(tmp_path)
    trials = [trial(i) for i in range(3)]
    store.add_trials(trials)
    store.add_trials([trial(7), *reversed(trials)])
    assert store.planned() == {t.id for t in [*trials, trial(7)]}
    assert store.done() == set()
    store.write([result(t) for t in trials], session)
    store.write([result(trials[0], seconds=9.0)], session)
    assert store.done() == {t.id for t in trials}
    assert store.results()["seconds"].tolist() == [9.0, 0.5, 0.5]
    store.close()


def test_rows_are_in_order_of_planning_not_of_writing(tmp_path):
    store, session = ready(tmp_path)
    zebra, ant = named(TinyAttack, "zebra")(), named(TinyAttack, "ant")()
    trials = [trial(i, s, attack=a) for a in (zebra, ant) for i in (1, 0) for s in (1, 0)]
    store.add_trials(trials)
    store.write([result(t) for t in reversed(trials)], session)
    frame = store.results()
    assert list(zip(frame["attack"], frame["seed"], frame["image"])) == [
        (attack, seed, image) for attack in ("zebra", "ant") for seed in (0, 1) for image in (0, 1)
    ]
    store.close()


def test_one_spec_of_two_versions_is_told_apart(tmp_path):
    store, session = ready(tmp_path)
    old, new = named(TinyAttack, "thief")(), named(TinyAttack, "thief", version=2)()
    store.write([result(trial(attack=old)), result(trial(attack=new))], session)
    assert store.results()["attack"].tolist() == ["thief [version 1]", "thief [version 2]"]
    store.close()


def test_a_truth_is_stored_once(tmp_path):
    store, session = ready(tmp_path)
    store.write([result(trial(0, seed)) for seed in range(5)], session)
    assert store._db.execute("SELECT count(*) FROM truths").fetchone()[0] == 1
    assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []
    store.close()


def test_an_empty_run_has_every_column(tmp_path):
    store, _ = ready(tmp_path)
    store.add_trials([trial()])
    frame = store.results()
    assert list(frame.columns) == [*BEFORE, "psnr", "mse", *AFTER]
    assert len(frame) == 0
    store.close()


def test_infinite_scores_survive_and_nan_is_absent(tmp_path):
    store, session = ready(tmp_path)
    store.write([result(trial(), scores={"psnr": float("inf"), "mse": float("nan")})], session)
    frame = store.results()
    assert frame["psnr"][0] == float("inf")
    assert np.isnan(frame["mse"][0])
    store.close()


TEXT = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    ["a|b`c", "x\ny\r\n", "<b>&amp;</b>", "$\\frac{1}$", "émoji 🙈 中文", "'; DROP TABLE results; --", "\0", "[red]"]
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 2**63 - 1),
            st.sampled_from(["ok", "failed", "unsupported", "error"]),
            TEXT,
            st.floats(0, 1e9),
            st.dictionaries(st.sampled_from(["psnr", "mse"]), st.floats(allow_nan=False)),
            st.none() | st.binary(max_size=50),
            st.none() | st.floats(allow_nan=False),
            st.none() | st.integers(0, 2**40),
            TEXT,
        ),
        max_size=5,
        unique_by=lambda row: row[0],
    )
)
def test_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("run")
    store, session = ready(path)
    written = {}
    for image, status, reason, seconds, scores, picture, objective, evaluations, words in rows:
        one = trial(image, attack=Thief(note=words))
        written[one.id] = result(
            one,
            status=status,
            reason=reason,
            seconds=seconds,
            scores=scores,
            reconstruction=picture,
            objective=objective,
            evaluations=evaluations,
        )
    store.write(list(written.values()), session)
    store.close()
    with Store.open(path / FILE, readonly=True) as again:
        frame, pictures = again.results().set_index("trial"), again.images(written)
    assert set(frame.index) == set(written)
    for key, want in written.items():
        row = frame.loc[key]
        assert (row["status"], row["reason"], row["seconds"]) == (want.status, want.reason, want.seconds)
        assert (row["image"], row["attack"]) == (want.trial.image, want.trial.cell.specs["attack"])
        for name in ("psnr", "mse"):
            assert row[name] == want.scores[name] if name in want.scores else np.isnan(row[name])
        assert np.isnan(row["objective"]) if want.objective is None else row["objective"] == want.objective
        assert pictures[key].reconstruction == want.reconstruction


def test_surrogates_are_replaced(tmp_path):
    store, session = ready(tmp_path)
    store.write([result(trial(), reason="bad " + os.fsdecode(b"name-\xff"))], session)
    assert store.results()["reason"].tolist() == ["bad name-?"]
    store.close()


def one_line(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_scores_of_an_unknown_metric_are_refused_whole(tmp_path):
    store, session = ready(tmp_path)
    with pytest.raises(LeakbenchError) as error:
        store.write([result(trial(0)), result(trial(1), scores={"other": 1.0})], session)
    one_line(error, "other", "record")
    assert store.done() == set()
    store.close()


def test_a_metric_named_like_a_column_is_refused(tmp_path):
    store, _ = ready(tmp_path)
    with pytest.raises(LeakbenchError) as error:
        store.record_metrics([named(Score, "seed")()])
    one_line(error, "seed", "rename")
    store.close()


def test_a_seed_of_more_than_64_bits(tmp_path):
    store, _ = ready(tmp_path)
    with pytest.raises(LeakbenchError) as error:
        store.add_trials([trial(seed=2**70)])
    one_line(error, "64 bits")
    store.close()


def text_file(path: Path) -> None:
    path.write_text("not a run, though long enough to look like one\n" * 100)


def other_database(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE trials (id)")
    db.commit()
    db.close()


def truncated(path: Path) -> None:
    store, session = ready(path.parent)
    store.write([result(trial(i), reconstruction=png(i, 64)) for i in range(5)], session)
    store.close()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scrambled(path: Path) -> None:
    store, _ = ready(path.parent)
    store.close()
    data = path.read_bytes()
    path.write_bytes(data[:100] + b"\xff" * (len(data) - 100))


def newer(path: Path) -> None:
    ready(path.parent)[0].close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.commit()
    db.close()


def without_table(path: Path) -> None:
    ready(path.parent)[0].close()
    db = sqlite3.connect(path)
    db.execute("DROP TABLE scores")
    db.commit()
    db.close()


@pytest.mark.parametrize("readonly", [True, False])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (text_file, "not an SQLite file"),
        (Path.touch, "empty"),
        (other_database, "did not write"),
        (truncated, "damaged"),
        (scrambled, "damaged"),
        (newer, "schema 99"),
        (without_table, "scores"),
        (Path.mkdir, "not a file"),
        (lambda path: None, "no run file"),
    ],
)
def test_foreign_files(tmp_path, make, word, readonly):
    path = tmp_path / FILE
    make(path)
    with pytest.raises(ForeignRun) as error:
        Store.open(path, readonly)
    one_line(error, str(path), word)


def test_a_file_without_permission(tmp_path, monkeypatch):
    ready(tmp_path)[0].close()

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ForeignRun) as error:
        Store.open(tmp_path / FILE)
    one_line(error, "Permission denied", "permissions")


def test_create_never_overwrites(tmp_path):
    ready(tmp_path)[0].close()
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(LeakbenchError) as error:
        Store.create(tmp_path / FILE)
    one_line(error, "exists already")
    assert (tmp_path / FILE).read_bytes() == before
    (tmp_path / "killed.sqlite").touch()
    Store.create(tmp_path / "killed.sqlite").close()
    with pytest.raises(LeakbenchError, match="cannot be written"):
        Store.create(tmp_path / FILE / "below" / FILE)


@pytest.mark.parametrize("name", ["a b?c#d%41.sqlite", "ünï-🙈.sqlite"])
def test_odd_file_names(tmp_path, name):
    Store.create(tmp_path / name).close()
    Store.open(tmp_path / name).close()
    Store.open(tmp_path / name, readonly=True).close()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_read_only_store_refuses_to_write(tmp_path):
    ready(tmp_path)[0].close()
    with Store.open(tmp_path / FILE, readonly=True) as store, pytest.raises(LeakbenchError) as error:
        store.add_trials([trial()])
    one_line(error, "readonly", "writable")


def test_a_full_disk_is_one_line_and_loses_only_the_chunk(tmp_path):
    store, session = ready(tmp_path)
    store.write([result(trial(0))], session)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(LeakbenchError) as error:
        store.write([result(trial(i), reconstruction=png(i, 128)) for i in (1, 2)], session)
    one_line(error, "database or disk is full", "free space")
    assert store.done() == {trial(0).id}
    store._db.execute("PRAGMA max_page_count = 100000")
    store.write([result(trial(1))], session)
    assert store.done() == {trial(0).id, trial(1).id}
    store.close()


def test_a_reader_sees_a_run_that_is_being_written(tmp_path):
    store, session = ready(tmp_path)
    store.write([result(trial(0))], session)
    with Store.open(tmp_path / FILE, readonly=True) as reader:
        store.write([result(trial(1))], session)
        assert len(reader.results()) == 2
        store.close()
    with Store.open(tmp_path / FILE) as again:
        assert len(again.results()) == 2


def write_for_ever(folder: Path, told: Connection) -> None:
    store, session = ready(folder)
    for chunk in itertools.count():
        store.write([result(trial(10 * chunk + i)) for i in range(10)], session)
        told.send(chunk)


@pytest.mark.long
def test_kill_9_loses_at_most_a_chunk(tmp_path):
    here, there = COPIED.Pipe(duplex=False)
    process = COPIED.Process(target=write_for_ever, args=(tmp_path, there))
    process.start()
    there.close()
    told = [here.recv() for _ in range(5)]
    time.sleep(0.05)
    process.kill()
    process.join()
    with contextlib.suppress(EOFError, OSError):
        while True:
            told.append(here.recv())
    written = len(told)
    for readonly in (True, False):
        with Store.open(tmp_path / FILE, readonly) as store:
            done = len(store.done())
            frame = store.results()
            assert store.sessions()[0].ended is None
        assert done % 10 == 0
        assert done >= 10 * written >= 50
        assert len(frame) == done
        assert frame["psnr"].notna().all()
    with Store.open(tmp_path / FILE) as store:
        assert [tuple(row) for row in store.query("PRAGMA integrity_check")] == [("ok",)]


def test_provenance_of_this_process():
    here = Provenance.collect("leakbench run", "cpu", "{}")
    assert here.packages["torch"] == torch.__version__.split("+")[0] or here.packages["torch"] == torch.__version__
    assert here.threads == torch.get_num_threads()
    assert (here.commit is None) == (here.dirty is None)
    assert here.commit is None or len(here.commit) == 40


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("readonly", [True, False])
def test_a_file_of_an_older_schema_is_read_as_one_of_this(tmp_path, readonly, number):
    shutil.copy(SCHEMAS / f"{number}.sqlite", tmp_path / FILE)
    before = (tmp_path / FILE).read_bytes()
    with Store.open(tmp_path / FILE, readonly=readonly) as store:
        results = store.results()
        cells = [(cell["settings"], cell["chunk"]) for cell in store.cells()]
        sizes = {store.chunk(settings) for settings, _ in cells}
        pictures = store.images(results["trial"])
        (session,) = store.sessions()
        assert len(store.done()) == 38
        assert store.planned() == set(results["trial"])
        assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert store.findings().empty
        named = {spec.spec for spec in store.components()}
        assert named >= {"lenet", "resnet20(mode=train)", "samples", "raises-for-bright"}
        assert store._db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0] == str(schema.SCHEMA)
    assert results["status"].value_counts().to_dict() == {"ok": 31, "unsupported": 5, "error": 4, "failed": 2}
    assert (results["attack"][0], results["model"][0], results["image"][0]) == ("random", "lenet", 0)
    assert len(cells) == 14
    assert sizes == {2, 3, None}
    assert all(picture.truth.startswith(b"\x89PNG") for picture in pictures.values())
    assert (session.provenance.shard, session.provenance.workers, session.provenance.salt) == ("", 1, "")
    assert ((tmp_path / FILE).read_bytes() == before) is readonly
    for trial, (image, seed, cell) in _planned(tmp_path / FILE).items():
        assert trial_id(json.loads(cell), image, seed) == trial


def _planned(path: Path) -> dict[str, tuple[int, int, str]]:
    with Store.open(path, readonly=True) as store:
        rows = store._db.execute("SELECT trials.id, image, seed, settings FROM trials JOIN cells ON cells.id = cell_id")
        return {row[0]: tuple(row)[1:] for row in rows}


@pytest.mark.parametrize("number", range(1, schema.SCHEMA))
def test_a_file_that_was_migrated_has_the_tables_of_a_new_one(tmp_path, number):
    shutil.copy(SCHEMAS / f"{number}.sqlite", tmp_path / FILE)
    new = Store.create(tmp_path / "new" / FILE)
    with Store.open(tmp_path / FILE) as old, new:
        for table in schema.TABLES:
            shapes = [store._db.execute(f"PRAGMA table_info({table})").fetchall() for store in (old, new)]
            assert [tuple(row) for row in shapes[0]] == [tuple(row) for row in shapes[1]]
            keys = [store._db.execute(f"PRAGMA foreign_key_list({table})").fetchall() for store in (old, new)]
            assert [tuple(row) for row in keys[0]] == [tuple(row) for row in keys[1]]


def test_every_schema_has_a_file():
    assert {path.name for path in SCHEMAS.iterdir()} == {f"{number}.sqlite" for number in range(1, schema.SCHEMA + 1)}


def test_a_released_file_of_this_schema_is_read_as_it_is(tmp_path):
    shutil.copy(SCHEMAS / f"{schema.SCHEMA}.sqlite", tmp_path / FILE)
    before = (tmp_path / FILE).read_bytes()
    with Store.open(tmp_path / FILE, readonly=True) as store:
        results, found = store.results(), store.findings()
        (session,) = store.sessions()
        statements = {one.spec: one.statement for one in store.components() if one.kind == "defense"}
        metrics = [metric.name for metric in store.metrics()]
        pictures = store.images(results["trial"])
        assert {threat for threat, _ in store.threats()} == {"paper", "weights"}
    assert results["status"].value_counts().to_dict() == {"ok": 34, "error": 12, "unsupported": 8}
    reason = "the defense failed: 'raises-for-bright' raised ValueError: too bright"
    assert set(results[results["status"] == "error"]["reason"]) == {reason}
    assert 0 < sum(picture.aligned is not None for picture in pictures.values()) < len(pictures)
    assert set(found["name"]) == {"scale"}
    assert set(found["trial"]) <= set(results["trial"])
    assert (session.provenance.version, session.provenance.workers, session.ended is None) == ("0.1.0", 2, False)
    assert session.provenance.salt == SALT
    assert statements.keys() == {"none", "raises-for-bright"}
    assert all(statement is not None for statement in statements.values())
    assert {"psnr", "ssim_aligned"} <= set(metrics)
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(one, marks=pytest.mark.long if 1 < one < schema.SCHEMA else ())
        for one in range(1, schema.SCHEMA + 1)
    ],
)
def test_released_files_are_sound_reported_and_merged(tmp_path, number):
    (tmp_path / "old").mkdir()
    shutil.copy(SCHEMAS / f"{number}.sqlite", tmp_path / "old" / FILE)
    state = check(tmp_path / "old")
    assert (state.code, state.faults, state.missing) == (1, (), {})
    assert "error" in state.ended
    assert (tmp_path / "old" / "report.md") in write(tmp_path / "old", ["md"])
    merged = merge([tmp_path / "old"], tmp_path / "new")
    assert merged.added == merged.planned == state.planned
    assert check(tmp_path / "new").ended == state.ended


def test_a_file_of_schema_1_with_malformed_settings_is_refused(tmp_path):
    shutil.copy(SCHEMAS / "1.sqlite", tmp_path / FILE)
    db = sqlite3.connect(tmp_path / FILE)
    db.execute("UPDATE trials SET settings = '{' WHERE position = 20")
    db.commit()
    db.close()
    before = (tmp_path / FILE).read_bytes()
    for readonly in (True, False):
        with pytest.raises(ForeignRun, match="damaged"):
            Store.open(tmp_path / FILE, readonly=readonly)
    assert (tmp_path / FILE).read_bytes() == before
