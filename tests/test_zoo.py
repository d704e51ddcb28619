"""Broken and silly defenses: each ends in rows with a reason, and none is ranked as if it protected."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import pandas as pd
import pytest
import torch
from conftest import ATTACKS, close, same, watch
from torch import Tensor, nn
from zoo import (
    BROKEN,
    DTYPES,
    EMPTY,
    HARMLESS,
    KINDS,
    SOMETIMES,
    Smooth,
    Zoo,
    grey,
    matrix,
    network,
    without_last_layer,
)

import leakbench
from leakbench import Attack, Defense, LeakbenchError, Observation, Reconstruction, Rng, attacks, metrics
from leakbench.analysis.failures import defense_failures
from leakbench.analysis.recovery import judged
from leakbench.api import Run
from leakbench.attacks.base import ORDINARY_SIZES, prepare
from leakbench.core.rng import generator
from leakbench.core.types import ThreatModel
from leakbench.datasets.images import ByteImages
from leakbench.defenses.base import UpdateStep, checked
from leakbench.engine.progress import NullProgress
from leakbench.errors import DEFENSE_FAILED, BadOption, DefenseFailed
from leakbench.leaderboard.entry import entries
from leakbench.models import OwnModule
from leakbench.plan.matrix import parse_threat
from leakbench.report import worst_case
from leakbench.report.markdown import markdown
from leakbench.report.page import sentence
from leakbench.report.run import RunData
from leakbench.report.scenes import worst_cases
from leakbench.store.run_file import FILE, Store
from leakbench.training.settings import Recipe
from leakbench.training.steps import Trainee, descend, resumed, rule
from leakbench.victim import Client, observe

RUN = ("nan", "inf", "late-nan", "int32", "complex", "sparse", "raises", "wrap")
"""The broken ones of the run; the others are tried at the client."""
NAMES = (*RUN, *[kind for kind in KINDS if kind not in BROKEN])
ODD = ("flip", "roll", "shuffle", "withheld")
"""Harmless defenses that an oblivious attacker does not undo."""


class Notes(NullProgress):
    """The lines that a run tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@dataclass(frozen=True)
class Zoos:
    """A run of every kind, and what it said."""

    run: Run
    results: pd.DataFrame
    notes: list[str]

    def of(self, kind: str) -> pd.DataFrame:
        own = self.results[self.results["defense"] == ("zoo" if kind == "zeros" else f"zoo(kind={kind})")]
        return own[~own["floor"]]

    @cached_property
    def data(self) -> RunData:
        with Store.open(self.run.out / FILE, readonly=True) as store:
            return RunData.of(store, "zoo")


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoos]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAKBENCH_HOME", str(tmp_path_factory.mktemp("cache")))  # no LPIPS
        notes = Notes()
        run = leakbench.run(matrix(*NAMES), tmp_path_factory.mktemp("zoo"), device="cpu", chunk=2, progress=notes)
        yield Zoos(run, run.results(), notes.lines)


def told(reason: str) -> None:
    """Assert that a reason is a line that a person reads."""
    assert "\n" not in reason
    assert 0 < len(reason) < 340
    assert "Traceback" not in reason


@pytest.mark.long
@pytest.mark.parametrize("kind", RUN)
def test_a_broken_release_is_an_error_of_the_defense(zoos, kind):
    own = zoos.of(kind)
    assert len(own) == 6
    assert set(own["status"]) == {"error"}
    assert own["psnr"].isna().all()
    for reason in own["reason"]:
        told(reason)
        assert reason.startswith(f"{DEFENSE_FAILED}'zoo' ")
    assert len([line for line in zoos.notes if line.startswith(f"zoo(kind={kind}), ")]) == 1


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BROKEN])
def test_no_other_release_is_an_error(zoos, kind):
    own = zoos.of(kind)
    if kind == SOMETIMES:
        own = own[own["image"] != 1]
    assert set(own["status"]) <= {"ok", "failed", "unsupported"}
    for reason in own.loc[own["status"] != "ok", "reason"]:
        told(reason)
        assert DEFENSE_FAILED not in reason


