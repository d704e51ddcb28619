"""What users give: folders, image files, arrays, checkpoints, and networks in any precision and wrapper."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import pickle
import random
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_cli import cli, place, refused  # noqa: F401
from test_datasets import paint
from torch import nn
from torchvision.transforms import RandAugment

import leakbench
from leakbench import datasets
from leakbench.attacks.known_draws import read_draws
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.trace import filled, trace
from leakbench.audit import AuditedNetwork, AuditOptions, images_of
from leakbench.audit.given import audited, classes_of, first_channels, read_image, read_update
from leakbench.audit.randomness import randomness
from leakbench.datasets.folder import Folder
from leakbench.datasets.pixels import read_image_file
from leakbench.engine.executors import packed
from leakbench.errors import BadOption, CorruptAsset, LeakbenchError, Unsupported
from leakbench.gradients import Evaluator
from leakbench.models import OwnModule, weights
from leakbench.models.module import unwrapped

SHAPE = (3, 8, 8)


def net(classes: int = 4, channels: int = 3, side: int = 8) -> nn.Sequential:
    """A small network with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(side * side, classes)
        )


def one_line(error: pytest.ExceptionInfo[BaseException], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


# Classes


def tiny(root: Path, annotated: bool = True) -> Path:
    """The layout of TinyImageNet with two classes of one image each, and a validation part in one folder."""
    for name in ("n02", "n01"):
        paint(root / "train" / name / "images" / f"{name}_0.png", 80, (8, 8))
    for number in range(3):
        paint(root / "val" / "images" / f"val_{number}.png", number, (8, 8))
    rows = [
        f"val_{number}.png\t{name}\t0\t0\t63\t63" for number, name in ((2, "n01"), (0, "n02"), (1, "n01"), (9, "n02"))
    ]
    if annotated:
        (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def test_the_labels_of_tiny_imagenet_are_those_of_its_annotations(tmp_path: Path) -> None:
    dataset = Folder(str(tiny(tmp_path)), size=8)
    assert dataset.listing().classes == ("n01", "n02")
    assert dataset.listing().split == "val"
    names = [(file.name, label) for file, label in dataset.listing().attacked]
    assert names == [("val_1.png", 0), ("val_2.png", 0), ("val_0.png", 1)]
    assert float(dataset.mean().mean()) == pytest.approx(80 / 255)
    assert len(Folder(str(tmp_path / "train"), size=8)) == 2


def test_images_without_classes_are_refused_and_not_one_class(tmp_path: Path) -> None:
    with pytest.raises(BadOption) as error:
        len(Folder(str(tiny(tmp_path, annotated=False)), size=8))
    one_line(error, "split 'val'", "in no class folder", "labels.csv")


@pytest.mark.parametrize("names", [("training", "validation"), ("Train", "Valid"), ("train", "testing")])
def test_splits_of_loose_images_are_no_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        paint(tmp_path / name / "1.png", 3)
    with pytest.raises(BadOption) as error:
        len(Folder(str(tmp_path)))
    one_line(error, f"the split {names[1]!r}", "in no class folder")


@pytest.mark.parametrize("names", [("valid", "invalid"), ("test", "control"), ("train", "bus", "car")])
def test_classes_may_be_named_like_a_split(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        paint(tmp_path / name / "1.png", 3)
    assert Folder(str(tmp_path)).listing().classes == tuple(sorted(names))


@pytest.mark.parametrize(("split", "public"), [("validation", "training"), ("Test", "train"), ("valid", "Training")])
def test_splits_are_known_by_their_usual_names(tmp_path: Path, split: str, public: str) -> None:
    paint(tmp_path / split / "b" / "patient 1" / "1.png", 255, (8, 8))
    paint(tmp_path / public / "a" / "1.png", 51, (8, 8))
    dataset = Folder(str(tmp_path), size=8)
    assert dataset.listing().split == split
    assert dataset.load([0])[1].tolist() == [1]
    assert float(dataset.mean().mean()) == pytest.approx(0.2)


def test_a_folder_with_public_images_only_is_refused(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "a" / "1.png", 3)
    with pytest.raises(BadOption) as error:
        len(Folder(str(tmp_path)))
    one_line(error, "only the split 'train'", f"folder:{tmp_path}/train")


def test_every_folder_is_a_class_but_what_systems_leave(tmp_path: Path) -> None:
    paint(tmp_path / "b" / "1.png", 3)
    paint(tmp_path / "b" / "._1.png", 3)
    (tmp_path / "a").mkdir()
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "lost+found", "__pycache__"):
        paint(tmp_path / name / "1.png", 3)
    dataset = Folder(str(tmp_path))
    assert dataset.listing().classes == ("a", "b")
    assert [label for _, label in dataset.listing().attacked] == [1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "image,label\n1.png,cat\n2.png,dog\n"),
        ("labels.csv", "1,cat\n2,dog\n"),
        ("labels.tsv", "file\tage\tclass\n1.png\t3\tcat\n2.png\t4\tdog\n"),
        ("annotations.txt", "images/1.png cat\nimages/2.png dog\n"),
    ],
)
def test_a_label_file_states_the_classes(tmp_path: Path, name: str, text: str) -> None:
    for number in (1, 2):
        paint(tmp_path / "images" / f"{number}.png", number)
    (tmp_path / name).write_text(text)
    listing = Folder(str(tmp_path)).listing()
    assert listing.classes == ("cat", "dog")
    assert [(file.name, label) for file, label in listing.attacked] == [("1.png", 0), ("2.png", 1)]


@pytest.mark.parametrize(
    ("text", "problem"), [("1.png,cat\n", "no class for '2.png'"), ("1,a\n1,b\n2,b\n", "2 classes")]
)
def test_a_label_file_that_leaves_a_doubt_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    for number in (1, 2):
        paint(tmp_path / f"{number}.png", number)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(BadOption) as error:
        len(Folder(str(tmp_path)))
    one_line(error, problem)


def test_the_labels_of_a_label_file_identify_the_data(tmp_path: Path) -> None:
    found = set()
    for number, classes in enumerate(("cat,dog", "dog,cat")):
        root = tmp_path / str(number)
        for file, name in zip("12", classes.split(",")):
            paint(root / f"{file}.png", int(file))
            with (root / "labels.csv").open("a") as opened:
                opened.write(f"{file}.png,{name}\n")
        found.add(Folder(str(root)).settings()["fingerprint"])
    assert len(found) == 2


