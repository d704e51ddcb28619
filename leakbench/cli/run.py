"""``leakbench run``: run a matrix and report on it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from leakbench.api import Run
    from leakbench.engine.run import RunOptions
    from leakbench.plan.matrix import Matrix

app = typer.Typer(help="Run trials.", no_args_is_help=True)

File = Annotated[Path | None, typer.Argument(metavar="[MATRIX.toml]", help="A matrix; options override it.")]
Scale = Annotated[
    str | None, typer.Option(help="Which of the matrix's scales, such as smoke, cpu or full; see benchmarks.")
]
Attacks = Annotated[list[str] | None, typer.Option("--attack", help='An attack, such as "ig(steps=1000)"; repeatable.')]
Defenses = Annotated[list[str] | None, typer.Option("--defense", help="A defense; repeatable.")]
Models = Annotated[list[str] | None, typer.Option("--model", help="A model; repeatable.")]
Datasets = Annotated[list[str] | None, typer.Option("--dataset", help="A dataset; repeatable.")]
Threats = Annotated[
    list[str] | None,
    typer.Option(
        "--threat", help='A threat model: a preset, or "labels=known, reveals=key+lock, informed=true"; repeatable.'
    ),
]
Images = Annotated[
    list[str] | None, typer.Option(help="The first N images, or indices such as 0,3,5 (or 3, for one); repeatable.")
]
Seeds = Annotated[list[str] | None, typer.Option(help="N seeds from 0 on, or a list such as 3,4 (3, is one).")]
Floors = Annotated[
    bool | None, typer.Option("--floors/--no-floors", help="Add the floors random, grey and mean (default: yes).")
]
Name = Annotated[str | None, typer.Option(help="The run's name.")]
Out = Annotated[Path | None, typer.Option(help="The run's folder (default: runs/NAME); an old run goes on.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Chunk = Annotated[int | None, typer.Option(min=1, help="Trials at a time; halved where they do not fit.")]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that do the trials; they share the threads, and the GPUs if --device names none (default: 1; "
        "with Ray as many as the cluster has room for).",
    ),
]
Executor = Annotated[
    Literal["local", "ray"], typer.Option(help="Where the workers run: here, or on the machines of a Ray cluster.")
]
RayAddress = Annotated[
    str, typer.Option(metavar="ADDRESS", help="The Ray cluster (default: RAY_ADDRESS, or else this machine alone).")
]
Gpus = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", min=0, metavar="NUMBER", help="With Ray: GPUs of each worker, such as 0.25."),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="What a trial may take, and a chunk as many times as much as it has trials. What takes longer is stopped, "
        "tried again one trial at a time, and then an error.",
    ),
]
Shard = Annotated[
    str,
    typer.Option(
        metavar="I/N", help="Run this part of the matrix alone, from 1/N to N/N; leakbench merge puts them together."
    ),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="A Python file that registers components; it is run. Repeatable."),
]


@app.command("matrix")
def matrix(
    file: File = None,
    suite: Annotated[
        str | None, typer.Option(help="A matrix that ships with leakbench: quick (default), worst-case, ...")
    ] = None,
    scale: Scale = None,
    attack: Attacks = None,
    defense: Defenses = None,
    model: Models = None,
    dataset: Datasets = None,
    threat: Threats = None,
    images: Images = None,
    seeds: Seeds = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER",
            help="From 0 to 1: an image that an attack recovers (ssim_aligned of at least this) is not attacked again "
            "behind the same defense (default: that of the matrix; the suite worst-case has 0.6, others none).",
        ),
    ] = None,
    floors: Floors = None,
    name: Name = None,
    out: Out = None,
    device: Device = "auto",
    chunk: Chunk = None,
    workers: Workers = None,
    time_limit: TimeLimit = None,
    shard: Shard = "",
    executor: Executor = "local",
    ray_address: RayAddress = "",
    gpus_per_worker: Gpus = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse cells that cannot be served; stop at a component's first error.")
    ] = False,
    plugin: Plugins = None,
) -> None:
    """Cross attacks with defenses, models, datasets and threat models; write OUT/run.sqlite and the report.

    With neither a file nor an axis, the suite ``quick`` runs. Started again, a run does only what is missing.

    The suite ``worst-case`` runs an ensemble of attackers behind every --defense, oblivious and informed, the cheapest
    first; what one of them recovers is not attacked again. OUT/worst-case.md ranks the defenses by the share of images
    recovered, and says by whom and at what cost. An --attack that is given takes the place of the ensemble. Its scales
    are smoke (minutes) and cpu (the default: 13 defenses and 32 images, within an hour on two cores).
    """
    from leakbench import report
    from leakbench.engine.run import RunOptions
    from leakbench.errors import BadOption
    from leakbench.plan import matrix as matrices

    given = _given(plugin, attack, defense, model, dataset, threat, images, seeds)
    if file is not None and suite is not None:
        raise BadOption(f"both the file {str(file)!r} and the suite {suite!r} were given; give one")
    if file is not None:
        axes = matrices.load(file)
    elif suite is not None or not given:
        axes = matrices.load_suite(suite or "quick")
    else:
        axes = {}
    settings = {"name": name, "floors": floors, "threshold": threshold}
    override = {**given, **{key: value for key, value in settings.items() if value is not None}}
    plans = [matrices.Matrix(**matrices.override(row, override)) for row in matrices.expand(axes, scale)]
    options = RunOptions(device, chunk, strict, workers, time_limit, shard, executor, ray_address, gpus_per_worker)
    finished = _run(plans, out, options)
    finished.report()
    if plans[-1].threshold is not None:
        typer.echo(report.ranking(finished.out))
        typer.echo(f"report: {finished.out / 'worst-case.md'}")
        return
    console = _console()
    for table in finished.tables():
        console.print(table)
    console.print(f"report: {finished.out / 'report.md'}", markup=False, highlight=False, soft_wrap=True)


@app.command("curves")
def curves(
    file: File = None,
    scale: Scale = None,
    attack: Attacks = None,
    defense: Defenses = None,
    model: Models = None,
    dataset: Datasets = None,
    threat: Threats = None,
    images: Images = None,
    seeds: Seeds = None,
    out: Out = None,
    device: Device = "auto",
    chunk: Chunk = None,
    workers: Workers = None,
    time_limit: TimeLimit = None,
    shard: Shard = "",
    executor: Executor = "local",
    ray_address: RayAddress = "",
    gpus_per_worker: Gpus = None,
    plugin: Plugins = None,
) -> None:
    """Measure what leaks as the gradient becomes less exact; write OUT/curves.md with a figure, beside the report.

    The defenses are strengths: ``noise(scale=S, relative=true)``, noise of S times the root mean square of the gradient
    of each parameter tensor; ``quantise(bits=B)`` and ``quantise(bits=half)``, fewer bits an entry; and ``none``, the
    exact gradient. Without a file the suite ``curves`` runs, whose scales are smoke (minutes) and cpu (the default).
    Every run with at least two such strengths has the figure; ``leakbench report OUT`` draws it again.
    """
    from leakbench.engine.run import RunOptions
    from leakbench.plan import matrix as matrices
    from leakbench.report import curves as report

    given = _given(plugin, attack, defense, model, dataset, threat, images, seeds)
    axes = matrices.load_suite("curves") if file is None else matrices.load(file)
    plans = [matrices.Matrix(**matrices.override(row, given)) for row in matrices.expand(axes, scale)]
    report.check(plans)
    finished = _run(
        plans, out, RunOptions(device, chunk, False, workers, time_limit, shard, executor, ray_address, gpus_per_worker)
    )
    finished.report()
    typer.echo(f"report: {finished.out / report.FILE}")


@app.command("sharing")
def sharing(
    scale: Annotated[
        str, typer.Option(help="smoke (minutes), cpu (two cores, under two hours) or full (a GPU).")
    ] = "smoke",
    attack: Attacks = None,
    model: Models = None,
    dataset: Datasets = None,
    images: Images = None,
    seeds: Seeds = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/sharing-SCALE).")] = None,
    device: Device = "auto",
    chunk: Chunk = None,
    workers: Workers = None,
    time_limit: TimeLimit = None,
    shard: Shard = "",
    executor: Executor = "local",
    ray_address: RayAddress = "",
    gpus_per_worker: Gpus = None,
    plugin: Plugins = None,
) -> None:
    """Study what sharing key-lock's key, lock or both is worth to an attacker; write OUT/sharing.md beside the report.

    Every attack meets key-lock under six grants: nothing (T0), nothing but the lock's weights, as FedKL's released
    code runs (T1), the key (T3), the lock with its gradients (T4), the same to an attacker that works the key out of
    them, and both (T5). No defense and norm-only (key-lock's normalisation without its secret) are the controls.
    OUT/sharing.md has a grid of pictures for each attack, the scores of every grant with 95 % intervals, and paired
    tests between grants on the same images. A run that was stopped goes on where it was.
    """
    from leakbench import report
    from leakbench.engine.run import RunOptions
    from leakbench.plan import matrix as matrices

    given = _given(plugin, attack, None, model, dataset, None, images, seeds)
    rows = matrices.expand(matrices.load_suite("sharing"), scale)
    plans = [matrices.Matrix(**{**row, **given, "name": f"sharing-{scale}"}) for row in rows]
    finished = _run(
        plans, out, RunOptions(device, chunk, False, workers, time_limit, shard, executor, ray_address, gpus_per_worker)
    )
    finished.report()
    for path in report.write_sharing(finished.out):
        if path.suffix == ".md":
            typer.echo(f"report: {path}")


def _given(
    plugin: Sequence[Path] | None,
    attack: Sequence[str] | None,
    defense: Sequence[str] | None,
    model: Sequence[str] | None,
    dataset: Sequence[str] | None,
    threat: Sequence[str] | None,
    images: Sequence[str] | None,
    seeds: Sequence[str] | None,
) -> dict[str, Any]:
    """Load the plugins, and return the axes that were given on the command line."""
    from leakbench.core.registry import load_plugin
    from leakbench.plan.matrix import axes_from_options

    for path in plugin or []:
        load_plugin(path)
    return axes_from_options(
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


def _run(plans: Sequence[Matrix], out: Path | None, options: RunOptions) -> Run:
    """Run matrices into one folder; after Ctrl-C say how much is done and how to go on.

    Of several, each is checked before the first one runs, and those of which a shard has no trial are left out.
    """
    from leakbench.api import Run
    from leakbench.engine import run as engine
    from leakbench.engine.progress import Display

    command = "leakbench " + shlex.join(sys.argv[1:])
    folder = out or Path("runs") / plans[0].name
    try:
        if len(plans) > 1:
            for plan in plans:
                engine.check(plan, device=options.device, strict=options.strict, time_limit=options.time_limit)
            plans = [plan for plan in plans if engine.planned(plan, options.shard)] or plans
        for number, plan in enumerate(plans, 1):
            part = f"matrix {number} of {len(plans)}" if len(plans) > 1 else ""
            with Display(_console(), options.workers or 1, part) as display:
                engine.run(plan, folder, options, progress=display, command=command)
    except KeyboardInterrupt:
        done = sum(engine.finished(folder, plan, options.shard) for plan in plans)
        planned = sum(len(engine.planned(plan, options.shard)) for plan in plans)
        typer.echo(f"stopped: {done} of {planned} trials are done; to go on: {command}", err=True)
        raise SystemExit(130) from None
    return Run(folder)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)
