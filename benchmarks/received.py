"""How well a client can see that the weights that a server sent were crafted: ``python -m benchmarks.received``.

It scores networks that were drawn and trained honestly and networks that were crafted, and writes
``reports/malicious/received.csv``: one row for each network. A run that was stopped is resumed. ``--calibrate`` scores
other networks, from which the thresholds of ``leakbench.audit.received`` were set, and writes nothing. Training takes
most of the time: minutes on one core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import datasets, models
from leakbench.audit.received import scores
from leakbench.core.rng import generator, seeded
from leakbench.models.crafted import CraftedBlock, Fronted, Imprint, Trap

PAGE = Path(__file__).resolve().parent.parent / "reports" / "malicious" / "received.csv"

ROWS = 4
"""The rows of a seed: an untrained and a trained network, each as it is and crafted."""

PARTS = ("score", "copies", "evenness", "balance")
"""The columns of a row that are scores."""

EACH = 100
"""How many networks are untrained, and how many trained."""

IMAGES = 4096
"""The training images that a network is trained on."""

PUBLIC = 2000
"""The public images whose quantiles an imprint takes."""

ARCHITECTURES = (
    "mlp",
    "mlp(hidden=256-128, init=default)",
    "mlp(hidden=512, init=default, activation=sigmoid)",
    "lenet",
    "lenet(init=default)",
    "lenet-bn",
    "lenet-bn(init=default)",
    "convnet(width=16)",
    "resnet20",
)

INITS: tuple[tuple[str, Callable[[Tensor], Tensor] | None], ...] = (
    ("as built", None),
    ("xavier-uniform", nn.init.xavier_uniform_),
    ("kaiming-normal", nn.init.kaiming_normal_),
    ("orthogonal", nn.init.orthogonal_),
    ("truncated-normal", lambda value: nn.init.trunc_normal_(value, std=0.02)),
)

OPTIMISERS: tuple[tuple[str, Callable[..., torch.optim.Optimizer]], ...] = (
    ("sgd", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    ("sgd, decay 5e-4", lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4)),
    ("sgd, decay 1e-2", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2)),
    ("adam", lambda p: torch.optim.Adam(p, lr=1e-3)),
    ("adamw", lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=1e-2)),
)


@dataclass(frozen=True)
class Scored:
    """One network's row: what it is, and the largest score of a layer."""

    crafted: bool
    kind: str
    network: str
    score: float
    copies: float
    evenness: float
    balance: float


def scored(crafted: bool, kind: str, name: str, network: nn.Module) -> Scored:
    """Return the row of a network."""
    layers, _ = scores(network.state_dict())
    most = {part: max((getattr(one, part) for one in layers), default=0.0) for part in PARTS}
    return Scored(crafted, kind, name, **most)


def built(architecture: str, seed: int) -> nn.Module:
    """Return a network for 32 x 32 colour images with 10 classes."""
    with seeded("received", architecture, seed):
        return models.parse(architecture).build((3, 32, 32), 10)


