"""The files of a training: its state after the last finished round, its checkpoints, and the record of its numbers."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic_core import to_jsonable_python

from leakbench.core.files import draft
from leakbench.errors import CorruptAsset, LeakbenchError, one_line

RECORD = "record.json"
"""The file of an arm's outcome, in the arm's folder."""
STATE = "state.pt"
"""The file of the state from which a training is resumed, in the arm's folder."""
_DRAFT = re.compile(r"\..+\.(\d+|part)")


def remove_drafts(folder: Path) -> None:
    """Remove unfinished files, which a killed process left, from a folder and the folders in it."""
    for path in folder.rglob(".*"):
        if _DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def plain(value: object) -> Any:
    """Return a dataclass, or a container of dataclasses, as plain JSON values; a number that is not finite as None."""
    return to_jsonable_python(value, inf_nan_mode="null")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write values, see ``plain``, as JSON, whole or not at all."""
    _replace(path, lambda own: own.write_text(json.dumps(plain(value), indent=1), encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Return the values that ``write_json`` wrote; raise CorruptAsset if they cannot be read."""
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptAsset(f"{path} cannot be read: {one_line(error)}; remove its folder and run it again") from None
    if not isinstance(value, dict):
        raise CorruptAsset(f"{path} holds no JSON object; remove its folder and run it again")
    return value


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all."""
    _replace(path, lambda own: torch.save(dict(state), own))


def read_state(path: Path) -> dict[str, Any]:
    """Return the state that ``write_state`` wrote, running no pickled code; raise CorruptAsset if it is damaged."""
    with restoring(path):
        state: object = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError
        return state


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Raise CorruptAsset if the code inside finds a state that is damaged or of another form."""
    try:
        yield
    except Exception as error:  # a damaged file can make the reader raise anything
        raise CorruptAsset(
            f"the state of a training {path} cannot be read ({type(error).__name__}); "
            "remove it to start the training again"
        ) from None


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    try:
        with draft(path) as own:
            write(own)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter if the disk is full
        raise LeakbenchError(
            f"{path} cannot be written: {one_line(error)}; make room or choose another --out"
        ) from None
