"""Clients that share their weights: what is sent, and what an attacker works on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CLASSES, ON_WEIGHTS, SHAPE, clients, close, plain, rand, randn, same, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from leakbench import attacks, defenses
from leakbench.api import run
from leakbench.attacks.base import prepare
from leakbench.attacks.dlm import DLM
from leakbench.attacks.matching import MatchingObjective
from leakbench.core.rng import Rng
from leakbench.core.types import ThreatModel
from leakbench.defenses import AdaptiveAttacker, Defense, Step
from leakbench.errors import BadOption, Unsupported
from leakbench.models import parse
from leakbench.optim import Solution, Unknowns, value_and_gradient
from leakbench.plan.matrix import Matrix, parse_threat
from leakbench.report import weights
from leakbench.report.figure import saved
from leakbench.store.records import TrialRecord
from leakbench.store.run_file import Store
from leakbench.victim import build

KNOWN = "shares=weights, rate=known, learning_rate=0.1"


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("model", ["lenet", "lenet-bn"])
@pytest.mark.usefixtures("float64")
def test_the_update_is_that_of_torchs_sgd(model: str, steps: int) -> None:
    observation = watch(model, threat=f"shares=weights, learning_rate=0.1, local_steps={steps}")
    for row, client in enumerate(clients(2)):
        network = build(parse(model), defenses.parse("none"), SHAPE, CLASSES, client.weights_key)
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(steps):
            optimiser.zero_grad()
            F.cross_entropy(network(client.image[None]), torch.tensor([client.label])).backward()
            optimiser.step()
        after = dict(network.named_parameters())
        assert observation.gradient.keys() == after.keys()  # running statistics are not sent
        for name, value in observation.gradient.items():
            close(value[row], before[name] - after[name].detach(), 1e-12)
            assert torch.equal(observation.weights[name][row], before[name])
        for name, buffer in build(
            parse(model), defenses.parse("none"), SHAPE, CLASSES, client.weights_key
        ).named_buffers():
            assert torch.equal(observation.weights[name], buffer)


@pytest.mark.usefixtures("float64")
def test_a_gradient_attack_works_on_the_gradient_where_the_rate_is_granted() -> None:
    gradient = watch("lenet").gradient
    _, known = prepare(attacks.parse("dlg"), watch("lenet", threat=KNOWN))
    for name, value in known.gradient.items():
        close(value, gradient[name], 1e-9)
    _, several = prepare(attacks.parse("dlg"), watch("lenet", threat=f"{KNOWN}, local_steps=3"))
    size = sum(float(value.square().sum()) for value in gradient.values()) ** 0.5
    off = sum(float((several.gradient[name] - value).square().sum()) for name, value in gradient.items()) ** 0.5
    assert 1e-6 * size < off < 0.5 * size  # a mean of the steps' gradients


@pytest.mark.parametrize("defense", ["clip(norm=0.01)", "weight-sparsify"])
def test_a_prepared_observation_is_not_prepared_again(defense: str) -> None:
    seen = watch("lenet", defense, f"{KNOWN}, local_steps=2, informed=true")
    attack, known = prepare(attacks.parse("ig(steps=2)"), seen)
    assert not same(plain(known.gradient), plain(seen.gradient))
    assert torch.equal(attack(seen, Rng(("a", "b"))).images, attack(known, Rng(("a", "b"))).images)


@pytest.mark.parametrize("name", ["dlg", "idlg", "ig", "lb", "log-cosine"])
def test_without_the_rate_a_gradient_attack_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(Unsupported, match="rate=known") as error:
        prepare(attacks.parse(name), watch("lenet", threat="weights"))
    assert "\n" not in str(error.value)
    prepare(attacks.parse("grey"), watch("lenet", threat="weights"))


def test_the_closed_form_of_a_chain_is_the_same_without_the_rate() -> None:
    known, hidden = (
        attacks.parse("peel")(watch("lenet", threat=threat), Rng(("a", "b"))) for threat in (KNOWN, "weights")
    )
    assert not bool(hidden.failed.any())
    torch.testing.assert_close(hidden.images, known.images, rtol=0, atol=2e-3)


@pytest.mark.parametrize("spec", ["noise", "clip(norm=1e-3)", "prune", "quantise", "soteria"])
def test_a_defense_of_gradients_acts_on_the_update(spec: str) -> None:
    sent = watch("lenet", spec, KNOWN).gradient
    plain = watch("lenet", "none", KNOWN).gradient
    assert any(not torch.equal(sent[name], value) for name, value in plain.items())
    if spec.startswith("clip"):
        norm = sum(value.square().flatten(1).sum(1) for value in sent.values()).sqrt()
        torch.testing.assert_close(norm, torch.full_like(norm, 1e-3))


def test_adaptive_attacker_models_defense_in_units_of_update() -> None:
    """Clipping to a norm between that of the update and that of the gradient: the true image matches exactly."""
    threat = f"{KNOWN}, labels=known, informed=true"
    norm = 0.5 * float(
        min(sum(value.square().flatten(1).sum(1) for value in watch("lenet", "none", KNOWN).gradient.values()).sqrt())
    )
    attack, known = prepare(attacks.parse("dlg"), watch("lenet", f"clip(norm={norm})", threat))
    objective = attack._objective(known, Rng(("a", "b"))).with_path()
    truth = {"image": torch.stack([client.image for client in clients(2)])}
    other = {"image": torch.stack([rand(*SHAPE, seed=5)] * 2)}
    assert bool((objective(truth, 0) < 1e-6 * objective(other, 0)).all())


def adaptive(defense: str | Defense) -> AdaptiveAttacker:
    return defenses.parse(defense).attackers()["default"]


SECOND = "shares=weights, informed=true, labels=known"


@pytest.mark.parametrize("attack", ["dlg", "dlm"])
def test_what_follows_from_a_gradient_is_worked_out_in_its_units(attack: str) -> None:
    """The probabilities that mixup blends, of an attack that gets the gradient and of one that gets the update."""
    known = "shares=weights, informed=true, rate=known, learning_rate=0.03"
    truth = prepare(attacks.parse("dlg"), watch("lenet", "mixup", "informed=true"))[1].targets
    _, seen = prepare(attacks.parse(attack), watch("lenet", "mixup", known))
    assert truth is not None
    assert seen.targets is not None
    torch.testing.assert_close(seen.targets, truth, rtol=0, atol=1e-4)
    for threat, why in ((SECOND, "own units"), (f"{known}, local_steps=2", "a sum of several")):
        with pytest.raises(Unsupported, match=why):
            prepare(attacks.parse("dlm"), watch("lenet", "mixup", threat))


def test_a_secret_drawn_in_every_step_is_worked_out_of_one_step_alone() -> None:
    told = watch("lenet", "precode(k=6)", "shares=weights, reveals=noise").weights
    _, known = prepare(attacks.parse("dlm+"), watch("lenet", "precode(k=6)", SECOND))
    (name,) = known.weights.keys() - watch("lenet", "precode(k=6)", SECOND).weights.keys()
    torch.testing.assert_close(known.weights[name], told[name], rtol=0, atol=0.01)
    for threat in ("informed=true", "informed=splice"):
        with pytest.raises(Unsupported, match="a sum of several"):
            prepare(attacks.parse("dlg"), watch("lenet", "precode(k=6)", f"{KNOWN}, local_steps=2, {threat}"))
    prepare(attacks.parse("dlm"), watch("lenet", "precode(k=6)", "shares=weights, local_steps=2, informed=omit"))


def test_a_key_is_worked_out_of_several_steps() -> None:
    several = "shares=weights, local_steps=3, informed=true, reveals=lock"
    told = watch("lenet", "keylock(length=9)", "reveals=key+lock").weights
    seen = watch("lenet", "keylock(length=9)", several)
    _, known = prepare(attacks.parse("dlm"), seen)
    (name,) = known.weights.keys() - seen.weights.keys()
    torch.testing.assert_close(known.weights[name], told[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("spec", ["clip", "noise", "weight-noise", "prune", "soteria", "weight-sparsify"])
def test_adaptive_attack_needs_learning_rate(spec: str) -> None:
    seen = watch("lenet", spec, "shares=weights, informed=true")
    counts = spec in ("clip", "noise", "weight-noise")
    prepare(attacks.parse("dlm"), seen)
    if not counts:
        _, known = prepare(attacks.parse("dlm+"), seen)
        assert known.shown is not None
        return
    with pytest.raises(Unsupported, match="nor learned by dlm") as error:
        prepare(attacks.parse("dlm+"), seen)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", ["clip(norm=0.01)", "weight-noise(scale=0)", "weight-noise(scale=1e-9)"])
@pytest.mark.parametrize("snapshots", ["", ", snapshots=after"])
def test_a_learned_rate_models_what_counts_in_the_updates_units(spec: str, snapshots: str) -> None:
    """The true image with the true rate, which nobody told, explains what was sent; another rate does not."""
    spec = spec[:-1] + (snapshots if "weight" in spec else "") + ")"
    attack, known = prepare(attacks.parse("dlm"), watch("lenet", spec, f"{SECOND}, learning_rate=0.05"))
    objective = attack._objective(known, Rng(("a", "b"))).with_path()  # type: ignore[attr-defined]
    images = torch.stack([client.image for client in clients(2)])
    values = [objective.match({"image": images, "scale": torch.full((2, 1), k).log()}, 0) for k in (20.0, 40.0)]
    other = objective.match({"image": images.flip(3), "scale": torch.full((2, 1), 20.0).log()}, 0)
    limit = 1e-4 if spec.startswith("weight-noise(scale=1e-9") else 1e-9
    assert bool((values[0] < limit * other).all())
    if "clip" in spec or "scale=1e-9" in spec:  # a cosine does not see the size of the whole
        assert bool((values[0] < 0.1 * values[1]).all()) == ("clip" not in spec)


def masks(spec: str, threat: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the true update, what an informed attacker takes for it, and where."""
    plain = watch("lenet", "none", threat).gradient
    _, known = prepare(attacks.parse("dlm+"), watch("lenet", spec, f"{threat}, informed=true"))
    assert known.shown is not None
    steps = known.threat.local_steps
    return dict(plain), {name: value * steps for name, value in known.gradient.items()}, dict(known.shown)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("snapshots", ["both", "after"])
