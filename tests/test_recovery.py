"""Which images count as recovered, which groups they are in, and what allows a verdict on a defense."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from conftest import SALT
from test_engine import Tiny, go, no_assets  # noqa: F401
from test_html import scored
from test_report import DLG, GREY, METRICS, NONE, run
from test_worst_case import KnowingFloor, Knows, Thief, ensemble, planned, report_of, run_of, squeezed, standing

from leakbench import Reconstruction, Unsupported, datasets, report
from leakbench.analysis import integrity
from leakbench.analysis.ensemble import ensemble_results
from leakbench.analysis.recovery import caveat, judged
from leakbench.analysis.summary import rescored, summarise
from leakbench.analysis.verdict import control_flaw, inconclusive, missing_attackers
from leakbench.audit.given import Audited
from leakbench.datasets import Dataset
from leakbench.engine.run import finished
from leakbench.plan.matrix import Matrix, expand, load_suite
from leakbench.store.merge import merge
from leakbench.store.records import MetricInfo, Statement, StoredComponent
from leakbench.store.run_file import FILE, Store

BASE = {"dataset": "d", "model": "m", "defense": "none", "threat": "paper", "seed": 0, "status": "ok", "floor": False}
PLAIN = [MetricInfo("psnr_aligned", True, "", ""), MetricInfo("ssim_aligned", True, "", "")]


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    """Trials with these columns; by default of the attack ``lb`` on image 0."""
    base = {**BASE, "attack": "lb", "image": 0, "reason": "", "evaluations": 1, "seconds": 1.0}
    own = [{**base, **row} for row in rows]
    return pd.DataFrame([{"group": row["image"], "trial": str(at), **row} for at, row in enumerate(own)])


def floor(ssim: float, psnr: float, name: str = "mean", **more: Any) -> dict[str, Any]:
    return {"attack": name, "floor": True, "ssim_aligned": ssim, "psnr_aligned": psnr, **more}


def guess(ssim: float, psnr: float, **more: Any) -> dict[str, Any]:
    return {"ssim_aligned": ssim, "psnr_aligned": psnr, **more}


# The rule


@pytest.mark.parametrize(
    ("ssim", "psnr", "status", "recovered"),
    [
        (0.9, 30.0, "ok", True),
        (0.9, math.inf, "ok", True),
        (0.6, 16.0, "ok", True),
        (0.59, 30.0, "ok", False),
        (0.69, 11.0, "ok", False),  # noise that resembles a flat image in structure
        (0.9, 15.0, "ok", False),  # as close as the floor is not closer
        (0.9, 30.0, "failed", False),
    ],
)
def test_an_image_is_recovered_above_threshold_and_floor(
    ssim: float, psnr: float, status: str, recovered: bool
) -> None:
    found = judged(frame(floor(0.3, 15.0), guess(ssim, psnr, status=status)), 0.6)
    assert found["recovered"].tolist() == [False, recovered]
    assert not found["by_floor"].any()


def test_image_52_is_not_recovered_by_noise_and_leaves_the_denominator() -> None:
    """The smooth image on which the mean image has an SSIM of 0.687: noise with 0.66 counted as recovered."""
    rows = [floor(0.687, 23.0, image=52), floor(0.4, 20.0, "grey", image=52), floor(0.1, 12.0, image=1)]
    rows += [guess(0.66, 11.0, image=52), guess(0.3, 13.0, image=1)]
    found = judged(frame(*rows), 0.6)
    assert not found["recovered"].any()
    assert found["by_floor"].tolist() == [True, True, False, True, False]
    (result,) = ensemble_results(frame(*rows), 0.6)
    assert (result.images, result.by_floor, result.targets, result.share) == (1, 1, 2, 0.0)
    (better,) = ensemble_results(frame(*rows, guess(0.99, 40.0, image=52), guess(0.9, 30.0, image=1)), 0.6)
    assert (better.images, better.share, better.attackers[0].recovered) == (1, 1.0, 1)


def test_the_best_floor_is_each_metrics_own_on_the_same_image_and_seed() -> None:
    floors = [floor(0.5, 10.0), floor(0.1, 20.0, "grey", model="other", threat="weights")]
    assert judged(frame(*floors, guess(0.7, 19.0)), 0.6)["recovered"].tolist() == [False] * 3
    assert judged(frame(*floors, guess(0.7, 21.0)), 0.6)["recovered"].tolist() == [False] * 2 + [True]
    elsewhere = [floor(0.9, 50.0, image=1), floor(0.9, 50.0, seed=1), floor(0.9, 50.0, dataset="e")]
    elsewhere += [floor(0.9, 50.0, status="failed")]
    assert judged(frame(*elsewhere, guess(0.7, 21.0)), 0.6)["recovered"].tolist()[-1]


def test_a_changed_image_that_the_gradient_leaks_counts_as_recovered() -> None:
    """A shifted or blended image is what the client trained on; the private image itself is counted beside it."""

    def changed(ssim: float, psnr: float, **more: Any) -> dict[str, Any]:
        return {"defense": "ats", "ssim_encoded": ssim, "psnr_encoded": psnr, **more}

    rows = [floor(0.3, 15.0, **changed(0.2, 14.0)), floor(0.3, 15.0, **changed(0.9, 99.0, defense="mixup"))]
    rows += [floor(0.3, 15.0, image=1, **changed(0.2, 14.0)), floor(0.3, 15.0, image=2, **changed(0.2, 14.0))]
    rows += [guess(0.1, 9.0, **changed(1.0, 100.0)), guess(0.8, 30.0, image=1, **changed(0.4, 13.0))]
    rows += [guess(0.1, 9.0, image=2, **changed(0.7, 13.0))]  # further from it than the floor
    found = judged(frame(*rows), 0.6)
    assert found["recovered"].tolist()[4:] == [True, True, False]
    assert found["itself"].tolist()[4:] == [False, True, False]
    (result,) = [one for one in ensemble_results(frame(*rows), 0.6) if one.defense == "ats"]
    assert (result.share, result.itself) == pytest.approx((2 / 3, 1 / 3))
    # floors run behind no defense: their scores against the private image are the limits
    behind_none = [floor(0.3, 15.0, ssim_encoded=math.nan, psnr_encoded=math.nan)]
    for psnr, recovered in ((14.0, False), (16.0, True)):
        found = judged(frame(*behind_none, guess(0.1, 9.0, **changed(0.7, psnr))), 0.6)
        assert found["recovered"].tolist() == [False, recovered]
    plain = ensemble_results(frame(floor(0.3, 15.0), guess(0.8, 30.0)), 0.6)[0]
    assert plain.share == 1
    assert math.isnan(plain.itself)


def test_what_was_not_measured_is_said_and_judged_by_the_rest() -> None:
    without = frame(guess(0.7, 5.0))
    assert judged(without, 0.6)["recovered"].all()
    assert "no floor" in caveat(without)
    some = frame(floor(0.1, 9.0), guess(0.7, 10.0), guess(0.7, 5.0, image=1))
    assert "No floor was run on 1 image" in caveat(some)
    assert caveat(frame(floor(0.1, 9.0), guess(0.7, 10.0))) == ""
    assert caveat(frame(floor(0.1, 9.0))) == ""
    old = frame(floor(0.1, 9.0), guess(0.7, 5.0)).drop(columns="psnr_aligned")
    assert judged(old, 0.6)["recovered"].tolist() == [False, True]
    assert "no psnr_aligned" in caveat(old)


# A failed trial


def test_a_failed_trial_scores_as_the_best_floor_that_needs_no_private_image() -> None:
    """`mean` is the better floor over all images, though `grey` is better on image 1."""
    rows = [floor(0.3, 15.0), floor(0.1, 18.0, image=1), floor(0.2, 12.0, "grey"), floor(0.2, 14.0, "grey", image=1)]
    failed = {"status": "failed", "label_correct": 1.0}
    trials = frame(*rows, guess(0.2, 12.0, **failed), guess(0.2, 14.0, image=1, **failed))
    found = rescored(trials, [*PLAIN, MetricInfo("label_correct", True, "", "")])
    assert found["psnr_aligned"].tolist() == [15.0, 18.0, 12.0, 14.0, 15.0, 18.0]
    assert found["ssim_aligned"].tolist()[-2:] == [0.2, 0.2]  # by SSIM, grey and mean tie; grey comes first by name
    assert found["label_correct"].tolist()[-2:] == [1.0, 1.0]
    assert trials["psnr_aligned"].tolist()[-2:] == [12.0, 14.0]
    (row,) = summarise(trials, PLAIN[:1]).query("not floor").to_dict("records")
    assert (row["failed"], row["psnr_aligned"], row["psnr_aligned gain"]) == (2, 16.5, 0.0)
    alone = trials[~trials["floor"]]
    assert rescored(alone, PLAIN).equals(alone)


def test_a_report_shows_the_floor_and_the_csv_what_was_stored(tmp_path: Path) -> None:
    metrics = [*METRICS, *PLAIN]
    out = run(tmp_path, [scored(GREY, NONE, 0, 0.9), scored(DLG, NONE, 0, 0.1, status="failed")], metrics)
    report.write(out, {"csv"})
    assert pd.read_csv(out / "results.csv")["psnr"].tolist() == [9.0, 1.0]
    with Store.open(out / FILE, readonly=True) as store:
        shown = report.files.RunData.of(store, "x").results
    assert shown["psnr"].tolist() == [9.0, 9.0]


# Groups


@dataclass(frozen=True)
class Pairs(Tiny):
    """Images of which two each are alike."""

    name: ClassVar[str] = "pairs"

    def group(self, index: int) -> int:
        return index // 2


def test_samples_know_their_photograph_and_others_are_their_own() -> None:
    samples = datasets.parse("samples(size=16)")
    _, labels = samples.load(range(64))
    assert [samples.group(index) for index in range(64)] == labels.tolist()
    assert len({samples.group(index) for index in range(32, 64)}) == 7
    assert datasets.parse("cifar10").group(17) == 17  # without its data
    assert Dataset.group(samples, 5) == 5
    assert Audited("samples", 10).group(40) == samples.group(40)


def test_groups_are_stored_with_the_run_and_shards_have_all_of_them(tmp_path: Path) -> None:
    matrix = ensemble(Thief(), datasets=[Pairs()], images=6, floors=True)
    go(matrix, tmp_path / "whole")
    trials = planned(tmp_path / "whole")  # the dataset is not registered: its groups are those of the file
    assert (trials["group"] == trials["image"] // 2).all()
    assert standing(tmp_path / "whole").groups == 3
    for number in (1, 2):
        go(matrix, tmp_path / str(number), shard=f"{number}/2", salt=SALT)
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    whole, merged = (standing(tmp_path / name) for name in ("whole", "merged"))
    assert replace(merged, attackers=()) == replace(whole, attackers=())


def test_groups_of_other_images_are_added_and_those_known_stay(tmp_path: Path) -> None:
    for name, images in (("a", [0, 1]), ("b", [4, 5])):
        go(ensemble(Thief(), datasets=[Pairs()], images=images), tmp_path / name)
    go(ensemble(Thief(), datasets=[Pairs()], images=[2, 3]), tmp_path / "a")
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both", force=True)
    trials = planned(tmp_path / "both")
    assert dict(zip(trials["image"], trials["group"])) == {image: image // 2 for image in range(6)}


def test_an_old_run_of_samples_has_the_photographs_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(ensemble(Thief(), datasets=["samples(size=16, channels=1)"], images=[32, 33, 38]), tmp_path)
    with Store.open(tmp_path / FILE) as store, store.transaction() as db:
        db.execute("DELETE FROM meta WHERE key LIKE 'groups/%'")
    monkeypatch.setattr("leakbench.datasets.samples._sheet", None)
    expected = [datasets.parse("samples").group(image) for image in (32, 33, 38)]
    assert planned(tmp_path)["group"].tolist() == expected
    go(ensemble(Thief(), images=2), tmp_path / "tiny")
    assert planned(tmp_path / "tiny")["group"].tolist() == [0, 1]  # of a dataset that is not registered


def test_tables_print_images_and_groups(tmp_path: Path) -> None:
    go(ensemble(Knows("0 1 2 3 4 5"), datasets=[Pairs()], images=6, floors=True), tmp_path)
    text = squeezed(report_of(tmp_path))
    assert "| none | 100 % [44, 100] | knows 6 | nothing to model | 1.00 [1.00, 1.00] | 6 in 3 groups |" in text
    (path,) = report.write(tmp_path, {"html"})
    assert "6 of 6 images in 3 groups recovered" in path.read_text()


# What an ensemble runs


def test_a_guess_that_the_floor_beats_does_not_end_the_attack_on_its_image(tmp_path: Path) -> None:
    """The floor has image 0: nothing is better there, the second attacker tries it too, and it is not counted."""
    matrix = ensemble(Knows("0 1"), [Thief(), KnowingFloor("0")], images=3)
    ran = run_of(matrix, tmp_path)
    assert ran == {"knows": [0, 1, 2], "thief": [0, 2], "knowing-floor": [0, 1, 2]}
    found = standing(tmp_path)
    assert (found.images, found.by_floor, found.share) == (2, 1, 0.5)
    assert [stats.recovered for stats in found.attackers] == [1, 0]
    text = squeezed(report_of(tmp_path))
    assert (
        "| defense | recovered | first recovered by | attacked adaptively by "
        "| cosine of what is sent | images | left out |" in text
    )
    assert finished(tmp_path, matrix) == len(matrix.trials())
    assert integrity.check(tmp_path).code == 0
    assert integrity.check(tmp_path).skipped == 1


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_floors_run_before_attacks_wherever_they_are_named(tmp_path: Path, workers: int) -> None:
    matrix = ensemble(Knows("0 1 2 3"), Thief(), [KnowingFloor("0 2")])
    ran = run_of(matrix, tmp_path, workers=workers, chunk=1)
    assert ran == {"knows": [0, 1, 2, 3], "thief": [0, 2], "knowing-floor": [0, 1, 2, 3]}


def test_a_run_of_before_is_resumed_without_lost_or_repeated_trials(tmp_path: Path) -> None:
    """The second attacker skipped every image; with the floor's score two of them are not recovered."""
    attackers = (Knows("0 1 2 3"), Thief())
    assert run_of(ensemble(*attackers), tmp_path) == {"knows": [0, 1, 2, 3]}
    with Store.open(tmp_path / FILE, readonly=True) as store:
        before = store.query("SELECT trial_id, finished, session_id FROM results ORDER BY trial_id")
    matrix = ensemble(*attackers, [KnowingFloor("0 2")])
    ran = run_of(matrix, tmp_path)
    assert ran == {"knows": [0, 1, 2, 3], "thief": [0, 2], "knowing-floor": [0, 1, 2, 3]}
    with Store.open(tmp_path / FILE, readonly=True) as store:
        after = store.query("SELECT trial_id, finished, session_id FROM results ORDER BY trial_id")
        assert len(store.planned()) == len(matrix.trials())
    assert set(map(tuple, before)) <= set(map(tuple, after))
    assert finished(tmp_path, matrix) == len(matrix.trials())


