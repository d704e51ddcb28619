"""``reports/scale/README.md`` from the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MILLION = 10**6
CHUNK = 8
"""Trials at a time where workers are compared."""


def write(out: Path) -> Path:
    """Write the page from ``figures.json``, and from ``torture.json`` and ``fuzz.json`` where there are any."""
    found = {name: _read(out / f"{name}.json") for name in ("figures", "torture", "fuzz")}
    page = out / "README.md"
    page.write_text(text(found["figures"], found["torture"], found["fuzz"]), encoding="utf-8")
    return page


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def text(figures: dict[str, Any], torture: dict[str, Any], fuzz: dict[str, Any]) -> str:
    """Return the page; without figures of the kills or of the fuzzing it does not speak of them."""
    trivial, report, start = figures["trivial"], figures["report"], figures["help"]
    count = int(trivial["trials"])
    overhead = 1000 * trivial["seconds"] / count
    beyond = (trivial["peak"] - trivial["before"]) / 2**20
    size = trivial["bytes"] / count
    rate = max(_rate(int(number), own) for number, own in figures["workers"].items())
    rows = [
        ("planning, scheduling and storing a trial", f"{overhead:.2f} ms", "under 1 ms"),
        ("memory of the driver beyond what importing torch takes", f"{beyond:.0f} MiB", "under 500 MB"),
        ("memory that importing torch and leakbench takes", f"{trivial['before'] / 2**20:.0f} MiB", ""),
        ("memory of the driver in all, at its peak", f"{trivial['peak'] / 2**20:.0f} MiB", ""),
        ("run file", f"{trivial['bytes'] / 2**20:.0f} MiB, {size / 1024:.1f} KiB a trial", ""),
        ("`leakbench report`", f"{report['seconds']:.0f} s", "under 60 s"),
        ("its memory, torch included", f"{report['peak'] / 2**20:.0f} MiB", ""),
        ("`leakbench check`", f"{figures['check']['seconds']:.0f} s", ""),
        ("`leakbench --help`", f"{start['median']:.2f} s, at best {start['least']:.2f} s", "under 0.5 s"),
    ]
    workers = [
        (number, f"{own['rate']:.2f}", f"{own['seconds']:.0f} s", f"{own['whole']:.0f} s")
        for number, own in figures["workers"].items()
    ]
    parts = [
        "# Scale",
        f"`{figures['command']}` wrote this page, on {figures['cpus']} cores, with a load of {figures['load']:.1f} "
        "before it began. [figures.json](figures.json) has the figures.",
        f"## {count:,} trials that take no time",
        f"50 cells, 20 images of 32 x 32 pixels and {count // 1000} seeds. Every trial is planned, scheduled and "
        "stored with its scores and two pictures, of noise, which compresses worst. What is left is what leakbench "
        "itself costs in the driver: the attacks, the encoding of pictures as PNG and the pipes to worker processes "
        "are not in it.",
        "The goal for the memory is read as one for what a run takes beyond what importing torch does. The whole peak "
        f"is {trivial['peak'] / 1e6:.0f} MB, of which torch and leakbench take {trivial['before'] / 1e6:.0f} MB as "
        "soon as they are imported: taken of the whole process, the goal is "
        f"{'met' if trivial['peak'] < 500e6 else 'not met'}.",
        _table(("", "measured", "goal"), rows),
        "## Trials a second",
        "`ig(steps=100)` against four defenses on LeNet, eight trials at a time and one thread a worker, from when "
        "as many chunks were stored as there are workers to the last; and the whole run, with the start of its "
        "processes.",
        _table(("workers", "trials a second", "without the start", "whole run"), workers),
        *_older(figures["workers"]),
        f"## What a run of {MILLION:,} trials needs, on paper",
        f"- **Disk**: {size * MILLION / 1e9:.1f} GB, nearly all of it pictures. One of 224 x 224 pixels takes about "
        "100 KiB, so that such trials need 100 GB.",
        f"- **Driver**: {MILLION * overhead / 3.6e6:.1f} h of one core over the whole run. It keeps up with "
        f"{1000 / overhead:,.0f} trials a second, and takes {beyond * MILLION / count:,.0f} MiB beyond torch.",
        f"- **Work**: {MILLION / rate / 86400:.1f} days of this machine at the rate above, hence `--executor ray`, or "
        f"`--shard i/16` and `leakbench merge`: then {MILLION // 16:,} trials and "
        f"{size * MILLION / 16e9:.1f} GB a machine.",
        f"- **Report**: {report['seconds'] * MILLION / count / 60:.0f} min and "
        f"{report['peak'] * MILLION / count / 2**30:.0f} GiB of memory at most, were both in proportion to the trials. "
        "Pictures are drawn of the first seeds alone, whatever their number.",
        *_torture(torture),
        *_fuzz(fuzz),
    ]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("paper\n- ", "paper\n\n- ") + "\n"


def _rate(workers: int, figures: dict[str, Any]) -> float:
    """Return the trials a second; of an older count, which began with the first chunk of all, less what is too much."""
    if "left_out" in figures:
        return figures["rate"]
    return (figures["trials"] - CHUNK * (workers - 1)) / figures["seconds"]


def _older(figures: dict[str, Any]) -> list[str]:
    """Return what must be said of figures that were measured with the older count, until they are measured again."""
    if all("left_out" in own for own in figures.values()):
        return []
    rates = {int(number): _rate(int(number), own) for number, own in figures.items()}
    one, most = min(rates), max(rates)
    return [
        "**These rates were measured with an older count**, from the first chunk of any worker on. It counts the first "
        f"chunk of every other worker, which was done before the clock began, and so is too high for {most} workers: "
        f"the ratio of the table is {figures[str(most)]['rate'] / figures[str(one)]['rate']:.2f}. Without these chunks "
        f"it is {rates[most] / rates[one]:.2f} ({rates[most]:.2f} trials a second), and of whole runs, with the start "
        f"of their processes, {figures[str(one)]['whole'] / figures[str(most)]['whole']:.2f}. The code leaves "
        "them out now; the rates are to be measured again."
    ]


def _torture(figures: dict[str, Any]) -> list[str]:
    """Return what ``make torture`` found."""
    if not figures:
        return []
    return [
        "## Kills",
        "`make torture` kills drivers and workers (`kill -9`) at random moments, and starts the run again until it is "
        "done. Every write of a result leaves a row in a ledger, by the same transaction: a trial is lost where a "
        "result that stood is gone, and duplicated where it was written again.",
        "{kills} kills ({drivers} of drivers, {workers} of workers) over {runs} runs of {trials} trials, in {seconds} "
        "s: **lost = {lost}, duplicated = {duplicated}**; the tables are those of an undisturbed run.".format(
            **figures
        ),
    ]


def _fuzz(figures: dict[str, Any]) -> list[str]:
    """Return what ``make fuzz`` found."""
    if not figures:
        return []
    rows = [
        (f"`{name}`", f"{own['inputs']:,}", f"{own['seconds']:,} s", str(own["found"])) for name, own in figures.items()
    ]
    total = [sum(own[what] for own in figures.values()) for what in ("inputs", "seconds", "found")]
    rows.append(("**in all**", f"**{total[0]:,}**", f"{total[1]:,} s", str(total[2])))
    return [
        "## Hostile inputs",
        "`make fuzz` feeds what reads specs, TOML, archives, weights, JSON and run files with inputs that libFuzzer "
        "makes; nothing but the documented error of one line may come out, and a finding is an input that made "
        "something else come out. The inputs ran on successive commits, not all on one. A finding of the table is "
        "repaired, and a test in `tests/test_hostile.py` or beside the reader. Rounds of `targets`, `study`, "
        "`compare-values` and `merge-bytes` that ended at a finding are not in the table: they were run anew, as "
        "counted here, once what they showed had been put right.",
        _table(("target", "inputs", "time, of a busy machine", "findings"), rows),
    ]


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, tuple(":--" if not place else "--:" for place, _ in enumerate(headers)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
