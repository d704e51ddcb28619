"""The report: its numbers, what it escapes, and that nothing in it is hidden or cut off."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import BboxImage
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from test_store import METRICS, Data, Net, Score, TinyAttack, TinyDefense, named, png, provenance, result

from leakbench import metrics
from leakbench.core.text import decimals, number, percent, with_interval
from leakbench.core.types import PRESETS, ThreatModel
from leakbench.errors import BadOption, ForeignRun, LeakbenchError
from leakbench.plan.trial import Cell, Result, Trial
from leakbench.report import bootstrap_interval, console_table, grids, strongest, summarise, write
from leakbench.report.display import escape
from leakbench.report.figure import saved
from leakbench.report.markdown import markdown
from leakbench.report.run import RunData
from leakbench.store.records import MetricInfo, Pictures, RunSession, run_name
from leakbench.store.run_file import FILE, Store

PSNR, MSE = MetricInfo("psnr", True, "dB", ""), MetricInfo("mse", False, "0 to 1", "")
GREY, MEAN = named(TinyAttack, "grey", floor=True)(), named(TinyAttack, "mean", floor=True)()
DLG, IG = named(TinyAttack, "dlg")(), named(TinyAttack, "ig")(step=0.01)
NONE, NOISE = named(TinyDefense, "none")(), named(TinyDefense, "noise")(scale=0.01)


def make(attack, defense, image, seed=0, psnr=None, status="ok", threat=PRESETS["paper"], **changes) -> Result:
    scored = status in ("ok", "failed")
    value = 10.0 + image if psnr is None else psnr
    return result(
        Trial(Cell(Data(), Net(), defense, attack, threat), image, seed),
        status=status,
        reason="" if status == "ok" else f"because {status}",
        scores={"psnr": value, "mse": 1 / value} if scored else {},
        reconstruction=png(image * 7 + seed, 28) if scored else None,
        truth=png(1000 + image, 28),
        **changes,
    )


def run(folder: Path, results: list[Result], metrics=METRICS) -> Path:
    with Store.create(folder / FILE) as store:
        store.record_metrics(metrics, {"psnr": "mind the | gap"})
        session = store.start_session(provenance())
        store.write(results, session)
        store.end_session(session)
    return folder


def frame(folder: Path, results: list[Result]) -> pd.DataFrame:
    with Store.open(run(folder, results) / FILE, readonly=True) as store:
        return store.results()


def cell(summary: pd.DataFrame, attack: str, defense: str) -> pd.Series:
    (row,) = (r for _, r in summary.iterrows() if (r["attack"], r["defense"]) == (attack, defense))
    return row


def crossing(images=range(4), seeds=(0,), psnr=lambda attack, defense, image: None) -> list[Result]:
    return [
        make(attack, defense, image, seed, psnr(attack, defense, image))
        for defense in (NONE, NOISE)
        for attack in (GREY, MEAN, DLG, IG)
        for image in images
        for seed in seeds
    ]


# Intervals


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = bootstrap_interval(rng.normal(3.0, 1.0, 40))
        covered += low <= 3.0 <= high
    assert 0.90 <= covered / 400 <= 0.98


def test_interval_of_nested_seeds_resamples_images():
    rng = np.random.default_rng(1)
    per_image = rng.normal(0, 1, 30)
    images = np.repeat(np.arange(30), 20)
    values = per_image[images]
    low, high = bootstrap_interval(values, images)
    assert (low, high) == pytest.approx(bootstrap_interval(per_image))
    narrow = bootstrap_interval(values)
    assert high - low > 3 * (narrow[1] - narrow[0])


def test_interval_weighs_rows_as_the_mean_does():
    low, high = bootstrap_interval([0.0, 0.0, 0.0, 1.0], [0, 0, 0, 1])
    assert (low, high) == (0.0, 1.0)


def test_interval_edges():
    assert np.isnan(bootstrap_interval([1.0])).all()
    assert np.isnan(bootstrap_interval([])).all()
    assert np.isnan(bootstrap_interval([1.0, 2.0], [5, 5])).all()
    assert np.isnan(bootstrap_interval([1.0, np.inf])).all()
    assert bootstrap_interval([0.1] * 7) == (0.1, 0.1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_interval_is_deterministic_and_around_the_data(values):
    low, high = bootstrap_interval(values, resamples=200)
    assert (low, high) == bootstrap_interval(values, resamples=200)
    assert min(values) - 1e-6 <= low <= high <= max(values) + 1e-6


# The summary


def test_gain_is_signed_so_that_more_leakage_is_positive(tmp_path):
    floors = {"grey": 10.0, "mean": 12.0, "dlg": 15.0, "ig": 11.0}
    results = crossing(psnr=lambda attack, defense, image: floors[attack.name] + image)
    summary = summarise(frame(tmp_path, results), [PSNR, MSE])
    dlg, ig = cell(summary, "dlg", "none"), cell(summary, "ig(step=0.01)", "none")
    assert dlg["psnr floor"] == dlg["mse floor"] == "mean"
    assert dlg["psnr gain"] == pytest.approx(3.0)
    assert (dlg["psnr gain low"], dlg["psnr gain high"]) == pytest.approx((3.0, 3.0))
    assert ig["psnr gain"] == pytest.approx(-1.0)
    assert dlg["mse gain"] == pytest.approx(np.mean([1 / (12 + i) - 1 / (15 + i) for i in range(4)]))
    assert dlg["mse gain"] > 0 > ig["mse gain"]
    assert np.isnan(cell(summary, "grey", "(any)")["psnr gain"])


def test_the_floor_is_chosen_per_metric_over_the_same_images(tmp_path):
    """Grey is the best floor on images 0 and 1, mean over all four; the attack has a score on 0 and 1 only."""
    grey, mean = [20.0, 20.0, 1.0, 1.0], [15.0, 15.0, 15.0, 15.0]
    results = [make(GREY, NONE, i, psnr=grey[i]) for i in range(4)]
    results += [make(MEAN, NONE, i, psnr=mean[i]) for i in range(4)]
    results += [make(DLG, NONE, i, psnr=21.0, status="ok" if i < 2 else "error") for i in range(4)]
    results += [make(IG, NONE, i, psnr=16.0) for i in range(4)]
    summary = summarise(frame(tmp_path, results), [PSNR])
    assert cell(summary, "dlg", "none")["psnr floor"] == "grey"
    assert cell(summary, "dlg", "none")["psnr gain"] == pytest.approx(1.0)
    assert cell(summary, "ig(step=0.01)", "none")["psnr floor"] == "mean"
    assert cell(summary, "ig(step=0.01)", "none")["psnr gain"] == pytest.approx(1.0)


def test_a_floor_that_ran_on_few_images_is_no_floor_for_the_others(tmp_path):
    results = [make(GREY, NONE, i, psnr=10.0) for i in range(4)] + [make(MEAN, NONE, 0, psnr=99.0)]
    results += [make(DLG, NONE, i, psnr=12.0) for i in range(4)]
    row = cell(summarise(frame(tmp_path, results), [PSNR]), "dlg", "none")
    assert (row["psnr floor"], row["psnr gain"]) == ("grey", pytest.approx(2.0))


def test_infinite_psnr_of_a_perfect_floor(tmp_path):
    results = [make(a, NONE, i, psnr=np.inf if i == 0 else 10.0) for a in (GREY, DLG) for i in range(3)]
    row = cell(summarise(frame(tmp_path, results), [PSNR]), "dlg", "none")
    assert row["psnr"] == np.inf
    assert np.isnan(row["psnr low"])
    assert row["psnr gain"] == 0.0


def test_floors_are_shown_once(tmp_path):
    results = crossing()
    results[0] = make(GREY, NONE, 0, status="error")
    summary = summarise(frame(tmp_path, results), [PSNR])
    floors = summary[summary["floor"]]
    assert floors["attack"].tolist() == ["grey", "mean"]
    assert floors["defense"].tolist() == ["(any)", "(any)"]
    assert floors["n"].tolist() == floors["ok"].tolist() == [4, 4]
    assert len(summary) == 2 + 2 * 2


def test_every_status_is_counted_and_failures_stay_in_the_mean(tmp_path):
    statuses = ["ok", "failed", "unsupported", "error", "error"]
    values = [20.0, 10.0, None, None, None]
    results = [make(DLG, NONE, i, psnr=values[i], status=s) for i, s in enumerate(statuses)]
    row = cell(summarise(frame(tmp_path, results), [PSNR]), "dlg", "none")
    assert [row[s] for s in ("n", "ok", "failed", "unsupported", "error")] == [5, 1, 1, 1, 2]
    assert (row["psnr"], row["psnr n"]) == (15.0, 2)
    text = write(tmp_path)[-1].read_text()
    assert "| 1 unsupported, 2 error |" in text
    assert "because unsupported" in text


def test_no_cell_is_ranked_below_its_floor(tmp_path):
    values = {("dlg", "none"): 15.0, ("ig", "none"): 14.0, ("dlg", "noise"): 3.0, ("ig", "noise"): 4.0}
    results = crossing(psnr=lambda a, d, i: values.get((a.name, d.name), 10.0) + i)
    best = strongest(summarise(frame(tmp_path, results), [PSNR, MSE]), "psnr").set_index("defense")
    assert (best.loc["none", "attack"], best.loc["none", "gain"]) == ("dlg", pytest.approx(5.0))
    assert (best.loc["noise(scale=0.01)", "attack"], best.loc["noise(scale=0.01)", "gain"]) == ("grey", 0.0)
    assert "no attack beats the floor" in write(tmp_path)[-1].read_text()


# The files


def test_a_report_made_twice_is_the_same_bytes(tmp_path):
    results = crossing(images=range(14), seeds=(0, 1))
    results.append(make(DLG, NONE, 99, status="failed"))
    run(tmp_path, results)
    before = (tmp_path / FILE).read_bytes()
    first = {path: path.read_bytes() for path in write(tmp_path)}
    stale = tmp_path / "grids" / "099-old-seed0.png"
    stale.write_bytes(b"")
    mine = tmp_path / "grids" / "mine.png"
    mine.write_bytes(b"")
    assert {path: path.read_bytes() for path in write(tmp_path)} == first
    assert not stale.exists()
    assert mine.exists()
    assert (tmp_path / FILE).read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {FILE, "grids", "report.md", "results.csv"}
    pictures = [p.relative_to(tmp_path).as_posix() for p in first if p.suffix == ".png"]
    assert re.findall(r"\]\((grids/.*?)\)", (tmp_path / "report.md").read_text()) == pictures
    assert sum(map(len, first.values())) < 5_000_000


def test_csv_has_exactly_the_columns(tmp_path):
    (path,) = write(run(tmp_path, [make(DLG, NONE, 0), make(DLG, NONE, 1, status="error")]), {"csv"})
    lines = path.read_text().splitlines()
    assert lines[0] == (
        "trial,dataset,model,defense,attack,threat,image,seed,status,seconds,psnr,mse,reason,objective,evaluations,"
        "group"
    )
    assert len(lines) == 3
    back = pd.read_csv(path)
    assert back["psnr"][0] == 10.0
    assert np.isnan(back["psnr"][1])


def test_a_run_without_results_has_a_report(tmp_path):
    paths = write(run(tmp_path, []))
    assert [p.name for p in paths] == ["results.csv", "report.md"]
    assert "No trial has ended" in paths[1].read_text()


def test_errors_are_one_line(tmp_path):
    with pytest.raises(ForeignRun):
        write(tmp_path)
    run(tmp_path, [make(DLG, NONE, 0)])
    with pytest.raises(BadOption, match="docx"):
        write(tmp_path, {"docx"})
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(LeakbenchError, match=r"results\.csv cannot be written"):
        write(tmp_path)
    assert not list(tmp_path.glob(".*"))


NASTY = "pipe | tick ` <b>&amp; \n| x | $y$ *z* [a](b) 中文 🙈"


def test_whatever_is_in_a_name_stays_in_its_cell(tmp_path):
    attack, defense = named(TinyAttack, "thief")(note=NASTY), named(TinyDefense, "guard")(note=NASTY)
    results = [make(attack, defense, i, status="failed") for i in (0, 1)]
    run(tmp_path, [*results, make(GREY, defense, 0)])
    text = write(tmp_path)[-1].read_text()
    assert "<b>" not in text
    assert "$y$" not in text
    assert "中文 🙈" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


@given(st.text())
def test_escaped_text_is_one_line_and_says_the_same(text):

    escaped = escape(text)
    assert not set("|`<>$*\\~@\n\r") & set(escaped)
    assert html.unescape(escaped) == " ".join("".join(c if c.isprintable() else " " for c in text).split())


def test_names_that_need_no_escape_have_none():
    assert escape("label_correct noise(scale=0.01) [0, 1]") == "label_correct noise(scale=0.01) [0, 1]"
    assert escape("__init__") == "&#95;&#95;init&#95;&#95;"


def test_every_column_is_explained(tmp_path):
    metrics = [*METRICS, named(Score, "paper_psnr", convention="from the RMSE")(), named(Score, "psnr_aligned")()]
    run(tmp_path, crossing(), metrics)
    text = write(tmp_path)[-1].read_text()
    tables, legend = text.split("## How to read this")
    headers = {
        word.strip(" ↑↓")
        for line in re.findall(r"^(\| attack .*)$", tables, re.MULTILINE)
        for word in line.strip("|").split("|")
    }
    assert {"psnr", "lpips_vgg", "paper_psnr", "psnr gain over floor"} <= headers
    for header in headers - {"attack", "defense", "status", "reason", "trials"}:
        assert re.sub("^psnr gain", "gain", header) in legend, header
    assert "mind the &#124; gap" in legend
    assert "leakbench assets fetch lpips-vgg lpips-alex" in legend
    assert "(paper_*)" in tables
    main = re.search(r"^\| attack .*$", tables, re.MULTILINE)
    assert main is not None
    assert "paper_psnr" not in main[0]


def test_the_report_says_what_the_run_was(tmp_path):
    text = write(run(tmp_path, [make(DLG, NONE, 0)]))[-1].read_text()
    assert text.startswith("# Leakage report: x\n")
    for part in ("leakbench run x", "commit abc with uncommitted changes", "cpu, 2 CPU threads", "1 of 1 planned"):
        assert part in text
    assert PRESETS["paper"].describe() in text


def test_sessions_that_differ_are_told(tmp_path):
    one = RunSession(1, provenance(), "a", None)
    source = provenance()
    other = RunSession(2, type(source)(**{**source.__dict__, "version": "0.2", "matrix": "none"}), "b", "c")
    results = frame(tmp_path, [])
    text = markdown(RunData("n", [one, other], results, [PSNR], {}))
    assert "mixes versions" in text
    assert "interrupted" in text
    assert run_name([one], "folder") == "x"
    assert run_name([one, other], "folder") == run_name([], "folder") == "folder"


def test_what_several_starts_share_is_said_once(tmp_path):
    source = provenance()
    gpu = replace(source, device="cuda:0 (H200, CUDA 13)")
    starts = [
        RunSession(i, gpu if i == 4 else source, f"{i:02d}", None if i == 2 else f"{i:02d}x") for i in range(1, 7)
    ]
    results = frame(tmp_path, [])
    facts = dict(RunData("n", starts, results, [PSNR], {}).facts())
    assert facts["time"] == "01 to 06x: 6 starts, 1 of them interrupted"
    assert facts["command"] == source.command
    assert {name for name in facts if name.startswith("device")} == {
        "device, starts 1 to 3 and 5 to 6",
        "device, start 4",
    }
    few = dict(RunData("n", starts[:2], results, [PSNR], {}).facts())
    assert few["time, start 1"] == "01 to 01x"
    assert few["time, start 2"].startswith("02 to an unknown end")


def test_numbers():
    assert number(-0.0001, 2) == "0.00"
    assert number(-1.5, 1) == "−1.5"
    assert number(float("inf"), 2) == "∞"
    assert number(float("nan"), 2) == "–"
    assert with_interval(1.0, float("nan"), float("nan"), 1, sign=True) == "+1.0 [–]"
    assert [decimals(v) for v in ([23.4, 8.0], [0.9, 0.2], [0.16, 0.005], [0.05], [1e-5], [1e7], [])] == [
        2,
        3,
        4,
        4,
        None,
        None,
        2,
    ]


def test_percent_is_0_or_100_for_none_or_all_only():
    shares = (0.0, 1e-9, 0.004, 0.5, 0.985, 0.996, 1 - 1e-9, 1.0)
    assert [percent(share) for share in shares] == ["0 %", "1 %", "1 %", "50 %", "98 %", "99 %", "99 %", "100 %"]


# The grids


def texts(figure) -> list[Text]:
    return [artist for artist in figure.findobj(Text) if artist.get_text()]


def every_label_is_whole(figure) -> None:
    """Assert that every text of a figure lies inside of it, and that none runs into another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # labels of axes have their place from then on
    renderer = canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in texts(figure)]
    for box in boxes:
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
        assert box.y1 <= figure.bbox.y1
    for i, box in enumerate(boxes):
        overlaps = [b for b in boxes[i + 1 :] if min(b.x1, box.x1) > max(b.x0, box.x0) + 1]
        assert all(min(b.y1, box.y1) <= max(b.y0, box.y0) + 3 for b in overlaps)


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_a_grid_of_batches_names_each_one_and_no_label_of_it_is_cut_off(tmp_path, status):
    guards = [named(TinyDefense, "guard")(scale=i) for i in range(3)]
    run(tmp_path, [make(IG, guard, i, 0, 12.3, status=status) for guard in guards for i in range(2)])
    with Store.open(tmp_path / FILE, readonly=True) as store:
        results = store.results()
        results = results.assign(**{grids.BATCH: results["image"], grids.LABEL_COUNTS: 0.75})
        (page,) = grids.pages(results)
        figure = grids.figure(page, store.images(page.trials))
    every_label_is_whole(figure)
    words = [text.get_text().splitlines() for text in texts(figure)]
    assert [own for own in words if own[0] == "batch of"] == [["batch of", "image 0"], ["batch of", "image 1"]]
    assert [own[1] for own in words if len(own) > 1 and own[1].startswith("labels")] == ["labels 0.75"] * 6
    assert "Labels: the share of the batch's labels" in " ".join(" ".join(own) for own in words)