def test_an_old_run_is_counted_anew_and_says_what_is_to_go(tmp_path: Path) -> None:
    attackers = (Knows("0 1"), Thief())
    go(ensemble(*attackers, images=2), tmp_path)
    go(ensemble(KnowingFloor("0"), images=2, threshold=0.6), tmp_path)
    found = standing(tmp_path)
    assert (found.share, found.by_floor, found.open) == (1.0, 1, 1)  # the thief skipped image 0
    check = integrity.check(tmp_path)
    assert (check.skipped, sum(check.missing.values()), check.code) == (1, 1, 1)


# Verdicts


def suite_run(*missing: str, steps: int = 1000, defense: str = "soteria") -> tuple[pd.DataFrame, list[StoredComponent]]:
    """All attackers of the suite behind a defense with one adaptive attacker, but for those of these short names."""
    parts, rows = [], [floor(0.1, 9.0, defense="none")]
    matrix = Matrix(**{**expand(load_suite("worst-case"))[0], "defenses": ["soteria"], "images": 1})
    for trial in matrix.trials():
        attack, threat = trial.cell.attack, trial.cell.specs["threat"]
        informed = trial.cell.threat.informed
        name = attack.name + (f" ({'adaptive' if informed is True else informed})" if informed else "")
        if attack.floor or name in missing:
            continue
        options = {**attack.options(), **({"steps": steps} if attack.name == "ig" else {})}
        parts.append(StoredComponent("attack", trial.cell.specs["attack"], 1, options))
        rows.append(guess(0.1, 8.0, attack=trial.cell.specs["attack"], threat=threat, defense=defense))
    parts += [StoredComponent("defense", defense, 1, {}, statement=Statement("", {"true": "knows"}))]
    return frame(*rows), parts


