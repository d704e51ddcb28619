"""Defenses of federated frameworks and of later papers against independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CLASSES, SHAPE, randn
from torch import Tensor
from torch.distributions import Laplace

import leakbench
from leakbench import datasets, defenses, metrics, models
from leakbench.core.types import Gradient
from leakbench.defenses import AdaptiveAttacker, Defense, Step
from leakbench.defenses.base import UpdateStep
from leakbench.defenses.svt_privacy import log_tail
from leakbench.victim import build


def update(seed: int = 0) -> Gradient:
    """Return an update of two tensors, in float64."""
    return {"b.weight": randn(6, 5, seed=seed).double(), "a.bias": randn(40, seed=seed + 1).double()}


def released(spec: str, gradient: Gradient, seed: int = 0) -> Gradient:
    """Return what a defense sends of an update."""
    defense = defenses.parse(spec)
    before = {name: torch.zeros_like(value) for name, value in gradient.items()}
    return defense.release(UpdateStep(defense, before, gradient), torch.Generator().manual_seed(seed))


def attacker(spec: str, name: str = "default") -> AdaptiveAttacker:
    return defenses.parse(spec).attackers()[name]


def rows(gradient: Gradient) -> Gradient:
    return {name: value[None] for name, value in gradient.items()}


def flat(gradient: Gradient) -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in gradient.values()])


@pytest.mark.parametrize(("percent", "gamma", "steps"), [(10, 0.5, 1), (60, 0.2, 4), (0, 10, 1), (100, 0.1, 2)])
def test_percentile_privacy_is_its_formula(percent: float, gamma: float, steps: int) -> None:
    own = update()
    each = flat(own) / steps
    cutoff = np.percentile(np.abs(each), percent)
    wanted = steps * np.where(np.abs(each) < cutoff, 0.0, np.clip(each, -gamma, gamma))
    sent = released(f"percentile-privacy(percentile={percent}, gamma={gamma}, steps={steps})", own)
    np.testing.assert_allclose(flat(sent), wanted, rtol=1e-12)


def test_the_attackers_of_percentile_privacy_know_what_is_exact() -> None:
    spec, own = "percentile-privacy(percentile=30, gamma=0.8)", update()
    sent = released(spec, own)
    exact = attacker(spec, "exact").undo(rows(sent), {})
    kept = np.isfinite(flat({name: value[0] for name, value in exact.items()}))
    assert np.array_equal(kept, (flat(sent) != 0) & (np.abs(flat(own)) < 0.8))
    dummy = attacker(spec).surrogate(rows(own), rows(sent), {})
    assert all(torch.equal(dummy[name][0], value) for name, value in sent.items())


def test_svt_privacy_sends_a_share_of_clipped_noisy_entries() -> None:
    own = {"w": 3e-5 * randn(100, 100).double()}
    sent = flat(released("svt-privacy", own))
    assert np.abs(sent).max() == 1e-5
    assert 0.06 < (sent != 0).mean() < 0.10, "drawn with replacement, fewer than a tenth are sent"
    sent = flat(released("svt-privacy(replace=false)", own))
    assert (sent != 0).sum() == 1000
    agree = (np.sign(sent) == np.sign(flat(own)))[sent != 0].mean()
    assert 0.45 < agree < 0.57, "with the default budgets signs are nearly those of the noise"
    loud = flat(released("svt-privacy(fraction=1, replace=false, noise_var=1e6, epsilon=1e6, tau=0)", own))
    np.testing.assert_allclose(loud, np.clip(flat(own), -1e-5, 1e-5), atol=1e-9)


def test_svt_selects_the_large_entries_when_its_budget_is_large() -> None:
    own = {"w": torch.cat([torch.full((20,), 1.0), torch.full((80,), 1e-3)]).double()}
    sent = flat(released("svt-privacy(fraction=0.2, gamma=1, tau=0.5, epsilon=1e4, noise_var=1e9, replace=false)", own))
    assert np.array_equal(sent != 0, flat(own) == 1)


def test_the_noise_of_svt_privacy_comes_before_or_after_the_clip() -> None:
    own = {"w": randn(200, 50).double()}
    options = "fraction=1, replace=false, gamma=0.5, noise_var=2"
    after = flat(released(f"svt-privacy({options})", own))
    assert np.abs(after).max() == 0.5
    before = flat(released(f"svt-privacy({options}, order=clip-noise)", own))
    noise = before - np.clip(flat(own), -0.5, 0.5)
    assert noise.std() == pytest.approx(2**0.5 * 2 * 0.5 / 2, rel=0.05)
    assert np.abs(noise).mean() == pytest.approx(0.5, rel=0.05)


def test_unselected_entries_were_once_sent_raw() -> None:
    own = {"w": randn(100, 100).double()}
    sent = released("svt-privacy(gamma=0.01, unselected=raw)", own)
    exact = sent["w"] == own["w"]
    assert 0.3 < float(exact.double().mean()) < 0.5
    found = attacker("svt-privacy(gamma=0.01, unselected=raw)").undo(rows(sent), {})["w"][0]
    shown = ~torch.isnan(found)
    assert bool(exact[shown].all())
    assert float((exact & shown).sum() / exact.sum()) > 0.95


@pytest.mark.parametrize("order", ["noise-clip", "clip-noise"])
def test_the_likelihood_of_svt_is_that_of_clipped_laplace_noise(order: str) -> None:
    """Against torch's density within the limits, and the mass that the clip gathers at them."""
    spec = f"svt-privacy(gamma=0.5, noise_var=2, order={order})"
    sent = {"w": torch.tensor([[0.5, -0.5, 0.2, 0.0, -0.3]]).double()}
    first, second = ({"w": randn(1, 5, seed=seed).double()} for seed in (1, 2))

    def negative(dummy: Tensor) -> float:
        law = Laplace(dummy if order == "noise-clip" else dummy.clamp(-0.5, 0.5), 0.5)
        inside = -law.log_prob(sent["w"])
        if order == "noise-clip":
            inside[0, 0], inside[0, 1] = -torch.log(1 - law.cdf(sent["w"]))[0, 0], -torch.log(law.cdf(sent["w"]))[0, 1]
        inside[0, 3] = 0
        return float(inside.sum())

    likelihood = attacker(spec).likelihood
    difference = float(likelihood(first, sent, {}) - likelihood(second, sent, {}))
    assert difference == pytest.approx(negative(first["w"]) - negative(second["w"]), rel=1e-9)


