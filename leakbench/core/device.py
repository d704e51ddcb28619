"""Devices: by name, and how much of their memory is free."""

from pathlib import Path

import psutil
import torch

from leakbench.errors import BadOption

DEFAULT = {"cpu": 32, "cuda": 256}
"""Trials at a time for an attack that cannot be measured."""


SHARE = 0.5
"""The part of the free memory that a chunk may take."""


_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")


def free_memory(device: torch.device) -> int:
    """Return how many bytes can be taken on a device; on the CPU a container's limit counts."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    try:
        limit, current = (Path(path).read_text().strip() for path in _GROUPS)
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(current))


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had."""
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "not enough memory" in text
        or "can't allocate memory" in text
    )


def device_named(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is CUDA if there is one.

    Raises:
        BadOption: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in DEFAULT:
        raise BadOption(f"device {name!r} is not known; write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadOption(f"device {name!r} was asked for, and torch finds no CUDA device; write --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadOption(f"device {name!r} does not exist; there are {torch.cuda.device_count()} CUDA devices")
    return device