@pytest.mark.parametrize(
    ("missing", "steps", "expected"),
    [
        ((), 1000, []),
        ((), 5000, []),
        ((), 999, ["ig", "ig (adaptive)", "ig (simulate)"]),
        (("lb (adaptive)",), 1000, ["lb (adaptive)"]),
        (("peel", "grnn"), 1000, ["peel", "grnn"]),
        (("peel (simulate)",), 1000, ["peel (simulate)"]),
    ],
)
def test_the_worst_case_needs_every_attacker_of_the_suite(
    missing: tuple[str, ...], steps: int, expected: list[str]
) -> None:
    trials, parts = suite_run(*missing, steps=steps)
    assert missing_attackers(trials, parts, 0.6) == {("d", "m", "soteria"): expected}


def test_an_attacker_that_has_not_ended_or_broke_did_not_run() -> None:
    trials, parts = suite_run()
    place = trials.index[trials["attack"].str.startswith("peel")]
    for status in ("", "error"):
        assert missing_attackers(
            trials.assign(status=trials["status"].mask(trials.index.isin(place), status)), parts, 0.6
        )
    trials.loc[place, "status"] = "unsupported"
    assert missing_attackers(trials, parts, 0.6)["d", "m", "soteria"] == []
    skipped = trials.assign(status=trials["status"].mask(trials.index == trials.index[-1], ""))
    skipped.loc[place, ["status", "ssim_aligned", "psnr_aligned"]] = ("ok", 0.9, 30.0)
    assert missing_attackers(skipped, parts, 0.6)["d", "m", "soteria"] == []


