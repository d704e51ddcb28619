"""``leakbench run paper``: the tables of the FedKL paper, from the files that ship with leakbench."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import typer

from leakbench.cli.accuracy import TrainOptions, done
from leakbench.cli.options import DEVICE, SALT, command, console, option, stoppable
from leakbench.cli.run import MatrixOptions, finish

app = typer.Typer()

TABLES = {str(number): f"table{number}" for number in range(1, 8)} | {"2": "table1", "batchnorm": "batchnorm"}
"""The file of each table; table 2 has the curves of table 1, and ``batchnorm`` is the experiment of section 4.3."""
TRAININGS = ("table1", "table3")
"""The tables of trainings, which share a folder: some trainings are part of both."""


@dataclass(frozen=True)
class PaperOptions:
    """The options of ``run paper``; each field's help says what it is."""

    table: list[str] | None = option("1 to 7, or batchnorm; repeatable (default: all).", metavar="N")
    scale: Literal["smoke", "cpu", "full"] = option(
        "smoke (every row, in small), cpu (what two cores can do), or full (the paper's size).", default="smoke"
    )
    out: Path | None = option("The folder of the runs (default: runs/paper-SCALE); existing runs are resumed.")
    device: str = option(DEVICE, default="auto")
    workers: int | None = option("Worker processes of the attacks.", min=1)
    salt: str | None = option(SALT, metavar="HEX")

    def names(self) -> list[str]:
        """Return the files that are run, each once; raise BadOption for a table that does not exist."""
        from leakbench.errors import BadOption

        for name in self.table or ():
            if name not in TABLES:
                raise BadOption(f"unknown table {name!r}; known: {', '.join(sorted(TABLES))}")
        return sorted({TABLES[name] for name in self.table or TABLES}, key=list(TABLES.values()).index)


@command(app, "paper", PaperOptions)
def paper(given: PaperOptions) -> None:
    """Run the tables of the FedKL paper, and write the paper's figures beside those of each run (paper.md).

    Trainings (tables 1 to 3) are in OUT/trainings, attacks in OUT/table4 to OUT/table7 and OUT/batchnorm. Table 2 has
    the curves of table 1; batchnorm is the experiment of section 4.3. The data must be there: leakbench assets fetch
    mnist cifar10 cifar100; ImageNet as data/imagenet in the current folder (a link will do), for tables 4 to 7 at the
    scales smoke and full. GGL takes BigGAN-deep at the scale full, and data/generator.pt2 at smoke. Federated trainings
    need the extra fl. benchmarks/table*.toml says which rows are not the paper's. Nothing runs before all is checked.
    """
    from leakbench import report as reports
    from leakbench.report import accuracy
    from leakbench.training.settings import Accuracy

    folder = given.out or Path("runs") / f"paper-{given.scale}"
    trainings = [
        TrainOptions(file=_file(name), scale=given.scale, device=given.device, salt=given.salt)
        for name in given.names()
        if name in TRAININGS
    ]
    arms = [arm for one in trainings for plan in one.plans(Accuracy)[0] for arm in plan.arms()]
    arms = list({arm.id: arm for arm in arms}.values())
    attacks = [
        MatrixOptions(file=_file(name), scale=given.scale, device=given.device, workers=given.workers, salt=given.salt)
        for name in given.names()
        if name not in TRAININGS
    ]
    planned = [(one, one.matrices()) for one in attacks]
    for _, plans in planned:
        for plan in plans:
            plan.trials()  # reads folders of images and files of generators
    if arms:
        trained = folder / "trainings"
        with stoppable(lambda: done(arms, trained)) as line:
            trainings[0].train(arms, trained, line, console())
        for path in [*accuracy.write(trained), accuracy.write_comparison(trained)]:
            if path.suffix == ".md":
                typer.echo(f"report: {path}")
    for one, plans in planned:
        run = finish(plans, folder / plans[0].name, one.run_options())
        run.report()
        typer.echo(f"report: {reports.write_comparison(run.out)}")


def _file(name: str) -> Path:
    """Return the file of a table that ships with the package."""
    return Path(str(resources.files("leakbench.plan") / "paper" / f"{name}.toml"))
