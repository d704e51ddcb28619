"""The page of a run in a real browser: what a reader clicks, types and drags, in both themes and on a phone."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_html import ALIGNED, NASTY, scored
from test_report import DLG, GREY, IG, MEAN, NOISE, NONE, make, run
from test_store import METRICS, TinyAttack, TinyDefense, named, png

from leakbench.analysis.ensemble import AttackerStats, EnsembleResult
from leakbench.audit.fail_rule import FailRule
from leakbench.audit.findings import Audit, DefenseFindings, ImageFinding, NetworkFacts
from leakbench.audit.layers import ClosedForm, ClosedFormLeaks, InferredLabels, LayerShare
from leakbench.core.loss_curve import Curve, marks
from leakbench.core.types import PRESETS
from leakbench.report import audit, leaderboard, write

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("default")]

IMAGES = 8
STRANGE = named(TinyDefense, "guard")(note=NASTY)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path is not None, "there is no chromium on the PATH"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with two attacks behind three defenses, one of which tries to break out of its name."""
    folder = tmp_path_factory.mktemp("run")
    leaks = {NONE: 0.95, NOISE: 0.5, STRANGE: 0.2}
    results = [scored(floor, NONE, i, 0.3) for floor in (GREY, MEAN) for i in range(IMAGES)]
    results += [
        scored(
            attack,
            defense,
            i,
            leak - 0.02 * i - (0.1 if attack is IG else 0),
            status="failed" if i == 7 else "ok",
            objective=0.25,
            curve=Curve(300, 1, torch.logspace(2, -1, len(marks(300)))[None]).rows()[0],
        )
        for defense, leak in leaks.items()
        for attack in (DLG, IG)
        for i in range(IMAGES)
    ]
    run(folder, results, [*METRICS, *ALIGNED])
    return write(folder, {"html"})[0]


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end nothing may have been asked of a network, nor complained of in the console."""
    contexts, asked, said = [], [], []

    def route(request: Any) -> None:
        if request.request.url.startswith("file:"):
            request.continue_()
        else:
            asked.append(request.request.url)
            request.abort()

    def open_(path: Path, width: int = 1280, height: int = 900, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        context.route("**/*", route)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on(
            "request", lambda request: None if request.url.startswith(("file:", "data:")) else asked.append(request.url)
        )
        page.goto(path.as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert asked == []
    assert said == []


def unfolded(page: Any) -> Any:
    """Open the fold of the matrix."""
    page.locator("#matrix-fold").evaluate("fold => { fold.open = true; }")
    return page


def column(page: Any, number: int) -> list[str]:
    return page.locator(f"#matrix-table tbody td:nth-child({number})").all_inner_texts()


def first_numbers(texts: list[str]) -> list[float]:
    return [float(text.split()[0].replace("−", "-").replace("+", "")) for text in texts if text.strip() != "floor"]


def test_the_matrix_sorts_by_a_click_and_by_the_keyboard(opened, report):
    page = unfolded(opened(report))
    head = page.locator("#matrix-table thead th").all_inner_texts()
    gain = next(k for k, text in enumerate(head) if text == "gain")
    button = page.locator("#matrix-table thead th").nth(gain).locator("button")
    button.click()
    found = first_numbers(column(page, gain + 1))
    assert len(found) == 6
    assert found == sorted(found, reverse=True)
    assert page.locator("#matrix-table thead th").nth(gain).get_attribute("aria-sort") == "descending"
    button.focus()
    page.keyboard.press("Enter")
    again = first_numbers(column(page, gain + 1))
    assert again == sorted(found)
    assert column(page, gain + 1)[-2:] == ["floor", "floor"]  # what has no value comes last, in both directions
    page.locator("#matrix-table thead th button").first.click()
    assert column(page, 1)[0].startswith("dlg")


def test_a_tab_shows_one_metric_of_the_matrix(opened, report):
    page = opened(report)
    assert not page.locator("#matrix-table").is_visible()
    page.locator("#matrix-fold summary").click()
    heads = page.locator("#matrix-table thead th")
    chosen = page.locator("#columns [aria-selected=true]")
    assert chosen.inner_text() == "ssim_aligned ↑"
    assert heads.all_inner_texts()[:4] == ["attack", "defense", "ssim_aligned ↑", "gain"]
    page.locator("#columns button", has_text="psnr ↑").first.click()
    assert heads.all_inner_texts()[2] == "psnr ↑"
    page.keyboard.press("ArrowLeft")
    assert chosen.count() == 1
    assert heads.all_inner_texts()[2] == chosen.inner_text() != "psnr ↑"
    page.locator("#columns button", has_text="several").click()
    assert len([text for text in heads.all_inner_texts() if text[-1] in "↑↓"]) > 1


def test_filters_narrow_the_matrix_the_galleries_and_the_trials(opened, report):
    page = unfolded(opened(report))
    assert page.locator("#matrix-table tbody tr").count() == 8
    page.locator("#filter-defense").select_option(label="noise(scale=0.01)")
    assert page.locator("#matrix-table tbody tr").count() == 2
    assert page.locator("#gallery-list .cell").count() == 1
    assert page.locator("#trials-count").inner_text() == "16 of 64 trials"
    page.locator("#filter-attack").select_option(label="dlg")
    page.locator("#filter-status").select_option(label="failed")
    assert page.locator("#trials-list figure").count() == 1
    assert "diverged" in page.locator("#trials-list figcaption").inner_text()
    page.locator("#filters button").click()
    page.locator("#filter-text").fill("ig gua")
    assert page.locator("#matrix-table tbody tr").count() == 1
    page.locator("#filter-text").fill("nothing of this name")
    assert page.locator("#matrix-count").inner_text() == "0 of 8 cells"


def test_a_picture_opens_its_trial_and_escape_closes_it(opened, report):
    page = opened(report)
    page.locator("#gallery-list .open").first.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog#trial")
    assert dialog.is_visible()
    text = dialog.inner_text()
    for part in (
        "Settings and threat model",
        "An honest-but-curious server",
        "ssim_aligned ↑",
        "0.50 s",
        "2.50e−1 at the end",
    ):
        assert part in text, part
    drawn = dialog.locator("svg.course")
    assert drawn.get_attribute("aria-label").startswith("Objective over evaluations: 1.00e+2 at 1, 1.00e−1 at 300")
    assert len(drawn.locator("polyline").get_attribute("points").split()) == len(marks(300))
    command = page.locator("#trial-command").inner_text()
    trial = dialog.locator("dd code").first.inner_text()
    assert command.startswith("leakbench run matrix --attack")
    assert command.endswith(f"runs/again-{trial}")
    assert page.url.endswith(f"#trial={trial}")
    dialog.locator("#trial-close").focus()
    page.keyboard.press("ArrowRight")
    assert dialog.locator("dd code").first.inner_text() != trial
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.wait_for_function("!location.hash")  # the dialog's event of closing comes after it is gone
    page.goto(f"{page.url.partition('#')[0]}#trial={trial}")
    assert dialog.locator("dd code").first.inner_text() == trial


def test_the_slider_moves_the_edge_between_truth_and_reconstruction(opened, report):
    page = opened(report)
    page.locator("#gallery-list .open").first.click()
    slider = page.locator("dialog input[type=range]")
    shown = page.locator("dialog .compare canvas").nth(1)
    before = shown.evaluate("one => one.style.clipPath")
    slider.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "55"
    assert page.locator("dialog#trial").is_visible()
    after = shown.evaluate("one => one.style.clipPath")
    assert "45%" in after
    assert after != before
    page.keyboard.press("Escape")
    page.locator("#gallery-view").select_option("slider")
    cards = page.locator("#gallery-list .slider input")
    assert cards.count() == 9
    cards.first.fill("100")
    assert "0%" in page.locator("#gallery-list .compare canvas").nth(1).evaluate("one => one.style.clipPath")


def test_pictures_are_those_of_the_run(opened, report):
    """The pixels on the screen are the private image's and the reconstruction's."""
    from io import BytesIO

    from PIL import Image
    from test_store import png

    page = opened(report)
    page.locator("#filter-defense").select_option(label="none")
    page.locator("#filter-attack").select_option(label="dlg")
    canvases = page.locator("#trials-list canvas")
    page.wait_for_timeout(300)
    for k, seed in ((0, 1000), (1, 0), (6, 1003), (7, 21)):
        pixels = canvases.nth(k).evaluate("one => [...one.getContext('2d').getImageData(0, 0, 8, 8).data]")
        expected = np.asarray(Image.open(BytesIO(png(seed, 8))))
        assert np.array_equal(np.array(pixels).reshape(8, 8, 4)[..., :3], expected)


def test_names_stay_text(opened, report):
    page = opened(report)
    assert page.evaluate("document.querySelectorAll('script').length") == 3  # the data, a sheet, the page's own
    assert "alert(1)" in page.locator("#worst").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(opened, report, scheme):
    page = opened(report, color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    colours = {"light": "rgb(250, 249, 246)", "dark": "rgb(18, 20, 24)"}
    assert page.evaluate(ground) == colours[scheme]
    button = page.locator("#theme")
    for name in ("light", "dark"):
        button.click()
        assert page.evaluate(ground) == colours[name]
    page.reload()
    assert page.evaluate(ground) == colours["dark"]
    button.click()
    assert page.evaluate(ground) == colours[scheme]


def test_everything_fits_a_phone_and_paper(opened, report):
    page = opened(report, width=390, height=844, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#gallery-list .open").first.tap()
    box = page.locator("dialog#trial").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.keyboard.press("Escape")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert not page.locator("#filters").is_visible()
    assert page.locator("#matrix-table").is_visible()
    assert page.pdf().startswith(b"%PDF")


FOCUS = """(() => {
  const one = document.activeElement;
  return [one.id || one.textContent.trim().slice(0, 20), getComputedStyle(one).outlineStyle];
})()"""
UNNAMED = """[...document.querySelectorAll('button, input, select')]
  .filter((one) => !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length))
  .map((one) => one.outerHTML)"""


def test_every_control_can_be_reached_and_shows_that_it_is(opened, report):
    page = opened(report)
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUS))
    names = [name for name, _ in reached]
    assert names[0] == "Skip to the content"
    for control in ("theme", "filter-text", "filter-defense", "filter-status", "Clear"):
        assert control in names
    assert all(style != "none" for _, style in reached)
    assert page.evaluate(UNNAMED) == []


def test_a_large_run_is_paged(opened, tmp_path):
    defenses = [named(TinyDefense, f"defense{i}")() for i in range(110)]
    results = [make(DLG, defense, i) for defense in defenses for i in range(2)]
    page = opened(write(run(tmp_path, results), {"html"})[0])
    assert page.locator("#matrix-table tbody tr").count() == 100
    page.locator("#matrix-pages button", has_text="next").click()
    assert page.locator("#matrix-table tbody tr").count() == 10
    assert page.locator("#trials-list figure").count() == 48
    page.locator("#trials-pages button", has_text="last").click()
    assert page.locator("#trials-list figure").count() == 220 % 48
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#matrix-table tbody tr").count() == 110


@pytest.mark.parametrize("case", ["nothing", "one", "broken", "infinite", "bare"])
def test_strange_runs_open_without_a_complaint(opened, tmp_path, case):
    attack = named(TinyAttack, "thief")(note=NASTY)
    results, metrics = {
        "nothing": ([], METRICS),
        "one": ([scored(attack, STRANGE, 0, 0.5)], [*METRICS, *ALIGNED]),
        "broken": ([scored(attack, STRANGE, i, 0.5, status="error") for i in range(2)], [*METRICS, *ALIGNED]),
        "infinite": ([make(a, NONE, i, psnr=math.inf if i else 5.0) for a in (GREY, DLG) for i in (0, 1)], METRICS),
        "bare": ([make(DLG, NONE, 0)], METRICS),
    }[case]
    page = opened(write(run(tmp_path, results, metrics), {"html"})[0])
    assert page.locator("h1").inner_text() == "x"
    if results:
        page.locator("#trials-list .open").first.click()
        assert page.locator("dialog#trial").is_visible()


def found(defense: str, share: float) -> DefenseFindings:
    """The findings of an audit behind a defense, with names that try to break out of their places."""
    images = 4
    pictures = [
        ImageFinding(i, png(1000 + i, 16), png(i, 16) if i else None, NASTY, 0.9, 20.0, i < share * images)
        for i in range(images)
    ]
    attackers = [AttackerStats(NASTY, images, round(share * images), 0, 0, 0, {NASTY: 1}, 1234, 5.6)]
    layers = [LayerShare(f"block{i}.{NASTY}", "Conv2d", 100, 0, 1 / 40) for i in range(40)]
    forms = [ClosedForm("fc", 512, images, 1e-7, True, 1e-6, False, False)]
    return DefenseFindings(
        result=EnsembleResult("data", "model", defense, images, images, images, 0, share, 0.0, 0.9, tuple(attackers)),
        leaks=ClosedFormLeaks(tuple(layers), tuple(forms), InferredLabels((1, 2, 3, 0), 4)),
        note=NASTY,
        floor=0.0,
        scores={},
        pictures=tuple(pictures),
        warnings=(NASTY,),
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_an_audit_fits_and_stays_text(opened, tmp_path, scheme, width):
    behind = (found("none", 0.75), found(f"noise {NASTY}", 0.0))
    facts = NetworkFacts(5, 2, (3, 16, 16), True, 0, 0)
    threats = ((PRESETS["paper"], True),)
    audited = Audit(
        NASTY, (("model", NASTY),), facts, 4, NASTY, ((NASTY,),), threats, behind, (NASTY,), ((NASTY, NASTY),), 0.6
    )
    path = tmp_path / "audit.html"
    path.write_text(
        audit.html(dataclasses.replace(audited, rule=FailRule("recovered", ">", 0.1)), f"leakbench {NASTY}")
    )
    page = opened(path, width=width, color_scheme=scheme)
    assert "is true (none: 0.75;" in page.locator("#verdict").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("figure.recovered").count() == 3
    assert page.locator("figure img").count() == 2 * (4 + 3)
    assert page.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth === 16)")
    assert page.evaluate("document.querySelectorAll('script').length") == 1
    assert "alert(1)" in page.locator("#untried").inner_text()
    page.locator("nav a", has_text="Not tried").click()
    assert page.url.endswith("#untried")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_a_leaderboard_sorts_and_names_what_is_left_out(opened, tmp_path, width):
    more = [*METRICS, *ALIGNED]
    results = [scored(DLG, defense, i, leak) for defense, leak in ((NONE, 0.9), (STRANGE, 0.2)) for i in range(4)]
    results += [scored(DLG, NOISE, i, 0.3, status="error" if i else "ok") for i in range(2)]
    run(tmp_path / "run", results, more)
    paths, missing = leaderboard.write([tmp_path / "run"], tmp_path / "board")
    assert len(paths) == 2 + 2
    assert len(missing) == 1
    page = opened(tmp_path / "board" / "index.html", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert "noise(scale=0.01)" in page.locator("#missing").inner_text()
    cells = page.locator("table.sortable tbody td:first-child")
    assert [text.startswith("none") for text in cells.all_inner_texts()] == [False, True]
    for order in ([False, True], [True, False]):
        page.locator("table.sortable thead button").nth(1).click()
        assert [text.startswith("none") for text in cells.all_inner_texts()] == order
    assert page.locator("table.sortable tbody a").first.get_attribute("href").startswith("entries/")
    assert "alert(1)" in page.locator("table.sortable").inner_text()