def test_the_tail_of_laplace_noise() -> None:
    value = torch.linspace(-6, 6, 25).double()
    torch.testing.assert_close(log_tail(value), torch.log(1 - Laplace(torch.zeros(()).double(), 1.0).cdf(value)))


def test_signs_are_signs() -> None:
    own = update()
    assert np.array_equal(flat(released("signsgd", own)), np.sign(flat(own)))
    for name, value in released("signsgd(scaled=true)", own).items():
        torch.testing.assert_close(value, own[name].sign() * own[name].abs().mean())
    for spec in ("signsgd", "signsgd(scaled=true)"):
        soft = attacker(spec).surrogate(rows(own), {}, {})
        for name, value in released(spec, own).items():
            cosine = torch.nn.functional.cosine_similarity(soft[name].flatten(), value.flatten(), dim=0)
            assert float(cosine) > 0.97


def test_top_k_keeps_what_it_did_not_send() -> None:
    own, keep = update(), 0.2
    memory = {name: np.zeros(value.shape) for name, value in own.items()}
    total = {name: np.zeros(value.shape) for name, value in own.items()}
    for number in range(1, 6):
        sent = released(f"top-k(keep={keep}, rounds={number})", own)
        for name, value in own.items():
            full = memory[name] + value.numpy()
            count = max(1, round(keep * full.size))
            least = np.sort(np.abs(full).ravel())[-count]
            wanted = np.where(np.abs(full) >= least, full, 0)
            np.testing.assert_allclose(sent[name].numpy(), wanted, atol=1e-12)
            memory[name] = full - wanted
            total[name] += wanted
    for name, value in own.items():
        np.testing.assert_allclose(total[name] + memory[name], 5 * value.numpy(), atol=1e-12)
    repeated = attacker("top-k(keep=0.2, rounds=5)").surrogate(rows(own), {}, {})
    assert all(torch.equal(repeated[name][0], sent[name]) for name in sent)


