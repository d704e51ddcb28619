"""GGL and its floor: what is recovered, what is compared with it, what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, SHAPE, close, rand, randn, watch
from torch import Tensor

import leakbench
from leakbench import Matrix, attacks, clients, defenses, generators, models
from leakbench.analysis import controls
from leakbench.attacks.ggl import GGL, divergence, squash, transformed
from leakbench.attacks.matching import analytic_labels
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient, ThreatModel
from leakbench.errors import BadOption, LeakbenchError, Unsupported
from leakbench.observation import Observation
from leakbench.plan.matrix import parse_threat
from leakbench.store.run_file import Store
from leakbench.victim import Client, observe

KEYS = ("a", "b", "c", "d")
TINY = "budget=48, popsize=8, generator=tiny"


def tiny(latent: Tensor) -> Tensor:
    loaded = generators.load(generators.parse("tiny"), torch.device("cpu"), latent.dtype)
    return loaded.draw(latent, torch.zeros(len(latent), dtype=torch.int64), SHAPE)


def see(
    images: Tensor, *, defense: str = "none", threat: object = "paper", labels: Sequence[int] | None = None
) -> Observation:
    """Return what a server sees of clients with these images."""
    chosen = labels or [(3 * row + 1) % CLASSES for row in range(len(images))]
    clients = [
        Client(image, label, "weights", f"client {row}") for row, (image, label) in enumerate(zip(images, chosen))
    ]
    mean = torch.full(SHAPE, 0.5)
    return observe(models.parse("lenet"), defenses.parse(defense), parse_threat(threat), clients, CLASSES, mean)


def inside() -> Tensor:
    """Return four images that the tiny generator can draw."""
    return tiny(randn(4, 3, seed=3))


def run(spec: str, observation: Observation, keys: Sequence[str] = KEYS) -> Tensor:
    attack = attacks.parse(spec)
    attack.check(observation)
    return attack(observation, Rng(tuple(keys))).images


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ("budget=160", 162),
        ("budget=160, optimizer=DE", 162),
        ("budget=40, optimizer=adam", 42),
        ("budget=96, restarts=2, batch=20", 196),
    ],
)
def test_an_image_of_the_generator_is_recovered(options: str, evaluations: int) -> None:
    truth = inside()
    observation = see(truth)
    attack = attacks.parse(f"ggl(popsize=8, generator=tiny, {options})")
    found = attack(observation, Rng(KEYS))
    assert found.labels is not None
    assert found.labels.tolist() == [1, 0, 3, 2]
    assert found.images.dtype == torch.float32
    floor = run("prior(generator=tiny)", observation)
    own, other = ((images - truth).square().mean((1, 2, 3)) for images in (found.images, floor))
    assert float(own.mean()) < 0.3 * float(other.mean())
    assert found.evaluations is not None
    assert found.evaluations.tolist() == [evaluations] * 4


@pytest.mark.long
def test_both_images_of_a_client_are_recovered() -> None:
    truth = inside()
    pairs = [
        Client(truth[row], row, "weights", f"client {row}", (), ((truth[row + 1], row + 1),)) for row in range(0, 4, 2)
    ]
    mean, training = torch.full(SHAPE, 0.5), clients.parse("local(batch=2)")
    batches = ThreatModel(labels="counts")
    observation = observe(
        models.parse("lenet"), defenses.parse("none"), batches, pairs, CLASSES, mean, training=training
    )
    errors = []
    for spec in ("ggl(popsize=8, generator=tiny, budget=400)", "prior(generator=tiny)"):
        found = run(spec, observation, KEYS[:2])
        assert found.shape == (2, 2, *SHAPE)
        each = (found[:, :, None] - truth.view(2, 1, 2, *SHAPE)).square().mean((3, 4, 5))
        straight, crossed = each.diagonal(dim1=1, dim2=2).mean(1), each.flip(2).diagonal(dim1=1, dim2=2).mean(1)
        errors.append(float(torch.minimum(straight, crossed).mean()))
    assert errors[0] < 0.5 * errors[1]


def test_a_seed_gives_the_same_images() -> None:
    spec, observation = f"ggl({TINY})", see(inside())
    one = run(spec, observation)
    assert torch.equal(one, run(spec, observation))
    assert not torch.equal(one, run(spec, observation, keys=("e", "f", "g", "h")))


@pytest.mark.parametrize("spec", [f"ggl({TINY})", f"ggl({TINY}, control=wrong-gradient)", "prior(generator=tiny)"])
def test_the_size_of_a_chunk_does_not_change_the_images(spec: str) -> None:
    images, labels = inside(), [1, 0, 3, 2]
    together = run(spec, see(images))
    for rows in ((0,), (1, 2), (3,)):
        alone = run(spec, see(images[list(rows)], labels=[labels[row] for row in rows]), [KEYS[row] for row in rows])
        # a client's draws are its own in the run; here the first is always "client 0", which no defense uses
        torch.testing.assert_close(alone, together[list(rows)], rtol=0, atol=1e-6)


def test_pieces_do_not_change_the_images() -> None:
    observation = see(inside())
    torch.testing.assert_close(run(f"ggl({TINY})", observation), run(f"ggl({TINY}, batch=3)", observation))


def test_global_randomness_and_the_observation_are_left_alone() -> None:
    observation = see(inside())
    before = {name: value.clone() for name, value in observation.gradient.items()}

    def states() -> tuple[object, ...]:
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), kind, keys.tolist(), *rest, torch.get_rng_state().tolist()

    state = states()
    run(f"ggl({TINY}, control=wrong-gradient)", observation)
    assert states() == state
    for name, value in before.items():
        assert torch.equal(observation.gradient[name], value)


def test_secrets_are_sought_with_the_latent() -> None:
    """A key is an input of the network, and one more unknown for any solver."""
    observation = see(inside(), defense="keylock(length=4)", threat={"reveals": ["lock-weights"], "labels": "known"})
    assert [secret.group for secret in observation.secrets].count("key") == 1
    sampled, sought = (run(f"ggl({TINY}, secrets={how})", observation) for how in ("sample", "optimise"))
    assert bool(torch.isfinite(sought).all())
    assert not torch.equal(sampled, sought)


# the comparisons


def test_the_control_does_not_depend_on_the_private_image() -> None:
    spec = f"ggl({TINY}, control=wrong-gradient)"
    one = run(spec, see(inside(), threat="known-label"))
    other = run(spec, see(rand(4, *SHAPE, seed=9), threat="known-label"))
    assert torch.equal(one, other)
    assert not torch.allclose(one, run(f"ggl({TINY})", see(inside(), threat="known-label")), atol=1e-2)


def test_the_control_searches_for_a_sample_with_the_same_label() -> None:
    """Its answer has the gradient of the sample, so that as a search it is as hard as the attack's own."""
    observation = see(inside())
    attack = attacks.parse(f"ggl({TINY}, control=wrong-gradient)")
    found = attack(observation, Rng(KEYS))
    assert found.labels is not None
    assert found.labels.tolist() == analytic_labels(observation).tolist()
    latent = torch.stack([torch.randn(3, generator=own) for own in Rng(KEYS).generators("decoy")])
    error = (found.images - tiny(latent)).square().mean((1, 2, 3))
    assert float(error.mean()) < 0.5 * float((found.images - inside()).square().mean())


