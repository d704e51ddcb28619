"""Success rates in float32, batched and one at a time: ``python -m benchmarks.speed.parity``.

Both have the same images, weights and starts; what differs is the order of summation. Every trial is written to
``parity.json`` as soon as it is done, and a run that is started again goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import leakbench
from benchmarks.speed import machine, reference, report
from benchmarks.speed.work import Attack, Scene, psnr, scene
from leakbench.gradients import full_precision

REPORTS = machine.ROOT / "reports" / "speed"
CHUNK = 32
"""Trials that leakbench attacks at once before they are written."""


@dataclass(frozen=True)
class Case:
    """One attack on one network.

    Attributes:
        attack: ``ig`` or ``dlg``.
        model: a spec of a model.
        steps: the attack's steps.
        success: the PSNR in dB from which a reconstruction counts as a success.
    """

    attack: Attack
    model: str
    steps: int
    success: float

    @property
    def spec(self) -> str:
        """The attack's spec."""
        return f"{self.attack}(steps={self.steps})"

    @property
    def key(self) -> str:
        """What the data call it."""
        return f"{self.spec} {self.model}"


CASES = (Case("ig", "lenet", 500, 14.0), Case("dlg", "lenet", 60, 15.0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Attack what is missing of every case, both ways, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=128, help="of each case, at least 100 to say anything")
    parser.add_argument("--attack", choices=[case.attack for case in CASES], help="one case alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, help="other steps than the cases have")
    parser.add_argument("--out", type=Path, default=REPORTS)
    chosen = parser.parse_args(arguments)
    cases = [
        Case(case.attack, case.model, chosen.steps or case.steps, case.success)
        for case in CASES
        if chosen.attack in (None, case.attack)
    ]
    file = chosen.out / "parity.json"
    about = machine.describe(chosen.device)
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"cases": {}}
    data["machine"] = about
    data["commits"] = sorted({*data.get("commits", ()), about["commit"]})
    chosen.out.mkdir(parents=True, exist_ok=True)
    with full_precision():
        for case in cases:
            compare(case, chosen.trials, chosen.device, data, file)
    report.write(chosen.out, machine.ROOT / "README.md" if chosen.out.resolve() == REPORTS else None)


def compare(case: Case, trials: int, device: str, data: dict[str, Any], file: Path) -> None:
    """Attack the trials of a case that the data do not hold, and write the file after each trial or chunk."""
    where = scene(case.attack, case.model, trials, 32, device)
    blank = {
        "spec": case.spec,
        "model": case.model,
        "success_db": case.success,
        "trials": {"batched": {}, "one-at-a-time": {}},
    }
    kept = data["cases"].setdefault(case.key, blank)["trials"]
    missing = [trial for trial in range(trials) if str(trial) not in kept["batched"]]
    if missing:  # trials are attacked from the first on, so that each keeps its start
        print(f"{case.key}: {trials} trials, batched", flush=True)
        for first in range(0, trials, CHUNK):
            rows = range(first, min(first + CHUNK, trials))
            if any(trial in missing for trial in rows):
                kept["batched"].update(batched(case, where, rows))
                save(data, file)
    for trial in range(trials):
        if str(trial) not in kept["one-at-a-time"]:
            print(f"{case.key}: trial {trial + 1} of {trials}, one at a time", flush=True)
            kept["one-at-a-time"][str(trial)] = alone(case, where, trial)
            save(data, file)


def batched(case: Case, where: Scene, rows: range) -> dict[str, dict[str, Any]]:
    """Return the outcome of some trials, attacked at once by leakbench."""
    part = where.rows(rows)
    found = leakbench.attacks.parse(case.spec)(part.observation, where.rng(*rows))
    assert found.failed is not None
    return {
        str(trial): outcome(found.images[row : row + 1], bool(found.failed[row]), where, trial)
        for row, trial in enumerate(rows)
    }


def alone(case: Case, where: Scene, trial: int) -> dict[str, Any]:
    """Return the outcome of one trial by the reference."""
    start, logits = where.start(trial)
    if case.attack == "ig":
        label = where.labels[trial : trial + 1]
        found = reference.ig(where.network, where.observed(trial), label, start, steps=case.steps)
    else:
        found = reference.dlg(where.network, where.observed(trial), start, logits, steps=case.steps)
    return outcome(found.image, found.diverged, where, trial)


def outcome(image: torch.Tensor, diverged: bool, where: Scene, trial: int) -> dict[str, Any]:
    """Return a trial's PSNR in dB, None where the image is not finite, and whether it diverged."""
    value = psnr(image, where.images[trial : trial + 1])
    return {"psnr": value if value > float("-inf") else None, "diverged": diverged}


def save(data: dict[str, Any], file: Path) -> None:
    """Replace the file as a whole, so that an interruption leaves the old one."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(new, file)


if __name__ == "__main__":
    main()