def test_adaptive_attacker_has_update_of_kept_weights(snapshots: str, ratio: float, steps: int) -> None:
    threat = f"shares=weights, learning_rate=0.1, local_steps={steps}"
    spec = f"weight-sparsify(ratio={ratio}, snapshots={snapshots})"
    plain, known, shown = masks(spec, threat)
    raw = watch("lenet", spec, threat)
    wrong = 0
    for name, update in plain.items():
        after = raw.weights[name] - update
        kept = torch.stack([row.abs() >= torch.quantile(row.abs().flatten(), ratio) for row in after])
        assert float((kept == shown[name]).float().mean()) > 0.999  # but for rounding at the percentile
        torch.testing.assert_close(known[name][shown[name]], update[shown[name]], rtol=0, atol=1e-6)
        assert not bool(known[name][~shown[name]].any())
        wrong += int(((raw.gradient[name] - update).abs() > 1e-4).sum())
    assert (wrong > 0) == (ratio > 0)  # what was observed is not the update, of those that crossed the percentile


@pytest.mark.usefixtures("float64")
def test_the_true_image_matches_sparse_weights_for_who_knows_of_them() -> None:
    threat = "shares=weights, labels=known, learning_rate=0.05"
    truth = {"image": torch.stack([client.image for client in clients(2)])}
    values = {}
    for informed in ("false", "true"):
        seen = watch("lenet", "weight-sparsify(ratio=0.5)", f"{threat}, informed={informed}")
        attack, known = prepare(attacks.parse("dlm+"), seen)
        objective = attack._objective(known, Rng(("a", "b"))).with_path()  # type: ignore[attr-defined]
        values[informed] = objective.match(truth, 0)
    assert bool((values["true"] < 1e-12 * values["false"]).all())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("snapshots", ["both", "after"])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("released", [False, True])
