"""The worst case over an ensemble: what is settled is not attacked again, and the report says who recovered what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from conftest import images_of
from scipy import stats
from test_engine import Counter, Thief, Tiny, go, measured, no_assets, one  # noqa: F401
from torch import Tensor

from leakbench import Attack, LeakbenchError, Observation, Reconstruction, Rng, Unsupported, report
from leakbench.analysis.ensemble import UNSCORED, EnsembleResult, attacker_names, ensemble_results, floor_share
from leakbench.engine.run import finished
from leakbench.errors import BadOption
from leakbench.plan.matrix import Matrix, Stage, expand, load_suite, override
from leakbench.report import worst_case
from leakbench.report.run import RunData
from leakbench.store.run_file import FILE, Store


@dataclass(frozen=True)
class Knows(Thief):
    """Has these images, by the salt, which tests know; the others are noise that depends on the size of the chunk."""

    name: ClassVar[str] = "knows"
    images: str = ""
    seed: int | None = None

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        mine = map(self.known, images_of(rng.keys))
        found = [image if one_of is None else one(one_of) for image, one_of in zip(images, mine)]
        return Reconstruction(torch.stack(found) + 1e-4 * len(images), evaluations=torch.full((len(images),), 10))

    def known(self, trial: tuple[int, int] | None) -> int | None:
        if trial is None or str(trial[1]) not in self.images.split() or self.seed not in (None, trial[0]):
            return None
        return trial[1]


@dataclass(frozen=True)
class Counts(Knows):
    """The same, with no evaluations to count."""

    name: ClassVar[str] = "counts"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        return Reconstruction(super().give(images, observation, rng).images)


@dataclass(frozen=True)
class Blurs(Knows):
    """Has the image, in part."""

    name: ClassVar[str] = "blurs"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        return Reconstruction(0.9 * super().give(images, observation, rng).images + 0.1 * images)


@dataclass(frozen=True)
class Fails(Knows):
    """Has the image, and says that it diverged."""

    name: ClassVar[str] = "fails"

    def give(self, images: Tensor, observation: Observation, rng: Rng) -> Reconstruction:
        found = super().give(images, observation, rng).images
        return Reconstruction(found, failed=torch.ones(len(found), dtype=torch.bool))


@dataclass(frozen=True)
class KnowingFloor(Knows):
    """A floor that has the image."""

    name: ClassVar[str] = "knowing-floor"
    floor: ClassVar[bool] = True


@dataclass(frozen=True)
class Serves(Thief):
    """Serves nothing."""

    name: ClassVar[str] = "serves-none"

    def check(self, observation: Observation) -> None:
        raise Unsupported("the model is not what it wants")


def ensemble(*stages: Attack | Sequence[Attack], **axes: Any) -> Matrix:
    given: dict[str, Any] = {"defenses": ["none"], "models": ["lenet"], "datasets": [Tiny()], "images": 4}
    given |= {"threshold": 0.6, "floors": False, "name": "worst"}
    listed = [Stage(attacks=stage if isinstance(stage, (list, tuple)) else [stage]) for stage in stages]
    return Matrix(**{**given, "stages": listed, **axes})


def run_of(matrix: Matrix, out: Path, **options: Any) -> dict[str, list[int]]:
    """Run a matrix and return the images that each attack was run on."""
    results = go(matrix, out, **options)
    names = results["attack"].str.partition("(")[0]
    return {str(name): sorted(own["image"]) for name, own in results.groupby(names, sort=False)}


def planned(out: Path) -> pd.DataFrame:
    with Store.open(out / FILE, readonly=True) as store:
        return store.trials()


def standing(out: Path, threshold: float = 0.6) -> EnsembleResult:
    (found,) = ensemble_results(planned(out), threshold)
    return found


# What is run


def test_what_is_recovered_is_not_attacked_again(tmp_path):
    matrix = ensemble(Knows("0 2"), Counts("2 3"), Thief(), floors=True)
    seen = Counter()
    ran = run_of(matrix, tmp_path, progress=seen)
    everywhere = {floor: [0, 1, 2, 3] for floor in ("random", "grey", "mean")}
    assert ran == {**everywhere, "knows": [0, 1, 2, 3], "counts": [1, 3], "thief": [1]}
    left = planned(tmp_path)
    assert len(left) == len(matrix.trials()) == 24
    skipped = left[left["status"] == ""]
    assert skipped["image"].tolist() == [0, 2, 0, 2, 3]
    assert skipped["attack"].str.partition("(")[0].tolist() == ["counts"] * 2 + ["thief"] * 3
    assert finished(tmp_path, matrix) == 24
    assert sum(seen.chunks) == 24 - 5
    seen = Counter()
    assert run_of(matrix, tmp_path, progress=seen) == ran
    assert seen.chunks == []


def test_a_stage_ends_before_the_next_begins_and_within_it_order_counts_too(tmp_path):
    ran = run_of(ensemble([Knows("0"), Counts("0 1")], Thief(), defenses=["none", "norm-only"], images=2), tmp_path)
    assert ran == {"knows": [0, 0, 1, 1], "counts": [1, 1]}


def test_an_image_is_settled_for_its_defense_and_seed_alone(tmp_path):
    results = go(ensemble(Knows("0", seed=1), Thief(), defenses=["none", "norm-only"], seeds=2, images=1), tmp_path)
    ran = results[results["attack"] == "thief"]
    assert sorted(zip(ran["defense"], ran["seed"])) == [("none", 0), ("norm-only", 0)]


def test_neither_floors_nor_failures_settle_anything(tmp_path):
    ran = run_of(ensemble([KnowingFloor("0 1"), Fails("1 2")], Thief(), images=3), tmp_path)
    assert ran["thief"] == [0, 1, 2]
    ran = run_of(ensemble(Knows("0 1 2"), KnowingFloor("0"), images=3), tmp_path / "2")
    assert ran["knowing-floor"] == [0, 1, 2]


def test_without_a_threshold_everything_is_run(tmp_path):
    ran = run_of(ensemble(Knows("0 1 2 3"), Thief(), threshold=None), tmp_path)
    assert ran["thief"] == [0, 1, 2, 3]
    with pytest.raises(BadOption, match="has no threshold"):
        report.ranking(tmp_path)


def test_what_attacks_return_does_not_depend_on_what_is_skipped(tmp_path):
    stages = (Knows("0 2"), Counts("1"), Thief())
    whole = go(ensemble(*stages, threshold=None), tmp_path / "whole", chunk=1)
    part = go(ensemble(*stages), tmp_path / "part", chunk=1)
    assert len(part) == 4 + 2 + 1
    pd.testing.assert_frame_equal(measured(part), measured(whole.loc[part.index]))
    with Store.open(tmp_path / "whole" / FILE) as first, Store.open(tmp_path / "part" / FILE) as second:
        assert second.images(part.index) == first.images(part.index)


def test_a_threshold_works_without_stages_in_the_order_of_the_axes(tmp_path):
    axes = {"defenses": ["none"], "models": ["lenet"], "datasets": [Tiny()], "images": 4, "floors": False}
    plain = Matrix(attacks=[Knows("0"), Thief()], threshold=0.6, **axes)
    assert run_of(plain, tmp_path)["thief"] == [1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_is_interrupted_goes_on_to_the_same_results(tmp_path, stop):
    """The noise of ``Knows`` shows which trials came together."""
    matrix = ensemble(Knows("0 5"), Knows("1 5 6", seed=0), Counts("2"), images=7)
    whole = go(matrix, tmp_path / "whole", chunk=2)
    with pytest.raises(KeyboardInterrupt):
        go(matrix, tmp_path / "cut", chunk=2, progress=Counter(stop_after=stop))
    again = go(matrix, tmp_path / "cut", chunk=2)
    pd.testing.assert_frame_equal(measured(again), measured(whole))
    assert standing(tmp_path / "cut").share == standing(tmp_path / "whole").share


def test_a_higher_threshold_attacks_again_and_a_lower_one_does_not(tmp_path):
    first = run_of(ensemble(Blurs("0 1"), Thief()), tmp_path)
    assert first["thief"] == [2, 3]
    assert run_of(ensemble(Blurs("0 1"), Thief(), threshold=0.5), tmp_path) == first
    assert run_of(ensemble(Blurs("0 1"), Thief(), threshold=0.999), tmp_path)["thief"] == [0, 1, 2, 3]


def test_an_attack_that_serves_nothing_is_a_row_with_its_reason(tmp_path):
    results = go(ensemble(Knows("0 1 2 3"), Serves()), tmp_path)
    own = results[results["attack"] == "serves-none"]
    assert set(own["status"]) == {"unsupported"}
    assert len(own) == 4
    text = report_of(tmp_path)
    assert "| serves-none | none | the model is not what it wants | 4 |" in squeezed(text)
    with pytest.raises(Unsupported, match="not what it wants"):
        go(ensemble(Serves()), tmp_path / "alone")
    alone = ensemble(Serves(), floors=True)
    go(alone, tmp_path / "floors")
    assert "no attacker supports it" in report_of(tmp_path / "floors")


def test_who_knows_a_defense_without_an_informed_attacker_is_left_out_with_the_reason(tmp_path):
    stage = Stage(attacks=[Knows("0")], threats=["paper", {"informed": True}])
    matrix = ensemble(defenses=["none", "precode(k=6)"], images=2, stages=[stage])
    results = go(matrix, tmp_path)
    own = results[results["threat"] == "informed=true"].set_index("defense")["status"]
    assert set(own["none"]) == {"unsupported"}
    assert set(own[["precode(k=6)"]]) == {"ok"}
    assert "does nothing to model" in report_of(tmp_path)


# What is reported


def report_of(out: Path) -> str:
    """Return what ``report.write`` makes of a run's ensemble; pictures take time."""
    with Store.open(out / FILE, readonly=True) as store:
        return worst_case.markdown(RunData.of(store, "worst"), 0.6)


