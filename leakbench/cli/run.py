"""``leakbench run``: run a matrix and report on it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Run trials.", no_args_is_help=True)


@app.command("matrix")
def matrix(
    file: Annotated[Path | None, typer.Argument(metavar="[MATRIX.toml]", help="A matrix; options override it.")] = None,
    suite: Annotated[str | None, typer.Option(help="A matrix that ships with leakbench (default: quick).")] = None,
    attack: Annotated[list[str] | None, typer.Option(help='An attack, such as "ig(steps=1000)"; repeatable.')] = None,
    defense: Annotated[list[str] | None, typer.Option(help="A defense; repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="A dataset; repeatable.")] = None,
    threat: Annotated[
        list[str] | None,
        typer.Option(help='A threat model: a preset, or "labels=known, reveals=key+lock, informed=true"; repeatable.'),
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="The first N images, or indices such as 0,3,5; repeatable.")
    ] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="N seeds from 0 on, or a list such as 3,4.")] = None,
    floors: Annotated[
        bool | None, typer.Option("--floors/--no-floors", help="Add the floors random, grey and mean (default: yes).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/NAME); an old run goes on.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    chunk: Annotated[int | None, typer.Option(min=1, help="Trials at a time; halved where they do not fit.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse cells that cannot be served; stop at a component's first error.")
    ] = False,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="A Python file that registers components; it is run. Repeatable.")
    ] = None,
) -> None:
    """Cross attacks with defenses, models, datasets and threat models; write OUT/run.sqlite and the report.

    With neither a file nor an axis, the suite ``quick`` runs. Started again, a run does only what is missing.
    """
    from rich.console import Console

    from leakbench import engine
    from leakbench import matrix as matrices
    from leakbench.errors import BadOption
    from leakbench.progress import Display
    from leakbench.registry import load_plugin

    for path in plugin or []:
        load_plugin(path)
    given = matrices.axes_from_options(
        {
            "attacks": attack or [],
            "defenses": defense or [],
            "models": model or [],
            "datasets": dataset or [],
            "threats": threat or [],
            "images": images or [],
            "seeds": seeds or [],
        }
    )
    if file is not None and suite is not None:
        raise BadOption(f"both the file {str(file)!r} and the suite {suite!r} were given; give one")
    if file is not None:
        axes = matrices.load(file)
    elif suite is not None or not given:
        axes = matrices.load_suite(suite or "quick")
    else:
        axes = {}
    settings = {"name": name, "floors": floors}
    axes = {**axes, **given, **{key: value for key, value in settings.items() if value is not None}}
    plan = matrices.Matrix(**axes)
    command = "leakbench " + shlex.join(sys.argv[1:])
    folder = out or Path("runs") / plan.name
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    try:
        with Display(console) as display:
            finished = engine.run(
                plan, folder, device=device, chunk=chunk, strict=strict, progress=display, command=command
            )
    except KeyboardInterrupt:
        done = engine.finished(folder, plan)
        typer.echo(f"stopped: {done} of {len(plan.trials())} trials are done; to go on: {command}", err=True)
        raise typer.Exit(130) from None
    finished.report()
    for table in finished.tables():
        console.print(table)
    console.print(f"report: {folder / 'report.md'}", markup=False, highlight=False, soft_wrap=True)
