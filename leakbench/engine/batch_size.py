"""The number of trials to run at a time: as many as fit into memory and make each trial cheaper."""

import time
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from torch import Tensor

from leakbench.attacks import Attack
from leakbench.core.device import SHARE, accelerator, free_memory, out_of_memory
from leakbench.core.malloc import release_freed_memory
from leakbench.core.rng import Rng
from leakbench.observation import Observation

LARGEST_CHUNK = {"cpu": 256, "cuda": 4096}
"""The largest number of trials at a time, by device."""
ALWAYS_TOGETHER = 8
"""Up to this many trials run together if they fit: below this size timing noise exceeds the gain."""
COST_RATIO = 0.9
"""A larger chunk is chosen if its time per trial is below this times the smaller one's."""
MAX_SECONDS = 10.0
"""After this time no larger chunk is tried."""


def choose(step: Callable[[int], int | None], trials: int, device: torch.device, share: float = SHARE) -> int:
    """Return how many of ``trials`` trials to run at a time, from short measurements with 1, 2, 4, ... trials.

    Args:
        step: does a small, typical piece of the work for a number of trials, and returns how many bytes the whole
            work holds beyond the memory of that piece (``Attack.probe``).
        trials: how many there are.
        device: where the work runs.
        share: the part of the free memory that they may take.
    """
    begin = time.perf_counter()
    best, best_cost = 1, float("inf")
    size, idle = 1, 0
    while size <= min(trials, LARGEST_CHUNK[device.type]):
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
        if size <= ALWAYS_TOGETHER or cost < COST_RATIO * best_cost:
            best, best_cost, idle = size, cost, 0
        else:
            idle += 1
        slow = size >= ALWAYS_TOGETHER and time.perf_counter() - begin > MAX_SECONDS
        if idle == 2 or slow or 2 * used > share * free:
            break
        size = trials if size < trials < 2 * size else 2 * size
    pieces = -(-trials // best)
    return -(-trials // pieces)


def chunk_size(attack: Attack, observation: Observation, own: bool, trials: int, share: float) -> int | None:
    """Return how many trials of an attack to run at a time, by measurement; None if it cannot be measured.

    Args:
        attack: the attack.
        observation: of one trial, a blank image.
        own: whether each trial has its own weights.
        trials: how many there are.
        share: the part of the free memory that they may take.
    """

    def step(trials: int) -> int | None:
        rng = Rng(tuple(f"probe {trial}" for trial in range(trials)), observation.device)
        return attack.measure(repeated(observation, trials, own), rng)

    return None if step(1) is None else choose(step, trials, observation.device, share)


def repeated(blank: Observation, trials: int, own: bool) -> Observation:
    """Return the observation of one trial as one of many, each with its ``own`` weights or all with the same."""
    parameters = {name for name, _ in blank.model.named_parameters()}

    def repeat(value: Tensor, copy: bool) -> Tensor:
        rows = value.expand(trials, *value.shape[1:])
        return rows.contiguous() if copy else rows

    return replace(
        blank,
        weights={name: repeat(value, own) if name in parameters else value for name, value in blank.weights.items()},
        gradient={name: repeat(value, True) for name, value in blank.gradient.items()},
        labels=None if blank.labels is None else blank.labels.expand(trials, *blank.labels.shape[1:]),
        counts=None if blank.counts is None else blank.counts.expand(trials, -1),
        order=tuple(rows.expand(trials, -1) for rows in blank.order),
        statistics={name: value.expand(trials, -1) for name, value in blank.statistics.items()},
    )


def _measure(step: Callable[[int], int | None], size: int, device: torch.device) -> tuple[float, int]:
    """Return the seconds and the peak memory in bytes of a step of this size, after a first one to warm up."""
    held = step(size) or 0
    if (module := accelerator(device)) is not None:
        module.synchronize(device)
        before = module.memory_allocated(device)
        module.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        step(size)
        module.synchronize(device)
        return time.perf_counter() - begin, module.max_memory_allocated(device) - before + held
    release_freed_memory()
    begin = time.perf_counter()
    before = psutil.Process().memory_info().rss
    step(size)
    # the peak of the process so far is an upper bound of the peak of this step
    return time.perf_counter() - begin, max(0, _peak() - before) + held


def _peak() -> int:
    """Return the peak resident size of this process in bytes, or the present one if the peak is unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if psutil.MACOS else peak * 1024
