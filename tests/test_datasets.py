"""The datasets: what ships, what the cache holds, and folders of the user's own."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leakbench import assets, datasets
from leakbench.datasets import folder, samples
from leakbench.datasets.images import convert
from leakbench.datasets.mnist import read_idx
from leakbench.errors import BadOption, CorruptAsset, MissingAsset

STORED = ["mnist", "fashion-mnist", "cifar10", "cifar100"]


def paint(file: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (40, 60)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders a and b with three images."""
    root = tmp_path / "photos"
    paint(root / "b" / "1.png", (255, 0, 0))
    paint(root / "a" / "2.png", (0, 255, 0), (60, 40))
    paint(root / "a" / "1.png", (0, 0, 255))
    (root / "a" / "notes.txt").write_text("no image")
    return root


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# What ships


def test_samples_are_colour_images_of_every_photograph() -> None:
    dataset = datasets.parse("samples")
    images, labels = dataset.load(range(len(dataset)))
    assert len(dataset) == 64
    assert images.shape == (64, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert sorted(set(labels.tolist())) == list(range(dataset.num_classes)) == sorted(set(labels[:8].tolist()))
    assert images.flatten(1).std(1).min() > 0.02
    assert len({image.numpy().tobytes() for image in images}) == 64


def test_samples_are_loaded_at_the_indices_asked_for() -> None:
    dataset = datasets.parse("samples")
    images, labels = dataset.load(range(64))
    some, some_labels = dataset.load([63, 0, 5, 5])
    assert torch.equal(some, images[[63, 0, 5, 5]])
    assert torch.equal(some_labels, labels[[63, 0, 5, 5]])


def test_public_crops_overlap_no_image_that_may_be_attacked() -> None:
    with (samples.FOLDER / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    attacked, public = ([row for row in rows if row["sheet"] == sheet] for sheet in ("images", "public"))
    assert len(attacked) == 64
    assert len(public) == 32
    for one in public:
        for other in attacked:
            if one["photograph"] == other["photograph"]:
                x, y, side = (int(one[key]) for key in ("x", "y", "side"))
                left, top, width = (int(other[key]) for key in ("x", "y", "side"))
                assert x + side <= left or left + width <= x or y + side <= top or top + width <= y


def test_the_mean_of_samples_is_that_of_the_public_crops() -> None:
    with Image.open(samples.FOLDER / "public.png") as image:
        pixels = np.array(image, dtype=np.float64) / 255
    crops = [pixels[32 * (n // 8) :, 32 * (n % 8) :][:32, :32] for n in range(32)]
    mean = datasets.parse("samples").mean()
    assert mean.shape == (3, 32, 32)
    assert np.allclose(mean.permute(1, 2, 0), np.mean(crops, axis=0), atol=1e-6)


def test_every_photograph_is_credited() -> None:
    credits = (samples.FOLDER / "CREDITS.md").read_text()
    with (samples.FOLDER / "index.csv").open(newline="") as file:
        photographs = {row["photograph"]: row["label"] for row in csv.DictReader(file)}
    assert len(photographs) == samples.Samples.classes
    for name, label in photographs.items():
        assert f"| {label} | `{name}` |" in credits


def test_a_damaged_sheet_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "FOLDER", tmp_path)
    samples._sheet.cache_clear()
    try:
        with pytest.raises(CorruptAsset, match="install leakbench anew"):
            datasets.parse("samples").load([0])
    finally:
        samples._sheet.cache_clear()


@pytest.mark.parametrize("index", [64, 70, -1])
def test_an_index_out_of_range_is_told(index: int) -> None:
    with pytest.raises(BadOption) as error:
        datasets.parse("samples").load([0, index])
    assert one_line(error) == (
        f"image index {index} is out of range for dataset 'samples' (64 images); give indices from 0 to 63"
    )


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("samples", (3, 32, 32)),
        ("samples:64", (3, 64, 64)),
        ("samples(size=16, channels=1)", (1, 16, 16)),
        ("mnist", (1, 28, 28)),
        ("mnist(size=32, channels=3)", (3, 32, 32)),
        ("fashion-mnist(split=train)", (1, 28, 28)),
        ("cifar10(channels=1)", (1, 32, 32)),
        ("cifar100(size=8)", (3, 8, 8)),
        ("folder:somewhere", (3, 32, 32)),
        ("folder(path=somewhere, size=64, channels=1)", (1, 64, 64)),
        ("imagenet:somewhere", (3, 224, 224)),
    ],
)
def test_options_shape_the_images(spec: str, shape: tuple[int, int, int]) -> None:
    dataset = datasets.parse(spec)
    assert dataset.image_shape == shape
    assert datasets.parse(datasets.spec(dataset)) == dataset
    if spec.startswith("samples"):
        images, _ = dataset.load([0, 1, 2])
        assert images.shape == (3, *shape)
        assert dataset.mean().shape == shape
        assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize("spec", ["samples:4", "samples(size=2000)", "samples(channels=2)", "mnist(split=val)"])
def test_options_that_do_not_fit_are_refused(spec: str) -> None:
    with pytest.raises(BadOption, match="is not valid"):
        datasets.parse(spec)


def test_conversion_keeps_constants_and_means() -> None:
    constant = torch.tensor([0.2, 0.5, 0.9])[None, :, None, None].expand(1, 3, 32, 32)
    for size in (8, 31, 32, 64):
        assert torch.allclose(convert(constant, size, None), constant[..., :1, :1].expand(1, 3, size, size), atol=1e-6)
    grey = convert(constant, None, 1)
    assert torch.allclose(grey, torch.tensor(0.299 * 0.2 + 0.587 * 0.5 + 0.114 * 0.9))
    assert torch.allclose(convert(grey, None, 3), grey.expand(1, 3, 32, 32))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(convert(image, 8, None).mean(), image.mean(), atol=0.02)
    assert convert(image, 8, None).std() < image.std() / 2  # antialiased


# The cache


@pytest.mark.parametrize("name", STORED)
def test_a_missing_dataset_names_the_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path))
    dataset = datasets.parse(name)
    for verb in (lambda: dataset.load([0]), dataset.mean):
        with pytest.raises(MissingAsset, match=f"run `leakbench assets fetch {name}`") as error:
            verb()
        one_line(error)


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose CIFAR-100 holds random bytes of the right size, recorded as fetched."""
    import hashlib

    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    (tmp_path / "cifar100").mkdir()
    sums = ""
    for split, count in (("train", 50000), ("test", 10000)):
        content = rng.bytes(3074 * 100) * (count // 100)
        (tmp_path / "cifar100" / f"{split}.bin").write_bytes(content)
        sums += f"{hashlib.sha256(content).hexdigest()}  {split}.bin\n"
    (tmp_path / "cifar100" / "SHA256SUMS").write_text(sums)
    return tmp_path / "cifar100"


def test_records_are_read_as_they_lie(cached: Path) -> None:
    dataset = datasets.parse("cifar100")
    images, labels = dataset.load([0, 9999, 3])
    records = np.fromfile(cached / "test.bin", np.uint8).reshape(-1, 3074)
    for row, index in enumerate([0, 9999, 3]):
        assert labels[row] == records[index, 1]  # the fine label
        assert np.allclose(images[row].numpy(), records[index, 2:].reshape(3, 32, 32) / 255)
    train = np.fromfile(cached / "train.bin", np.uint8).reshape(-1, 3074)[:100, 2:].reshape(-1, 3, 32, 32)
    assert np.allclose(dataset.mean(), train.mean(0) / 255, atol=1e-6)
    other = datasets.parse("cifar100(split=train)")
    assert len(other) == 50000
    assert np.allclose(other.mean(), records[:100, 2:].reshape(-1, 3, 32, 32).mean(0) / 255, atol=1e-6)


def test_a_corrupt_dataset_is_not_read(cached: Path) -> None:
    with (cached / "test.bin").open("r+b") as file:
        file.write(b"something else")
    with pytest.raises(CorruptAsset, match=r"test\.bin does not have the expected checksum"):
        datasets.parse("cifar100").load([0])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08\x03",
        struct.pack(">HBBI", 0, 8, 1, 5) + bytes(4),
        struct.pack(">HBBI", 0, 9, 1, 5) + bytes(5),
    ],
)
def test_a_file_that_is_no_idx_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CorruptAsset, match="not an idx file"):
        read_idx(tmp_path / "x")


def test_idx_files_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 2, 1, 3) + bytes(range(6)))
    assert read_idx(tmp_path / "x").tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    (tmp_path / "y").write_bytes(struct.pack(">HBBI", 0, 8, 1, 2) + bytes([7, 8]))
    assert read_idx(tmp_path / "y").tolist() == [7, 8]


# Folders


def test_a_folder_is_read_in_the_order_of_its_names(photos: Path) -> None:
    dataset = datasets.parse(f"folder(path={json.dumps(str(photos))}, size=16)")
    assert len(dataset) == 3
    assert dataset.num_classes == 2
    images, labels = dataset.load([0, 1, 2])
    assert labels.tolist() == [0, 0, 1]
    assert images.shape == (3, 3, 16, 16)
    assert images.mean((2, 3)).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert torch.equal(dataset.mean(), torch.full((3, 16, 16), 0.5))


def test_images_of_a_folder_are_grouped_by_the_beginning_of_their_names(tmp_path: Path) -> None:
    for name in ("a/p1_1.png", "a/p1_2.png", "a/p2_1.png", "a/x.png", "b/p1_9.png", "b/p2.png", "b/x.png"):
        paint(tmp_path / name, 9)
    plain = datasets.parse(f"folder:{tmp_path}")
    grouped = datasets.parse(f"folder(path={json.dumps(str(tmp_path))}, groups=_)")
    assert [plain.group(index) for index in range(7)] == list(range(7))
    assert [grouped.group(index) for index in range(7)] == [0, 0, 2, 3, 0, 5, 6]
    assert "groups" not in plain.settings(), "the ids of older trials stay the same"
    assert grouped.settings()["groups"] == "_"
    with pytest.raises(BadOption, match="out of range"):
        grouped.group(7)
    with pytest.raises(BadOption, match="leave groups out") as error:
        folder.Folder(str(tmp_path), groups="--").group(0)
    one_line(error)


def test_a_folder_is_scaled_on_its_short_side_and_cut_at_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    pixels[:, 100:200] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    images, _ = folder.Folder(str(tmp_path), size=50).load([0])
    assert images[..., 2:-2].min() == 1


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    paint(tmp_path / "a" / "1.png", 51)
    Image.new("RGBA", (40, 40), (255, 0, 0, 10)).save(tmp_path / "a" / "2.png")
    images, _ = folder.Folder(str(tmp_path)).load([0, 1])
    assert torch.allclose(images[0], torch.tensor(0.2))
    assert images[1].mean((1, 2)).tolist() == [1, 0, 0]


def test_the_mean_of_a_divided_folder_is_that_of_its_training_part(tmp_path: Path) -> None:
    for number in range(300):
        paint(tmp_path / "train" / "a" / f"{number:03}.png", 0 if number % 2 else 200, (8, 8))
    paint(tmp_path / "val" / "b" / "1.png", 255)
    dataset = folder.Folder(str(tmp_path), size=8)
    assert len(dataset) == 1
    assert dataset.num_classes == 2
    assert dataset.load([0])[1].tolist() == [1]
    assert len(dataset.listing().public) == folder.MEAN_IMAGES
    assert torch.allclose(dataset.mean(), torch.tensor(100 / 255), atol=0.02)
    assert torch.allclose(dataset.unattacked().mean(0), dataset.mean())
    assert len(dataset.unattacked()) == folder.MEAN_IMAGES


def test_imagenet_keeps_the_usual_margin(tmp_path: Path) -> None:
    pixels = np.zeros((256, 256, 3), dtype=np.uint8)
    pixels[16:240, 16:240] = 255
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "val" / "n01440764" / "1.png")
    dataset = datasets.parse(f"imagenet:{tmp_path}")
    images, _ = dataset.load([0])
    assert images.shape == (1, 3, 224, 224)
    assert images.min() == 1


def test_imagenet_refuses_other_class_folders(photos: Path) -> None:
    with pytest.raises(BadOption, match="not a WordNet id") as error:
        len(datasets.parse(f"imagenet:{photos}"))
    one_line(error)


def test_a_folder_that_does_not_exist_is_told(tmp_path: Path) -> None:
    dataset = datasets.parse(f"folder:{tmp_path}/nowhere")
    for verb in (lambda: dataset.load([0]), dataset.mean, dataset.settings, lambda: dataset.num_classes):
        with pytest.raises(BadOption, match="does not exist"):
            verb()


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    paint(tmp_path / "loose.png", 3)
    (tmp_path / "a").mkdir()
    with pytest.raises(BadOption, match="holds no image in a subfolder"):
        len(datasets.parse(f"folder:{tmp_path}"))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_a_corrupt_image_is_named(photos: Path, content: bytes) -> None:
    (photos / "a" / "1.png").write_bytes(content)
    dataset = datasets.parse(f"folder:{photos}")
    dataset.load([1])
    with pytest.raises(CorruptAsset, match=r"a/1\.png cannot be read as an image") as error:
        dataset.load([0])
    one_line(error)


def test_a_truncated_image_is_named(photos: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(photos / "a" / "1.jpg")
    content = (photos / "a" / "1.jpg").read_bytes()
    (photos / "a" / "1.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptAsset, match=r"1\.jpg"):
        datasets.parse(f"folder:{photos}").load([0])


def test_the_settings_of_a_folder_identify_its_data(photos: Path) -> None:
    def fingerprint() -> str:
        folder._listed.cache_clear()
        folder._fingerprint.cache_clear()
        return datasets.parse(f"folder:{photos}").settings()["fingerprint"]

    first = fingerprint()
    assert first == fingerprint()
    paint(photos / "b" / "1.png", (255, 0, 0), (41, 300))
    second = fingerprint()
    paint(photos / "b" / "2.png", (255, 0, 0))
    third = fingerprint()
    (photos / "b" / "2.png").rename(photos / "b" / "3.png")
    fourth = fingerprint()
    content = bytearray((photos / "b" / "3.png").read_bytes())
    content[-20] ^= 1
    (photos / "b" / "3.png").write_bytes(content)  # of the same size
    assert len({first, second, third, fourth, fingerprint()}) == 5


@pytest.mark.parametrize("spec", ["samples", "mnist", "cifar10(size=16)"])
def test_settings_are_plain_and_complete(spec: str) -> None:
    settings = datasets.parse(spec).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert {"name", "version", "size", "channels"} <= settings.keys()


# The real data

HISTOGRAMS = {
    ("mnist", "train"): [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    ("mnist", "test"): [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    ("fashion-mnist", "train"): [6000] * 10,
    ("fashion-mnist", "test"): [1000] * 10,
    ("cifar10", "train"): [5000] * 10,
    ("cifar10", "test"): [1000] * 10,
}

FIRST_TEST_LABELS = {
    "mnist": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9],
    "fashion-mnist": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7],
    "cifar10": [3, 8, 8, 0, 6, 6, 1, 6, 3, 1],
}

# Means of the training splits per channel, as everyone normalises with.
MEANS = {"mnist": [0.1307], "fashion-mnist": [0.2860], "cifar10": [0.4914, 0.4822, 0.4465]}


@pytest.mark.assets
@pytest.mark.parametrize(("name", "split"), HISTOGRAMS)
def test_real_labels_have_the_known_histogram(name: str, split: str) -> None:
    dataset = datasets.parse(f"{name}(split={split})")
    _, labels = dataset.load(range(len(dataset)))
    assert torch.bincount(labels, minlength=10).tolist() == HISTOGRAMS[name, split]


@pytest.mark.assets
@pytest.mark.parametrize("name", FIRST_TEST_LABELS)
def test_real_images_are_the_known_ones(name: str) -> None:
    dataset = datasets.parse(name)
    images, labels = dataset.load(range(10))
    assert labels.tolist() == FIRST_TEST_LABELS[name]
    assert images.shape == (10, *dataset.image_shape)
    assert images.min() >= 0
    assert 0.9 < images.max() <= 1
    with pytest.raises(BadOption, match="give indices from 0 to 9999"):
        dataset.load([10000])


@pytest.mark.assets
@pytest.mark.parametrize("name", MEANS)
def test_real_means_are_the_known_ones(name: str) -> None:
    mean = datasets.parse(name).mean()
    assert torch.allclose(mean.mean((1, 2)), torch.tensor(MEANS[name]), atol=1e-4)
    small = datasets.parse(f"{name}(size=16, channels=3)")
    assert small.mean().shape == (3, 16, 16)
    assert small.load([0])[0].shape == (1, 3, 16, 16)


@pytest.mark.assets
def test_batches_follow_each_other() -> None:
    images, labels = datasets.parse("cifar10(split=train)").load([0, 9999, 10000, 49999])
    for row, (batch, record) in enumerate([(1, 0), (1, 9999), (2, 0), (5, 9999)]):
        content = np.fromfile(assets.path("cifar10") / f"data_batch_{batch}.bin", np.uint8).reshape(-1, 3073)[record]
        assert labels[row] == content[0]
        assert np.array_equal((images[row] * 255).round().byte().flatten().numpy(), content[1:])
