"""What commands share: options, commands whose options are the fields of a dataclass, the console and Ctrl-C."""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

Options = TypeVar("Options")

SEEDS = "Seeds 0..N-1 for a number N, or a list such as 3,4 (`3,` selects the single seed 3)."
OUT = "The run's folder (default: runs/NAME); an existing run is resumed."
DEVICE = "auto, cpu, cuda or cuda:N."
SALT = (
    "32 hex digits from which all draws are derived; with the same ones a run draws the same (default: that of the "
    "existing run, or random)."
)
PLUGIN = "A Python file that registers components; it is executed. Repeatable."
"""The help of options that several commands have."""


def option(
    help: str,
    *flags: str,
    default: object = None,
    metavar: str | None = None,
    min: float | None = None,
    max: float | None = None,
    argument: bool = False,
) -> Any:
    """Return a field of a dataclass of options that becomes an option; its flag is the field's name by default.

    Args:
        help: what the option is, for ``--help``.
        flags: such as ``--strict``, for a flag that cannot be negated.
        default: the value if the option is not given; ``dataclasses.MISSING`` for an option that must be given.
        metavar: what stands for its value in ``--help``.
        min: the least value of a number; likewise ``max``.
        argument: it becomes an argument, which has no flag.
    """
    kind: Any = typer.Argument if argument else typer.Option
    return field(default=default, metadata={"typer": kind(*flags, help=help, metavar=metavar, min=min, max=max)})


def command(
    app: typer.Typer, name: str, options: type[Options], without: Collection[str] = (), required: str = ""
) -> Callable[[Callable[[Options], None]], Callable[[Options], None]]:
    """Register a function of one frozen dataclass as a command that has an option for each field of the dataclass.

    Args:
        app: the group of the command.
        name: the command's name.
        options: the dataclass; its fields are made by ``option`` or annotated for Typer.
        without: fields that the command has no option for; they keep their defaults.
        required: a field that must be given.
    """

    def register(does: Callable[[Options], None]) -> Callable[[Options], None]:
        def called(**given: Any) -> None:
            does(options(**given))

        infos = {one.name: one.metadata.get("typer") for one in fields(options)}  # type: ignore[arg-type]
        kept = [
            one.replace(
                kind=one.KEYWORD_ONLY,
                default=one.empty if one.name == required else one.default,
                annotation=Annotated[one.annotation, infos[one.name]] if infos[one.name] else one.annotation,
            )
            for one in inspect.signature(options, eval_str=True).parameters.values()
            if one.name not in without
        ]
        called.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]  # Typer takes the options from it
        called.__doc__ = does.__doc__
        app.command(name)(called)
        return does

    return register


def stated(plugins: Sequence[Path] | None, axes: Mapping[str, Sequence[str] | None]) -> dict[str, Any]:
    """Load plugins, and return the axes that were given on the command line, parsed; ``axes`` are by their names."""
    from leakbench.core.registry import load_plugin
    from leakbench.plan.matrix import axes_from_options

    for path in plugins or []:
        load_plugin(path)
    return axes_from_options({axis: values or [] for axis, values in axes.items()})


@contextmanager
def stoppable(done: Callable[[], str]) -> Iterator[str]:
    """Yield the command line, for the provenance; after Ctrl-C report what is done and how to resume, and exit."""
    line = "leakbench " + shlex.join(sys.argv[1:])
    try:
        yield line
    except KeyboardInterrupt:
        typer.echo(f"stopped: {done()}; to resume: {line}", err=True)
        raise SystemExit(130) from None


def console(stderr: bool = False) -> Console:
    """Return a console for stdout or stderr, 120 columns wide if it is not a terminal."""
    from rich.console import Console

    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=120)
