"""What a malicious server reads out of one gradient of a batch: ``python -m benchmarks.malicious``.

It writes ``reports/malicious/batches.csv``: for each server, batch size, defense and draw of images the share of images
that are recovered at 40 dB or more without knowing any, beside the theory's; and ``noise.csv``: what the theory expects
behind noise. CIFAR-10: the server's quantiles are of 20,000 training images, the attacked images are test images, the
network is an untrained LeNet. Minutes on one core. Rows that are there are kept: remove the CSV files to measure again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor, nn

from benchmarks.received import auc, flipped, noisy
from leakbench import datasets, defenses, models
from leakbench.attacks.crafted_rows import PixelRows, pixel_rows
from leakbench.attacks.imprint import imprinted, read_imprint
from leakbench.attacks.trap import read_traps
from leakbench.core.rng import generator, seeded
from leakbench.core.types import Gradient, Secret, ThreatModel
from leakbench.defenses import Defense, Step
from leakbench.gradients.evaluate import architecture, tensors_of
from leakbench.models import crafted
from leakbench.observation import Observation
from leakbench.version import __version__

FOLDER = Path(__file__).resolve().parent.parent / "reports" / "malicious"
PAGE, RECEIVED, TEXT = FOLDER / "batches.csv", FOLDER / "received.csv", FOLDER / "malicious.md"
NOISE = FOLDER / "noise.csv"
"""What the theory expects behind noise, of the same draws."""

SERVERS = ("imprint(bins=128)", "imprint", "trap")
BATCHES = (16, 64, 128)
DEFENSES = (
    "none",
    "keylock",
    "noise(scale=1e-4, relative=true)",
    "noise(scale=0.01, relative=true)",
    "secagg of 8 clients",
)
IMAGES = 512
"""The images of each server, batch size and defense, in batches."""
PUBLIC = 20_000
RECOVERED = 40.0
"""The PSNR from which on an image counts as recovered."""


WORDS = """# A malicious server

What a server reads out of one gradient of a batch if it crafts the weights that it hands out, what secure aggregation
changes about that, and what a client can see. Made by `python -m benchmarks.malicious` and `python -m
benchmarks.received` at leakbench {version}. CIFAR-10; the network is an untrained LeNet of DLG, the attacked images
are test images, the server's quantiles are those of 20,000 training images.

## In plain words

- **A server that may choose the weights needs no search.** With an imprint of 512 bins in front of the network it
  reads {most} of 16 and {least} of 128 images out of one gradient, up to rounding, in milliseconds on a CPU. This
  is what the theory says, (1 - 1/K)^(B-1): an image is recovered if no other one of the batch is in its bin.
- **Secure aggregation does not change this.** It hides which client sent what, and hands the server the sum. The sum
  over 8 clients with 2 images each is the gradient of a batch of 16 images: {secagg} of them are recovered, as many
  as without it. What protects is the size of the sum: with many more images than bins, few are alone in theirs. The
  server chooses the number of bins. What secure aggregation does cover, as long as every client gets the same weights:
  the server cannot tell whose image it reads, and attacks that need the gradient of a single client are not possible.
  A server that hands different weights to different clients reads a single client through the sum (Pasquini et al.
  2022, Zhao et al. 2024; not measured here): clients can compare hashes of what they received. Nor does it cover a
  first linear layer behind a ReLU, whose sum `disaggregate` takes apart with honest weights ([peers](peers.md)).
- **A defense of later layers does not change it either.** Key-lock acts behind the first convolution; the crafted
  layer is in front of it ({keylock} of 16).
- **Noise does, if it is as large as one image's share of the gradient.** With relative noise of 0.0001 {weak} of 16 are
  recovered, with 0.01 {strong} of 16: images with small errors go first, and what is recovered is noisy.
- **A client can look at the weights before it trains** (`leakbench audit received`): {alarms} of {honest} honest
  networks were taken for crafted, and {found} of {crafted} crafted ones were found. A server that knows the test can
  avoid it: those that were not found are trap weights with a tenth of random signs, which cost it little at B = 16.

## Recovered images

