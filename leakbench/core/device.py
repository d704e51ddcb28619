"""Devices: by name, and how much of their memory is free.

A device other than the CPU is used through torch's module of its kind (``torch.cuda``), so that this package names no
kind where it can be avoided.
"""

from pathlib import Path
from types import ModuleType

import psutil
import torch

from leakbench.errors import BadOption

DEFAULT = {"cpu": 32, "cuda": 256}
"""Trials at a time for an attack that cannot be measured, by the kinds of device that are known."""

SHARE = 0.5
"""The part of the free memory that a chunk may take."""


_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")


def accelerator(device: torch.device) -> ModuleType | None:
    """Return torch's module of a device's kind, such as ``torch.cuda``; None for the CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device)


def empty_cache(device: torch.device) -> None:
    """Give memory back that torch keeps for later tensors of a device; nothing on the CPU."""
    if (module := accelerator(device)) is not None:
        module.empty_cache()


def make_current(device: torch.device) -> None:
    """Make a device the current one of this thread, so that nothing is prepared on another; nothing on the CPU."""
    if (module := accelerator(device)) is not None and device.index is not None:
        module.set_device(device)


def all_of(device: torch.device) -> list[torch.device]:
    """Return every device that is meant: this one, or all of its kind if it has no index."""
    module = accelerator(device)
    if module is None or device.index is not None:
        return [device]
    return [torch.device(device.type, index) for index in range(module.device_count())]


def free_memory(device: torch.device) -> int:
    """Return how many bytes can be taken on a device; on the CPU a container's limit counts."""
    if (module := accelerator(device)) is not None:
        free, _ = module.mem_get_info(device)
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
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
    if (module := accelerator(device)) is None:
        return device
    kind = device.type.upper()
    if not module.is_available():
        raise BadOption(f"device {name!r} was asked for, and torch finds no {kind} device; write --device cpu")
    if (device.index or 0) >= module.device_count():
        raise BadOption(f"device {name!r} does not exist; there are {module.device_count()} {kind} devices")
    return device
