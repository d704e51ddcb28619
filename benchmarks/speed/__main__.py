"""Measure, and write data, tables and plots: ``python -m benchmarks.speed --scale smoke|full --device cpu|cuda``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import leakbench
from benchmarks.speed import machine, measure, memory, peer, reference, report
from benchmarks.speed.measure import Subject
from benchmarks.speed.work import (
    BREACHING,
    LEAKBENCH,
    REFERENCE,
    Ending,
    Exact,
    Growth,
    Plan,
    Work,
    flops,
    missing,
    plan,
    psnr,
    runner,
    scene,
)
from leakbench.core.rng import seeded
from leakbench.gradients import full_precision

FORMAT = 1
REPORTS = machine.ROOT / "reports" / "speed"
SMOKE = machine.ROOT / "runs" / "speed-smoke"
EVALUATIONS = 14
"""Evaluations of an outer step of DLG on average, diverged trials included; for the estimate of a run's length."""


PARTS = ("works", "ending", "growth", "memory", "exact")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything that a scale asks for, write it, and say how long a full run would take here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--scale", choices=("smoke", "full"), default="smoke")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="reports/speed for the full scale, runs/speed-smoke for smoke")
    parser.add_argument(
        "--part", choices=PARTS, nargs="+", default=PARTS, help="the others are kept where the commit is the same"
    )
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; use --device cpu")
    full = chosen.scale == "full"
    out = chosen.out or (REPORTS if full else SMOKE)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{chosen.device}.json"
    data = begin(file, chosen.scale, chosen.device)
    if not peer.available():
        peer.warm_up()
    what = plan(chosen.scale, chosen.device)
    for part in PARTS:
        if part in chosen.part:
            begun = time.perf_counter()
            with full_precision():
                data[part] = run(part, what, chosen.device)
            data["load_after"] = machine.load()
            data["minutes"] += (time.perf_counter() - begun) / 60
            file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    report.write(out, machine.ROOT / "README.md" if out.resolve() == REPORTS else None)
    say(f"took {data['minutes']:.1f} minutes; wrote {out}")
    if not full:
        minutes = estimate(data, plan("full", chosen.device))
        say(f"a full run would take about {minutes:.0f} minutes on this machine, as busy as it is now")


def begin(file: Path, scale: str, device: str) -> dict[str, Any]:
    """Return the data to add to: those of the file where they are of this scale and commit, or none."""
    about = machine.describe(device)
    blank = {"format": FORMAT, "scale": scale, "kind": device, "machine": about, "load_after": [], "minutes": 0.0}
    blank |= {"peak": "best", "exact": []}
    blank |= {"works": [], "ending": None, "growth": [], "memory": []}
    if not file.exists():
        return blank
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    same = (data["format"], data["scale"], data["machine"]["commit"]) == (FORMAT, scale, about["commit"])
    return {**data, "machine": about} if same and not about["commit"].endswith("+") else blank


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def run(part: str, what: Plan, device: str) -> Any:
    """Return what was measured of one part, as plain JSON values."""
    if part == "works":
        return [rows(work, what.rounds, device) for work in what.works]
    if part == "ending":
        return None if what.ending is None else endings(what.ending, device)
    if part == "growth":
        return [curve(growth, what.growth_rounds, device) for growth in what.growth]
    if part == "exact":
        return [exact(case, device) for case in what.exact]
    return [peak(work, device) for work in what.memory]


def about(work: Work) -> dict[str, Any]:
    """Return a work as plain JSON values."""
    return {
        "title": work.title,
        "attack": work.attack,
        "model": work.model,
        "trials": work.trials,
        "side": work.side,
        "target": list(work.target),
    }


def subjects(work: Work, device: str, names: Sequence[str]) -> tuple[list[Subject], int]:
    """Return the subjects of a work and its least floating-point operations for an iteration of a trial."""
    where = scene(work.attack, work.model, work.trials, work.side, device)
    made = [
        Subject(name, work.trials if name == LEAKBENCH else 1, work.short, work.long, runner(name, work, where))
        for name in names
    ]
    # one trial of one iteration is soon over; the others are given as long as leakbench's many
    return [longer(subject, work) for subject in made], flops(work, where)