def by_trial(own: pd.DataFrame) -> pd.DataFrame:
    return own.set_index(["attack", "image"])[["status", "psnr", "psnr_aligned", "ssim_aligned"]]


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in (*HARMLESS, *DTYPES) if kind not in ODD])
def test_the_size_and_the_type_of_a_release_hide_nothing(zoos, kind):
    own = by_trial(zoos.of(kind))
    none = by_trial(zoos.results[(zoos.results["defense"] == "none") & ~zoos.results["floor"]])
    assert set(none["status"]) == {"ok"}
    assert own["status"].equals(none["status"])
    exact = kind in ("float64", "dodge")
    tolerance = 1e-9 if exact else 0.05
    assert (own["ssim_aligned"] - none["ssim_aligned"]).abs().max() <= tolerance
    searched = own.index.get_level_values("attack") != "peel"  # to the last bit, which half has not
    assert (own["psnr"] - none["psnr"])[searched].abs().max() <= (1e-9 if exact else 1.0)


MOVED = ("roll", "shuffle", "flip")
"""Harmless defenses that ``simulate`` undoes to the last bit; the factors of ``SCALED`` are divided out in float32."""
SCALED = ("x1e30", "x1e-30")


def by_ig(kind: str, informed: str) -> tuple[Tensor, float]:
    """Return the image that ig finds behind a defense, and its aligned SSIM."""
    images, labels = Smooth().load([1])
    client = Client(images[0], int(labels[0]), "weights", "client")
    threat = parse_threat(f"informed={informed}")
    observation = observe(OwnModule("net", network()), Zoo(kind), threat, [client], 4, Smooth().mean())
    found = run("ig(steps=40, tv=0)", observation).images
    return found, float(metrics.parse("ssim_aligned")(found, images))


@pytest.mark.long
def test_ig_that_simulates_goes_the_same_way_behind_moved_entries_as_behind_none():
    plain, score = by_ig("nothing to do", "false")
    assert score > 0.9
    for kind in MOVED:
        assert torch.equal(by_ig(kind, "simulate")[0], plain), kind
    for kind in SCALED:
        found, score = by_ig(kind, "simulate")
        torch.testing.assert_close(found, plain, rtol=0, atol=0.02, msg=kind)
        assert score > 0.9
    assert by_ig("roll", "false")[1] < 0.6


@pytest.mark.full
def test_every_attack_recovers_each_image_behind_moved_and_scaled_entries(tmp_path):
    kinds, attacks = (*MOVED, *SCALED), ["peel", "lb(steps=60)", "ig(steps=300)"]
    plan = matrix(*kinds, attacks=attacks, threats=[{}, {"informed": "simulate"}], images=4)
    results = leakbench.run(plan, tmp_path, device="cpu").results()
    own = judged(results, 0.6)
    own = own[~own["floor"] & ((own["defense"] == "none") | own["threat"].str.contains("simulate"))]
    shares = own.groupby(["defense", "attack"])["recovered"].agg(["mean", "size"])
    assert len(shares) == (len(kinds) + 1) * len(attacks)
    assert (shares["size"] == 4).all()
    assert (shares["mean"] == 1).all(), shares.to_string()


@pytest.mark.long
def test_a_layer_that_is_withheld_from_every_image_keeps_its_reason(zoos):
    own = zoos.of("withheld")
    assert set(own["status"]) == {"unsupported"}
    reasons = own.drop_duplicates("attack").set_index("attack")["reason"]
    assert "none sent the gradients of its weight and its bias" in reasons["peel"]
    assert "label cannot be inferred" in reasons["ig(steps=20)"]


@pytest.mark.long
@dataclass(frozen=True)
class HidesFirst(Zoo):
    """Withholds the last layer of the grey image and of the first image."""

    def release(self, step, rng):
        hidden = grey(step) or torch.equal(step.images, Smooth().load([0])[0])
        return without_last_layer(step) if hidden else step.gradient()


@dataclass(frozen=True)
class HidesTwice(Zoo):
    """Withholds the last layer at its first two releases."""

    releases: ClassVar[list[int]] = []

    def release(self, step, rng):
        self.releases.append(1)
        return without_last_layer(step) if len(self.releases) < 3 else step.gradient()


def test_a_defense_that_hides_its_first_images_is_attacked_on_the_others(tmp_path):
    plan = matrix(defenses=["none", HidesFirst()], attacks=["peel"], images=3)
    run = leakbench.run(plan, tmp_path, device="cpu", chunk=3)
    results = run.results()
    own = results[(results["defense"] != "none") & ~results["floor"]].set_index("image")
    assert own["status"].to_dict() == {0: "unsupported", 1: "ok", 2: "ok"}
    told(own["reason"][0])
    with Store.open(run.out / FILE, readonly=True) as store:
        (scene,) = worst_cases(RunData.of(store, "zoo"))
    texts = {row.result.defense: sentence("share.j2", "share", row.result) for row in scene.defenses}
    assert texts[own["defense"][0]] == "2 of 2"


