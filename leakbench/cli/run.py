"""``leakbench run``: run a matrix and report on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from leakbench.cli.options import DEVICE, OUT, PLUGIN, SALT, SEEDS, command, console, option, stated, stoppable
from leakbench.core.text import plural

if TYPE_CHECKING:
    from leakbench.api import Run
    from leakbench.engine.run import RunOptions
    from leakbench.plan.matrix import Matrix
    from leakbench.trackers import Tracking

app = typer.Typer(help="Run trials.", no_args_is_help=True)


@dataclass(frozen=True)
class MatrixOptions:
    """The options of a command that runs a matrix; each field's help says what it is."""

    file: Path | None = option(
        "A file that states the matrix; options override it.", metavar="MATRIX.toml", argument=True
    )
    suite: str | None = option("A matrix that ships with leakbench: quick (default), worst-case, ...")
    scale: str | None = option("One of the scales that the matrix has, such as smoke, cpu or full.")
    attack: list[str] | None = option('An attack, such as "ig(steps=1000)"; repeatable.')
    defense: list[str] | None = option("A defense; repeatable.")
    model: list[str] | None = option("A model; repeatable.")
    dataset: list[str] | None = option("A dataset; repeatable.")
    threat: list[str] | None = option(
        'A threat model: a preset, or "labels=known, reveals=key+lock, informed=true"; repeatable.'
    )
    clients: list[str] | None = option(
        'How clients train, such as "local(images=32, local_batch=8, local_epochs=2, momentum=0.9)"; repeatable.'
    )
    batch: list[str] | None = option(
        "The number of images of each client, which takes one step on them; repeatable.", metavar="N"
    )
    images: list[str] | None = option(
        "The first N images, or a list such as 0,3,5 (`3,` selects the single image 3); repeatable."
    )
    seeds: list[str] | None = option(SEEDS)
    threshold: str | None = option(
        "From 0 to 1: once an attack has recovered an image (ssim_aligned of at least this, and better than every "
        "floor on the image), later attacks behind the same defense skip the image (default: that of the matrix; 0.6 "
        "in the suite worst-case, none in the others).",
        metavar="NUMBER",
    )
    floors: bool | None = option("Add the floors random, grey and mean (default: yes).")
    metric: list[str] | None = option(
        "A further metric, beside those that every run has: ms_ssim, vif, gmsd, fsim or dists; repeatable."
    )
    name: str | None = option("The run's name.")
    out: Path | None = option(OUT)
    device: str = option(DEVICE, default="auto")
    chunk: int | None = option("How many trials run at a time (default: measured); halved if memory runs out.", min=1)
    workers: int | None = option(
        "Worker processes; they share the threads, and the GPUs if --device names none (default: on a CPU one for each "
        "thread that has 8 searches, on a GPU 1; with Ray as many as the cluster has room for).",
        min=1,
    )
    time_limit: float | None = option(
        "The time limit of one trial; n trials that run together have n times as long. If they time out, they are run "
        "again one at a time, and a trial that times out is recorded as an error.",
        metavar="SECONDS",
    )
    shard: str = option(
        "Run only this part of the matrix, from 1/N to N/N; leakbench merge combines the parts.",
        metavar="I/N",
        default="",
    )
    executor: Literal["local", "ray"] = option(
        "Run the workers on this machine, or on those of a Ray cluster.", default="local"
    )
    ray_address: str = option(
        "The Ray cluster (default: RAY_ADDRESS, or else this machine).", metavar="ADDRESS", default=""
    )
    gpus_per_worker: float | None = option("With Ray: GPUs per worker, such as 0.25.", min=0, metavar="NUMBER")
    salt: str | None = option(SALT, metavar="HEX")
    log: list[str] | None = option(
        "Log the run to an experiment tracker while it runs: wandb, tensorboard or mlflow, each by its own package, "
        "which must be installed; repeatable.",
        metavar="TRACKER",
    )
    strict: bool = option(
        "Refuse the matrix if an attack does not support a case; stop at the first error of a component.",
        "--strict",
        default=False,
    )
    plugin: list[Path] | None = option(PLUGIN)

    def matrices(self) -> list[Matrix]:
        """Load the plugins, and return the matrices that file or suite and options state, all for one folder.

        Raises:
            BadOption: both a file and a suite were given, or one line on the first thing that is wrong with them.
        """
        from leakbench.errors import BadOption
        from leakbench.plan import matrix

        axes = {"attacks": self.attack, "defenses": self.defense, "models": self.model, "datasets": self.dataset}
        axes |= {
            "threats": self.threat,
            "clients": self.clients,
            "batch": self.batch,
            "images": self.images,
            "seeds": self.seeds,
        }
        given = stated(self.plugin, axes)
        if self.file is not None and self.suite is not None:
            raise BadOption(f"both the file {str(self.file)!r} and the suite {self.suite!r} were given; give one")
        base: dict[str, Any] = {}
        if self.file is not None:
            base = matrix.load(self.file)
        elif self.suite is not None or not given:
            base = matrix.load_suite(self.suite or "quick")
        else:
            base = _usual(given)
        settings = {"name": self.name, "floors": self.floors, "threshold": self.threshold, "metrics": self.metric}
        given |= {key: value for key, value in settings.items() if value is not None}
        return [matrix.Matrix(**matrix.override(row, given)) for row in matrix.expand(base, self.scale)]

    def run_options(self) -> RunOptions:
        """Return how the matrices are run."""
        from leakbench.engine.run import RunOptions

        return RunOptions(**{one.name: getattr(self, one.name) for one in fields(RunOptions)})