def longer(subject: Subject, work: Work) -> Subject:
    """Return a one-at-a-time subject with up to four times as many iterations, where leakbench has many trials."""
    factor = 1 if subject.name == LEAKBENCH else min(4, work.trials)
    return Subject(subject.name, subject.trials, subject.short * factor, subject.long * factor, subject.run)


def rows(work: Work, rounds: int, device: str) -> dict[str, Any]:
    """Measure a row of the table."""
    reasons = {name: missing(name, work.attack) for name in (LEAKBENCH, REFERENCE, BREACHING)}
    result = {**about(work), "missing": {name: reason for name, reason in reasons.items() if reason}}
    if reasons[LEAKBENCH]:
        say(f"{work.title}: left out: {reasons[LEAKBENCH]}")
        return {**result, "flops": None, "rates": [], "subjects": {}}
    say(f"{work.title}, {work.trials} trials")
    made, least = subjects(work, device, [name for name, reason in reasons.items() if not reason])
    times, rates = measure.interleave(made, rounds, torch.device(device))
    return {**result, "flops": least, "rates": rates, "subjects": times}


def endings(what: Ending, device: str) -> dict[str, Any]:
    """Measure DLG to its end: seconds, evaluations, successes and divergences of each subject in each round."""
    where = scene("dlg", "lenet", what.trials, 32, device)
    observation = replace(where.observation, slots=what.slots)
    names = [LEAKBENCH, REFERENCE, BREACHING]
    reasons = {name: reason for name in names if (reason := missing(name, "dlg"))}
    names = [name for name in names if name not in reasons]
    say(f"DLG, LeNet, {what.trials} trials to the end")

    def batched() -> list[tuple[bool, bool, int]]:
        found = leakbench.attack(f"dlg(steps={what.steps})", observation, seed=where.seed)
        assert found.failed is not None
        assert found.evaluations is not None
        return [
            (where.success(found.images[t : t + 1], t, what.success), bool(found.failed[t]), int(found.evaluations[t]))
            for t in range(what.trials)
        ]

    def alone(name: str, trials: Sequence[int]) -> list[tuple[bool, bool, int]]:
        done = []
        method = reference.dlg if name == REFERENCE else peer.dlg
        for t in trials:
            with seeded("speed", "dlg", t):
                found = method(where.network, where.observed(t), *where.start(t), steps=what.steps)
            done.append((where.success(found.image, t, what.success), found.diverged, found.evaluations))
        return done

    rounds: list[dict[str, Any]] = []
    for turn in range(what.rounds):
        rounds.append({})
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            results: list[tuple[bool, bool, int]] = []
            share = range(turn, what.trials, what.rounds)
            seconds = measure.clock(
                lambda: results.extend(batched() if name == LEAKBENCH else alone(name, share)),  # noqa: B023
                where.device,
            )
            rounds[-1][name] = {
                "seconds": seconds,
                "trials": len(results),
                "successes": sum(success for success, _, _ in results),
                "diverged": sum(diverged for _, diverged, _ in results),
                "evaluations": sum(evaluations for _, _, evaluations in results),
            }
    return {
        "title": "DLG, LeNet",
        "trials": what.trials,
        "steps": what.steps,
        "success_db": what.success,
        "slots": what.slots,
        "target": list(what.target),
        "missing": reasons,
        "rounds": rounds,
    }


