"""The page of a run: that it loads nothing, escapes everything, shows what its rules say, and stays small."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import shlex
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import SALT
from PIL import Image
from skimage.color import rgb2lab
from test_engine import no_assets  # noqa: F401
from test_report import DLG, GREY, IG, NOISE, NONE, crossing, make, run
from test_store import METRICS, Score, TinyAttack, TinyData, TinyDefense, TinyModel, named, png, provenance, result

from leakbench.analysis.ensemble import EnsembleResult
from leakbench.analysis.pareto import FILE as STUDY
from leakbench.analysis.pareto import Interval, Point, Study
from leakbench.analysis.reproduce import reproduction
from leakbench.cli.main import main
from leakbench.core.types import PRESETS
from leakbench.errors import BadOption
from leakbench.plan import matrix as matrices
from leakbench.plan.matrix import axes_from_options
from leakbench.plan.trial import BatchMember, Cell, Result, Trial
from leakbench.report import html as pages
from leakbench.report import write
from leakbench.report.page import embedded, render, sentence
from leakbench.report.sprites import SHEET_COLUMNS, sheets
from leakbench.store.records import MetricInfo, Pictures, RunSession, StoredComponent
from leakbench.store.run_file import FILE, Store

NASTY = "</script><script>alert(1)</script><!-- \"'&amp; {{ 7*7 }} \u2028 中文 🙈"
ALIGNED = [named(Score, name, higher_is_better=True, convention="c")() for name in ("psnr_aligned", "ssim_aligned")]


class Tags(HTMLParser):
    """Every element of a page with its attributes, and the text inside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def texts(self, tag: str) -> list[str]:
        return ["".join(text) for name, _, text in self.found if name == tag]

    def data(self) -> Any:
        (text,) = ["".join(text) for tag, attrs, text in self.found if attrs.get("id") == "data"]
        return json.loads(text)


def page(folder: Path, results: list[Result], metrics=METRICS, matrix: str | None = None) -> str:
    run(folder, results, metrics)
    if matrix is not None:
        with Store.open(folder / FILE) as store:
            store.start_session(dataclasses.replace(provenance(), matrix=matrix))
    (path,) = write(folder, {"html"})
    return path.read_text(encoding="utf-8")


def scored(attack, defense, image, value: float, seed: int = 0, status: str = "ok", **changes) -> Result:
    scores = {"psnr": 10 * value, "mse": 1 - value, "psnr_aligned": 20 * value, "ssim_aligned": value}
    return result(
        Trial(Cell(named(TinyData, "d")(), named(TinyModel, "m")(), defense, attack, PRESETS["paper"]), image, seed),
        scores=scores if status in ("ok", "failed") else {},
        status=status,
        reconstruction=png(7 * image + seed, 8) if status in ("ok", "failed") else None,
        truth=png(1000 + image, 8),
        **changes,
    )


# It loads nothing and runs nothing but its own


