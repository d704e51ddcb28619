"""The table of assets, ``table.toml``: what each is, its licence, its files with their checksums, and its sources."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, TypeAdapter

from leakbench.assets.convert import CONVERSIONS
from leakbench.assets.sources import Source

Conversion = Callable[[Path], Iterator[tuple[str, bytes]]]


@dataclass(frozen=True)
class File:
    """One file of an asset as it lies in the cache.

    Attributes:
        name: its name in the asset's folder.
        size: bytes.
        sha256: its checksum; None if nobody has published it: then it is recorded when the asset is fetched, after the
            archive was compared with the checksum that torchvision states.
    """

    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Asset:
    """A dataset or weight file that is fetched once.

    Attributes:
        name: its name on the command line.
        title: what it is, in words.
        kind: what it is called in messages.
        licence: the terms it comes under.
        files: what lies in the cache.
        sources: in the order in which they are tried; empty if the asset cannot be fetched.
        carried: the files that may be carried in by hand, or what to do if the asset cannot be fetched.
        convert: yields the asset's files, as (name, content), from any of the archives that a source serves; nothing if
            the asset cannot be fetched.
    """

    name: str
    title: str
    kind: Literal["dataset", "weight file"]
    licence: str
    files: tuple[File, ...]
    sources: tuple[Source, ...]
    carried: str
    convert: Annotated[Conversion, BeforeValidator(CONVERSIONS.__getitem__)] = lambda archive: iter(())

    @property
    def size(self) -> int:
        """Bytes in the cache."""
        return sum(file.size for file in self.files)


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

ASSETS = TypeAdapter(tuple[Asset, ...]).validate_python(_TABLE["asset"])
"""Every asset."""