def test_outpost_puts_noise_where_gradients_are_large_and_weights_wide() -> None:
    defense = defenses.parse("outpost(noise=0.5, share=30, prune=0)")
    network = build(models.parse("lenet"), defense, SHAPE, CLASSES, "weights")
    with torch.no_grad():
        network.get_parameter("classifier.weight").mul_(1e-3)
    step = Step(network, torch.rand(1, *SHAPE), torch.tensor([1]), defense)
    plain, sent = step.gradient(), defense.release(step, torch.Generator().manual_seed(0))
    cutoff = np.percentile(np.concatenate([value.square().numpy().ravel() for value in plain.values()]), 70)
    for name, value in plain.items():
        noise = (sent[name] - value)[value.square() >= cutoff]
        assert torch.equal(sent[name][value.square() < cutoff], value[value.square() < cutoff])
        wanted = 0.5 * float(network.get_parameter(name).detach().var())
        if len(noise) > 200:
            assert float(noise.std()) == pytest.approx(wanted, rel=0.2), name
    pruned = defenses.parse("outpost(noise=0, prune=80)").release(step, torch.Generator().manual_seed(0))
    for value in pruned.values():
        assert float((value == 0).double().mean()) == pytest.approx(0.8, abs=1 / value.numel() + 0.01)


def small_step(spec: str, images: int = 1) -> Step:
    """Return the step of a client with a small LeNet in float64."""
    defense = defenses.parse(spec)
    network = build(models.parse("lenet"), defense, SHAPE, CLASSES, "weights").double()
    rng = torch.Generator().manual_seed(3)
    return Step(network, torch.rand(images, *SHAPE, generator=rng).double(), torch.arange(images) % CLASSES, defense)