def untrained(seed: int) -> tuple[str, nn.Module]:
    """Return the description of an untrained network, and the network; seeds differ in architecture and weights."""
    architecture = ARCHITECTURES[seed % len(ARCHITECTURES)]
    name, init = INITS[seed // len(ARCHITECTURES) % len(INITS)]
    network = built(architecture, seed)
    if init is not None:
        with seeded("received init", seed):
            for parameter in network.parameters():
                if parameter.ndim > 1:
                    init(parameter.data)
    return f"{architecture}, {name}", network


def trained(seed: int, images: Tensor, labels: Tensor) -> tuple[str, nn.Module]:
    """Return the description of a network that was trained for some steps, and the network."""
    architecture = ARCHITECTURES[seed % len(ARCHITECTURES)]
    name, make = OPTIMISERS[seed // len(ARCHITECTURES) % len(OPTIMISERS)]
    network = built(architecture, seed).train()
    slow = architecture.startswith(("convnet", "resnet"))
    steps = 10 if slow else (100, 300)[seed % 2]
    optimiser, rng = make(network.parameters()), generator("received", seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,), generator=rng)
        optimiser.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimiser.step()
    return f"{architecture}, {name}, {steps} steps", network.eval()


def first_of(network: nn.Module) -> nn.Linear:
    """Return the crafted layer of a network."""
    if isinstance(network, Fronted):
        assert isinstance(network.block, CraftedBlock)
        return network.block.measure
    return next(module for module in network.modules() if isinstance(module, nn.Linear))


def noisy(network: nn.Module, size: float, seed: int) -> nn.Module:
    """Return a crafted network whose rows have noise of a size relative to them, and factors of their own."""
    layer, rng = first_of(network), generator("noisy", seed)
    with torch.no_grad():
        noise = torch.randn(layer.weight.shape, generator=rng)
        factor = 0.5 + torch.rand(len(layer.weight), 1, generator=rng)
        layer.weight.add_(size * layer.weight.norm(dim=1, keepdim=True) * noise / layer.weight.shape[1] ** 0.5)
        layer.weight.mul_(factor)
        layer.bias.mul_(factor[:, 0])
    return network


def flipped(network: nn.Module, share: float, seed: int) -> nn.Module:
    """Return a crafted network in whose rows a share of the entries has a random sign."""
    layer, rng = first_of(network), generator("flipped", seed)
    with torch.no_grad():
        chosen = torch.rand(layer.weight.shape, generator=rng) < share
        sign = torch.randint(0, 2, layer.weight.shape, generator=rng) * 2.0 - 1
        layer.weight.copy_(torch.where(chosen, layer.weight.abs() * sign, layer.weight))
    return network


def crafted(seed: int, public: Tensor, base: nn.Module) -> tuple[str, nn.Module]:
    """Return the kind of a crafted network, and the network."""
    bins, scale = (64, 128, 256, 512)[seed // 8 % 4], (0.9, 0.95, 0.97, 0.99)[seed // 8 % 4]
    kinds: list[tuple[str, Callable[[], nn.Module]]] = [
        ("imprint", lambda: Imprint(bins).craft(base, public)),
        ("imprint, random functional", lambda: Imprint(bins, "random").craft(base, public)),
        ("imprint, noise 0.001", lambda: noisy(Imprint(bins).craft(base, public), 1e-3, seed)),
        ("imprint, noise 0.1", lambda: noisy(Imprint(bins).craft(base, public), 1e-1, seed)),
        ("trap", lambda: Trap(scale).craft(base, public)),
        ("trap of a few rows", lambda: Trap(scale, rows=64).craft(base, public)),
        ("trap, signs 1 %", lambda: flipped(Trap(scale).craft(base, public), 0.01, seed)),
        ("trap, signs 10 %", lambda: flipped(Trap(scale).craft(base, public), 0.1, seed)),
    ]
    kind, make = kinds[seed % len(kinds)]
    return kind, make()


def rows(first: int, each: int) -> Iterator[Scored]:
    """Yield the rows of networks with these seeds: honest ones, and as many crafted ones."""
    images, labels = datasets.parse("cifar10(split=train)").load(range(IMAGES))
    public, _ = datasets.parse("cifar10(split=train)").load(range(40000, 40000 + PUBLIC))
    for seed in range(first, first + each):
        for kind, (name, network) in (("untrained", untrained(seed)), ("trained", trained(seed, images, labels))):
            yield scored(False, kind, name, network)
            number = 2 * seed + (kind == "trained")
            how, made = crafted(number, public, network)
            yield scored(True, how, f"{kind} {name}", made)


def auc(table: pd.DataFrame, kind: str | None = None) -> float:
    """Return the probability that a crafted network, of a kind if one is given, has a larger score than an honest."""
    honest = table[~table.crafted].score.to_numpy()
    other = table[table.crafted & ((table.kind == kind) if kind else True)].score.to_numpy()
    return float((other[:, None] > honest).mean() + (other[:, None] == honest).mean() / 2)


def main(calibrate: bool) -> None:
    """Write or print the scores."""
    known = 0 if calibrate or not PAGE.exists() else len(pd.read_csv(PAGE)) // ROWS
    found = []
    for row in rows(10_000 if calibrate else known, EACH // 5 if calibrate else EACH - known):
        found.append(row)
        print(row, flush=True)
        if not calibrate and len(found) % ROWS == 0:
            PAGE.parent.mkdir(parents=True, exist_ok=True)
            new = pd.DataFrame(map(asdict, found[-ROWS:])).round(4)
            new.to_csv(PAGE, index=False, mode="a", header=not PAGE.exists())
    table = pd.DataFrame(map(asdict, found)) if calibrate else pd.read_csv(PAGE)
    print(table.groupby(["crafted", "kind"])[list(PARTS)].agg(["min", "max"]).to_string())
    kinds = table[table.crafted].kind.unique()
    print(f"AUC {auc(table):.4f}; " + ", ".join(f"{one} {auc(table, one):.3f}" for one in kinds))


if __name__ == "__main__":
    main("--calibrate" in sys.argv)
