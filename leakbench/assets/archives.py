"""Reading untrusted archives: chosen members, in memory, under a size limit; nothing is written to a path."""

import gzip
import io
import lzma
import pickle
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from leakbench.errors import CorruptAsset, one_line

MAX_BYTES = 2**30
"""No asset unpacks to more."""


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def read(file: Path, names: Collection[str], limit: int = MAX_BYTES) -> dict[str, bytes]:
    """Return the members of these names, from any folder of the archive; absent ones are left out.

    Args:
        file: a tar archive (plain, gz or xz), a Debian package, a folder, or one of the wanted files beside the
            others. A member NAME.gz counts as NAME and is decompressed.
        names: the names, without folders.
        limit: the most bytes that the archive may unpack to.

    Raises:
        CorruptAsset: the archive is damaged, is too large, or holds a link, a device or a path outside of it.
    """
    if file.is_file() and file.name.removesuffix(".gz") in names:
        file = file.parent
    found: dict[str, bytes] = {}
    try:
        for member, content in _folder(file, names, limit) if file.is_dir() else _archive(file, names, limit):
            if member.endswith(".gz"):
                content = _Limited(gzip.GzipFile(fileobj=io.BytesIO(content)), file, limit).read()
            found.setdefault(member.removesuffix(".gz"), content)
    except CorruptAsset:
        raise
    except Exception as error:  # a damaged or hostile archive can raise anything
        raise CorruptAsset(f"{file} is damaged ({one_line(error)}); get it anew") from None
    return found


def arrays(content: bytes, origin: str) -> Any:
    """Return what a pickle holds, admitting only numpy arrays and plain containers.

    Raises:
        CorruptAsset: the pickle is damaged or names anything else.
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a hostile pickle can raise anything
        raise CorruptAsset(f"{origin} is not a pickle of arrays ({one_line(error)}); get it anew") from None


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Limited:
    """A stream that raises CorruptAsset once more than ``limit`` bytes were read from it."""

    def __init__(self, stream: _Readable, file: Path, limit: int) -> None:
        self._stream, self._file, self._limit, self._left = stream, file, limit, limit

    def read(self, size: int = -1) -> bytes:
        wanted = self._left + 1 if size < 0 else min(size, self._left + 1)
        content = self._stream.read(wanted)
        self._left -= len(content)
        if self._left < 0:
            raise CorruptAsset(f"{self._file} unpacks to more than {self._limit} bytes; get the published file")
        return content


def _folder(folder: Path, names: Collection[str], limit: int) -> Iterator[tuple[str, bytes]]:
    for entry in sorted(folder.iterdir()):
        if entry.name.removesuffix(".gz") in names and entry.is_file():
            with entry.open("rb") as stream:
                yield entry.name, _Limited(stream, entry, limit).read()


def _archive(file: Path, names: Collection[str], limit: int) -> Iterator[tuple[str, bytes]]:
    with file.open("rb") as raw:
        stream = _Limited(_decompressed(_without_ar(raw, file)), file, limit)
        with tarfile.open(fileobj=stream, mode="r|") as archive:  # type: ignore[call-overload]
            for member in archive:
                safe = tarfile.data_filter(member, str(file.parent))  # raises for devices and paths outside
                if safe.name != member.name or not (member.isfile() or member.isdir()):
                    raise CorruptAsset(f"{file} holds {member.name!r}, a link or an absolute path; get it anew")
                content = archive.extractfile(member)
                name = PurePosixPath(member.name).name
                if content is not None and name.removesuffix(".gz") in names:
                    yield name, content.read()


def _without_ar(raw: IO[bytes], file: Path) -> IO[bytes]:
    """Return the data archive inside a Debian package; any other stream as it is."""
    if raw.read(8) != b"!<arch>\n":
        raw.seek(0)
        return raw
    while header := raw.read(60):
        size = int(header[48:58])
        if size < 0:
            raise ValueError("a member of negative size")
        if header.startswith(b"data.tar"):
            return io.BytesIO(_Limited(raw, file, MAX_BYTES).read())
        raw.seek(size + size % 2, io.SEEK_CUR)
    raise EOFError("the package holds no data")


def _decompressed(raw: IO[bytes]) -> _Readable:
    start = raw.read(6)
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=raw)
    return lzma.LZMAFile(raw) if start == b"\xfd7zXZ\x00" else raw