@pytest.fixture
def pets(tmp_path: Path) -> Folder:
    """Three classes with one image each; the one of c is white."""
    for name, grey in (("a", 0), ("b", 51), ("c", 255)):
        paint(tmp_path / "pets" / name / "1.png", grey, (8, 8))
    return Folder(str(tmp_path / "pets"), size=8)


@pytest.mark.parametrize("outputs", [2, 4])
def test_classes_that_are_not_the_outputs_are_refused(pets: Folder, outputs: int) -> None:
    with pytest.raises(BadOption) as error:
        audited(pets, outputs)
    one_line(error, "has 3 classes (a, b, c)", f"the network {outputs} outputs", "--classes FILE", "--first N")
    with pytest.raises(BadOption, match="has 7 classes, and the network 4 outputs"):
        audited(datasets.parse("samples"), 4)


def test_the_first_classes_of_the_data_can_be_chosen(pets: Folder) -> None:
    assert [len(audited(pets, 2, first=2)), len(audited(pets, 9, first=3)), len(audited(pets, 9, first=1))] == [2, 3, 1]
    images, labels = audited(pets, 2, first=2).load([1])
    assert (labels.tolist(), round(float(images.mean()), 2)) == ([1], 0.2)
    samples = audited(datasets.parse("samples"), 10, first=3)
    assert set(samples.load(range(len(samples)))[1].tolist()) == {0, 1, 2}
    with pytest.raises(BadOption, match="give 1 to 2"):
        audited(pets, 2, first=3)
    with pytest.raises(BadOption, match="image index 2 is out of range"):
        audited(pets, 2, first=2).load([2])


def test_a_file_states_the_order_of_the_outputs(pets: Folder, tmp_path: Path) -> None:
    order = tmp_path / "names.txt"
    order.write_text("c\tcrocodile\nx\na\nb\n")
    assert audited(pets, 4, order=str(order)).load([0, 1, 2])[1].tolist() == [2, 3, 0]
    for text, problem in (("c\na\n", "3 outputs"), ("a\nb\nx\n", "does not name the class folder 'c'")):
        order.write_text(text)
        with pytest.raises(BadOption) as error:
            audited(pets, 3, order=str(order))
        one_line(error, problem)
    with pytest.raises(BadOption, match="give --first N"):
        audited(datasets.parse("samples"), 7, order=str(order))


def test_the_identity_of_data_whose_classes_are_the_outputs_is_what_it_was(pets: Folder) -> None:
    assert "outputs" not in audited(pets, 3).settings()
    assert audited(pets, 9, first=2).settings()["outputs"]


def test_an_audit_refuses_classes_that_are_not_the_outputs(cli, place: Path, pets: Folder) -> None:  # noqa: F811
    (place / "nets.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))\n"
    )
    command = ("audit", "--plugin", "nets.py", "--model", "build", "--data", pets.path, "--size", "8", "--out", "out")
    refused(cli(*command, "--budget", "quick"), "has 3 classes (a, b, c), and the network 5 outputs")
    refused(cli(*command, "--first", "4"), "give 1 to 3")


# Pixels


