"""The report's files: read a run, make every page, write each at once."""

import re
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from leakbench import metrics as registry
from leakbench.analysis import pareto as utility
from leakbench.core.files import draft
from leakbench.core.text import slug
from leakbench.errors import BadOption, LeakbenchError
from leakbench.report import (
    batches,
    charts,
    compare,
    curves,
    figures,
    gallery,
    grids,
    html,
    latex,
    sharing,
    weights,
    worst_case,
)
from leakbench.report.figure import saved
from leakbench.report.markdown import markdown
from leakbench.report.run import Picture, RunData
from leakbench.report.study import StudyPage
from leakbench.store.frames import AFTER, BEFORE, ended, from_csv
from leakbench.store.records import MetricInfo, threshold_of
from leakbench.store.run_file import FILE, Store

FORMATS = ("md", "csv", "html", "latex")
"""The formats of a report."""

STUDIES = ("worst-case.md", "curves.md", "batches.md", "sharing.md", "weights.md")
"""The pages that a run has beside ``report.md`` if it has trials of their kind."""

CSV = "results.csv"
"""The name of the results in a run's folder."""

DEFAULT_FORMATS = ("md", "csv")
"""The formats of a report if none is given."""

_GRID = re.compile(r"\d{3}-.*\.png")


def write(out: Path | str, formats: Collection[str] = DEFAULT_FORMATS) -> list[Path]:
    """Write ``report.md`` with ``grids/*.png`` and ``results.csv`` beside the run file in ``out``; return their paths.

    A run that skips recovered images (``Matrix.threshold``) has ``worst-case.md`` too; ``STUDIES`` has the other pages.
    The files depend on nothing but the run file (and the folder's name, for a run without one), and replace those of an
    earlier report.

    Raises:
        BadOption: a format that is not one of ``FORMATS``.
        ForeignRun: there is no readable run file in ``out``.
    """
    for name in formats:
        if name not in FORMATS:
            raise BadOption(f"report format {name!r} is unknown; known: {', '.join(FORMATS)}")
    out = Path(out)
    written = []
    with Store.open(out / FILE, readonly=True) as store:
        run = RunData.of(store, out.resolve().name)
        if "csv" in formats:
            written.append(replace(out / CSV, csv(ended(run.trials), ended(run.controls)).encode()))
        if "html" in formats:
            members = store.members(run.results["trial"])
            text = html.html(run, store.images, utility.load(out / utility.FILE), store.curves(), members)
            written.append(replace(out / "report.html", text.encode("utf-8", "replace")))
        if "latex" in formats:
            written.append(replace(out / "report.tex", latex.latex(run).encode()))
            if text := latex.table6(run):
                written.append(replace(out / "table6.tex", text.encode()))
        if "md" in formats:
            pictures = []
            for page in _pages(store, run.results):
                path = out / "grids" / page.file
                written.append(replace(path, saved(grids.figure(page, store.images(page.trials)))))
                pictures.append(Picture(page.block, f"grids/{page.file}", page.title, page.seed))
            maps: dict[tuple[str, str], str] = {}
            galleries: dict[tuple[str, str], str] = {}
            for number, crossing in enumerate(charts.crossings(run), 1):
                place = slug((crossing.dataset, crossing.model))
                name = f"{number:03}-heatmap-{place}.png"
                written.append(replace(out / "grids" / name, saved(charts.heatmap(crossing))))
                maps[crossing.dataset, crossing.model] = f"grids/{name}"
                shown = gallery.gallery(crossing, store.images)
                if shown is not None:
                    name = f"{number:03}-gallery-{place}.png"
                    written.append(replace(out / "grids" / name, saved(shown)))
                    galleries[crossing.dataset, crossing.model] = f"grids/{name}"
            written.append(replace(out / "report.md", markdown(run, pictures, maps, galleries).encode()))
            if run.threshold is not None:
                written.append(replace(out / "worst-case.md", worst_case.markdown(run, run.threshold).encode()))
            for study in (curves.study(run), batches.study(run), sharing.study(run, store), weights.study(run, store)):
                for name, data in () if study is None else study.files():
                    written.append(replace(out / name, data))
            kept = {
                path.removeprefix("grids/")
                for path in (*maps.values(), *galleries.values(), *(picture.path for picture in pictures))
            }
            remove_others(out / "grids", _GRID, kept)
    return written


