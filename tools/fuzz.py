"""Feed the readers of files and specs with hostile bytes: only a LeakbenchError may come out.

    python tools/fuzz.py                      every target, 1,000,000 inputs in all (hours on one core)
    python tools/fuzz.py --target toml --runs 5000 --seed 3

Each target runs in a process of its own under atheris (libFuzzer with coverage of this package); an input that makes
anything else come out is kept in ``--out``, and the command exits with 1. Needs the extra ``fuzz``.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib
import io
import json
import lzma
import os
import pickle
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

SHARES = {
    "spec": 400_000,
    "threat": 300_000,
    "toml": 80_000,
    "accuracy-toml": 30_000,
    "tradeoff-toml": 20_000,
    "pickle": 90_000,
    "archive": 10_000,
    "idx": 20_000,
    "checkpoint": 4_000,
    "entry": 10_000,
    "record": 8_000,
    "targets": 8_000,
    "study": 10_000,
    "report-bytes": 1_000,
    "report-values": 1_000,
    "compare-values": 1_000,
    "check-bytes": 1_500,
    "check-values": 1_500,
    "merge-bytes": 1_000,
    "merge-values": 1_000,
    "resume-bytes": 1_000,
    "resume-values": 1_000,
}
"""How many of a million inputs each target gets: the cheap ones more. What ends in bytes or values damages a run."""

Target = Callable[[bytes], None]

_OPEN_SPECS = ["none", "noise(scale=0.01, kind=laplace)", "ig(steps=3, tv=1e-4)", "folder:/tmp", 'prune(ratio="0.5")']
_OPEN_THREATS = ["paper", "labels=known, reveals=key+lock", "informed=true", "shares=weights"]
_OPEN_TOML = [
    'name = "a"\nattacks = ["dlg"]\ndefenses = ["none"]\nmodels = ["lenet"]\ndatasets = ["samples"]\nimages = [1, 2]\n',
    'attacks = ["grey"]\n[scale.a]\nimages = 2\n[[scale.a.rows]]\ndefenses = ["none"]\nmodels = ["lenet"]\n'
    'datasets = ["samples"]\n',
    'defenses = ["none"]\nmodels = ["lenet"]\ndatasets = ["samples"]\nthreshold = 0.6\n[[stages]]\n'
    'attacks = ["grey"]\nthreats = ["paper", { labels = "known" }]\n',
]
_OPEN_RECIPES = [
    'defenses = ["none", "keylock"]\nmodels = ["lenet"]\ndatasets = ["samples"]\nrounds = 2\nlr = 0.02\nseeds = [1]\n',
    'mode = "fedavg"\nclients = 4\nfraction = 0.5\nsplit = "shards"\ndefenses = ["none"]\nmodels = ["lenet"]\n'
    'datasets = ["mnist"]\nmilestones = [1]\naugment = ["flip"]\nselect = "test"\n',
]
_ATTACK = 'stages = ["best"]\n[attack]\nattacks = ["peel"]\nthreats = ["paper", "informed=true"]\nimages = [0, 5]\n'


def altered(value: Any, data: bytes) -> Any:
    """Return plain values with a few of them, which ones the data say, replaced, removed or put elsewhere."""
    rng, value = random.Random(data), copy.deepcopy(value)
    text = data.decode("utf-8", "replace")
    odd = [
        True,
        -1,
        0,
        2**63,
        10**400,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "x",
        "../x",
        text,
        [],
        {},
        [[]],
        {"a": []},
    ]
    for _ in range(rng.randint(1, 3)):
        within = value
        while True:
            keys = list(within) if isinstance(within, dict) else list(range(len(within)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(within[key], (dict, list)) and rng.random() < 0.8:
                within = within[key]
            elif rng.random() < 0.15:
                del within[key]
                break
            elif isinstance(within, dict) and rng.random() < 0.1:
                within[text[:20]] = copy.deepcopy(within[key])
                break
            else:
                within[key] = copy.deepcopy(rng.choice(odd))
                break
    return value


@contextmanager
def targets(work: Path) -> Iterator[dict[str, tuple[Target, list[bytes]]]]:
    """Yield name -> (a function of bytes that raises LeakbenchError alone, inputs to start from).

    Args:
        work: a folder for the files that the readers are given.
    """
    with mock.patch.dict(os.environ, LEAKBENCH_HOME=str(work / "home")):  # LPIPS is left out
        yield {**_texts(work), **_assets(work), **_documents(work), **_runs(work)}


def _texts(work: Path) -> dict[str, tuple[Target, list[bytes]]]:
    """Return the targets that read specs and TOML."""
    from leakbench.attacks.base import registry as attacks
    from leakbench.datasets.base import registry as datasets
    from leakbench.defenses.base import registry as defenses
    from leakbench.models.base import registry as models
    from leakbench.plan import matrix as matrices
    from leakbench.training.settings import Accuracy, Tradeoff
    from leakbench.training.tradeoff import matrix_of

    def spec(data: bytes) -> None:
        registry = (attacks, defenses, models, datasets)[data[0] % 4 if data else 0]
        registry.parse(data[1:].decode("utf-8", "surrogateescape"))  # type: ignore[attr-defined]

    def threat(data: bytes) -> None:
        matrices.parse_threat(data.decode("utf-8", "surrogateescape"))

    def axes(data: bytes, known: list[str]) -> list[dict[str, Any]]:
        """Return what a file of these bytes says; where they begin with 0, what one that is known says, altered."""
        if data[:1] == b"\0":
            sound = tomllib.loads(known[len(data) % len(known)])
            return matrices.expand(altered(sound, data), "a" if "scale" in sound else None)
        file = work / "plan.toml"
        file.write_bytes(data)
        return matrices.expand(matrices.load(file))

    def toml(data: bytes) -> None:
        for one in axes(data, _OPEN_TOML):
            matrices.Matrix(**one).describe()

    def accuracy(data: bytes) -> None:
        for one in axes(data, _OPEN_RECIPES):
            for arm in Accuracy(**one).arms()[:4]:
                assert all((arm.id, arm.folder, arm.words()))

    def tradeoff(data: bytes) -> None:
        for one in axes(data, studies):
            plan = Tradeoff(**one)
            for arm in plan.arms()[:4]:
                matrix_of(plan, arm, None).describe()

    studies = [text + _ATTACK for text in _OPEN_RECIPES]
    changed = [b"\0", b"\0a", b"\0ab"]
    return {
        "spec": (spec, [bytes([number]) + text.encode() for text in _OPEN_SPECS for number in range(4)]),
        "threat": (threat, [text.encode() for text in _OPEN_THREATS]),
        "toml": (toml, [*(text.encode() for text in _OPEN_TOML), *changed]),
        "accuracy-toml": (accuracy, [*(text.encode() for text in _OPEN_RECIPES), *changed]),
        "tradeoff-toml": (tradeoff, [*(text.encode() for text in studies), *changed]),
    }


def _assets(work: Path) -> dict[str, tuple[Target, list[bytes]]]:
    """Return the targets that unpack assets and load weights."""
    import numpy as np
    import torch

    import leakbench
    from leakbench.assets import archives
    from leakbench.datasets.mnist import read_idx
    from leakbench.models import weights

    def unpickled(data: bytes) -> None:
        archives.arrays(data, "a pickle")

    def archive(data: bytes) -> None:
        file = work / "archive"
        file.write_bytes(data)
        archives.read(file, ["wanted"], limit=2**16)

    def idx(data: bytes) -> None:
        file = work / "idx"
        file.write_bytes(data)
        read_idx(file)

    network = leakbench.models.parse("lenet").build((3, 32, 32), 10)

    def checkpoint(data: bytes) -> None:
        file = work / ("weights.safetensors" if data[:1] == b"s" else "weights.pt")
        file.write_bytes(data[1:])
        try:
            weights.stated(str(file))
        finally:
            weights.load(network, str(file))

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as opened:
        for name in ("folder/wanted", "wanted.gz", "../wanted"):
            member = tarfile.TarInfo(name)
            member.size = 5
            opened.addfile(member, io.BytesIO(b"hello"))
    plain = tar.getvalue()
    package = b"!<arch>\n" + b"data.tar.xz     0           0     0     100644  %-10d`\n" % len(lzma.compress(plain))
    packed = [plain, gzip.compress(plain), lzma.compress(plain), package + lzma.compress(plain)]
    pickles = [pickle.dumps(value, 2) for value in ({"labels": [1]}, np.zeros(3, np.uint8), [b"a"], print)]
    saved = io.BytesIO()
    torch.save(network.state_dict(), saved)
    weights.save(network, work / "sound.safetensors", stage="start", test_accuracy=0.1, dataset="samples")
    stored = [b"s" + (work / "sound.safetensors").read_bytes()[:2000], b"p" + saved.getvalue()[:2000]]
    digits = b"\x00\x00\x08\x01\x00\x00\x00\x02\x05\x06"
    return {
        "pickle": (unpickled, pickles),
        "archive": (archive, packed),
        "idx": (idx, [digits, b"\x00\x00\x08\x03" + bytes(11)]),
        "checkpoint": (checkpoint, stored),
    }


def _sound(work: Path) -> Path:
    """Return the folder of a small run, which is made where there is none."""
    import leakbench

    axes = {"attacks": ["grey", "ig(steps=1)"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}
    if not (work / "run").exists():
        leakbench.run(leakbench.Matrix(**axes, images=2, floors=False), work / "run", device="cpu")
    return work / "run"


def _documents(work: Path) -> dict[str, tuple[Target, list[bytes]]]:
    """Return the targets that read JSON: entries of leaderboards, and what trainings and their studies left."""
    from leakbench.analysis import pareto as utility
    from leakbench.leaderboard import entry as boards
    from leakbench.leaderboard import verify as leaderboard
    from leakbench.report import accuracy, tradeoff
    from leakbench.report import leaderboard as pages
    from leakbench.report.compare import published
    from leakbench.store.provenance import Provenance
    from leakbench.store.run_file import FILE, Store
    from leakbench.training import arm as arms
    from leakbench.training import run as trainings
    from leakbench.training import tradeoff as attacked
    from leakbench.training.files import RECORD, plain
    from leakbench.training.settings import Accuracy
    from leakbench.training.steps import Score
    from leakbench.training.thief import OWN, Theft

    run = _sound(work)
    with Store.open(run / FILE, readonly=True) as store:
        results = store.results()
        (known,), _ = boards.entries(store, "run")
    (arm,) = Accuracy(models=["lenet"], datasets=["samples"], defenses=["none"]).arms()
    score = Score(1.5, 3, 10)
    rounds = (arms.Round(1, 0.1, 2.0, (arms.View("global", score, score),), 0.5, ("client 2: it was tired",)),)
    stages = (arms.SavedStage("best", 1, "best.safetensors", 0.3),)
    outcome = arms.Outcome("ok", "", rounds, 1, stages, (Theft(OWN, (1, 2), 10),), 10)
    study = work / "study"
    folder = study / trainings.ARMS_FOLDER / arm.folder
    folder.mkdir(parents=True)
    record = plain(trainings.contents(arm, outcome, Provenance.collect("leakbench run accuracy", "cpu", "")))
    target = {"arm": arm.folder, "stage": "best", "model": "lenet", "defense": "none", "accuracy": 0.3}
    attacks = {"threshold": 0.6, "targets": [target]}
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    points = {"utility": "u", "leakage": "l", "points": [{"label": "none", "utility": value, "leakage": value}]}

    def document(data: bytes, sound: Any) -> bytes:
        """Return what begins with a brace as it is, and for anything else the sound document, altered."""
        return data if data[:1] == b"{" else json.dumps(altered(sound, data)).encode()

    def entry(data: bytes) -> None:
        file = work / "entry.json"
        file.write_bytes(document(data, known.model_dump(by_alias=True)))
        pages.check_lines(leaderboard.check(boards.read(file), run, sample=1, device="cpu"))

    def told() -> None:
        found = trainings.records(study)
        blocks = accuracy.blocks_of(found)
        accuracy.markdown(blocks, published(), "study")
        accuracy.csv(found)
        threshold, stated = attacked.targets_of(study)
        stages = tradeoff.attacked_stages(results, found, stated, threshold)
        tradeoff.studies(stages, threshold)

    def recorded(data: bytes) -> None:
        (study / attacked.TARGETS_FILE).write_text(json.dumps(attacks))
        (folder / RECORD).write_bytes(document(data, record))
        trainings.finished([arm], study)
        told()

    def targeted(data: bytes) -> None:
        (folder / RECORD).write_text(json.dumps(record))
        (study / attacked.TARGETS_FILE).write_bytes(document(data, attacks))
        told()

    def studied(data: bytes) -> None:
        file = work / utility.FILE
        file.write_bytes(document(data, points))
        found = utility.load(file)
        assert found is not None
        utility.front(found.points)

    changed = [b"0", b"1", b"22"]
    return {
        "entry": (entry, [*changed, known.model_dump_json(by_alias=True).encode()]),
        "record": (recorded, [*changed, json.dumps(record).encode()]),
        "targets": (targeted, [*changed, json.dumps(attacks).encode()]),
        "study": (studied, [*changed, json.dumps(points).encode()]),
    }


def _runs(work: Path) -> dict[str, tuple[Target, list[bytes]]]:
    """Return the targets that read a run file that was damaged, by its bytes or by the values in its tables."""
    import leakbench
    from leakbench.analysis.integrity import check
    from leakbench.leaderboard import entry as boards
    from leakbench.report import diff, show
    from leakbench.report import files as reports
    from leakbench.report.page import sentence
    from leakbench.store import merge
    from leakbench.store.run_file import FILE, Store

    run, hurt = _sound(work), work / "hurt"
    content = (run / FILE).read_bytes()
    with Store.open(run / FILE, readonly=True) as store:
        one, trials = diff.ComparedRun.of("sound", store), sorted(store.planned())

    def by_bytes(data: bytes) -> bytes:
        """Change bytes of a sound run file: six bytes a change, an offset and two values."""
        changed = bytearray(content)
        for start in range(0, min(len(data), 600) - 5, 6):
            at = int.from_bytes(data[start : start + 4], "little") % (len(changed) - 1)
            changed[at : at + 2] = data[start + 4 : start + 6]
        return bytes(changed)

    def by_values(data: bytes) -> bytes:
        """Put values of any kind into any column of a sound run file, and take rows and columns away."""
        file = work / "changed.sqlite"
        file.write_bytes(content)
        rng = random.Random(data)
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA ignore_check_constraints = ON")
            db.execute("PRAGMA foreign_keys = OFF")
            tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for _ in range(rng.randint(1, 4)):
                table = rng.choice(tables)
                column = rng.choice([row[1] for row in db.execute(f"PRAGMA table_info({table})")])
                (held,) = db.execute(f"SELECT {column} FROM {table} LIMIT 1").fetchone() or (None,)
                try:
                    if rng.random() < 0.1:
                        db.execute(f"DELETE FROM {table}")
                    elif rng.random() < 0.05:
                        db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
                    else:
                        where = rng.choice(["", f" WHERE rowid = {rng.randint(1, 4)}"])
                        db.execute(f"UPDATE {table} SET {column} = ?{where}", (_odd(held, data, rng),))
                except sqlite3.Error:  # what the file's own rules refuse
                    pass
        db.close()
        return file.read_bytes()

    def report(data: bytes) -> None:
        reports.write(hurt, [("md", "csv"), ("html",), ("latex",)][len(data) % 3])

    def compare(data: bytes) -> None:
        with Store.open(hurt / FILE, readonly=True) as store:
            show.show(store, trials[len(data) % len(trials)])
            diff.diff(one, diff.ComparedRun.of("hurt", store))
            boards.entries(store, "hurt")

    def examine(data: bytes) -> None:
        for line in sentence("run_check.j2", "lines", check(hurt), 10).split("\n"):
            if not line.isprintable():
                raise AssertionError(f"a line of check that is none: {line!r}")

    def unite(data: bytes) -> None:
        merged = work / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        try:
            merge.merge([hurt, run], merged, force=len(data) % 2 == 0)
        finally:
            if (merged / FILE).exists():
                check(merged)

    axes = {"attacks": ["grey"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"], "floors": False}

    def resume(data: bytes) -> None:
        leakbench.run(leakbench.Matrix(**axes, images=3), hurt, device="cpu")
        check(hurt)

    def target(damage: Callable[[bytes], bytes], then: Target) -> Target:
        def damaged(data: bytes) -> None:
            shutil.rmtree(hurt, ignore_errors=True)
            hurt.mkdir()
            (hurt / FILE).write_bytes(damage(data))
            then(data)

        return damaged

    uses = {"report": report, "compare": compare, "check": examine, "merge": unite, "resume": resume}
    damages = {"bytes": by_bytes, "values": by_values}
    start = {"bytes": [bytes(6), bytes(range(60))], "values": [b"1", b"a|b"]}
    names = [name for name in SHARES if name.partition("-")[0] in uses]
    parts = [(name, *name.split("-")) for name in names]
    return {name: (target(damages[kind], uses[use]), start[kind]) for name, use, kind in parts}


def _odd(held: object, data: bytes, rng: random.Random) -> object:
    """Return a value in the place of another; in the place of JSON, often JSON that was altered."""
    text = data.decode("utf-8", "replace")
    if isinstance(held, str) and held[:1] == "{" and rng.random() < 0.7:
        return json.dumps(altered(json.loads(held), data))
    return rng.choice([None, -1, 2**40, 1e308, float("nan"), "", "x", text, data, "{}", "[]", '{"a": 1}', "null"])


def tried(target: Target, data: bytes) -> None:
    """Call a target; a LeakbenchError is what it should raise, and must be one line."""
    from leakbench.errors import LeakbenchError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target(data)
        except LeakbenchError as error:
            if len(str(error).strip().splitlines()) != 1:
                raise AssertionError("an error of no line, or of several") from error


def _fuzz(name: str, runs: int, seed: int, out: Path) -> None:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["leakbench"]):
        importlib.import_module("leakbench.report.files")
    with tempfile.TemporaryDirectory() as folder, targets(Path(folder)) as known:
        target, start = known[name]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, data in enumerate(start):
            (corpus / str(number)).write_bytes(data)
        options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-timeout=300", "-rss_limit_mb=6000"]
        found = out / f"{name}-"
        atheris.Setup(
            [sys.argv[0], *options, f"-artifact_prefix={found}", str(corpus)], lambda data: tried(target, data)
        )
        atheris.Fuzz()


def _add(file: Path, target: str, inputs: int, seconds: float, found: int) -> None:
    """Add what was done to the figures in a file."""
    figures = json.loads(file.read_text()) if file.exists() else {}
    before = figures.get(target, {"inputs": 0, "seconds": 0, "found": 0})
    done = {"inputs": inputs, "seconds": round(seconds), "found": found}
    figures[target] = {name: before[name] + value for name, value in done.items()}
    file.write_text(json.dumps(figures, indent=2) + "\n")


def main() -> int:
    """Fuzz every target, or one; print how many inputs each had and what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=SHARES, help="one target alone")
    parser.add_argument("--runs", type=int, default=sum(SHARES.values()), help="inputs in all")
    parser.add_argument("--seed", type=int, default=1, help="from 1")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where inputs are kept that break a target")
    parser.add_argument("--figures", type=Path, help="a JSON file to which what was done is added, by target")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.here:
        _fuzz(given.target, given.runs, given.seed, given.out)
    names = [given.target] if given.target else list(SHARES)
    whole = sum(SHARES[name] for name in names)
    print(f"{'target':<14} {'inputs':>10} {'seconds':>8}  found", flush=True)
    total, broken = 0, 0
    for name in names:
        runs = max(1, given.runs * SHARES[name] // whole)
        begun = time.monotonic()
        command = [sys.executable, __file__, "--here", "--target", name, "--runs", str(runs), "--seed", str(given.seed)]
        with (given.out / f"{name}.log").open("w") as log:
            code = subprocess.run([*command, "--out", str(given.out)], stdout=log, stderr=log).returncode
        text = (given.out / f"{name}.log").read_text(errors="replace")
        counts = [int(count) for count in re.findall(r"^#(\d+)", text, re.MULTILINE)]
        done = max(counts, default=0)
        total, broken = total + done, broken + (code != 0)
        seconds = time.monotonic() - begun
        if given.figures is not None:
            _add(given.figures, name, done, seconds, int(code != 0))
        found = "nothing" if code == 0 else f"exit code {code}: see {given.out / name}.log"
        print(f"{name:<14} {done:>10,} {seconds:>8.0f}  {found}", flush=True)
    print(f"{'in all':<14} {total:>10,}           {broken} targets broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