def deep_png(values: np.ndarray[Any, Any]) -> bytes:
    """Return a PNG of 16 bits from [H, W] or [H, W, 3] uint16."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def tiff(values: np.ndarray[Any, Any], **tags: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF", **tags)
    return stream.getvalue()


def ppm(values: np.ndarray[Any, Any], white: int) -> bytes:
    return f"P5 8 8 {white}\n".encode() + values.astype(">u2").tobytes()


DEEP: dict[str, Callable[[], bytes]] = {
    "grey.png": lambda: deep_png((RAMP * 65535).round().astype(np.uint16)),
    "colour.png": lambda: deep_png(np.stack([(RAMP * 65535).round().astype(np.uint16)] * 3, 2)),
    "grey.tif": lambda: tiff((RAMP * 65535).round().astype(np.uint16)),
    "big.tif": lambda: tiff((RAMP * 65535).round().astype(">u2")),
    "white-is-zero.tif": lambda: tiff(((1 - RAMP) * 65535).round().astype(np.uint16), tiffinfo={262: 0}),
    "real.tif": lambda: tiff(RAMP.astype(np.float32)),
    "grey.pgm": lambda: ppm((RAMP * 4095).round(), 4095),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_pixels_keep_their_scale(tmp_path: Path, name: str, channels: int) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / name
    file.write_bytes(DEEP[name]())
    wanted = torch.from_numpy(RAMP).float().expand(channels, 8, 8)
    assert torch.allclose(read_image_file(file, (channels, 8, 8)), wanted, atol=1.1 / 255)
    assert torch.allclose(read_image(str(file), (channels, 8, 8)), wanted, atol=1.1 / 255)
    dataset = Folder(str(tmp_path), size=8, channels=channels)  # type: ignore[arg-type]
    assert torch.allclose(dataset.load([0])[0][0], wanted, atol=1.1 / 255)
    if "colour" not in name:
        assert len(dataset.load([0])[0].unique()) == 64
    assert "1 of the 1 image files" in dataset.note()


def test_the_mean_and_imagenet_read_deep_pixels_alike(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "n00000001").mkdir(parents=True)
        (tmp_path / part / "n00000001" / "1.png").write_bytes(DEEP["grey.png"]())
    mean = Folder(str(tmp_path), size=8).mean()
    assert torch.allclose(mean[0], torch.from_numpy(RAMP).float(), atol=1e-4)
    image = datasets.parse(f"imagenet(path={json.dumps(str(tmp_path))}, size=28)").load([0])[0]
    assert 0 < float(image.min()) < 0.2 < 0.8 < float(image.max()) < 1


def test_dark_deep_pixels_are_noted(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "0.png", 3, (8, 8))
    (tmp_path / "a" / "1.png").write_bytes(deep_png((RAMP * 4095).round().astype(np.uint16)))
    note = Folder(str(tmp_path)).note()
    for part in ("1 of the 2 image files", "16-bit grey", "value / 65535", "4095", "0.062 of 1", "rescale the files"):
        assert part in note
    (tmp_path / "b" / "b").mkdir(parents=True)
    paint(tmp_path / "b" / "b" / "1.png", 3)
    assert Folder(str(tmp_path / "b")).note() == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: tiff((RAMP * 1000).astype(np.int32)), ["32 bits", "8 or 16-bit PNG"]),
        (lambda: tiff((RAMP * 300).astype(np.float32)), ["from 0 to 300", "[0, 1]"]),
        (lambda: tiff(np.full((8, 8), np.nan, np.float32)), ["nan", "[0, 1]"]),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, content: Callable[[], bytes], words: list[str]) -> None:
    file = tmp_path / "a" / "1.tif"
    file.parent.mkdir()
    file.write_bytes(content())
    for read in (lambda: Folder(str(tmp_path)).load([0]), lambda: read_image(str(file), (1, 8, 8))):
        with pytest.raises(CorruptAsset) as error:
            read()
        one_line(error, "1.tif", *words)


def test_transparency_and_rotation_are_as_imagefolder_reads_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    (tmp_path / "a").mkdir()
    rng = np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "a" / "1.jpg", exif=turned)
    Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8)).save(tmp_path / "a" / "2.png")
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).convert("P").save(tmp_path / "a" / "3.png", transparency=3)
    images, _ = Folder(str(tmp_path), size=8).load([0, 1, 2])
    for row, (image, _) in zip(images, ImageFolder(str(tmp_path))):
        assert torch.equal((row * 255).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(image)))
    assert Folder(str(tmp_path), size=8, channels=4).load([1])[0][0, 3].unique().numel() > 1


# Sizes


@pytest.mark.parametrize("spec", ["samples(size=12x16)", "folder(path=PETS, size=12x16)", "npz(path=FILE, size=12x16)"])
def test_images_need_not_be_square(pets: Folder, tmp_path: Path, spec: str) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 9, 9), np.uint8), labels=[0, 1])
    dataset = datasets.parse(spec.replace("PETS", json.dumps(pets.path)).replace("FILE", str(tmp_path / "a.npz")))
    assert dataset.image_shape[1:] == (12, 16)
    assert dataset.load([0])[0].shape[2:] == (12, 16) == dataset.mean().shape[1:]
    assert datasets.parse(datasets.spec(dataset)) == dataset


def test_a_rectangle_is_cut_from_the_centre_without_stretching(tmp_path: Path) -> None:
    values = np.zeros((16, 32), np.uint8)
    values[:, 8:24] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / "1.png")
    image = Folder(str(tmp_path), size="16x8").load([0])[0][0]
    assert image.shape == (3, 16, 8)
    assert image.min() == 1


@pytest.mark.parametrize("size", ["4x40", "40x", "axb", "8x8x8", "2000x8"])
def test_sizes_that_are_none_are_refused(size: str) -> None:
    with pytest.raises(BadOption) as error:
        datasets.parse(f"samples(size={size})")
    one_line(error, "size=")


def test_the_channels_are_those_of_the_first_layer(pets: Folder) -> None:
    for channels in (1, 3, 4):
        given = AuditedNetwork("own", net(channels=channels))
        assert images_of(pets.path, "8", None, given).image_shape == (channels, 8, 8)
    assert images_of(pets.path, "8x16", 1, given).image_shape == (1, 8, 16)
    assert first_channels(nn.Sequential(nn.Flatten(), nn.Linear(4, 4))) is None
    assert first_channels(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))) is None
    assert images_of("samples", None, None, AuditedNetwork("own", net(channels=1))).image_shape == (1, 32, 32)
    for option in ({"size": "8"}, {"channels": 1}):
        with pytest.raises(BadOption, match=f"has one {next(iter(option))}"):
            images_of("pairs-of-nothing" if not option else "stripes", **option)


@pytest.fixture(autouse=True)
def _stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset without options."""
    registry = datasets.registry
    registry.names()
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))

    class Stripes(leakbench.Dataset):
        num_classes = 2
        image_shape = (1, 8, 8)

        def __len__(self) -> int:
            return 1

        def load(self, indices):
            return torch.zeros(len(indices), 1, 8, 8), torch.zeros(len(indices), dtype=torch.int64)

        def mean(self):
            return torch.zeros(1, 8, 8)

    registry.register("stripes")(Stripes)


@pytest.mark.parametrize(
    ("arrays", "shape", "labels"),
    [
        ({"images": np.full((2, 9, 9), 51, np.uint8), "labels": [1, 0]}, (1, 9, 9), [1, 0]),
        ({"test_images": np.full((2, 9, 8, 3), 51, np.uint8), "test_labels": [[1], [0]]}, (3, 9, 8), [1, 0]),
        ({"x": np.full((2, 4, 9, 8), 0.2), "y": [1.0, 0.0]}, (4, 9, 8), [1, 0]),
        ({"x_val": np.full((2, 9, 9), 13107, np.uint16), "y_val": [1, 0]}, (1, 9, 9), [1, 0]),
    ],
)
def test_arrays_are_a_dataset(
    tmp_path: Path, arrays: dict[str, Any], shape: tuple[int, ...], labels: list[int]
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    dataset = images_of(str(tmp_path / "a.npz"))
    images, found = dataset.load([0, 1])
    assert (dataset.image_shape, found.tolist(), dataset.num_classes) == (shape, labels, 2)
    assert torch.allclose(images, torch.tensor(0.2), atol=1e-6)
    assert images.dtype == torch.float32
    assert datasets.parse(datasets.spec(dataset)).settings() == dataset.settings()


def test_the_mean_of_arrays_is_that_of_the_training_part(tmp_path: Path) -> None:
    more = {"train_images": np.full((3, 9, 9), 255, np.uint8), "train_labels": [0, 4, 1]}
    np.savez(tmp_path / "a.npz", test_images=np.zeros((2, 9, 9), np.uint8), test_labels=[1, 0], **more)
    dataset = datasets.parse(f"npz:{tmp_path / 'a.npz'}")
    assert (float(dataset.mean().min()), len(dataset), dataset.num_classes) == (1, 2, 5)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros((2, 9, 9))}, ["found: pictures", "images and labels"]),
        ({"images": np.zeros((2, 9, 9)), "labels": np.zeros((2, 14))}, ["(2, 14)", "several labels"]),
        ({"images": np.zeros((2, 9, 9)), "labels": [0.5, 1]}, ["no whole numbers"]),
        ({"images": np.zeros((2, 9, 9)), "labels": [0]}, ["2 images and 1 labels"]),
        ({"images": np.zeros((2, 9, 9)) - 1, "labels": [0, 1]}, ["from -1 to -1"]),
        ({"images": np.zeros((2, 9, 9), np.int64), "labels": [0, 1]}, ["int64"]),
        ({"images": np.zeros((2, 9, 9, 9)), "labels": [0, 1]}, ["(2, 9, 9, 9)"]),
    ],
)
def test_arrays_that_leave_a_doubt_are_refused(tmp_path: Path, arrays: dict[str, Any], words: list[str]) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadOption) as error:
        len(images_of(str(tmp_path / "a.npz")))
    one_line(error, *words)