def test_an_old_run_without_statements_asks_the_defense() -> None:
    trials, parts = suite_run("ig (adaptive)")
    parts[-1] = StoredComponent("defense", "soteria", 1, {})
    assert missing_attackers(trials, parts, 0.6)["d", "m", "soteria"] == ["ig (adaptive)"]


def test_without_a_positive_control_nothing_is_concluded() -> None:
    assert control_flaw([0.5]) == ""
    assert "no image even without a defense" in control_flaw([0.0])
    assert "no image even without a defense" in control_flaw([math.nan])
    assert "no positive control" in control_flaw([])


def test_the_control_of_a_trained_network_is_one_trained_without_a_defense() -> None:
    models = [StoredComponent("model", f"lenet(weights={one})", 1, {"weights": one}) for one in ("a", "b")]
    rows = [floor(0.1, 9.0), guess(0.9, 30.0, model=models[0].spec), guess(0.2, 8.0, model=models[1].spec, defense="x")]
    found = ensemble_results(frame(*rows), 0.6)
    assert set(inconclusive(found, models).values()) == {""}
    other = [models[0], StoredComponent("model", models[1].spec, 1, {"weights": "b", "init": "other"})]
    assert "no positive control" in inconclusive(found, other)["d", models[1].spec]


def test_drawn_weights_are_no_control_of_trained_ones() -> None:
    drawn = StoredComponent("model", "lenet", 1, {"weights": None})
    trained = StoredComponent("model", "lenet(weights=b)", 1, {"weights": "b"})
    for control, other in ((drawn, trained), (trained, drawn)):
        rows = [guess(0.9, 30.0, model=control.spec), guess(0.2, 8.0, model=other.spec, defense="x")]
        found = ensemble_results(frame(floor(0.1, 9.0), *rows), 0.6)
        flaws = inconclusive(found, [drawn, trained])
        assert flaws["d", control.spec] == ""
        assert "no positive control" in flaws["d", other.spec]


