"""What batches cost an attacker: ``python -m benchmarks.batches [--part PART ...]``; an hour of one core for all parts.

It writes ``cost.md`` and five tables to ``reports/batches``: the time of a search for each image and step at several
batch sizes; the images, seconds and memory of ``disaggregate`` on CIFAR-10 through fully connected networks, from one
gradient and from whole local trainings whose recipe the attacker does not know, and what it finds above convolutions;
what searches that repeat the local training recover; and how many labels of a batch two rules infer from the last
layer. Of the parts ``updates``, ``counts``, ``features``, ``trainings``, ``searches`` and ``page`` it makes those that
are named, by default all; the page is always written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from leakbench import attacks, clients, datasets, defenses, models
from leakbench.attacks.batch_labels import inferred_counts
from leakbench.attacks.peeling.flat import flat_features, flat_head
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.trace import trace
from leakbench.clients import LocalTraining
from leakbench.core.rng import Rng, generator, seeded
from leakbench.core.types import ThreatModel
from leakbench.gradients.counts import label_counts_by_embedding
from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM
from leakbench.metrics.members import matched
from leakbench.metrics.standard import PSNR
from leakbench.models.base import Model
from leakbench.models.module import OwnModule
from leakbench.models.surgery import linears
from leakbench.observation import Observation
from leakbench.version import __version__
from leakbench.victim import Client, observe

FOLDER = Path(__file__).resolve().parent.parent / "reports" / "batches"
COST, UPDATES, COUNTS, TEXT = FOLDER / "cost.csv", FOLDER / "updates.csv", FOLDER / "counts.csv", FOLDER / "cost.md"
FEATURES, TRAININGS = FOLDER / "features.csv", FOLDER / "trainings.csv"

SEARCHED, SIZES, SEARCH, STEPS, REPEATS = ("lenet", "resnet20(mode=eval)"), (1, 4, 16, 64), 64, 20, 3
"""The networks of the searches, the batch sizes, and the images in all, the same ones at each size; steps; repeats."""

DRAWS = 10
"""Sets of images for each kind of client, each with a network of its own."""

ONE_STEP = "local(batch=16)"
TRAINED = "local(images=32, local_batch=8, local_epochs=2, momentum=0.9, weight_decay=5e-4)"
CASES = ((ONE_STEP, (512, 512)), (TRAINED, (1024,)))
"""What clients do, and the hidden layers of their networks."""

COUNTED, COUNTED_SIZES, COUNTED_BATCHES = (
    (
        "mlp(hidden=512-512, init=default)",
        "lenet",
        "resnet20(mode=eval)",
        "resnet20(mode=train)",
        "mlp(hidden=512-512, init=default), trained",
        "resnet20(mode=train), trained",
    ),
    (8, 16, 64),
    12,
)
"""The networks and batch sizes of the label counts, and how many batches each."""

TRAINED_IMAGES, TRAINED_EPOCHS, TRAINED_BATCH, TRAINED_RATE = range(6000, 9000), 2, 32, 0.02
"""The short training: by SGD with momentum 0.9, on images of which no label is counted."""

SEPARATED_SIZES, INVERTED_FIRST = (2, 4, 8), 9500
"""The batch sizes of the networks with convolutions, and the first image."""

UNROLLED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "local(local_steps=8, lr=0.1, momentum=0.9)",
        "hidden",
        ("others", "lb(steps=300)", "lb(steps=300, local=unrolled)"),
    ),
    (
        "local(images=2, local_batch=1, local_epochs=3, lr=0.1, momentum=0.9)",
        "hidden",
        ("others", "lb(steps=300)", "lb(steps=300, local=unrolled)", "lb(steps=300, local=separate)"),
    ),
    (
        "local(images=2, local_batch=1, local_epochs=3, lr=0.1, momentum=0.9)",
        "known",
        ("lb(steps=300, local=unrolled)",),
    ),
    ("local(local_steps=8, lr=0.01, optimizer=adam)", "hidden", ("others", "lb(steps=300, local=unrolled)")),
    (
        "local(local_steps=8, lr=0.01, optimizer=adamw, weight_decay=0.01)",
        "hidden",
        ("others", "lb(steps=300, local=unrolled)"),
    ),
)
"""Local trainings of LeNet, whether the order of images is known, and the attackers."""

UNROLLED_FIRST, UNROLLED_CLIENTS = 0, 3
"""The first image, and the number of clients. Options were tuned on the images from 9000 on."""

RECOVERED = 80.0
"""The PSNR in dB from which on an image counts as recovered here."""

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Those of CIFAR-10's training images, by channel."""


