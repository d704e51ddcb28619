"""The attacks: closed forms, what they recover, how they choose, and that no trial knows of another."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import (
    ATTACKS,
    CLASSES,
    DEFENSES,
    GENERAL_PATHS,
    SHAPE,
    SMALL,
    clients,
    plain,
    rand,
    randn,
    same,
    tensors_of,
    watch,
)
from torch import Tensor, nn

from leakbench import attacks
from leakbench.attacks.base import prepare
from leakbench.attacks.dlg import DLG
from leakbench.attacks.ig import IG, cosine_distance
from leakbench.attacks.matching import (
    ROUGHNESS,
    GradientMatching,
    MatchingObjective,
    analytic_labels,
    total_variation,
)
from leakbench.attacks.quasi_newton import QuasiNewton
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients import Path
from leakbench.gradients.bilinear import squared_distance
from leakbench.models import OwnModule
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns

MATCHING = [spec for spec in ATTACKS if isinstance(attacks.parse(spec), GradientMatching)]


def keys(trials: int) -> Rng:
    return Rng(tuple(f"attack {t}" for t in range(trials)))


def run(spec: str | attacks.Attack, observation: Observation) -> Reconstruction:
    return attacks.parse(spec)(observation, keys(observation.trials))


def truths(trials: int) -> Tensor:
    return torch.stack([client.image for client in clients(trials)])


def psnr(a: Tensor, b: Tensor) -> Tensor:
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def rows_of(observation: Observation, rows: list[int]) -> Observation:
    """Return the observation of some trials alone, cut by hand."""
    own = tensors_of(observation.model)
    return replace(
        observation,
        weights={n: v[rows] if v.ndim > own[n].ndim else v for n, v in observation.weights.items()},
        gradient={n: v[rows] for n, v in observation.gradient.items()},
        labels=None if observation.labels is None else observation.labels[rows],
    )


# distances and priors


def test_total_variation_of_known_images() -> None:
    height, width = 5, 7
    ramp = torch.arange(width).float().expand(1, 1, height, width) * 0.25
    torch.testing.assert_close(total_variation(ramp), torch.tensor([0.25]))
    torch.testing.assert_close(total_variation(ramp.transpose(2, 3)), torch.tensor([0.25]))
    checks = (torch.arange(height)[:, None] + torch.arange(width)) % 2 * 1.0
    torch.testing.assert_close(total_variation(checks.expand(1, 3, height, width)), torch.tensor([2.0]))
    spike = torch.zeros(1, 1, height, width)
    spike[0, 0, 2, 3] = 1.0
    expected = 2 / (height * (width - 1)) + 2 / ((height - 1) * width)
    torch.testing.assert_close(total_variation(spike), torch.tensor([expected]))
    torch.testing.assert_close(total_variation(torch.full((2, 3, 4, 4), 0.7)), torch.zeros(2))


def gradients(seed: int = 0, trials: int = 3) -> dict[str, Tensor]:
    return {"w": randn(trials, 4, 5, seed=seed), "b": randn(trials, 6, seed=seed + 1)}


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in gradient.values()], 1)


@pytest.mark.usefixtures("float64")
def test_the_squared_distance_is_that_of_all_entries() -> None:
    a, b = gradients(0), gradients(5)
    torch.testing.assert_close(squared_distance(a, b), (flat(a) - flat(b)).square().sum(1))
    assert squared_distance(a, a).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.usefixtures("float64")
def test_the_cosine_distance_is_global_and_does_not_know_scale() -> None:
    a, b = gradients(0), gradients(5)
    expected = 1 - torch.cosine_similarity(flat(a), flat(b))
    torch.testing.assert_close(cosine_distance(a, b), expected)
    scale = torch.tensor([0.01, 3.0, 700.0])
    scaled = {name: value * scale.view(3, *[1] * (value.ndim - 1)) for name, value in a.items()}
    torch.testing.assert_close(cosine_distance(scaled, b), expected)
    torch.testing.assert_close(cosine_distance(b, scaled), expected)
    torch.testing.assert_close(cosine_distance(a, a), torch.zeros(3))
    torch.testing.assert_close(cosine_distance({n: -v for n, v in a.items()}, a), torch.full((3,), 2.0))
    layer = {"w": 2 * a["w"], "b": a["b"]}
    assert float((cosine_distance(layer, b) - expected).abs().max()) > 1e-3, "one cosine over all, not one a layer"


@pytest.mark.parametrize("distance", [squared_distance, cosine_distance])
def test_distances_compare_what_was_sent(distance: Any) -> None:
    a, b = gradients(0), gradients(5)
    torch.testing.assert_close(distance(a, {"b": b["b"]}), distance({"b": a["b"]}, {"b": b["b"]}))


def test_the_prior_is_added_to_the_objective_and_not_to_the_match() -> None:
    observation = watch("lenet")
    image = {"image": rand(2, *SHAPE), "label": randn(2, CLASSES)}
    values = []
    for tv in (0.0, 0.5):
        objective = DLG(tv=tv)._objective(observation, keys(2))
        values.append((objective(image, 0), objective.match(image, 0)))
    torch.testing.assert_close(values[0][0], values[0][1])
    torch.testing.assert_close(values[1][1], values[0][1])
    torch.testing.assert_close(values[1][0], values[0][0] + 0.5 * total_variation(image["image"]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("defense", ["noise(scale=0.1)", "noise(scale=0.1, kind=laplace)", "quantise(bits=4)"])
def test_an_informed_attacker_goes_by_the_law_of_what_the_defense_draws(defense: str) -> None:
    _, observation = prepare(DLG(), watch("lenet", defense, "informed=true", trials=2))
    assert observation.adaptive is not None
    likelihood = observation.adaptive.likelihood
    assert likelihood is not None
    observed = observation.gradient
    start = {"image": rand(2, *SHAPE), "label": randn(2, CLASSES)}
    for attack in (DLG(), IG(labels="joint")):
        objective = attack._objective(observation, keys(2))
        dummy = objective.dummy(start["image"], torch.softmax(start["label"], 1), {}, 0)
        zeros = {name: torch.zeros_like(value) for name, value in observed.items()}
        own, nothing = (likelihood(gradient, observed, {}) for gradient in (dummy, zeros))
        least = math.prod(SHAPE) / (ROUGHNESS * attack.tv) if attack.tv else 0.0
        expected = own / nothing.clamp(min=least) + attack.prior(start["image"])
        torch.testing.assert_close(objective.match(start, 0), expected)


def test_the_truth_is_a_minimum_of_the_objective() -> None:
    observation = watch("lenet-bn", threat="known-label", trials=3)
    for name, zero in (("dlg", 1e-9), ("ig(tv=0)", 1e-5)):
        objective = attacks.parse(name)._objective(observation, keys(3))
        assert float(objective({"image": truths(3)}, 0).detach().max()) < zero
        assert float(objective({"image": truths(3).flip(3)}, 0).detach().min()) > 5 * zero


# labels


@pytest.mark.parametrize("defense", ["none", "keylock(length=9)", "norm-only"])
@pytest.mark.parametrize("model", ["lenet", "lenet-bn", "lenet(init=default)"])
def test_the_analytic_label_is_exact_for_every_class(model: str, defense: str) -> None:
    trials = 12
    observation = watch(model, defense, trials=trials, classes=12)
    labels = [client.label for client in clients(trials, classes=12)]
    assert sorted(set(labels)) == list(range(1, 12, 3)) or len(set(labels)) == 12
    assert analytic_labels(observation).tolist() == labels
    only_bias = replace(observation, gradient={"classifier.bias": observation.gradient["classifier.bias"]})
    assert analytic_labels(only_bias).tolist() == labels


def test_every_class_is_read_off() -> None:
    observation = watch("lenet", trials=CLASSES, classes=CLASSES)
    assert sorted(analytic_labels(observation).tolist()) == list(range(CLASSES))
    assert run("idlg(steps=1)", observation).labels.tolist() == [client.label for client in clients(CLASSES)]


def test_a_known_label_is_used_and_an_unknown_one_is_sought() -> None:
    known = watch("lenet", threat="known-label", trials=3)
    for spec in MATCHING:
        assert run(spec, known).labels.tolist() == known.labels.tolist()
    unknown = watch("lenet", trials=3)
    attack = DLG(steps=1)
    joint = attack._search(attack._objective(unknown, keys(3)))
    assert DLG()._objective(unknown, keys(3)).observation.labels is None
    assert joint.labels.shape == (3,)
    wrong = replace(known, labels=(known.labels + 1) % CLASSES)
    assert run("idlg(steps=1)", wrong).labels.tolist() == wrong.labels.tolist(), "what is granted is not second-guessed"


def test_the_analytic_label_needs_the_classifiers_gradient() -> None:
    observation = watch("lenet")
    withheld = replace(
        observation, gradient={n: v for n, v in observation.gradient.items() if not n.startswith("classifier")}
    )
    for spec in ("idlg(steps=1)", "ig(steps=1)"):
        with pytest.raises(Unsupported, match="label"):
            attacks.parse(spec).check(withheld)
        with pytest.raises(Unsupported, match="label"):
            run(spec, withheld)
    attacks.parse("dlg(steps=1)").check(withheld)
    attacks.parse("idlg(steps=1, labels=joint)").check(withheld)


# recovery


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("spec", "least"), [("dlg(steps=20)", 50), ("idlg(steps=20)", 50), ("ig(steps=150)", 25)])
def test_small_images_are_recovered(spec: str, least: float) -> None:
    trials = 3
    found = run(spec, watch("lenet", trials=trials))
    worked = ~found.failed
    assert int(worked.sum()) >= 2
    assert float(psnr(found.images, truths(trials))[worked].min()) > least
    labels = torch.tensor([client.label for client in clients(trials)])
    assert torch.equal(found.labels[worked], labels[worked])
    assert float(psnr(found.images, truths(trials).roll(1, 0))[worked].max()) < 15, "each trial finds its own"


@pytest.mark.usefixtures("float64")
def test_noise_hides_the_image() -> None:
    seen = run("dlg(steps=3)", watch("lenet", "noise(scale=0.3)", trials=2))
    assert float(psnr(seen.images.clamp(0, 1), truths(2)).max()) < 20


# choosing among restarts


@dataclass(frozen=True)
class Fixed(GradientMatching):
    """Answers with a constant image a search, from a list; the matching distance is the image's mean."""

    name = "fixed"
    values: tuple[float, ...] = (0.3, 0.1, 0.2)
    broken: tuple[int, ...] = ()

    def distance(self, gradient: dict[str, Tensor], observed: Any) -> Tensor:
        raise AssertionError

    def _search(self, objective: MatchingObjective) -> Any:
        key, trials = objective.rng.keys[0], objective.observation.trials
        index = 0 if "restart" not in key else int(key.rpartition(" ")[2])
        value = self.values[index]
        attack = IG(steps=1)
        run = attack._search(attack._objective(objective.observation, objective.rng))
        size = torch.ones(trials)
        # the second trial sees the values in reverse, so that the rows choose apart
        matched = size * value
        matched[1] = self.values[::-1][index]
        images = matched.view(-1, 1, 1, 1).expand(trials, *SHAPE)
        failed = torch.full((trials,), index in self.broken)
        return replace(run, images=images, objective=matched, failed=failed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        raise AssertionError


@pytest.mark.parametrize(
    ("values", "broken", "chosen"),
    [
        ((0.3, 0.1, 0.2), (), [0.1, 0.1]),
        ((0.3, 0.1, 0.4), (1,), [0.3, 0.3]),
        ((0.3, math.nan, 0.2), (), [0.2, 0.2]),
        ((0.3, -math.inf, 0.2), (1,), [0.2, 0.2]),
        ((math.inf, 0.9, math.nan), (), [0.9, 0.9]),
        ((0.3, 0.2, 0.5), (0, 2), [0.2, 0.2]),
    ],
)
def test_the_restart_with_the_smallest_finite_objective_is_chosen(
    values: tuple[float, ...], broken: tuple[int, ...], chosen: list[float]
) -> None:
    attack = Fixed(restarts=3, values=values, broken=broken)
    found = run(attack, watch("lenet", trials=2))
    torch.testing.assert_close(found.objective, torch.tensor(chosen))
    torch.testing.assert_close(found.images, torch.tensor(chosen).view(2, 1, 1, 1).expand(2, *SHAPE))
    assert not bool(found.failed.any())


def test_rows_choose_apart_and_all_failed_stays_failed() -> None:
    found = run(Fixed(restarts=2, values=(0.1, 0.7)), watch("lenet", trials=2))
    assert found.objective.tolist() == pytest.approx([0.1, 0.1])
    dead = run(Fixed(restarts=2, values=(0.1, 0.7), broken=(0, 1)), watch("lenet", trials=2))
    assert dead.failed.tolist() == [True, True]


def test_restarts_are_independent_and_their_evaluations_are_counted() -> None:
    observation = watch("lenet", trials=2)
    once, thrice = (run(f"ig(steps=3, restarts={n})", observation) for n in (1, 3))
    assert once.evaluations.tolist()[0] >= 4, "three steps, and the final match"
    assert torch.equal(thrice.evaluations, 3 * once.evaluations)
    assert bool((thrice.objective <= once.objective).all())
    attack = IG(steps=3)
    others = [attack._objective(observation, keys(2).fork(f"restart {n}")) for n in (1, 2)]
    single = [attack._search(other) for other in others]
    assert not torch.equal(single[0].images, single[1].images)
    best = torch.stack([once.objective, *[run.objective for run in single]]).min(0).values
    torch.testing.assert_close(thrice.objective, best)


@pytest.mark.usefixtures("float64")
def test_a_search_that_ends_no_better_than_it_began_has_failed() -> None:
    """A step so long that it throws the image away; and a gradient without any number."""
    observation = watch("lenet", trials=3)
    worse = run("ig(steps=1, lr=1000, boxed=false)", observation)
    assert worse.failed.tolist() == [True] * 3
    fine = run("ig(steps=20, lr=0.05)", observation)
    assert fine.failed.tolist() == [False] * 3
    gradient = {name: value.clone() for name, value in observation.gradient.items()}
    for value in gradient.values():
        value[1] = torch.nan
    for spec in ("ig(steps=20, lr=0.05)", "dlg(steps=1)"):
        broken = run(spec, replace(observation, gradient=gradient))
        clean = run(spec, observation)
        assert bool(broken.failed[1])
        assert bool(torch.isfinite(broken.images[[0, 2]]).all())
        assert broken.failed[[0, 2]].tolist() == clean.failed[[0, 2]].tolist()
        torch.testing.assert_close(broken.images[[0, 2]], clean.images[[0, 2]], rtol=1e-6, atol=1e-6)


# schedule and box


def test_ig_lowers_its_step_after_3_5_and_7_eighths(monkeypatch: pytest.MonkeyPatch) -> None:
    from leakbench.attacks import adam

    seen: dict[str, Any] = {}

    def spy(objective: Any, start: Unknowns, **options: Any) -> Solution:
        seen.update(options)
        return descend(objective, start, **{**options, "steps": 1})

    descend = adam.descend
    monkeypatch.setattr(adam, "descend", spy)
    run("ig(steps=4000)", watch("lenet"))
    assert seen["milestones"] == (1499, 2500, 3502)
    assert [round(8 * m / 4000) for m in seen["milestones"]] == [3, 5, 7]
    assert seen["sign"] == ("image",)
    assert seen["lr"]["image"] == 0.1
    run("ig(steps=8, signed=false)", watch("lenet"))
    assert seen["sign"] == ()


def test_ig_is_boxed_and_dlg_is_not() -> None:
    observation = watch("lenet", trials=3)
    boxed = run("ig(steps=2, lr=0.5)", observation).images
    assert float(boxed.min()) >= 0
    assert float(boxed.max()) <= 1
    free = run("ig(steps=2, lr=0.5, boxed=false)", observation).images
    assert float(free.min()) < 0
    assert float(run("dlg(steps=1)", observation).images.min()) < 0


# secrets


def test_a_sampled_secret_is_the_attackers_draw_of_the_law() -> None:
    observation = watch("lenet", "keylock(length=400)", trials=3)
    told = watch("lenet", "keylock(length=400)", {"reveals": ["key", "lock"]}, trials=3)
    objective = IG()._objective(observation, keys(3))
    for secret in observation.secrets:
        mine, theirs = objective.tensors[secret.name], told.weights[secret.name]
        assert mine.shape == theirs.shape
        assert not torch.isclose(mine, theirs, rtol=0, atol=1e-6).any(dim=-1).all()
        n = mine.numel()
        correlation = float(torch.corrcoef(torch.stack([mine.flatten(), theirs.flatten()]))[0, 1])
        assert abs(correlation) < 5 / n**0.5
        low, high = (0.0, 1.0) if secret.group == "key" else (-(400**-0.5), 400**-0.5)
        assert low <= float(mine.min()) < float(mine.max()) <= high
        assert float(mine.mean()) == pytest.approx((low + high) / 2, abs=5 * (high - low) * (1 / 12 / n) ** 0.5)
    assert not torch.equal(
        objective.tensors[observation.secrets[0].name],
        IG()._objective(observation, keys(3).fork("restart 1")).tensors[observation.secrets[0].name],
    )


def test_a_sampled_key_stays_and_sampled_noise_is_drawn_anew() -> None:
    for defense, constant in (("keylock(length=9)", True), ("precode(k=6)", False)):
        observation = watch("lenet", defense)
        objective = IG()._objective(observation, keys(2))
        name = observation.secrets[0].name
        draws = [objective._filled({}, evaluation)[name] for evaluation in (0, 1, 0)]
        assert draws[0].shape[0] == 2
        assert torch.equal(draws[0], draws[1]) == constant
        assert torch.equal(draws[0], draws[2])
        assert not torch.equal(draws[0][0], draws[0][1])


class Spy(IG):
    """Keeps what the solver started from and returns it."""

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        object.__setattr__(self, "started", {name: value.clone() for name, value in start.items()})
        return super().solve(objective, start)


@pytest.mark.parametrize(
    ("defense", "threat", "sought"),
    [
        ("keylock(length=9)", {}, ["secret:features.0.1.key"]),
        ("keylock(length=9)", {"reveals": ["key"]}, []),
        ("keylock(length=9)", {"reveals": ["lock"]}, ["secret:features.0.1.key"]),
        ("precode(k=6)", {}, ["secret:classifier.0.noise"]),
        ("precode(k=6)", {"reveals": ["noise"]}, []),
        ("none", {}, []),
    ],
)
def test_optimised_secrets_are_the_hidden_inputs_of_the_network(
    defense: str, threat: dict[str, Any], sought: list[str]
) -> None:
    observation = watch("lenet", defense, threat)
    for secrets, expected in (("optimise", sought), ("sample", [])):
        attack = Spy(steps=2, secrets=secrets)
        run(attack, observation)
        assert [name for name in attack.started if name not in ("image", "label")] == expected  # type: ignore[attr-defined]
    buffers = dict(observation.model.named_buffers())
    assert all(name.removeprefix("secret:") in buffers for name in sought)


@pytest.mark.usefixtures("float64")
def test_a_sought_key_improves_the_match() -> None:
    observation = watch("lenet", "keylock(length=9)", {"reveals": ["lock-weights"]}, trials=3)
    sampled, sought = (
        run(f"ig(steps=30, tv=0, lr=0.05, secrets={how})", observation) for how in ("sample", "optimise")
    )
    assert float(sought.objective.sum()) < float(sampled.objective.sum())


# properties of every attack


@pytest.mark.parametrize(
    ("defense", "threat"),
    [(defense, "paper") for defense in DEFENSES] + [("keylock(length=9)", "labels=known, informed=true")],
)
@pytest.mark.parametrize("spec", ATTACKS)
def test_an_attack_leaves_the_observation_and_the_global_generator_alone(spec: str, defense: str, threat: str) -> None:
    state = torch.get_rng_state()
    observation = watch("lenet-bn", defense, threat, trials=2)
    assert torch.equal(torch.get_rng_state(), state)
    before = plain(observation)
    attacks.parse(spec).check(observation)
    found = run(spec, observation)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(plain(observation), before)
    copy.deepcopy(observation.model)  # which a tensor with a graph in an attribute would make raise
    weights = {value.untyped_storage().data_ptr() for value in [*observation.weights.values(), observation.mean_image]}
    assert found.images.untyped_storage().data_ptr() not in weights, "the caller may change what it was given"


def test_the_deep_comparison_sees_a_change() -> None:
    observation = watch("lenet-bn")
    before = plain(observation)
    assert same(plain(observation), before)
    observation.gradient["classifier.bias"][0, 0] += 1e-3
    assert not same(plain(observation), before)
    observation = watch("lenet-bn")
    observation.model.note = torch.ones(1)  # type: ignore[assignment]
    assert not same(plain(observation), before)


@pytest.mark.parametrize("spec", ATTACKS)
def test_the_same_rng_gives_bitwise_the_same_answer(spec: str) -> None:
    for defense in ("keylock(length=9)", "precode(k=6)"):
        observation = watch("lenet", defense)
        first, second = run(spec, observation), run(spec, observation)
        assert same(plain(first), plain(second))
    if isinstance(attacks.parse(spec), GradientMatching):  # a closed form draws nothing, and floors are fixed
        other = attacks.parse(spec)(observation, Rng(("x", "y")))
        assert not torch.equal(first.images, other.images)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("spec", ATTACKS)
def test_trials_do_not_know_of_each_other(spec: str, defense: str) -> None:
    """Together, in another order, and one at a time: the same images, in float64 over a few steps."""
    trials = 3
    observation = watch("lenet", defense, trials=trials, fresh=True)
    attack = attacks.parse(spec)
    rng = keys(trials)
    together = attack(observation, rng)
    assert together.images.shape == (trials, *SHAPE)
    for rows in ([2, 0, 1], [1]):
        some = attack(rows_of(observation, rows), rng.select(rows))
        torch.testing.assert_close(some.images, together.images[rows], rtol=1e-8, atol=1e-8)
        if together.labels is not None:
            assert torch.equal(some.labels, together.labels[rows])
        if together.failed is not None:
            assert torch.equal(some.failed, together.failed[rows])
        if together.evaluations is not None:
            assert torch.equal(some.evaluations, together.evaluations[rows])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", MATCHING)
def test_both_paths_give_the_same_images(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from leakbench.attacks.matching import objective as matching

    observation = watch("lenet-bn", "keylock(length=9)", trials=2)
    fast = run(spec, observation)
    monkeypatch.setattr(matching, "choose_path", lambda *args, **kwargs: "one-at-a-time")
    slow = run(spec, observation)
    assert (fast.path, slow.path) == ("batched", "one-at-a-time")
    # an L-BFGS step is 20 iterations, each of which amplifies the rounding of the one before
    tolerance = 1e-4 if isinstance(attacks.parse(spec), QuasiNewton) else 1e-10
    torch.testing.assert_close(fast.images, slow.images, rtol=tolerance, atol=tolerance)


def test_floors_use_nothing_but_shapes_and_the_public_mean() -> None:
    one, other = watch("lenet", trials=3), watch("lenet-bn", "noise", trials=3)
    for name in attacks.names():
        attack = attacks.parse(SMALL.get(name, name))
        if attack.floor:
            assert torch.equal(attack(one, keys(3)).images, attack(other, keys(3)).images)
    assert torch.equal(run("grey", one).images, torch.full((3, *SHAPE), 0.5))
    mean = replace(one, mean_image=rand(*SHAPE))
    assert torch.equal(run("mean", mean).images, rand(*SHAPE).expand(3, *SHAPE))
    noise = attacks.parse("random")(watch("lenet", trials=20), keys(20)).images
    assert 0 <= float(noise.min()) < float(noise.max()) < 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / noise.numel()) ** 0.5)


