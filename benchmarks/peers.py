"""Attacks of other papers, each in the regime of its paper at a size that fits a CPU: ``python -m benchmarks.peers``.

It writes ``reports/malicious/peers.csv``, a row for each image, and ``peers.md``; rows that are there are kept.
CIFAR-10 test images. ``gradinversion`` attacks a LeNet with batch normalisation that was trained for six epochs on
2,000 other images, and a slim ResNet-18 on images of twice the side, trained for four epochs on 10,000 others; the
other networks are untrained. Forty minutes on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import attacks, datasets, defenses, metrics, models
from leakbench.clients.local import Local
from leakbench.core.rng import Rng, generator, seeded
from leakbench.datasets import Dataset
from leakbench.models import OwnModule
from leakbench.plan.matrix import parse_threat
from leakbench.version import __version__
from leakbench.victim import Client, observe

FOLDER = Path(__file__).resolve().parent.parent / "reports" / "malicious"
TABLE, TEXT = FOLDER / "peers.csv", FOLDER / "peers.md"
TRAINED = "trained lenet-bn"
RESNET = "trained resnet18, 64 px"
SPECS = {TRAINED: "lenet-bn(init=default)", RESNET: "resnet18(max_pool=false, width=16)"}
"""The networks that are trained first."""
MLP = "mlp(hidden=256, activation=sigmoid, init=default)"


@dataclass(frozen=True)
class Case:
    """One attack on some clients.

    Attributes:
        network: a spec, or one of ``SPECS``, in its mode.
        batch: the images of a client.
        clients: how many.
    """

    network: str
    attack: str
    threat: str
    batch: int
    clients: int
    defense: str = "none"


def cases() -> Iterator[Case]:
    """Yield every case, the cheap ones first."""
    for init in ("default", "uniform(0.1)", "uniform(0.2)", "uniform(0.3)", "uniform(0.5)"):
        yield Case(f"vit(first=bare, init={init})", "april", "paper", 1, 16)
    yield Case("vit(first=bare, init=uniform(0.2))", "april-search(steps=1000)", "labels=known", 1, 4)
    for attack in ("grey", "ig(steps=1000)", "april-search(steps=1000, angle=0)", "april-search(steps=1000)"):
        yield Case("vit(depth=2)", attack, "labels=known", 1, 4)
    yield Case("vit(depth=2)", "april-search(steps=1000)", "labels=known", 4, 1)
    for batch, clients in ((4, 4), (8, 2), (16, 1), (32, 1)):
        yield Case(MLP, "cocktail", "paper", batch, clients)
        yield Case(MLP, "others", "paper", batch, clients)
    for mode in ("train", "eval"):
        network = f"{TRAINED}, {mode}"
        yield Case(network, "grey", "labels=known", 4, 4)
        yield Case(network, "ig(steps=300)", "labels=known", 4, 4)
        yield Case(network, "gradinversion(steps=300, statistics=0)", "labels=known", 4, 4)
        for granted in ("running", "sent", "exact") if mode == "train" else ("running", "exact"):
            yield Case(network, "gradinversion(steps=300)", f"labels=known, statistics={granted}", 4, 4)
        yield Case(network, "gradinversion(steps=300, seeds=4)", "labels=known, statistics=exact", 4, 4)
    network = f"{RESNET}, train"
    for attack in ("grey", "ig(steps=1000)", "gradinversion(steps=1000, statistics=0)"):
        yield Case(network, attack, "labels=known", 4, 1)
    for granted in ("running", "exact"):
        yield Case(network, "gradinversion(steps=1000)", f"labels=known, statistics={granted}", 4, 1)
    for defense in ("none", "secagg(clients=8)"):
        yield Case("mlp(hidden=512-512, init=default)", "disaggregate", "paper", 16, 2, defense)
    for defense in ("none", "noise(scale=0.1, relative=true)"):
        for attack in ("grey", "ig(steps=500)", "dip(steps=500)", "grnn(steps=500)"):
            yield Case("lenet", attack, "labels=known", 1, 4, defense)


def trained(name: str) -> nn.Module:
    """Return one of ``SPECS`` after some epochs on images that are not attacked."""
    if name == TRAINED:
        epochs, (images, labels) = 6, datasets.parse("cifar10").load(range(2000, 4000))
    else:
        epochs, (images, labels) = 4, datasets.parse("cifar10(size=64, split=train)").load(range(10_000))
    with seeded("peers", name.removeprefix("trained ")):
        network = models.parse(SPECS[name]).build((3, *images.shape[2:]), 10)
    sgd = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator("peers", epoch))
        for rows in order.split(50):
            sgd.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            sgd.step()
    return network


def attacked(case: Case) -> tuple[Dataset, Tensor, Tensor]:
    """Return the dataset, the images and the labels of a case: for a ResNet the first ones of different classes."""
    data = datasets.parse("cifar10(size=64)" if case.network.startswith(RESNET) else "cifar10")
    images, labels = data.load(range(64))
    if case.network.startswith(RESNET):
        rows = [int((labels == label).nonzero()[0]) for label in labels.unique()]
        images, labels = images[sorted(rows)], labels[sorted(rows)]
    count = case.batch * case.clients
    return data, images[:count], labels[:count]


def measured(case: Case, network: nn.Module | None) -> list[dict[str, object]]:
    """Return a row for each image of a case."""
    data, images, labels = attacked(case)
    who = []
    for first in range(0, len(images), case.batch):
        rows = [(images[place], int(labels[place])) for place in range(first, first + case.batch)]
        who.append(Client(*rows[0], "weights", f"client {first}", (), tuple(rows[1:])))
    if network is None:
        model = models.parse(case.network)
    else:
        model = OwnModule(case.network.split()[1].rstrip(","), network.train(case.network.endswith("train")))
    training = {"training": Local(batch=case.batch)} if case.batch > 1 else {}
    defense, threat = defenses.parse(case.defense), parse_threat(case.threat)
    seen = observe(model, defense, threat, who, 10, data.mean(), **training)
    found = attacks.parse(case.attack)(seen, Rng(tuple(str(row) for row in range(case.clients))))
    returned = found.images.view(case.clients, -1, *images.shape[1:])
    rows = []
    for row, own in enumerate(images.split(case.batch)):
        for place, value in enumerate(matched(returned[row].nan_to_num(0.5), own)):
            rows.append({**asdict(case), "image": row * case.batch + place, "psnr": round(value, 3)})
    return rows


def matched(found: Tensor, truth: Tensor) -> list[float]:
    """Return the PSNR of each image [B, C, H, W] after one assignment of the reconstructions."""
    values = torch.stack([metrics.parse("psnr")(one.expand_as(truth), truth) for one in found])
    own, other = linear_sum_assignment(-values.numpy())
    best = torch.zeros(len(truth), dtype=values.dtype)
    best[other] = values[own, other]
    return [float(value) for value in best]


WORDS = """# Attacks of other papers, in their regimes