The share of images at 40 dB or more (one assignment of the reconstructions, at most as many as images), over {images}
images in batches of B. *alone*: the share of images that had their bin for themselves in this draw. *theory*: (1 -
1/K)^(B-1). The brackets are the 95 % interval of a binomial share of this size. *proved*: the share of images that
the attacker proves to be images of the batch, without a private image (the error that was observed at the crafted
layer is that of the reconstruction, for one of the labels). It proves none behind key-lock, whose secrets it does not
know, and few behind noise. Without noise the theory is inside the interval in {inside} rows.

{table}

What the theory says behind noise: the difference of two rows has noise of sqrt(2) times that of a row, and is divided
by the image's error e. With deviations s and t of the noise on weights and bias, the squared error of a pixel x is
about 2 (s^2 + t^2 x^2) / e^2, so that an image that is alone in its bin is recovered at 40 dB if that is 0.0001 or less
on average. The errors e are those of the gradient without noise, of the same batches. What is expected is inside the
interval in {inside_noise} rows:

{noise}

*falsely proved*, no image of the batch at 40 dB: {false} of all reconstructions that were proved without noise, and
{false_noise} of those behind noise, where it is a hint and no proof.

## What a client sees

{honest} honest networks ({kinds}), and {crafted} crafted ones. The thresholds were set on 40 other honest and 40
other crafted networks (`--calibrate`). The score of a network is the largest of its layers; it counts as crafted from
1 on. The area under the ROC curve over all is {auc}.

{detection}

- False alarms: {by_kind};
  of all {alarms} of {honest}, with a 95 % interval of the rate of {low} to {high}. These networks were trained for at
  most 300 steps. Scored beside them, once: AlexNet's and VGG-16's convolutions, trained on ImageNet, 0.42 and 0.33; ten
  checkpoints of ResNet-18 and ResNet-20 on CIFAR-10, untrained to fully trained, 0.00.
- *noise 0.001*, *noise 0.1*: each row of the imprint has Gaussian noise of this size, relative to the row, and a
  factor of its own. *signs 1 %*, *10 %*: this share of the entries of trap weights has a random sign. *few rows*: 64
  trap rows.
- What a disguise costs the server, B = 16, LeNet, {disguised} images: {costs}.