def test_the_floor_uses_of_the_gradient_no_more_than_the_label() -> None:
    one = run("prior(generator=tiny)", see(inside()))
    other = run("prior(generator=tiny)", see(rand(4, *SHAPE, seed=9)))
    assert torch.equal(one, other)
    assert attacks.get("prior").floor
    assert not torch.equal(one[0], one[1])
    squashed = run("prior(generator=tiny, latent=tanh)", see(inside()))
    latent = torch.stack([torch.randn(3, generator=own) for own in Rng(KEYS).generators("prior")])
    torch.testing.assert_close(squashed, tiny(latent.tanh()))


def test_the_report_shows_the_gain_over_floor_and_control(tmp_path: Path) -> None:
    short = "generator=tiny, budget=6, popsize=3"
    matrix = Matrix(
        attacks=[f"ggl({short})", f"ggl({short}, control=wrong-gradient)", "prior(generator=tiny)", "grey"],
        defenses=["none", "norm-only"],
        models=["lenet"],
        datasets=["samples(size=8, channels=1)"],
        images=3,
        floors=False,
    )
    finished = leakbench.run(matrix, tmp_path, device="cpu")
    with Store.open(tmp_path / "run.sqlite", readonly=True) as store:
        results, metrics = store.results(), store.metrics()
        gains = controls.control_gains(results, store.components(), metrics)
    attack, control, floor = (attacks.spec(one) for one in matrix.attacks[:3])
    assert [(gain.attack, gain.defense, gain.control) for gain in gains] == [
        (attack, defense, other) for other in (control, floor) for defense in ("none", "norm-only")
    ]
    cells = {key: cell.set_index("image") for key, cell in results.groupby(["attack", "defense"])}
    for gain in gains:
        own, other = cells[gain.attack, gain.defense], cells[gain.control, gain.defense]
        assert gain.values["psnr"][0] == pytest.approx((own["psnr"] - other["psnr"]).mean())
        assert gain.values["mse"][0] == pytest.approx((other["mse"] - own["mse"]).mean())
        assert gain.values["psnr"][1] <= gain.values["psnr"][0] <= gain.values["psnr"][2]
    finished.report(["md"])
    report = (tmp_path / "report.md").read_text()
    assert "**What the gradient adds to the generator**" in report


