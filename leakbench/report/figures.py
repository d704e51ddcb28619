"""``figures/``: a run's figures for a paper, each as PDF and SVG, the same bytes each time."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from leakbench.analysis.pareto import Study
from leakbench.core.text import slug
from leakbench.report import charts, curves, descent, grids, utility
from leakbench.report.figure import GREY, INK, ORANGE, SHARE_TICKS, Drawing, bars, plain, saved
from leakbench.report.run import ObjectiveCurves, PicturesOf, RunData
from leakbench.report.scenes import WorstCase, worst_cases

CHARTS: Mapping[str, str] = {
    "heatmap": "attackers x defenses, coloured by the share of images recovered",
    "recovery": "the share of images that any attacker recovers behind each defense, with its interval",
    "ssim": "the best SSIM after alignment of each image behind each defense",
    "psnr": "the best PSNR after alignment of each image behind each defense",
    "threshold": "images recovered against the threshold from which an image counts as recovered",
    "evaluations": "images recovered against evaluations of an attack's objective",
    "curves": "what leaks as noise grows or precision falls",
    "objective": "how the objective of each attack falls over its evaluations",
    "utility": "utility against leakage; needs the studies of leakbench run tradeoff",
}
"""Every kind of chart of a run, by name, and what it shows."""

FIGURE_FORMATS = ("pdf", "svg")
"""The kinds of files of every figure."""


def figures(
    run: RunData,
    pages: Sequence[grids.GridPage],
    pictures: PicturesOf,
    studies: Sequence[Study] = (),
    courses: ObjectiveCurves | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of every figure.

    They are the worst case behind each defense, for each dataset and model; attackers x defenses as a heat map, the
    scores of each image, and recovered images against the threshold and against evaluations (``charts``); the grids of
    ``report.md``; what leaks as the gradient becomes less exact, for a run that varies it; how the objective of each
    attack falls over its evaluations; utility against leakage, one for each study that is given.

    Args:
        run: all that the report shows.
        pages: of ``grids.pages``.
        pictures: from trials to their pictures (``Store.images``).
        studies: utility and leakage.
        courses: by trial, the objective at some evaluations (``Store.curves``).
    """
    for chart in all_charts(run, studies, courses):
        yield from _both(chart.file, chart.draw())
    for page in pages:
        yield from _both(f"grid-{page.file.removesuffix('.png')}", grids.figure(page, pictures(page.trials)))


def all_charts(
    run: RunData, studies: Sequence[Study] = (), courses: ObjectiveCurves | None = None
) -> Iterator[charts.Chart]:
    """Yield every chart of ``CHARTS`` that a run has, not drawn; the arguments are those of ``figures``."""
    scored = [scene for scene in worst_cases(run) if scene.known]
    for index, one in enumerate(scored, 1):
        scene = (one.dataset, one.model)
        yield charts.Chart("recovery", scene, f"worst-case-{index:03}-{slug(scene)}", partial(_worst, one))
    yield from charts.charts(run)
    for page in curves.pages(run.summary, run.components):
        yield charts.Chart("curves", page.block, page.file.removesuffix(".png"), partial(curves.figure, page))
    for index, (block, draw) in enumerate(descent.pages(run.results, courses or {}), 1):
        yield charts.Chart("objective", block, f"objective-{index:03}-{slug(block)}", draw)
    for index, study in enumerate(studies, 1):
        names = tuple(study.title.split(" · "))
        yield charts.Chart("utility", names, f"utility-{index:02}-{slug(names)}", partial(utility.figure, study))


def _both(name: str, drawn: Figure) -> Iterator[tuple[str, bytes]]:
    for kind in FIGURE_FORMATS:
        yield f"{name}.{kind}", saved(drawn, kind)


def _worst(scene: WorstCase) -> Figure:
    """Draw the share of images recovered behind each defense with its interval, the least recovered at the top."""
    known, places = scene.known, range(len(scene.known))
    drawn = Drawing(figsize=(6.4, 1.3 + 0.3 * len(known)), layout="constrained", facecolor="white")
    panel = drawn.subplots()
    shares = [one.share for one in known]
    whiskers = bars(shares, [one.low for one in known], [one.high for one in known])
    panel.errorbar(shares, places, xerr=whiskers, fmt="o", color=INK, markerfacecolor=ORANGE, markeredgecolor=ORANGE)
    if scene.floor is not None:
        panel.axvline(scene.floor, color=GREY, linestyle="--", linewidth=1, label="best floor")
        panel.legend(fontsize=8, framealpha=0.8)
    panel.set_yticks(places, [plain(one.defense, 48) for one in known], fontsize=8)
    panel.set_ylim(len(known) - 0.5, -0.5)
    panel.set_xlim(-0.02, 1.02)
    panel.set_xticks(*SHARE_TICKS)
    panel.set_xlabel("images recovered by at least one attacker, with 95 % intervals", fontsize=9)
    panel.set_title(plain(f"{scene.dataset} · {scene.model}", 70), fontsize=10)
    panel.grid(axis="x", alpha=0.3)
    return drawn