@pytest.mark.filterwarnings("ignore:Glyph")  # boxes for the letters that the font lacks
@pytest.mark.parametrize("note", ["", NASTY, "a-long-name " * 12, "unbroken" * 30])
@pytest.mark.parametrize("images", [(0,), (5, 10**7, 2**62)])
def test_no_label_is_cut_off_or_runs_into_the_next(tmp_path, note, images):
    attacks = [named(TinyAttack, "thief")(note=note, step=i) for i in range(2)]
    defenses = [named(TinyDefense, "guard")(note=note, scale=i) for i in range(3)]
    threat = ThreatModel(reveals=frozenset({"key", "lock"}), informed=True)
    results = [make(a, d, i, 0, 12.3, threat=threat) for a in [GREY, *attacks] for d in defenses for i in images]
    run(tmp_path, results)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        pages = grids.pages(store.results())
        assert {c.defense for p in pages for c in p.columns} >= {r.trial.cell.specs["defense"] for r in results}
        for page in pages:
            every_label_is_whole(grids.figure(page, store.images(page.trials)))


def test_a_grid_shows_the_pixels_and_marks_what_failed(tmp_path):
    results = [make(GREY, NONE, 0), make(DLG, NONE, 0), make(IG, NONE, 0, status="failed")]
    results += [make(DLG, NOISE, 0, status="error"), make(IG, NOISE, 0, status="unsupported"), make(DLG, NONE, 1)]
    run(tmp_path, results)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        (page,) = grids.pages(store.results())
        pictures = store.images(page.trials)
        figure = grids.figure(page, pictures)
        data = saved(figure)
    words = [text.get_text() for text in texts(figure)]
    words = [word for text in words for word in text.splitlines()]
    assert [words.count(w) for w in ("diverged", "error", "unsupported", "not run", "10.0")] == [1, 1, 1, 4, 3]
    assert words.count("grey (floor)") == words.count("dlg") == words.count("ig(step=0.01)") == 1
    image = np.asarray(Image.open(BytesIO(data)))
    assert image.shape[:2] == (round(figure.bbox.height), round(figure.bbox.width))
    truth = np.asarray(Image.open(BytesIO(png(1000, 28)))).repeat(4, 0).repeat(4, 1)
    rows, columns = np.where((image[..., :3] == truth[0, 0]).all(-1))
    assert any(np.array_equal(image[r : r + 112, c : c + 112, :3], truth) for r, c in zip(rows, columns))