def squeezed(text: str) -> str:
    return re.sub(r" +", " ", text)


def test_the_standing_counts_images_attackers_and_costs(tmp_path):
    go(ensemble(Knows("0 2"), Counts("2 3"), Thief(), defenses=["none"], images=5), tmp_path)
    found = standing(tmp_path)
    assert (found.images, found.targets, found.share, found.open) == (5, 5, 0.6, 0)
    expected = stats.binomtest(3, 5).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    first, second, third = found.attackers
    assert [one.attacker for one in found.attackers] == ["knows", "counts", "thief"]
    assert (first.tried, first.recovered, first.skipped, first.evaluations) == (5, 2, 0, 50)
    assert (second.tried, second.recovered, second.skipped, second.evaluations) == (3, 1, 2, None)
    assert (third.tried, third.recovered, third.skipped, third.failed) == (2, 0, 3, 0)
    assert first.seconds > 0


def test_seeds_of_an_image_are_not_independent_trials(tmp_path):
    go(ensemble(Knows("0 1", seed=0), images=2, seeds=4), tmp_path)
    found = standing(tmp_path)
    assert (found.images, found.targets, found.share) == (2, 8, 0.25)
    assert found.high - found.low > 0.6


def test_the_ranking_begins_with_the_least_recovered_defense(tmp_path):
    matrix = ensemble(Knows("0 1"), images=2, defenses=["none", "norm-only", "keylock(length=9)"])
    go(matrix, tmp_path)
    trials = planned(tmp_path)
    trials.loc[trials["defense"] == "norm-only", "ssim_aligned"] = 0.1
    trials.loc[(trials["defense"] == "none") & (trials["image"] == 0), "ssim_aligned"] = 0.1
    found = ensemble_results(trials, 0.6)
    assert [(one.defense, one.share) for one in found] == [
        ("norm-only", 0.0),
        ("none", 0.5),
        ("keylock(length=9)", 1.0),
    ]