def test_a_defense_that_hides_at_its_first_releases_is_attacked(tmp_path):
    HidesTwice.releases.clear()
    plan = matrix(defenses=["none", HidesTwice()], attacks=["peel"], floors=False)
    results = leakbench.run(plan, tmp_path, device="cpu", chunk=2).results()
    assert set(results["status"]) == {"ok"}


@pytest.mark.long
@pytest.mark.parametrize("kind", EMPTY)
def test_nobody_recovers_what_was_not_sent(zoos, kind):
    own = zoos.of(kind)
    assert not (own["ssim_aligned"] >= 0.6).any()


@pytest.mark.long
def test_no_broken_defense_is_ranked_as_protecting(zoos):
    (scene,) = worst_cases(zoos.data)
    order = [row.result.defense for row in scene.defenses]
    broken = {f"zoo(kind={kind})" for kind in RUN}
    assert set(order[-len(broken) - 1 :]) == broken | {"zoo(kind=sometimes)"}
    assert not {one.defense for one in (*scene.known, *scene.least, *scene.near, *scene.most)} & broken
    texts = {row.result.defense: sentence("share.j2", "share", row.result) for row in scene.defenses}
    assert {texts[defense] for defense in broken} == {"the defense failed"}
    assert texts["zoo(kind=withheld)"] == "no attacker has a score"
    assert {one.defense for one in scene.failures} == broken | {"zoo(kind=sometimes)"}
    # zeros and another image's gradient: nothing is recovered, and nothing can be learned
    useless = [row.result for row in scene.defenses if row.result.defense in ("zoo", "zoo(kind=other)")]
    assert [one.share for one in useless] == [0, 0]
    assert all(one.useless and one.attacked_by == "not attacked adaptively" for one in useless)
    assert not [one for one in useless if one in (*scene.known, *scene.least, *scene.near, *scene.most)]
    ranked = [order.index(one.defense) for one in scene.known]
    assert max(ranked) < min(order.index(one.defense) for one in useless)
    assert {one.defense for one in scene.known} >= {"none", "zoo(kind=half)", "zoo(kind=flip)", "zoo(kind=x1e30)"}
    assert scene.oblivious
    text = worst_case.markdown(zoos.data, 0.6)
    assert (
        "**What zoo sends does not correlate significantly with the gradient**, so that it is not ranked: cosine 0.00"
        in text
    )
    assert re.search(r"\| zoo +\| 0 % .*\| not attacked adaptively +\| +0\.00 \[0\.00, 0\.00\] \|", text)
    assert "Not attacked adaptively, so that a small share does not show that a defense protects:" in text


@pytest.mark.long
def test_a_defense_that_fails_sometimes_comes_after_the_others_with_a_share(zoos):
    own = zoos.of(SOMETIMES).set_index(["attack", "image"])
    assert set(own.xs(1, level="image")["status"]) == {"error"}
    assert set(own.xs(0, level="image")["status"]) == {"ok"}
    (scene,) = worst_cases(zoos.data)
    with_share = [row.result for row in scene.defenses if not math.isnan(row.result.share)]
    assert with_share[-1].defense == "zoo(kind=sometimes)"
    assert sentence("share.j2", "share", with_share[-1]) == "1 of 1; the defense failed on 1 more"
    (failure,) = [one for one in defense_failures(zoos.results) if one.defense == "zoo(kind=sometimes)"]
    assert (failure.failed, failure.trials) == (3, 6)


