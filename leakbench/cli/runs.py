"""``leakbench check`` and ``leakbench merge``: the integrity of a run file, and several runs as one."""

from pathlib import Path
from typing import Annotated

import typer


def check(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or its file.")]) -> None:
    """Check whether a run is complete and valid, and list missing trials and faults.

    Every trial must match its id, and every trial with a result must have its images and finite scores. The exit code
    is 0 if the run is complete and valid, 1 if trials are missing or ended in an error, 3 if the file has faults, and 2
    if there is no run file.
    """
    from leakbench.analysis import integrity
    from leakbench.report.page import sentence

    found = integrity.check(run)
    typer.echo(sentence("run_check.j2", "lines", found, integrity.MAX_LISTED))
    raise typer.Exit(found.code)


def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the merged run, new or existing.")],
    force: Annotated[bool, typer.Option("--force", help="Also merge runs of different matrices or versions.")] = False,
) -> None:
    """Merge runs of one matrix, such as its shards, into one; merging again changes nothing.

    A trial that has a result keeps it, unless it is an error and another run has a result without one. Then
    "leakbench report OUT" writes the report of the merged run.
    """
    from leakbench.store import merge as store

    merged = store.merge(runs, out, force=force)
    typer.echo(f"{merged.added} results added; {merged.finished} of {merged.planned} trials are done in {out}")