def test_a_grid_draws_a_reconstruction_that_a_picture_cannot_hold_aligned_and_says_so(tmp_path):
    scores = [{"psnr": 5.0, "psnr_aligned": 48.0}, {"psnr": 5.0, "psnr_aligned": 9.0}]
    lost, noise = (replace(make(DLG, NONE, i), scores=one, aligned=png(50 + i, 28)) for i, one in enumerate(scores))
    run(tmp_path, [lost, noise], metrics=[*METRICS, metrics.parse("psnr_aligned")])
    with Store.open(tmp_path / FILE, readonly=True) as store:
        (page,) = grids.pages(store.results())
        pictures = store.images(page.trials)
        figure = grids.figure(page, pictures)
    assert [pictures[one.trial.id].aligned for one in (lost, noise)] == [png(50, 28), png(51, 28)]
    words = [text.get_text() for text in texts(figure)]
    assert [word for word in words if "aligned" in word and "dB" not in word] == ["5.0 / 48.0\naligned"]
    assert any("best fit of brightness" in " ".join(word.split()) for word in words)
    drawn = [artist.get_array() for artist in figure.findobj(BboxImage)]
    shown = [any(np.array_equal(one, np.asarray(grids.picture(png(seed, 28)))) for one in drawn) for seed in (50, 51)]
    assert shown == [True, False]  # what is nothing but noise is drawn as it was returned