def test_the_likelihood_of_weight_noise_is_minus_the_log_of_its_density(
    kind: str, snapshots: str, released: bool
) -> None:
    """The density of a difference of two draws by a numerical convolution."""
    method = defenses.parse(f"weight-noise(scale=0.3, kind={kind}, snapshots={snapshots}, as_released={released})")
    weights = {"a": randn(2, 3, 4).double(), "b": 0.01 * randn(2, 7, seed=1).double()}
    observed = {name: randn(*value.shape, seed=2).double() for name, value in weights.items()}
    dummies = [
        {name: 3 * randn(*value.shape, seed=seed).double() for name, value in weights.items()} for seed in (5, 6)
    ]

    def phi(name: str, row: int) -> float:
        weight = weights[name][row]
        norm = weight.norm(dim=1).max() if weight.ndim > 1 else weight.norm()
        return max(1.0, float(norm) / (0.2 + 1e-6)) if released else 1.0

    def unlikely(dummy: dict[str, torch.Tensor], row: int) -> float:
        total = 0.0
        for name, value in dummy.items():
            scale = 0.3 * phi(name, row)
            law = torch.distributions.Normal(0, scale) if kind == "gaussian" else torch.distributions.Laplace(0, scale)
            for error in (value - observed[name])[row].flatten():
                if snapshots == "after":
                    total -= float(law.log_prob(error))
                    continue
                other = torch.linspace(-90, 90, 36_001).double() * scale
                product = (law.log_prob(other) + law.log_prob(error - other)).exp()
                total -= float(torch.trapezoid(product, other).log())
        return total

    likelihood = adaptive(method).likelihood
    assert likelihood is not None
    first, second = (likelihood(dummy, observed, weights) for dummy in dummies)
    expected = [unlikely(dummies[0], row) - unlikely(dummies[1], row) for row in range(2)]
    torch.testing.assert_close(first - second, torch.tensor(expected), rtol=0.02, atol=1e-3)
    assert adaptive("weight-noise(scale=0)").likelihood is None


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", ["", ", snapshots=after", ", as_released=true", ", clip=none"])
def test_surrogate_is_sent_update_without_noise(options: str) -> None:
    plain = watch("lenet", "none", "weights")
    spec = f"weight-noise(scale=0{options})"
    sent = watch("lenet", spec, "weights").gradient
    surrogate = adaptive(spec).surrogate
    assert surrogate is not None
    found = surrogate(dict(plain.gradient), sent, plain.weights)
    for name, value in sent.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("snapshots", ["both", "after"])
