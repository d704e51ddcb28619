"""On what, with what and when a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import torch
import torchvision

import leakbench
from benchmarks.speed import peer

ROOT = Path(__file__).resolve().parents[2]


class Machine(TypedDict):
    """What a reader needs to know to judge a measurement."""

    device: str
    processor: str
    cores: int
    threads: int
    memory_gib: float | None
    load: list[float]
    system: str
    python: str
    torch: str
    torchvision: str
    leakbench: str
    breaching: str | None
    commit: str
    date: str


def describe(device: str) -> Machine:
    """Return the machine as it is now; ``load`` is the average of the last 1, 5 and 15 minutes."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1) if pages else None,
        "load": load(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "leakbench": leakbench.__version__,
        "breaching": None if peer.available() else peer.version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load() -> list[float]:
    """Return the average number of runnable processes over the last 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Return the last commit that changed what is measured, with ``+`` where files differ; ``unknown`` outside git."""
    try:
        return _git("log", "-1", "--format=%h") + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    """Return what git says of the package and its benchmark."""
    command = ["git", *words, "--", "leakbench", "benchmarks/speed"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
