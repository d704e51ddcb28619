"""Trials stay what they are: the ids of suites and files in benchmarks/, and runs that an earlier leakbench made.

``golden/finished.sqlite`` is a run of MATRIX; in ``golden/half.sqlite`` only its first attack and its floors have run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import leakbench
from leakbench.core.compiled import SWITCH
from leakbench.plan import matrix as plans
from leakbench.plan.matrix import Matrix
from leakbench.store.run_file import FILE
from leakbench.training.settings import Accuracy, Tradeoff
from leakbench.training.tradeoff import matrix_of

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
FILES = ("suite", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks").rglob("*.toml")))
MATRIX: Mapping[str, Any] = {
    "attacks": ["ig(steps=3)", "idlg(steps=3)"],
    "defenses": ["none", "noise(scale=0.01)"],
    "models": ["lenet"],
    "datasets": ["samples"],
    "images": 1,
}


def test_a_finished_run_is_resumed_without_a_change(tmp_path: Path) -> None:
    resumed = resume(tmp_path, "finished.sqlite")
    for table in ("cells", "trials", "results", "scores", "findings", "images", "truths"):
        columns = ", ".join(row[1] for row in rows(GOLDEN / "finished.sqlite", f"PRAGMA table_info({table})"))
        query = f"SELECT {columns} FROM {table} ORDER BY 1, 2"
        assert rows(resumed, query) == rows(GOLDEN / "finished.sqlite", query)
    assert len(rows(resumed, "SELECT * FROM sessions")) == 2


def test_a_run_that_was_half_done_ends_with_the_same_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the same run in one go: on another processor ``idlg`` without a line search ends elsewhere."""
    monkeypatch.setenv(SWITCH, "off")  # its first half was computed without the kernels
    resumed, whole = (
        resume(tmp_path / "resumed", "half.sqlite"),
        resume(tmp_path / "whole", "half.sqlite", emptied=True),
    )
    before = "SELECT * FROM results ORDER BY trial_id"
    assert set(rows(GOLDEN / "half.sqlite", before)) < set(rows(resumed, before))
    assert not set(rows(GOLDEN / "half.sqlite", before)) & set(rows(whole, before))
    others = "metric NOT LIKE '%lpips%' AND metric != 'release_cosine'"  # which needs assets, and which is newer
    scores = f"SELECT trial_id, metric, value FROM scores WHERE {others} ORDER BY 1, 2"
    ended, expected = rows(resumed, scores), rows(whole, scores)
    assert [row[:2] for row in ended] == [row[:2] for row in expected]
    assert [row[:2] for row in ended] == [row[:2] for row in rows(GOLDEN / "finished.sqlite", scores)]
    assert [row[2] for row in ended] == pytest.approx([row[2] for row in expected], rel=1e-3, abs=1e-4)


def resume(folder: Path, name: str, emptied: bool = False) -> Path:
    """Return the run file of MATRIX, resumed from a copy of one in ``golden``, or from its plan alone (``emptied``)."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / name, folder / FILE)
    if emptied:
        with contextlib.closing(sqlite3.connect(folder / FILE)) as db, db:
            for table in ("scores", "images", "results"):
                db.execute(f"DELETE FROM {table}")
    return leakbench.run(Matrix(**MATRIX), folder, device="cpu").out / FILE


def rows(file: Path, query: str) -> list[tuple[Any, ...]]:
    """Return what a query finds in a file."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        return db.execute(query).fetchall()


@pytest.mark.parametrize("file", FILES)
def test_trial_ids_are_those_of_the_golden_file(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial with another id is run again in every stored run: raise a component's version if that is meant.

    The entry of a new suite or file is in the message of the failure; add it to the golden file.
    """
    imagenet(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pytorch_pretrained_biggan.PYTORCH_PRETRAINED_BIGGAN_CACHE", biggan(tmp_path / "biggan"))
    golden = json.loads((GOLDEN / "trial_ids.json").read_text(encoding="utf-8"))
    assert found(file) == {name: value for name, value in golden.items() if name.split(" ")[0] == file}


def imagenet(folder: Path) -> None:
    """Write what ``data`` in a folder needs: images, of which an id has names and sizes only, and a generator."""
    for label in range(3):
        for image in range(8):
            file = folder / "data" / "imagenet" / f"n0000000{label}" / f"{image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(100))
    (folder / "data" / "generator.pt2").write_bytes(b"")
    (folder / "data" / "generator.toml").write_text(
        'latent = 4\nlaw = "normal"\nrange = [0.0, 1.0]\nimage = [3, 48, 48]\nclasses = 0\nlicence = ""\ndata = ""\n',
        encoding="utf-8",
    )


def biggan(cache: Path) -> Path:
    """Write and return a cache in which a BigGAN-deep is found; an id depends on the contents of the weights' file."""
    cache.mkdir()
    config = json.dumps({"output_dim": 256, "z_dim": 128, "num_classes": 1000})
    for name, content in (("config.json", config), ("pytorch_model.bin", "")):
        (cache / name).write_text(content, encoding="utf-8")
        (cache / f"{name}.json").write_text(json.dumps({"url": f"somewhere/biggan-deep-256-{name}"}), encoding="utf-8")
    return cache


def found(file: str) -> dict[str, list[Any]]:
    """Return (number of trials, SHA-256 of their ids) for each scale of a file, or of every suite."""
    if file == "suite":
        tables = {f"suite {name}": plans.load_suite(name) for name in plans.suites()}
    else:
        tables = {file: plans.load(ROOT / file)}
    return {
        f"{name} {scale}" if scale else name: of_rows(plans.expand(table, scale))
        for name, table in tables.items()
        for scale in table.get("scale", {}) or [None]
    }


def of_rows(rows: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return the number of trials of all rows, and the SHA-256 of the ids of those that are looked at."""
    digest, count = hashlib.sha256(), 0.0
    for row in rows:
        for weight, own in ids(row):
            digest.update(own.encode())
            count += weight
    return [round(count), digest.hexdigest()]


def ids(row: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    """Yield the ids of a row's trials and arms, each with the number of trials that it stands for.

    An attack on a trained network has the hash of its weights in its id. Here it is taken before training.
    """
    if "mode" not in row:
        yield from of_matrix(Matrix(**row))
        return
    plan = Tradeoff(**row) if "attack" in row else Accuracy(**row)
    for arm in plan.arms():
        yield 1, arm.id
        if isinstance(plan, Tradeoff):
            yield from of_matrix(matrix_of(plan, arm, None))


def of_matrix(matrix: Matrix) -> Iterator[tuple[float, str]]:
    """Yield the ids of a matrix; of more than four images only the first two and the last two are looked at.

    Of clients with several images all are.

    Some matrices have 250,000 trials: the ids of a cell differ by image and seed alone, so these four show them all.
    """
    images = list(range(matrix.images)) if isinstance(matrix.images, int) else matrix.images
    whole = len(images) <= 4 or any(client.count > 1 for client in matrix.clients)
    chosen = images if whole else [*images[:2], *images[-2:]]
    for trial in matrix.model_copy(update={"images": chosen}).trials():
        yield len(images) / len(chosen), trial.id
