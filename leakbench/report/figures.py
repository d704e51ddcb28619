"""``figures/``: a run's figures for a paper, each as PDF and SVG, the same bytes each time."""

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from leakbench.analysis.pareto import Study
from leakbench.core.text import slug
from leakbench.report import charts, curves, descent, grids, utility
from leakbench.report.figure import GREY, INK, ORANGE, SHARE_TICKS, bars, plain, saved
from leakbench.report.run import ObjectiveCurves, PicturesOf, RunData
from leakbench.report.scenes import WorstCase, worst_cases

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
    scored = [scene for scene in worst_cases(run) if scene.known]
    for index, scene in enumerate(scored):
        yield from _both(f"worst-case-{index + 1:03}-{slug((scene.dataset, scene.model))}", _worst(scene))
    for name, drawn in charts.charts(run):
        yield from _both(name, drawn)
    for page in pages:
        yield from _both(f"grid-{page.file.removesuffix('.png')}", grids.figure(page, pictures(page.trials)))
    for shown in curves.pages(run.summary, run.components):
        yield from _both(shown.file.removesuffix(".png"), curves.figure(shown))
    for index, (names, drawn) in enumerate(descent.pages(run.results, courses or {}), 1):
        yield from _both(f"objective-{index:03}-{slug(names)}", drawn)
    for index, study in enumerate(studies, 1):
        name = slug(study.title.split(" · "))
        yield from _both(f"utility-{index:02}-{name}", utility.figure(study))


def _both(name: str, drawn: Figure) -> Iterator[tuple[str, bytes]]:
    for kind in FIGURE_FORMATS:
        yield f"{name}.{kind}", saved(drawn, kind)


def _worst(scene: WorstCase) -> Figure:
    """Draw the share of images recovered behind each defense with its interval, the least recovered at the top."""
    known, places = scene.known, range(len(scene.known))
    drawn = Figure(figsize=(6.4, 1.3 + 0.3 * len(known)), layout="constrained", facecolor="white")
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