def test_an_attack_on_a_network_without_second_derivatives_is_unsupported() -> None:
    class Hard(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.hardsigmoid(x)

    network = nn.Sequential(nn.Conv2d(1, 3, 3), Hard(), nn.Flatten(), nn.Linear(108, CLASSES))
    observation = watch(OwnModule("hard", network))
    for spec in MATCHING:
        with pytest.raises(Unsupported, match="twice"):
            attacks.parse(spec).check(observation)
        with pytest.raises(Unsupported, match="twice"):
            run(spec, observation)


def test_an_observation_without_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to attack"):
        replace(watch("lenet"), gradient={})


def test_the_final_objective_does_not_depend_on_the_neighbours() -> None:
    """The final match draws PRECODE's noise at an evaluation number that is the chunk's largest."""

    class Early(DLG):
        def solve(self, objective, start):  # type: ignore[no-untyped-def]
            solution = super().solve(objective, start)
            # rows that stop at different evaluations, as L-BFGS's do
            return replace(solution, evaluations=torch.arange(len(start["image"])) * 5 + 5)

    observation = watch("lenet", "precode(k=6)", trials=2)
    attack = Early(steps=1)
    together = attack(observation, keys(2)).objective
    alone = attack(rows_of(observation, [0]), keys(2).select([0])).objective
    torch.testing.assert_close(alone[0], together[0], rtol=1e-3, atol=0)


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", GENERAL_PATHS)
def test_dropout_draws_each_trials_own_masks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leakbench.attacks.matching import objective as matching

    observation = watch(OwnModule("dropped", Dropped().train()), trials=3)
    state = torch.get_rng_state()
    monkeypatch.setattr(matching, "choose_path", lambda *args, **kwargs: path)
    together = run("ig(steps=3)", observation)
    assert together.path == path
    for rows in ([0], [2, 1]):
        some = attacks.parse("ig(steps=3)")(rows_of(observation, rows), keys(3).select(rows))
        torch.testing.assert_close(some.images, together.images[rows], rtol=1e-9, atol=1e-9)
    monkeypatch.undo()
    chosen = run("ig(steps=3)", observation)
    assert chosen.path == "batched"
    torch.testing.assert_close(chosen.images, together.images, rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    still = run("ig(steps=3)", watch(OwnModule("dropped", Dropped().eval()), trials=3))
    assert not torch.allclose(still.images, together.images)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("path", GENERAL_PATHS)
def test_dropout_draws_for_each_trials_own_evaluation(path: Path) -> None:
    """As L-BFGS asks for, whose rows count their evaluations apart; its iterations would amplify rounding."""
    objective = attacks.parse("dlg")._objective(watch(OwnModule("dropped", Dropped().train()), trials=3), keys(3))  # type: ignore[attr-defined]
    served = replace(objective, evaluator=replace(objective.evaluator, path=path))
    start = {"image": rand(3, *SHAPE), "label": rand(3, CLASSES, seed=1)}
    together = served.match(start, [4, 0, 7])
    for row, evaluation in enumerate([4, 0, 7]):
        own = {name: value[row : row + 1] for name, value in start.items()}
        alone = objective.select([row])
        torch.testing.assert_close(alone.match(own, evaluation)[0], together[row], rtol=1e-12, atol=0)
        assert not torch.isclose(alone.match(own, evaluation + 1)[0], together[row])


def test_dropout_whose_mask_is_not_leaked_draws_anew_at_every_evaluation() -> None:
    network = Dropped()
    network.net = nn.Sequential(*(network.net[place] for place in (0, 2, 1, 3, 4)))  # the sigmoid hides the zeros
    objective = attacks.parse("ig")._objective(watch(OwnModule("dropped", network.train())), keys(2))  # type: ignore[attr-defined]
    start = {"image": rand(2, *SHAPE)}
    values = [objective.match(start, evaluation).detach() for evaluation in (0, 1, 0)]
    assert torch.equal(values[0], values[2])
    assert bool((values[0] != values[1]).all())


def test_numbers_drawn_in_an_unknown_way_are_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.sigmoid(x.flatten(1)) + torch.zeros(()).exponential_())

    with pytest.raises(Unsupported, match="random numbers"):
        run("ig(steps=3)", watch(OwnModule("noisy", Noisy())))


def test_a_scalar_parameter_can_be_matched() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, CLASSES)
            self.temperature = nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.sigmoid(x.flatten(1))) * self.temperature

    observation = watch(OwnModule("tempered", Tempered()))
    for spec in ("ig(steps=2)", "dlg(steps=1)"):
        assert run(spec, observation).images.shape == (2, *SHAPE)


