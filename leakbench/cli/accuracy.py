"""``leakbench run accuracy``: train networks behind defenses, and report what the defenses cost."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from leakbench.cli.run import Datasets, Defenses, Device, Models, Plugins, _console

if TYPE_CHECKING:
    from rich.console import Console

    from leakbench.training import Record
    from leakbench.training.settings import Accuracy, Arm

Plan = TypeVar("Plan", bound="Accuracy")

File = Annotated[Path | None, typer.Argument(metavar="[FILE.toml]", help="What to train; options override it.")]
Scale = Annotated[str | None, typer.Option(help="Which of the file's scales, such as smoke, cpu or full.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder (default: runs/NAME); an old run goes on.")]
Workers = Annotated[
    int, typer.Option(min=0, help="Ray processes that share the clients of fedavg; 0: one after another, without Ray.")
]


def accuracy(
    file: File = None,
    scale: Scale = None,
    defense: Defenses = None,
    model: Models = None,
    dataset: Datasets = None,
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
    workers: Workers = 0,
    plugin: Plugins = None,
) -> None:
    """Train models behind defenses, centralised or federated; write OUT/accuracy.md with curves, and checkpoints.

    The defense acts on the gradient of every batch (centralised) or on what each client sends (fedavg); its secrets
    stay with their client. The test accuracy is that of the round that is best on held-out training images. What the
    global model is worth without its secrets stands below. A training that was stopped goes on after its last round.
    Further options (momentum, milestones, augment, shards, ...) are keys of the file; see benchmarks/table3.toml.
    The exit code is 1 where every training failed.
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
    from leakbench.training.settings import Accuracy

    plans, folder = plan(Accuracy, file, scale, given, lists, out, plugin)
    arms = list({arm.id: arm for one in plans for arm in one.arms()}.values())
    with _stoppable(arms, folder) as (command, console):
        from leakbench import training
        from leakbench.training.progress import Rounds

        with Rounds(console) as told:
            found = training.train(arms, folder, device=device, workers=workers, command=command, progress=told)
    from leakbench.report import accuracy as report

    _told(report.write(folder))
    _exit(found)


def tradeoff(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.toml", help="What to train, and [attack]; options override it.")
    ],
    scale: Scale = None,
    defense: Defenses = None,
    model: Models = None,
    dataset: Datasets = None,
    seeds: Annotated[list[str] | None, typer.Option(help="N seeds from 0 on, or a list such as 3,4.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of fedavg, or epochs.")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    out: Out = None,
    device: Device = "auto",
    workers: Workers = 0,
    plugin: Plugins = None,
) -> None:
    """Train behind defenses, attack the checkpoints, and draw utility against leakage; write OUT/tradeoff.md.

    One point is a defense with its options: the accuracy of the network trained behind it, and the share of images
    that the best attacker recovers, beside LPIPS; with intervals, and the Pareto front marked. The file is that of
    `run accuracy` with `stages`, the checkpoints to attack, and a table [attack] with the axes of a matrix. Started
    again, it does only what is missing. The exit code is 1 where every training failed.
    """
    from leakbench.training.settings import Tradeoff

    lists = {"defenses": defense, "models": model, "datasets": dataset, "seeds": seeds}
    plans, folder = plan(Tradeoff, file, scale, {"rounds": rounds, "name": name}, lists, out, plugin)
    arms = [arm for one in plans for arm in one.arms()]
    with _stoppable(arms, folder) as (command, console):
        from leakbench.engine.progress import Display
        from leakbench.training import tradeoff as study
        from leakbench.training.progress import Rounds

        with Rounds(console) as told:
            found = study.train(plans, folder, device=device, workers=workers, command=command, progress=told)
        targets = study.attack(plans, folder, device=device, command=command, progress=lambda: Display(console))
    from leakbench import report as reports
    from leakbench.report import accuracy as costs
    from leakbench.report import tradeoff as report

    written = costs.write(folder)
    if targets:  # else nothing was attacked
        reports.write(folder)
        written = report.write(folder)
    _told(written)
    _exit(found)


def _told(written: Sequence[Path]) -> None:
    """Tell where the reports are."""
    for path in written:
        if path.suffix == ".md":
            typer.echo(f"report: {path}")


def _exit(found: Sequence[Record]) -> None:
    """Exit with 1 where no training ended well."""
    if all(one.outcome.status != "ok" for one in found):
        first = found[0].outcome
        count = "the only training" if len(found) == 1 else f"each of the {len(found)} trainings"
        typer.echo(f"{count} failed; the first: {first.status}: {first.reason}", err=True)
        raise typer.Exit(1)


def plan(
    kind: type[Plan],
    file: Path | None,
    scale: str | None,
    given: dict[str, Any],
    lists: dict[str, list[str] | None],
    out: Path | None,
    plugin: Sequence[Path] | None,
) -> tuple[list[Plan], Path]:
    """Return what a file and options state, and the run's folder."""
    from leakbench.core.registry import load_plugin
    from leakbench.plan import matrix

    for path in plugin or []:
        load_plugin(path)
    axes = {} if file is None else matrix.load(file)
    override = {key: value for key, value in given.items() if value is not None}
    override |= matrix.axes_from_options({key: value or [] for key, value in lists.items()})
    rows = matrix.expand(axes, scale)
    plans = [kind(**_fitting({**row, **override}, rows, override)) for row in rows]
    return plans, out or Path("runs") / plans[0].name


def _fitting(stated: dict[str, Any], rows: Sequence[dict[str, Any]], override: dict[str, Any]) -> dict[str, Any]:
    """Return what a row and options state, without what a centralised one shares with rows of fedavg.

    What options state stays, where they leave no row of fedavg: it is refused, as it would change nothing.
    """
    from leakbench.training.settings import FEDERATED

    federated = any(row.get("mode") == "fedavg" for row in rows)
    if stated.get("mode") == "fedavg" or not federated:
        return stated
    kept = override if "mode" in override else {}
    return {name: value for name, value in stated.items() if name not in FEDERATED or name in kept}


@contextmanager
def _stoppable(arms: Sequence[Arm], folder: Path) -> Iterator[tuple[str, Console]]:
    """Yield the command line and a console; after Ctrl-C say how much is done and how to go on."""
    from leakbench import training

    command = "leakbench " + shlex.join(sys.argv[1:])
    try:
        yield command, _console()
    except KeyboardInterrupt:
        done = training.finished(arms, folder)
        typer.echo(f"stopped: {done} of {len(arms)} trainings are done; to go on: {command}", err=True)
        raise SystemExit(130) from None
