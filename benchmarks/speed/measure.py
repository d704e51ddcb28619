"""Interleaved measurements: in every round each subject has its turn, and the order of turns rotates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch


class Times(TypedDict):
    """The seconds of one subject, in each round.

    Attributes:
        trials: how many trials a run does.
        short: iterations of the shorter run.
        long: iterations of the longer run.
        short_s: seconds of each shorter run.
        long_s: seconds of each longer run.
    """

    trials: int
    short: int
    long: int
    short_s: list[float]
    long_s: list[float]


@dataclass(frozen=True)
class Subject:
    """Something that is timed: ``run(steps)`` does ``steps`` iterations of ``trials`` trials."""

    name: str
    trials: int
    short: int
    long: int
    run: Callable[[int], object]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes, to the end of its work on the device."""
    synchronise(device)
    begun = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begun


def peak_rate(device: torch.device, side: int | None = None) -> float:
    """Return the float32 operations a second of the best library: a matrix product or a convolution (median of 5)."""
    gpu = device.type == "cuda"
    side, images = side or (8192 if gpu else 1024), 1024 if gpu else 16
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    x, weight = torch.rand(images, 64, 32, 32, device=device), torch.rand(64, 64, 3, 3, device=device)
    works: list[tuple[float, Callable[[], object]]] = [
        (2 * side**3, lambda: torch.mm(a, b)),
        (2 * images * 32**2 * 64**2 * 9, lambda: torch.conv2d(x, weight, padding=1)),
    ]
    rates = []
    for count, call in works:
        call()
        rates.append(count / statistics.median(clock(call, device) for _ in range(5)))
    return max(rates)


def interleave(
    subjects: Sequence[Subject], rounds: int, device: torch.device, rate: Callable[[torch.device], float] = peak_rate
) -> tuple[dict[str, Times], list[float]]:
    """Return each subject's times and, for each round, the rate of the best library measured beside them.

    A shorter run before the first round warms every subject up and is not counted.
    """
    times: dict[str, Times] = {
        s.name: {"trials": s.trials, "short": s.short, "long": s.long, "short_s": [], "long_s": []} for s in subjects
    }
    for subject in subjects:
        subject.run(subject.short)
    rates = []
    for turn in range(rounds):
        first = turn % len(subjects)
        rates.append(rate(device))
        for subject in [*subjects[first:], *subjects[:first]]:
            times[subject.name]["short_s"].append(clock(lambda: subject.run(subject.short), device))  # noqa: B023
            times[subject.name]["long_s"].append(clock(lambda: subject.run(subject.long), device))  # noqa: B023
    return times, rates


def per_iteration(times: Times) -> list[float | None]:
    """Return, for each round, the seconds of one iteration of one trial; None where noise hid it.

    What a run costs once, whatever its length, is not in the difference between a longer and a shorter run.
    """
    count = times["trials"] * (times["long"] - times["short"])
    return [(b - a) / count if b > a else None for a, b in zip(times["short_s"], times["long_s"])]


def set_up(times: Times) -> float | None:
    """Return the seconds that a run costs once, whatever its length (median over rounds)."""
    each = [
        max(0.0, a - one * times["trials"] * times["short"])
        for a, one in zip(times["short_s"], per_iteration(times))
        if one is not None
    ]
    return statistics.median(each) if each else None


def median(values: Sequence[float | None]) -> float | None:
    """Return the median of what is there, or None."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the ratio of medians, and the least and the largest ratio of a round."""

    value: float
    low: float
    high: float


def ratio(slow: Sequence[float | None], fast: Sequence[float | None]) -> Ratio | None:
    """Return by how much ``fast`` beats ``slow``, given the seconds of both in the same rounds."""
    rounds = [a / b for a, b in zip(slow, fast) if a is not None and b is not None]
    above, below = median(slow), median(fast)
    if not rounds or above is None or below is None:
        return None
    return Ratio(above / below, min(rounds), max(rounds))