def test_rows_are_the_first_images_and_wide_tables_go_to_more_pages(tmp_path):
    defenses = [named(TinyDefense, "guard")(scale=i) for i in range(9)]
    results = [make(a, d, i) for a in (DLG, IG) for d in defenses for i in range(20, 0, -1)]
    run(tmp_path, results)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        pages = grids.pages(store.results())
    assert [len(p.columns) for p in pages] == [5, 4, 5, 4]
    assert all(p.images == tuple(range(1, 13)) for p in pages)
    assert len({p.file for p in pages}) == 4
    assert grids.rows_within(pages, [png(0, 28)] * 4) == 12
    assert 1 <= grids.rows_within(pages, [png(0, 128)] * 4) < 12
    assert grids.rows_within(pages, [png(0, 4)] * 4, budget=0) == 1


def test_a_picture_that_cannot_be_read_is_told(tmp_path):
    run(tmp_path, [make(DLG, NONE, 0)])
    with Store.open(tmp_path / FILE, readonly=True) as store:
        (page,) = grids.pages(store.results())
    figure = grids.figure(page, {page.trials[0]: Pictures(b"no png", b"no png")})
    assert "no picture" in [text.get_text() for text in texts(figure)]


def test_large_pictures_are_reduced():
    thumbnail = grids.picture(png(0, 224))
    assert thumbnail is not None
    assert thumbnail.size == (112, 112)


