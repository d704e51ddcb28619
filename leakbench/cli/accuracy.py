"""``leakbench run accuracy`` and ``run tradeoff``: train networks behind defenses, and report what defenses cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from leakbench.cli.options import DEVICE, OUT, PLUGIN, SALT, SEEDS, command, console, option, stated, stoppable

if TYPE_CHECKING:
    from rich.console import Console

    from leakbench.training import TrainingRecord
    from leakbench.training.settings import Accuracy, Arm

app = typer.Typer()
Plan = TypeVar("Plan", bound="Accuracy")


@dataclass(frozen=True)
class TrainOptions:
    """The options of a command that trains; each field's help says what it is."""

    file: Path | None = option(
        "A file that states the training; options override it.", metavar="FILE.toml", argument=True
    )
    scale: str | None = option("One of the scales that the file has, such as smoke, cpu or full.")
    defense: list[str] | None = option("A defense; repeatable.")
    model: list[str] | None = option("A model; repeatable.")
    dataset: list[str] | None = option("A dataset; repeatable.")
    seeds: list[str] | None = option(SEEDS)
    mode: str | None = option("centralised, or fedavg (needs the extra fl).")
    rounds: int | None = option("Rounds of fedavg, or epochs.")
    clients: int | None = option("Clients of fedavg.")
    fraction: float | None = option("The share of the clients in each round.")
    local_epochs: int | None = option("Epochs of a client in a round.")
    split: str | None = option("iid, or shards (by label).")
    batch: int | None = option("Images per step.")
    lr: float | None = option("The learning rate of SGD.")
    images: int | None = option("The number of training images (default: all).")
    select: str | None = option(
        "The round that counts: the best by validation or by test (as the paper does), or last."
    )
    name: str | None = option("The run's name.")
    out: Path | None = option(OUT)
    device: str = option(DEVICE, default="auto")
    workers: int = option(
        "Ray processes that share the clients of fedavg; 0: one after another, without Ray.", min=0, default=0
    )
    salt: str | None = option(SALT, metavar="HEX")
    plugin: list[Path] | None = option(PLUGIN)

    def plans(self, kind: type[Plan]) -> tuple[list[Plan], Path]:
        """Return what a file and options state, and the run's folder."""
        from leakbench.plan import matrix

        lists = {"defenses": self.defense, "models": self.model, "datasets": self.dataset, "seeds": self.seeds}
        values = {name: getattr(self, name) for name in _SETTINGS}
        given = {name: value for name, value in values.items() if value is not None} | stated(self.plugin, lists)
        rows = matrix.expand({} if self.file is None else matrix.load(self.file), self.scale)
        plans = [kind(**_fitting({**row, **given}, rows, given)) for row in rows]
        return plans, self.out or Path("runs") / plans[0].name

    def train(self, arms: Sequence[Arm], folder: Path, line: str, out: Console) -> list[TrainingRecord]:
        """Train what has no result in a folder yet, with the rounds shown on a console; return all results."""
        from leakbench import training
        from leakbench.training.progress import Rounds

        with Rounds(out) as told:
            return training.train(
                arms,
                folder,
                device=self.device,
                workers=self.workers,
                command=line,
                salt=self.salt,
                progress=told,
            )


_NAMES = [one.name for one in fields(TrainOptions)]
_SETTINGS = _NAMES[_NAMES.index("mode") : _NAMES.index("out")]
"""The options that are keys of the file."""


@command(app, "accuracy", TrainOptions)
def accuracy(given: TrainOptions) -> None:
    """Train models behind defenses, centralised or federated; write OUT/accuracy.md with curves, and checkpoints.

    The defense acts on the gradient of every batch (centralised) or on the update of each client (fedavg); secrets stay
    with their client. The test accuracy is that of the best round on held-out training images. The report also has the
    accuracy of the global model without its secrets. An interrupted training is resumed after its last round.
    Further options (momentum, milestones, augment, shards, ...) are keys of the file; see benchmarks/table3.toml.
    The exit code is 1 if every training failed.
    """
    from leakbench.training.settings import Accuracy

    plans, folder = given.plans(Accuracy)
    arms = list({arm.id: arm for one in plans for arm in one.arms()}.values())
    with stoppable(lambda: done(arms, folder)) as line:
        found = given.train(arms, folder, line, console())
    from leakbench.report import accuracy as report

    _end(report.write(folder), found)


@command(
    app,
    "tradeoff",
    TrainOptions,
    without=[name for name in _SETTINGS if name not in ("rounds", "name")],
    required="file",
)
def tradeoff(given: TrainOptions) -> None:
    """Train behind defenses, attack the checkpoints, and draw utility against leakage; write OUT/tradeoff.md.

    Each point is a defense with its options: the accuracy of the network trained behind it against the share of images
    that the best attacker recovers, and against LPIPS, with intervals and the Pareto front. The file is that of `run
    accuracy` with `stages`, the checkpoints to attack, and a table [attack] with the axes of a matrix. Run again, the
    command does only what is missing. The exit code is 1 if every training failed.
    """
    from leakbench.training.settings import Tradeoff

    plans, folder = given.plans(Tradeoff)
    arms = [arm for one in plans for arm in one.arms()]
    with stoppable(lambda: done(arms, folder)) as line:
        from leakbench.engine.progress import Display
        from leakbench.training import tradeoff as study

        out = console()
        found = given.train(study.arms_of(plans), folder, line, out)
        targets = study.attack(plans, folder, device=given.device, command=line, progress=lambda: Display(out))
    from leakbench import report as reports
    from leakbench.report import accuracy as costs
    from leakbench.report import tradeoff as report

    written = costs.write(folder)
    if targets:  # else nothing was attacked
        reports.write(folder)
        written = report.write(folder)
    _end(written, found)


def done(arms: Sequence[Arm], folder: Path) -> str:
    """Return how many trainings of a run are done, in words."""
    from leakbench import training

    return f"{training.finished(arms, folder)} of {len(arms)} trainings are done"


def _end(written: Sequence[Path], found: Sequence[TrainingRecord]) -> None:
    """Print where the reports are, and exit with 1 if every training failed."""
    for path in written:
        if path.suffix == ".md":
            typer.echo(f"report: {path}")
    if all(one.outcome.status != "ok" for one in found):
        first = found[0].outcome
        count = "the only training" if len(found) == 1 else f"each of the {len(found)} trainings"
        typer.echo(f"{count} failed; the first: {first.status}: {first.reason}", err=True)
        raise typer.Exit(1)


def _fitting(stated: dict[str, Any], rows: Sequence[dict[str, Any]], override: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the options, without the options of fedavg that a centralised row shares with rows of fedavg.

    Options of the command line stay if no row is of fedavg; they are then refused, as they would change nothing.
    """
    from leakbench.training.settings import FEDERATED

    federated = any(row.get("mode") == "fedavg" for row in rows)
    if stated.get("mode") == "fedavg" or not federated:
        return stated
    kept = override if "mode" in override else {}
    return {name: value for name, value in stated.items() if name not in FEDERATED or name in kept}