def network(hidden: tuple[int, ...], normalised: bool, seed: int) -> Model:
    """Return a fully connected network with torch's initial weights, which may normalise its input."""
    with seeded("batches", seed):
        layers: list[nn.Module] = []
        if normalised:
            norm = nn.BatchNorm2d(3, eps=0.0, affine=False).eval()
            norm.load_state_dict(
                {"running_mean": torch.tensor(MEAN), "running_var": torch.tensor(DEVIATION).square()}, strict=False
            )
            layers.append(norm)
        layers.append(nn.Flatten())
        width = 3072
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        return OwnModule("mlp", nn.Sequential(*layers, nn.Linear(width, 10)))


def seen(model: Model, training: LocalTraining, first: int, batches: int = 1) -> tuple[Observation, list[Client]]:
    """Return what a server sees of clients with CIFAR-10's test images from a first one on, and the clients."""
    data = datasets.parse("cifar10")
    size = training.count
    images, labels = data.load(range(first, first + batches * size))
    each = []
    for row in range(0, batches * size, size):
        own = [(images[place], int(labels[place])) for place in range(row, row + size)]
        each.append(Client(*own[0], "weights", f"client {row}", (), tuple(own[1:])))
    trained = training.several_steps
    threat = ThreatModel(shares="weights", recipe="hidden") if trained else ThreatModel()
    return observe(model, defenses.parse("none"), threat, each, 10, data.mean(), training=training), each


def counted(name: str) -> Model:
    """Return a network of the label counts, after the short training if its name says so."""
    spec = name.removesuffix(", trained")
    model = models.parse(spec)
    if spec == name:
        return model
    images, labels = datasets.parse("cifar10").load(TRAINED_IMAGES)
    with seeded("counts", spec):
        network = model.build((3, 32, 32), 10)
        optimiser = torch.optim.SGD(network.parameters(), lr=TRAINED_RATE, momentum=0.9)
        for _ in range(TRAINED_EPOCHS):
            for rows in torch.randperm(len(images)).split(TRAINED_BATCH):
                optimiser.zero_grad()
                nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
                optimiser.step()
    return OwnModule(spec, network)


