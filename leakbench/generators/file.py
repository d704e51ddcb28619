"""A generator of the user's own: a TorchScript or torch.export file, described by a TOML file beside it.

Such a file is a program that runs with the user's rights, like a plugin, so it must come from a trusted source.
Python's pickles and compiled code in it are never loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor, nn

from leakbench.core.types import Distribution, Normal, Uniform
from leakbench.errors import BadOption, CorruptAsset
from leakbench.generators.base import Card, Generator, TruncatedNormal, register

DISTRIBUTIONS: dict[str, Distribution] = {
    "normal": Normal(),
    "truncated-normal": TruncatedNormal(),
    "uniform": Uniform(-1.0, 1.0),
}
"""Name -> the distribution of a latent's coordinates."""

FORCE_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""The environment variable that makes torch.load refuse everything but tensors, even if its caller admits more."""


class Description(BaseModel):
    """The TOML file beside a generator.

    Attributes:
        latent: the size of the latent.
        law: ``normal``; ``truncated-normal`` (N(0, 1) cut off at 2); ``uniform`` on [-1, 1).
        range: the output that is black and the output that is white.
        image: channels, height and width.
        classes: number of classes; 0 for a network that is called with latents only.
        licence: the terms of the weights.
        data: its training data.
    """

    model_config = ConfigDict(extra="forbid")

    latent: PositiveInt
    law: Literal["normal", "truncated-normal", "uniform"]
    range: Annotated[list[float], Field(min_length=2, max_length=2)]
    image: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    classes: Annotated[int, Field(ge=0)]
    licence: str
    data: str


@register("file")
@dataclass(frozen=True)
class FileGenerator(Generator):
    """A generator of your own, file:PATH: TorchScript or torch.export (.pt2), with PATH's name.toml beside it.

    The network is called with latents [N, d], and with labels [N] int64 if it has classes. The file is a program
    and is run: give one that you made, or trust as a plugin. Pickles and compiled code in it are refused.

    Attributes:
        path: the file; see ``Description`` for the TOML.
    """

    reference: ClassVar[str] = "the formats of torch.jit.save and torch.export.save"
    path: str

    def card(self) -> Card:
        """Return the description as a card."""
        file = self._file()
        description = _describe(file)
        low, high = description.range
        channels, height, width = description.image
        return Card(
            latent=description.latent,
            image_shape=(channels, height, width),
            num_classes=description.classes,
            data=description.data,
            licence=description.licence,
            checksum=_checksum(file, file.stat().st_mtime_ns),
            law=DISTRIBUTIONS[description.law],
            low=low,
            high=high,
        )

    def network(self) -> nn.Module:
        """Return the network; raise CorruptAsset if the file is of neither format."""
        file = self._file()
        return _Called(_load(file), _describe(file).classes > 0)

    def _file(self) -> Path:
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise BadOption(f"the generator {self.path!r} does not exist; give a TorchScript or torch.export file")
        return file


class _Called(nn.Module):
    """A loaded network, called in the type of its own weights, with labels only if it takes them."""

    def __init__(self, network: nn.Module, conditional: bool) -> None:
        super().__init__()
        self.network = network
        self.conditional = conditional

    def train(self, mode: bool = True) -> _Called:
        """Leave the mode as it was saved: an exported network has no other."""
        return self

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images [N, C, H, W] in the network's own range."""
        images: Tensor = self.network(latent, labels) if self.conditional else self.network(latent)
        return images


def _load(file: Path) -> nn.Module:
    reasons = []
    with warnings.catch_warnings(), _tensors_only():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, but many generators come in it
        try:
            _check_archive(file)
            return torch.export.load(file).module()
        except CorruptAsset:
            raise
        except Exception as error:
            reasons.append(f"torch.export: {type(error).__name__}")
        try:
            return torch.jit.load(str(file), map_location="cpu").eval()
        except Exception as error:
            reasons.append(f"TorchScript: {type(error).__name__}")
    raise CorruptAsset(
        f"the generator {str(file)!r} can be read in neither format ({', '.join(reasons)}); "
        "save it with torch.export.save or torch.jit.save"
    )


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Make ``torch.load`` admit only tensors and plain values: ``torch.export.load`` would unpickle anything."""
    before = os.environ.get(FORCE_VARIABLE)
    os.environ[FORCE_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(FORCE_VARIABLE)
        if before is not None:
            os.environ[FORCE_VARIABLE] = before


def _check_archive(file: Path) -> None:
    """Raise CorruptAsset if an archive of torch.export holds libraries, or objects other than tensors."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            if "/data/aotinductor/" in member:
                raise CorruptAsset(f"the generator {str(file)!r} holds compiled code; save it with torch.export.save")
            name = member.partition("/data/constants/")[2]
            if name.startswith(("custom_obj", "opaque_obj")):
                raise CorruptAsset(
                    f"the generator {str(file)!r} holds the object {name!r} beside its tensors, which could run "
                    "anything; save a network of tensors only"
                )


def _describe(file: Path) -> Description:
    """Return the description beside a file; raise BadOption if it is missing or malformed."""
    toml = file.with_suffix(".toml")
    try:
        found = Description.model_validate(tomllib.loads(toml.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        fields = ", ".join(Description.model_fields)
        raise BadOption(f"the generator {str(file)!r} needs a description {str(toml)!r} with {fields}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadOption(f"the description {str(toml)!r} is not TOML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise BadOption(f"the description {str(toml)!r}: {key}: {first['msg']}; correct it") from None
    if not found.range[0] < found.range[1]:
        raise BadOption(f"the description {str(toml)!r}: range={found.range} is not increasing; write range = [-1, 1]")
    return found


@functools.lru_cache(maxsize=8)
def _checksum(file: Path, mtime: int) -> str:
    digest = hashlib.sha256(file.read_bytes())
    digest.update(file.with_suffix(".toml").read_bytes())
    return digest.hexdigest()