def test_an_attacker_that_recovers_nothing_anywhere_shows_nothing_by_it() -> None:
    """A defense that only the closed form cannot attack, and a search without steps can, looks perfect otherwise."""
    refused = {"status": "unsupported", "ssim_aligned": math.nan, "psnr_aligned": math.nan}
    rows = [
        floor(0.1, 9.0),
        guess(0.9, 30.0, attack="peel"),
        guess(0.2, 8.0, attack="ig(steps=1)"),
        guess(0.9, 30.0, attack="peel", defense="honest"),
        guess(0.2, 8.0, attack="peel", defense="strong"),
        guess(0.2, 8.0, attack="peel", defense="strong", threat="informed=simulate"),
        guess(0.2, 8.0, attack="peel", defense="lazy"),
        guess(0.2, 8.0, attack="ig(steps=1)", defense="lazy", threat="informed=simulate"),
        guess(0.2, 8.0, attack="ig(steps=1)", defense="silly"),
        {**guess(0.2, 8.0, attack="peel", defense="silly"), **refused},
    ]
    found = {one.defense: one for one in ensemble_results(frame(*rows), 0.6)}
    assert list(found) == ["strong", "none", "lazy", "silly", "honest"]
    assert {name for name, one in found.items() if one.unproven} == {"silly"}
    assert found["strong"].attacked_by == "simulate only"
    assert found["lazy"].unadaptive == "ig(steps=1) recovers no image behind any defense"
    assert found["lazy"].last
    nothing = ensemble_results(frame(floor(0.1, 9.0), *(row for row in rows[1:] if row["ssim_aligned"] != 0.9)), 0.6)
    assert not any(one.unproven for one in nothing), "that is inconclusive as a whole"


