"""``leakbench leaderboard``: a page of the worst case behind each defense, and the check of an entry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def leaderboard(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="The folders of runs; or check ENTRY.json RUN."),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder of the page.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="check: how many trials are run again (16), or all where there are fewer.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="check: of the draw of these, to repeat it.")] = None,
    device: Annotated[str | None, typer.Option(help="check: auto, cpu, cuda or cuda:N.")] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", help="check: a Python file that registers components; it is run.")
    ] = None,
) -> None:
    """Write OUT/index.html, the worst case behind each defense of some runs, with one JSON file an entry.

    An entry has the share of images recovered with its interval, the best attacker, the accuracy where the run's
    training study says it, and every trial. OUT/entry.schema.json is the JSON Schema of the entries. Defenses with
    trials that have not ended, or ended in an error, have no entry, and are named.

    leakbench leaderboard check ENTRY.json RUN holds an entry against the run that it is of, runs a sample of its trials
    again, and says whether they hold. It exits with 1 where the entry is not what its run says, where a trial ends
    otherwise than the entry has it, or where the scores of the sample differ beyond chance; else with 0; and with 2
    where that cannot be told. A sample of fewer than seven trials
    cannot show a difference of scores.
    """
    from leakbench.errors import BadOption

    if str(runs[0]) == "check":
        if len(runs) != 3 or out is not None:
            raise BadOption("leaderboard check takes the JSON file of an entry and the folder of its run, and no --out")
        _check(runs[1], runs[2], sample or 16, seed, device or "auto", plugin or [])
        return
    for option, value in (("--sample", sample), ("--seed", seed), ("--device", device), ("--plugin", plugin)):
        if value is not None and value != []:
            raise BadOption(f"{option} is of leaderboard check; leave it out")
    from leakbench.report.leaderboard import write

    if out is None:
        raise BadOption("--out is missing; name the folder of the page")
    written, missing = write(runs, out)
    for line in missing:
        typer.echo(f"left out: {line}", err=True)
    for path in written:
        typer.echo(str(path))


def _check(entry: Path, run: Path, sample: int, seed: int | None, device: str, plugins: list[Path]) -> None:
    """Check an entry; exit with 1 where it does not hold."""
    from leakbench.core.registry import load_plugin
    from leakbench.leaderboard.entry import read
    from leakbench.leaderboard.verify import check, words

    for path in plugins:
        load_plugin(path)
    found = check(read(entry), run, sample=sample, seed=seed, device=device)
    for line in words(found):
        typer.echo(line)
    raise typer.Exit(0 if found.holds else 1)
