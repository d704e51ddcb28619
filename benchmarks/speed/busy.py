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
from statistics import median
from typing import Any

from benchmarks.speed import machine

OUT = machine.ROOT / "reports" / "speed"
WORKS = (("lenet", 32, 600), ("resnet20", 16, 20))
"""Model, trials, and iterations."""
SETTINGS = ((1, 1, "default"), (1, 2, "default"), (1, 2, "passive"), (2, 1, "passive"))
"""Processes that share the trials, their threads, and how these wait.

By default, OpenMP's threads look for work for some milliseconds. ``passive`` (``OMP_WAIT_POLICY``) is what the command
line sets, and two processes of one thread are what ``--workers 2`` starts.
"""
FIELDS = ("model", "trials", "steps", "processes", "threads", "policy")
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


def measure(model: str, trials: int, steps: int, processes: int, threads: int, policy: str) -> float:
    """Return the same, measured in processes of their own, each with its share of the trials, and added up."""
    command = [sys.executable, "-m", "benchmarks.speed.busy", "--one", model]
    command += map(str, (trials // processes, steps, threads))
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    own |= {"OMP_NUM_THREADS": str(threads)} | ({} if policy == "default" else {"OMP_WAIT_POLICY": policy})
    running = [
        subprocess.Popen(command, cwd=machine.ROOT, env=own, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return sum(float(one.communicate()[0]) for one in running)


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
            "processes": processes,
            "threads": threads,
            "policy": policy,
            "alone": [],
            "beside": [],
        }
        for model, trials, steps in WORKS
        for processes, threads, policy in SETTINGS
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
        f"IG, trials x iterations a second, median of {ROUNDS} rounds, alone and beside {data['others']} processes "
        f"that never rest; {about['cores']} cores of {about['processor']}, torch {about['torch']}, "
        f"commit {about['commit']}. Written by `python -m benchmarks.speed.busy`. The command line "
        "sets passive waiting.",
        "",
        "| network | trials | processes | threads of each | waiting | alone | beside | kept |",
        "|:--|--:|--:|--:|:--|--:|--:|--:|",
    ]
    for row in data["rows"]:
        alone, beside = median(row["alone"]), median(row["beside"])
        cells = [row["model"], row["trials"], row["processes"], row["threads"], row["policy"]]
        cells += [f"{alone:,.0f}", f"{beside:,.0f}", f"{100 * beside / alone:.0f} %"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