def test_a_stateful_normalisation_does_not_write_into_the_observation() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(144, 4),
    )
    observation = watch(OwnModule("instance", network.train()))
    before = plain(observation)
    run("ig(steps=2)", observation)
    assert same(plain(observation), before)


def test_a_float64_observation_can_be_attacked() -> None:
    observation = watch("lenet")
    double = replace(
        observation,
        weights={n: v.double() for n, v in observation.weights.items()},
        gradient={n: v.double() for n, v in observation.gradient.items()},
        mean_image=observation.mean_image.double(),
    )
    run("ig(steps=2)", double)


def test_failing_is_judged_by_one_quantity() -> None:
    """A search that is smoother than its start and further from the gradient has failed: priors do not count."""
    observation = watch("lenet", threat="known-label")

    truth = torch.stack([client.image for client in clients(2)])
    wiggle = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))

    class Worse(IG):
        """Starts near the truth and ends further off."""

        def start(self, observation, rng):  # type: ignore[no-untyped-def]
            return {"image": truth + 0.01 * wiggle}

        def solve(self, objective, start):  # type: ignore[no-untyped-def]
            worse = {"image": truth + 0.1 * wiggle}
            assert bool((objective.match(worse, 0) > objective.match(start, 0)).all())
            return replace(super().solve(objective, start), unknowns=worse)

    assert run(Worse(steps=1, tv=0.1), observation).failed.tolist() == [True, True]


def test_the_label_is_read_off_the_classifier_that_is_in_use() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(64, CLASSES)
            self.spare = nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(torch.sigmoid(x.flatten(1)))

    observation = watch(OwnModule("spare", Spare()))
    assert run("ig(steps=1)", observation).labels.tolist() == [client.label for client in clients(2)]
