"""The charts of a run: what a cell of the heat map counts, what lines and points show, and where they are drawn."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from test_report import every_label_is_whole
from test_store import METRICS, Data, Net, TinyAttack, TinyDefense, named, png, provenance, result

from leakbench import metrics
from leakbench.core.types import PRESETS
from leakbench.plan.trial import Cell, Result, Trial
from leakbench.report import charts, write
from leakbench.report.figure import saved
from leakbench.report.figures import figures
from leakbench.report.gallery import gallery
from leakbench.report.grids import picture
from leakbench.report.run import RunData
from leakbench.store.run_file import FILE, Store

GREY = named(TinyAttack, "grey", floor=True)()
SEARCH, FORM = named(TinyAttack, "search")(), named(TinyAttack, "form")()
NONE, GUARD = named(TinyDefense, "none")(), named(TinyDefense, "guard")()
SCORES = {
    (GREY, NONE): (0.1, 0.1, 0.1, 0.7),  # the floor recovers image 3, which shows nothing
    (SEARCH, NONE): (0.9, 0.5, 0.2, 0.9),
    (FORM, NONE): (0.95, 0.95, 0.95, 0.95),
    (SEARCH, GUARD): (0.8, 0.3, 0.3, 0.9),
    (FORM, GUARD): (0.2, 0.2, 0.2, 0.2),
}


def stored(folder: Path, changed: float | None = None) -> Path:
    """Four images; ``changed``: the score of the closed form behind guard against what the client trained on."""
    rows: list[Result] = []
    for (attack, defense), scores in SCORES.items():
        for image, score in enumerate(scores):
            own = {"ssim_aligned": score, "psnr_aligned": 40 * score}
            if changed is not None and (attack, defense) == (FORM, GUARD):
                own |= {"ssim_encoded": changed, "psnr_encoded": 40 * changed}
            trial = Trial(Cell(Data(), Net(), defense, attack, PRESETS["paper"]), image, 0)
            pictures = {"reconstruction": png(image, 28), "truth": png(100 + image, 28)}
            work = 100 * (image + 1) if attack is SEARCH else None
            rows.append(replace(result(trial, scores=own, **pictures), evaluations=work))
    names = ["ssim_aligned", "psnr_aligned", "ssim_encoded", "psnr_encoded"]
    with Store.create(folder / FILE) as store:
        store.record_metrics([*METRICS, *map(metrics.parse, names)])
        session = store.start_session(provenance())
        store.write(rows, session)
        store.end_session(session)
    return folder


def crossing(folder: Path) -> charts.Crossing:
    with Store.open(folder / FILE, readonly=True) as store:
        (found,) = charts.crossings(RunData.of(store, "run"))
    return found


def test_a_cell_counts_recovered_of_attacked_without_the_images_of_floors(tmp_path: Path) -> None:
    found = crossing(stored(tmp_path))
    assert found.defenses == ["none", "guard"]
    shares, words = charts._cells(found, ["search", "form"])
    assert words == [["1/3", "1/3"], ["3/3", "0/3"], ["100 %", "33 %"]]
    assert np.allclose(shares, [[1 / 3, 1 / 3], [1, 0], [1, 1 / 3]])
    panel = charts.heatmap(found).axes[0]
    framed = [patch.get_xy() for patch in panel.patches if isinstance(patch, Rectangle)]
    assert framed == [(-0.5, 0.5), (0.5, -0.5)]  # form behind none, search behind guard
    assert [text.get_text() for text in panel.get_yticklabels()] == ["search", "form", charts.ENSEMBLE]
    (image,) = panel.images
    assert image.get_clim() == (0, 1)
    colours = image.cmap(np.linspace(0, 1, 20))[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(colours) < 0).all()  # the same order in grey


def test_an_image_counts_by_what_the_client_trained_on_too(tmp_path: Path) -> None:
    found = crossing(stored(tmp_path, changed=0.9))
    _, words = charts._cells(found, ["search", "form"])
    assert words[1] == ["3/3", "3/3"]
    assert (found.scored("guard").query("attacker == 'form'")["ssim_aligned"] == 0.9).all()


def test_points_and_lines_have_the_values(tmp_path: Path) -> None:
    found = crossing(stored(tmp_path))
    points = [line for line in charts.strips(found, "ssim_aligned").axes[0].lines if line.get_linestyle() == "None"]
    assert [sorted(line.get_ydata()) for line in points] == [[0.95, 0.95, 0.95], [0.3, 0.3, 0.8]]
    none, guard, _ = charts.by_threshold(found).axes[0].lines
    at = {round(x, 3): y for x, y in zip(guard.get_xdata(), guard.get_ydata())}
    assert (at[0.3], at[0.305], at[0.8], at[0.805]) == pytest.approx((1, 1 / 3, 1 / 3, 0))
    assert none.get_ydata()[-1] == 0
    drawn = charts.by_evaluations(found)
    lines = [dict(zip(line.get_xdata(), line.get_ydata())) for line in drawn.axes[0].lines]
    assert lines[0][1.0] == 1  # the closed form recovers all
    assert lines[1] == pytest.approx({1.0: 0, 100.0: 1 / 3, 300.0: 1 / 3})


def test_reports_have_the_heat_map_and_figures_all_charts(tmp_path: Path) -> None:
    stored(tmp_path)
    names = {path.name for path in write(tmp_path, {"md", "html"})}
    assert "001-heatmap-tiny-data-tiny-model.png" in names
    text = (tmp_path / "report.md").read_text()
    assert "(grids/001-heatmap-tiny-data-tiny-model.png)" in text
    assert "(grids/001-gallery-tiny-data-tiny-model.png)" in text
    assert text.index("| guard     | 33 % [6, 79]") < text.index("### Threat model")
    main = text[text.index("### Threat model") :].splitlines()
    assert next(line for line in main if line.startswith("|")).count("|") <= 9
    assert "Recovered images, attackers by defenses: tiny-data · tiny-model" in (tmp_path / "report.html").read_text()
    with Store.open(tmp_path / FILE, readonly=True) as store:
        run = RunData.of(store, "run")
        drawn = dict(figures(run, [], store.images))
        again = {chart.file: chart.draw() for chart in charts.charts(run)}
    for kind in ("heatmap", "images-ssim-aligned", "images-psnr-aligned", "threshold", "evaluations"):
        name = f"{kind}-001-tiny-data-tiny-model"
        assert {f"{name}.svg", f"{name}.pdf"} <= set(drawn)
        assert saved(again[name], "svg") == drawn[f"{name}.svg"]


def test_the_gallery_has_a_tile_for_each_attacker_and_defense(tmp_path: Path) -> None:
    found = crossing(stored(tmp_path))
    with Store.open(tmp_path / FILE, readonly=True) as store:
        drawn = gallery(found, store.images)
        assert drawn is not None
        assert gallery(found, lambda trials: {}) is None
        every_label_is_whole(drawn)
        own = store.images(found.trials["trial"])
    first = found.trials[found.trials["image"] == 0].set_index(["attacker", "defense"])["trial"]
    truth, *tiles = drawn.axes
    assert np.array_equal(truth.images[0].get_array(), picture(own[first["form", "none"]].truth))
    for tile, place in zip(tiles, itertools.product(("search", "form"), ("none", "guard")), strict=True):
        assert np.array_equal(tile.images[0].get_array(), picture(own[first[place]].reconstruction))
        assert len(tile.patches) == (place != ("form", "guard"))  # the frame of a recovered image


def test_a_run_without_the_score_has_no_charts(tmp_path: Path) -> None:
    stored(tmp_path)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        run = RunData.of(store, "run")
    empty = replace(run, trials=run.trials.assign(ssim_aligned=math.nan))
    assert charts.crossings(empty) == []
    assert charts.crossings(replace(run, trials=pd.DataFrame(run.trials.drop(columns="ssim_aligned")))) == []
