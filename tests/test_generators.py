"""The generators: those that ship, those of a user, refusals, and their training."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from leakbench import datasets, generators
from leakbench.cli import main as cli
from leakbench.datasets.images import convert, read
from leakbench.datasets.stored import Part, Split, Stored
from leakbench.errors import BadOption, CorruptAsset, LeakbenchError, MissingAsset, Unsupported
from leakbench.generators import dcgan
from leakbench.generators.assess import assess, nearest
from leakbench.generators.base import Loaded, TruncatedNormal, check_fit, is_mean, load
from leakbench.generators.dcgan import SHIPPED
from leakbench.generators.file import FORCE_VARIABLE
from leakbench.generators.train import CHECKPOINT, WEIGHTS, GeneratorRecipe, overlap, splits, train

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Toys(Stored):
    """Bright squares on black (class 0) and black squares on white (class 1), 12 x 12."""

    native: ClassVar[tuple[int, int, int]] = (1, 12, 12)
    classes: ClassVar[int] = 2
    counts: ClassVar[dict[str, int]] = {"train": 24, "test": 6}

    @classmethod
    def parts(cls, split: Split) -> list[Part]:
        count, labels = cls.counts[split], np.arange(cls.counts[split], dtype=np.uint8) % 2
        images = np.zeros((count, *cls.native), dtype=np.uint8)
        for index, image in enumerate(images):
            image[:, 2:8, 2 : 4 + index % 8] = (200 if split == "train" else 100) + index
            image[:] = 255 - image if labels[index] else image
        return [(images, labels)]


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(datasets.registry._classes, "toys", Toys)
    monkeypatch.setattr(Toys, "name", "toys")
    return "toys"


def one_line(error: pytest.ExceptionInfo[LeakbenchError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def small(steps: int = 4, **options: object) -> GeneratorRecipe:
    return GeneratorRecipe(dataset="toys", steps=steps, batch=6, latent=3, width=8, **options)  # type: ignore[arg-type]


# those that ship


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_small_and_says_what_it_is(name: str) -> None:
    generator = generators.parse(f"dcgan:{name}")
    card = generator.card()
    assert card.image_shape == (datasets.parse(name).image_shape[0], 32, 32)
    assert card.num_classes == datasets.parse(name).num_classes
    assert "split=train" in card.data
    assert datasets.parse(card.data).split == "train"
    assert card.licence
    assert card.checksum == SHIPPED[name] == generator.settings()["checksum"]
    file = Path(generators.__file__).parent / "weights" / f"{name}.safetensors"
    assert file.stat().st_size <= 5_000_000


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_draws_different_images_of_every_class(name: str) -> None:
    generator = generators.parse(f"dcgan:{name}")
    loaded = load(generator, CPU, torch.float32)
    latent = torch.randn(8, 1, 64, generator=torch.Generator().manual_seed(0)).expand(8, 10, 64).reshape(80, 64)
    labels = torch.arange(10).repeat(8)
    images = loaded(latent, labels)
    assert images.shape == (80, *generator.card().image_shape)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    means = images.view(8, 10, -1).mean(0)
    assert float(torch.cdist(means, means).fill_diagonal_(torch.inf).min()) > 0.5  # the label matters
    assert float(images.view(8, 10, -1).std(0).mean()) > 0.05  # and so does the latent
    assert generators.load(generator, CPU, torch.float32) is loaded
    exact = load(generator, CPU, torch.float64)(latent.double(), labels)
    torch.testing.assert_close(images.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHIPPED)
def test_auto_takes_the_generator_of_the_images_by_their_mean(name: str) -> None:
    auto, card = generators.parse("dcgan"), generators.parse(f"dcgan:{name}").card()
    assert card.seen is not None
    assert card.unseen is not None
    for mean in (card.seen, convert(card.seen[None], 16, 3)[0], convert(card.seen[None], 32, 1)[0]):
        assert auto.choose(tuple(mean.shape), 10, mean) == generators.parse(f"dcgan:{name}")
        assert not is_mean(card.unseen, mean)
    chosen = auto.choose(tuple(card.unseen.shape), 10, card.unseen)
    with pytest.raises(Unsupported, match=r"was trained on .*split=train.*, whose images are attacked"):
        check_fit(chosen, tuple(card.unseen.shape), 10, card.unseen)
    with pytest.raises(Unsupported, match="no generator that ships with leakbench was trained on images like these"):
        auto.choose((1, 28, 28), 10, torch.full((1, 28, 28), 0.5))


# refusals


@pytest.mark.parametrize(
    ("shape", "classes", "words"),
    [
        ((1, 40, 40), 10, r"draws images \(1, 32, 32\) and the dataset has \(1, 40, 40\)"),
        ((1, 32, 16), 10, "of another aspect"),
        ((1, 28, 28), 11, "draws 10 classes and the dataset has 11"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused(shape: tuple[int, int, int], classes: int, words: str) -> None:
    with pytest.raises(Unsupported, match=words) as told:
        check_fit(generators.parse("dcgan:mnist"), shape, classes)
    one_line(told)


def test_a_coloured_generator_does_not_draw_grey_images(tmp_path: Path) -> None:
    generator = generators.parse(f"file:{scripted(tmp_path)}")
    assert generator.card().image_shape == (3, 4, 4)
    check_fit(generator, (3, 4, 4), 5)
    with pytest.raises(Unsupported, match="as many channels"):
        check_fit(generator, (1, 4, 4), 5)


def test_images_are_reduced_and_grey_ones_repeated() -> None:
    loaded = load(generators.parse("dcgan:mnist"), CPU, torch.float32)
    latent, labels = torch.zeros(2, 64), torch.tensor([3, 4])
    drawn = loaded.draw(latent, labels, (3, 16, 16))
    assert drawn.shape == (2, 3, 16, 16)
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    torch.testing.assert_close(drawn, convert(loaded(latent, labels), 16, 3))


# files of weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], "cannot be used"),
        (lambda data: b"", "cannot be used"),
        (lambda data: data.replace(b"leakbench-dcgan-1", b"leakbench-dcgan-9"), "it is not of the format"),
        (lambda data: data.replace(b'\\"width\\": 8', b'\\"width\\": 4'), "do not belong to the network"),
        (lambda data: data.replace(b"decoder.project", b"decoder.porject"), "do not belong to the network"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(
    toys: str, tmp_path: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    file = train(small(steps=1), tmp_path)
    data = file.read_bytes()
    assert change(data) != data
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(change(data))
    with pytest.raises(CorruptAsset, match=words) as told:
        generators.parse(f"dcgan:{broken}").settings()
    assert str(broken) in one_line(told)


def test_a_file_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(BadOption, match=r"weight file 'nowhere\.safetensors' does not exist") as told:
        generators.parse("dcgan:nowhere.safetensors").settings()
    one_line(told)


def test_a_damaged_installation_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHIPPED, "mnist", "0" * 64)  # type: ignore[index]
    with pytest.raises(CorruptAsset, match="reinstall leakbench"):
        generators.parse("dcgan:mnist").card()


def test_what_is_read_and_written_again_stays_the_same(tmp_path: Path, toys: str) -> None:
    file = train(small(), tmp_path)
    trained, state, means = dcgan.read(file)
    decoder = dcgan.DCGAN(str(file)).network()
    assert isinstance(decoder, dcgan.Decoder)
    dcgan.write(tmp_path / "again", trained, decoder, means["seen"], means["unseen"])
    _, again, _ = dcgan.read(tmp_path / "again")
    for name, value in state.items():
        assert torch.equal(again[name], value)


def test_the_truncated_law_is_cut_off_and_scaled() -> None:
    draws = TruncatedNormal(0.5).draw((20000,), torch.Generator().manual_seed(0))
    assert float(draws.abs().max()) <= 1
    assert float(draws.abs().max()) > 0.98
    # the variance of N(0, 1) within [-2, 2] is 1 - 4 phi(2) / (2 Phi(2) - 1)
    assert float(draws.var()) == pytest.approx(0.25 * 0.7737, rel=0.03)


# a generator of one's own


class Own(nn.Module):
    def __init__(self, conditional: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-3, 3, 2 * 48).view(2, 48))
        self.conditional = conditional


class Conditional(Own):
    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        return (latent @ self.weight + labels[:, None]).view(-1, 3, 4, 4)


class Unconditional(Own):
    def forward(self, latent: Tensor) -> Tensor:
        return (latent @ self.weight).view(-1, 3, 4, 4)


TOML = """latent = 2
law = "truncated-normal"
range = [-4.0, 12.0]
image = [3, 4, 4]
classes = 5
licence = "mine"
data = "nothing"
"""


def scripted(folder: Path, toml: str = TOML, network: nn.Module | None = None) -> Path:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network or Conditional()), str(folder / "own.pt"))
    (folder / "own.toml").write_text(toml)
    return folder / "own.pt"


def exported(folder: Path, toml: str = TOML) -> Path:
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(
        Conditional(), (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)), dynamic_shapes=({0: batch}, {0: batch})
    )
    torch.export.save(program, folder / "own.pt2")
    (folder / "own.toml").write_text(toml)
    return folder / "own.pt2"


@pytest.mark.parametrize("save", [scripted, exported])
def test_a_file_is_called_and_its_range_scaled(save: Callable[[Path], Path], tmp_path: Path) -> None:
    generator = generators.parse(f"file:{save(tmp_path)}")
    card = generator.card()
    assert (card.latent, card.num_classes, card.law) == (2, 5, TruncatedNormal())
    assert (card.licence, card.data) == ("mine", "nothing")
    latent = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(7) % 5
    wanted = ((Conditional()(latent, labels) + 4) / 16).clamp(0, 1)
    torch.testing.assert_close(load(generator, CPU, torch.float32)(latent, labels), wanted)
    exact = load(generator, CPU, torch.float64)(latent.double(), labels)
    torch.testing.assert_close(exact, wanted.double(), rtol=0, atol=1e-6)
    point = latent.clone().requires_grad_()
    load(generator, CPU, torch.float32)(point, labels).sum().backward()
    assert point.grad is not None
    assert bool(point.grad.any())


def test_a_file_without_classes_is_called_with_latents_alone(tmp_path: Path) -> None:
    file = scripted(tmp_path, TOML.replace("classes = 5", "classes = 0"), Unconditional())
    generator = generators.parse(f"file:{file}")
    check_fit(generator, (3, 4, 4), 1000)
    assert load(generator, CPU, torch.float32)(torch.zeros(2, 2), torch.tensor([1, 999])).shape == (2, 3, 4, 4)


def test_a_changed_file_is_another_component(tmp_path: Path) -> None:
    file = scripted(tmp_path)
    before = generators.parse(f"file:{file}").settings()
    scripted(tmp_path, TOML.replace('"mine"', '"yours"'))
    assert generators.parse(f"file:{file}").settings() != before


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        (None, r"needs a description .*own\.toml' with latent, law, range, image, classes, licence, data"),
        ("latent =", "is not TOML"),
        (TOML.replace("latent = 2", "latent = 0"), "latent: Input should be greater"),
        (TOML.replace("truncated-normal", "cauchy"), "law: Input should be"),
        (TOML.replace("12.0", "-12.0"), "is not increasing"),
        (TOML + "extra = 1\n", "extra: Extra inputs"),
        (TOML.replace("image = [3, 4, 4]", "image = [3, 5, 5]"), r"returned \(3, 3, 4, 4\)"),
        (TOML.replace("latent = 2", "latent = 3"), "does not run on 3 latents of 3 values"),
    ],
)
def test_a_wrong_description_is_told_in_one_line(toml: str | None, words: str, tmp_path: Path) -> None:
    file = scripted(tmp_path, toml or "")
    if toml is None:
        file.with_suffix(".toml").unlink()
    with pytest.raises(LeakbenchError, match=words) as told:
        load(generators.parse(f"file:{file}"), CPU, torch.float32)
    one_line(told)


def test_a_file_of_neither_format_is_told_and_nothing_of_it_runs(tmp_path: Path) -> None:
    import pickle

    file = tmp_path / "own.pt"
    for content in (b"not a network", pickle.dumps(print)):
        file.write_bytes(content)
        file.with_suffix(".toml").write_text(TOML)
        with pytest.raises(CorruptAsset, match="can be read in neither format") as told:
            load(generators.parse(f"file:{file}"), CPU, torch.float32)
        one_line(told)
    with pytest.raises(BadOption, match="does not exist"):
        generators.parse(f"file:{tmp_path / 'none.pt'}").settings()


class Touches:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def repacked(file: Path, change: Callable[[str, bytes], bytes], more: dict[str, bytes]) -> None:
    """Write an archive again, its members changed and others added."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).partition("/")[0]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))
        for name, content in more.items():
            archive.writestr(f"{root}/{name}", content)


