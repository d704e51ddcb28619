"""How leakbench scales: ``python -m benchmarks.scale`` measures it into ``reports/scale``, on a quiet machine."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.scale import page

ROOT = Path(__file__).resolve().parents[2]


def measured(*call: str) -> dict[str, float]:
    """Run one measurement in a process of its own, and return its figures."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale.measure", *call], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def start_up(times: int = 7) -> dict[str, float]:
    """Return the seconds of ``leakbench --help``: the least and the median."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "leakbench", "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - begin)
    return {"least": min(seconds), "median": sorted(seconds)[len(seconds) // 2]}


def main(arguments: Sequence[str]) -> None:
    """Measure, and write ``figures.json`` and ``README.md``, or the latter alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--trials", type=int, default=100_000, help="trivial trials; a multiple of 1,000")
    parser.add_argument("--images", type=int, default=32, help="images a cell where workers are compared")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "scale")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the figures again")
    chosen = parser.parse_args(arguments)
    if chosen.page:
        print(page.write(chosen.out))
        return
    if chosen.trials < 1000 or chosen.trials % 1000:
        parser.error(f"--trials {chosen.trials} does not fit; give a multiple of 1,000")
    figures: dict[str, object] = {
        "command": shlex.join(["python", "-m", "benchmarks.scale", *arguments]),
        "cpus": psutil.cpu_count(),
        "load": psutil.getloadavg()[0],
        "help": start_up(),
        "workers": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        by_workers = {
            str(workers): measured("workers", f"{folder}/{workers}", str(workers), str(chosen.images))
            for workers in chosen.workers
        }
        figures["workers"] = by_workers
        figures["trivial"] = measured("trivial", f"{folder}/trivial", str(chosen.trials))
        figures["report"] = measured("report", f"{folder}/trivial")
        figures["check"] = measured("check", f"{folder}/trivial")
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(page.write(chosen.out))


if __name__ == "__main__":
    main(sys.argv[1:])
