"""Feed the readers of files and specs with hostile bytes: only a LeakbenchError may come out.

    python tools/fuzz.py                      every target, 1,000,000 inputs in all (about half an hour on one core)
    python tools/fuzz.py --target toml --runs 5000 --seed 3

Each target runs in a process of its own under atheris (libFuzzer with coverage of this package); an input that makes
anything else come out is kept in ``--out``, and the command exits with 1. Needs the extra ``fuzz``.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import io
import lzma
import pickle
import random
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHARES = {
    "spec": 400_000,
    "threat": 150_000,
    "toml": 150_000,
    "pickle": 150_000,
    "archive": 60_000,
    "idx": 60_000,
    "checkpoint": 25_000,
    "run-bytes": 3_000,
    "run-values": 2_000,
}
"""How many of a million inputs each target gets: the cheap ones more."""

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


@contextmanager
def targets(work: Path) -> Iterator[dict[str, tuple[Target, list[bytes]]]]:
    """Yield name -> (a function of bytes that raises LeakbenchError alone, inputs to start from).

    Args:
        work: a folder for the files that the readers are given.
    """
    import numpy as np

    import leakbench
    from leakbench import matrix as matrices
    from leakbench.assets import archives
    from leakbench.attacks.base import registry as attacks
    from leakbench.datasets.base import registry as datasets
    from leakbench.datasets.mnist import read_idx
    from leakbench.defenses.base import registry as defenses
    from leakbench.models import weights
    from leakbench.models.base import registry as models
    from leakbench.report import files as reports
    from leakbench.store import FILE

    def spec(data: bytes) -> None:
        registry = (attacks, defenses, models, datasets)[data[0] % 4 if data else 0]
        registry.parse(data[1:].decode("utf-8", "surrogateescape"))  # type: ignore[attr-defined]

    def threat(data: bytes) -> None:
        matrices.parse_threat(data.decode("utf-8", "surrogateescape"))

    def toml(data: bytes) -> None:
        file = work / "matrix.toml"
        file.write_bytes(data)
        for axes in matrices.expand(matrices.load(file)):
            matrices.Matrix(**axes).describe()

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

    axes = {"attacks": ["grey"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}
    leakbench.run(leakbench.Matrix(**axes, images=2), work / "run")
    sound = (work / "run" / FILE).read_bytes()
    hurt = work / "hurt"
    hurt.mkdir()

    def run_bytes(data: bytes) -> None:
        """Change bytes of a sound run file: six bytes a change, an offset and two values."""
        content = bytearray(sound)
        for start in range(0, min(len(data), 600) - 5, 6):
            at = int.from_bytes(data[start : start + 4], "little") % (len(content) - 1)
            content[at : at + 2] = data[start + 4 : start + 6]
        (hurt / FILE).write_bytes(content)
        reports.write(hurt)

    def run_values(data: bytes) -> None:
        """Put values of any kind into any column of a sound run file, and take rows and columns away."""
        (hurt / FILE).write_bytes(sound)
        rng = random.Random(data)
        with sqlite3.connect(hurt / FILE) as db:
            db.execute("PRAGMA ignore_check_constraints = ON")
            db.execute("PRAGMA foreign_keys = OFF")
            tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for _ in range(rng.randint(1, 4)):
                table = rng.choice(tables)
                column = rng.choice([row[1] for row in db.execute(f"PRAGMA table_info({table})")])
                text = data.decode("utf-8", "replace")
                values = [None, -1, 2**40, 1e308, float("nan"), "", "x", text, data, "{}", "[]", '{"a": 1}', "null"]
                try:
                    if rng.random() < 0.1:
                        db.execute(f"DELETE FROM {table}")
                    elif rng.random() < 0.05:
                        db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
                    else:
                        db.execute(f"UPDATE {table} SET {column} = ?", (rng.choice(values),))
                except sqlite3.Error:  # what the file's own rules refuse
                    pass
        db.close()
        reports.write(hurt)

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
    import torch

    torch.save(network.state_dict(), saved)
    weights.save(network, work / "sound.safetensors", stage="start", test_accuracy=0.1, dataset="samples")
    stored = [b"s" + (work / "sound.safetensors").read_bytes()[:2000], b"p" + saved.getvalue()[:2000]]
    digits = b"\x00\x00\x08\x01\x00\x00\x00\x02\x05\x06"
    yield {
        "spec": (spec, [bytes([number]) + text.encode() for text in _OPEN_SPECS for number in range(4)]),
        "threat": (threat, [text.encode() for text in _OPEN_THREATS]),
        "toml": (toml, [text.encode() for text in _OPEN_TOML]),
        "pickle": (unpickled, pickles),
        "archive": (archive, packed),
        "idx": (idx, [digits, b"\x00\x00\x08\x03" + bytes(11)]),
        "checkpoint": (checkpoint, stored),
        "run-bytes": (run_bytes, [bytes(6), bytes(range(60))]),
        "run-values": (run_values, [b"1", b"a|b"]),
    }


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
        options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-timeout=60", "-rss_limit_mb=6000"]
        found = out / f"{name}-"
        atheris.Setup(
            [sys.argv[0], *options, f"-artifact_prefix={found}", str(corpus)], lambda data: tried(target, data)
        )
        atheris.Fuzz()


def main() -> int:
    """Fuzz every target, or one; print how many inputs each had and what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=SHARES, help="one target alone")
    parser.add_argument("--runs", type=int, default=sum(SHARES.values()), help="inputs in all")
    parser.add_argument("--seed", type=int, default=1, help="from 1")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where inputs are kept that break a target")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.here:
        _fuzz(given.target, given.runs, given.seed, given.out)
    names = [given.target] if given.target else list(SHARES)
    whole = sum(SHARES[name] for name in names)
    print(f"{'target':<12} {'inputs':>10} {'seconds':>8}  found", flush=True)
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
        found = "nothing" if code == 0 else f"exit code {code}: see {given.out / name}.log"
        print(f"{name:<12} {done:>10,} {time.monotonic() - begun:>8.0f}  {found}", flush=True)
    print(f"{'in all':<12} {total:>10,}           {broken} targets broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
