"""The closed form on ReLU networks: photographs, batches, and the page ``reports/relu``.

From the checkout, each command resumes what an earlier one left:

python -m benchmarks.relu photographs runs/relu/photos
leakbench run matrix benchmarks/relu.toml --scale SCALE --out runs/relu/SCALE \\
                                                        SCALE: resnet, pooled, defenses, updates, searches
leakbench run matrix benchmarks/relu.toml --scale photographs --out runs/relu/photographs \\
    --dataset "folder(path=runs/relu/photos, size=64)"
leakbench run matrix benchmarks/relu.toml --scale trained --out runs/relu/trained \\
    --model "resnet20(mode=eval, weights=FILE)" ...                                FILE of benchmarks/trained.toml
python -m benchmarks.relu batches runs/relu/batches.csv
python -m benchmarks.relu page runs/relu reports/relu

A part of the page may be run in pieces, in folders that begin with the part's name (runs/relu/SCALE-2); a trial that is
run again replaces the older one. The page has what was measured so far, with the number of images of each row.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

import leakbench
from leakbench import datasets, defenses, metrics, models
from leakbench.analysis.ensemble import RECOVERED
from leakbench.analysis.recovery import judged
from leakbench.analysis.statistics import wilson_interval
from leakbench.attacks.peel import Peel, served
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.restore import Restored, restore
from leakbench.attacks.peeling.trace import filled
from leakbench.core.rng import generator
from leakbench.metrics.members import matched
from leakbench.plan.matrix import RECOVERY
from leakbench.plan.trial import split_label
from leakbench.store.frames import from_csv
from leakbench.store.run_file import FILE
from leakbench.victim import build

SCALES = {
    "resnet": "Random ResNets, CIFAR-10",
    "photographs": "torchvision's ResNet-18, photographs of 64 x 64 pixels",
    "pooled": "Random networks with max-pools, CIFAR-10",
    "trained": "Trained networks, CIFAR-10",
    "defenses": "Behind defenses, for an adaptive attacker",
    "updates": "Updates of one image, of unknown learning rate",
}
"""The parts of the page that are runs."""

SEARCHES = "searches"
"""The run of the best search behind the same defenses, which is beside the closed form on the page."""

FIRST, SPACE = 320, 8
"""The first image of the first batch, and how far the first ones of two batches are apart."""

BATCHES = tuple(
    (size, tuple(range(FIRST + SPACE * batch, FIRST + SPACE * batch + size)), batch % 3)
    for size in (2, 4, 8)
    for batch in range(8)
)
"""Size, CIFAR-10 test images and weight seed of each batch."""

CLEAR = 60
"""The PSNR in dB above which images are counted apart."""

BATCH_MODEL = "resnet18(stem=cifar, max_pool=false, mode=eval)"

COLUMNS = (
    "recovered [95 %]",
    "PSNR, median",
    "after an affine fit",
    "range of that",
    f"above {CLEAR} dB",
    "seconds, median",
)

SEARCH_COLUMNS = ("recovered", "after an affine fit")

HEAD = f"""# The closed form on ReLU networks

`peel` on gradients in single precision, of images on which nothing was tuned: CIFAR-10 test images from 300 on, and
eight photographs of scikit-image, scikit-learn and matplotlib. Three weight seeds, spread over the images: image i has
the weights of seed i mod 3. An image is recovered if its SSIM after the best fit of brightness and contrast is at least
{RECOVERED}, and better than that of every floor. Intervals are Wilson's over images. In train mode a batch of one image
has lost its brightness and contrast, so read the columns after the fit. Seconds are of one core that other processes
shared, so that they are upper bounds (with `convnet`, of a third of a core); those of batches are of the processor.
Relative noise counts in root mean squares of each tensor's gradient. The rows of fully trained networks and of those
with max-pools are of a last search that ends when it brings nothing more; in all others it ended after 1,000
iterations at most. In train mode, the layer inputs of ResNet-20 follow exactly after training, too: on test images
200 to 203 after four epochs, and on 200 and 202 after a quarter of the training, the errors down to `layers.3.conv2`
are 6e-6 at most, without a wrong mask. What loses decibels is the search for the image below these, which may end
elsewhere. The rows after four epochs and after a quarter of the training are of a search that then begins anew; those
after one epoch and at the end are of an older one.