def test_the_report_is_made_of_the_run_alone(tmp_path):
    go(ensemble(Knows("0 2"), Counts("2 3"), Thief(), floors=True), tmp_path)
    report.write(tmp_path)
    text = squeezed((tmp_path / "worst-case.md").read_text(encoding="utf-8"))
    assert text == squeezed(report_of(tmp_path))
    assert "| none | 75 % [30, 95] | knows 2, counts 1 | nothing to model | 1.00 [1.00, 1.00] | 4 | 10 |" in text
    assert "| none | counts | 1 | 2 | 2 | 0 | 0 | – |" in text
    assert "the floors reach the threshold on: random 0 of 4, grey 0 of 4, mean 0 of 4." in text
    assert "at least 0.6" in text
    assert "No attacker sees the private image" in text
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "19 of 19 planned (19 ok)" in page
    assert "over fewer and harder images" in page
    assert "**Differences between defenses**" not in page
    assert squeezed(report.ranking(tmp_path)).splitlines()[-1] in text


def test_a_run_that_was_stopped_says_what_is_to_go(tmp_path):
    matrix = ensemble(Knows("0"), Thief())
    with pytest.raises(KeyboardInterrupt):
        go(matrix, tmp_path, chunk=2, progress=Counter(stop_after=3))
    assert standing(tmp_path).open == 1
    assert "| none | 25 % so far | knows 1, 1 trial to go | nothing to model | 1.00 [1.00, 1.00] | 4 |" in squeezed(
        report_of(tmp_path)
    )
    assert finished(tmp_path, matrix) == 7


