"""Speed beside other processes: ``python -m benchmarks.speed.busy`` writes reports/speed/busy.md.

IG on two networks, alone and beside processes that never rest, by threads and by how threads wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed import machine

OUT = machine.ROOT / "reports" / "speed"
WORKS = (("lenet", 32, 60), ("resnet20", 16, 6))
"""Model, trials, and iterations."""
SETTINGS = ((1, "active"), (2, "active"), (2, "passive"))
"""Threads, and how they wait (``OMP_WAIT_POLICY``); ``passive`` is what the command line sets."""
FIELDS = ("model", "trials", "steps", "threads", "policy")
OTHERS = 2
ROUNDS = 3
SPIN = "while True: pass"


def one(model: str, trials: int, steps: int, threads: int) -> float:
    """Return the trials x iterations a second of IG in this process."""
    import torch

    import leakbench
    from benchmarks.speed.measure import clock
    from benchmarks.speed.work import scene

    torch.set_num_threads(threads)
    where = scene("ig", model, trials, 32, "cpu")

    def run(steps: int) -> float:
        return clock(lambda: leakbench.attack(f"ig(steps={steps})", where.observation, seed=0), where.device)

    run(2)
    return trials * steps / (run(2 + steps) - run(2))


def measure(model: str, trials: int, steps: int, threads: int, policy: str) -> float:
    """Return the same, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.busy", "--one", model, *map(str, (trials, steps, threads))]
    own = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(threads)}
    found = subprocess.run(command, cwd=machine.ROOT, env=own, capture_output=True, text=True, check=True)
    return float(found.stdout)


def main() -> None:
    """Measure alone and beside others in turn, and write data and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.busy", description=__doc__.split("\n")[0])
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "TRIALS", "STEPS", "THREADS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    if chosen.one:
        print(one(chosen.one[0], *map(int, chosen.one[1:])))
        return
    rows: list[dict[str, Any]] = [
        {
            "model": model,
            "trials": trials,
            "steps": steps,
            "threads": threads,
            "policy": policy,
            "alone": [],
            "beside": [],
        }
        for model, trials, steps in WORKS
        for threads, policy in SETTINGS
    ]
    for _ in range(ROUNDS):
        for kind, count in (("alone", 0), ("beside", OTHERS)):
            others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
            try:
                for row in rows:
                    row[kind].append(measure(*(row[key] for key in FIELDS)))
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    data = {"machine": machine.describe("cpu"), "others": OTHERS, "rows": rows}
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "busy.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (chosen.out / "busy.md").write_text(page(data), encoding="utf-8")
    print(page(data))


def page(data: dict[str, Any]) -> str:
    """Return the page of the measurements."""
    about = data["machine"]
    lines = [
        "# Speed beside other processes",
        "",
        f"IG, trials x iterations a second, best of {ROUNDS}, alone and beside {data['others']} processes that never "
        f"rest; {about['cores']} cores of {about['processor']}, torch {about['torch']}, "
        f"commit {about['commit']}. Written by `python -m benchmarks.speed.busy`. The command line "
        "sets passive waiting.",
        "",
        "| network | trials | threads | waiting | alone | beside | kept |",
        "|:--|--:|--:|:--|--:|--:|--:|",
    ]
    for row in data["rows"]:
        alone, beside = max(row["alone"]), max(row["beside"])
        cells = [row["model"], row["trials"], row["threads"], row["policy"]]
        cells += [f"{alone:,.0f}", f"{beside:,.0f}", f"{100 * beside / alone:.0f} %"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