`python -m benchmarks.relu page` makes this page; the head of `benchmarks/relu.py` has all commands."""

MEASURED = ("psnr", "psnr_aligned", RECOVERY)

TRIAL = ["dataset", "model", "defense", "attack", "threat", "image", "seed"]
"""What tells trials apart."""

UNUSED = ("lpips", "paper_")
"""How the names of the columns begin that the page does not need."""


@dataclass(frozen=True)
class BatchRow:
    """One image of a batch.

    Attributes:
        model: the network's spec.
        size: images of the batch.
        seed: of the weights.
        image: its index.
        psnr, psnr_aligned, ssim_aligned: of the reconstruction that is assigned to it.
        seconds: of the processor, for the whole batch.
        reason: why nothing was recovered; empty if it was.
    """

    model: str
    size: int
    seed: int
    image: int
    psnr: float
    psnr_aligned: float
    ssim_aligned: float
    seconds: float
    reason: str


def photographs(folder: Path) -> None:
    """Write eight photographs, one subfolder each, of scikit-image, scikit-learn and matplotlib."""
    import skimage.data
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    found = {name: getattr(skimage.data, name)() for name in ("rocket", "retina", "hubble_deep_field")}
    found["tissue"] = skimage.data.immunohistochemistry()
    found["motorcycle"] = skimage.data.stereo_motorcycle()[0]
    found |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    with get_sample_data("grace_hopper.jpg") as file:
        found["hopper"] = np.asarray(Image.open(file).convert("RGB"))
    for name, pixels in found.items():
        path = folder / name / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels)).save(path)


def batches(out: Path) -> None:
    """Append the scores of the batches that a file lacks, the smallest first."""
    begun = out.exists() and out.stat().st_size > 0
    done = set(pd.read_csv(out)[["model", "size", "image"]].itertuples(index=False, name=None)) if begun else set()
    with out.open("a", newline="") as file:
        rows = csv.DictWriter(file, list(BatchRow.__annotations__))
        if not begun:
            rows.writeheader()
            file.flush()
        for batch in sorted(BATCHES, key=lambda each: (each[2], each[0])):
            size, images, seed = batch
            if (BATCH_MODEL, size, images[0]) not in done:
                for row in batch_rows(BATCH_MODEL, images, seed):
                    rows.writerow(vars(row))
                file.flush()


def batch_rows(model: str, indices: tuple[int, ...], seed: int) -> list[BatchRow]:
    """Return the scores of one batch: what ``peel`` recovers from the gradient of its mean loss."""
    dataset = datasets.parse("cifar10")
    images, labels = dataset.load(indices)
    network = build(
        models.parse(model), defenses.parse("none"), dataset.image_shape, dataset.num_classes, f"weights/{seed}"
    )
    begun = time.process_time()
    found = restored(network, images, labels, dataset.mean())
    seconds = time.process_time() - begun
    guesses = matched(found.images.clamp(0, 1), images)
    scores = {name: metrics.parse(name)(guesses, images).tolist() for name in MEASURED}
    return [
        BatchRow(model, len(indices), seed, index, *(scores[name][at] for name in MEASURED), seconds, found.reason)
        for at, index in enumerate(indices)
    ]


def restored(network: torch.nn.Module, images: Tensor, labels: Tensor, mean: Tensor) -> Restored:
    """Return the images [B, C, H, W] that follow from the gradient of a network's mean loss on them."""
    loss = torch.nn.functional.cross_entropy(network(images), labels)
    names, tensors = zip(*((name, value) for name, value in network.named_parameters() if value.requires_grad))
    sent = dict(zip(names, torch.autograd.grad(loss, tensors)))
    seen = leakbench.observe(network, images[:1], labels[:1], mean_image=mean, num_classes=10)
    steps = served(seen)
    assert isinstance(steps, Network)
    twin = filled(seen)
    noise = torch.randn(images.shape, generator=generator("noise"))
    return restore(
        steps.on(twin), steps.on(filled(seen).to(images.dtype)), sent, noise, generator("rng"), Peel().search
    )


def page(runs: Path, out: Path) -> None:
    """Write relu.md and the results of every run and of the batches."""
    out.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    for scale in (*SCALES, SEARCHES):
        for folder in sorted(each.parent for each in runs.glob(f"{scale}*/{FILE}")):
            merge(out / f"{scale}.csv", leakbench.Run(folder).results())
    for scale, title in SCALES.items():
        file = out / f"{scale}.csv"
        if file.exists():
            parts += [f"## {title}", table(file, out / f"{SEARCHES}.csv" if scale == "defenses" else None)]
    if (runs / "batches.csv").exists():
        (out / "batches.csv").write_text((runs / "batches.csv").read_text())
    if (out / "batches.csv").exists():
        parts += ["## Batches, CIFAR-10", batch_table(pd.read_csv(out / "batches.csv", keep_default_na=False))]
    (out / "relu.md").write_text("\n\n".join(parts) + "\n")


def merge(file: Path, new: pd.DataFrame) -> None:
    """Write the results of a run to a file, in the place of older ones of the same trials.

    Unsupported ones are left out: no attacker can model that there is no defense.
    """
    new = new[new["status"] != "unsupported"]
    new = new[[name for name in new if not name.startswith(UNUSED)]].astype({"seed": int})
    parts = [new]
    if file.exists():
        old = pd.read_csv(file, keep_default_na=False, na_values=[""])
        parts.insert(0, old[~pd.MultiIndex.from_frame(old[TRIAL]).isin(pd.MultiIndex.from_frame(new[TRIAL]))])
    pd.concat(parts).sort_values(TRIAL).to_csv(file, index=False)


