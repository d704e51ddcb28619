"""``reports/scale/README.md`` from the figures."""

from __future__ import annotations

from typing import Any

MILLION = 10**6


def text(figures: dict[str, Any]) -> str:
    """Return the page."""
    trivial, report, start = figures["trivial"], figures["report"], figures["help"]
    count = int(trivial["trials"])
    overhead = 1000 * trivial["seconds"] / count
    beyond = (trivial["peak"] - trivial["before"]) / 2**20
    size = trivial["bytes"] / count
    rate = max(own["rate"] for own in figures["workers"].values())
    rows = [
        ("planning, scheduling and storing a trial", f"{overhead:.2f} ms", "under 1 ms"),
        ("memory of the driver beyond what importing torch takes", f"{beyond:.0f} MiB", "under 500 MB"),
        ("memory that importing torch and leakbench takes", f"{trivial['before'] / 2**20:.0f} MiB", ""),
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
        "itself costs.",
        _table(("", "measured", "goal"), rows),
        "## Trials a second",
        "`ig(steps=100)` against four defenses on LeNet, eight trials at a time and one thread a worker, from the "
        "first chunk that was stored to the last; and the whole run, with the start of its processes.",
        _table(("workers", "trials a second", "without the start", "whole run"), workers),
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
    ]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ").replace("paper\n- ", "paper\n\n- ") + "\n"


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, tuple(":--" if not place else "--:" for place, _ in enumerate(headers)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
