"""``leakbench train``: train what attacks bring along."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train generators.", no_args_is_help=True)


@app.callback()
def train() -> None:
    """Train generators."""


@app.command("generator")
def generator(
    dataset: Annotated[str, typer.Option(help="A dataset with a training split: mnist, cifar10, ...")],
    steps: Annotated[int, typer.Option(help="Updates of the generator.")] = 7000,
    batch: Annotated[int, typer.Option(help="Real images a step.")] = 64,
    seed: Annotated[int, typer.Option(help="What weights and draws come from.")] = 0,
    lr: Annotated[float, typer.Option(help="Adam's step size.")] = 2e-4,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the training images.")] = False,
    latent: Annotated[int, typer.Option(help="The size of the latent.")] = 64,
    width: Annotated[int, typer.Option(help="The channels at 4 x 4 pixels.")] = 192,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 where the processor is fast at it.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="The folder (default: generators/DATASET); it goes on.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train a class-conditional DCGAN on a training split; write weights, a sample grid and a report.

    Started again, it goes on from its last checkpoint, to the same weights.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from leakbench import datasets
    from leakbench.generators.assess import assess
    from leakbench.generators.train import Recipe
    from leakbench.generators.train import train as run

    recipe = Recipe(
        dataset=dataset,
        steps=steps,
        batch=batch,
        seed=seed,
        lr=lr,
        flip=flip,
        latent=latent,
        width=width,
        precision=precision,  # type: ignore[arg-type]  # checked by the recipe
    )
    folder = out or Path("generators") / datasets.parse(dataset).name
    command = "leakbench " + shlex.join(sys.argv[1:])
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=120)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("training", total=steps, losses="")

            def told(step: int, critic: float, decoder: float) -> None:
                losses = f"critic {critic:.2f}, decoder {decoder:.2f}"
                bar.update(task, completed=step, losses=losses)
                if not console.is_terminal and step % 100 == 0:
                    console.print(f"[{step}/{steps}] {losses}", markup=False, highlight=False)

            weights = run(recipe, folder, device=device, command=command, told=told)
    except KeyboardInterrupt:
        typer.echo(f"stopped; to go on: {command}", err=True)
        raise SystemExit(130) from None
    for path in [weights, *assess(recipe, folder, command)]:
        typer.echo(str(path))
