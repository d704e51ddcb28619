"""``leakbench show`` and ``leakbench diff``: one trial, and the differences between two runs."""

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def show(
    run: RunFolder,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="The id of a trial, or its first digits.")],
) -> None:
    """Show one trial: settings, threat model, status, every metric with its convention, and cost.

    The command at the end runs the same trial again, with the same id.
    """
    from rich.table import Table
    from rich.text import Text

    from leakbench.cli.options import console
    from leakbench.report.show import show as find
    from leakbench.store.run_file import FILE, Store

    with Store.open(run / FILE, readonly=True) as store:
        shown = find(store, trial)
    out = console()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, words in (("trial", shown.trial), *shown.facts):
        facts.add_row(label, Text(words))
    out.print(facts)
    if shown.metrics is not None:
        out.print(shown.metrics)
    out.print(Text("to run it again:", style="bold"))
    out.print(shown.command, markup=False, highlight=False, soft_wrap=True)
    if shown.note:
        out.print(shown.note, markup=False, highlight=False)


def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The folder of a run.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The folder of a run.")],
) -> None:
    """Report which differences from RUN_A to RUN_B are statistically significant, in Markdown.

    Trials of both runs are paired by image, seed and cell. Each cell has its mean difference with a 95 % bootstrap
    interval, and Wilcoxon signed-rank tests on images with Holm's correction over all cells. Trials without a matching
    trial in the other run, trials with another status, and different versions and settings are listed.

    The exit code is 0 if no difference is significant, 1 if one is, and 2 if the runs cannot be compared.
    """
    from leakbench.report.diff import ComparedRun
    from leakbench.report.diff import diff as compare
    from leakbench.store.run_file import FILE, Store

    runs = []
    for run in (run_a, run_b):
        with Store.open(run / FILE, readonly=True) as store:
            runs.append(ComparedRun.of(str(run), store))
    comparison = compare(*runs)
    typer.echo(comparison.text, nl=False)
    raise typer.Exit(1 if comparison.significant else 0)
