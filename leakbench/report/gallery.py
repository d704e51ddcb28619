"""One private image, and every attacker's reconstruction of it behind every defense: attackers by defenses."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from leakbench.report.charts import Crossing
from leakbench.report.figure import GREY, INK, LETTER, RED, RISE, RUN, Drawing, plain
from leakbench.report.grids import picture
from leakbench.store.records import Pictures

MAX_ATTACKERS = 12
"""No more attackers have a row: those that come first."""

MAX_DEFENSES = 16
"""No more defenses have a column: those that leak most."""

_TILE, _GAP = 0.72, 0.06  # inches


def gallery(crossing: Crossing, images: Callable[[Iterable[str]], Mapping[str, Pictures]]) -> Figure | None:
    """Return the pictures of the first image and seed; a black frame marks a recovered image, a red one a failed trial.

    An attacker that has no picture of it, such as one that skipped it, has an empty tile.

    Args:
        crossing: the trials of one dataset and model.
        images: returns the pictures of trials by id (``Store.images``).

    Returns:
        The figure; None if there are no pictures. Of a client with several images it shows the first one.
    """
    trials = crossing.trials
    first = trials[trials["image"] == trials["image"].min()]
    first = first[first["seed"] == first["seed"].min()]
    attackers = list(dict.fromkeys(first["attacker"]))[:MAX_ATTACKERS]
    defenses = crossing.defenses[:MAX_DEFENSES]
    shown = first[first["attacker"].isin(attackers) & first["defense"].isin(defenses)]
    found = images(list(shown["trial"]))
    truth = next((picture(one.truth) for one in found.values() if one.truth is not None), None)
    if truth is None:
        return None
    left = LETTER * max(len(plain(name, 40)) for name in [*attackers, "private image"]) + 0.2
    heads = [plain(name, 34) for name in defenses]
    top = 0.25 + RISE * LETTER * max(map(len, ["private image", *heads]))
    step = _TILE + _GAP
    turned = max(RUN * LETTER * len(name) - step * (len(heads) - 1 - column) for column, name in enumerate(heads))
    width, height = (
        left + step * (len(defenses) + 1) + max(0.1, turned - 0.5 * _TILE),
        top + step * len(attackers) + 0.1,
    )
    drawn = Drawing(figsize=(width, height), facecolor="white")

    def tile(row: int, column: int, pixels: np.ndarray | None, edge: str) -> None:
        place = (left + step * column, height - top - step * row - _TILE)
        panel = drawn.add_axes((place[0] / width, place[1] / height, _TILE / width, _TILE / height))
        panel.axis("off")
        if pixels is None:
            panel.add_patch(Rectangle((0, 0), 1, 1, transform=panel.transAxes, facecolor="#eeeeee"))
            panel.text(0.5, 0.5, "–", ha="center", va="center", color=GREY, transform=panel.transAxes)
            return
        panel.imshow(pixels, interpolation="nearest", aspect="auto")
        if edge:
            panel.add_patch(
                Rectangle((0, 0), 1, 1, transform=panel.transAxes, fill=False, edgecolor=edge, linewidth=3.2)
            )

    def head(column: int, text: str) -> None:
        drawn.text(
            (left + step * column + 0.4 * _TILE) / width,
            1 - (top - 0.05) / height,
            text,
            rotation=35,
            ha="left",
            va="bottom",
            rotation_mode="anchor",
            fontsize=8,
        )

    head(0, "private image")
    tile(0, 0, np.asarray(truth), "")
    for column, name in enumerate(heads, 1):
        head(column, name)
    for row, attacker in enumerate(attackers):
        middle = height - top - step * row - _TILE / 2
        drawn.text((left - 0.1) / width, middle / height, plain(attacker, 40), ha="right", va="center", fontsize=8)
        for column, defense in enumerate(defenses, 1):
            own = shown[(shown["attacker"] == attacker) & (shown["defense"] == defense)]
            pixels, edge = None, ""
            for line in own.to_dict("records"):
                pictures = found.get(line["trial"], Pictures(None, None))
                data, _ = pictures.drawn(line.get("psnr", np.nan), line.get("psnr_aligned", np.nan))
                image = picture(data)
                pixels = None if image is None else np.asarray(image)
                edge = RED if line["status"] == "failed" else INK if line["recovered"] else ""
            tile(row, column, pixels, edge)
    return drawn
