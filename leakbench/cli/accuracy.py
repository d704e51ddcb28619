"""``leakbench run accuracy``: train networks behind defenses, and report what the defenses cost."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from leakbench.training.settings import Arm

File = Annotated[Path | None, typer.Argument(metavar="[FILE.toml]", help="What to train; options override it.")]
Scale = Annotated[str | None, typer.Option(help="Which of the file's scales, such as smoke, cpu or full.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder (default: runs/NAME); an old run goes on.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="A Python file that registers components; it is run. Repeatable."),
]


def accuracy(
    file: File = None,
    scale: Scale = None,
    defense: Annotated[list[str] | None, typer.Option("--defense", help="A defense; repeatable.")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="A model; repeatable.")] = None,
    dataset: Annotated[list[str] | None, typer.Option("--dataset", help="A dataset; repeatable.")] = None,
    seeds: Annotated[list[str] | None, typer.Option(help="N seeds from 0 on, or a list such as 3,4.")] = None,
    mode: Annotated[str | None, typer.Option(help="centralised, or fedavg (needs the extra fl).")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of fedavg, or epochs.")] = None,
    clients: Annotated[int | None, typer.Option(help="Clients of fedavg.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Of the clients, in each round.")] = None,
    local_epochs: Annotated[int | None, typer.Option(help="Epochs of a client in a round.")] = None,
    split: Annotated[str | None, typer.Option(help="iid, or shards (by label).")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="The learning rate of SGD.")] = None,
    images: Annotated[int | None, typer.Option(help="So many training images (default: all).")] = None,
    select: Annotated[
        str | None, typer.Option(help="The best round by validation, by test (as the paper does), or the last.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    out: Out = None,
    device: Device = "auto",
    plugin: Plugins = None,
) -> None:
    """Train models behind defenses, centralised or federated; write OUT/accuracy.md with curves, and checkpoints.

    The defense acts on the gradient of every batch (centralised) or on what each client sends (fedavg); its secrets
    stay with their client. The test accuracy is that of the round that is best on held-out training images. What the
    global model is worth without its secrets stands below. A training that was stopped goes on after its last round.
    Further options (momentum, milestones, augment, shards, ...) are keys of the file; see benchmarks/table3.toml.
    """
    given = {
        "mode": mode,
        "rounds": rounds,
        "clients": clients,
        "fraction": fraction,
        "local_epochs": local_epochs,
        "split": split,
        "batch": batch,
        "lr": lr,
        "images": images,
        "select": select,
        "name": name,
    }
    lists = {"defenses": defense, "models": model, "datasets": dataset, "seeds": seeds}
    arms, folder = plan(file, scale, given, lists, out, plugin)
    train(arms, folder, device)
    from leakbench.report import accuracy as report

    for path in report.write(folder):
        if path.suffix == ".md":
            typer.echo(f"report: {path}")


def plan(
    file: Path | None,
    scale: str | None,
    given: dict[str, Any],
    lists: dict[str, list[str] | None],
    out: Path | None,
    plugin: Sequence[Path] | None,
) -> tuple[list[Arm], Path]:
    """Return the arms of a file and options, and the run's folder."""
    from leakbench import matrix
    from leakbench.registry import load_plugin
    from leakbench.training.settings import Accuracy

    for path in plugin or []:
        load_plugin(path)
    axes = {} if file is None else matrix.load(file)
    override = {key: value for key, value in given.items() if value is not None}
    override |= matrix.axes_from_options({key: value or [] for key, value in lists.items()})
    plans = [Accuracy(**{**row, **override}) for row in matrix.expand(axes, scale)]
    arms = {arm.id: arm for one in plans for arm in one.arms()}
    return list(arms.values()), out or Path("runs") / plans[0].name


def train(arms: Sequence[Arm], folder: Path, device: str) -> None:
    """Train arms into a folder; after Ctrl-C say how much is done and how to go on."""
    from rich.console import Console

    from leakbench import training
    from leakbench.training.progress import Rounds

    command = "leakbench " + shlex.join(sys.argv[1:])
    console = Console()
    try:
        with Rounds(console if console.is_terminal else Console(width=120)) as progress:
            training.train(arms, folder, device=device, command=command, progress=progress)
    except KeyboardInterrupt:
        done = training.finished(arms, folder)
        typer.echo(f"stopped: {done} of {len(arms)} trainings are done; to go on: {command}", err=True)
        raise typer.Exit(130) from None
