"""How many trials to run at a time: as many as fit into memory, and no more than make each of them cheaper."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from leakbench.core.device import SHARE, free_memory, out_of_memory
from leakbench.core.malloc import release_freed_memory

LARGEST = {"cpu": 256, "cuda": 4096}
FEWEST = 8
"""Up to this many trials always run together where they fit: a clock cannot tell what less would gain."""
GAIN = 0.9
"""A larger chunk is taken for a time per trial of less than this part of the smaller one's."""
LIMIT = 10.0
"""Seconds after which no larger chunk is tried."""


def choose(step: Callable[[int], int | None], trials: int, device: torch.device, share: float = SHARE) -> int:
    """Return how many of ``trials`` trials to run at a time, from short measurements with 1, 2, 4, ... trials.

    Args:
        step: does a small, typical piece of the work for so many trials, and returns how many bytes the whole work
            holds beside what that piece needs (``Attack.probe``).
        trials: how many there are.
        device: where the work runs.
        share: the part of the free memory that they may take.
    """
    begin = time.perf_counter()
    best, best_cost = 1, float("inf")
    size, idle = 1, 0
    while size <= min(trials, LARGEST[device.type]):
        free = free_memory(device)
        try:
            seconds, used = _measure(step, size, device)
        except Exception as error:
            if not out_of_memory(error):
                raise
            break
        if size > 1 and used > share * free:
            break
        cost = seconds / size
        if size <= FEWEST or cost < GAIN * best_cost:
            best, best_cost, idle = size, cost, 0
        else:
            idle += 1
        late = size >= FEWEST and time.perf_counter() - begin > LIMIT
        if idle == 2 or late or 2 * used > share * free:
            break
        size = trials if size < trials < 2 * size else 2 * size
    pieces = -(-trials // best)
    return -(-trials // pieces)


def _measure(step: Callable[[int], int | None], size: int, device: torch.device) -> tuple[float, int]:
    """Return the seconds and the most bytes that a step of this size takes, after one to warm up."""
    held = step(size) or 0
    begin = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        step(size)
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated(device) - before + held
    process = psutil.Process()
    release_freed_memory()
    begin = time.perf_counter()
    before = process.memory_info().rss
    step(size)
    # the highest that the process has ever been is at least what this step needed
    return time.perf_counter() - begin, max(0, _peak() - before) + held


def _peak() -> int:
    """Return the largest resident size that this process has had, in bytes; where that is unknown, the present one."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024
