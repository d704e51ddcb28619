"""The files of a training: its state after the last finished round, its checkpoints, and the record of its numbers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from leakbench.core.files import draft
from leakbench.errors import CorruptAsset, LeakbenchError, one_line

RECORD = "record.json"
"""What came of an arm, in the arm's folder."""
STATE = "state.pt"
"""Where a training goes on."""
_DRAFT = re.compile(r"\..+\.(\d+|part)")


def remove_drafts(folder: Path) -> None:
    """Remove what a process that was killed while it wrote left of its files, in a folder and those in it."""
    for path in folder.rglob(".*"):
        if _DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write plain values as JSON, whole or not at all."""
    _replace(path, lambda own: own.write_text(json.dumps(value, indent=1), encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Return what ``write_json`` wrote; raise CorruptAsset where it cannot be read."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptAsset(f"{path} cannot be read: {one_line(error)}; remove its folder and run it again") from None
    if not isinstance(value, dict):
        raise CorruptAsset(f"{path} holds no table; remove its folder and run it again")
    return value


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all."""
    _replace(path, lambda own: torch.save(dict(state), own))


def read_state(path: Path) -> dict[str, Any]:
    """Return what ``write_state`` wrote; raise CorruptAsset where it cannot be read. Pickled code is never run."""
    try:
        state: object = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise _no_state(path, error) from None
    return state


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Turn what a state of another form makes its reader raise into the line that ``read_state`` has."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise _no_state(path, error) from None


def _no_state(path: Path, error: Exception) -> CorruptAsset:
    return CorruptAsset(
        f"the state of a training {path} cannot be read ({type(error).__name__}); remove it, and the training begins "
        "anew"
    )


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    try:
        with draft(path) as own:
            write(own)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter if the disk is full
        raise LeakbenchError(
            f"{path} cannot be written: {one_line(error)}; make room or choose another --out"
        ) from None