def test_nothing_is_loaded_and_the_policy_says_so(tmp_path):
    text = page(tmp_path, crossing())
    tags = Tags(text)
    (policy,) = [attrs["content"] for _, attrs, _ in tags.found if attrs.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert set(rules) == {"default-src", "img-src", "style-src", "script-src", "base-uri", "form-action"}
    scripts = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    styles = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    for source, (code,) in (("script-src", scripts), ("style-src", styles)):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert rules[source] == f"'sha256-{digest}'", code[:40]
    for _, attrs, _ in tags.found:
        assert not [name for name in attrs if name.startswith("on") or name in ("style", "src", "srcset", "action")]
        assert str(attrs.get("href", "#")).startswith(("#", "data:,"))
    assert not re.findall(r"@import|url\(|fetch\(|XMLHttp|innerHTML|outerHTML|insertAdjacent|eval\(", text)


def test_whatever_is_in_a_name_is_text(tmp_path):
    attack, defense = named(TinyAttack, "thief")(note=NASTY), named(TinyDefense, "guard")(note=NASTY)
    results = [make(attack, defense, i, status="error") for i in (0, 1)]
    results = [dataclasses.replace(one, reason=NASTY) for one in results]
    text = page(tmp_path, [*results, make(attack, defense, 2), make(GREY, defense, 0)])
    tags = Tags(text)
    data = tags.data()
    scripts = [(attrs, "".join(words)) for tag, attrs, words in tags.found if tag == "script"]
    assert len(scripts) == 2 + len(data["sheets"])
    assert all("alert(1)" not in code for attrs, code in scripts if attrs.get("id") != "data")
    assert NASTY in [options.get("note") for options in data["options"]["defense"]]  # as it was given, nothing run
    assert NASTY in [options.get("note") for options in data["options"]["attack"]]
    assert NASTY in data["trials"]["reasons"]
    assert "<script>alert" not in text


def test_data_survive_being_embedded():
    value = {"a": [NASTY, 1.5, float("nan"), float("inf"), -float("inf"), None, True], "b": "<!--<script>"}
    text = embedded(value)
    assert "<" not in text
    assert json.loads(text) == {"a": [NASTY, 1.5, None, "inf", "-inf", None, True], "b": "<!--<script>"}
    with pytest.raises(Exception, match="undefined"):
        render("report.html.j2", {"title": "x"})


# What it shows


def test_the_worst_case_is_said_in_words(tmp_path, monkeypatch):
    results = [scored(GREY, NONE, i, 0.1) for i in range(20)]
    results += [
        scored(attack, NONE, i, 0.9 if (i % 2 == k) else 0.2) for k, attack in enumerate((DLG, IG)) for i in range(20)
    ]
    results += [scored(attack, NOISE, i, 0.3) for attack in (DLG, IG) for i in range(20)]
    text = page(tmp_path, results, [*METRICS, *ALIGNED])
    words = " ".join(Tags(text).texts("p"))
    assert "The attackers that ran recover least behind “noise(scale=0.01)”: none of 20 images recovered" in words
    assert "They recover most behind “none”: 20 of 20 images" in words
    assert "No adaptive attacker ran: that oblivious attackers recover little does not show" in words
    assert "leaks least" not in words
    assert "Best of the attackers that ran" in " ".join(Tags(text).texts("h2"))
    every = {("d", "m", defense): [] for defense in ("none", "noise(scale=0.01)")}
    monkeypatch.setattr("leakbench.report.scenes.missing_attackers", lambda *_: every)
    text = page(tmp_path / "complete", results, [*METRICS, *ALIGNED])
    assert "The worst case behind each defense" in " ".join(Tags(text).texts("h2"))
    words = " ".join(Tags(text).texts("p"))
    assert "“noise(scale=0.01)” leaks least: none of 20 images recovered (95\xa0% interval up to 16\xa0%)." in words
    assert "“none” leaks most: 20 of 20 images recovered (95\xa0% interval 84 to 100\xa0%)." in words
    assert "overlap" not in words
    assert "dlg: 10, ig(step=0.01): 10" in text
    assert re.search(r"<strong>\+9\.0 \[\+\d\.\d, \+1\d\.\d\]</strong> · dlg, paper", text)


def test_few_images_are_said_to_tell_nothing_apart(tmp_path):
    results = [scored(GREY, NONE, 0, 0.1), scored(DLG, NONE, 0, 0.9), scored(DLG, NOISE, 0, 0.1)]
    words = " ".join(Tags(page(tmp_path, results, [*METRICS, *ALIGNED])).texts("p"))
    assert "the difference is not significant at 1 image." in words


def test_the_gallery_has_the_best_the_median_and_the_worst(tmp_path):
    metric = MetricInfo("ssim_aligned", True, "", "")
    rows = [(i, 0, value) for i, value in enumerate([0.2, 0.9, 0.9, 0.5, 0.1, math.nan])]
    cell = pd.DataFrame(rows, columns=["image", "seed", "ssim_aligned"], index=[10, 11, 12, 13, 14, 15])
    assert pages.chosen(cell, metric) == [11, 13, 14]  # of equals the first image; 3rd of 5; nothing without a score
    assert pages.chosen(cell[:4], metric) == [11, 12, 10]  # the lower of two in the middle
    assert pages.chosen(cell[:2], metric) == [11, 10]
    assert pages.chosen(cell[:1], metric) == [10]
    assert pages.chosen(cell[5:], metric) == []
    assert pages.chosen(cell, dataclasses.replace(metric, higher_is_better=False)) == [14, 13, 12]


def test_every_image_of_a_batch_is_in_the_data(tmp_path):
    members = tuple(
        BatchMember(place, place % 3, png(place, 8), None if place == 2 else png(50 + place, 8), None,
                    {"psnr": 10.0 + place, "psnr_aligned": 12.0 + place})
        for place in range(3)
    )  # fmt: skip
    text = page(tmp_path, [scored(DLG, NONE, 0, 0.9, members=members), scored(IG, NONE, 1, 0.9)], [*METRICS, *ALIGNED])
    data = Tags(text).data()
    own, none = sorted(data["trials"]["members"], key=lambda one: one is None)
    assert none is None
    at = [metric["name"] for metric in data["metrics"]].index("psnr")
    assert [(image, label, scores[at]) for image, label, *_, scores in own] == [(0, 0, 10), (1, 1, 11), (2, 2, 12)]
    places = [(truth, guess) for _, _, truth, guess, *_ in own]
    assert places[2][1] == -1  # none was assigned to it
    assert len({place for pair in places for place in pair if place >= 0}) == 5
    assert all(place >= 0 for pair in places[:2] for place in pair)


def test_every_defense_has_its_strongest_attack_in_the_gallery(tmp_path):
    results = [scored(GREY, NONE, i, 0.5) for i in range(4)]
    results += [scored(DLG, defense, i, 0.3) for defense in (NONE, NOISE) for i in range(4)]
    results += [scored(IG, NONE, i, 0.9) for i in range(4)] + [scored(IG, NOISE, i, 0.1) for i in range(4)]
    data = Tags(page(tmp_path, results, [*METRICS, *ALIGNED])).data()
    first = {(data["axes"]["defense"][row[3]], data["axes"]["attack"][row[4]]) for row in data["galleries"] if row[6]}
    assert first == {("none", "ig(step=0.01)"), ("noise(scale=0.01)", "dlg")}
    assert all(data["trials"]["picture"][i] >= 0 for row in data["galleries"] for i in row[5])


def test_the_matrix_has_the_summary_and_its_colours(tmp_path):
    results = [scored(GREY, NONE, i, 0.5) for i in range(8)]
    results += [scored(DLG, NONE, i, 0.9) for i in range(8)] + [scored(IG, NONE, i, 0.65) for i in range(8)]
    results += [scored(DLG, NOISE, i, 0.1) for i in range(8)]
    data = Tags(page(tmp_path, results, [*METRICS, *ALIGNED])).data()
    at = [metric["name"] for metric in data["metrics"]].index("ssim_aligned")
    cells = {
        (data["axes"]["attack"][row[4]], data["axes"]["defense"][row[3]]): row[11 + 8 * at : 19 + 8 * at]
        for row in data["cells"]
    }
    assert cells["dlg", "none"] == [0.9, 0.9, 0.9, 8, 0.4, 0.4, 0.4, 2]
    assert cells["ig(step=0.01)", "none"] == [0.65, 0.65, 0.65, 8, 0.15, 0.15, 0.15, 1]
    assert cells["dlg", "noise(scale=0.01)"][-1] == -1
    assert cells["grey", "(any)"][4:] == [None, None, None, 0]
    assert [pages._whole(name) for name in ("psnr_aligned", "ssim", "label_correct", "mse")] == [40, 1, 1, math.inf]
    assert pages._step(0.0038, 1.0) == 1  # however large the largest gain of the run is
    assert pages._step(5.0, math.inf) == 0
    assert [pages._step(value, 4.0) for value in (math.nan, -1, 0, 0.5, 1, 2.5, 4, math.inf)] == [
        0,
        -1,
        0,
        1,
        2,
        3,
        4,
        4,
    ]


STRANGE = {
    "nothing ran": ([], METRICS),
    "one trial": ([scored(DLG, NONE, 0, 0.5)], [*METRICS, *ALIGNED]),
    "floors alone": ([scored(GREY, NONE, 0, 0.5)], [*METRICS, *ALIGNED]),
    "all failed": ([scored(DLG, NONE, i, 0.2, status="failed") for i in range(3)], [*METRICS, *ALIGNED]),
    "all broke": ([scored(DLG, NONE, i, 0.2, status="error") for i in range(3)], [*METRICS, *ALIGNED]),
    "no metric": ([dataclasses.replace(scored(DLG, NONE, 0, 0.5), scores={})], []),
    "infinite": ([make(a, NONE, i, psnr=math.inf if i else 5.0) for a in (GREY, DLG) for i in range(3)], METRICS),
    "a broken picture": ([dataclasses.replace(scored(DLG, NONE, 0, 0.5), reconstruction=b"no")], [*METRICS, *ALIGNED]),
}


@pytest.mark.parametrize("case", STRANGE)
def test_every_run_has_a_page(tmp_path, case):
    results, metrics = STRANGE[case]
    text = page(tmp_path, results, metrics)
    shown = " ".join("".join(words) for tag, _, words in Tags(text).found if tag not in ("script", "style"))
    assert not re.search(r"\b(nan|None)\b", shown)
    data = Tags(text).data()
    assert len(data["trials"]["id"]) == len(results)
    assert all(len(column) == len(results) for column in data["trials"]["scores"])
    first = (tmp_path / "report.html").read_bytes()
    assert write(tmp_path, {"html"})[0].read_bytes() == first


def test_a_run_that_skipped_shows_who_recovered_what(tmp_path):
    results = [scored(DLG, NONE, 0, 0.9), scored(IG, NONE, 1, 0.9), scored(DLG, NONE, 1, 0.1)]
    text = page(tmp_path, results, [*METRICS, *ALIGNED], matrix='{"name": "w", "threshold": 0.6}')
    assert "dlg: 1, ig: 1" in text
    assert "What each attacker did" in text
    assert "strongest attacker's gain" not in text
    assert matrices.load_suite("worst-case")["threshold"] == pages.RECOVERED


def test_images_are_counted_where_each_has_one_seed() -> None:
    one = EnsembleResult("d", "m", "none", 4, 4, 4, 0, share=0.25, low=0.1, high=0.6, attackers=())
    assert sentence("share.j2", "share", one) == "1 of 4"
    grouped = dataclasses.replace(one, groups=2, targets=5, by_floor=1)
    assert sentence("share.j2", "share", grouped) == "1 of 4 in 2 groups"
    assert (
        sentence("share.j2", "share", dataclasses.replace(one, targets=8)) == "25 %"
    )  # two images may be recovered from half of the seeds
    assert sentence("share.j2", "share", dataclasses.replace(one, share=math.nan)) == "no attacker has a score"


# Pictures


def test_tiles_are_the_pictures():
    colour = [png(i, 5) for i in range(20)]
    grey = BytesIO()
    Image.fromarray(np.arange(25, dtype=np.uint8).reshape(5, 5)).save(grey, "png")
    made, places = sheets([*colour, grey.getvalue(), colour[3], b"broken"])
    assert len(made) == 2
    assert places[3] == places[21]
    assert places[22] is None
    assert Image.open(BytesIO(made[1].png)).mode == "L"
    for data, place in zip([*colour, grey.getvalue()], places):
        assert place is not None
        sheet, at = place
        x, y = at % SHEET_COLUMNS * 5, at // SHEET_COLUMNS * 5
        shown = Image.open(BytesIO(made[sheet].png)).convert("RGB").crop((x, y, x + 5, y + 5))
        assert np.array_equal(shown, Image.open(BytesIO(data)).convert("RGB"))


def test_large_pictures_are_reduced_and_many_fill_several_sheets():
    made, places = sheets([png(0, 300), *(png(1 + i, 2) for i in range(300))])
    assert (made[0].width, made[0].height) == (100, 100)
    assert len(made) == 3
    assert places[300] == (2, 43)


def test_a_page_stays_below_its_limit_and_says_what_it_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MAX_PAGE_BYTES", pages._CODE_BYTES + 60_000)
    monkeypatch.setattr(pages, "_MAX_DRAWN", 0)
    results = [scored(attack, NONE, i, i / 60) for attack in (GREY, DLG, IG) for i in range(60)]
    text = page(tmp_path, results, [*METRICS, *ALIGNED])
    assert len(text.encode()) < pages.MAX_PAGE_BYTES
    data = Tags(text).data()
    places = data["trials"]["picture"]
    assert f"{places.count(-2)} of 180 trials are shown without their picture" in text
    assert 9 <= 180 - places.count(-2) < 180
    assert all(places[i] >= 0 for row in data["galleries"] for i in row[5])
    kept = [data["trials"]["image"][i] for i, place in enumerate(places) if place >= 0]
    assert {0, 1, 2} <= set(kept)


def test_a_thousand_pictures_of_noise_fit(tmp_path):
    """What compresses worst: the page's own estimate of a picture's size holds within a few per cent."""
    pictures = [png(i, 32) for i in range(256)]
    made, _ = sheets(pictures)
    assert sum(len(sheet.png) for sheet in made) <= sum(map(len, pictures))
    assert 2000 * len(made[0].png) / 256 * 4 / 3 + pages._CODE_BYTES < 0.95 * pages.MAX_PAGE_BYTES


# The command that makes a trial again


@pytest.mark.long
def test_the_command_makes_the_same_trial(tmp_path, monkeypatch, capsys, no_assets):  # noqa: F811
    def leakbench(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["leakbench", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0, capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    axes = ["--attack", "ig(steps=1, lr=0.02)", "--defense", "none", "--defense", "keylock(length=9)"]
    rest = ["--threat", "labels=known, reveals=key", "--images", "5,", "--seeds", "3,"]
    leakbench("run", "matrix", *axes, "--model", "lenet", "--dataset", "samples", *rest, "--out", "first")
    with Store.open(Path("first") / FILE, readonly=True) as store:
        results, components, sessions = store.results(), store.components(), store.sessions()
    data = Tags(Path(write("first", {"html"})[0]).read_text()).data()["trials"]
    for attack, defense in (("grey", "none"), ("ig(steps=1, lr=0.02)", "keylock(length=9)")):
        trial = results[(results["attack"] == attack) & (results["defense"] == defense)].iloc[0]
        command = reproduction(trial, components, sessions).command(trial["trial"], [5], 3)
        head, tail, note = data["commands"][data["again"][data["id"].index(trial["trial"])]]
        assert command == head + tail.format(image=5, seed=3, trial=trial["trial"])
        assert ("keylock(length=9) runs too" in note) == (defense == "none")
        leakbench(*shlex.split(command)[1:])
        with Store.open(Path(f"runs/again-{trial['trial']}") / FILE, readonly=True) as store:
            same = store.results().set_index("trial")
        assert len(same) == 1 + (defense == "none")
        assert same.loc[trial["trial"], "psnr"] == pytest.approx(trial["psnr"], abs=1e-3)


def test_commands_of_strange_trials():
    session = RunSession(
        1, dataclasses.replace(provenance(), command="leakbench run matrix --plugin 'my file.py'"), "", ""
    )
    gpu = RunSession(2, dataclasses.replace(provenance(), command="run('", device="cuda:0 (H200, CUDA 13)"), "", "")
    known = [
        StoredComponent("dataset", "samples", 1, {}),
        StoredComponent("model", "lenet", 1, {}),
        StoredComponent("attack", 'a(note="it\'s; rm -rf /")', 1, {}),
        StoredComponent("defense", "guard [settings 0a1b2c]", 1, {"scale": 0.5, "on": True, "file": None, "n": [1, 2]}),
    ]
    known[3] = dataclasses.replace(known[3], variant="settings 0a1b2c")
    cell = {one.kind: one.spec for one in known} | {"threat": "labels=known, informed=true"}
    made = reproduction(cell, known, [session, gpu])
    words = shlex.split(made.command("ab12", [7], 1))
    assert words[:5] == ["leakbench", "run", "matrix", "--plugin", "my file.py"]
    assert words[words.index("--attack") + 1] == 'a(note="it\'s; rm -rf /")'
    assert words[words.index("--defense") + 1] == "guard(scale=0.5, on=true, file=none, n=[1, 2])"
    assert words[-11:] == [
        "--images",
        "7,",
        "--seeds",
        "1,",
        "--no-floors",
        "--device",
        "cuda",
        "--salt",
        "",
        "--out",
        "runs/again-ab12",
    ]
    assert not made.note
    older = dataclasses.replace(known[3], spec="guard [version 1]", variant="version 1")
    assert "version 1" in reproduction({**cell, "defense": older.spec}, [*known[:3], older], []).note
    network = StoredComponent("model", "module(label=Net)", 1, {"label": "Net", "module": "0" * 16})
    python = reproduction({**cell, "model": network.spec}, [*known, network], [])
    assert python.command("ab12", [7], 1).startswith("leakbench.run(leakbench.Matrix(attacks=[")
    assert "models=[network]" in python.command("ab12", [7], 1)
    compile(python.command("ab12", [7], 1), "command", "eval")
    salted = RunSession(3, dataclasses.replace(provenance(), salt=SALT), "", "")
    assert shlex.split(reproduction(cell, known, [salted]).command("ab12", [7], 1))[-4:-2] == ["--salt", SALT]
    python = reproduction({**cell, "model": network.spec}, [*known, network], [salted])
    assert python.command("ab12", [7], 1).endswith(f", salt={SALT!r})")
    assert "given in Python" in python.note


def test_one_index_is_a_number_with_a_comma():
    assert axes_from_options({"images": ["3,"], "seeds": ["0,"]}) == {"images": [3], "seeds": [0]}
    assert axes_from_options({"images": ["3"], "seeds": ["0,2"]}) == {"images": 3, "seeds": [0, 2]}
    with pytest.raises(BadOption, match="such as 0,3,5"):
        axes_from_options({"images": [","]})


# Utility


def point(label: str, utility: float, leakage: float) -> Point:
    return Point(
        label=label,
        utility=Interval(value=utility, low=utility - 0.02, high=min(1, utility + 0.02)),
        leakage=Interval(value=leakage, low=0.0, high=1.0),
    )


def test_the_front_has_what_no_other_point_beats():
    points = [
        point("a", 0.9, 0.9),
        point("b", 0.8, 0.2),
        point("c", 0.7, 0.3),
        point("d", 0.5, 0.0),
        point("e", 0.8, 0.2),
    ]
    study = Study(title="t", utility="u", leakage="l", points=tuple(points))
    assert [one.label for one in study.front()] == ["d", "b", "e", "a"]


def test_a_study_beside_the_run_is_shown(tmp_path):
    run(tmp_path, [make(DLG, NONE, 0)])
    points = [point("none", 0.9, 0.9), point("noise <i>", 0.5, 0.1)]
    study = {"title": "t", "utility": "accuracy", "leakage": "recovered", "points": [p.model_dump() for p in points]}
    (tmp_path / STUDY).write_text(json.dumps({"studies": [study]}))
    text = write(tmp_path, {"html"})[0].read_text()
    assert "Utility against leakage" in text
    assert "noise &lt;i&gt;" in text
    (src,) = [str(attrs["src"]) for tag, attrs, _ in Tags(text).found if tag == "img"]
    kind, _, data = src.partition(";base64,")
    assert kind == "data:image/svg+xml"
    assert b"<svg" in base64.b64decode(data)
    text = '{"studies": [{"title": "t", "utility": "x", "leakage": "y", "points": [{"label": "a"}]}]}'
    (tmp_path / STUDY).write_text(text)
    with pytest.raises(BadOption, match=r"studies\.0\.points\.0\.utility"):
        write(tmp_path, {"html"})


# Colours

WHITE_BLIND = {  # Machado, Oliveira and Fernandes 2009, severity 1
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def colours(theme: int) -> dict[str, np.ndarray]:
    text = (Path(pages.__file__).parent / "pages" / "style.css").read_text()
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", text)
    return {name: np.array([int(both[theme][i : i + 2], 16) / 255 for i in (1, 3, 5)]) for name, *both in found}


def linear(colour: np.ndarray) -> np.ndarray:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read_in_both_themes(theme):
    known = colours(theme)
    for ground in ("page", "surface", "raised", "gain-below", "gain-1", "gain-2", "gain-3"):
        assert contrast(known["ink"], known[ground]) >= 4.5, ground
    assert contrast(known["gain-4-ink"], known["gain-4"]) >= 4.5
    for ground in ("page", "surface", "raised"):
        assert contrast(known["muted"], known[ground]) >= 4.5, ground
        assert contrast(known["accent"], known[ground]) >= 4.5, ground
        assert contrast(known["leak"], known[ground]) >= 3, ground


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("blind", [None, *WHITE_BLIND])
def test_the_steps_of_the_gain_are_told_apart_by_all(theme, blind):
    known = colours(theme)
    steps = [known[name] for name in ("gain-below", "surface", "gain-1", "gain-2", "gain-3", "gain-4")]
    if blind is not None:
        seen = np.clip(np.array([linear(step) for step in steps]) @ np.array(WHITE_BLIND[blind]).T, 0, 1)
        steps = list(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    lab = rgb2lab(np.array(steps)[None])[0]
    for i in range(len(lab)):
        for j in range(i):
            assert np.linalg.norm(lab[i] - lab[j]) > 5, (i, j)


def test_batches_of_the_galleries_come_first_and_leave_room_to_other_trials() -> None:
    once = pd.DataFrame({"trial": list("abc"), "image": [0, 4, 8], "seed": 0})
    noise = np.random.default_rng(0)

    def picture() -> bytes:
        file = BytesIO()
        Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    pictures = {trial: Pictures(picture(), picture(), None) for trial in once["trial"]}
    members = {
        row: [pages._Member(image, 0, [], Pictures(picture(), picture(), None), (1.0, 1.0)) for image in range(4)]
        for row in range(3)
    }
    room = 8.5 * len(picture())  # for six pictures: two of the gallery, half of four of its batch, and two of another
    gallery = [[0, 0, 0, 0, 0, [2]]]
    _, places = pages._sprites(once, gallery, lambda own: {t: pictures[t] for t in own}, int(room), members)
    assert [place >= 0 for place in places["picture"]] == [True, False, True]
    assert [sum(place >= 0 for row in own for place in row[2:4]) for own in places["members"]] == [0, 0, 2]