def searches() -> Iterator[dict[str, object]]:
    """Yield the seconds of a search for each image and step, for the same images in batches of several sizes."""
    for name in SEARCHED:
        for size in SIZES:
            count = SEARCH // size
            observation, _ = seen(models.parse(name), clients.parse(f"local(batch={size})"), 0, count)
            rng = Rng(tuple(str(row) for row in range(count)))
            times = []
            for _ in range(REPEATS):
                spent = []
                for steps in (1, 1 + STEPS):
                    start = time.process_time()
                    attacks.parse(f"ig(steps={steps})")(observation, rng)
                    spent.append(time.process_time() - start)
                times.append((spent[1] - spent[0]) / STEPS / SEARCH)
            yield {"model": name, "batch": size, "ms": 1000 * sorted(times)[REPEATS // 2]}


def separations() -> Iterator[dict[str, object]]:
    """Yield how many images of each client ``disaggregate`` recovers, in how many seconds.

    Each client has a process of its own, whose peak memory no other client raises.
    """
    each = [(*case, normalised, draw) for case in CASES for normalised in (False, True) for draw in range(DRAWS)]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        yield from processes.imap(separation, each)


def separation(case: tuple[str, tuple[int, ...], bool, int]) -> dict[str, object]:
    """Return what ``disaggregate`` recovers of one client: its spec, the hidden layers, and the draw."""
    spec, hidden, normalised, draw = case
    training = clients.parse(spec)
    observation, (client,) = seen(network(hidden, normalised, draw), training, draw * training.count)
    start = time.process_time()
    found = attacks.parse("disaggregate")(observation, Rng((f"{draw}",)))
    spent = time.process_time() - start
    truth = torch.stack([client.image, *(image for image, _ in client.others)]).double().flatten(1)
    images = found.images[0].double().clamp(0, 1).nan_to_num(0.5).flatten(1)
    cost = torch.cdist(images, truth).square() / truth.shape[1]
    pairs = linear_sum_assignment(cost.numpy())
    psnr = -10 * cost[pairs].clamp(min=1e-10).log10()
    return {
        "client": spec,
        "hidden": "-".join(map(str, hidden)),
        "inputs": "normalised" if normalised else "in [0, 1]",
        "draw": draw,
        "images": training.count,
        "recovered": int((psnr >= RECOVERED).sum()),
        "worst": float(psnr.min()),
        "seconds": spent,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def counts() -> Iterator[dict[str, object]]:
    """Yield the share of the labels of a batch that each rule infers from the gradient of the last layer."""
    for name in COUNTED:
        model = counted(name)
        for size in COUNTED_SIZES:
            observation, each = seen(model, clients.parse(f"local(batch={size})"), 0, COUNTED_BATCHES)
            last = next(reversed(list(linears(observation.model))))
            by_weight, by_bias = (observation.gradient[f"{last}.{part}"] for part in ("weight", "bias"))
            layer = [observation.weights[f"{last}.{part}"] for part in ("weight", "bias")]
            ours = inferred_counts(observation)
            for row, client in enumerate(each):
                labels = torch.tensor([int(client.label), *(int(label) for _, label in client.others)])
                true = torch.bincount(labels, minlength=10)
                weight, bias = (one[row] if len(one) > 1 else one[0] for one in layer)
                peer = label_counts_by_embedding(by_weight[row], by_bias[row], weight, bias, size)
                shares = [float(torch.minimum(found, true).sum()) / size for found in (ours[row], peer)]
                yield {"model": name, "batch": size, "client": row, "ours": shares[0], "ilrg": shares[1]}


def convolutional() -> dict[str, Model]:
    """Return networks of convolutions with torch's initial weights, by what they are."""
    found: dict[str, list[nn.Module]] = {}
    with seeded("batches", "convolutions"):
        wide = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
        found["two convolutions of 32, hidden 256"] = [*wide, nn.Linear(8192, 256), nn.ReLU(), nn.Linear(256, 10)]
        narrow: list[nn.Module] = []
        for inputs, stride in ((3, 2), (12, 2), (12, 1)):
            narrow += [nn.Conv2d(inputs, 12, 5, stride, 2), nn.ReLU()]
        found["LeNet of DLG with ReLUs"] = [*narrow, nn.Flatten(), nn.Linear(768, 10)]
        first = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
        hidden = [nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
        found["LeNet-5 with ReLUs and max-pools"] = [*first, *hidden]
    models_of: dict[str, Model] = {name: OwnModule(name, nn.Sequential(*layers)) for name, layers in found.items()}
    return models_of | {name: models.parse(name) for name in ("convnet(mode=eval)", "vgg16(mode=eval, hidden=256)")}


def psnr_of(images: torch.Tensor, client: Client) -> torch.Tensor:
    """Return the PSNR of each of a client's images, in dB, after the assignment."""
    return PSNR()(matched(images.clamp(0, 1).nan_to_num(0.5), client.images), client.images)


def inversions() -> Iterator[dict[str, object]]:
    """Yield what ``disaggregate`` finds above convolutions: the values of the lowest linear layer, and the images."""
    for name, model in convolutional().items():
        for size in SEPARATED_SIZES:
            observation, (client,) = seen(model, clients.parse(f"local(batch={size})"), INVERTED_FIRST)
            opened_network = Network(trace(observation))
            sent = {key: value[0] for key, value in observation.gradient.items()}
            head = flat_head(opened_network, sent)
            assert head is not None
            start = time.process_time()
            eps = torch.finfo(torch.float32).eps
            values = flat_features(opened_network, head, sent, size, eps, generator("batches", name))
            reason = values if isinstance(values, str) else ""
            row: dict[str, object] = {"model": name, "images": size, "separated": not reason, "reason": reason}
            if not isinstance(values, str):
                row["positive"] = float((values.value > 0).flatten(1).sum(1).double().mean())
            row["separation"] = time.process_time() - start
            if not isinstance(values, str):
                guess = attacks.parse("disaggregate(search=100)")(observation, Rng(("0",)))
                row["psnr"] = float(psnr_of(guess.images[0], client).median())
            yield row | {"seconds": time.process_time() - start}


def trainings() -> Iterator[dict[str, object]]:
    """Yield what searches recover of local trainings of LeNet whose recipe and rate are known."""
    data = datasets.parse("cifar10")
    for spec, order, attackers in UNROLLED:
        training = clients.parse(spec)
        count = training.count
        images, labels = data.load(range(UNROLLED_FIRST, UNROLLED_FIRST + UNROLLED_CLIENTS * count))
        each = []
        for row in range(0, len(images), count):
            own = [(images[place], int(labels[place])) for place in range(row, row + count)]
            each.append(Client(*own[0], "weights", f"client {row}", (), tuple(own[1:])))
        threat = ThreatModel(shares="weights", rate="known", labels="counts", order=order)  # type: ignore[arg-type]
        observation = observe(
            models.parse("lenet"), defenses.parse("none"), threat, each, 10, data.mean(), training=training
        )
        for attacker in attackers:
            start = time.process_time()
            guess = attacks.parse(attacker)(observation, Rng(tuple(map(str, range(len(each))))))
            spent = (time.process_time() - start) / len(each)
            for place, client in enumerate(each):
                found = guess.images[place] if count > 1 else guess.images[place : place + 1]
                pairs = matched(found.clamp(0, 1), client.images)
                scores = {
                    "psnr_aligned": float(AlignedPSNR()(pairs, client.images).mean()),
                    "ssim_aligned": float(AlignedSSIM()(pairs, client.images).mean()),
                }
                cells = {"client": spec, "order": order, "attack": attacker, "row": place}
                yield {**cells, **scores, "seconds": spent}


WORDS = """# What batches cost an attacker

Made by `python -m benchmarks.batches` at leakbench {version}, on one core of a shared machine; CIFAR-10 test images.

## Closed form

`disaggregate` on the update of fully connected networks with torch's initial weights: {draws} clients of each
kind, each with images and weights of its own. The attacker knows neither the learning rate nor how the client trained.
An image counts as recovered from {recovered:.0f} dB on. Seconds are those of the processor; the peak memory is that of
a process for one client, with torch and the images. Single clients: [updates.csv](updates.csv).

{updates}

## Above convolutions

`disaggregate` on one gradient of networks with torch's initial weights, of CIFAR-10 test images. *separated*: whether
the values that the lowest linear layer takes were found of every image, to the rounding of the gradient; *positive*:
how many of these are above zero. An image has 3,072 pixels: with more values than that it follows, with fewer the
search returns one of many images that give the same values.

{features}

## Local training

LeNet, {clients} clients of each kind; the recipe, the learning rate and the label counts are known. Without `local`, a
search matches one gradient, at the weights before; `unrolled` repeats the steps with a guessed order of images, or the
known one; `separate` has a set of images for each epoch. The mean over clients of the mean over their images.
The table has kinds of clients for which repeating the steps gained something in a first trial on other images. For
another kind it gained nothing: 4 images in batches of 2, for 2 epochs, stayed at the floor with all three.

{trainings}

## Searches

Milliseconds of the processor for each image and step of `ig`, for the same {search} images in batches of each size.

{cost}

## Label counts

The share of the labels of a batch that follow from the gradient of the last layer, in the mean of {batches} batches,
and in brackets the share of batches in which all do: by the rule of this package, the batch size times the difference
between the probabilities of public noise, or of its features moved to the mean feature that the gradient shows, and the
gradient of the bias; and by iLRG (Ma et al. 2023). The networks named trained had a short training on other images.

{counts}
"""


def page() -> str:
    """Return the text, from the two files."""
    updates, cost, counted = pd.read_csv(UPDATES), pd.read_csv(COST), pd.read_csv(COUNTS)
    lines = [
        "| client | hidden layers | inputs | clients with all images recovered | images recovered | seconds, median "
        "| seconds, most | peak memory |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for (client, hidden, inputs), rows in updates.groupby(["client", "hidden", "inputs"], sort=False):
        whole = (rows["recovered"] == rows["images"]).sum()
        lines.append(
            f"| `{client}` | {hidden} | {inputs} | {whole} of {len(rows)} | {rows['recovered'].sum()} of "
            f"{rows['images'].sum()} | {rows['seconds'].median():.1f} | {rows['seconds'].max():.1f} | "
            f"{rows['peak_mib'].max():.0f} MiB |"
        )
    table = cost.pivot(index="model", columns="batch", values="ms")
    head = "| network | " + " | ".join(f"{size} in a batch" for size in table.columns) + " |"
    body = [
        f"| {name} | " + " | ".join(f"{one:.2f}" for one in row) + " |" for name, row in zip(table.index, table.values)
    ]
    searched = "\n".join([head, "|:--|" + "--:|" * len(table.columns), *body])
    shares = ["| network | images | this package | iLRG |", "|:--|--:|--:|--:|"]
    for (name, size), rows in counted.groupby(["model", "batch"], sort=False):
        both = [f"{rows[rule].mean():.2f} ({(rows[rule] == 1).mean():.2f})" for rule in ("ours", "ilrg")]
        shares.append(f"| {name} | {size} | {both[0]} | {both[1]} |")
    inverted = pd.read_csv(FEATURES)
    heads = ("network", "images", "separated", "positive values", "seconds, separation", "PSNR, median", "seconds, all")
    features = [f"| {' | '.join(heads)} |", "|:--|--:|:--|--:|--:|--:|--:|"]
    for row in inverted.to_dict("records"):
        ends = [f"{row['positive']:.0f}", f"{row['separation']:.1f}", f"{row['psnr']:.1f} dB", f"{row['seconds']:.0f}"]
        ends = ends if row["separated"] else ["–", f"{row['separation']:.1f}", "–", f"{row['seconds']:.0f}"]
        cells = [row["model"], str(row["images"]), "yes" if row["separated"] else f"no: {row['reason']}", *ends]
        features.append("| " + " | ".join(cells) + " |")
    trained = ["| client | order | attack | PSNR, aligned | SSIM, aligned | seconds |", "|:--|:--|:--|--:|--:|--:|"]
    for (client, order, attack), rows in pd.read_csv(TRAININGS).groupby(["client", "order", "attack"], sort=False):
        means = rows[["psnr_aligned", "ssim_aligned", "seconds"]].mean()
        trained.append(
            f"| `{client}` | {order} | `{attack}` | {means['psnr_aligned']:.1f} dB | {means['ssim_aligned']:.2f} | "
            f"{means['seconds']:.0f} |"
        )
    return WORDS.format(
        features="\n".join(features),
        trainings="\n".join(trained),
        clients=UNROLLED_CLIENTS,
        version=__version__,
        draws=DRAWS,
        recovered=RECOVERED,
        search=SEARCH,
        batches=COUNTED_BATCHES,
        updates="\n".join(lines),
        cost=searched,
        counts="\n".join(shares),
    )


PARTS: Mapping[str, tuple[Path, Callable[[], Iterable[dict[str, object]]]]] = {
    "updates": (UPDATES, separations),
    "counts": (COUNTS, counts),
    "features": (FEATURES, inversions),
    "trainings": (TRAININGS, trainings),
    "searches": (COST, searches),
}
"""The parts of the page that are measured: where each is kept, and what measures it."""


def keep(rows: Iterable[dict[str, object]], file: Path) -> None:
    """Write a table of rows, anew with each of them: a measurement that is stopped keeps what it has."""
    kept = []
    for row in rows:
        print(row, flush=True)
        kept.append(row)
        pd.DataFrame(kept).to_csv(file, index=False, float_format="%.4g", lineterminator="\n")


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", action="append", choices=[*PARTS, "page"], help="repeatable; by default all")
    chosen = parser.parse_args().part or list(PARTS)
    torch.set_num_threads(1)
    for name, (file, measure) in PARTS.items():
        if name in chosen:
            keep(measure(), file)
    TEXT.write_text(page())


if __name__ == "__main__":
    main()
