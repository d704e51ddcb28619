"""Small data of the form of MNIST, CIFAR and ImageNet, which the real loaders read, and a generator in a file."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from leakbench import assets
from leakbench.datasets.cifar import CIFAR10
from leakbench.datasets.mnist import MNIST

TRAIN, TEST = 50, 20


class SmallGenerator(nn.Module):
    """A generator of images [N, 3, 48, 48] in [0, 1] from latents [N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.draw = nn.Linear(4, 3 * 48 * 48)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Return images without a label."""
        return torch.sigmoid(self.draw(latent)).view(-1, 3, 48, 48)


def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the cache ``home`` and ``data`` into a folder, and have this process take their sizes as right."""
    rng = np.random.default_rng(0)

    def idx(*shape: int, top: int = 256) -> bytes:
        data = rng.integers(0, top, shape, dtype=np.uint8)
        return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + data.tobytes()

    def records(count: int, labels: int, classes: int) -> bytes:
        names = rng.integers(0, classes, (count, labels), dtype=np.uint8)
        return np.concatenate([names, rng.integers(0, 256, (count, 3072), dtype=np.uint8)], axis=1).tobytes()

    files = {"mnist": {}, "cifar10": {}, "cifar100": {}}
    for stem, count in (("train", TRAIN), ("t10k", TEST)):
        files["mnist"][f"{stem}-images-idx3-ubyte"] = idx(count, 28, 28)
        files["mnist"][f"{stem}-labels-idx1-ubyte"] = idx(count, top=10)
    files["cifar10"] = {f"data_batch_{number}.bin": records(TRAIN // 5, 1, 10) for number in range(1, 6)}
    files["cifar10"]["test_batch.bin"] = records(TEST, 1, 10)
    files["cifar100"] = {"train.bin": records(TRAIN, 2, 100), "test.bin": records(TEST, 2, 100)}
    known = []
    for asset in assets.ASSETS:
        own = files.get(asset.name, {})
        for name, content in own.items():
            path = folder / "home" / asset.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in own.items()]
        if own:
            (folder / "home" / asset.name / assets.SUMS).write_text("".join(lines))
        sizes = tuple(assets.File(name, len(content)) for name, content in own.items())
        known.append(replace(asset, files=sizes) if own else asset)
    for label in range(3):
        for number in range(4):
            path = folder / "data" / "imagenet" / f"n0000000{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (60, 72, 3), dtype=np.uint8)).save(path)
    torch.manual_seed(0)
    shape = {"latent": {0: torch.export.Dim("n", min=1, max=100)}}
    program = torch.export.export(SmallGenerator().eval(), (torch.zeros(2, 4),), dynamic_shapes=shape)
    torch.export.save(program, folder / "data" / "generator.pt2")
    (folder / "data" / "generator.toml").write_text(
        'latent = 4\nlaw = "normal"\nrange = [0.0, 1.0]\nimage = [3, 48, 48]\nclasses = 0\nlicence = "none"\n'
        'data = "nothing"\n'
    )
    monkeypatch.setattr(assets, "ASSETS", tuple(known))
    for kind in (MNIST, CIFAR10):
        monkeypatch.setattr(kind, "counts", {"train": TRAIN, "test": TEST})
    monkeypatch.setenv("LEAKBENCH_HOME", str(folder / "home"))
