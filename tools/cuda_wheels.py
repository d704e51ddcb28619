"""What leakbench and its tests need on a machine that has only torch and torchvision: a line NAME==VERSION each.

``python tools/cuda_wheels.py [NAME ...]`` leaves out what that machine has as well. Names are those of the dependencies
in ``pyproject.toml`` and of their own dependencies; versions are those of this environment, which go together.
"""

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
PRESENT = ("torch", "torchvision")
"""What the machine has, with what these need."""
NEWER = ("typing-extensions",)
"""What these need as well, but other packages a newer version of it."""
TESTS = ("pytest", "hypothesis")
"""What the tests need that ``make cuda-check`` runs."""
MACHINE = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux"}
"""For conditions of dependencies."""


def needed(names: Iterable[str]) -> set[str]:
    """Return the packages of these requirements, and all that they need."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate(MACHINE)):
            continue
        found.add(name)
        try:
            waiting += [Requirement(line) for line in importlib.metadata.requires(name) or ()]
        except importlib.metadata.PackageNotFoundError:
            continue  # torch needs packages of CUDA that are not here
    return found


def wheels(have: Iterable[str] = ()) -> list[str]:
    """Return the packages that are missing there, sorted.

    Args:
        have: further packages that the machine has.
    """
    own = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    missing = needed([*own, *TESTS]) - needed(PRESENT) | set(NEWER)
    return sorted(missing - {canonicalize_name(name) for name in have})


if __name__ == "__main__":
    for package in wheels(sys.argv[1:]):
        print(f"{package}=={importlib.metadata.version(package)}")