@pytest.mark.long
def test_the_pages_say_that_the_defense_failed_and_why(zoos):
    zoos.run.report(("html",))
    words = re.sub(r"\s+", " ", re.sub("<[^>]+>", "", (zoos.run.out / "report.html").read_text()))
    assert "No adaptive attacker ran: that oblivious attackers recover little does not show that a defense" in words
    assert "What “zoo” sends does not correlate significantly with the gradient: cosine 0.00 (95 % interval" in words
    pages = {
        "report.md": markdown(zoos.data),
        "report.html": (zoos.run.out / "report.html").read_text(),
        "worst-case.md": worst_case.markdown(zoos.data, 0.6),
    }
    for page in ("report.md", "report.html", "worst-case.md"):
        assert "Defenses that failed" in pages[page]
        assert re.search(r"'?zoo(&#39;)?'? released (&#39;|')0(\.|&#46;)weight(&#39;|') as int32", pages[page])
    for line in pages["worst-case.md"].splitlines():
        if any(line.startswith(f"| zoo(kind={kind}) ") for kind in RUN) and line.count("|") == 7:
            assert "the defense failed" in line
    strongest = [line for line in pages["report.md"].splitlines() if line.startswith("| zoo(kind=nan) ")]
    assert any(re.fullmatch(r"\| zoo\(kind=nan\) +(\| the defense failed +)+\|", line) for line in strongest)
    for table in zoos.run.tables():
        columns = {str(column.header): list(map(str, column.cells)) for column in table.columns}
        cells = dict(zip(zip(columns["attack"], columns["defense"]), columns["no score"]))
        assert cells["peel", "zoo(kind=nan)"] == "the defense failed in 2"
        assert cells["peel", "zoo(kind=withheld)"] == "2 unsupported"


@pytest.mark.long
def test_a_leaderboard_leaves_broken_defenses_out_and_says_why(zoos):
    with Store.open(zoos.run.out / FILE, readonly=True) as store:
        found, missing = entries(store, "zoo")
    assert not {one.defense for one in found} & {f"zoo(kind={kind})" for kind in (*BROKEN, SOMETIMES)}
    (zeros,) = [one for one in found if one.defense == "zoo"]
    assert zeros.useless
    assert zeros.cosine == (0, 0, 0)
    (line,) = [line for line in missing if "zoo(kind=nan)" in line]
    assert "the defense failed on 2 images" in line


@pytest.mark.parametrize("kind", ["nan", "late-nan", "raises", "wrap"])
def test_a_strict_run_stops_at_a_broken_release_in_one_line(tmp_path, kind):
    with pytest.raises(LeakbenchError) as error:
        leakbench.run(matrix(kind, attacks=["ig(steps=1)"], images=1), tmp_path, device="cpu", strict=True)
    assert DEFENSE_FAILED in str(error.value)
    told(str(error.value))


# who is to blame


def test_a_network_without_finite_gradients_is_not_the_defenses_fault(tmp_path):
    broken = network()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    plan = matrix("flip", models=[broken], attacks=["ig(steps=1)"], images=1, floors=False)
    results = leakbench.run(plan, tmp_path, device="cpu").results()
    assert set(results["status"]) == {"error"}
    for reason in results["reason"]:
        told(reason)
        assert reason.startswith("ClientFailed: without any defense the client sends '0.weight' with 54 of 54 values")
    assert not defense_failures(results)


class Refuses(nn.Module):
    """A layer that takes no image but the grey one."""

    def forward(self, x: Tensor) -> Tensor:
        if not bool((x == 0.5).all()):
            raise RuntimeError("only grey")
        return x


def test_a_network_that_raises_is_not_the_defenses_fault(tmp_path):
    plan = matrix("flip", models=[nn.Sequential(Refuses(), network())], attacks=["ig(steps=1)"], images=1, floors=False)
    results = leakbench.run(plan, tmp_path, device="cpu").results()
    (reason,) = set(results["reason"])
    told(reason)
    assert "cannot take the client's step without any defense, either: RuntimeError: only grey" in reason


@dataclass(frozen=True)
class Accuser(Attack):
    """An attack that says that the defense failed."""

    name: ClassVar[str] = "accuser"

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        raise DefenseFailed("it was the defense")


def test_an_attack_cannot_blame_the_defense(tmp_path):
    results = leakbench.run(matrix(attacks=[Accuser()], images=1, floors=False), tmp_path, device="cpu").results()
    assert set(results["status"]) == {"error"}
    assert not defense_failures(results)
    told(results["reason"].iloc[0])


@dataclass(frozen=True)
class Wordy(Attack):
    """An attack with an error that fills a page, as some of torch's do."""

    name: ClassVar[str] = "wordy"

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        raise RuntimeError("no\n" * 10_000)


def test_an_error_that_fills_a_page_is_cut(tmp_path):
    results = leakbench.run(matrix(attacks=[Wordy()], images=1, floors=False), tmp_path, device="cpu").results()
    told(results["reason"].iloc[0])
    assert results["reason"].iloc[0].startswith("RuntimeError: no no")