def test_pickles_and_libraries_in_an_archive_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    torch.save(Touches(), stream)

    def pickled(name: str, content: bytes) -> bytes:
        if name.endswith("_weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return stream.getvalue() if "/data/weights/" in name else content

    def same(name: str, content: bytes) -> bytes:
        return content

    changes: list[tuple[Callable[[str, bytes], bytes], dict[str, bytes], str]] = [
        (pickled, {}, "torch.export: UnpicklingError"),
        (same, {"data/constants/opaque_obj_0": pickle.dumps(Touches())}, "'opaque_obj_0' beside its tensors"),
        (same, {"data/aotinductor/model/model.so": b"code"}, "compiled code"),
    ]
    for change, more, words in changes:
        file = exported(tmp_path)
        repacked(file, change, more)
        with pytest.raises(CorruptAsset, match=words) as told:
            load(generators.parse(f"file:{file}"), CPU, torch.float32)
        one_line(told)
        assert not (tmp_path / "ran").exists()
    assert FORCE_VARIABLE not in os.environ


# BigGAN-deep


@pytest.fixture
def biggan(tmp_path: Path) -> Path:
    """Write a tiny BigGAN-deep with random weights, in the form in which the large ones are published."""
    package = pytest.importorskip("pytorch_pretrained_biggan")
    config = package.BigGANConfig(
        output_dim=8,
        z_dim=6,
        class_embed_dim=6,
        channel_width=8,
        num_classes=1000,
        layers=[[True, 16, 8], [False, 8, 4], [False, 4, 2], [False, 2, 1]],
        attention_layer_position=1,
        n_stats=3,
    )
    torch.manual_seed(0)
    network = package.BigGAN(config)
    for value in network.parameters():
        nn.init.normal_(value, 0, 0.5)
    folder = tmp_path / "biggan"
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string())
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_biggan_draws_what_its_package_draws(biggan: Path) -> None:
    package = pytest.importorskip("pytorch_pretrained_biggan")
    generator = generators.parse(f"biggan-deep(path={biggan}, truncation=0.5)")
    card = generator.card()
    assert (card.latent, card.image_shape, card.num_classes, card.low) == (6, (3, 8, 8), 1000, -1)
    assert card.law == TruncatedNormal(0.5)
    theirs = package.BigGAN.from_pretrained(str(biggan)).eval()
    labels = torch.tensor([1, 207, 999])
    latent = torch.stack([card.law.draw((6,), torch.Generator().manual_seed(row)) for row in range(3)])
    with torch.no_grad():
        wanted = theirs(latent, torch.from_numpy(package.one_hot_from_int(labels.tolist(), batch_size=3)), 0.5)
    torch.testing.assert_close(load(generator, CPU, torch.float32)(latent, labels), (wanted + 1) / 2)
    assert float(wanted.std()) > 0.01


