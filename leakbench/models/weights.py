"""How a network gets its weights: drawn by a named law, or loaded from a checkpoint."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from leakbench.errors import BadOption, CorruptAsset, MissingAsset

_UNIFORM = re.compile(r"uniform\(\s*([0-9.eE+-]+)\s*\)")


def _check_init(init: str) -> str:
    if init != "default":
        _half_width(init)
    return init


def _half_width(init: str) -> float:
    match = _UNIFORM.fullmatch(init)
    try:
        width = float(match[1]) if match else 0.0
    except ValueError:
        width = 0.0
    if not 0 < width < float("inf"):
        raise ValueError(f"{init!r} is no initialisation; write default or uniform(0.5)")
    return width


Init = Annotated[str, AfterValidator(_check_init), Field(description="default | uniform(A)")]
"""``default`` (torch's own) or ``uniform(a)``: every weight and bias drawn from U(-a, a)."""


def initialise(model: nn.Module, init: Init) -> None:
    """Draw every parameter of a new network from torch's global generator, which the caller seeds."""
    if init == "default":
        return
    width = _half_width(init)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-width, width)


def load(model: nn.Module, path: str) -> None:
    """Load a checkpoint into a network: a ``.safetensors`` file, or a state dict that ``torch.save`` wrote.

    Pickled code is never run: torch files are read with ``weights_only=True``.

    Raises:
        MissingAsset: the file does not exist.
        CorruptAsset: the file is no state dict.
        BadOption: its tensors are not those of this network.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"the checkpoint {path!r} does not exist; give weights= the path of a state dict")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: object = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        raise CorruptAsset(
            f"the checkpoint {path!r} cannot be read as plain tensors ({type(error).__name__}); "
            "save model.state_dict() with torch.save or safetensors"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CorruptAsset(f"the checkpoint {path!r} is not a state dict; save model.state_dict()")
    expected = model.state_dict()
    for name, value in expected.items():
        if name not in state:
            raise BadOption(f"the checkpoint {path!r} has no tensor {name!r}; it is of another network")
        if state[name].shape != value.shape:
            raise BadOption(
                f"the checkpoint {path!r} has {name!r} of shape {tuple(state[name].shape)}, not {tuple(value.shape)}; "
                "it is of another network, class count or image size"
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise BadOption(f"the checkpoint {path!r} has the extra tensor {extra[0]!r}; it is of another network")
    model.load_state_dict(state)


def fingerprint(path: str) -> str:
    """Return 16 hex digits of the file's SHA-256, so that a changed checkpoint makes new trials."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"the checkpoint {path!r} does not exist; give weights= the path of a state dict")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
