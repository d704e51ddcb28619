"""The cache of datasets and weights: untrusted archives, checksums, and fetches that fail half way."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import safetensors.numpy
import torch
import typer
from PIL import Image

from leakbench import assets
from leakbench.assets import archives, convert, sources
from leakbench.assets.sources import PackageSource, TorchvisionSource, Unavailable
from leakbench.cli.assets import app
from leakbench.errors import BadOption, CorruptAsset, LeakbenchError, MissingAsset

CONTENT = {"one.bin": b"first" * 100, "two.bin": b"second" * 100}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def toy(home: Path, monkeypatch: pytest.MonkeyPatch) -> assets.Asset:
    """A small asset in place of the real ones."""

    def members(archive: Path) -> Iterator[tuple[str, bytes]]:
        yield from archives.read(archive, list(CONTENT)).items()

    asset = assets.Asset(
        name="toy",
        title="the toy",
        kind="dataset",
        licence="CC0",
        files=tuple(
            assets.File(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in CONTENT.items()
        ),
        sources=(PackageSource("npm", "toy@1"), PackageSource("pypi", "toy==1")),
        carried="toy.tar.gz",
        convert=members,
    )
    monkeypatch.setattr(assets, "ASSETS", (asset,))
    return asset


def pack(file: Path, content: Mapping[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(file, mode) as archive:  # type: ignore[call-overload]
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file


def special(file: Path, kind: bytes, target: str) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo("package/one.bin")
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return file


def serve(monkeypatch: pytest.MonkeyPatch, download: Callable[[PackageSource, Path], Path]) -> None:
    monkeypatch.setattr(PackageSource, "download", lambda source, into, progress: download(source, into))


def one_line(error: pytest.ExceptionInfo[LeakbenchError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def leftovers(home: Path) -> list[str]:
    return sorted(entry.name for entry in home.iterdir()) if home.exists() else []


# Archives


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_chosen_members_are_read_wherever_they_lie(tmp_path: Path, mode: str) -> None:
    file = pack(
        tmp_path / "a", {"package/data/one.bin": b"1", "package/two.bin.gz": gzip.compress(b"2"), "x": b"3"}, mode
    )
    assert archives.read(file, ["one.bin", "two.bin", "three.bin"]) == {"one.bin": b"1", "two.bin": b"2"}


def test_a_debian_package_is_read(tmp_path: Path) -> None:
    inner = pack(tmp_path / "data.tar", {"./usr/share/one.bin": b"1"}, "w").read_bytes()
    deb = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0"), ("control.tar.xz", b"odd"), ("data.tar.xz", lzma.compress(inner))):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    (tmp_path / "toy.deb").write_bytes(deb)
    assert archives.read(tmp_path / "toy.deb", ["one.bin"]) == {"one.bin": b"1"}


def test_a_file_is_read_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "one.bin.gz").write_bytes(gzip.compress(b"1"))
    (tmp_path / "two.bin").write_bytes(b"2")
    expected = {"one.bin": b"1", "two.bin": b"2"}
    assert archives.read(tmp_path / "one.bin.gz", ["one.bin", "two.bin"]) == expected
    assert archives.read(tmp_path, ["one.bin", "two.bin"]) == expected


@pytest.mark.parametrize("path", ["../one.bin", "/etc/one.bin", "package/../../one.bin"])
def test_a_path_that_leads_outside_is_refused(tmp_path: Path, path: str) -> None:
    file = pack(tmp_path / "evil.tgz", {path: b"1"})
    with pytest.raises(CorruptAsset, match=r"outside the destination|an absolute path") as error:
        archives.read(file, ["one.bin"])
    one_line(error)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    for target in ("/etc/passwd", "two.bin"):
        with pytest.raises(CorruptAsset, match=r"a link|a special file") as error:
            archives.read(special(tmp_path / "evil.tgz", kind, target), ["one.bin"])
        one_line(error)


@pytest.mark.parametrize("name", ["one.bin", "other"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, name: str) -> None:
    file = pack(tmp_path / "bomb.tgz", {name: bytes(10**6)})
    assert file.stat().st_size < 10**4
    with pytest.raises(CorruptAsset, match="unpacks to more than 100000 bytes"):
        archives.read(file, ["one.bin"], limit=10**5)


def test_a_compressed_member_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    file = pack(tmp_path / "bomb.tgz", {"one.bin.gz": gzip.compress(bytes(10**6))})
    with pytest.raises(CorruptAsset, match="unpacks to more than 100000 bytes"):
        archives.read(file, ["one.bin"], limit=10**5)


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8bnot gz", b"!<arch>\n", b"\xfd7zXZ\x00odd"])
def test_what_is_no_archive_is_told_in_a_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd").write_bytes(content)
    with pytest.raises(CorruptAsset, match="damaged") as error:
        archives.read(tmp_path / "odd", ["one.bin"])
    one_line(error)


def test_a_truncated_archive_is_told_in_a_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = pack(tmp_path / "a.tgz", {"one.bin": rng.bytes(10**5)})
    file.write_bytes(file.read_bytes()[:50000])
    with pytest.raises(CorruptAsset, match="damaged"):
        archives.read(file, ["one.bin"])


# Pickles


class Python2(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2 wrote its strings, like the authors of CIFAR."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def save_bytes(self, content: bytes) -> None:
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch[bytes] = save_bytes


def python2(content: object) -> bytes:
    out = io.BytesIO()
    Python2(out, 2).dump(content)
    return out.getvalue()


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_pickle_of_arrays_is_read() -> None:
    content = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "labels": [1, 2]}
    for pickled in (pickle.dumps(content, 3), python2(content)):
        read = archives.arrays(pickled, "p")
        assert np.array_equal(read["a"], content["a"])
        assert read["a"].dtype == np.float32
        assert read["labels"] == [1, 2]


@pytest.mark.parametrize("thing", [Evil(), {"a": [Evil()]}, print, np.save, subprocess.run, Path("x")])
def test_a_pickle_that_names_anything_else_is_refused(
    thing: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorruptAsset, match="not a pickle of arrays") as error:
        archives.arrays(pickle.dumps(thing), "p")
    one_line(error)
    assert not list(tmp_path.iterdir())


# Conversions


def cifar(count: int = 20) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count).tolist()


def test_cifar10_is_the_same_from_pickles_and_from_the_binary_version(tmp_path: Path) -> None:
    pixels, labels = cifar()
    pickled = python2({"data": pixels, "labels": labels})
    names = [f"cifar-10-batches-py/{batch}" for batch in convert.BATCHES]
    converted = dict(convert.cifar10(pack(tmp_path / "py.tgz", dict.fromkeys(names, pickled))))
    assert list(converted) == [f"{batch}.bin" for batch in convert.BATCHES]
    expected = b"".join(bytes([label]) + row.tobytes() for label, row in zip(labels, pixels))
    assert set(converted.values()) == {expected}
    binary = pack(tmp_path / "bin.tgz", {f"cifar-10-batches-bin/{name}": data for name, data in converted.items()})
    assert dict(convert.cifar10(binary)) == converted


def test_cifar10_from_sheets_has_the_planes_in_order(tmp_path: Path) -> None:
    pixels = np.zeros((10000, 1024, 3), dtype=np.uint8)
    pixels[:, 1, 2] = 7  # blue, second pixel of the first row
    sheet = io.BytesIO()
    Image.fromarray(pixels).save(sheet, "PNG", compress_level=1)
    content = {f"{batch}.png": sheet.getvalue() for batch in convert.BATCHES}
    content["train_lables.json"] = str([number % 10 for number in range(50000)]).encode()
    content["test_lables.json"] = str([3] * 10000).encode()
    converted = dict(convert.cifar10(pack(tmp_path / "sheets.tgz", content)))
    records = np.frombuffer(converted["data_batch_2.bin"], np.uint8).reshape(10000, 3073)
    assert records[:12, 0].tolist() == [*range(10), 0, 1]
    assert set(np.flatnonzero(records[0, 1:])) == {2048 + 1}
    assert np.frombuffer(converted["test_batch.bin"], np.uint8)[0] == 3


@pytest.mark.parametrize(
    "content",
    [
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [1, 2]},
        {"data": np.zeros((2, 3000), np.uint8), "labels": [1, 2]},
        {"data": "text", "labels": [1, 2]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 300]},
        {"data": np.zeros((2, 3072), np.uint8)},
        [1, 2],
    ],
)
def test_cifar10_of_another_structure_is_refused(tmp_path: Path, home: Path, content: object) -> None:
    file = pack(tmp_path / "py.tgz", dict.fromkeys(convert.BATCHES, pickle.dumps(content, 3)))
    with pytest.raises(CorruptAsset, match=r"py\.tgz is not CIFAR-10") as error:
        assets.fetch("cifar10", from_file=file)
    one_line(error)
    assert leftovers(home) == []


def test_cifar100_is_held_against_the_md5_that_torchvision_knows(tmp_path: Path, home: Path) -> None:
    content = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [1], "coarse_labels": [2]}, 2)
    file = pack(tmp_path / "cifar-100-python.tar.gz", {"train": content, "test": content})
    with pytest.raises(CorruptAsset, match="torchvision's MD5"):
        assets.fetch("cifar100", from_file=file)
    assert leftovers(home) == []


def test_cifar100_keeps_both_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    content = python2({"data": np.full((1, 3072), 9, np.uint8), "fine_labels": [99], "coarse_labels": [19]})
    md5 = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5]])
    file = pack(tmp_path / "a.tgz", {"cifar-100-python/train": content, "cifar-100-python/test": content})
    converted = dict(convert.cifar100(file))
    assert list(converted) == ["train.bin", "test.bin"]
    assert converted["test.bin"] == bytes([19, 99]) + bytes([9]) * 3072


def test_a_trunk_is_the_same_from_a_state_dict_and_from_kernels(tmp_path: Path) -> None:
    package, indices = convert.CONVOLUTIONS["alexnet"]
    rng = np.random.default_rng(2)
    state, layers = {"classifier.1.weight": torch.zeros(2, 2)}, {}
    for number, index in enumerate(indices):
        weight, bias = rng.normal(size=(4, 3, 5, 2)).astype(np.float32), rng.normal(size=4).astype(np.float32)
        state |= {f"features.{index}.weight": torch.tensor(weight), f"features.{index}.bias": torch.tensor(bias)}
        layers[f"Conv_{number}"] = {"kernel": np.ascontiguousarray(weight.transpose(2, 3, 1, 0)), "bias": bias}
    torch.save(state, tmp_path / "alexnet.pth")
    pack(tmp_path / "sdist.tar.gz", {"p/weights/alexnet.ckpt": pickle.dumps({package: layers}, 3)})
    first, second = (dict(convert.trunk(tmp_path / name, "alexnet")) for name in ("alexnet.pth", "sdist.tar.gz"))
    assert first == second
    tensors = safetensors.numpy.load(first["alexnet.safetensors"])
    assert set(tensors) == set(state) - {"classifier.1.weight"}
    assert all(np.array_equal(tensor, state[name].numpy()) for name, tensor in tensors.items())


def test_a_state_dict_that_is_none_is_refused(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alexnet.pth").write_bytes(pickle.dumps(Evil(), 2))
    with pytest.raises(CorruptAsset, match=r"alexnet\.pth is not the convolutions of torchvision's AlexNet") as error:
        assets.fetch("lpips-alex", from_file=tmp_path / "alexnet.pth")
    one_line(error)
    assert leftovers(tmp_path) == ["alexnet.pth", "home"]
    assert leftovers(home) == []


def test_a_wheel_without_the_weights_of_dists_is_refused(tmp_path: Path, home: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("DISTS_pytorch/weights.pt", pickle.dumps(Evil(), 2))
    pack(tmp_path / "b.whl", CONTENT)
    for name in ("a.whl", "b.whl"):
        with pytest.raises(CorruptAsset, match=f"{name} is not the weights of DISTS") as error:
            assets.fetch("dists", from_file=tmp_path / name)
        one_line(error)
    assert leftovers(home) == []


# The cache


def test_an_unknown_asset_gets_a_suggestion() -> None:
    with pytest.raises(BadOption, match="did you mean 'mnist'"):
        assets.get("mnsit")


def test_the_cache_is_where_the_environment_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert assets.home() == home
    monkeypatch.delenv("LEAKBENCH_HOME")
    assert assets.home().name == "leakbench"


@pytest.mark.parametrize("name", [name for name in assets.names() if name != "imagenet"])
def test_a_missing_asset_names_the_command_that_fetches_it(home: Path, name: str) -> None:
    for verb in (assets.path, assets.verify):
        with pytest.raises(MissingAsset) as error:
            verb(name)
        message = one_line(error)
        assert f"{name!r} is not in the cache {home}; run `leakbench assets fetch {name}`" in message
    assert not assets.present(name)


def test_imagenet_says_that_it_cannot_be_fetched(home: Path) -> None:
    for verb in (assets.path, assets.fetch, assets.verify):
        with pytest.raises(MissingAsset, match=r"cannot be fetched.*imagenet:FOLDER") as error:
            verb("imagenet")
        one_line(error)


def test_a_file_carried_in_by_hand_is_installed(tmp_path: Path, toy: assets.Asset, home: Path) -> None:
    where = assets.fetch("toy", from_file=pack(tmp_path / "toy.tgz", CONTENT))
    assert where == home / "toy" == assets.path("toy")
    assert {name: (where / name).read_bytes() for name in CONTENT} == CONTENT
    assert leftovers(home) == ["toy"]
    assert assets.present("toy")
    assets.verify("toy")


def test_a_file_with_other_content_is_refused(tmp_path: Path, toy: assets.Asset, home: Path) -> None:
    file = pack(tmp_path / "toy.tgz", CONTENT | {"two.bin": b"SECOND" * 100})
    with pytest.raises(CorruptAsset, match=r"toy\.tgz is not the toy: two\.bin has SHA-256") as error:
        assets.fetch("toy", from_file=file)
    one_line(error)
    assert leftovers(home) == []


def test_a_file_that_does_not_exist_is_told(toy: assets.Asset) -> None:
    with pytest.raises(BadOption, match="does not exist"):
        assets.fetch("toy", from_file=Path("nowhere.tgz"))


def test_a_source_that_does_not_exist_is_told(toy: assets.Asset) -> None:
    with pytest.raises(BadOption, match="has no source 'debian'; known: npm, pypi"):
        assets.fetch("toy", source="debian")


def test_every_corruption_is_seen_and_a_fetch_repairs_it(
    tmp_path: Path, toy: assets.Asset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, lambda source, into: pack(into / "toy.tgz", CONTENT))
    for name, content in CONTENT.items():
        for wrong in (content[:-1], b"X" + content[1:], b"", content + b"X"):
            file = assets.fetch("toy") / name
            file.write_bytes(wrong)
            os.utime(file, ns=(1, hash(wrong) % 10**9))
            with pytest.raises(CorruptAsset, match="run `leakbench assets fetch toy`"):
                assets.path("toy")
            with pytest.raises(CorruptAsset):
                assets.verify("toy")
    assets.fetch("toy")
    assets.verify("toy")


def test_verify_reads_the_files_anew(tmp_path: Path, toy: assets.Asset) -> None:
    where = assets.fetch("toy", from_file=pack(tmp_path / "toy.tgz", CONTENT)) / "one.bin"
    status = where.stat()
    assets.path("toy")
    where.write_bytes(b"X" + CONTENT["one.bin"][1:])
    os.utime(where, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CorruptAsset):
        assets.verify("toy")


def test_sources_are_tried_in_order_until_one_is_right(
    toy: assets.Asset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: PackageSource, into: Path) -> Path:
        if source.kind == "npm":
            return pack(into / "toy.tgz", {"one.bin": b"wrong"})
        return pack(into / "toy.tgz", CONTENT)

    serve(monkeypatch, download)
    assert assets.fetch("toy") == home / "toy"
    assert leftovers(home) == ["toy"]


def test_when_no_source_can_be_reached_each_reason_is_told(
    toy: assets.Asset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: PackageSource, into: Path) -> Path:
        raise Unavailable(f"no {source.kind} here")

    serve(monkeypatch, download)
    with pytest.raises(MissingAsset) as error:
        assets.fetch("toy")
    message = one_line(error)
    assert "npm toy@1: no npm here; pypi toy==1: no pypi here" in message
    assert "leakbench assets fetch toy --from FILE" in message
    assert leftovers(home) == []


def test_a_client_that_is_not_installed_is_a_source_that_is_not_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for source, client in ((PackageSource("npm", "x@1"), "npm"), (PackageSource("debian", "x"), "apt-get")):
        into = tmp_path / source.kind
        into.mkdir()
        with pytest.raises(Unavailable, match=f"{client} is not installed"):
            source.download(into, lambda name: False)


def test_an_interrupted_fetch_leaves_nothing(toy: assets.Asset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(source: PackageSource, into: Path) -> Path:
        (into / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    serve(monkeypatch, download)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("toy")
    assert leftovers(home) == []
    assert not assets.present("toy")


def test_an_interruption_between_two_files_leaves_nothing(
    tmp_path: Path, toy: assets.Asset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def interrupted(self: Path, content: bytes) -> int:
        if self.name == "two.bin":
            raise KeyboardInterrupt
        return write(self, content)

    file = pack(tmp_path / "toy.tgz", CONTENT)
    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("toy", from_file=file)
    assert leftovers(home) == []


def test_fetches_at_the_same_time_leave_a_whole_asset(tmp_path: Path, toy: assets.Asset, home: Path) -> None:
    file = pack(tmp_path / "toy.tgz", CONTENT)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: assets.fetch("toy", from_file=file), range(16)))
    assert set(found) == {home / "toy"}
    assets.verify("toy")
    assert leftovers(home) == ["toy"]


def test_a_whole_asset_is_not_downloaded_again(
    tmp_path: Path, toy: assets.Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = assets.fetch("toy", from_file=pack(tmp_path / "toy.tgz", CONTENT))
    serve(monkeypatch, lambda source, into: pytest.fail("downloaded again"))
    assert assets.fetch("toy") == first


def test_a_package_is_compared_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_run", lambda command, folder: pack(folder / "toy.tgz", CONTENT))
    with pytest.raises(CorruptAsset, match="has SHA-256"):
        PackageSource("npm", "toy@1", "0" * 64).download(tmp_path, lambda name: False)


class Published(SimpleHTTPRequestHandler):
    """Serves a folder of files, without a word."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an HTTP server on this machine, in place of torchvision's second mirror of MNIST."""
    from torchvision.datasets import MNIST

    (tmp_path / "mirror").mkdir()
    files = {name: gzip.compress(name.encode()) for name, _ in MNIST.resources}
    for name, content in files.items():
        (tmp_path / "mirror" / name).write_bytes(content)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Published, directory=str(tmp_path / "mirror")))
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:1/", address])
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
    monkeypatch.setattr(MNIST, "resources", sums)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "mirror"
    server.shutdown()
    server.server_close()