def curve(growth: Growth, rounds: int, device: str) -> dict[str, Any]:
    """Measure a growth curve; the one-at-a-time subjects do not depend on T, and are measured once along it."""
    say(f"growth with {growth.axis}, {growth.model}")
    everyone: list[Subject] = []
    least = {}
    for index, work in enumerate(growth.works()):
        point = growth.points[index][0]
        names = [LEAKBENCH]
        if growth.axis == "side" or index == 0:
            names += [name for name in (REFERENCE, BREACHING) if not missing(name, work.attack)]
        made, least[point] = subjects(work, device, names)
        everyone += [Subject(f"{s.name} {point}", s.trials, s.short, s.long, s.run) for s in made]
    times, rates = measure.interleave(everyone, rounds, torch.device(device))
    points = [
        {
            "value": value,
            "flops": least[value],
            "subjects": {
                name: times[f"{name} {value}"]
                for name in (LEAKBENCH, REFERENCE, BREACHING)
                if f"{name} {value}" in times
            },
        }
        for value in least
    ]
    gc.collect()
    return {"axis": growth.axis, "model": growth.model, "trials": growth.trials, "rates": rates, "points": points}


def exact(case: Exact, device: str) -> dict[str, Any]:
    """Measure a closed form on one image, and breaching's search on it for as many seconds."""
    say(f"{case.title}, one image")
    where, found = scene("ig", case.model, 1, 32, device), list[Any]()
    seconds = measure.clock(
        lambda: found.append(leakbench.attack(case.attack, where.observation, seed=where.seed)), where.device
    )
    quality = psnr(found[0].images, where.images)
    result = {"title": case.title, "seconds": seconds, "psnr": quality if quality < float("inf") else None}
    if reason := peer.available():
        return {**result, "missing": reason}
    (start, _), search = where.start(0), list[Any]()

    def run(steps: int) -> float:
        search[:] = []
        own = (where.network, where.observed(0), where.labels[:1], start)
        return measure.clock(lambda: search.append(peer.ig(*own, steps=steps)), where.device)

    run(2)
    short, long = run(2), run(12)
    one = max(long - short, 1e-6) / 10
    steps = max(1, int((seconds - (short - 2 * one)) / one))
    spent = run(steps)
    return {**result, "steps": steps, "peer_seconds": spent, "peer_psnr": psnr(search[0].image, where.images)}


def peak(work: Work, device: str) -> dict[str, Any]:
    """Measure the peak memory of a work in a process of its own; what does not fit is a row with the reason."""
    say(f"memory of {work.title}, {work.trials} trials, {work.side} x {work.side}")
    result = {**about(work), "bytes": None, "device_bytes": None, "error": None}
    try:
        taken = memory.of(work.attack, work.model, work.trials, work.side, work.long, device)
    except RuntimeError as error:
        return {**result, "error": str(error)}
    return {**result, "bytes": taken["process"], "device_bytes": taken["device"]}


def estimate(data: dict[str, Any], full: Plan) -> float:
    """Return about how many minutes a full run takes on a machine as busy as when these data were measured."""
    one = {
        (row["attack"], row["model"], name): measure.median(measure.per_iteration(times)) or 0.0
        for row in data["works"]
        for name, times in row["subjects"].items()
    }

    def seconds(work: Work, name: str) -> float:
        each = one.get((work.attack, work.model, name), 0.0) * (work.side / 32) ** (2 if name == LEAKBENCH else 1)
        count = work.trials if name == LEAKBENCH else min(4, work.trials)
        return each * count * (work.short + work.long)

    names = (LEAKBENCH, REFERENCE, BREACHING)
    total = sum(full.rounds * seconds(work, name) for work in full.works for name in names)
    for growth in full.growth:
        total += sum(full.growth_rounds * seconds(work, name) for work in growth.works() for name in names)
    if full.ending is not None and data["ending"] is not None:
        for name in names:
            done = [turn[name] for turn in data["ending"]["rounds"] if name in turn]
            evaluations = sum(turn["evaluations"] for turn in done)
            if evaluations:
                each = sum(turn["seconds"] for turn in done) / evaluations
                passes = full.ending.rounds if name == LEAKBENCH else 1
                total += passes * full.ending.trials * full.ending.steps * EVALUATIONS * each
    return (total + 8 * len(full.memory)) / 60


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        os.chdir(machine.ROOT)
        main()
