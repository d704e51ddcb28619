"""The provenance of a session of a run: versions, commit, device, command."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sqlite3
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from pydantic import TypeAdapter

from leakbench.version import __version__

PACKAGES = ("torch", "torchvision", "numpy", "pandas", "lpips", "piq", "nevergrad")


@dataclass(frozen=True)
class Provenance:
    """The provenance of a session of a run.

    Attributes:
        commit: the commit of the leakbench checkout, or None if leakbench was installed.
        dirty: whether the checkout held uncommitted changes; None without a checkout.
        packages: name -> version of the installed packages that the numbers depend on.
        threads: CPU threads that torch uses.
        command: the command line.
        matrix: the matrix as JSON.
        shard: ``i/n``, or empty for the whole matrix.
        workers: the number of processes.
        salt: of the run's keys (``core.rng.salted``); empty in runs of before there were salts.
    """

    version: str
    commit: str | None
    dirty: bool | None
    packages: Mapping[str, str]
    python: str
    device: str
    threads: int
    command: str
    matrix: str
    shard: str = ""
    workers: int = 1
    salt: str = ""

    @classmethod
    def collect(
        cls, command: str, device: str, matrix: str, shard: str = "", workers: int = 1, salt: str = ""
    ) -> Provenance:
        """Return the provenance of this process; ``matrix`` is JSON."""
        commit, dirty = _checkout(Path(__file__).resolve().parents[2])
        return cls(
            version=__version__,
            commit=commit,
            dirty=dirty,
            packages={name: version for name in PACKAGES if (version := _package_version(name)) is not None},
            python=platform.python_version(),
            device=device,
            threads=torch.get_num_threads(),
            command=command,
            matrix=matrix,
            shard=shard,
            workers=workers,
            salt=salt,
        )

    @property
    def code(self) -> str:
        """The version of leakbench, its commit and whether it was changed, in words."""
        commit = "no checkout" if self.commit is None else f"commit {self.commit[:12]}"
        return f"leakbench {self.version} ({commit}{' with uncommitted changes' if self.dirty else ''})"

    def describe(self) -> dict[str, str]:
        """Return what the numbers depend on, in words: ``versions``, ``packages`` and ``device``."""
        return {
            "versions": f"{self.code}, Python {self.python}",
            "packages": ", ".join(f"{name} {version}" for name, version in self.packages.items()) or "none",
            "device": f"{self.device}, {self.threads} CPU threads",
        }

    @classmethod
    def of(cls, row: sqlite3.Row) -> Provenance:
        """Return the provenance in a row of the table ``sessions``; raise ValueError if ``packages`` is malformed."""
        values = {"commit": row["commit_id"], **{name: row[name] for name in _NAMES - {"commit"}}}
        dirty = None if row["dirty"] is None else bool(row["dirty"])
        return cls(**{**values, "dirty": dirty, "packages": _PACKAGES.validate_json(row["packages"])})

    def columns(self) -> dict[str, object]:
        """Return the columns of the table ``sessions`` that hold it."""
        values = {name: getattr(self, name) for name in _NAMES - {"commit"}}
        return {**values, "commit_id": self.commit, "packages": json.dumps(dict(self.packages), sort_keys=True)}


_NAMES = {field.name for field in fields(Provenance)}
_PACKAGES = TypeAdapter(dict[str, str])


def _checkout(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the checkout at this folder and whether it is dirty; None twice if it is not a checkout."""
    if not (folder / ".git").exists():
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if commit is None or status is None else bool(status)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