class Bar:
    """Counts bytes as a progress bar of pooch does."""

    total, done = 0, 0

    def update(self, count: int) -> None:
        self.done += count

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        assert self.done == self.total > 0


def test_files_come_from_the_first_mirror_that_answers(mirror: Path, tmp_path: Path) -> None:
    bars: dict[str, Bar] = {}
    (tmp_path / "into").mkdir()
    folder = TorchvisionSource("MNIST").download(tmp_path / "into", lambda name: bars.setdefault(name, Bar()))
    assert set(archives.read(folder, convert.IDX)) == set(convert.IDX)
    assert {name: bar.done for name, bar in bars.items()} == {
        file.name: file.stat().st_size for file in mirror.iterdir()
    }


def test_a_download_with_another_checksum_is_corrupt(mirror: Path, tmp_path: Path) -> None:
    next(mirror.iterdir()).write_bytes(b"something else")
    (tmp_path / "into").mkdir()
    with pytest.raises(CorruptAsset, match="does not match the known hash") as error:
        TorchvisionSource("MNIST").download(tmp_path / "into", lambda name: False)
    one_line(error)


def test_a_file_that_no_mirror_has_is_unavailable(mirror: Path, tmp_path: Path) -> None:
    next(mirror.iterdir()).unlink()
    (tmp_path / "into").mkdir()
    with pytest.raises(Unavailable, match="404"):
        TorchvisionSource("MNIST").download(tmp_path / "into", lambda name: False)