# its parts


def test_the_distance_is_the_mean_over_parameters() -> None:
    gradient = {"a": randn(2, 3, 4, seed=1), "b": randn(2, 5, seed=2), "c": randn(2, 1, seed=3)}
    observed = {name: value + 1 for name, value in gradient.items()}
    found = GGL().distance(gradient, observed)
    assert found.tolist() == pytest.approx([(12 + 5 + 1) / 3] * 2)


def test_the_divergence_is_that_of_a_normal_law() -> None:
    latent = randn(3, 50, seed=1) * 2 + 0.5
    mean, std = latent.numpy().mean(1), latent.numpy().std(1)
    assert divergence(latent).numpy() == pytest.approx(-0.5 * (1 + np.log(std**2) - mean**2 - std**2), rel=1e-5)
    standard = (latent - latent.mean(1, keepdim=True)) / latent.std(1, unbiased=False, keepdim=True)
    assert divergence(standard).tolist() == pytest.approx([0, 0, 0], abs=1e-5)


def test_latents_are_clipped_or_squashed() -> None:
    latent = torch.tensor([[-9.0, 0.5, 3.0]])
    assert squash(latent, "clip").tolist() == [[-2.0, 0.5, 2.0]]
    assert torch.equal(squash(latent, "tanh"), latent.tanh())
    assert squash(latent, "free") is latent


def test_the_divergence_pulls_the_latent_in() -> None:
    observation = see(inside())
    free, held = (
        run(f"ggl(budget=15, generator=tiny, optimizer=adam, kld={weight})", observation) for weight in (0, 1000)
    )
    assert not torch.allclose(free, held, atol=1e-2)


def gradients(seed: int) -> Gradient:
    return {
        "conv": randn(2, 3, 2, 2, seed=seed),
        "weight": randn(2, 4, 6, seed=seed + 1),
        "bias": randn(2, 4, seed=seed + 2),
    }


def test_clipping_takes_the_observed_norm_as_its_bound() -> None:
    gradient, observed = gradients(1), gradients(5)
    observed = {
        name: value * torch.tensor([0.1, 10.0]).view(2, *[1] * (value.ndim - 1)) for name, value in observed.items()
    }
    found = transformed(gradient, observed, "clip")

    def norm(some: Gradient, row: int) -> float:
        return float(torch.cat([value[row].flatten() for value in some.values()]).norm())

    assert norm(found, 0) == pytest.approx(norm(observed, 0))
    for name, value in gradient.items():
        assert torch.equal(found[name][1], value[1])  # below the bound
        close(found[name][0] / norm(found, 0), value[0] / norm(gradient, 0), 1e-6)


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.5, 1.0])
def test_sparsification_takes_the_observed_share_of_zeros(kept: float) -> None:
    gradient, observed = gradients(1), gradients(5)
    observed = {name: torch.where(rand(*value.shape, seed=4) < kept, value, 0.0) for name, value in observed.items()}
    found = transformed(gradient, observed, "sparsify")
    for row in range(2):
        zeros = sum(int((value[row] == 0).sum()) for value in observed.values())
        share = zeros / sum(value[row].numel() for value in observed.values())
        for name, value in gradient.items():
            sizes = np.abs(value[row].numpy())
            wanted = np.where(sizes < np.percentile(sizes, 100 * share), 0, value[row].numpy())
            np.testing.assert_array_equal(found[name][row].numpy(), wanted)