def test_other_array_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 9, 9)))
    np.savez(tmp_path / "o.npz", images=np.array([{}], dtype=object), labels=[0])
    with pytest.raises(BadOption, match=r"one array and no labels"):
        len(images_of(str(tmp_path / "x.npy")))
    with pytest.raises(CorruptAsset, match="plain arrays"):
        len(images_of(str(tmp_path / "o.npz")))
    with pytest.raises(BadOption, match="is a file"):
        len(datasets.parse(f"folder:{tmp_path / 'x.npy'}"))


@pytest.mark.parametrize("name", ["scan (1)", "a (b) (c)", "a(b", "x) (y)", "a,b (2)"])
def test_a_path_may_have_brackets(name: str) -> None:
    dataset = datasets.parse(f"folder:{name}")
    assert dataset.options()["path"] == name
    assert datasets.parse(datasets.spec(dataset)) == dataset
    if name != "x) (y)":  # whose brackets match none
        assert datasets.parse(f"folder:{name}(size=16)").options() == {**dataset.options(), "size": 16}


def test_what_observe_is_given_may_be_arrays_and_lists() -> None:
    images = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    fixed = {"seed": 0, "salt": "0" * 32}
    wanted = leakbench.observe(net(), images, torch.tensor([1, 3]), **fixed).gradient
    hot = torch.eye(4)[[1, 3]]
    for given, labels in (
        (images.numpy(), np.array([1, 3])),
        (list(images), [1, 3]),
        ([row.numpy() for row in images], hot.int().tolist()),
        (images.double(), torch.tensor([1.0, 3.0])),
        (images.tolist(), hot),
        (images, hot.bool().numpy()),
    ):
        found = leakbench.observe(net(), given, labels, **fixed).gradient
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.items())


def test_a_client_may_train_on_class_probabilities() -> None:
    images, soft = torch.rand(2, *SHAPE), torch.tensor([[0.1, 0.2, 0.3, 0.4], [0, 1, 0, 0]])
    own = net()
    found = leakbench.observe(own, images, soft)
    loss = nn.functional.cross_entropy(own(images[:1]), soft[:1])
    wanted = torch.autograd.grad(loss, own[3].weight)[0]
    assert torch.allclose(found.gradient["3.weight"][0], wanted, atol=1e-6)
    assert leakbench.observe(own, images, soft, defense="mixup").trials == 2
    with pytest.raises(Unsupported, match="labels=known"):
        leakbench.observe(own, images, soft, threat="known-label")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0.5, 1], "no whole numbers"),
        (torch.tensor([0.0, float("nan")]), "no whole numbers"),
        ([[0.5, 0.1, 0, 0], [0, 0, 0, 1]], "add up to 1"),
        ([[1.0, 0], [0, 1]], "rows of 4 numbers"),
        ([0, 4], "0 to 3"),
        ([0], "and labels (1,)"),
        (["cat", "dog"], "no numbers"),
    ],
)
def test_labels_that_are_none_are_refused(labels: Any, words: str) -> None:
    with pytest.raises(BadOption) as error:
        leakbench.observe(net(), torch.rand(2, *SHAPE), labels)
    one_line(error, words)


def test_images_of_bytes_are_refused_with_their_range() -> None:
    with pytest.raises(BadOption, match=r"give them in \[0, 1\]"):
        leakbench.observe(net(), np.full((1, *SHAPE), 200, np.uint8), [0])


# Checkpoints

WRAPPED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "tutorial": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "model": lambda state: {"epoch": 3, "model": state, "args": argparse.Namespace(lr=0.1)},
    "ema": lambda state: {"ema": {"module": state, "decay": 0.9}, "best": np.float64(0.5)},
    "lightning": lambda state: {"state_dict": {"model." + k: v for k, v in state.items()}, "global_step": 3},
    "parallel": lambda state: {"module." + k: v for k, v in state.items()},
    "parallel and compiled": lambda state: {"module._orig_mod." + k: v for k, v in state.items()},
    "opacus": lambda state: {"_module." + k: v for k, v in state.items()},
    "fabric": lambda state: {"model": {"_forward_module." + k: v for k, v in state.items()}},
    "arrays": lambda state: {k: v.numpy() for k, v in state.items()},
    "half": lambda state: {k: v.half() for k, v in state.items()},
    "list": lambda state: list(state.values()),
    "list of arrays": lambda state: {"weights": [v.numpy() for v in state.values()]},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_checkpoints_of_usual_tools_are_read(tmp_path: Path, name: str) -> None:
    own, blank = net(), net()
    nn.init.zeros_(blank[0].weight)
    torch.save(WRAPPED[name](own.state_dict()), tmp_path / "a.pt")
    weights.load(blank, str(tmp_path / "a.pt"))
    assert torch.allclose(blank[0].weight, own[0].weight, atol=1e-3)


