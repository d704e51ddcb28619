"""The leaderboard: the worst case behind each defense of one or more runs, an entry each, and a page of them all."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from leakbench.analysis import pareto as utility
from leakbench.analysis.statistics import ALPHA
from leakbench.core.text import slug
from leakbench.errors import BadOption
from leakbench.leaderboard.entry import SCHEMA_FILE, Entry, entries, schema
from leakbench.leaderboard.protocol import protocols
from leakbench.leaderboard.verify import MIN_SAMPLE, EntryCheck
from leakbench.report.files import replace
from leakbench.report.page import render, sentence
from leakbench.report.scenes import along
from leakbench.store.run_file import FILE, Store


def write(runs: Sequence[Path], out: Path) -> tuple[list[Path], list[str]]:
    """Write ``index.html``, ``entries/*.json`` and their JSON Schema into a folder.

    Returns:
        Their paths, and a line for each defense that has no entry.

    Raises:
        BadOption: no run has an entry: a defense all of whose trials have ended with an answer.
        ForeignRun: a folder holds no readable run.
    """
    found: list[Entry] = []
    missing: list[str] = []
    for run in runs:
        with Store.open(run / FILE, readonly=True) as store:
            own, lacking = entries(store, run.resolve().name, utility.load(run / utility.FILE))
        found += own
        missing += lacking
    if not found:
        raise BadOption(
            f"no run has a defense all of whose trials have ended{''.join(f'; {line}' for line in missing[:1])}; "
            "finish a run, such as --suite worst-case"
        )
    found.sort(key=lambda one: (one.dataset, one.model, one.recovered, one.high))
    written: list[Path] = []
    taken: Counter[str] = Counter()
    scenes: dict[tuple[str, str, str, float], list[tuple[Entry, str]]] = {}
    for one in found:
        name = slug((one.run, one.dataset, one.model, one.defense))
        taken[name] += 1
        file = f"entries/{name}{'' if taken[name] == 1 else f'-{taken[name]}'}.json"
        written.append(replace(out / file, f"{one.model_dump_json(by_alias=True, indent=1)}\n".encode()))
        scenes.setdefault((one.protocol, one.dataset, one.model, one.threshold), []).append((one, file))
    for rows in scenes.values():
        some = any(one.adaptive for one, _ in rows)
        rows.sort(key=lambda row: bool(row[0].inconclusive) or row[0].useless or (some and bool(row[0].unadaptive)))
    written.append(replace(out / SCHEMA_FILE, schema().encode()))
    context = {
        "title": "Leaderboard of defenses",
        "protocols": protocols(),
        "scenes": scenes,
        "missing": missing,
        "schema_file": SCHEMA_FILE,
        "along": along,
    }
    written.append(replace(out / "index.html", render("leaderboard.html.j2", context).encode()))
    return written, missing


def check_lines(found: EntryCheck) -> str:
    """Return the outcome of a verification, line by line."""
    return sentence("entry_check.j2", "lines", found, MIN_SAMPLE, ALPHA)
