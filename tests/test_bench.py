"""The benchmarks: arithmetic, one-at-a-time loops, tables, a smoke run, and slopes. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import close
from torch.nn import functional as F
from torch.nn import grad

import leakbench
from benchmarks import slope
from benchmarks.readme import filled
from benchmarks.scale import measure as scale
from benchmarks.scale import page
from benchmarks.speed import __main__ as command
from benchmarks.speed import choices, measure, numba_maps, parity, peer, reference, report
from benchmarks.speed.measure import Subject, Times
from benchmarks.speed.work import (
    BREACHING,
    CLASSES,
    LATENT,
    LEAKBENCH,
    REFERENCE,
    Ending,
    Growth,
    Plan,
    Work,
    flops,
    generator,
    groups_of,
    scene,
)
from leakbench.analysis.statistics import wilson_interval
from leakbench.attacks.grnn import layout

ROOT = Path(__file__).resolve().parent.parent
SPEED = ROOT / "reports" / "speed"


def times(short_s: list[float], long_s: list[float], trials: int = 4, short: int = 2, long: int = 12) -> Times:
    return {"trials": trials, "short": short, "long": long, "short_s": short_s, "long_s": long_s}


# arithmetic


def test_what_a_run_costs_once_is_not_in_the_time_of_an_iteration() -> None:
    # 4 trials, 3 s once and 0.25 s an iteration of a trial
    assert measure.per_iteration(times([5.0], [15.0])) == [0.25]
    assert measure.set_up(times([5.0], [15.0])) == 3.0


def test_a_round_that_noise_has_spoilt_is_left_out() -> None:
    seconds = measure.per_iteration(times([5.0, 5.0, 1.0], [15.0, 4.0, 21.0]))
    assert seconds == [0.25, None, 0.5]
    assert measure.median(seconds) == 0.375
    assert measure.median([None]) is None


def test_the_ratio_is_one_of_medians_and_its_spread_one_of_rounds() -> None:
    found = measure.ratio([8.0, 9.0, 40.0, 5.0], [2.0, 1.0, 4.0, None])
    assert found == measure.Ratio(8.5 / 2.0, 4.0, 10.0)
    assert measure.ratio([None], [1.0]) is None


def test_the_share_of_the_floor() -> None:
    assert report.floor_share(100, [50.0, 200.0], [4.0, 1.0]) == 0.5
    assert report.floor_share(None, [50.0], [4.0]) is None


def test_subjects_take_turns_and_each_is_warmed_up_once() -> None:
    calls: list[tuple[str, int]] = []

    def subject(name: str) -> Subject:
        return Subject(name, 1, 2, 5, lambda steps: calls.append((name, steps)))

    found, rates = measure.interleave([subject("a"), subject("b")], 2, torch.device("cpu"), lambda device: 7.0)
    assert rates == [7.0, 7.0]
    assert calls == [
        ("a", 2),
        ("b", 2),
        *[("a", 2), ("a", 5), ("b", 2), ("b", 5)],
        *[("b", 2), ("b", 5), ("a", 2), ("a", 5)],
    ]
    assert len(found["a"]["short_s"]) == len(found["b"]["long_s"]) == 2


def test_the_floor_counts_seven_forward_passes_and_five_of_the_first_layer() -> None:
    # multiplications and additions of LeNet's convolutions and its classifier
    layers = [12 * 16**2 * 3 * 25, 12 * 8**2 * 12 * 25, 12 * 8**2 * 12 * 25, 12 * 8**2 * 10]
    assert flops(Work("ig", "lenet", 1, 1, 2), scene("ig", "lenet", 1, 32, "cpu")) == 2 * (
        7 * sum(layers) - 2 * layers[0]
    )


# the one-at-a-time loops do the same work


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("model", ["lenet", "resnet20"])
def test_the_reference_of_ig_does_what_leakbench_does(model: str) -> None:
    where = scene("ig", model, 2, 32, "cpu", dtype=torch.float64)
    batched = leakbench.attack("ig(steps=4)", where.observation)
    for trial in range(2):
        label = where.labels[trial : trial + 1]
        found = reference.ig(where.network, where.observed(trial), label, where.start(trial)[0], steps=4)
        close(found.image, batched.images[trial : trial + 1], 1e-6)


@pytest.mark.usefixtures("float64")
def test_the_reference_of_dlg_does_what_leakbench_does() -> None:
    where = scene("dlg", "lenet", 2, 32, "cpu", dtype=torch.float64)
    batched = leakbench.attack("dlg(steps=1)", where.observation)
    assert batched.evaluations is not None
    for trial in range(2):
        found = reference.dlg(where.network, where.observed(trial), *where.start(trial), steps=1)
        close(found.image, batched.images[trial : trial + 1], 1e-2)
        assert abs(found.evaluations - int(batched.evaluations[trial])) <= 1


@pytest.mark.usefixtures("float64")
def test_the_reference_of_grnn_does_what_leakbench_does() -> None:
    where = scene("grnn", "lenet", 2, 32, "cpu", dtype=torch.float64)
    batched = leakbench.attack("grnn(steps=3)", where.observation)
    for trial in range(2):
        made, latent = generator(where, trial)
        for name, layer in layout((3, 32, 32), LATENT, CLASSES).items():
            (draws,) = where.rng(trial).generators(f"generator {name}")
            value = layer.draw(draws)
            place, _, kind = name.partition(".")
            if place.isdigit():
                inside = {"weight": "1.weight", "scale": "2.weight", "shift": "2.bias"}[kind]
                own = made.get_parameter(f"blocks.{place}.{inside}")
                own.data.copy_(value.permute(2, 3, 0, 1) if kind == "weight" else value)
            else:
                made.get_parameter(name).data.copy_(value.T if name == "label.weight" else value)
        found = reference.grnn(where.network, where.observed(trial), made, latent, steps=3)
        close(found.image, batched.images[trial : trial + 1], 1e-8)


@pytest.mark.skipif(importlib.util.find_spec("breaching") is None, reason="breaching is not installed")
def test_breaching_does_the_same_work() -> None:
    where = scene("ig", "lenet", 1, 32, "cpu")
    observed, start, label = where.observed(0), where.start(0)[0], where.labels[:1]
    own = reference.ig(where.network, observed, label, start, steps=30)
    other = peer.ig(where.network, observed, label, start, steps=30)
    # breaching returns the best iterate, and its total variation pads the border
    close(other.image, own.image, 0.1)


def test_a_scene_cut_by_rows_is_attacked_as_the_whole() -> None:
    where = scene("ig", "lenet", 3, 32, "cpu")
    attack = leakbench.attacks.parse("ig(steps=2)")
    whole = leakbench.attack(attack, where.observation)
    part = attack(where.rows(range(1, 3)).observation, where.rng(1, 2))
    close(part.images, whole.images[1:], 1e-4)


# tables


def work(rows: dict[str, Times], target: tuple[float | None, float | None] = (12.0, 8.0)) -> dict[str, object]:
    missing = {BREACHING: "it is not there"} if BREACHING not in rows else {}
    made = {"title": "IG, LeNet", "attack": "ig", "model": "lenet", "trials": 4, "side": 32, "target": list(target)}
    return {**made, "missing": missing, "flops": 1e9, "rates": [1e10, 1e10], "subjects": rows}


def ended(seconds: float, evaluations: int, successes: int, trials: int) -> dict[str, float]:
    done = {"seconds": seconds, "trials": trials, "successes": successes, "diverged": 1, "evaluations": evaluations}
    return dict(done)


def test_the_gain_of_a_row_is_told_with_its_spread() -> None:
    rows = {LEAKBENCH: times([1.0, 1.0], [9.0, 5.0]), REFERENCE: times([1.0, 1.0], [5.0, 5.0], trials=1)}
    (_, line) = report._work_lines([work(rows)])
    assert line["leakbench's gain"] == "2.67× (2–4)"
    assert line["target"] == "≥ 8×"
    assert line["share of floor"] == "25.0 %"


def test_a_growth_says_whom_one_trial_by_itself_is_slower_than() -> None:
    alone = {REFERENCE: times([1.0], [5.0], trials=1), BREACHING: times([1.0], [9.0], trials=1)}
    first = {LEAKBENCH: times([1.0], [7.0], trials=1), **alone}
    many = {"value": 4, "flops": 1e9, "subjects": {LEAKBENCH: times([1.0], [9.0], trials=4)}}

    def words(first: dict[str, Times]) -> str:
        points = [{"value": 1, "flops": 1e9, "subjects": first}, many]
        return report._bound({"axis": "trials", "model": "lenet", "rates": [1e10], "points": points})

    assert "is slower here: it takes 1.5× as long as reference. At T = 4 the gain is 2× over reference" in words(first)
    assert "slower" not in words({**alone, LEAKBENCH: times([1.0], [4.0], trials=1)})


def test_dlg_is_told_by_the_success() -> None:
    row = {
        "rounds": [
            {LEAKBENCH: ended(10.0, 1000, 4, 8), REFERENCE: ended(20.0, 500, 2, 4)},
            {LEAKBENCH: ended(10.0, 1000, 4, 8), REFERENCE: ended(40.0, 500, 2, 4)},
        ]
    }
    found = report._ending(row)
    assert found["each"] == {LEAKBENCH: 2.5, REFERENCE: 15.0}
    assert found[REFERENCE] == measure.Ratio(6.0, 4.0, 8.0)


def test_the_table_stands_between_the_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = filled(text, "new", report.BEGIN, report.END)
    assert new == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert filled(new, "new", report.BEGIN, report.END) == new
    with pytest.raises(ValueError, match="no lines"):
        filled("nothing", "new", report.BEGIN, report.END)


def test_the_readme_has_the_table_of_the_committed_data() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(text, report.summary(report.load(SPEED)), report.BEGIN, report.END) == text


def test_the_page_of_the_committed_data_is_up_to_date() -> None:
    page = report.page(report.load(SPEED), report.parity(SPEED))
    assert (SPEED / "README.md").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("which", numba_maps.MAPS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1)])
def test_the_maps_written_for_numba_are_convolutions(
    which: numba_maps.Map, kernel: int, stride: int, padding: int
) -> None:
    layer = numba_maps.Layer("", 2, 3, kernel, stride, padding, 4)
    run: dict[str, Any] = {}
    exec(numba_maps.source(layer, which, numba_maps.Tile(2, 2, 2)), run)
    a, b, out, _ = choices._tensors(layer, which, 2)
    channels, _, _, whole = numba_maps.padded_sizes(layer, which)
    run["run"](*(own.view(-1).numpy() for own in (a, b, out, torch.zeros(channels, whole, whole, numba_maps.LANES))), 2)
    for block, lane in ((0, 15), (1, 0)):
        given, other, found = (own[block, ..., lane] for own in (a, b, out))
        if which == "forward":
            expected = F.conv2d(given, other, stride=stride, padding=padding)
        elif which == "input gradient":
            expected = grad.conv2d_input((1, 2, 4, 4), other, given[None], stride, padding)[0]
        else:
            expected = grad.conv2d_weight(given[None], (3, 2, kernel, kernel), other[None], stride, padding)
        close(found, expected, 1e-5)


def test_the_page_of_choices_states_what_was_measured() -> None:
    about: Any = {"processor": "One", "torch": "2", "commit": "abc"}
    build = [choices.Row("build", start, 0, who, 0, 3.0) for start in ("first", "later") for who in ("C++", "numba")]
    steps = [(choices.WIDE, 2.0), (choices.NARROW, 4.0), (choices.NONE, 8.0)]
    rows = build + [choices.Row("step", "lenet", 32, who, 0, value) for who, value in steps]

    def text(numba: float) -> str:
        maps = [choices.Row("map", "a layer", 16, who, 0, value) for who, value in (("C++", 100.0), ("numba", numba))]
        return choices.page(rows + maps, about, "1")

    assert "| a layer | 16 | 100 | 79 | 79 % |" in text(79.0)
    assert "in 0 of 1: by these maps alone, C++ it is" in text(79.0)
    assert "in 1 of 1: by these maps alone, numba would do" in text(81.0)
    assert "| lenet | 32 | 2 (4.0× as fast) | 4 (2.0× as fast) | 8 |" in text(81.0)


# a run


@pytest.mark.long
def test_a_small_run_measures_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Plan(
        rounds=1,
        growth_rounds=1,
        works=(Work("ig", "lenet", 2, 1, 2), Work("grnn", "lenet", 2, 1, 2)),
        ending=Ending(2, 1, 1, 2),
        growth=(Growth("trials", "lenet", ((1, 1, 2), (2, 1, 2))), Growth("side", "lenet", ((32, 1, 2),), trials=2)),
        memory=(Work("ig", "lenet", 2, 1, 1),),
    )
    monkeypatch.setattr(command, "plan", lambda scale, device: small)
    monkeypatch.setattr(measure, "peak_rate", lambda device: 1e10)
    command.main(["--out", str(tmp_path)])
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert data["machine"]["torch"] == torch.__version__
    assert data["machine"]["threads"] == torch.get_num_threads()
    for row in data["works"]:
        present = {LEAKBENCH, REFERENCE, BREACHING} - row["missing"].keys()
        assert row["subjects"].keys() == present
        assert {LEAKBENCH, REFERENCE} <= present
        assert row["subjects"][LEAKBENCH]["trials"] == 2
    assert [turn[REFERENCE]["trials"] for turn in data["ending"]["rounds"]] == [1, 1]
    assert [turn[LEAKBENCH]["trials"] for turn in data["ending"]["rounds"]] == [2, 2]
    assert [len(curve["points"]) for curve in data["growth"]] == [2, 1]
    assert REFERENCE not in data["growth"][0]["points"][1]["subjects"]
    (memory,) = data["memory"]
    assert memory["error"] is None
    assert 0 < memory["bytes"] < 8 * 2**30
    assert "IG, LeNet" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "cpu.png").stat().st_size > 0


def test_a_part_is_kept_where_the_commit_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu.json"
    monkeypatch.setattr(command.machine, "commit", lambda: "abc")
    file.write_text(json.dumps(command.begin(file, "smoke", "cpu") | {"works": [1], "minutes": 2.0}))
    assert command.begin(file, "smoke", "cpu")["works"] == [1]
    assert command.begin(file, "full", "cpu")["works"] == []
    monkeypatch.setattr(command.machine, "commit", lambda: "abd")
    assert command.begin(file, "smoke", "cpu")["works"] == []


def test_success_rates_are_compared_and_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    arguments = ["--trials", "2", "--steps", "1", "--out", str(tmp_path)]
    parity.main(arguments)
    first = (tmp_path / "parity.json").read_text()
    cases = json.loads(first)["cases"]
    assert cases.keys() == {"ig(steps=1) lenet", "dlg(steps=1) lenet"}
    for case in cases.values():
        assert [list(trials) for trials in case["trials"].values()] == [["0", "1"], ["0", "1"]]
    assert "95 % intervals" in (tmp_path / "README.md").read_text()
    parity.main(arguments)
    assert json.loads((tmp_path / "parity.json").read_text())["cases"] == cases


def test_a_share_counts_what_is_not_finite_as_no_success() -> None:
    trials = [{"psnr": 25.0, "diverged": False}, {"psnr": None, "diverged": True}, {"psnr": 3.0, "diverged": True}]
    found = report.outcomes({str(number): trial for number, trial in enumerate(trials)}, 18.0)
    assert found == {"success": [1, 0, 0], "diverged": [0, 1, 1]}


def test_intervals_of_success_rates_are_by_photograph() -> None:
    groups = groups_of(range(100))
    assert len(set(groups)) == 7
    assert groups[:36] == groups[64:]  # the images repeat
    trials = [{"psnr": 20.0 if group < 3 else 5.0, "diverged": False} for group in groups]
    numbered = {str(number): trial for number, trial in enumerate(trials)}
    worse = numbered | {"0": {"psnr": 5.0, "diverged": False}}
    case = {"spec": "ig", "model": "lenet", "success_db": 18.0, "trials": {"batched": worse, "one-at-a-time": numbered}}
    page = report._parity(
        {"cases": {"": case}, "machine": dict.fromkeys(("device", "torch", "date"), ""), "commits": []}
    )
    (row,) = [line for line in page.splitlines() if "PSNR" in line]
    count = sum(trial["psnr"] > 18 for trial in trials)
    low, high = map(int, re.search(rf" {count}/100 = {count} % \((\d+)–(\d+)\) ", row).groups())
    by_image = wilson_interval(count / 100, 100)
    assert low < 100 * by_image[0] - 10
    assert high > 100 * by_image[1] + 10
    assert re.search(r" -1 \(-\d to [+-]0\) ", row)
    committed = json.loads((SPEED / "cpu.json").read_text())["ending"]
    (row,) = [line for line in report._ending_lines(committed)[1].splitlines() if line.startswith("| leakbench ")]
    count, low, high = map(int, re.search(r" 64 +\| (\d+) \((\d+)–(\d+) %\) ", row).groups())
    by_image = wilson_interval(count / 64, 64)
    assert low < 100 * by_image[0] - 10
    assert high > 100 * by_image[1] + 5


def test_the_clock_of_several_workers_counts_nothing_that_was_done_before_it_began(monkeypatch) -> None:
    now = iter([3.0, 3.0, 4.0, 4.0, 5.0, 5.0])
    monkeypatch.setattr(scale.time, "perf_counter", lambda: next(now))
    clock = scale.Clock(2)
    for _ in range(6):
        clock.finish([None] * 8)
    assert (clock.trials, clock.last - clock.first) == (32, 2.0)  # 16 a second, of two workers that each do 8


def test_the_page_of_the_scale_is_that_of_its_figures(tmp_path: Path) -> None:
    committed = ROOT / "reports" / "scale"
    for name in ("figures", "torture", "fuzz"):
        shutil.copy(committed / f"{name}.json", tmp_path)
    assert page.write(tmp_path).read_text() == (committed / "README.md").read_text()
    figures = json.loads((tmp_path / "figures.json").read_text())
    for own in figures["workers"].values():
        own["left_out"] = 2
    assert "older count" not in page.text(figures, {}, {})


@pytest.mark.parametrize(("model", "expected"), [("resnet20(activation=sigmoid)", 2.0), ("resnet20", 0.0)])
def test_kinks_hide_the_way_back_from_every_derivative(model: str, expected: float) -> None:
    """Where activations are smooth, the distance is a square near the private image; behind ReLUs it has no slope."""
    (slopes,) = slope.measure(model, (32, 33), [1e-4])
    for found in slopes:
        assert bool((found.distance > 0).all())
        assert bool((found.cosine.abs() <= 1).all())
        torch.testing.assert_close(found.share, torch.full_like(found.share, expected), atol=0.1, rtol=0)