def test_a_network_within_a_wrapper_reads_names_without_it(tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "a.safetensors")
    outer = nn.ModuleDict({"model": nn.ModuleDict({"net": net()})})
    nn.init.zeros_(outer["model"]["net"][0].weight)
    weights.load(outer, str(tmp_path / "a.safetensors"))
    assert bool(outer["model"]["net"][0].weight.any())
    np.savez(tmp_path / "a.npz", *[value.numpy() for value in net().state_dict().values()])
    weights.load(net(), str(tmp_path / "a.npz"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {"backbone." + k: v for k, v in s.items()}, ["begin with 'backbone.'", "remove this prefix"]),
        (lambda s: {k: v for k, v in s.items() if "bias" not in k}, ["2 of the network's 4", "'0.bias', '3.bias'"]),
        (lambda s: {**s, "head.weight": s["0.weight"]}, ["extra tensor 'head.weight'"]),
        (lambda s: {"3.lora_A.weight": s["0.weight"]}, ["adapters (LoRA)"]),
        (lambda s: {**s, "epoch": 3}, ["'epoch' holds int"]),
        (lambda s: {}, ["has no tensor"]),
        (lambda s: [1, 2], ["'0' holds int"]),
        (lambda s: {**s, "3.weight": s["3.weight"][:2]}, ["'3.weight' of shape (2, 64), not (4, 64)"]),
        (lambda s: net(), ["cannot be read as plain tensors"]),
    ],
)
def test_a_checkpoint_of_another_network_says_what_differs(tmp_path: Path, change: Any, words: list[str]) -> None:
    torch.save(change(net().state_dict()), tmp_path / "a.pt")
    with pytest.raises(LeakbenchError) as error:
        weights.load(net(), str(tmp_path / "a.pt"))
    one_line(error, "a.pt", *words)


def test_code_in_a_pickle_of_arrays_is_not_run(tmp_path: Path) -> None:
    for evil in ({"a": print}, {"a": np.array([print], dtype=object)}, pickle.dumps(print)):
        torch.save(evil, tmp_path / "a.pt")
        with pytest.raises(CorruptAsset):
            weights.load(net(), str(tmp_path / "a.pt"))


