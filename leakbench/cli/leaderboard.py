"""``leakbench leaderboard``: a page with the worst case of each defense, and the verification of an entry."""

from pathlib import Path
from typing import Annotated

import typer


def leaderboard(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="The folders of runs; or: check ENTRY.json RUN."),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder of the page.")] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="check: how many trials are run again (default: 16), at most all."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="check: the seed by which the trials are drawn.")] = None,
    device: Annotated[str | None, typer.Option(help="check: auto, cpu, cuda or cuda:N.")] = None,
    salt: Annotated[
        str | None, typer.Option(metavar="HEX", help="check: the salt of the repeated trials (default: the entry's).")
    ] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option("--plugin", help="check: a Python file that registers components; it is run.")
    ] = None,
) -> None:
    """Write OUT/index.html, the worst case of each defense of some runs, with a JSON file for each entry.

    An entry has the share of images recovered with its interval, the best attacker, the test accuracy if the run has a
    training study, and every trial. OUT/entry.schema.json is the JSON Schema of the entries. Defenses with trials that
    have no result, or ended in an error, get no entry and are listed.

    leakbench leaderboard check ENTRY.json RUN compares an entry with its run, and runs a sample of its trials again.
    The exit code is 1 if the entry differs from its run, if a trial ends with another status, or if the scores of the
    sample differ significantly; 2 if that cannot be decided; and else 0. With a sample of fewer than seven trials, no
    difference of scores can be significant.
    """
    from leakbench.errors import BadOption

    if str(runs[0]) == "check":
        if len(runs) != 3 or out is not None:
            raise BadOption("leaderboard check takes the JSON file of an entry and the folder of its run, and no --out")
        _check(runs[1], runs[2], sample or 16, seed, device or "auto", salt, plugin or [])
        return
    given = {"--sample": sample, "--seed": seed, "--device": device, "--salt": salt, "--plugin": plugin}
    for option, value in given.items():
        if value is not None and value != []:
            raise BadOption(f"{option} is an option of leaderboard check; leave it out")
    from leakbench.report.leaderboard import write

    if out is None:
        raise BadOption("--out is missing; name the folder of the page")
    written, missing = write(runs, out)
    for line in missing:
        typer.echo(f"left out: {line}", err=True)
    for path in written:
        typer.echo(str(path))


def _check(
    entry: Path, run: Path, sample: int, seed: int | None, device: str, salt: str | None, plugins: list[Path]
) -> None:
    """Check an entry; exit with 1 if it does not hold."""
    from leakbench.core.registry import load_plugin
    from leakbench.leaderboard.entry import read
    from leakbench.leaderboard.verify import check
    from leakbench.report.leaderboard import check_lines

    for path in plugins:
        load_plugin(path)
    found = check(read(entry), run, sample=sample, seed=seed, device=device, salt=salt)
    typer.echo(check_lines(found))
    raise typer.Exit(0 if found.holds else 1)
