"""``leakbench run``: run a matrix and report on it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from leakbench.engine import Run
    from leakbench.matrix import Matrix

app = typer.Typer(help="Run trials.", no_args_is_help=True)


@app.command("matrix")
def matrix(
    file: Annotated[Path | None, typer.Argument(metavar="[MATRIX.toml]", help="A matrix; options override it.")] = None,
    suite: Annotated[str | None, typer.Option(help="A matrix that ships with leakbench (default: quick).")] = None,
    scale: Annotated[
        str | None, typer.Option(help="Which of the matrix's scales, such as smoke, cpu or full; see benchmarks.")
    ] = None,
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
    from leakbench import matrix as matrices
    from leakbench.errors import BadOption
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
    override = {**given, **{key: value for key, value in settings.items() if value is not None}}
    plans = [matrices.Matrix(**{**row, **override}) for row in matrices.expand(axes, scale)]
    finished = _run(plans, out, device, chunk, strict)
    finished.report()
    console = _console()
    for table in finished.tables():
        console.print(table)
    console.print(f"report: {finished.out / 'report.md'}", markup=False, highlight=False, soft_wrap=True)


@app.command("sharing")
def sharing(
    scale: Annotated[
        str, typer.Option(help="smoke (minutes), cpu (two cores, under two hours) or full (a GPU).")
    ] = "smoke",
    attack: Annotated[
        list[str] | None, typer.Option(help="An attack; repeatable (default: those of the scale).")
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="A model; repeatable.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="A dataset; repeatable.")] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="The first N images, or indices such as 0,3,5; repeatable.")
    ] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="N seeds from 0 on, or a list such as 3,4.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/sharing-SCALE).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    chunk: Annotated[int | None, typer.Option(min=1, help="Trials at a time; halved where they do not fit.")] = None,
    plugin: Annotated[
        list[Path] | None, typer.Option(help="A Python file that registers components; it is run. Repeatable.")
    ] = None,
) -> None:
    """Study what sharing key-lock's key, lock or both is worth to an attacker; write OUT/sharing.md beside the report.

    Every attack meets key-lock under six grants: nothing (T0), nothing but the lock's weights, as FedKL's released
    code runs (T1), the key (T3), the lock with its gradients (T4), the same to an attacker that works the key out of
    them, and both (T5). No defense and norm-only (key-lock's normalisation without its secret) are the controls.
    OUT/sharing.md has a grid of pictures for each attack, the scores of every grant with 95 % intervals, and paired
    tests between grants on the same images. A run that was stopped goes on where it was.
    """
    from leakbench import matrix as matrices
    from leakbench import report
    from leakbench.registry import load_plugin

    for path in plugin or []:
        load_plugin(path)
    given = matrices.axes_from_options(
        {
            "attacks": attack or [],
            "models": model or [],
            "datasets": dataset or [],
            "images": images or [],
            "seeds": seeds or [],
        }
    )
    rows = matrices.expand(matrices.load_suite("sharing"), scale)
    plans = [matrices.Matrix(**{**row, **given, "name": f"sharing-{scale}"}) for row in rows]
    finished = _run(plans, out, device, chunk, strict=False)
    finished.report()
    for path in report.write_sharing(finished.out):
        if path.suffix == ".md":
            typer.echo(f"report: {path}")


def _run(plans: Sequence[Matrix], out: Path | None, device: str, chunk: int | None, strict: bool) -> Run:
    """Run matrices into one folder; after Ctrl-C say how much is done and how to go on."""
    from leakbench import engine
    from leakbench.progress import Display

    command = "leakbench " + shlex.join(sys.argv[1:])
    folder = out or Path("runs") / plans[0].name
    try:
        for plan in plans:
            with Display(_console()) as display:
                finished = engine.run(
                    plan, folder, device=device, chunk=chunk, strict=strict, progress=display, command=command
                )
    except KeyboardInterrupt:
        done, planned = sum(engine.finished(folder, plan) for plan in plans), sum(len(p.trials()) for p in plans)
        typer.echo(f"stopped: {done} of {planned} trials are done; to go on: {command}", err=True)
        raise typer.Exit(130) from None
    return finished


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)