class Adapted(nn.Module):
    """A frozen linear layer with an adapter, as LoRA adds one."""

    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.head = nn.Linear(192, 6).requires_grad_(not frozen), nn.Linear(6, 4)
        self.head.requires_grad_(not frozen)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(192, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 6, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return self.head(torch.sigmoid(self.base(x) + self.lora_B["default"](self.lora_A["default"](x))))


def recorded(
    folder: Path, network: nn.Module, change: Callable[[dict[str, torch.Tensor]], Any] = dict
) -> AuditedNetwork:
    """Write before.pt and after.pt of a step of a network on one image, and return it."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(state, folder / "before.pt")
    image = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(3))
    names = [name for name, value in network.named_parameters() if value.requires_grad]
    loss = nn.functional.cross_entropy(network(image), torch.tensor([1]))
    grads = dict(zip(names, torch.autograd.grad(loss, [network.get_parameter(name) for name in names])))
    after = {name: value - 0.1 * grads[name] if name in grads else value for name, value in state.items()}
    torch.save(change(after), folder / "after.pt")
    torch.save({name: -0.1 * value for name, value in grads.items()}, folder / "delta.pt")
    torch.save(grads, folder / "gradient.pt")
    return AuditedNetwork("own", network)


@pytest.mark.parametrize("frozen", [True, False])
def test_an_update_of_adapters_is_served_with_the_rest_in_before(tmp_path: Path, frozen: bool) -> None:
    def adapters(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"base_model.model.{k.replace('.default', '')}": v for k, v in state.items() if "lora_" in k}

    network = recorded(tmp_path, Adapted(frozen), adapters)
    update = read_update(network, str(tmp_path / "before.pt"), str(tmp_path / "after.pt"))
    assert set(update.change) == {"lora_A.default.weight", "lora_B.default.weight"}
    assert update.trained == (2 if frozen else 6)
    with pytest.raises(BadOption) as error:
        read_update(network, str(tmp_path / "after.pt"), str(tmp_path / "after.pt"))
    one_line(error, "--before", "2 of the network's 6 tensors")


@pytest.mark.long
def test_a_network_of_adapters_is_attacked_on_images(cli, place: Path) -> None:  # noqa: F811
    (place / "nets.py").write_text(
        "import torch\nfrom torch import nn\nclass build(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.base = nn.Linear(432, 3).requires_grad_(False)\n"
        "        self.a = nn.Parameter(torch.randn(2, 432) / 9); self.b = nn.Parameter(torch.ones(3, 2))\n"
        "    def forward(self, x):\n        x = x.flatten(1)\n"
        "        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b)\n"
    )
    command = ("audit", "--plugin", "nets.py", "--model", "build", "--data", "samples(size=12)", "--first", "3")
    done = cli(*command, "--budget", "quick", "--images", "1", "--out", "out")
    assert done.code == 0
    assert "No closed-form rule infers the label from what was sent." in (place / "out" / "audit.md").read_text()


@pytest.mark.parametrize("scale", ["quick", "standard-update", "thorough"])
def test_without_a_closed_form_for_the_label_attacks_optimise_it(scale: str) -> None:
    plain, joint = (AuditOptions().matrix(scale, {}, joint_labels=joint) for joint in (False, True))
    chosen = [
        [attack.options().get("labels") for stage in one.stages for attack in stage.attacks] for one in (plain, joint)
    ]
    assert "analytic" in chosen[0]
    assert chosen[1] == ["joint" if labels == "analytic" else labels for labels in chosen[0]]


def test_a_list_of_parameters_is_served_with_the_buffers_in_before(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    given = recorded(tmp_path, network, lambda state: [state[name] for name, _ in network.named_parameters()])
    update = read_update(given, str(tmp_path / "before.pt"), str(tmp_path / "after.pt"))
    assert set(update.change) == {name for name, _ in network.named_parameters()}
    with pytest.raises(BadOption) as error:
        read_update(given, str(tmp_path / "after.pt"), str(tmp_path / "after.pt"))
    one_line(error, "--before", "lacks '1.running_mean'")


@pytest.mark.parametrize(("file", "flag"), [("delta", "--delta"), ("gradient", "--gradient")])
def test_a_difference_or_gradient_is_known_as_one(tmp_path: Path, file: str, flag: str) -> None:
    given = recorded(tmp_path, net())
    paths = str(tmp_path / "before.pt"), str(tmp_path / f"{file}.pt")
    with pytest.raises(BadOption) as error:
        read_update(given, *paths)
    one_line(error, f"{file}.pt", "does not hold weights", f"give {flag}")
    wanted = read_update(given, paths[0], str(tmp_path / "after.pt")).change
    found = read_update(given, *paths, "delta" if file == "delta" else "gradient")
    scale = 1 if file == "delta" else 0.1
    assert all(torch.allclose(scale * found.change[name], value, atol=1e-6) for name, value in wanted.items())
    assert max(found.rounding.values()) < 1e-6
    for wrong, words in (("gradient" if file == "delta" else "delta", f"give {flag}, not"),):
        with pytest.raises(BadOption, match=words):
            read_update(given, *paths, wrong)  # type: ignore[arg-type]
    for kind in ("delta", "gradient"):
        with pytest.raises(BadOption, match=f"holds weights .*; leave --{kind} out"):
            read_update(given, paths[0], str(tmp_path / "after.pt"), kind)  # type: ignore[arg-type]


@pytest.mark.long
def test_a_recorded_gradient_is_attacked_without_a_rate(cli, place: Path) -> None:  # noqa: F811
    (place / "nets.py").write_text("from test_inputs import net\ndef build(): return net()\n")
    recorded(place, net())
    command = ("audit", "--plugin", "nets.py", "--model", "build", "--before", "before.pt", "--size", "8", "--budget")
    for file in ("delta", "gradient"):
        done = cli(*command, "quick", "--after", f"{file}.pt", f"--{file}", "--out", file)
        assert (done.code, done.err) == (0, "")
        text = (place / file / "audit.md").read_text()
        assert f"{file}.pt, a {file}, of the weights before.pt" in text
        assert "class 1" in text
        assert "one image in one step explains the change of layer" in text
    assert "not needed: the gradient itself was recorded" in text
    refused(cli(*command, "quick", "--after", "delta.pt", "--out", "x"), "give --delta")
    refused(cli(*command, "quick", "--after", "delta.pt", "--delta", "--gradient", "--out", "x"), "leave one")


# Precision and wrappers


class Checkpointed(nn.Module):
    """Recomputes its first layer in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = net(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.inner[2:](checkpoint(self.inner[:2], x, use_reentrant=self.reentrant))


class Autocast(nn.Module):
    """Computes in bfloat16 within."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


class Plain(nn.Module):
    """Has a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = net(), torch.full((1, 3, 1, 1), 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(nn.functional.conv2d(x, self.scale.view(3, 1, 1, 1), groups=3))


@pytest.mark.parametrize("kept", [list, tuple, lambda found: {"scales": list(found)}])
def test_a_tensor_in_a_container_is_refused_by_name(kept: Callable[[Any], Any]) -> None:
    network = nn.Sequential(net())
    network[0].scales = kept([torch.ones(3), torch.ones(3)])
    with pytest.raises(Unsupported) as error:
        OwnModule("own", network).build(SHAPE, 4)
    one_line(error, "model 'own'", "layer '0'", "'scales'", "register_buffer")
    network[0].scales = kept([network[0][0].weight, 1])  # which moves with its layer
    assert isinstance(OwnModule("own", network).build(SHAPE, 4), nn.Module)
    assert isinstance(OwnModule("own", Recurrent()).build(SHAPE, 4), nn.Module)


class Recurrent(nn.Module):
    """Has a layer that lists its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.LSTM(24, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(4))


class Asserting(nn.Module):
    """Raises an error of Python for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("missing")


def compiled() -> nn.Module:
    return torch.compile(net())  # type: ignore[return-value]


def compiled_within() -> nn.Module:
    network = net()
    network[0] = torch.compile(network[0])  # type: ignore[assignment]
    return nn.Sequential(network)


def compiled_forward() -> nn.Module:
    network = net()
    network.forward = torch.compile(network.forward)  # type: ignore[method-assign]
    return network


def compiled_in_place() -> nn.Module:
    network = net()
    network.compile()
    return network


SERVED: dict[str, Callable[[], nn.Module]] = {
    "bfloat16": lambda: net().bfloat16(),
    "float16": lambda: net().half(),
    "float64": lambda: net().double(),
    "autocast": Autocast,
    "checkpointed": lambda: Checkpointed(False),
    "reentrant": lambda: Checkpointed(True),
    "plain tensor": Plain,
    "lazy": lazy,
    "parallel": lambda: nn.DataParallel(net()),
    "compiled": compiled,
    "compiled within": compiled_within,
    "compiled forward": compiled_forward,
    "compiled in place": compiled_in_place,
}


SLOW = ("compiled", "compiled forward")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in SLOW else name for name in SERVED]
)
def test_networks_of_any_precision_and_wrapper_are_attacked(name: str) -> None:
    network, images = SERVED[name](), torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    assert classes_of(AuditedNetwork("own", network).at(SHAPE).model(3), SHAPE) == 4
    assert ("precision" in dict(AuditedNetwork("own", network).facts("x"))) == name.startswith(("float", "bfloat"))
    seen = leakbench.observe(network, images, [1, 2])
    exact = torch.float64 if name == "float64" else torch.float32
    assert {value.dtype for value in seen.gradient.values()} == {exact}
    assert {value.dtype for value in seen.weights.values()} == {exact}
    found = leakbench.attack("ig(steps=2)", seen)
    assert bool(found.images.isfinite().all())
    assert not bool(found.failed.any())  # type: ignore[union-attr]
    assert found.labels is not None
    assert found.labels.tolist() == [1, 2]
    if "compiled" in name or name == "parallel":
        assert bool(next(iter(leakbench.observe(net(), images, [1, 2]).gradient.values())).any())


@pytest.mark.parametrize("within", [False, True])
def test_torchscript_is_refused_in_one_line(within: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it old
        scripted = torch.jit.trace(net(), torch.rand(1, *SHAPE))
    network = nn.Sequential(scripted) if within else scripted
    with pytest.raises(Unsupported) as error:
        unwrapped(network, "--model 'x'")
    one_line(error, "--model 'x'", "TorchScript", *["layer '0'"] * within)


def test_a_network_that_raises_anything_is_refused(cli, place: Path) -> None:  # noqa: F811
    (place / "nets.py").write_text("from test_inputs import Asserting\n")
    done = cli("audit", "--plugin", "nets.py", "--model", "Asserting", "--data", "samples", "--out", "out")
    refused(done, "KeyError: 'missing'")


def test_lazy_layers_have_the_same_values_every_time(tmp_path: Path) -> None:
    own = OwnModule("own", lazy())
    one, two = (own.build(SHAPE, 4) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert one.training
    assert own.settings() == OwnModule("own", lazy()).settings()
    torch.save({f"{k}": v + 1 for k, v in one.state_dict().items()}, tmp_path / "a.pt")
    given = AuditedNetwork("own", lazy(), checkpoint=str(tmp_path / "a.pt")).at(SHAPE)
    assert torch.equal(given.module[3].bias, one[3].bias + 1)  # type: ignore[index, operator, union-attr]


def test_a_compiled_network_is_the_one_within() -> None:
    inner = net()
    assert unwrapped(torch.compile(inner), "x") is inner  # type: ignore[arg-type]
    assert unwrapped(inner, "x") is inner
    copied = unwrapped(compiled_within(), "x")
    assert [name for name, _ in copied.named_parameters()] == [f"0.{name}" for name, _ in inner.named_parameters()]


# Private images on pages


@pytest.mark.long
def test_a_page_can_leave_the_private_images_out(cli, place: Path) -> None:  # noqa: F811
    (place / "nets.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 3))\n"
    )
    command = (
        "audit",
        "--plugin",
        "nets.py",
        "--model",
        "build",
        "--data",
        "samples(size=12)",
        "--first",
        "3",
        "--out",
    )
    pages = {}
    for flag in ((), ("--no-truth",)):
        done = cli(*command, "out", "--budget", "quick", "--images", "1", "--fail-if", "psnr > 1", *flag)
        assert done.code == 1
        pages[flag] = (place / "out" / "audit.html").read_text()
    assert pages[()].count("data:image") >= 2
    assert "data:image" not in pages["--no-truth",]
    for words in ("The private images are left out of this page", "run.sqlite", "SSIM", "analytic", "its first 3 cl"):
        assert words in pages["--no-truth",]


# A notebook


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_a_class_of_a_notebook_is_sent_with_the_task(monkeypatch: pytest.MonkeyPatch, file: str | None) -> None:
    def main(name: str | None = file) -> ModuleType:
        module = ModuleType("__main__")
        module.__dict__.update({} if name is None else {"__file__": name})
        monkeypatch.setitem(sys.modules, "__main__", module)
        return module

    notebook = main()
    exec(
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__(); self.last = nn.Linear(2, 3)\n"
        "    def forward(self, x):\n        return self.last(x)\n",
        notebook.__dict__,
    )
    body = packed(OwnModule("own", notebook.Net()))
    assert len(packed(SimpleNamespace(a=1))) < 200
    main()  # the worker's own
    again = pickle.loads(body)
    assert again.module(torch.zeros(1, 2)).shape == (1, 3)
    answer = packed(("done", again))
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    assert type(pickle.loads(answer)[1].module) is notebook.Net
    main(__file__)  # a script, whose classes a worker imports
    with pytest.raises(LeakbenchError, match="define it at the top level"):
        packed(again)


# The client's random draws


class DropPath(nn.Module):
    """A residual branch that is left out for half of the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.a(x))
        if self.training:
            x = x + torch.sigmoid(self.b(x)) * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5)) * 2
        return self.last(x.flatten(1))


class Functional(nn.Module):
    """Dropout as a function, which stays on in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = net()[:3], nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(self.body(x), 0.5))


class Jitter(nn.Module):
    """Adds noise to its input, by Python's random numbers or torch's."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        self.inner, self.python = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Sigmoid(), nn.Linear(8, 4)), python

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self.inner(x)
        return self.inner(x * (1 + 0.1 * random.random()) if self.python else x + 0.1 * torch.randn_like(x))


class TimmDropPath(nn.Module):
    """Stochastic depth as timm writes it, in two residual blocks of a network for images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(2))
        self.last = nn.Linear(64, 4)

    def drop(self, x: torch.Tensor, keep: float = 0.5) -> torch.Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        kept.div_(keep)
        return x * kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sigmoid(self.stem(x))
        for block in self.blocks:
            x = x + self.drop(torch.sigmoid(block(x)))
        return self.last(x.flatten(1))


class Augmented(nn.Module):
    """Changes its images by one of torchvision's random augmentations, in whatever mode."""

    def __init__(self) -> None:
        super().__init__()
        self.augment, self.inner = RandAugment(2, 9, 31), net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.augment((255 * x).byte()) / 255 + 0 * x)