def test_biggan_takes_chosen_classes(biggan: Path) -> None:
    some = generators.parse(f'biggan-deep(path={biggan}, classes="207+281+340")')
    assert some.card().num_classes == 3
    whole = generators.parse(f"biggan-deep(path={biggan})")
    latent = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        load(some, CPU, torch.float32)(latent, torch.arange(3)),
        load(whole, CPU, torch.float32)(latent, torch.tensor([207, 281, 340])),
    )
    for wrong, words in (("207+1000", "class index 1000 is unknown"), ("cat", "not a list of class indices")):
        with pytest.raises(BadOption, match=words) as told:
            generators.parse(f'biggan-deep(classes="{wrong}")')
        one_line(told)


def test_biggan_is_found_in_the_cache_of_its_package(
    biggan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pytorch_pretrained_biggan as package

    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(package, "PYTORCH_PRETRAINED_BIGGAN_CACHE", cache)
    generator = generators.parse("biggan-deep(resolution=128)")
    with pytest.raises(MissingAsset, match=r"biggan-deep-128-config\.json is not in the cache") as told:
        generator.settings()
    one_line(told)
    host = "https://s3.amazonaws.com/models.huggingface.co/biggan/biggan-deep-128-"
    for name in ("config.json", "pytorch_model.bin"):
        content = (biggan / name).read_bytes().replace(b'"output_dim": 8', b'"output_dim": 128')
        (cache / f"hash of {name}").write_bytes(content)
        (cache / f"hash of {name}.json").write_text(json.dumps({"url": host + name, "etag": None}))
    (cache / "other.json").write_text("{}")
    assert generator.card().image_shape == (3, 128, 128)
    with pytest.raises(BadOption, match=r"returned \(3, 3, 8, 8\)"):  # this tiny network is not what it says
        load(generator, CPU, torch.float32)


def test_damaged_files_of_biggan_are_told(biggan: Path) -> None:
    generator = generators.parse(f"biggan-deep(path={biggan})")
    state = torch.load(biggan / "pytorch_model.bin", weights_only=True)
    state.pop("generator.gen_z.bias")
    torch.save(state, biggan / "pytorch_model.bin")
    with pytest.raises(CorruptAsset, match=r"lack 'generator\.gen_z\.bias'"):
        load(generator, CPU, torch.float32)
    (biggan / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(CorruptAsset, match="are not those of") as told:
        load(replace(generator, truncation=0.9), CPU, torch.float32)  # type: ignore[call-arg]
    one_line(told)
    (biggan / "config.json").write_text("{}")
    with pytest.raises(CorruptAsset, match="not the configuration of a BigGAN"):
        generator.card()
    (biggan / "config.json").unlink()
    with pytest.raises(BadOption, match=r"has no config\.json"):
        generator.card()


def test_without_its_package_biggan_names_the_extra(biggan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_pretrained_biggan", None)
    for spec in ("biggan-deep", f"biggan-deep(path={biggan})"):
        with pytest.raises(MissingAsset, match="pip install pytorch-pretrained-biggan"):
            generators.parse(spec).network()


# training


def test_only_the_training_split_is_trained_on(toys: str) -> None:
    seen, unseen = splits("toys")
    assert (seen.split, unseen.split) == ("train", "test")
    assert seen.image_shape == (1, 32, 32)
    assert len(seen) == 24
    assert splits("toys(split=train)") == (seen, unseen)
    with pytest.raises(BadOption, match="asks for the test split, whose images are attacked"):
        splits("toys(split=test)")
    with pytest.raises(BadOption, match=r"has no training split, only attacked images; .*: .*cifar10"):
        splits("samples")


def test_a_training_image_among_the_attacked_ones_is_refused(
    toys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_part, test_part = Toys.parts("train")[0], Toys.parts("test")[0]
    assert overlap(*(read(split, range(len(split))) for split in splits("toys"))) == 0
    test_part[0][4] = train_part[0][9]
    parts = {"train": [train_part], "test": [test_part]}
    monkeypatch.setattr(Toys, "parts", classmethod(lambda cls, split: parts[split]))
    with pytest.raises(CorruptAsset, match="1 attacked images of 'toys' are among its training images"):
        train(small(), tmp_path)


def test_training_changes_both_networks_and_says_what_was_seen(toys: str, tmp_path: Path) -> None:
    losses: list[tuple[float, float]] = []
    file = train(small(steps=12, lr=0.005), tmp_path, on_step=lambda step, *both: losses.append(both))
    critic = [loss for loss, _ in losses]
    assert sum(critic[-3:]) < 0.9 * sum(critic[:3])  # it learns to tell real from generated
    assert len({decoder for _, decoder in losses}) == 12
    card = generators.parse(f"dcgan:{file}").card()
    assert card.data == "toys(size=32, split=train)"
    assert card.image_shape == (1, 32, 32)
    assert card.seen is not None
    assert card.unseen is not None
    train_images, test_images = (Toys.parts(split)[0][0] / 255 for split in ("train", "test"))
    assert card.seen.numpy() == pytest.approx(train_images.mean(0))
    assert card.unseen.numpy() == pytest.approx(test_images.mean(0))


@pytest.mark.long
def test_a_stopped_training_goes_on_to_the_same_weights(toys: str, tmp_path: Path) -> None:
    whole = train(small(steps=5), tmp_path / "whole", every=2).read_bytes()

    def stop(step: int, critic: float, decoder: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small(steps=5), tmp_path / "parts", every=2, on_step=stop)
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    steps: list[int] = []
    again = train(small(steps=5), tmp_path / "parts", every=2, on_step=lambda step, *losses: steps.append(step))
    assert steps == [3, 4, 5]  # from the checkpoint after step 2
    assert again.read_bytes() == whole
    assert train(small(steps=5, seed=1), tmp_path / "other").read_bytes() != whole
    # a longer training of the same recipe goes on too; another recipe is refused
    train(small(steps=6), tmp_path / "parts")
    for wrong, words in ((small(steps=6, seed=1), "seed=0, not 1"), (small(steps=2), "steps=6, not 2")):
        with pytest.raises(BadOption, match=words) as told:
            train(wrong, tmp_path / "parts")
        one_line(told)
    checkpoint = tmp_path / "parts" / CHECKPOINT
    torch.save({**torch.load(checkpoint, weights_only=True), "critic": {}}, checkpoint)
    with pytest.raises(CorruptAsset, match="delete it to start again"):
        train(small(steps=6), tmp_path / "parts")
    checkpoint.write_bytes(b"half a checkpo")
    with pytest.raises(CorruptAsset, match="delete it to start again"):
        train(small(steps=6), tmp_path / "parts")


@pytest.mark.parametrize(
    ("option", "value"),
    [("steps", 0), ("batch", 1), ("lr", 0.0), ("width", 10), ("ema", 1.0), ("precision", "float16")],
)
def test_options_that_do_not_fit_are_told(option: str, value: float | str) -> None:
    with pytest.raises(BadOption, match=f"training: {option}={value!r} is not valid") as told:
        GeneratorRecipe(**{**asdict(small()), option: value})
    one_line(told)


def test_the_nearest_training_image_is_found() -> None:
    training = torch.randint(256, (50, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = torch.cat([training[[7, 30]].float() / 255, torch.rand(3, 3, 4, 4)])
    found = nearest(images, training, rows=16)
    assert found.index[:2].tolist() == [7, 30]
    assert found.distance[:2].tolist() == pytest.approx([0, 0], abs=1e-7)
    slow = (images[:, None].double() - training[None].double() / 255).square().mean((2, 3, 4)).sqrt()
    torch.testing.assert_close(found.distance, slow.min(1).values, rtol=1e-6, atol=1e-7)


def test_the_command_trains_and_reports(
    toys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "3", "--batch", "6", "--latent", "3", "--width", "8"]
    monkeypatch.setattr(sys, "argv", ["leakbench", "train", "generator", "--dataset", "toys", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    folder = tmp_path / "generators" / "toys"
    written = {folder / name for name in ("generator.safetensors", "samples.png", "nearest.png", "report.md")}
    assert {tmp_path / line for line in capsys.readouterr().out.split()} == written
    report = (folder / "report.md").read_text()
    assert f"leakbench train generator --dataset toys {' '.join(options)}" in report
    rows = re.findall(r"^\| (samples|test images) \| (\d+) \| (.*) \|$", report, re.MULTILINE)
    assert [(name, int(count)) for name, count, _ in rows] == [("samples", 1000), ("test images", 6)]
    for _, _, values in rows:
        numbers = [float(value) for value in values.split(" | ")]
        assert numbers == sorted(numbers)
        assert numbers[0] > 0
    with Image.open(folder / "samples.png") as grid:
        assert grid.size == (2 * (10 * 33 - 1), 2 * (2 * 33 - 1))  # two classes, ten samples of each
    assert assess(small(steps=3), folder)[0][0].exists()


def test_a_loaded_generator_has_no_gradients_of_its_own() -> None:
    loaded = load(generators.parse("dcgan:mnist"), CPU, torch.float32)
    assert isinstance(loaded, Loaded)
    assert not loaded.training
    assert not any(value.requires_grad for value in loaded.parameters())


def test_the_listing_says_what_ships(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["leakbench", "list", "generators"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, checksum in SHIPPED.items():
        data = generators.parse(f"dcgan:{name}").card().data
        assert f"dcgan:{name}\n    trained on {data}\n    licence: " in shown
        assert checksum in shown
    assert all(f"\n{name}\n" in f"\n{shown}" for name in generators.names())