# a release at other places


@pytest.mark.parametrize("shares", ["gradient", "weights"])
@pytest.mark.parametrize("kind", BROKEN)
def test_no_client_sends_a_broken_gradient_or_update(kind, shares):
    images, labels = Smooth().load([0])
    client = Client(images[0], int(labels[0]), "weights", "client")
    threat = ThreatModel(shares=shares)
    with pytest.raises(DefenseFailed) as error:
        observe(OwnModule("net", network()), Zoo(kind), threat, [client], 4, Smooth().mean())
    told(str(error.value))
    assert str(error.value).startswith(f"{DEFENSE_FAILED}'zoo' ")
    assert isinstance(error.value, BadOption)


def test_clients_that_send_different_layers_are_told_apart(tmp_path):
    """One of two images loses its last layer: each is attacked by what was sent of it."""

    @dataclass(frozen=True)
    class ForOne(Zoo):
        def release(self, step, rng):
            sent = super().release(step, rng)
            return sent if torch.equal(step.images, Smooth().load([0])[0]) else dict(list(sent.items())[:-1])

    plan = matrix(defenses=[ForOne("late-nan-not")], attacks=["peel"], floors=False)
    results = leakbench.run(plan, tmp_path, device="cpu", chunk=2).results().set_index("image")
    assert results["status"].to_dict() == {0: "ok", 1: "unsupported"}


@pytest.mark.parametrize("kind", ["nan", "int32", "sparse", "shape", "name", "nil"])
def test_a_client_that_trains_sends_no_broken_reply(kind):
    update = {name: value.detach() for name, value in network().named_parameters()}
    defense = Zoo(kind)
    reply = defense.reply(UpdateStep(defense, update, update), generator("reply"))
    with pytest.raises(DefenseFailed):
        checked(defense, reply, update)
    if kind == "nan":
        assert set(checked(defense, reply, update, finite=False)) == set(update)


def test_a_federated_round_with_a_broken_reply_is_refused():
    from leakbench.training.clients import Own, local_round

    images, labels = Smooth().load(range(4))
    data = ByteImages((images * 255).byte(), labels)
    trainee = Trainee.of(network(), Zoo("nan"))
    with pytest.raises(DefenseFailed, match="not finite"):
        local_round(trainee, data, Recipe(), Own({}, {}), trainee.shared(), client=0, number=1, seed=0, classes=4)


def batch_trained_behind(defense: Defense, factor: float = 1.0) -> tuple[bool, bool]:
    """Take a step in one place; return whether the network moved, and whether its weights are still finite."""
    trainee = Trainee.of(network(), defense)
    with torch.no_grad():
        trainee.network[-1].weight.mul_(factor)
    before = trainee.shared()
    images, labels = Smooth().load(range(4))
    sgd, state = rule(Recipe(), 1), resumed(trainee, {}, {})
    try:
        descend(trainee, sgd, state, images, labels, generator("release"), defended=True, classes=4)
    finally:
        moved = not same(trainee.shared(), before)
    return moved, all(bool(torch.isfinite(value).all()) for value in trainee.shared().values())


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind not in ("raises", "wrap", "nothing")])
def test_training_in_one_place_refuses_a_broken_release_as_a_trial_does(kind):
    with pytest.raises(DefenseFailed) as error:
        batch_trained_behind(Zoo(kind))
    told(str(error.value))
    assert str(error.value).startswith(f"{DEFENSE_FAILED}'zoo' ")


@pytest.mark.parametrize("kind", [*HARMLESS, *DTYPES, *EMPTY])
def test_training_in_one_place_takes_any_other_release(kind):
    assert batch_trained_behind(Zoo(kind))[0]


@pytest.mark.parametrize("kind", ["one-nan", "flip"])
def test_a_network_that_diverged_is_not_the_defenses_fault(kind):
    assert batch_trained_behind(Zoo(kind), factor=math.inf) == (True, False)


# odd sizes, and values that are not finite


def odd(observation: Observation, factor: float) -> Observation:
    return replace(observation, gradient={name: value * factor for name, value in observation.gradient.items()})


def run(spec: str, observation: Observation) -> Reconstruction:
    keys = tuple(f"attack {row}" for row in range(observation.trials))
    return attacks.parse(spec)(observation, Rng(keys, torch.device("cpu")))