@command(app, "matrix", MatrixOptions)
def matrix(given: MatrixOptions) -> None:
    """Run attacks against defenses, for all models, datasets and threat models; write OUT/run.sqlite and the report.

    Without a file or --suite, the axes that are not given (attacks, defenses, models, datasets) are those of the suite
    quick. The same command again runs only the missing trials.

    The suite worst-case runs an ensemble of attackers, oblivious and adaptive, behind every --defense, the cheapest
    first; an image that one of them recovers is not attacked again. OUT/worst-case.md ranks the defenses by the share
    of images recovered, with the strongest attacker and its cost. --attack replaces the ensemble. The scales of this
    suite are smoke (minutes) and cpu (the default: 15 defenses and 32 images, within an hour on two cores).
    """
    _run(given.matrices(), given)


@command(app, "curves", MatrixOptions, without=("suite", "threshold"))
def curves(given: MatrixOptions) -> None:
    """Measure what leaks as the gradient becomes less exact; write OUT/curves.md with a figure, beside the report.

    The defenses are strengths: ``noise(scale=S, relative=true)``, noise of S times the root mean square of the gradient
    of each parameter tensor; ``quantise(bits=B)`` and ``quantise(bits=half)``, fewer bits per entry; and ``none``, the
    exact gradient. Without a file, this is ``run matrix --suite curves``; its scales are smoke (minutes) and cpu (the
    default). Every run with at least two such strengths has the figure; ``leakbench report OUT`` draws it again.
    """
    from leakbench.report.curves import check

    plans = replace(given, suite=None if given.file else "curves").matrices()
    check(plans)
    _run(plans, given)


@command(app, "sharing", MatrixOptions, without=("file", "suite", "defense", "threat", "threshold"))
def sharing(given: MatrixOptions) -> None:
    """Measure what key-lock's key, lock or both are worth to an attacker; write OUT/sharing.md beside the report.

    This is ``run matrix --suite sharing``; its scales are smoke (the default, minutes), cpu (two cores, under two
    hours) and full (a GPU). Every attack meets key-lock under six grants: nothing (T0); nothing, but the attacker knows
    the lock's weights, as in FedKL's released code (T1); the key (T3); the lock with its gradients (T4); the same to an
    adaptive attacker, which derives the key from them; and both (T5). The controls are no defense and norm-only
    (key-lock's normalisation without its secret). OUT/sharing.md has a grid of pictures for each attack, the scores
    under every grant with 95 % intervals, and paired tests between grants on the same images.
    """
    _run(replace(given, suite="sharing").matrices(), given)


def _usual(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes of the suite quick that were not given, and print what they are."""
    from leakbench.plan import matrix

    quick = matrix.load_suite("quick")
    axes = {"stages": "attacks", "defenses": "defenses", "models": "models", "datasets": "datasets"}
    taken = {key: quick[key] for key, axis in axes.items() if axis not in given}
    if taken:
        attacks = {"stages": dict.fromkeys(attack for stage in quick["stages"] for attack in stage["attacks"])}
        words = "; ".join(f"{axes[key]} {', '.join(attacks.get(key, specs))}" for key, specs in taken.items())
        typer.echo(f"not given, and taken from the suite quick: {words}", err=True)
    return taken


def _run(plans: Sequence[Matrix], given: MatrixOptions) -> None:
    """Run matrices into one folder, write the report, and print its tables and where it is."""
    from leakbench import report
    from leakbench.trackers import tracked

    folder = given.out or Path("runs") / plans[0].name
    if given.out is None:
        _note_others(folder, plans)
    with tracked(given.log or (), folder) as tracking:
        run = finish(plans, folder, given.run_options(), tracking)
        written = run.report()
        tracking.finish(written)
    pages = [path for path in written if path.name in report.STUDIES]
    if plans[-1].threshold is not None:
        typer.echo(report.ranking(run.out))
    elif not pages:
        out = console()
        for table in run.tables():
            out.print(table)
    for page in pages or [run.out / "report.md"]:
        typer.echo(f"report: {page}")


def _note_others(folder: Path, plans: Sequence[Matrix]) -> None:
    """Print how many trials of other matrices a folder has, which nobody named; nothing if there are none."""
    from leakbench.store.run_file import FILE, Store

    if not (folder / FILE).exists():
        return
    with Store.open(folder / FILE, readonly=True) as store:
        others = len(store.planned() - {trial.id for plan in plans for trial in plan.trials()})
    if others:
        typer.echo(
            f"note: {folder} already has {plural(others, 'trial')} of another matrix, and its report will show both; "
            "--out FOLDER or --name NAME keeps them apart",
            err=True,
        )


def finish(plans: Sequence[Matrix], folder: Path, options: RunOptions, tracking: Tracking | None = None) -> Run:
    """Run matrices into one folder; ``tracking`` is told of every trial.

    If there are several, each is checked before the first one runs, and those of which a shard has no trial are left
    out.
    """
    from leakbench.api import Run
    from leakbench.engine import run as engine
    from leakbench.engine.progress import Display

    def done() -> str:
        ended = sum(engine.finished(folder, plan, options.shard) for plan in plans)
        return f"{ended} of {sum(len(engine.planned(plan, options.shard)) for plan in plans)} trials are done"

    with stoppable(done) as line:
        if len(plans) > 1:
            for plan in plans:
                engine.check(plan, options)
            plans = [plan for plan in plans if engine.planned(plan, options.shard)] or plans
        for number, plan in enumerate(plans, 1):
            part = f"matrix {number} of {len(plans)}" if len(plans) > 1 else ""
            own = options
            if own.workers is None and own.executor == "local":
                own = replace(own, workers=engine.usual_workers(plan, folder, own))
            with Display(console(), own.workers or 1, part) as display:
                told = display if tracking is None else tracking.display(display)
                engine.run(plan, folder, own, progress=told, command=line)
    return Run(folder)