class Rounded(nn.Module):
    """Rounds its features up or down at random, with the derivative of the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner[:3](x)
        if self.training:
            x = x + ((16 * x + torch.rand_like(x)).floor() / 16 - x).detach()
        return self.inner[3](x)


def dropped(layer: nn.Module, at: int = 3) -> nn.Module:
    network = net()
    network.insert(at, layer)
    return network


READ: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: dropped(nn.Dropout(0.5)),
    "functional": Functional,
    "functional in eval": lambda: Functional().eval(),
    "channels": lambda: dropped(nn.Dropout2d(0.5), 2),
    "alpha off": lambda: dropped(nn.Dropout(0.5)).eval(),
    "stochastic depth": DropPath,
    "stochastic depth of timm": TimmDropPath,
    "behind a ReLU": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 4)
    ),
    "two": lambda: nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 64), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(64, 4)
    ),
}


@pytest.mark.parametrize("name", READ)
def test_draws_that_the_gradient_gives_away_are_read(name: str) -> None:
    network, images = READ[name](), torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(5))
    seen = leakbench.observe(network, images, [1, 2, 0])
    known = read_draws(seen)
    assert known.complete
    assert len(known.masks) == {"alpha off": 0, "two": 2, "stochastic depth of timm": 2}.get(name, 1)
    evaluator = Evaluator(seen.model, tuple(seen.gradient))
    for path in ("batched", "vmap", "one-at-a-time"):
        found = dataclasses.replace(evaluator, path=path).gradient(
            seen.weights, images, torch.tensor([1, 2, 0]), create_graph=False, known=known.masks
        )
        assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in seen.gradient.items())


UNREAD: dict[str, Callable[[], nn.Module]] = {
    "noise": lambda: Jitter(False),
    "python": lambda: Jitter(True),
    "before a convolution": lambda: nn.Sequential(nn.Dropout(0.5), net()),
    "leaky": lambda: dropped(nn.RReLU(), 1),
    "alpha": lambda: dropped(nn.AlphaDropout(0.5)),
    "augmented": Augmented,
    "rounded": Rounded,
}


@pytest.mark.parametrize("name", UNREAD)
def test_draws_that_are_not_read_are_a_doubt(name: str) -> None:
    network = UNREAD[name]()
    seen = leakbench.observe(network, torch.rand(2, *SHAPE), [1, 2])
    found = randomness(network, SHAPE)
    assert found.doubt()
    assert "\n" not in found.doubt()
    assert name == "python" or not read_draws(seen).complete
    quiet = randomness(network.eval(), SHAPE)
    assert bool(quiet.doubt()) == (name == "augmented")
    assert bool(quiet.inputs) == (name == "augmented")


def smooth(count: int) -> torch.Tensor:
    """Images whose pixels change slowly, the same in each call."""
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear", align_corners=True)


@pytest.mark.parametrize("attack", ["analytic", "peel"])
def test_pixels_that_dropout_hid_are_filled_in(attack: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(192, 32), nn.Sigmoid(), nn.Linear(32, 4))
    images = smooth(2)
    seen = leakbench.observe(network, images, [1, 2])
    found = leakbench.attack(attack, seen)
    kept = read_draws(seen).masks[0].view_as(images) == 1
    assert 0.6 < float(kept.double().mean()) < 0.8
    assert torch.allclose(found.images[kept], images[kept], atol=1e-4)
    assert float((found.images - images)[~kept].abs().mean()) < 0.02


CLOSED: dict[str, Callable[[], nn.Module]] = {
    "values": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 4)
    ),
    "channels": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.Tanh(), nn.Dropout2d(0.25), nn.Conv2d(32, 48, 3, 1, 1), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(768, 4),
    ),
    "function": lambda: Dropping(),
}  # fmt: skip


class Dropping(nn.Module):
    """Dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.last = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(256, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(nn.functional.dropout(torch.sigmoid(self.a(x)).flatten(1), 0.5, self.training))


def through_relus() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(32, 48, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(48, 48, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(768, 4),
    )  # fmt: skip


def deeper(layer: nn.Module) -> nn.Module:
    body = nn.Conv2d(3, 4, 3, 2, 1), nn.Sigmoid(), nn.Conv2d(4, 1, 3, 1, 1), nn.Sigmoid(), nn.Flatten()
    return nn.Sequential(*body, layer, nn.Linear(16, 4))


@pytest.mark.parametrize("name", CLOSED)
def test_peel_goes_back_through_dropout(name: str) -> None:
    torch.manual_seed(0)
    images = smooth(2)
    found = leakbench.attack("peel", leakbench.observe(CLOSED[name](), images, [1, 2], seed=1, salt="0" * 32))
    assert torch.allclose(found.images, images, atol=0.02)


def test_each_trial_of_a_relu_network_keeps_its_own_channels() -> None:
    seen = leakbench.observe(through_relus(), smooth(3), [1, 2, 0], seed=1, salt="0" * 32)
    network = Network(trace(seen))
    (at,) = [number for number, step in enumerate(network.steps) if step.name == "2"]
    assert network.steps[at].kind == "affine"
    masks = read_draws(seen).masks[0]
    assert len(masks.flatten(1).unique(dim=0)) > 1
    for trial in range(3):
        kept = network.on(filled(seen, trial), trial).forward(at, [torch.ones(1, 32, 4, 4).double()])
        assert torch.allclose(kept, (masks[trial] / 0.9).expand(1, 32, 4, 4))


@pytest.mark.long
def test_peel_goes_back_through_dropout_in_a_relu_network() -> None:
    images = smooth(1)
    found = leakbench.attack("peel", leakbench.observe(through_relus(), images, [1], seed=1, salt="0" * 32))
    assert float((found.images - images).abs().mean()) < 0.03


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda: deeper(nn.Dropout(0.5)), ["equations", "of whose outputs dropout hides"]),
        (lambda: nn.Sequential(nn.Dropout(0.5), net()), ["back through 0", "do not follow from the gradient"]),
        (lambda: dropped(nn.AlphaDropout(0.5)), ["back through 3", "draws random numbers"]),
    ],
)
def test_peel_names_the_random_layer_that_stops_it(network: Callable[[], nn.Module], words: list[str]) -> None:
    seen = leakbench.observe(network(), smooth(1), [1], seed=1, salt="0" * 32)
    with pytest.raises(Unsupported) as error:
        leakbench.attack("peel", seen)
    one_line(error, *words)


