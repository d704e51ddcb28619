"""``leakbench check`` and ``leakbench merge``: what a run file holds, and several of them as one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def check(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or its file.")]) -> None:
    """Say whether a run is complete and sound, and what is missing.

    Every trial must be what its id says, and every one that ended must have its pictures and finite scores. The exit
    code is 0 where the run is complete and sound, 1 where trials are missing or ended in an error, 3 where something is
    wrong with the file, and 2 where there is no run file.
    """
    from leakbench.store.integrity import check as examine

    state = examine(run)
    for line in state.lines():
        typer.echo(line)
    raise typer.Exit(state.code)


def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The merged run's folder; one that is there is added to.")],
    force: Annotated[
        bool, typer.Option("--force", help="Merge runs of different matrices or versions all the same.")
    ] = False,
) -> None:
    """Merge runs of one matrix, such as its shards, into one; merging again changes nothing.

    A trial that has a result keeps it, unless it is an error and another run has more. "leakbench report OUT" then
    writes the report of the whole.
    """
    from leakbench.store.merge import merge as unite

    merged = unite(runs, out, force=force)
    typer.echo(f"{merged.added} results added: {merged.finished} of {merged.planned} trials are done in {out}")
