"""The inputs of the example audits: ``python -m benchmarks.audit FOLDER`` writes photographs and a recorded update.

The networks are torchvision's, untrained and with 3 outputs; the photographs come from scikit-image (their credits
are in CREDITS.md of the samples). Then, from the checkout, for NAME resnet18, vgg11, densenet121 and mobilenet in the
MODE eval, and for resnet18 in the MODE train, into the folder resnet18-train:

leakbench audit model --model benchmarks.audit:NAME --mode MODE --data folder:FOLDER/photos --size 64 \\
    --normalise NORMALISE --images 1 --budget quick --out reports/audit/NAME
leakbench audit update --model benchmarks.audit:resnet18 --before FOLDER/before.safetensors \\
    --after FOLDER/after.safetensors --size 64 --normalise NORMALISE --rate 0.05 \\
    --truth FOLDER/photos/1-chelsea/chelsea.png --label 1 --budget quick --out reports/audit/update

with NORMALISE 0.485,0.456,0.406/0.229,0.224,0.225.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from leakbench.audit import load_network, read_image

PHOTOGRAPHS = ("0-astronaut", "1-chelsea", "2-coffee")
NORMALISE = "0.485,0.456,0.406/0.229,0.224,0.225"
SIZE = 64
RATE = 0.05


def resnet18() -> nn.Module:
    """Return torchvision's ResNet-18."""
    return models.resnet18(num_classes=len(PHOTOGRAPHS))


def vgg11() -> nn.Module:
    """Return torchvision's VGG-11 with batch normalisation and one linear layer, as networks for small images have."""
    network = models.vgg11_bn()
    network.avgpool = nn.Identity()
    network.classifier = nn.Linear(512 * (SIZE // 32) ** 2, len(PHOTOGRAPHS))
    return network


def densenet121() -> nn.Module:
    """Return torchvision's DenseNet-121."""
    return models.densenet121(num_classes=len(PHOTOGRAPHS))


def mobilenet() -> nn.Module:
    """Return torchvision's MobileNet-v2 with running statistics of random images.

    With those that torch begins with, its activations shrink from layer to layer, and so does the gradient.
    """
    network = models.mobilenet_v2(num_classes=len(PHOTOGRAPHS))
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    usual = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(8, 3, SIZE, SIZE))
    for norm, momentum in zip(norms, usual):
        norm.momentum = momentum
    return network


def main() -> None:
    """Write FOLDER/photos, one subfolder a class, and the weights before and after a client's step on one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in PHOTOGRAPHS:
        photograph = name.partition("-")[2]
        pixels = np.asarray(getattr(skimage.data, photograph)())
        path = folder / "photos" / name / f"{photograph}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    audited = load_network("benchmarks.audit:resnet18", normalise=NORMALISE)
    network = audited.module
    _save(network, folder / "before.safetensors")
    image = read_image(str(folder / "photos" / "1-chelsea" / "chelsea.png"), (3, SIZE, SIZE))
    optimiser = torch.optim.SGD(network.parameters(), lr=RATE)
    nn.functional.cross_entropy(audited.model(3).module(image[None]), torch.tensor([1])).backward()
    optimiser.step()
    _save(network, folder / "after.safetensors")


def _save(network: nn.Module, path: Path) -> None:
    save_file({name: value.clone().contiguous() for name, value in network.state_dict().items()}, path)


if __name__ == "__main__":
    main()
