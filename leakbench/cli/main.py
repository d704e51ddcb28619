"""``leakbench``: the commands, and the place where an error becomes one line and an exit code."""

import contextlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer

from leakbench.cli import (
    accuracy,
    assets,
    audit,
    compare,
    doctor,
    leaderboard,
    listing,
    paper,
    report,
    run,
    runs,
    train,
)
from leakbench.errors import LeakbenchError, OldPlugin, one_line
from leakbench.version import __version__

# Read when torch is imported, here and in workers: threads that wait for each other leave their cores to others.
# Otherwise they spin, and on a busy machine an operation waits a time slice for the thread that does not run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

app = typer.Typer(
    help="Measure how much shared gradients leak in federated learning: run attacks against defenses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
run.app.add_typer(accuracy.app)  # without a name, its commands are those of `run`
run.app.add_typer(paper.app)
app.add_typer(run.app, name="run")
app.add_typer(train.app, name="train")
app.add_typer(assets.app, name="assets")
app.add_typer(listing.app, name="list")
app.command("report", short_help="Write the report of a run.")(report.report)
app.command("check", short_help="Check that a run is complete and valid.")(runs.check)
app.command("merge", short_help="Merge runs of one matrix into one.")(runs.merge)
app.command("show", short_help="Show one trial of a run.")(compare.show)
app.command("diff", short_help="Compare two runs.")(compare.diff)
app.add_typer(audit.app, name="audit", short_help="Audit your own network, or a recorded update.")
app.command("leaderboard", short_help="Write a leaderboard, or check an entry.")(leaderboard.leaderboard)
app.command("doctor", short_help="Check this installation.")(doctor.doctor)


class _Plain(typer.core.TyperCommand):
    """A command whose help is plain text: before typer 0.21, brackets are escaped although rich does not print them."""

    def get_help(self, ctx: Any) -> str:  # typer exports no type for it
        """Return the help."""
        return super().get_help(ctx).replace("\\[", "[")


def _plain(group: typer.Typer) -> None:
    """Give the commands of a group, and of its groups, plain help."""
    for command in group.registered_commands:
        command.cls = _Plain
    for part in group.registered_groups:
        if part.typer_instance is not None:
            _plain(part.typer_instance)


_plain(app)


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
    """Measure how much shared gradients leak in federated learning."""


USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # the base of typer's usage errors, which it does not export


CRASHED = 70
"""The exit code of a bug (``EX_SOFTWARE`` of sysexits.h); never 1, which is the answer no."""


def main() -> None:
    """Run the command line; exit with 0, 2 on bad input (one line on stderr), 70 on a bug, or 130 after Ctrl-C.

    Exit code 1 is the answer no (``audit --fail-if``, ``diff``, ``check``, ``leaderboard check``).
    """
    try:
        with _noting_interrupts() as stopped, warnings.catch_warnings():
            warnings.simplefilter("always", OldPlugin)
            warnings.showwarning = _warn
            code = app(prog_name="leakbench", standalone_mode=False)
    except USAGE as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if "\n" not in message:
            _fail(f"{message.rstrip('.')}; see leakbench --help")
        typer.echo(message)  # the help of a group that was called without a command
        raise SystemExit(2) from None
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except Exception as error:
        if not stopped:
            _end(error)
        code = 130  # a library that was being loaded turned Ctrl-C into this error
    if code == 130:  # a command that reports more has exited by itself
        sys.stderr.write("stopped; results are kept: start the same command again to resume\n")
    raise SystemExit(code or 0)


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Yield a list that gets an entry with every Ctrl-C, which raises KeyboardInterrupt as usual."""
    seen: list[int] = []

    def note(number: int, frame: object) -> NoReturn:
        seen.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()  # only this thread gets signals
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _warn(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    """Write a warning to stderr: one line about a plugin of an older form, any other as Python does."""
    known = issubclass(category, OldPlugin)
    sys.stderr.write(f"note: {one_line(message)}\n" if known else warnings.formatwarning(message, category, *place[:2]))


def _end(error: Exception) -> NoReturn:
    """Print the error in one line and exit."""
    if isinstance(error, LeakbenchError):
        _fail(str(error))
    if isinstance(error, OSError):
        _fail(f"{error.filename or 'the file system'}: {error.strerror}; make room or choose another folder")
    traceback.print_exception(error)
    reason = one_line(f"{type(error).__name__}: {error}")
    sys.stderr.write(f"error: {reason}; this is a bug of leakbench or of a plugin: report it with these lines\n")
    raise SystemExit(CRASHED) from None


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"error: {one_line(message)}\n")
    raise SystemExit(2)