def write_figures(out: Path | str) -> list[Path]:
    """Write ``figures/*.pdf`` and ``figures/*.svg`` beside the run file in ``out``; return their paths.

    Raises:
        BadOption: ``tradeoff.json`` in ``out`` holds no studies of utility and leakage.
        ForeignRun: there is no readable run file in ``out``.
    """
    out = Path(out)
    with Store.open(out / FILE, readonly=True) as store:
        run, studies = RunData.of(store, out.resolve().name), utility.load(out / utility.FILE)
        found = figures.figures(run, _pages(store, run.results), store.images, studies, store.curves())
        return [replace(out / "figures" / name, data) for name, data in found]


def ranking(out: Path | str) -> str:
    """Return the table of ``worst-case.md`` that ranks the defenses, for each dataset and model of a run.

    Raises:
        BadOption: the run in ``out`` has no threshold.
        ForeignRun: there is no readable run file in ``out``.
    """
    with Store.open(Path(out) / FILE, readonly=True) as store:
        threshold = threshold_of(store.sessions())
        if threshold is None:
            raise BadOption(f"the run in {str(out)!r} has no threshold; run the suite worst-case, or give --threshold")
        return worst_case.ranking(store.trials(), store.components(), threshold)


def write_comparison(out: Path | str) -> Path:
    """Write ``paper.md``, the published figures beside those of the run file in ``out``; return its path.

    Without a run file, the results are those of ``results.csv`` in ``out``.

    Raises:
        ForeignRun: there is neither a readable run file nor ``results.csv`` in ``out``.
    """
    out = Path(out)
    if has_only_csv(out):
        study = comparison(from_csv(out / CSV))
    else:
        with Store.open(out / FILE, readonly=True) as store:
            study = compare.study(store.results(), store.metrics(), compare.published(), store.components())
    return replace(out / study.file, study.markdown.encode())


def comparison(results: pd.DataFrame) -> StudyPage:
    """Return ``paper.md`` of the results of a CSV (``store.frames.from_csv``)."""
    return compare.study(results, metrics_of(results), compare.published())


def metrics_of(results: pd.DataFrame) -> list[MetricInfo]:
    """Return the metrics that the results of a CSV have."""
    infos = [registry.get(name) for name in registry.names() if name in results]
    return [MetricInfo(one.name, one.higher_is_better, one.convention, "") for one in infos]


def has_only_csv(out: Path) -> bool:
    """Return whether a folder has the results of a run as CSV, and not its run file."""
    return not (out / FILE).exists() and (out / CSV).exists()


def _pages(store: Store, results: pd.DataFrame) -> list[grids.GridPage]:
    """Return the grids, with as many images as keep a report small."""
    results = grids.of_members(results, store.members(results["trial"]))
    found = grids.pages(results)
    firsts = [page.trials[0] for page in found]
    pictures = store.images(firsts)
    return grids.pages(results, grids.rows_within(found, [pictures[trial].truth for trial in firsts]))


def replace(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all."""
    try:
        with draft(path) as own:
            own.write_bytes(data)
    except OSError as error:
        raise LeakbenchError(
            f"{path} cannot be written: {error.strerror}; free space or choose another folder"
        ) from None
    return path


def remove_others(folder: Path, pattern: re.Pattern[str], names: Collection[str]) -> None:
    """Remove the pictures of an earlier report: files whose names match a pattern and are not among ``names``."""
    for path in folder.glob("*.png"):
        if pattern.fullmatch(path.name) and path.name not in names:
            path.unlink(missing_ok=True)


def csv(results: pd.DataFrame, controls: pd.DataFrame) -> str:
    """Return the results, those of controls last, as CSV: ``BEFORE``, metrics, further columns; scores as stored."""
    results = pd.concat([results, controls]) if len(controls) else results
    metrics = [column for column in results.columns if column not in BEFORE + AFTER]
    columns = [*BEFORE, *metrics, "reason", "objective", "evaluations", "group"]
    return str(results[columns].to_csv(index=False, lineterminator="\n"))