def table(file: Path, searches: Path | None = None) -> str:
    """Return a row for each model, defense and client of a run, and a list of the images that were not recovered.

    Where the results of a search behind the same defenses are given, each row ends with what it recovers.
    """
    trials = _trials(file)
    others = _trials(searches) if searches and searches.exists() else None
    rows, failures = [], []
    for (model, defense, dataset), cell in trials.groupby(["model", "defense", "dataset"], sort=False):
        if trials["dataset"].nunique() > 1:
            name = f"`{split_label(dataset)[1]}`"
        else:
            name = f"`{stated(defense)}`" if trials["defense"].nunique() > 1 else f"`{model}`"
        figures = _figures(cell["recovered"], cell["psnr"], cell["psnr_aligned"], cell["seconds"])
        beside = (
            [] if others is None else _searched(others[(others["model"] == model) & (others["defense"] == defense)])
        )
        rows.append([name, *figures, *beside])
        failures += [
            f"- {name}, image {each.image}, seed {each.seed}: "
            + (each.reason or f"PSNR {each.psnr_aligned:.1f} dB, SSIM {getattr(each, RECOVERY):.2f} (aligned)")
            for each in cell[~cell["recovered"]].fillna({"reason": ""}).itertuples()
        ]
    head = ("network, defense or training", *COLUMNS)
    if others is not None:
        head += tuple(f"`{attack}`: {what}" for attack in others["attack"].unique() for what in SEARCH_COLUMNS)
    return _markdown(head, rows) + _listed(failures)


def _trials(file: Path) -> pd.DataFrame:
    trials = judged(from_csv(file), RECOVERED)
    return trials[~trials["floor"].astype(bool)]


def _searched(cell: pd.DataFrame) -> list[str]:
    """Return what a search recovers behind one defense: images, and the median PSNR in dB after an affine fit."""
    if cell.empty:
        return ["–", "–"]
    return [f"{int(cell['recovered'].sum())} of {len(cell)}", f"{cell['psnr_aligned'].median():.1f}"]


def stated(defense: str) -> str:
    """Return a defense's spec with its first option also if that is at its default value."""
    found = defenses.parse(defense)
    options = list(found.options().items())
    shown = [f"{name}={value}" for name, value in options if name in (options[0][0], "gate") or f"{name}=" in defense]
    return f"{found.name}({', '.join(shown)})" if shown else found.name


def batch_table(trials: pd.DataFrame) -> str:
    """Return a row for each size of batch, and a list of the images that were not recovered."""
    trials["recovered"] = trials[RECOVERY] >= RECOVERED
    rows, failures = [], []
    for size, cell in trials.groupby("size"):
        whole = cell.groupby((cell["image"] - FIRST) // SPACE)["recovered"].all()
        figures = _figures(cell["recovered"], cell["psnr"], cell["psnr_aligned"], cell["seconds"])
        rows.append([str(size), f"{int(whole.sum())} of {len(whole)}", *figures])
        failures += [
            f"- a batch of {size}, image {each.image}, seed {each.seed}: "
            + (each.reason or f"PSNR {each.psnr_aligned:.1f} dB, SSIM {getattr(each, RECOVERY):.2f} (aligned)")
            for each in cell[~cell["recovered"]].itertuples()
        ]
    return _markdown(("images in a batch", "batches of which all are recovered", *COLUMNS), rows) + _listed(failures)


def _figures(recovered: pd.Series, psnr: pd.Series, aligned: pd.Series, seconds: pd.Series) -> list[str]:
    low, high = wilson_interval(float(recovered.mean()), len(recovered))
    return [
        f"{int(recovered.sum())} of {len(recovered)} [{low:.0%}, {high:.0%}]",
        f"{psnr.median():.1f}",
        f"{aligned.median():.1f}",
        f"{aligned.min():.1f} to {aligned.max():.1f}",
        f"{int((aligned > CLEAR).sum())}",
        f"{seconds.median():.0f}",
    ]


def _markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, [":--"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _listed(failures: list[str]) -> str:
    return "\n\nNot recovered:\n\n" + "\n".join(failures) if failures else ""


def main() -> None:
    """Run one of the commands of the head."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relu", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, paths in (("photographs", ["folder"]), ("batches", ["out"]), ("page", ["runs", "out"])):
        command = commands.add_parser(name)
        for path in paths:
            command.add_argument(path, type=Path)
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    {"photographs": photographs, "batches": batches, "page": page}[given.pop("command")](*given.values())


if __name__ == "__main__":
    main()