def test_attackers_of_one_name_are_told_apart(tmp_path):
    go(ensemble(Knows("0"), Knows("1"), Thief()), tmp_path)
    names = [one.attacker for one in standing(tmp_path).attackers]
    assert names == ["knows(images=0), paper", "knows(images=1), paper", "thief"]


# The matrix


def test_a_matrix_of_stages_can_be_written_and_read_again() -> None:
    matrix = Matrix(**expand(load_suite("worst-case"), "smoke")[0])
    again = Matrix(**matrix.describe())
    assert [trial.id for trial in again.trials()] == [trial.id for trial in matrix.trials()]
    assert again.threshold == matrix.threshold == 0.6
    first = [trial.cell.attack.name for trial in matrix.trials() if not trial.cell.attack.floor]
    assert list(dict.fromkeys(first)) == ["peel", "lb", "ig", "grnn", "ggl"]


AXES: dict[str, Any] = {"defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({}, "attacks is missing"),
        ({"stages": []}, "stages is empty"),
        ({"stages": ["dlg"]}, "write [[stages]]"),
        ({"stages": [{"attack": ["dlg"]}]}, "did you mean 'attacks'"),
        ({"stages": [{}]}, "attacks is missing"),
        ({"stages": [{"attacks": []}]}, "attacks is empty"),
        ({"stages": [{"attacks": ["dlgg"]}]}, "did you mean 'dlg'"),
        ({"stages": [{"attacks": ["dlg"], "threats": ["papr"]}]}, "did you mean 'paper'"),
        ({"stages": [{"attacks": ["dlg"]}], "attacks": ["ig"]}, "both stages and attacks"),
        ({"stages": [{"attacks": ["dlg"]}], "threats": ["paper"]}, "both stages and threats"),
        ({"attacks": ["dlg"], "threshold": 1.01}, "threshold=1.01"),
        ({"attacks": ["dlg"], "threshold": -0.1}, "threshold=-0.1"),
        ({"attacks": ["dlg"], "threshold": float("nan")}, "threshold=nan"),
        ({"attacks": ["dlg"], "threshold": "much"}, "threshold='much'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_one_line(axes: dict[str, Any], words: str) -> None:
    with pytest.raises(LeakbenchError) as raised:
        Matrix(**{**AXES, **axes})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_given_takes_the_place_of_stages() -> None:
    informed = {"informed": True}
    axes = {**AXES, "stages": [{"attacks": ["dlg"]}, {"attacks": ["ig"], "threats": ["paper", informed]}]}
    assert override(axes, {"images": 2}) == {**axes, "images": 2}
    assert override(axes, {"threats": ["T1"]})["stages"] == [
        {"attacks": ["dlg"], "threats": ["T1"]},
        {"attacks": ["ig"], "threats": ["T1"]},
    ]
    named = Matrix(**override(axes, {"attacks": ["idlg", "dlg"]}))
    assert [[attack.name for attack in stage.attacks] for stage in named.stages] == [["idlg"], ["dlg"]]
    assert {trial.cell.threat.informed for trial in named.trials()} == {False, True}
    plain = {**AXES, "attacks": ["dlg"], "threats": ["paper"]}
    assert override(plain, {"attacks": ["ig"]}) == {**plain, "attacks": ["ig"]}
    with pytest.raises(BadOption, match=re.escape("[[stages]]")):
        Matrix(**override({**AXES, "stages": 3}, {}))


def test_a_default_scale() -> None:
    axes = {**AXES, "attacks": ["dlg"], "default": "cpu", "scale": {"cpu": {"images": 3}, "full": {"images": 9}}}
    assert expand(axes) == expand(axes, "cpu")
    assert expand(axes, "full")[0]["images"] == 9
    with pytest.raises(BadOption, match="unknown scale 'gpu'"):
        expand({**axes, "default": "gpu"})


def test_a_trial_without_the_score_is_no_miss() -> None:
    """Images too small for SSIM are not judged, rather than counted as withstood."""
    row = {
        "dataset": "d", "model": "m", "defense": "none", "threat": "paper", "attack": "peel", "image": 0, "group": 0,
        "seed": 0, "status": "ok", "reason": "", "floor": False, "evaluations": 1, "seconds": 1.0,
        "ssim_aligned": float("nan"),
    }  # fmt: skip
    (found,) = ensemble_results(pd.DataFrame([row]), 0.6)
    assert found.images == 0
    assert found.share != found.share
    assert found.attackers[0].unscored == {UNSCORED: 1}
    (seen,) = ensemble_results(pd.DataFrame([row, {**row, "image": 1, "ssim_aligned": 0.9}]), 0.6)
    assert (seen.images, seen.share) == (1, 1.0)


def test_a_floor_that_failed_recovers_nothing() -> None:
    """Its score is that of the grey image, however near to the truth that is."""
    scores = [("ok", 0.9), ("failed", 0.9), ("ok", 0.1), ("error", 0.9)]
    rows = [
        {"attack": "mean", "image": image, "seed": 0, "status": status, "floor": True, "ssim_aligned": score}
        for image, (status, score) in enumerate(scores)
    ]
    assert floor_share(pd.DataFrame(rows), 0.6) == pytest.approx(1 / 3)


def test_an_attacker_of_two_versions_has_no_version_in_its_short_name_unless_both_are_there() -> None:
    one = pd.DataFrame({"attack": ["lb [version 2]"], "threat": ["informed=true"]})
    assert list(attacker_names(one).values()) == ["lb (adaptive)"]
    both = pd.DataFrame({"attack": ["lb [version 1]", "lb [version 2]"], "threat": ["paper", "paper"]})
    assert list(attacker_names(both).values()) == ["lb [version 1], paper", "lb [version 2], paper"]


# Who attacked adaptively


def row(defense: str, threat: str = "paper", score: float | None = 0.1, **other: Any) -> dict[str, Any]:
    given = {"dataset": "d", "model": "m", "defense": defense, "attack": "ig", "threat": threat, "floor": False}
    given |= {"image": 0, "seed": 0, "group": "0", "status": "ok" if score is not None else "", "reason": ""}
    return given | {"ssim_aligned": score, "psnr_aligned": score, "evaluations": 1, "seconds": 1.0, **other}


def test_a_defense_that_nobody_attacked_adaptively_is_ranked_last() -> None:
    refused = {"status": "unsupported", "reason": "it raised"}
    rows = [
        row("none", score=0.9),
        row("alone", score=0.0),
        row("refuses", score=0.0),
        row("refuses", "informed=simulate", None, **refused),
        row("stated", score=0.2),
        row("stated", "informed=true", 0.9),
        row("stated", "informed=simulate", None),
        row("other", score=0.2),
        row("other", "informed=simulate", 0.2),
    ]
    found = {one.defense: one for one in ensemble_results(pd.DataFrame(rows), 0.6)}
    assert list(found) == ["other", "none", "stated", "alone", "refuses"]
    assert {name: one.attacked_by for name, one in found.items()} == {
        "other": "simulate only",
        "none": "nothing to model",
        "stated": "default, simulate",  # which had nothing left to recover
        "alone": "not attacked adaptively",
        "refuses": "not attacked adaptively",
    }
    assert {name: one.unadaptive for name, one in found.items() if one.last} == {
        "alone": "no adaptive attacker ran",
        "refuses": "it raised",
    }
    plain = ensemble_results(pd.DataFrame(rows[:3]), 0.6)
    assert [one.defense for one in plain] == ["alone", "refuses", "none"], "nobody was attacked adaptively"


@pytest.mark.long
def test_pages_say_who_attacked_adaptively(tmp_path: Path) -> None:
    stage = Stage(attacks=[Thief()], threats=["paper", {"informed": "every"}])
    go(ensemble(defenses=["none", "prune", "ats"], images=2, stages=[stage], floors=True), tmp_path)
    report.write(tmp_path, ["md", "html"])
    ranked = squeezed(report.ranking(tmp_path))
    assert "| attacked adaptively by |" in ranked
    assert re.search(r"\| prune \|.*\| default, simulate \|", ranked)
    assert re.search(r"\| ats \|.*\| simulate only \|", ranked)
    assert re.search(r"\| none \|.*\| nothing to model \|", ranked)
    assert "Not attacked adaptively" not in ranked
    assert "attacked adaptively by default, simulate" in (tmp_path / "report.html").read_text(encoding="utf-8")
    alone = ensemble(Thief(), defenses=["none", "prune"], images=2, floors=True)
    go(alone, tmp_path / "alone")
    assert "- prune: no adaptive attacker ran" in report.ranking(tmp_path / "alone")


@pytest.mark.parametrize(
    ("defense", "inconclusive"), [("clip(norm=0.1)", False), ("noise(scale=1, relative=true)", True)]
)
def test_a_defense_that_is_recovered_needs_no_control(tmp_path: Path, defense: str, inconclusive: bool) -> None:
    axes = {"attacks": ["peel"], "models": ["lenet"], "datasets": ["samples(size=16)"], "images": 2, "threshold": 0.6}
    go(Matrix(**axes, defenses=[defense]), tmp_path)
    assert ("Inconclusive" in report.ranking(tmp_path)) == inconclusive