def test_weight_noise_is_that_of_the_law_with_and_without_its_own_clipping(snapshots: str) -> None:
    """On a layer of many weights; the released code's phi enlarges the noise and undoes the clipping."""
    threat = "shares=weights, learning_rate=0.01"
    plain = watch("mlp", "none", threat).gradient["1.weight"]
    weight = watch("mlp", "none", threat).weights["1.weight"]
    phi = float(weight[0].norm(dim=1).max()) / (0.2 + 1e-6)
    times = 2**0.5 if snapshots == "both" else 1.0
    for kind, deviation in (("gaussian", 0.5), ("laplace", 0.5 * 2**0.5)):
        spec = f"scale=0.5, kind={kind}, snapshots={snapshots}"
        unclipped = watch("mlp", f"weight-noise({spec}, clip=none)", threat).gradient["1.weight"]
        released = watch("mlp", f"weight-noise({spec}, as_released=true)", threat).gradient["1.weight"]
        assert float((unclipped - plain).std()) == pytest.approx(times * deviation, rel=0.05)
        assert float((released - plain).std()) == pytest.approx(times * deviation * phi, rel=0.05)
    exact = watch("mlp", f"weight-noise(scale=0, snapshots={snapshots})", threat).gradient["1.weight"]
    released = watch("mlp", f"weight-noise(scale=0, as_released=true, snapshots={snapshots})", threat)
    close(released.gradient["1.weight"], plain, 1e-3)
    if snapshots == "both":
        trained = weight - plain
        other = [float(row.norm(dim=1).max()) / (0.2 + 1e-6) for row in trained]
        close(exact, torch.stack([w / phi - t / o for w, t, o in zip(weight, trained, other)]), 1e-3)


def test_weight_sparsify_sends_no_small_weight() -> None:
    threat = "shares=weights, learning_rate=0.01"
    plain = watch("mlp", "none", threat)
    before, after = plain.weights["1.weight"], plain.weights["1.weight"] - plain.gradient["1.weight"]
    for ratio in (0.0, 0.9):
        one = watch("mlp", f"weight-sparsify(ratio={ratio}, snapshots=after)", threat)
        sent = before - one.gradient["1.weight"]
        assert float((sent.abs() < 1e-7).float().mean()) == pytest.approx(ratio, abs=0.01)
        kept = sent.abs() > 1e-7
        torch.testing.assert_close(sent[kept], after[kept])
        both = watch("mlp", f"weight-sparsify(ratio={ratio})", threat).gradient["1.weight"]
        assert float((both == 0).float().mean()) >= ratio - 0.02


@pytest.mark.parametrize("spec", [*ON_WEIGHTS, "weight-noise(as_released=true, snapshots=after)"])
def test_defenses_of_weights_keep_shapes_and_train_with_sent_model(spec: str) -> None:
    method = defenses.parse(spec)
    network = build(parse("lenet"), method, SHAPE, CLASSES, "weights")
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    trained = {name: value - 0.01 * randn(*value.shape, seed=3) for name, value in before.items()}
    kept = {name: value.clone() for name, value in trained.items()}
    step = Step(network, rand(1, *SHAPE), torch.tensor([1]), method, trained)
    released, again = (method.release(step, torch.Generator().manual_seed(0)) for _ in range(2))
    replied = method.reply(step, torch.Generator().manual_seed(0))
    for name, value in released.items():
        assert value.shape == before[name].shape
        assert value.dtype == torch.float32
        assert not value.requires_grad
        assert torch.equal(value, again[name])
        defended = method.defended(trained[name], torch.Generator())  # type: ignore[attr-defined]
        assert defended.shape == value.shape
        assert torch.equal(trained[name], kept[name])
        assert torch.equal(network.get_parameter(name), before[name])
    rows = {name: value[None].clone() for name, value in released.items()}
    weights = {name: value[None].clone() for name, value in before.items()}
    attacker = adaptive(method)
    for function in (attacker.undo,):
        if function is not None:
            function(rows, weights)
    for model in (attacker.surrogate, attacker.likelihood):
        if model is not None:
            model(rows, rows, weights)
    assert all(torch.equal(rows[name][0], released[name]) for name in released)
    assert all(torch.equal(weights[name][0], before[name]) for name in before)
    after = {name: before[name] - value for name, value in replied.items()}
    if spec == "weight-sparsify":  # what is averaged is the sparse model itself
        assert float(torch.cat([(value.abs() < 1e-7).flatten() for value in after.values()]).float().mean()) > 0.45


