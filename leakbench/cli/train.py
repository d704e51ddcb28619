"""``leakbench train``: train the generators that attacks use."""

from pathlib import Path
from typing import Annotated

import typer

from leakbench.cli.options import console, stoppable

app = typer.Typer(help="Train generators.", no_args_is_help=True)


@app.callback()
def train() -> None:
    """Train generators."""


@app.command("generator")
def generator(
    dataset: Annotated[str, typer.Option(help="A dataset with a training split: mnist, cifar10, ...")],
    steps: Annotated[int, typer.Option(help="Updates of the generator.")] = 7000,
    batch: Annotated[int, typer.Option(help="Real images per step.")] = 64,
    seed: Annotated[int, typer.Option(help="The seed of weights and draws.")] = 0,
    lr: Annotated[float, typer.Option(help="The learning rate of Adam.")] = 2e-4,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the training images.")] = False,
    latent: Annotated[int, typer.Option(help="The size of the latent.")] = 64,
    width: Annotated[int, typer.Option(help="The channels at 4 x 4 pixels.")] = 192,
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16 for processors that are fast at it.")
    ] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="The folder (default: generators/DATASET); a training in it is resumed.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train a class-conditional DCGAN on a training split; write weights, a sample grid and a report.

    Run again, the command resumes from the last checkpoint and ends with the same weights.
    """
    from leakbench import datasets
    from leakbench.engine.progress import Bar, duration
    from leakbench.generators.assess import assess
    from leakbench.generators.train import GeneratorRecipe
    from leakbench.generators.train import train as run
    from leakbench.report.files import replace
    from leakbench.report.page import render_markdown
    from leakbench.version import __version__

    # the recipe checks the precision
    recipe = GeneratorRecipe(dataset, steps, batch, seed, lr, flip, latent, width, precision=precision)  # type: ignore[arg-type]
    folder = out or Path("generators") / datasets.parse(dataset).name
    err = console(stderr=True)
    with stoppable(lambda: "its last checkpoint is kept") as line, Bar(err, "") as bar:

        def told(step: int, critic: float, decoder: float) -> None:
            losses = f"critic {critic:.2f}, decoder {decoder:.2f}"
            seconds = bar.bar.tasks[0].time_remaining
            left = "" if seconds is None else f"about {duration(seconds)} left"
            bar.bar.update(bar.task, description="training", total=steps, completed=step, beside=losses, left=left)
            if not err.is_terminal and step % 100 == 0:
                bar.note(f"[{step}/{steps}] {losses}")

        weights = run(recipe, folder, device=device, command=line, on_step=told)
    pictures, facts = assess(recipe, folder)
    page = render_markdown("generator.md.j2", recipe=vars(recipe), command=line, version=__version__, **facts)
    for path in [weights, *pictures, replace(folder / "report.md", page.encode())]:
        typer.echo(str(path))
