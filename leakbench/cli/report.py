"""``leakbench report``: tables and grids from a run file."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run.")],
    format: Annotated[
        list[str] | None, typer.Option("--format", help="md, csv, html or latex; repeatable (default: md and csv).")
    ] = None,
    figures: Annotated[bool, typer.Option("--figures", help="Also write OUT/figures, as PDF and SVG.")] = False,
    compare: Annotated[
        Literal["paper"] | None,
        typer.Option(help="Also write OUT/paper.md: every figure that FedKL publishes beside those of the run."),
    ] = None,
) -> None:
    """Write OUT/report.md with OUT/grids, and OUT/results.csv, from OUT/run.sqlite.

    A run of trainings has OUT/accuracy.md. Studies have a page of their own, chosen by the content of the run:
    worst-case.md, curves.md, sharing.md or weights.md, and tradeoff.md. If OUT has results.csv and no run file,
    --compare writes OUT/paper.md only.
    """
    from leakbench import report as reports
    from leakbench.errors import BadOption
    from leakbench.report import accuracy, tradeoff
    from leakbench.store.run_file import FILE

    formats = set(format or reports.DEFAULT_FORMATS)
    unknown = sorted(formats - set(reports.FORMATS))
    if unknown:
        raise BadOption(f"unknown format {unknown[0]!r}; known: {', '.join(reports.FORMATS)}")
    if accuracy.trained(out):
        for option, given in (("--format", format), ("--figures", figures)):
            if given and not (out / FILE).exists():
                raise BadOption(f"{option} is of a run of attacks, and {str(out)!r} has only trainings; leave it out")
        for path in accuracy.write(out):
            typer.echo(str(path))
        if not (out / FILE).exists():
            if compare is not None:
                typer.echo(str(accuracy.write_comparison(out)))
            return
    if compare is not None and reports.has_only_csv(out):
        typer.echo(str(reports.write_comparison(out)))
        return
    if tradeoff.has_points(out):
        for path in tradeoff.write(out):
            typer.echo(str(path))
    for path in reports.write(out, formats):
        typer.echo(str(path))
    for path in reports.write_figures(out) if figures else []:
        typer.echo(str(path))
    if compare is not None:
        typer.echo(str(reports.write_comparison(out)))
