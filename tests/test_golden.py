"""Trial ids stay what they are: those of every shipped suite and of every file in benchmarks/, against a golden file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from leakbench.plan import matrix as plans
from leakbench.plan.matrix import Matrix
from leakbench.training.settings import Accuracy, Tradeoff

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "trial_ids.json"
FILES = ("suite", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "benchmarks").rglob("*.toml")))


@pytest.mark.parametrize("file", FILES)
def test_trial_ids_are_those_of_the_golden_file(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that gets another id is run again in every stored run: raise a component's version if that is meant."""
    imagenet(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pytorch_pretrained_biggan.PYTORCH_PRETRAINED_BIGGAN_CACHE", biggan(tmp_path / "biggan"))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found(file) == {name: value for name, value in golden.items() if name.split(" ")[0] == file}


def imagenet(folder: Path) -> None:
    """Write what ``data/imagenet`` in a folder needs to be listed; an id depends on names and sizes of files only."""
    for label in range(3):
        for image in range(8):
            file = folder / "data" / "imagenet" / f"n0000000{label}" / f"{image}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(100))


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
            yield from of_matrix(plan.matrix(arm, Path("untrained.safetensors"), check=True))


def of_matrix(matrix: Matrix) -> Iterator[tuple[float, str]]:
    """Yield the ids of a matrix; of more than four images only the first two and the last two are looked at.

    Some matrices have 250,000 trials: the ids of a cell differ by image and seed alone, so these four show them all.
    """
    images = list(range(matrix.images)) if isinstance(matrix.images, int) else matrix.images
    chosen = images if len(images) <= 4 else [*images[:2], *images[-2:]]
    for trial in matrix.model_copy(update={"images": chosen}).trials():
        yield len(images) / len(chosen), trial.id