def test_pages_say_inconclusive_and_what_did_not_run(tmp_path: Path) -> None:
    go(ensemble(Thief(), defenses=["none", "norm-only"], floors=True), tmp_path)
    for text in (report_of(tmp_path), report.ranking(tmp_path)):
        assert "Inconclusive: the attackers recover no image even without a defense." in text
        assert "least" not in text.split("## How to read")[0].replace("at least", "")
        assert "- peel, lb, ig, grnn and ggl: behind none and norm-only" in text.replace(" (adaptive)", "")
    assert report_of(tmp_path).startswith("# Best of the attackers that ran")
    (path,) = report.write(tmp_path, {"html"})
    page = path.read_text()
    assert "Inconclusive" in page
    assert "leak least" not in page
    assert "leaks least" not in page
    assert "The worst case behind each defense" not in page


def pruned(observation: Any) -> bool:
    """Return whether most of what was sent is zero, as behind ``prune``."""
    return float((torch.cat([value.flatten() for value in observation.gradient.values()]) == 0).float().mean()) > 0.5


def test_with_a_control_the_headline_ranks(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class OnlyUndefended(Knows):
        name: ClassVar[str] = "only-undefended"

        def give(self, images: Any, observation: Any, rng: Any) -> Reconstruction:
            found = super().give(images, observation, rng)
            return Reconstruction(torch.rand_like(images)) if pruned(observation) else found

    go(ensemble(OnlyUndefended("0 1 2 3"), defenses=["none", "prune"], floors=True), tmp_path)
    assert "Inconclusive" not in report_of(tmp_path)
    (path,) = report.write(tmp_path, {"html"})
    page = path.read_text()
    assert "Inconclusive" not in page
    assert "The attackers that ran recover least behind “prune”" in page


def test_pages_name_the_defense_that_only_weak_attackers_attacked(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class NotPruned(Knows):
        name: ClassVar[str] = "not-pruned"

        def check(self, observation: Any) -> None:
            if pruned(observation):
                raise Unsupported("not behind prune")

    @dataclass(frozen=True)
    class Weak(Knows):
        name: ClassVar[str] = "weak"

    go(ensemble(NotPruned("0 1 2 3"), Weak(""), defenses=["none", "prune"], floors=True), tmp_path)
    assert "**Inconclusive behind prune**: no attacker that has a score" in report_of(tmp_path)
    (path,) = report.write(tmp_path, {"html"})
    page = path.read_text()
    assert "Inconclusive behind “prune”" in page
    assert "recover least" not in page
    assert "(inconclusive)" in page


def test_groups_in_the_file_are_json_by_dataset(tmp_path: Path) -> None:
    go(ensemble(Thief(), datasets=[Pairs()], images=2), tmp_path)
    with Store.open(tmp_path / FILE, readonly=True) as store:
        ((settings, groups),) = store.stated("groups").items()
    assert json.loads(settings)["name"] == "pairs"
    assert json.loads(groups) == {"0": 0, "1": 0}