def test_console_tables_show_every_cell(tmp_path):
    attack = named(TinyAttack, "thief")(note="[red]x[/red]")
    results = [*crossing(), make(attack, NONE, 0, status="error"), make(DLG, NONE, 0, threat=PRESETS["known-label"])]
    tables = console_table(summarise(frame(tmp_path, results), [PSNR, MSE]))
    assert len(tables) == 2
    out = Console(width=200, record=True, file=StringIO())
    for table in tables:
        out.print(table)
    text = out.export_text()
    for word in ("grey (floor)", "noise(scale=0.01)", "[red]x[/red]", "1 error", "known-label"):
        assert word in text
    assert console_table(summarise(frame(tmp_path / "empty", []), [PSNR])) == []


def test_the_legend_has_every_option_of_what_was_run(tmp_path):
    run(tmp_path, crossing())
    legend = write(tmp_path)[-1].read_text().split("## How to read this")[1]
    with Store.open(tmp_path / FILE, readonly=True) as store:
        components = store.components()
    assert {component.kind for component in components} == {"dataset", "model", "defense", "attack"}
    for component in components:
        assert any(line.startswith(f"| {component.kind} ") and component.spec in line for line in legend.splitlines())
        for option, value in component.options.items():
            assert f"{option}={json.dumps(value)}" in legend