def test_the_layers_that_draw_are_named() -> None:
    assert randomness(dropped(nn.Dropout(0.5)), SHAPE).layers == ("3",)
    assert randomness(Functional(), SHAPE).layers == ("the network itself",)
    assert randomness(dropped(nn.Dropout(0.5)), SHAPE).inputs == {"4"}
    assert randomness(net(), SHAPE).layers == ()
    assert (
        randomness(nn.Sequential(net()[:3], *(nn.Dropout() for _ in range(4)), net()[3]), SHAPE).names()
        == "1, 2, 3 and 1 other"
    )
    assert randomness(dropped(nn.Dropout(0)), SHAPE).layers == ()


def test_noise_hides_a_mask() -> None:
    images = torch.rand(1, *SHAPE)
    for defense in ("noise(scale=0.001)", "prune"):
        seen = leakbench.observe(dropped(nn.Dropout(0.5)), images, [1], defense=defense)
        assert not read_draws(seen).complete


def test_a_gate_does_not_pass_on_draws_that_are_not_read(cli, place: Path) -> None:  # noqa: F811
    (place / "nets.py").write_text(
        "from torch import nn\nfrom test_inputs import Jitter\n"
        "def build(): return nn.Sequential(nn.AdaptiveAvgPool2d(8), Jitter(False))\n"
    )
    command = ("audit", "--plugin", "nets.py", "--model", "build", "--data", "samples(size=12)", "--first", "4")
    done = cli(*command, "--budget", "quick", "--images", "1", "--fail-if", "recovered > 0.9", "--out", "out")
    text = (place / "out" / "audit.md").read_text()
    assert (done.code, "cannot be judged: Clients draw random numbers" in done.err) == (2, True)
    assert "Inconclusive: clients draw random numbers" in text
    assert "active while clients train, and not all their draws are inferred from what was sent" in text
    assert "&#38;&#35;" not in text  # nothing is escaped twice
    assert "the image itself" not in text
