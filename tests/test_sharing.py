"""The key-lock study: scales and rows of a matrix, the report on sharing, and the paper's figures beside ours."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from test_store import METRICS, Data, Net, TinyAttack, TinyDefense, named, png, provenance, result

from leakbench import metrics, report
from leakbench.analysis.statistics import holm
from leakbench.core.types import PRESETS
from leakbench.engine import worker
from leakbench.errors import BadOption
from leakbench.plan.matrix import Matrix, expand, load, load_suite, parse_threat
from leakbench.plan.trial import Cell, Result, Trial
from leakbench.report import sharing as study
from leakbench.report.figure import saved
from leakbench.report.run import RunData
from leakbench.store.records import Pictures
from leakbench.store.run_file import FILE, Store

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("table[4-7].toml"))

# Scales and rows


AXES = {"attacks": ["ig"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}


def test_a_matrix_without_scales_is_one_matrix() -> None:
    assert expand(AXES) == [AXES]
    assert expand({**AXES, "images": 3})[0]["images"] == 3


def test_scales_replace_axes_and_rows_replace_both() -> None:
    file = {
        **AXES,
        "images": 20,
        "rows": [{"defenses": ["none"]}, {"defenses": ["keylock"], "threats": ["T5"]}],
        "scale": {"small": {"images": 2}, "own": {"images": 3, "rows": [{"images": 4}]}, "full": {}},
    }
    small, own, full = (expand(file, name) for name in ("small", "own", "full"))
    assert [row["images"] for row in small] == [2, 2]
    assert [row["defenses"] for row in small] == [["none"], ["keylock"]]
    assert "threats" not in small[0]
    assert [row["images"] for row in own] == [4]
    assert [row["images"] for row in full] == [20, 20]
    assert all(Matrix(**row).trials() for row in (*small, *own, *full))


@pytest.mark.parametrize(
    ("axes", "scale", "words"),
    [
        (AXES, "cpu", "it has none"),
        ({**AXES, "scale": {"cpu": {}, "full": {}}}, None, "--scale (cpu, full)"),
        ({**AXES, "scale": {"cpu": {}, "full": {}}}, "cp", "known: cpu, full"),
        ({**AXES, "scale": 3}, None, "scale=3"),
        ({**AXES, "scale": {"cpu": 3}}, "cpu", "scale"),
        ({**AXES, "rows": []}, None, "rows=[]"),
        ({**AXES, "rows": ["x"]}, None, "rows"),
    ],
)
def test_what_is_no_scale_is_told(axes: dict[str, object], scale: str | None, words: str) -> None:
    with pytest.raises(BadOption, match=re.escape(words)):
        expand(axes, scale)


def test_a_misspelt_axis_of_a_scale_is_told() -> None:
    (row,) = expand({**AXES, "scale": {"cpu": {"image": 2}}}, "cpu")
    with pytest.raises(BadOption, match="did you mean 'images'"):
        Matrix(**row)


@pytest.mark.parametrize("scale", ["smoke", "cpu", "full"])
@pytest.mark.parametrize("file", [*BENCHMARKS, "sharing"], ids=lambda file: getattr(file, "stem", file))
def test_papers_tables_have_controls_and_everything_revealed(file: Path | str, scale: str) -> None:
    rows = [Matrix(**row) for row in expand(load_suite(file) if isinstance(file, str) else load(file), scale)]
    defenses = {defense.name for row in rows for defense in row.defenses}
    threats = {threat.spec() for row in rows for threat in row.threats}
    small = scale == "smoke" and file != "sharing"
    assert defenses == {"none", "keylock"} | (set() if small else {"norm-only"})
    assert {"T1"} | (set() if small else {"T5"}) <= threats
    assert {row.name for row in rows} == {rows[0].name}
    if scale == "full":
        assert {row.images for row in rows} == {20}


def test_there_is_a_file_for_every_table() -> None:
    assert [file.stem for file in BENCHMARKS] == ["table4", "table5", "table6", "table7"]


# Statistics


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1, 1]
    found = holm([math.nan, 0.02, 0.5])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.04, 0.5])
    assert holm([]) == []


# The report on sharing


GREY = named(TinyAttack, "grey", floor=True)()
DLG = named(TinyAttack, "dlg")()
NONE, NORM, LOCK = (named(TinyDefense, name)() for name in ("none", "norm-only", "keylock"))
INFORMED = parse_threat("reveals=lock, informed=true")
LEVELS = [PRESETS["T0"], PRESETS["T1"], PRESETS["T3"], PRESETS["T4"], INFORMED, PRESETS["T5"]]
NAMES = ["none", "norm-only", "nothing", "nothing, lock weights known", "key", "lock", "lock, key derived", "both"]


def trial(attack, defense, threat, image: int, psnr: float) -> Result:
    return result(
        Trial(Cell(Data(), Net(), defense, attack, threat), image, 0),
        status="ok",
        scores={"psnr": psnr, "psnr_aligned": psnr, "mse": 1 / psnr},
        reconstruction=png(image * 7 + int(psnr), 28),
        truth=png(1000 + image, 28),
    )


def results(images: int = 5) -> list[Result]:
    """The key is worth 5 dB, the lock nothing but to who works the key out, the normalisation 2 dB."""
    found = []
    for image in range(images):
        found.append(trial(GREY, NONE, PRESETS["T0"], image, 8.0))
        found += [
            trial(DLG, NONE, PRESETS["T0"], image, 20.0 + image),
            trial(DLG, NORM, PRESETS["T0"], image, 18 + image),
        ]
        found += [trial(DLG, LOCK, level, image, 12 + image + 5 * (level in LEVELS[4:])) for level in LEVELS]
    return found


def stored(folder: Path, rows: list[Result]) -> Path:
    with Store.create(folder / FILE) as store:
        store.record_metrics([*METRICS, metrics.parse("psnr_aligned")])
        session = store.start_session(provenance())
        store.write(rows, session)
        store.end_session(session)
    return folder


def frame(folder: Path) -> pd.DataFrame:
    with Store.open(folder / FILE, readonly=True) as store:
        return store.results()


def table(text: str, title: str) -> list[list[str]]:
    """Return the cells of the first table after a title, without its head."""
    lines = text.split(title, 1)[1].splitlines()
    begun = itertools.dropwhile(lambda line: not line.startswith("|"), lines)
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), begun))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_arms_are_the_grants_in_their_order(tmp_path: Path) -> None:
    found = study.arms(frame(stored(tmp_path, results())))
    assert list(found["arm"].drop_duplicates()) == NAMES
    assert set(found["attack"]) == {"dlg"}
    assert len(found) == 8 * 5


def test_a_key_lock_of_another_version_is_one_too(tmp_path: Path) -> None:
    """A run with two versions of it names each with its version."""
    once = frame(stored(tmp_path, results()))
    renamed = once.replace({"defense": {"keylock": "keylock [version 1]", "none": "none [version 2]"}})
    assert list(study.arms(renamed)["arm"].drop_duplicates()) == ["none [version 2]", *NAMES[1:]]


def test_the_report_on_sharing(tmp_path: Path) -> None:
    stored(tmp_path, results())
    written = report.write(tmp_path, {"md"})
    text = (tmp_path / "sharing.md").read_text()
    assert [path.name for path in written[-1:]] == ["sharing.md"]
    (picture,) = (tmp_path / "grids").glob("sharing-*.png")
    scores = {row[0]: row for row in table(text, f"(grids/{picture.name})")}
    assert list(scores) == NAMES
    assert scores["both"][1:4] == ["5", "0", "0"]
    assert scores["both"][4].startswith("19.00 [")
    assert scores["both"][5].startswith("+11.00 [")
    assert scores["none"][4].startswith("22.00 [")
    report.write(tmp_path, {"md"})
    assert (tmp_path / "sharing.md").read_text() == text


def test_arms_are_compared_by_wilcoxons_test(tmp_path: Path) -> None:
    with Store.open(stored(tmp_path, results(12)) / FILE, readonly=True) as store:
        page = study.study(RunData.of(store, "x"), store)
    assert page is not None
    tests = {row[0]: row for row in table(page.markdown, "**Paired differences**:")}
    assert len(tests) == 1 + 2 * 3 + 15
    p = stats.wilcoxon(np.full(12, 5.0)).pvalue
    assert tests["lock, key derived − lock"][1:5] == ["12", "+5.000 [+5.000, +5.000]", "+5.000", "&#60;0.001"]
    assert p < 0.001
    assert tests["both − lock, key derived"][2:6] == ["+0.000 [+0.000, +0.000]", "+0.000", "1.000", "1.000"]
    assert tests["none − norm-only"][2] == "+2.000 [+2.000, +2.000]"
    assert tests["norm-only − key"][2] == "+6.000 [+6.000, +6.000]"
    assert tests["norm-only − both"][2] == "+1.000 [+1.000, +1.000]"


def test_the_grid_has_the_truth_first_and_a_row_for_each_grant_with_scores(tmp_path: Path) -> None:
    stored(tmp_path, results(3))
    block = study.arms(frame(tmp_path))
    trials = study.grid(block)
    assert list(trials.index) == NAMES
    assert list(trials.columns) == [0, 1, 2]
    assert trials.notna().to_numpy().all()
    with Store.open(tmp_path / FILE, readonly=True) as store:
        pictures = store.images(trials.stack().tolist())
    sheet = study.figure(block, pictures)
    words = [text.get_text() for panel in sheet.axes for text in panel.texts]
    labels = [word for word in words if any(character.isalpha() for character in word)]
    assert labels == ["private image", "none", *(f"{name} (aligned)" for name in NAMES[1:])]
    score = block.loc[block["trial"] == trials.loc["key", 1], "psnr_aligned"].iloc[0]
    assert f"{score:.1f}" in words
    rows = [[panel.images[0].get_array() for panel in sheet.axes[3 * row : 3 * row + 3]] for row in range(2)]
    truths = [np.asarray(Image.open(BytesIO(pictures[trial].truth))) for trial in trials.loc["none"]]
    own = [np.asarray(Image.open(BytesIO(pictures[trial].reconstruction))) for trial in trials.loc["none"]]
    assert all(np.array_equal(one, other) for one, other in zip(rows[0] + rows[1], truths + own))
    drawn = saved(sheet)
    assert drawn == saved(study.figure(block, pictures)) != saved(study.figure(block, {}))
    image = Image.open(BytesIO(drawn))
    assert image.height > 9 * 80
    assert image.width > 3 * 80


def test_a_picture_is_drawn_after_the_best_fit_to_the_private_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    faded = Image.fromarray((60 + pixels * 0.25).astype(np.uint8))
    stored, truth = (_bytes(image) for image in (faded, Image.fromarray(pixels)))
    fitted = study._fitted(Pictures(truth, stored), Image.fromarray(pixels))
    assert np.abs(np.asarray(fitted).astype(int) - pixels).max() <= 4  # a quarter of the range has 64 levels
    assert np.array_equal(study._fitted(Pictures(truth, stored), None), faded)
    assert study._fitted(None, faded) is None
    assert np.array_equal(study._fitted(Pictures(truth, stored, truth), Image.fromarray(pixels)), pixels)


def _bytes(image: Image.Image) -> bytes:
    out = BytesIO()
    image.save(out, "png")
    return out.getvalue()


@pytest.mark.parametrize("scale", [1.0, 1e-3, -3.0, 40.0])
def test_a_reconstruction_out_of_the_range_of_a_picture_is_kept_aligned(scale: float) -> None:
    truth = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    (row, _) = kept = worker.aligned(truth * scale + (0.0 if scale == 1 else 0.4), truth)
    if scale == 1:
        assert kept == [None, None]
        return
    assert row is not None
    drawn = np.asarray(Image.open(BytesIO(row))).astype(int)
    assert np.abs(drawn - truth[0].permute(1, 2, 0).mul(255).round().numpy()).max() <= 1


@pytest.mark.long
def test_old_runs_say_that_a_picture_is_worse_than_its_score(tmp_path: Path) -> None:
    truths = {image: png(1000 + image, 28) for image in range(3)}
    rows = [
        replace(row, reconstruction=png(9, 28) if row.scores["psnr"] > 15 else truths[row.trial.image])
        for row in results(3)
    ]
    rows = [replace(row, scores={**row.scores, "psnr_aligned": 40.0}) for row in rows]
    for aligned, words in ((None, "this run was made by an older version"), (True, "")):
        own = [replace(row, aligned=truths[row.trial.image] if aligned else None) for row in rows]
        folder = stored(tmp_path / str(aligned), own)
        report.write(folder, {"md"})
        text = (folder / "sharing.md").read_text()
        assert ("older version" in text) is bool(words)
        assert words in text


def test_raw_differences_of_the_other_sign_are_named(tmp_path: Path) -> None:
    stored(tmp_path, results(6))
    block = study.arms(frame(tmp_path))
    assert study.opposite(block) == []
    turned = block.assign(psnr=40 - block["psnr"])
    found = study.opposite(turned)
    assert "none − norm-only: −2.0 [−2.0, −2.0] dB raw, +2.0 [+2.0, +2.0] dB aligned" in found
    assert not any("both − lock, key derived" in one for one in found)  # no difference in either


def test_a_run_that_shares_no_key_and_no_lock_has_no_page_on_sharing(tmp_path: Path) -> None:
    shared = {"T3": PRESETS["T3"], "T4": PRESETS["T4"]}
    for kept in shared:
        rows = [row for row in results(2) if row.trial.cell.threat != shared[kept]]
        names = [path.name for path in report.write(stored(tmp_path / kept, rows), {"md"})]
        assert "report.md" in names
        assert not [name for name in names if "sharing" in name]