def test_every_asset_says_what_it_is() -> None:
    for name in assets.names():
        asset = assets.get(name)
        assert asset.title
        assert asset.licence
        assert asset.carried
        assert "://" not in repr(asset)
        for file in asset.files:
            assert file.size > 0
            assert (file.sha256 is None) == (name == "cifar100")


# The commands


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    typer.main.get_command(app)(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


def test_list_names_every_asset(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "list").splitlines()
    known = assets.names()
    assert [line.split("\t")[0] for line in lines[: len(known) + 1]] == ["name", *known]
    files = [(f"{name}/{file.name}", file.sha256) for name in known for file in assets.get(name).files]
    assert [line.split("  ")[0] for line in lines[len(known) + 2 : -1]] == [name for name, _ in files]
    assert all(checksum is None or any(checksum in line for line in lines) for _, checksum in files)
    assert str(home) in lines[-1]


def test_fetch_and_verify(tmp_path: Path, toy: assets.Asset, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in run(capsys, "verify")
    file = pack(tmp_path / "toy.tgz", CONTENT)
    assert run(capsys, "fetch", "toy", "--from", str(file)) == f"toy: {home / 'toy'}\n"
    assert run(capsys, "verify") == run(capsys, "verify", "toy") == "toy: every checksum is right\n"
    (home / "toy" / "one.bin").write_bytes(b"")
    with pytest.raises(CorruptAsset):
        run(capsys, "verify", "toy")


def test_fetch_of_one_file_for_two_assets_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadOption, match="serves one asset"):
        run(capsys, "fetch", "mnist", "cifar10", "--from", str(tmp_path))


def test_fetch_goes_on_after_a_failure(
    toy: assets.Asset, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: PackageSource, into: Path) -> Path:
        raise Unavailable("no network")

    serve(monkeypatch, download)
    with pytest.raises(MissingAsset, match="2 of 2 assets could not be fetched"):
        run(capsys, "fetch", "toy", "toy")
    assert capsys.readouterr().err.count("no network") == 4


def test_the_commands_do_not_import_torch() -> None:
    script = "import sys, leakbench.cli.assets, leakbench.assets; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


# The real assets


@pytest.mark.assets
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "lpips-alex", "lpips-vgg", "dists"])
def test_a_fetched_asset_has_its_checksums(name: str) -> None:
    assets.verify(name)


# SHA-1 of the binary version that the authors publish.
CIFAR10_SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}


@pytest.mark.assets
@pytest.mark.parametrize("name", CIFAR10_SHA1)
def test_cifar10_is_the_published_one(name: str) -> None:
    content = (assets.path("cifar10") / name).read_bytes()
    assert hashlib.sha1(content, usedforsecurity=False).hexdigest() == CIFAR10_SHA1[name]


@pytest.mark.assets
@pytest.mark.parametrize(("name", "net"), [("lpips-alex", "alexnet"), ("lpips-vgg", "vgg16")])
def test_a_trunk_fits_torchvisions_network(name: str, net: str) -> None:
    import torchvision

    with torch.device("meta"):
        features = getattr(torchvision.models, net)(weights=None).features
    tensors = safetensors.numpy.load_file(assets.path(name))
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        f"features.{name}": tuple(value.shape) for name, value in features.state_dict().items()
    }
    assert all(np.isfinite(value).all() and value.std() > 0 for value in tensors.values())