Each attack where its paper has it work, at a size that fits a CPU. Made by `python -m benchmarks.peers` at leakbench
{version}. CIFAR-10 test images; the mean PSNR over all images after one assignment, and the share at 20 dB or more.

- **April** solves for the image if the attention takes the embedded patches themselves, and if the weights are wide:
  with torch's default weights all tokens get nearly the same attention, and rounding decides.
- **April's search** needs neither: in a standard transformer it comes near the image, where `ig` of as many steps does
  no better than a grey image, and neither does the search without the angle of the position embedding's gradient.
- **The cocktail party attack** separates small batches behind a sigmoid, in part, and fewer images of larger ones.
- **GradInversion** recovers images (CIFAR-10's, resized to 64 pixels) from a slim ResNet-18 in train mode after four
  epochs of training, in a batch of different classes, if it is given the exact statistics of the batch; without
  statistics it comes near, and `ig` of as many steps does no better than a grey image. A group of starts adds to that
  on LeNet. The running statistics, the honest grant, add nothing: they are not those of a batch of four, and pull
  away from its images. Eval mode leaves less. What bounds it here are the network and the steps, of which the paper
  takes many more: of a ResNet-20 that was trained to 88 % accuracy and whose gradients are small, 1,500 steps with
  exact statistics reached 13.2 dB, and a grey image 12.1 (one client of four images in train mode, measured once).
  The weights were chosen on test images 100 to 115.
- **Secure aggregation leaves `disaggregate` what it has**: of the sum over 8 clients with 2 images each an honest
  server recovers the same images as of one client with 16.
- **The deep image prior** comes near where a search over pixels of as many steps (`ig`) recovers nothing, with and
  without noise; the generator of `grnn`, of as many steps, comes nearer.

{table}
"""


def page(rows: pd.DataFrame) -> str:
    """Return the page of the measured rows."""
    lines = [
        "| network | defense | attack | threat model | B | images | PSNR | at 20 dB |",
        "|:--|:--|:--|:--|--:|--:|--:|--:|",
    ]
    keys = ["network", "defense", "attack", "threat", "batch"]
    for (network, defense, attack, threat, batch), own in rows.groupby(keys, sort=False):
        mean, share = own.psnr.mean(), float((own.psnr >= 20).mean())
        names = " | ".join((network, defense, f"`{attack}`", threat, str(batch), str(len(own))))
        lines.append(f"| {names} | {mean:.1f} | {share:.2f} |")
    return WORDS.format(version=__version__, table="\n".join(lines))


def main() -> None:
    """Measure the cases that are missing, and write table and page."""
    known = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=list(Case.__dataclass_fields__))
    done = {tuple(row) for row in known[list(Case.__dataclass_fields__)].itertuples(index=False)}
    ready: dict[str, nn.Module] = {}
    for case in cases():
        if tuple(asdict(case).values()) in done:
            continue
        name = case.network.rpartition(",")[0]
        if name in SPECS and name not in ready:
            ready[name] = trained(name)
        rows = pd.DataFrame(measured(case, ready.get(name)))
        rows.to_csv(TABLE, index=False, mode="a", header=not TABLE.exists())
        print(f"{case.network} {case.attack} {case.threat} B={case.batch}: {rows.psnr.mean():.1f} dB", flush=True)
        TEXT.write_text(page(pd.read_csv(TABLE)), encoding="utf-8")


if __name__ == "__main__":
    main()
