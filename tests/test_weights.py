"""Clients that share their weights: what is sent, and what an attacker works on."""

from __future__ import annotations

import pytest
import torch
from conftest import CLASSES, SHAPE, clients, close, rand, watch
from torch.nn import functional as F

from leakbench import attacks, defenses
from leakbench.attacks.base import prepare
from leakbench.errors import BadOption, Unsupported
from leakbench.matrix import Matrix, parse_threat
from leakbench.models import parse
from leakbench.rng import Rng
from leakbench.types import ThreatModel
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


@pytest.mark.parametrize("name", ["dlg", "idlg", "ig", "lb", "peel"])
def test_without_the_rate_a_gradient_attack_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(Unsupported, match="rate=known") as error:
        prepare(attacks.parse(name), watch("lenet", threat="weights"))
    assert "\n" not in str(error.value)
    prepare(attacks.parse("grey"), watch("lenet", threat="weights"))


@pytest.mark.parametrize("spec", ["noise", "clip(norm=1e-3)", "prune", "quantise", "soteria"])
def test_a_defense_of_gradients_acts_on_the_update(spec: str) -> None:
    sent = watch("lenet", spec, KNOWN).gradient
    plain = watch("lenet", "none", KNOWN).gradient
    assert any(not torch.equal(sent[name], value) for name, value in plain.items())
    if spec.startswith("clip"):
        norm = sum(value.square().flatten(1).sum(1) for value in sent.values()).sqrt()
        torch.testing.assert_close(norm, torch.full_like(norm, 1e-3))


def test_an_informed_attacker_models_the_defense_in_the_units_of_the_update() -> None:
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
    hidden = watch("lenet", "clip", "shares=weights, informed=true")
    with pytest.raises(Unsupported, match="rate=known"):
        attack._objective(hidden, Rng(("a", "b")))


def test_fresh_noise_is_drawn_in_every_local_step() -> None:
    one = watch("lenet", "precode(k=6)", KNOWN).gradient
    two = watch("lenet", "precode(k=6)", f"{KNOWN}, local_steps=2").gradient
    assert one.keys() == two.keys()
    with pytest.raises(Unsupported, match="local_steps=1"):
        watch("lenet", "precode(k=6)", f"{KNOWN}, local_steps=2, reveals=noise")


def test_what_nobody_knows_cannot_be_run() -> None:
    with pytest.raises(BadOption, match="states no learning rate"):
        watch("lenet", threat=ThreatModel(shares="weights", learning_rate=None))


def test_trials_of_gradients_keep_their_names_and_words_say_the_training() -> None:
    axes = {"attacks": "ig(steps=5)", "defenses": "noise", "models": "lenet", "datasets": "samples", "floors": False}
    (trial,) = Matrix(**axes, images=1).trials()
    assert trial.id == "7b52c0e966bb916e"
    words = parse_threat("shares=weights, learning_rate=0.1, local_steps=5").describe()
    assert "5 steps of SGD" in words
    assert "learning rate 0.1, which the attacker does not know" in words
    assert parse_threat("weights").spec() == "weights"
    assert parse_threat(KNOWN).spec() == "shares=weights, learning_rate=0.1, rate=known"