def test_censor_sends_the_best_of_several_orthogonal_directions() -> None:
    step = small_step("censor(samples=5, rate=0.1)")
    plain = step.gradient()
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    sent = step._defense.release(step, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    for name, value in plain.items():
        assert float(sent[name].norm()) == pytest.approx(float(value.norm()))
        assert abs(float((sent[name] * value).sum())) < 1e-12
    rng, losses = torch.Generator().manual_seed(0), {}
    for number in range(5):  # against the definition
        drawn = {}
        for name, value in plain.items():
            random = torch.randn(value.shape, generator=rng).double()
            left = random - (random * value).sum() / value.square().sum() * value
            drawn[name] = left / left.norm() * value.norm()
        tried = build(models.parse("lenet"), defenses.parse("none"), SHAPE, CLASSES, "weights").double().eval()
        with torch.no_grad():
            for name, parameter in tried.named_parameters():
                parameter -= 0.1 * drawn[name]
            losses[number] = (float(torch.nn.functional.cross_entropy(tried(step.images), step.labels)), drawn)
    best = min(losses.values(), key=lambda pair: pair[0])[1]
    for name, value in best.items():
        torch.testing.assert_close(sent[name], value)


def test_the_released_censor_is_orthogonal_only_to_gradients_of_norm_one() -> None:
    defense = defenses.parse("censor(projection=released)")
    for size, aligned in ((1.0, False), (20.0, True)):
        value = randn(40, seed=1).double()
        value = value * size / value.norm()
        cosines = [
            float(defense._drawn(value, torch.Generator().manual_seed(seed)) @ value) / size**2 for seed in range(20)
        ]
        assert (max(map(abs, cosines)) > 0.9) == aligned
        assert aligned or max(map(abs, cosines)) < 1e-9
    law = attacker("censor(projection=released)").likelihood
    sent = {"w": (20 * torch.nn.functional.normalize(randn(1, 40, seed=2), dim=1)).double()}
    along = law(sent, sent, {})
    across = randn(1, 40, seed=3).double()
    across = across - (across * sent["w"]).sum() / 400 * sent["w"]
    assert float(along) < float(law({"w": across * 20 / across.norm()}, sent, {})), "it is rather along the gradient"


def test_dcs_sends_the_mixed_gradient_of_an_image_that_looks_different() -> None:
    step = small_step("dcs(steps=15, mix=0.7)", images=2)
    defense, plain = step._defense, step.gradient()
    sent = defense.release(step, torch.Generator().manual_seed(0))
    concealed, labels = defense._concealed(step, torch.Generator().manual_seed(0))
    assert concealed.shape == (1, *SHAPE)
    assert labels.sum().item() == pytest.approx(1)
    assert labels[0, 0].item() == pytest.approx(0.3)
    assert float((concealed - step.images[:1]).square().mean()) > 0.05
    logits = [step.model(own) for own in (step.images, concealed)]
    cross = torch.nn.functional.cross_entropy
    loss = (cross(logits[0], step.labels) + cross(logits[1], labels)) / 3
    wanted = torch.autograd.grad(loss, list(step.model.parameters()))
    product = sum(float((a * plain[name]).sum()) for a, name in zip(wanted, plain))
    assert product > 0, "else the component along the gradient is removed"
    for value, name in zip(wanted, plain):
        torch.testing.assert_close(sent[name], value)
    assert len(step.losses) == 2, "the losses of concealed images are no training losses"


def test_the_attacker_of_dcs_matches_exactly_with_the_concealed_image() -> None:
    """Its loss, at the private and the concealed image, has the gradient that was sent."""
    step = small_step("dcs(steps=5)")
    sent = step._defense.release(step, torch.Generator().manual_seed(0))
    concealed, labels = step._defense._concealed(step, torch.Generator().manual_seed(0))
    own = step._defense.attackers()["default"]
    assert own.relax_on is not None
    assert own.loss is not None
    network, secrets = own.relax_on(step.model, (), SHAPE, CLASSES)
    assert [secret.name for secret in secrets] == ["concealed", "concealed_label"]
    network.concealed, network.concealed_label = (
        concealed[0],
        torch.log((labels - 0.3 * (labels > 0.2) * (labels < 0.5)).clamp(min=1e-30))[0],
    )
    loss = own.loss(network, step.images, step.labels)
    for value, name in zip(torch.autograd.grad(loss.sum(), list(network.parameters())), sent):
        torch.testing.assert_close(value, sent[name])


@pytest.mark.long
@pytest.mark.parametrize(
    ("defense", "gain"),
    [
        ("dcs(steps=20)", 0.5),
        ("percentile-privacy(gamma=0.001)", 0.5),
        ("svt-privacy(gamma=0.01, unselected=raw, noise_var=1)", 1.0),
        ("signsgd", 0.5),
        ("top-k(keep=0.2)", 0.5),
        ("outpost(noise=0.01)", 0.5),
    ],
)
def test_the_adaptive_attacker_gains(defense: str, gain: float) -> None:
    data = datasets.parse("samples(size=16)")
    images, labels = data.load([0, 9])
    torch.manual_seed(0)
    network = models.parse("lenet").build(data.image_shape, data.num_classes)
    scores = {}
    for threat in ("paper", "informed=true"):
        seen = leakbench.observe(network, images, labels, defense=defense, threat=threat, seed=1000)
        found = leakbench.attack("lb(steps=60)", seen)
        scores[threat] = float(metrics.parse("psnr_aligned")(found.images, images).mean())
    assert scores["informed=true"] > scores["paper"] + gain, scores


@pytest.mark.parametrize("spec", ["percentile-privacy", "svt-privacy", "signsgd", "top-k(rounds=3)", "outpost"])
def test_a_mod_has_only_the_update_and_the_weights(spec: str) -> None:
    """What runs in a federated client sees no image: these defenses need none."""
    defense: Defense = defenses.parse(spec)
    own = update()
    sent = released(spec, own)
    assert sent.keys() == own.keys()
    assert all(value.shape == own[name].shape and bool(value.isfinite().all()) for name, value in sent.items())
    assert math.isfinite(float(sum(value.abs().sum() for value in sent.values())))
    assert defense.companions == 0