def test_a_gradient_of_ordinary_size_is_left_as_it_is():
    observation = watch("lenet")
    for factor in (1.0, 1e-6, 1e4):
        _, known = prepare(attacks.parse("ig"), odd(observation, factor))
        assert known.size is None
        assert known.shown is None
        assert all(
            torch.equal(known.gradient[name], odd(observation, factor).gradient[name]) for name in known.gradient
        )


@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e36, 1e-38])
def test_a_gradient_of_odd_size_is_divided_by_a_power_of_two(factor):
    observation = watch("lenet")
    attack, known = prepare(attacks.parse("ig"), odd(observation, factor))
    assert known.size is not None
    largest = torch.stack([value.abs().flatten(1).amax(1) for value in known.gradient.values()]).amax(0)
    assert bool(((largest >= 1e-6) & (largest < 2)).all())
    assert known.size.log2().frac().abs().max() == 0
    for name, value in known.gradient.items():
        sent = odd(observation, factor).gradient[name]
        close(value.double() * known.size.double().view(-1, *[1] * (value.ndim - 1)), sent.double(), 1e-6)
    _, again = prepare(attack, known)
    assert again.size is known.size


def test_only_the_trials_of_odd_size_are_scaled():
    observation = watch("lenet", trials=3)
    factor = torch.tensor([1.0, 1e30, 1.0])
    own = {name: value * factor.view(-1, *[1] * (value.ndim - 1)) for name, value in observation.gradient.items()}
    mixed, plain = (run("lb(steps=8)", one) for one in (replace(observation, gradient=own), observation))
    for row in (0, 2):
        torch.testing.assert_close(mixed.images[row], plain.images[row], rtol=1e-6, atol=1e-6)
    assert not bool(mixed.failed[1])


@pytest.mark.parametrize("factor", [1e30, 1e-30])
@pytest.mark.parametrize("spec", ATTACKS)
def test_no_attack_is_stopped_by_the_size_of_what_was_sent(spec, factor):
    observation = watch("lenet")
    plain, scaled = run(spec, observation), run(spec, odd(observation, factor))
    assert bool(torch.isfinite(scaled.images).all())
    if spec.startswith(("ig", "lb", "idlg", "dlm+", "ggl", "prior", "peel")):  # the others search for the label
        assert scaled.labels is not None
        assert torch.equal(scaled.labels, plain.labels)
    if scaled.objective is not None:
        assert bool(torch.isfinite(scaled.objective).all())
    if plain.failed is not None and spec.startswith(("ig", "lb", "peel")):
        assert torch.equal(scaled.failed, plain.failed)


def test_a_learned_rate_is_that_of_what_was_sent():
    observation = watch("lenet", threat=ThreatModel(shares="weights"))
    spec = "dlm(steps=2, solver=adam, restarts=1)"
    plain, scaled = run(spec, observation), run(spec, odd(observation, 2.0**-90))
    ratio = scaled.findings["scale"].double() / plain.findings["scale"].double()
    assert torch.allclose(ratio.log2(), torch.full_like(ratio, 90.0), atol=0.1)


def with_values(observation: Observation, value: float, count: int) -> Observation:
    """Return the observation with the first ``count`` entries of each tensor of the first trial replaced."""
    gradient = {name: own.clone() for name, own in observation.gradient.items()}
    for own in gradient.values():
        own[0].view(-1)[:count] = value
    return replace(observation, gradient=gradient)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_entries_that_are_not_finite_are_left_out_of_a_match(value):
    observation = watch("lenet")
    found, plain = (run("lb(steps=25)", one) for one in (with_values(observation, value, 1), observation))
    assert found.failed.tolist() == [False, False]
    assert float(found.objective[0]) < 0.1
    torch.testing.assert_close(found.images[1], plain.images[1], rtol=1e-4, atol=1e-4)


def test_entries_that_are_not_finite_are_not_shown():
    observation = with_values(watch("lenet"), math.nan, 2)
    _, known = prepare(attacks.parse("ig"), observation)
    for name, value in known.gradient.items():
        missing = ~torch.isfinite(observation.gradient[name])
        assert torch.equal(known.shown[name], ~missing)
        assert bool((value[missing] == 0).all())
    assert same(known.shown, prepare(attacks.parse("ig"), known)[1].shown)


def test_ordinary_sizes_hold_those_of_trained_networks():
    low, high = ORDINARY_SIZES
    assert low < 1e-9 * 1.1
    assert high > 1e4
