"""``batches.md``: what leaks as clients have more images: the share of images recovered against their number."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from leakbench import clients
from leakbench.analysis.ensemble import RECOVERED
from leakbench.analysis.summary import summarise
from leakbench.core.text import number, slug, with_interval
from leakbench.metrics.members import Identified, LabelCounts, RecoveredShare
from leakbench.plan.matrix import RECOVERY
from leakbench.plan.trial import split_label
from leakbench.report.display import to_markdown
from leakbench.report.figure import GREY, key_below, plain, style
from leakbench.report.run import RunData
from leakbench.report.study import Line, StudyPage, draw_lines

FILE = "batches.md"
"""The name of the report in a run's folder."""

SHARE = RecoveredShare.name
FLOOR = "others"
"""The floor that is drawn: other photographs through the same assignment."""

PANELS_IN_A_ROW = 2
"""More would be too small to read on a narrow page."""

_COLUMNS = (SHARE, "psnr_aligned", "psnr_aligned_worst", "psnr_aligned_best", Identified.name, LabelCounts.name)
_PLACE = ("dataset alone", "model", "threat")


@dataclass(frozen=True)
class BatchesPage:
    """The curves of one dataset, model, threat model and kind of training.

    Attributes:
        block: dataset, model, threat model, and how clients train but for their number of images.
        file: the figure's name.
        rows: the rows of the summary, with the column ``count``, the images of a client.
    """

    block: tuple[str, ...]
    file: str
    rows: pd.DataFrame


def pages(summary: pd.DataFrame) -> list[BatchesPage]:
    """Return a page for each dataset, model and threat model under which clients of several images were attacked."""
    if SHARE not in summary or summary[SHARE].isna().all():
        return []
    labels = summary["dataset"].map(split_label)
    trainings = [clients.parse(client or "local") for _, client in labels]
    rows = summary.assign(
        **{
            "dataset alone": [dataset for dataset, _ in labels],
            "count": [one.count for one in trainings],
            "recipe": [one.recipe() for one in trainings],
        }
    )
    found: list[BatchesPage] = []
    for block, own in rows.groupby([*_PLACE], sort=False):
        if (own["count"] > 1).any():
            names = tuple(map(str, block))
            found.append(BatchesPage(names, f"batches-{len(found) + 1:03}-{slug(names)}.png", own))
    return found


def with_single_images(results: pd.DataFrame) -> pd.DataFrame:
    """Return results in which clients of one image have a share recovered too: 0 or 1, by the same rule."""
    single = results["dataset"].map(lambda label: clients.parse(split_label(label)[1] or "local").count == 1)
    scored = results[RECOVERY].notna() & single
    return results.assign(**{SHARE: results[SHARE].mask(scored, (results[RECOVERY] >= RECOVERED).astype(float))})


def study(run: RunData) -> StudyPage | None:
    """Return ``batches.md`` with its figures; None for a run whose clients have one image each."""
    found = pages(summarise(with_single_images(run.results), run.metrics)) if SHARE in run.results else []
    if not found or run.threshold is not None:
        return None
    blocks = [(page, _table(page)) for page in found]
    return StudyPage(FILE, {"pages": blocks}, {f"grids/{page.file}": figure(page) for page in found})


def _table(page: BatchesPage) -> str:
    """Return the rows by the images of a client, with 95 % intervals over clients."""
    shown = []
    for row in page.rows.sort_values("count", kind="stable").to_dict("records"):
        cells = {"images of a client": row["count"], "training": row["recipe"], "attack": row["attack"]}
        cells |= {"defense": row["defense"], "clients": row["n"], "failed": row["failed"]}
        cells |= {"no score": row["unsupported"] + row["error"]}
        shown.append(cells | {name: _text(row, name) for name in _COLUMNS if name in row})
    return to_markdown(pd.DataFrame(shown))


def _text(row: dict[Hashable, Any], name: str) -> str:
    value = float(row[name])
    if math.isnan(value):
        return "–"
    places = 1 if name.startswith("psnr") else 2
    low, high = (float(row.get(f"{name} {end}", math.nan)) for end in ("low", "high"))
    return number(value, places) if math.isnan(low) else with_interval(value, low, high, places)


def figure(page: BatchesPage) -> Figure:
    """Return a panel for each defense: a line for each attack over the number of images, which is logarithmic."""
    attacked = page.rows[~page.rows["floor"].astype(bool)]
    floors = page.rows[page.rows["floor"].astype(bool) & (page.rows["attack"] == FLOOR)]
    defenses = attacked.loc[attacked[SHARE].notna(), "defense"].drop_duplicates().tolist()
    defenses.sort(key=lambda name: (name != "none", str(name)))  # the same order in every picture
    count = max(1, len(defenses))
    columns = min(PANELS_IN_A_ROW, count)
    rows = -(-count // columns)
    drawn = Figure(figsize=(max(6.4, 4.4 * columns), 0.5 + 3.7 * rows), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False, sharey=True)
    panels = list(grid.flat)
    for panel in panels[count:]:
        panel.remove()
    ticks = {math.log2(count): str(count) for count in sorted(page.rows["count"].unique())}
    for panel, defense in zip(panels, defenses):
        own = attacked[attacked["defense"] == defense]
        lines = [
            Line(attack, _points(own[own["attack"] == attack]), style(index))
            for index, attack in enumerate(attacked["attack"].drop_duplicates())
        ]
        lines.append(Line(f"{FLOOR} (floor)", _points(floors), {"color": GREY, "linestyle": "--", "marker": ""}))
        draw_lines(panel, lines, ticks)
        panel.set_title(plain(str(defense)), fontsize=10)
        panel.set_xlabel("images of a client")
        panel.set_ylim(-0.03, 1.03)
    for panel in grid[:, 0]:
        panel.set_ylabel("share of images recovered")
    key_below(drawn, panels[0])
    drawn.suptitle(plain(" · ".join(page.block)), fontsize=11)
    return drawn


def _points(rows: pd.DataFrame) -> list[tuple[float, float, float, float]]:
    """Return the points of one attack; several trainings of as many images are one after the other."""
    known = rows[rows[SHARE].notna()].sort_values("count", kind="stable")
    columns = [known["count"], known[SHARE], known[f"{SHARE} low"], known[f"{SHARE} high"]]
    return [(math.log2(count), value, low, high) for count, value, low, high in zip(*columns)]