def test_soteria_takes_the_observed_columns() -> None:
    gradient, observed = gradients(1), gradients(5)
    observed["weight"][0, :, [1, 4]] = 0
    observed["weight"][1, 0, 2] = 0
    found = transformed(gradient, observed, "soteria")
    wanted = gradient["weight"].clone()
    wanted[0, :, [1, 4]] = 0
    wanted[1, :, 2] = 0
    assert torch.equal(found["weight"], wanted)
    assert torch.equal(found["conv"], gradient["conv"])
    with pytest.raises(Unsupported, match="gradient of a linear layer"):
        transformed({"bias": gradient["bias"]}, {"bias": observed["bias"]}, "soteria")


def test_a_transform_undoes_a_known_defense() -> None:
    """Where only part of the gradient is sent, the attacker who models that finds the image, and the other less."""
    observation = see(inside(), threat={"informed": True})
    halved = {name: value * 0.2 for name, value in observation.gradient.items()}
    clipped = replace(observation, gradient=halved, defense=None)
    knowing, plain = (
        run(f"ggl(budget=160, popsize=8, generator=tiny, transform={t})", clipped) for t in ("clip", "none")
    )
    errors = [float((images - inside()).square().mean()) for images in (knowing, plain)]
    assert errors[0] < 0.5 * errors[1]


def test_what_identifies_a_trial_holds_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = attacks.parse("ggl(generator=tiny)")
    before = attack.settings()
    assert before["weights"]["checksum"] == "none"
    other = generators.get("tiny")
    monkeypatch.setattr(other, "card", lambda self, old=other.card: replace(old(self), checksum="other"))
    assert attack.settings() != before


# what is refused


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ggl(budget=0)", "budget"),
        ("ggl(optimizer=CMAES)", "nevergrad has no optimizer 'CMAES'"),
        ("ggl(generator=dgcan)", "unknown generator 'dgcan'; did you mean 'dcgan'"),
        ('ggl(generator="dcgan(weight=mnist)")', "no option 'weight'; did you mean 'weights'"),
        ("prior(generator=dgcan)", "unknown generator 'dgcan'"),
        ('ggl(generator="biggan-deep(classes=1000)")', "class index 1000 is unknown"),
        ("ggl(latent=sinh)", "latent='sinh' is not valid"),
        ("ggl(steps=5)", "no option 'steps'"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(BadOption, match=words) as told:
        attacks.parse(spec)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("attack", ["ggl", "prior"])
@pytest.mark.parametrize(
    ("generator", "words"),
    [
        ("dcgan:cifar.safetensors", "does not exist"),
        ("file:none.pt", "does not exist"),
        ("dcgan:mnist", "draws 10 classes and the dataset has 7"),
        ("tiny", "and the dataset has"),
    ],
)
def test_a_generator_that_cannot_serve_is_told_before_the_run(
    attack: str, generator: str, words: str, tmp_path: Path
) -> None:
    matrix = {"defenses": ["none"], "models": ["lenet"], "datasets": ["samples(channels=1)"], "images": 1}
    with pytest.raises(LeakbenchError, match=words) as told:
        leakbench.run(Matrix(attacks=[f"{attack}(generator={generator})"], **matrix), tmp_path / "out", device="cpu")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_transforms_need_an_informed_attacker() -> None:
    with pytest.raises(Unsupported, match=r"use a threat model with informed=true"):
        attacks.parse("ggl(generator=tiny, transform=clip)").check(watch("lenet"))
    attacks.parse("ggl(generator=tiny, transform=clip)").check(watch("lenet", threat={"informed": True}))


def test_a_budget_below_one_population_is_told_before_the_run() -> None:
    with pytest.raises(BadOption, match=r"budget=49 is smaller than one population \(popsize=50\)") as told:
        attacks.parse("ggl(generator=tiny, budget=49)").check(watch("lenet"))
    assert "\n" not in str(told.value)
    attacks.parse("ggl(generator=tiny, budget=50)").check(watch("lenet"))
    attacks.parse("ggl(generator=tiny, budget=49, optimizer=adam)").check(watch("lenet"))


def test_a_population_is_measured_for_every_trial() -> None:
    """What the choice of a chunk goes by: nothing is held between populations, and Adam holds its moments."""
    observation, rng = watch("lenet", trials=3), Rng(("a", "b", "c"))
    evolved = attacks.parse("ggl(budget=6, popsize=3, generator=tiny)")
    assert evolved.probe(observation, rng) == 0
    descended = attacks.parse("ggl(budget=6, popsize=3, generator=tiny, optimizer=adam)")
    assert (descended.probe(observation, rng) or 0) > 0
