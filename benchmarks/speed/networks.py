"""Time and memory of the closed form through whole ReLU networks: ``python -m benchmarks.speed.networks``.

Each image or batch is attacked in a process of its own, with one thread, and the process' largest size is read at the
end: it has torch, the data, the client's step and the attack.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.speed import machine
from benchmarks.speed.memory import in_process, resident
from leakbench import attacks, clients, datasets, defenses, models
from leakbench.core.rng import Rng
from leakbench.core.types import ThreatModel
from leakbench.metrics.aligned import AlignedPSNR
from leakbench.metrics.members import matched
from leakbench.victim import Client, observe

OUT, MODULE = machine.ROOT / "reports" / "speed", "benchmarks.speed.networks"


@dataclass(frozen=True)
class Case:
    """What is attacked.

    Attributes:
        model: spec.
        dataset: spec.
        firsts: the index of the first image of each measurement.
        batch: how many images a client has.
        most: the processor seconds that are aimed at.
    """

    model: str
    dataset: str
    firsts: tuple[int, ...]
    batch: int
    most: int


CASES = (
    Case("resnet18(stem=cifar, max_pool=false, mode=eval)", "cifar10", (300, 301, 302), 1, 20),
    Case("resnet20(mode=eval)", "cifar10", (300, 301, 302), 1, 30),
    Case("resnet18(mode=eval)", "samples(size=64)", (0, 9, 18), 1, 60),
    Case("resnet18(stem=cifar, max_pool=false, mode=eval)", "cifar10", (300,), 8, 120),
)


def measure(case: Case, first: int) -> dict[str, Any]:
    """Return the attack's processor seconds, this process' largest size in GiB, and the PSNR of the worst image."""
    data = datasets.parse(case.dataset)
    images, labels = data.load(range(first, first + case.batch))
    own = [(image, int(label)) for image, label in zip(images, labels)]
    client = Client(*own[0], "weights", "client", (), tuple(own[1:]))
    seen = observe(
        models.parse(case.model),
        defenses.parse("none"),
        ThreatModel(),
        [client],
        data.num_classes,
        data.mean(),
        training=clients.parse(f"local(batch={case.batch})"),
    )
    begun = time.process_time()
    found = attacks.parse("peel")(seen, Rng(("attack",)))
    seconds = time.process_time() - begun
    guesses = matched(found.images.reshape(-1, *images.shape[1:]), images)
    worst = float(AlignedPSNR()(guesses, images).min())
    return {"seconds": seconds, "gib": resident("VmHWM") / 2**30, "psnr": worst}


def page(data: dict[str, Any]) -> str:
    """Return the page of the measurements."""
    about = data["machine"]
    lines = [
        "# Time and memory of the closed form through ReLU networks",
        "",
        f"`peel` on the gradient of one step, before training, one thread; {about['processor']}, torch "
        f"{about['torch']}, commit {about['commit']}. Seconds are the attack's, of the processor; GiB is the largest "
        "size of the whole process, with torch. Written by `python -m benchmarks.speed.networks`.",
        "",
        "| network | images | clients | seconds, median | seconds, largest | aim | GiB | worst PSNR after a fit |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in data["rows"]:
        seconds = [each["seconds"] for each in row["measured"]]
        size = max(each["gib"] for each in row["measured"])
        worst = min(each["psnr"] for each in row["measured"])
        images = f"{row['batch']} of {row['dataset']}"
        cells = (
            f"`{row['model']}`",
            images,
            len(seconds),
            f"{statistics.median(seconds):.1f}",
            f"{max(seconds):.1f}",
            row["most"],
            f"{size:.2f}",
            f"{worst:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Measure all cases, each in a process of its own, and write data and page; with two arguments, one of them."""
    torch.set_num_threads(1)
    if arguments:
        place, first = map(int, arguments)
        print(json.dumps(measure(CASES[place], first)))
        return
    rows = []
    for place, case in enumerate(CASES):
        measured = [in_process(MODULE, str(place), str(first), threads=1) for first in case.firsts]
        rows.append({**asdict(case), "measured": measured})
        print(case.model, measured, flush=True)
    data = {"machine": machine.describe("cpu"), "rows": rows}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "networks.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (OUT / "networks.md").write_text(page(data), encoding="utf-8")
    print(page(data))


if __name__ == "__main__":
    main(sys.argv[1:])