Not looked for: weights that make one class dominate the gradient (Wen et al. 2022), convolutions that hand each
client's images to other rows (Zhao et al. 2024), layers that the client's own network does not have.
"""


@dataclass(frozen=True)
class Measured:
    """One gradient of a batch."""

    server: str
    batch: int
    defense: str
    disguise: str
    draw: int
    share: float
    alone: float
    theory: float
    proved: int
    falsely_proved: int
    milliseconds: float


def sent(network: nn.Module, defense: Defense, images: Tensor, labels: Tensor, clients: int, key: int) -> Gradient:
    """Return the mean over clients of what they send, each of an equal part of the images."""
    total: Gradient = {}
    for part in range(clients):
        x, y = (value.chunk(clients)[part] for value in (images, labels))
        released = defense.release(Step(network, x, y, defense), generator("malicious", key, part))
        total = {name: total.get(name, 0) + value / clients for name, value in released.items()}
    return total


def add(
    server: str,
    name: str,
    disguise: str,
    batches: Sequence[int],
    handed: nn.Module,
    images: Tensor,
    labels: Tensor,
    public: Tensor,
) -> None:
    """Append the rows of a server's network behind a defense to the table, unless it has them."""
    known = pd.read_csv(PAGE) if PAGE.exists() else None
    if known is not None and ((known.server == server) & (known.defense == name) & (known.disguise == disguise)).any():
        return
    clients = 8 if name.startswith("secagg") else 1
    defense = defenses.parse("none" if clients > 1 else name)
    with seeded("malicious", name):
        network = defense.wrap(handed)
    own, secrets = tensors_of(network), defense.secrets(network)
    with torch.no_grad():
        for secret in secrets:
            shape = tuple(own[secret.name].shape)
            own[secret.name].copy_(secret.law.draw(shape, generator("malicious", secret.name)))
    found = []
    for batch in batches:
        for draw in range(IMAGES // batch):
            chosen = torch.randperm(len(images), generator=generator("batch", batch, draw))[:batch]
            gradient = sent(network, defense, images[chosen], labels[chosen], clients, draw)
            seen = observed(network, gradient, server, public, secrets)
            found.append(measured(server, name, disguise, batch, draw, seen, images[chosen]))
    print(found[0], flush=True)
    pd.DataFrame(map(asdict, found)).round(4).to_csv(PAGE, index=False, mode="a", header=not PAGE.exists())


def measured(
    server: str, name: str, disguise: str, batch: int, draw: int, seen: Observation, truth: Tensor
) -> Measured:
    """Return the row of one observation of images [B, C, H, W]."""
    begin = time.perf_counter()
    (layer,) = pixel_rows(seen)
    if server.startswith("imprint"):
        found, right, bins = read_imprint(seen, 0, layer, batch)
        theory = crafted.expected_alone(bins, batch)
    else:
        found, right = read_traps(seen, 0, layer, batch)
        theory = float("nan")
    taken = 1000 * (time.perf_counter() - begin)
    found, right = found[:batch], right[:batch]
    error = torch.cdist(found.clamp(0, 1).flatten(1), truth.double().flatten(1)).square() / truth[0].numel()
    psnr = -10 * np.log10(np.maximum(error.numpy(), 1e-12))
    own, other = linear_sum_assignment(-psnr)
    best = np.zeros(batch)
    best[other] = psnr[own, other]
    false = int((right.numpy() & (psnr.max(1) < RECOVERED)).sum()) if len(psnr) else 0
    values = truth.double().flatten(1) @ layer.weight[0] + 0.0
    edges = (-layer.bias).sort().values
    bins_of = torch.searchsorted(edges, values)
    alone = float((torch.bincount(bins_of, minlength=len(edges) + 1)[bins_of] == 1).double().mean())
    if not server.startswith("imprint"):
        alone = float("nan")
    return Measured(
        server,
        batch,
        name,
        disguise,
        draw,
        float((best >= RECOVERED).mean()),
        alone,
        theory,
        int(right.sum()),
        false,
        taken,
    )


DISGUISES: tuple[tuple[str, str, Callable[[nn.Module], nn.Module] | None], ...] = (
    ("imprint", "none", None),
    ("imprint", "noise 0.001", lambda network: noisy(network, 1e-3, 0)),
    ("imprint", "noise 0.1", lambda network: noisy(network, 1e-1, 0)),
    ("trap", "none", None),
    ("trap", "signs 1 %", lambda network: flipped(network, 0.01, 0)),
    ("trap", "signs 10 %", lambda network: flipped(network, 0.1, 0)),
)
"""A server, what disguises its network, and how."""


def wrongly(rows: pd.DataFrame) -> str:
    """Return how many of the proved reconstructions are wrong."""
    return f"{int(rows.falsely_proved.sum())} of {int(rows.proved.sum()):,}"


def page(batches: pd.DataFrame, received: pd.DataFrame) -> str:
    """Return the page of both tables."""
    plain = batches[batches.disguise == "none"]

    def of(server: str, defense: str, batch: int) -> float:
        own = plain[(plain.server == server) & (plain.defense == defense) & (plain.batch == batch)]
        return float(own.share.mean())

    def images(server: str, defense: str, batch: int) -> str:
        return f"{of(server, defense, batch) * batch:.1f}"

    honest, made = received[~received.crafted], received[received.crafted]
    alarms, found = int((honest.score >= 1).sum()), int((made.score >= 1).sum())
    low, high = wilson(alarms, len(honest))
    kinds = honest.kind.value_counts()
    rates = []
    for kind, count in kinds.items():
        wrong = int((honest[honest.kind == kind].score >= 1).sum())
        rates.append("{} of {} {} networks [{:.1%}, {:.1%}]".format(wrong, count, kind, *wilson(wrong, int(count))))
    noise = pd.read_csv(NOISE)
    costs = [
        f"{server} with {disguise}: {own.share.mean():.0%}"
        for (server, disguise), own in batches[batches.disguise != "none"].groupby(["server", "disguise"], sort=False)
    ]
    noisy_rows = batches.defense.str.startswith("noise")
    return WORDS.format(
        version=__version__,
        most=images("imprint", "none", 16),
        least=images("imprint", "none", 128),
        secagg=images("imprint", "secagg of 8 clients", 16),
        keylock=images("imprint", "keylock", 16),
        weak=images("imprint", DEFENSES[2], 16),
        strong=images("imprint", DEFENSES[3], 16),
        alarms=alarms,
        honest=len(honest),
        found=found,
        crafted=len(made),
        images=IMAGES,
        table=share_table(plain),
        noise=noise_table(plain, noise),
        inside=inside(plain[plain.theory.notna() & ~plain.defense.str.startswith("noise")], "theory"),
        inside_noise=inside(plain.merge(noise, on=["server", "defense", "batch", "draw"]), "expected"),
        by_kind=", ".join(rates),
        false=wrongly(batches[~noisy_rows]),
        false_noise=wrongly(batches[noisy_rows]),
        kinds=", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        auc=f"{auc(received):.4f}",
        detection=detection_table(received),
        low=f"{low:.1%}",
        high=f"{high:.1%}",
        disguised=IMAGES,
        costs="; ".join(
            [f"without one, imprint {of('imprint', 'none', 16):.0%} and trap {of('trap', 'none', 16):.0%}", *costs]
        ),
    )


def inside(rows: pd.DataFrame, column: str) -> str:
    """Return in how many cells the expectation in a column is inside the interval of the recovered share."""
    found = []
    for _, own in rows.groupby(["server", "defense", "batch"]):
        low, high = wilson(round(float((own.share * own.batch).sum())), int(own.batch.sum()))
        found.append(low <= own[column].mean() <= high)
    return f"{sum(found)} of {len(found)}"


def share_table(plain: pd.DataFrame) -> str:
    """Return the table of recovered shares."""
    lines = ["| server | defense | B | recovered | alone | theory | proved | ms |", "|:--|:--|--:|--:|--:|--:|--:|--:|"]
    for (server, defense, batch), own in plain.groupby(["server", "defense", "batch"], sort=False):
        count = round(float((own.share * own.batch).sum()))
        low, high = wilson(count, int(own.batch.sum()))
        alone, theory = ("" if own[name].isna().all() else f"{own[name].mean():.3f}" for name in ("alone", "theory"))
        proved = float(own.proved.sum() / own.batch.sum())
        lines.append(
            f"| {server} | {defense} | {batch} | {own.share.mean():.3f} [{low:.3f}, {high:.3f}] | {alone} | {theory} "
            f"| {proved:.3f} | {own.milliseconds.median():.0f} |"
        )
    return "\n".join(lines)


def noise_table(plain: pd.DataFrame, expected: pd.DataFrame) -> str:
    """Return the table of recovered and expected shares behind noise."""
    lines = ["| server | noise | B | recovered | expected |", "|:--|:--|--:|--:|--:|"]
    for (server, defense, batch), own in expected.groupby(["server", "defense", "batch"], sort=False):
        same = plain[(plain.server == server) & (plain.defense == defense) & (plain.batch == batch)]
        count = round(float((same.share * same.batch).sum()))
        low, high = wilson(count, int(same.batch.sum()))
        lines.append(
            f"| {server} | {defense} | {batch} | {same.share.mean():.3f} [{low:.3f}, {high:.3f}] "
            f"| {own.expected.mean():.3f} |"
        )
    return "\n".join(lines)


def expected_behind_noise(layer: PixelRows, truth: Tensor, scale: float) -> float:
    """Return the share of images [B, C, H, W] that an imprint recovers at 40 dB behind relative noise, in theory.

    Args:
        layer: the crafted layer, with the gradient without noise.
        truth: the images.
        scale: of the noise, relative to the root mean square of a tensor.
    """
    order = imprinted(layer)
    errors = layer.errors[order]
    sizes = errors - torch.cat([errors[1:], torch.zeros_like(errors[:1])])
    pixels = truth.double().flatten(1)
    bins = torch.searchsorted(-layer.bias[order], pixels @ layer.weight[order[0]]) - 1
    alone = torch.bincount(bins.clamp(min=0), minlength=len(order))[bins.clamp(min=0)] == 1
    s, t = (scale * value.square().mean().sqrt() for value in (layer.change, layer.errors))
    squared = 2 * (s.square() + t.square() * pixels.square().mean(1)) / sizes[bins.clamp(min=0)].square()
    return float((alone & (bins >= 0) & (squared <= 10 ** (-RECOVERED / 10))).double().mean())


def behind_noise(plain: nn.Module, images: Tensor, labels: Tensor, public: Tensor) -> pd.DataFrame:
    """Return the expected share behind noise of every imprint, batch size and draw."""
    rows = []
    for server in SERVERS[:2]:
        handed = crafted.handed_out(plain, server, public)
        for batch in BATCHES:
            for draw in range(IMAGES // batch):
                chosen = torch.randperm(len(images), generator=generator("batch", batch, draw))[:batch]
                gradient = sent(handed, defenses.parse("none"), images[chosen], labels[chosen], 1, draw)
                (layer,) = pixel_rows(observed(handed, gradient, server, public))
                for defense in (name for name in DEFENSES if name.startswith("noise")):
                    scale = float(defense.split("scale=")[1].split(",")[0])
                    expected = expected_behind_noise(layer, images[chosen], scale)
                    rows.append(
                        {"server": server, "defense": defense, "batch": batch, "draw": draw, "expected": expected}
                    )
    return pd.DataFrame(rows).round(4)


def observed(
    network: nn.Module, gradient: Gradient, server: str, public: Tensor, secrets: Sequence[Secret] = ()
) -> Observation:
    """Return what a malicious server sees of one client's gradient."""
    hidden = {secret.name for secret in secrets}
    parameters = {key: value.detach()[None] for key, value in network.named_parameters() if key not in hidden}
    buffers = {key: value for key, value in network.named_buffers() if key not in hidden}
    return Observation(
        model=architecture(network),
        weights=parameters | buffers,
        gradient={key: value[None] for key, value in gradient.items() if key not in hidden},
        secrets=tuple(secrets),
        labels=None,
        image_shape=(3, 32, 32),
        num_classes=10,
        mean_image=public.mean(0),
        threat=ThreatModel(server=server),
    )


def detection_table(received: pd.DataFrame) -> str:
    """Return the table of detected shares by kind of crafting."""
    lines = ["| crafted by | networks | found | AUC | least score |", "|:--|--:|--:|--:|--:|"]
    for kind, own in received[received.crafted].groupby("kind", sort=True):
        found = int((own.score >= 1).sum())
        lines.append(f"| {kind} | {len(own)} | {found} | {auc(received, str(kind)):.3f} | {own.score.min():.2f} |")
    top = received[~received.crafted].score.max()
    return "\n".join([*lines, "", f"The largest score of an honest network is {top:.2f}."])


def wilson(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    found = binomtest(count, total).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def main() -> None:
    """Write the rows that are missing, and the page."""
    images, labels = datasets.parse("cifar10").load(range(4000))
    public, _ = datasets.parse("cifar10(split=train)").load(range(PUBLIC))
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    with seeded("malicious", "lenet"):
        plain = models.parse("lenet").build((3, 32, 32), 10)
    for server in SERVERS:
        handed = crafted.handed_out(plain, server, public)
        for defense in DEFENSES:
            add(server, defense, "none", BATCHES, handed, images, labels, public)
    for server, disguise, change in DISGUISES:
        if change is not None:
            handed = change(crafted.handed_out(plain, server, public))
            add(server, "none", disguise, BATCHES[:1], handed, images, labels, public)
    if not NOISE.exists():
        behind_noise(plain, images, labels, public).to_csv(NOISE, index=False)
    TEXT.write_text(page(pd.read_csv(PAGE), pd.read_csv(RECEIVED)), encoding="utf-8")


if __name__ == "__main__":
    main()
