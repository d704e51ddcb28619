"""``leakbench``: the commands, and the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from leakbench.cli import assets, listing, report, run
from leakbench.errors import LeakbenchError
from leakbench.version import __version__

app = typer.Typer(
    help="Measure what shared gradients leak in federated learning: attacks crossed with defenses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(run.app, name="run")
app.add_typer(assets.app, name="assets")
app.add_typer(listing.app, name="list")
app.command("report")(report.report)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"leakbench {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure what shared gradients leak in federated learning."""


def main() -> None:
    """Run the command line; exit with 0, 2 on bad input (one line on stderr), or 130 after Ctrl-C."""
    try:
        app(prog_name="leakbench")
    except LeakbenchError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'the file system'}: {error.strerror}; make room or choose another folder")


def _fail(message: str) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(2)
