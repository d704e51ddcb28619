"""breaching beside the searches of runs of ``relu-search.toml``: the same networks, weights, images, labels and steps.

``python -m benchmarks.relu_peer RUN ... --out OUT`` runs breaching's ``invertinggradients`` on every network and image
that ``log-cosine`` attacked in the files RUN/results.csv, with as many steps, and writes OUT/breaching.csv and the page
OUT/peer.md. It starts at its own random image. Rows that OUT/breaching.csv has are not measured again.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Hashable, Iterable
from pathlib import Path

import pandas as pd
import torch

from benchmarks.committed import metric_of
from benchmarks.speed import peer
from leakbench import attacks, datasets, defenses, metrics, models
from leakbench.analysis.statistics import UNIT, bootstrap_interval, paired_difference
from leakbench.analysis.summary import rescored
from leakbench.core.rng import generator
from leakbench.core.text import with_interval
from leakbench.report.display import to_markdown
from leakbench.store.frames import from_csv
from leakbench.victim import build

KEY = ["model", "dataset", "image", "seed"]
SCORES = ("psnr", "psnr_aligned", "ssim")
OURS, PUBLISHED, PEER = "log-cosine", "ig", "breaching"

_HEAD = """# `log-cosine` beside breaching

ReLU networks with batch normalisation in eval mode, labels known: the same weights, images and {steps} steps for all
three, each of one evaluation of the gradient. `ig` has the settings of its paper, and so has breaching {version}'s
`invertinggradients`. No setting was chosen on these images. Decibels are of PSNR after the best fit of brightness and
contrast, and SSIM is before it; brackets are 95 % intervals over images.

`python -m benchmarks.relu_peer RUN ... --out reports/relu-search` makes this page; `benchmarks/relu-search.toml` has
the runs.

"""


def main() -> None:
    """Measure what is missing, and write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relu_peer", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, help="the folders of runs, each with its results.csv")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if reason := peer.available():
        parser.exit(2, f"error: {reason}\n")
    # failed trials have the scores of the best floor, as on every page
    measured = [metric_of(name) for name in SCORES]
    results = pd.concat([rescored(from_csv(run / "results.csv"), measured) for run in given.runs])
    results["name"] = [attacks.parse(spec).name for spec in results["attack"]]
    ours = results[results["name"] == OURS]
    ((steps, own),) = [(attacks.parse(spec).options()["steps"], own) for spec, own in ours.groupby("attack")]
    file = given.out / "breaching.csv"
    done = set(pd.read_csv(file)[KEY].itertuples(index=False, name=None)) if file.exists() else set()
    with file.open("a", newline="") as opened:
        rows = csv.writer(opened)
        if not done:
            rows.writerow((*KEY, "attack", *SCORES))
        for place in own[KEY].itertuples(index=False, name=None):
            if place not in done:
                rows.writerow((*place, f"{PEER}(steps={steps})", *(f"{score:.4f}" for score in measure(*place, steps))))
                opened.flush()
    (given.out / "peer.md").write_text(
        _HEAD.format(steps=steps, version=peer.version()) + page(results, pd.read_csv(file)), encoding="utf-8"
    )


def measure(model: str, dataset: str, index: int, seed: int, steps: int) -> list[float]:
    """Return the scores of what breaching makes of one image's gradient."""
    data = datasets.parse(dataset)
    (image,), label = data.load([index])
    network = build(models.parse(model), defenses.parse("none"), data.image_shape, data.num_classes, f"weights/{seed}")
    loss = torch.nn.functional.cross_entropy(network(image[None]), label)
    observed = torch.autograd.grad(loss, list(network.parameters()))
    start = torch.randn((1, *image.shape), generator=generator("peer", str(index)))
    guess = peer.ig(network, observed, label, start, steps=steps).image.clamp(0, 1)
    return [float(metrics.parse(name)(guess, image[None])) for name in SCORES]


def page(results: pd.DataFrame, peers: pd.DataFrame) -> str:
    """Return the table: a row for each network.

    Args:
        results: those of the run, with the column ``name``, the attack's without its options.
        peers: breaching's rows.
    """
    groups = results.drop_duplicates(KEY)[[*KEY, "group"]]
    every = pd.concat([results, peers.assign(name=PEER).merge(groups, on=KEY)])
    return to_markdown(pd.DataFrame([_row(model, own) for model, own in every.groupby("model", sort=False)]), left=1)


def _row(model: Hashable, own: pd.DataFrame) -> dict[str, str]:
    arms = {name: rows.set_index(UNIT)[list(SCORES)] for name, rows in own.groupby("name")}
    cells = {"network": str(model), "images": str(len(arms[OURS]))}
    for name in (OURS, PUBLISHED, PEER):
        cells[f"{name}, dB"] = _mean(arms[name]["psnr_aligned"], 1)
        cells[f"{name}, SSIM"] = f"{arms[name]['ssim'].mean():.2f}"
    for name in (PUBLISHED, PEER):
        first, second = arms[OURS]["psnr_aligned"], arms[name]["psnr_aligned"]
        found = paired_difference(first, second)
        gains = (first - second).dropna()
        cells[f"{OURS} above {name}, dB"] = with_interval(found.mean, found.low, found.high, 1, sign=True)
        cells[f"ahead of {name}"] = f"{(gains > 0).sum()} of {len(gains)} images"
    return cells


def _mean(values: Iterable[float], places: int) -> str:
    known = list(values)
    return with_interval(sum(known) / len(known), *bootstrap_interval(known), places)


if __name__ == "__main__":
    main()