@pytest.mark.parametrize("attack", ["dlg(steps=1)", "dlm(steps=1)", "dlm+(steps=1)", "ig(steps=2)", "lb(steps=3)"])
@pytest.mark.parametrize("defense", ON_WEIGHTS)
@pytest.mark.parametrize("informed", ["false", "true"])
def test_attacks_answer_in_shape_behind_defenses_of_weights(attack: str, defense: str, informed: str) -> None:
    method = attacks.parse(attack)
    threat = f"shares=weights, informed={informed}, rate={'hidden' if method.updates else 'known'}"
    if attack.startswith("dlm+") and defense == "weight-noise" and informed == "true":
        return  # refused: see above
    acting, known = prepare(method, watch("lenet", defense, threat))
    found = acting(known, Rng(("a", "b")))
    assert found.images.shape == (2, *SHAPE)
    assert found.failed is not None
    assert bool(torch.isfinite(found.images[~found.failed]).all())


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_defenses_of_weights_have_none_of_a_gradient(name: str) -> None:
    with pytest.raises(Unsupported, match="shares=weights"):
        watch("lenet", name)
    first, second = (watch("lenet", name, "weights") for _ in range(2))
    assert same(plain(first), plain(second))


def test_fresh_noise_is_drawn_in_every_local_step() -> None:
    one = watch("lenet", "precode(k=6)", KNOWN).gradient
    two = watch("lenet", "precode(k=6)", f"{KNOWN}, local_steps=2").gradient
    assert one.keys() == two.keys()
    with pytest.raises(Unsupported, match="local_steps=1"):
        watch("lenet", "precode(k=6)", f"{KNOWN}, local_steps=2, reveals=noise")


# dlm and dlm+


def objective_of(spec: str, threat: str, factor: float = 1.0, model: str = "lenet") -> MatchingObjective:
    attack, known = prepare(attacks.parse(spec), watch(model, threat=threat))
    known = replace(known, gradient={name: factor * value for name, value in known.gradient.items()})
    return attack._objective(known, Rng(("a", "b"))).with_path()  # type: ignore[attr-defined, no-any-return]


