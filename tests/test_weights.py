"""Clients that share their weights: what is sent, and what an attacker works on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CLASSES, ON_WEIGHTS, SHAPE, clients, close, plain, rand, randn, same, watch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from leakbench import attacks, defenses
from leakbench.attacks.base import prepare
from leakbench.attacks.matching import MatchingObjective
from leakbench.engine import run
from leakbench.errors import BadOption, Unsupported
from leakbench.matrix import Matrix, parse_threat
from leakbench.models import parse
from leakbench.optim import value_and_gradient
from leakbench.report import weights
from leakbench.rng import Rng
from leakbench.store import Record, Store
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


def test_who_does_not_know_the_rate_cannot_unroll() -> None:
    threat = "shares=weights, local_steps=2"
    with pytest.raises(Unsupported, match="neither known nor"):
        objective_of("dlm+(local=unrolled)", threat)
    objective_of("dlm+(local=unrolled)", f"{threat}, rate=known")
    objective_of("ig(local=unrolled)", f"{threat}, rate=known")


@pytest.mark.parametrize("spec", ["dlm(steps=40, labels=analytic)", "dlm+(steps=40)"])
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


def a_run(trials: int = 6) -> tuple[pd.DataFrame, dict[str, Record], pd.DataFrame]:
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
                records[trial] = Record(json.dumps(settings), "", 0, 1, "")
                lines.append({
                    "trial": trial, "dataset": "d", "model": "m", "defense": "x", "attack": attack, "threat": "t",
                    "image": image, "seed": 0, "status": "failed" if image == 5 and attack == "dlm" else "ok",
                    "floor": False, "ssim_aligned": 0.9 if found else 0.1, "psnr_aligned": 20.0,
                })  # fmt: skip
                if attack == "dlm":
                    scales.append((trial, "scale", 100.0 if found else 1e6))
    return pd.DataFrame(lines), records, pd.DataFrame(scales, columns=["trial", "name", "value"])


def test_the_report_compares_with_the_rate_and_shows_the_scale_and_the_strengths() -> None:
    trials = weights.rows(*a_run())
    assert len(trials) == 36
    text = weights.markdown("mine", trials, 0)
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in table]
    (dlg,) = (line for line in cells if line[4:6] == ["dlg", "known"] and line[0] == "d")
    (dlm,) = (line for line in cells if line[4:6] == ["dlm", "hidden"] and line[0] == "d")
    assert dlg[6:9] == ["6", "0", "100 % [61 %, 100 %]"]
    assert dlm[6:9] == ["6", "1", "50 % [19 %, 81 %]"]
    assert dlm[10] == "dlg"
    assert dlm[11].startswith("−50 % [")
    assert dlm[12] == "yes"
    assert ["m", "0.01", "1", "dlm", "3 of 6", "1", "1", "1"] in cells
    strengths = [line[1] for line in cells if line[0].startswith("weight-noise, gaussian, no clipping")]
    assert strengths == ["0", "0", "0.001", "0.001", "1", "1"]
    assert "not finished" in weights.markdown("mine", trials, 3)
    assert weights.scale_png(trials) == weights.scale_png(trials)
    assert weights.defense_png(trials).startswith(b"\x89PNG")
