"""The peak memory of one attack in a process of its own.

``python -m benchmarks.speed.memory ig lenet 64 32 5 cpu``: attack, model, trials, side, steps, device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def resident(kind: str) -> int:
    """Return the resident size of this process in bytes: ``VmRSS`` now, ``VmHWM`` its largest so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts the process that started this one
        (line,) = [line for line in status.read_text().splitlines() if line.startswith(kind)]
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(arguments: list[str]) -> None:
    """Run one attack by leakbench, and print the bytes that it took beyond importing torch."""
    imported = resident("VmRSS")
    from benchmarks.speed.work import LEAKBENCH, Work, runner, scene

    attack, model, trials, side, steps, device = arguments
    work = Work(attack, model, int(trials), 1, int(steps), int(side))  # type: ignore[arg-type]
    where = scene(work.attack, work.model, work.trials, work.side, device)
    runner(LEAKBENCH, work, where)(work.long)
    taken = resident("VmHWM") - imported
    result = {"process": taken, "device": torch.cuda.max_memory_allocated() if device == "cuda" else None}
    print(json.dumps(result))


def of(attack: str, model: str, trials: int, side: int, steps: int, device: str) -> dict[str, int | None]:
    """Return the bytes beyond importing torch, of the process and, on CUDA, of the device.

    Raises:
        RuntimeError: the process failed; the message ends with what it said last.
    """
    return in_process("benchmarks.speed.memory", attack, model, *map(str, (trials, side, steps)), device)


def in_process(module: str, *arguments: str, threads: int | None = None) -> Any:
    """Return what a module prints last, JSON, in a process of its own; with so many threads, if given.

    Raises:
        RuntimeError: the process failed; the message ends with what it said last.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}: {said[-1] if said else 'nothing'}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