@given(factor=st.floats(1e-4, 1e4))
@settings(max_examples=15)
def test_dlm_plus_does_not_change_with_the_learning_rate(factor: float) -> None:
    """Scaling the update leaves objective and gradient unchanged to 1e-6."""
    torch.set_default_dtype(torch.float64)
    try:
        one = objective_of("dlm+", "shares=weights, labels=known")
        other = objective_of("dlm+", "shares=weights, labels=known", factor)
        start = {"image": randn(2, *SHAPE, seed=1).double()}
        value, gradient = value_and_gradient(one, start, 0)
        scaled, scaled_gradient = value_and_gradient(other, start, 0)
        close(scaled, value, 1e-6)
        close(scaled_gradient["image"], gradient["image"], 1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scale", ["log", "plain"])
@pytest.mark.parametrize("local", ["summed", "unrolled"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_true_image_at_one_over_the_rate_is_a_minimum(scale: str, local: str, steps: int) -> None:
    """Exact for one step, and for several where they are unrolled; the derivatives by image and k vanish."""
    threat = f"shares=weights, labels=known, learning_rate=0.05, local_steps={steps}"
    objective = objective_of(f"dlm(scale={scale}, local={local})", threat)
    k = torch.full((2, 1), 20.0)
    truth = {"image": torch.stack([client.image for client in clients(2)]), "scale": k.log() if scale == "log" else k}
    other = {**truth, "image": torch.rand(2, *SHAPE)}
    value, gradient = value_and_gradient(objective, truth, 0)
    off, _ = value_and_gradient(objective, other, 0)
    exact = steps == 1 or local == "unrolled"
    assert bool((value < 1e-12 * off).all()) == exact
    assert objective.attack.findings(truth)["scale"].tolist() == pytest.approx([20.0] * 2)
    if exact:
        assert all(float(part.abs().max()) < 1e-6 for part in gradient.values())


@pytest.mark.usefixtures("float64")
def test_unrolled_steps_agree_with_finite_differences() -> None:
    threat = "shares=weights, labels=known, learning_rate=0.05, local_steps=3"
    objective = objective_of("dlm(local=unrolled)", threat)
    start = {"image": torch.rand(2, *SHAPE), "scale": torch.tensor([[2.5], [3.5]])}
    _, gradient = value_and_gradient(objective, start, 0)
    for name in start:
        along = torch.randn_like(start[name])
        ends = [objective({**start, name: start[name] + sign * 1e-5 * along}, 0).detach() for sign in (1, -1)]
        slope = (gradient[name] * along).flatten(1).sum(1)
        close(slope, (ends[0] - ends[1]) / 2e-5, 1e-6)


def test_the_plain_scale_can_collapse_and_the_learned_logarithm_cannot() -> None:
    """Where the dummy gradient vanishes: the plain objective falls to zero with k, the other is 1 whatever k is."""
    zero = {"w": torch.zeros(1, 6)}
    for scale, value in (("plain", 0.0), ("log", 1.0)):
        attack = attacks.parse(f"dlm(scale={scale})")
        small = attack.distance(zero, {"w": 1e-6 * randn(1, 6)})  # type: ignore[attr-defined]
        assert float(small) == pytest.approx(value, abs=1e-6)


def test_k_cannot_win_by_itself() -> None:
    """Starts, ends and restarts are compared by the direction alone, and a rate is never negative."""
    zero, update = {"w": torch.zeros(2, 6)}, {"w": randn(2, 6)}
    dummy = {"w": randn(2, 6, seed=1)}
    for scale in ("plain", "log"):
        attack = attacks.parse(f"dlm(scale={scale}, labels=analytic, restarts=1)")
        k = torch.tensor([1e-6, 1e6])
        cosine = torch.nn.functional.cosine_similarity(dummy["w"], update["w"])
        close(attack.judge(dummy, update, k), 1 - cosine, 1e-5)  # type: ignore[attr-defined]
        assert torch.equal(attack.judge(zero, update, k), torch.ones(2))  # type: ignore[attr-defined]
    collapsed = Collapsed(scale="plain", labels="analytic", restarts=1, k0=1000.0)
    _, known = prepare(collapsed, watch("lenet", threat="weights"))
    objective = collapsed._objective(known, Rng(("a", "b"))).with_path()
    start = collapsed._begin(objective)
    end = collapsed.solve(objective, start).unknowns
    assert bool((objective(end, 0) < objective(start, 0)).all())  # by the plain distance it would be a success
    found = collapsed(known, Rng(("a", "b")))
    assert found.failed is not None
    assert bool(found.failed.all())
    negative = {**end, "scale": -start["scale"]}
    assert bool(torch.isinf(objective.match(negative, 0)).all())


@dataclass(frozen=True)
class Collapsed(DLM):
    """DLM whose search takes nothing but k to zero."""

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        end = {**start, "scale": 0 * start["scale"] + 1e-9}
        at = objective(end, 0).detach()
        return Solution(end, at, torch.isfinite(at), torch.ones(len(at), dtype=torch.int64))


def test_restarts_begin_at_other_values_of_k() -> None:
    def first(spec: str, restart: int) -> torch.Tensor:
        objective = objective_of(spec, "weights")
        return objective.attack._begin(replace(objective, restart=restart))["scale"][:, 0].exp()

    ratio = first("dlm(restarts=1)", 0)
    for restart, times in enumerate((0.25, 1.0, 4.0)):
        torch.testing.assert_close(first("dlm", restart), times * ratio)
    for restart, k in enumerate((60.0, 120.0, 240.0)):
        torch.testing.assert_close(first("dlm(k0=120, spread=2)", restart), torch.full((2,), k))
    objective = objective_of("dlm(restarts=1, labels=analytic)", "weights")
    start = objective.attack._begin(objective)
    dummy = objective.dummy(start["image"], objective.observation.labels, start, 0)  # type: ignore[arg-type]
    size, other = (
        torch.stack([value.detach().flatten(1).square().sum(1) for value in gradient.values()]).sum(0).sqrt()
        for gradient in (dummy, objective.observation.gradient)
    )
    torch.testing.assert_close(start["scale"][:, 0].exp(), size / other)
    few = replace(objective, observation=replace(objective.observation, slots=1))
    torch.testing.assert_close(few.ratio(start), objective.ratio(start))
    assert [len(own["image"]) for _, own in few.parts(start)] == [1, 1]


def test_what_is_drawn_anew_is_so_in_every_unrolled_step() -> None:
    threat = "shares=weights, labels=known, learning_rate=1e-9, local_steps=2, rate=known"
    attack, known = prepare(attacks.parse("dlg(local=unrolled)"), watch("lenet", "precode(k=6)", threat))
    objective = attack._objective(known, Rng(("a", "b"))).with_path()  # type: ignore[attr-defined]
    image = torch.stack([client.image for client in clients(2)])
    draws = [objective._fresh({}, 3, step) for step in range(2)]
    ((name, noise),) = draws[0].items()
    assert not torch.equal(noise, draws[1][name])
    own = [objective._gradient({**objective._filled({}, 3), **drawn}, image, known.labels, 3) for drawn in draws]
    for layer, value in objective.dummy(image, known.labels, {}, 3).items():
        close(value.detach(), (own[0][layer] + own[1][layer]).detach() / 2, 1e-4)
    sought = replace(attack, secrets="optimise")  # type: ignore[type-var]
    with pytest.raises(Unsupported, match="each of the client's 2 steps"):
        sought._objective(known, Rng(("a", "b")))  # type: ignore[attr-defined]


def test_who_does_not_know_the_rate_cannot_unroll() -> None:
    threat = "shares=weights, local_steps=2"
    with pytest.raises(Unsupported, match="neither known nor"):
        objective_of("dlm+(local=unrolled)", threat)
    objective_of("dlm+(local=unrolled)", f"{threat}, rate=known")
    objective_of("ig(local=unrolled)", f"{threat}, rate=known")


@pytest.mark.parametrize("spec", ["dlm(steps=8, labels=analytic, restarts=2)", "dlm+(steps=40)"])
@pytest.mark.long
def test_an_image_is_recovered_without_the_learning_rate(spec: str) -> None:
    observation = watch("lenet", threat="shares=weights, learning_rate=0.003", trials=4)
    attack, known = prepare(attacks.parse(spec), observation)
    found = attack(known, Rng(tuple(f"0 {row}" for row in range(4))))
    truth = torch.stack([client.image for client in clients(4)])
    recovered = ((found.images - truth).square().flatten(1).mean(1) < 1e-3) & ~found.failed
    assert int(recovered.sum()) >= 2
    if "scale" in found.findings:
        scaled = found.findings["scale"][recovered] * 0.003
        torch.testing.assert_close(scaled, torch.ones_like(scaled), rtol=0.03, atol=0)


def test_a_run_keeps_what_was_found(tmp_path: Path) -> None:
    matrix = Matrix(
        attacks=["dlm(steps=1)", "dlm+(steps=1)"],
        defenses=["none", "weight-sparsify"],
        models=["mlp(hidden=4)"],
        datasets=["samples(size=8)"],
        threats=["weights"],
        images=2,
    )
    run(matrix, tmp_path)
    with Store.open(tmp_path / "run.sqlite", readonly=True) as store:
        results, findings = store.results(), store.findings()
    assert set(findings["name"]) == {"scale"}
    assert set(findings["trial"]) <= set(results[results["attack"] == "dlm(steps=1)"]["trial"])


def test_what_nobody_knows_cannot_be_run() -> None:
    with pytest.raises(BadOption, match="states no learning rate"):
        watch("lenet", threat=ThreatModel(shares="weights", learning_rate=None))


def test_trials_of_gradients_keep_their_names_and_words_say_the_training() -> None:
    axes = {"attacks": "ig(steps=5)", "defenses": "none", "models": "lenet", "datasets": "samples", "floors": False}
    (trial,) = Matrix(**axes, images=1).trials()
    assert trial.id == "2cba063c5fb8ee9b"
    words = parse_threat("shares=weights, learning_rate=0.1, local_steps=5").describe()
    assert "5 steps of SGD" in words
    assert "learning rate 0.1, which the attacker does not know" in words
    assert parse_threat("weights").spec() == "weights"
    assert parse_threat(KNOWN).spec() == "shares=weights, learning_rate=0.1, rate=known"


# the report


def a_run(trials: int = 6) -> tuple[pd.DataFrame, dict[str, TrialRecord], pd.DataFrame]:
    """Return results, records and findings: dlg with the rate recovers all, dlm half, with k r = 1 there alone."""
    lines, records, scales = [], {}, []
    for attack, rate in (("dlg", "known"), ("dlm", "hidden")):
        for scale in (None, 1e-3, 1.0):
            for image in range(trials):
                trial = f"{attack} {scale} {image}"
                found = scale is None and (attack == "dlg" or image % 2 == 0)
                options = {"name": "weight-noise", "scale": scale, "kind": "gaussian", "clip": None}
                defense = {"name": "none"} if scale is None else {**options, "as_released": False, "snapshots": "both"}
                threat = {"shares": "weights", "learning_rate": 0.01, "local_steps": 1, "rate": rate}
                settings = {"attack": {"name": attack}, "defense": defense, "threat": threat}
                records[trial] = TrialRecord(json.dumps(settings), "", 0, 1, "")
                lines.append({
                    "trial": trial, "dataset": "d", "model": "m", "defense": "x", "attack": attack, "threat": "t",
                    "image": image, "group": image, "seed": 0,
                    "status": "failed" if image == 5 and attack == "dlm" else "ok",
                    "floor": False, "ssim_aligned": 0.9 if found else 0.1, "psnr_aligned": 20.0,
                })  # fmt: skip
                if attack == "dlm":
                    scales.append((trial, "scale", 100.0 if found else 1e6))
    return pd.DataFrame(lines), records, pd.DataFrame(scales, columns=["trial", "name", "value"])


def test_report_compares_rates_and_shows_scale_and_strengths() -> None:
    trials = weights.rows(*a_run())
    assert len(trials) == 36
    text = weights.page("mine", trials, 0, 0, 0).markdown
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in table]
    (dlg,) = (line for line in cells if line[4:6] == ["dlg", "known"] and line[0] == "d")
    (dlm,) = (line for line in cells if line[4:6] == ["dlm", "hidden"] and len(line) == 13)
    assert dlg[6:9] == ["6", "0", "100 % [61 %, 100 %]"]
    assert dlm[6:9] == ["6", "1", "50 % [19 %, 81 %]"]
    assert dlm[10] == "dlg"
    assert dlm[11].startswith("−50 % [")
    assert dlm[12] == "yes"
    assert ["d", "m", "0.01", "1", "dlm", "hidden", "3 of 6", "1", "1", "1"] in cells
    strengths = [line[1] for line in cells if line[0].startswith("weight-noise, gaussian, no clipping")]
    assert strengths == ["0", "0", "0.001", "0.001", "1", "1"]
    told = weights.page("mine", trials.assign(family=None, defense="noise"), 3, 2, 0).markdown
    assert "not finished" in told
    assert "2 trials ended in an error" in told
    assert "only in report.md: noise" in told
    drawn = saved(weights.scale_figure(trials))
    assert drawn == saved(weights.scale_figure(trials)) != saved(weights.scale_figure(trials.assign(recovered=False)))


def test_figure_of_defenses_has_line_per_attack_over_strengths() -> None:
    drawn = weights.defense_figure(weights.rows(*a_run()))
    (panel,) = drawn.axes
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["0", "0.001", "1"]
    heights = {bar.get_label(): bar.lines[0].get_ydata().tolist() for bar in panel.containers}
    assert heights == {"dlg, rate known": [1.0, 0.0, 0.0], "dlm, rate hidden": [0.5, 0.0, 0.0]}


@pytest.mark.parametrize(("without", "overlap"), [(8, "yes"), (4, "yes"), (0, "no")])
@pytest.mark.parametrize("swapped", [False, True])
def test_intervals_overlap_whichever_share_is_larger(without: int, overlap: str, swapped: bool) -> None:
    def cell(method: str, recovered: int) -> pd.DataFrame:
        image = range(8)
        places = {"image": image, "group": image, "seed": 0}
        return pd.DataFrame({**places, "method": method, "recovered": [i < recovered for i in image]})

    own, other = cell("dlm", without), cell("dlg", 8)
    found = weights._gap(other, own) if swapped else weights._gap(own, other)
    assert found["intervals overlap"] == overlap
    assert found["compared with"] == ("dlm" if swapped else "dlg")


def test_the_report_keeps_options_grants_and_places_apart() -> None:
    """Two specs of one attack, an informed one and one that is told the label are rows and lines of their own."""
    results, records, findings = a_run()
    parts = [results]
    for change in ({"attack": "dlm(lr=2.0)"}, {"labels": "known"}, {"informed": True}, {"local_steps": 5}):
        own = results[results["attack"] == "dlm"].copy()
        own["trial"] = own["trial"] + f" {change}"
        own["attack"] = change.get("attack", "dlm")
        for trial in own["trial"]:
            settings = json.loads(records[trial.rpartition(" {")[0]].cell)
            settings["threat"] |= {name: value for name, value in change.items() if name != "attack"}
            records[trial] = TrialRecord(json.dumps(settings), "", 0, 1, "")
        parts.append(own)
    trials = weights.rows(pd.concat(parts), records, findings)
    text = weights.page("mine", trials, 0, 0, 0).markdown
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    undefended = {tuple(line[3:6]) for line in cells if line[0] == "d" and line[6:7] == ["6"]}
    assert undefended == {
        *(("1", attack, "hidden") for attack in ("dlm", "dlm(lr=2.0)", "dlm, label known", "dlm, adaptive")),
        ("1", "dlg", "known"),
        ("5", "dlm", "hidden"),
    }
    assert ["d", "m", "dlm(lr=2.0)"] in cells
    behind = [line for line in cells if line[0].startswith("weight-noise") and line[6] == "dlm, adaptive"]
    assert [(line[1], line[8], line[10].split()[0]) for line in behind] == [
        ("0", "6", "50"),
        ("0.001", "6", "0"),
        ("1", "6", "0"),
    ]
    (panel, other) = weights.defense_figure(trials).axes
    assert len(panel.containers) == 5
    assert len(other.containers) == 1
