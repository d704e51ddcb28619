"""The adaptive attacker that every defense has: what it inverts, what it simulates, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from conftest import SHAPE, watch
from torch import Tensor
from zoo import Zoo

from leakbench import Defense, Gradient, Step, Unsupported, attacks, datasets, defenses, metrics, models, observe
from leakbench import attack as attack_on
from leakbench.attacks.base import prepare
from leakbench.attacks.entry_map import find_map
from leakbench.attacks.simulate import Encoding, Release, simulated
from leakbench.core.rng import Rng
from leakbench.defenses.base import by_informed
from leakbench.errors import BadOption
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix, expand, load_suite

Change = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Odd(Defense):
    """Changes every tensor of the gradient by itself."""

    name: ClassVar[str] = "odd"
    change: Change = lambda value, rng: value

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        return {name: self.change(value, rng) for name, value in step.gradient().items()}


def shuffled(value: Tensor, rng: torch.Generator) -> Tensor:
    order = torch.randperm(value.numel(), generator=torch.Generator().manual_seed(value.numel()))
    return value.flatten()[order].view_as(value)


def largest(value: Tensor, rng: torch.Generator) -> Tensor:
    threshold = value.abs().flatten().topk(max(1, value.numel() // 10)).values[-1]
    return torch.where(value.abs() >= threshold, value, 0.0)


def masked(value: Tensor, rng: torch.Generator) -> Tensor:
    return value * (torch.rand(value.shape, generator=rng) < 0.5)


MOVES: dict[str, Change] = {
    "roll": lambda value, rng: value.roll(1, 0),
    "shuffle": shuffled,
    "flip": lambda value, rng: -value,
    "x1e30": lambda value, rng: value * 1e30,
    "x1e-30": lambda value, rng: value * 1e-30,
}
PARTS: dict[str, Change] = {
    "top-k": largest,
    "mask": masked,
    "rolled top-k": lambda value, rng: largest(value, rng).roll(1, 0),
}
OTHERS: dict[str, Change] = {
    "unit": lambda value, rng: value / value.norm(),
    "noise": lambda value, rng: value + torch.randn(value.shape, generator=rng),
    "sign": lambda value, rng: value.sign(),
    "cube": lambda value, rng: value**3,
    "limit": lambda value, rng: value.clamp(-1, 1),
    "random flip": lambda value, rng: value * (torch.randint(2, value.shape, generator=rng) * 2 - 1),
    "random order": lambda value, rng: value.flatten()[torch.randperm(value.numel(), generator=rng)].view_as(value),
}


def seen(change: Change, defense: Defense | None = None, **options: object) -> Observation:
    """Return what a server sees behind a defense, and the same threat model without one."""
    return watch("lenet", defense or Odd(change), "informed=simulate", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("fresh", [False, True])
def test_what_moves_and_scales_entries_is_inverted_exactly(change: Change, fresh: bool) -> None:
    plain = watch("lenet", fresh=fresh)
    _, known = prepare(attacks.parse("ig"), seen(change, fresh=fresh))
    assert known.adaptive is not None
    assert not known.adaptive.models_release
    for name, value in plain.gradient.items():
        torch.testing.assert_close(known.gradient[name], value, rtol=1e-6, atol=0)
        assert known.shown is not None
        assert bool(known.shown[name].all())


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
def test_entries_that_were_sent_as_zero_are_unknown(change: Change) -> None:
    plain = watch("lenet")
    _, known = prepare(attacks.parse("ig"), seen(change))
    assert known.shown is not None
    share = torch.cat([value.flatten().float() for value in known.shown.values()]).mean()
    assert 0.05 < float(share) < 0.6
    for name, value in known.gradient.items():
        assert torch.equal(value, torch.where(known.shown[name], plain.gradient[name], 0.0))


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_a_release_that_is_no_such_map_is_simulated(change: Change) -> None:
    observation = seen(change)
    _, known = prepare(attacks.parse("ig"), observation)
    assert known.shown is None
    assert known.adaptive is not None
    assert isinstance(known.adaptive.release, Release)
    assert all(torch.equal(known.gradient[name], value) for name, value in observation.gradient.items())


def test_draws_and_slopes_are_found_out() -> None:
    found = {name: simulated(seen(change)).release for name, change in OTHERS.items()}
    releases = {name: one for name, one in found.items() if isinstance(one, Release)}
    assert {name for name, one in releases.items() if one.draws > 1} == {"noise", "random flip", "random order"}
    everything = set(watch("lenet").gradient)
    assert releases["unit"].smooth == releases["noise"].smooth == everything
    assert releases["sign"].smooth == set()


def test_a_withheld_layer_and_one_nan_leave_the_rest_known() -> None:
    @dataclass(frozen=True)
    class Withholds(Defense):
        name: ClassVar[str] = "withholds"

        def release(self, step: Step, rng: torch.Generator) -> Gradient:
            sent = {name: -value for name, value in step.gradient().items()}
            del sent[list(sent)[-1]]
            return sent

    plain = watch("lenet")
    _, known = prepare(attacks.parse("ig"), seen(shuffled, Withholds()))
    assert list(known.gradient) == list(plain.gradient)[:-1]
    assert all(torch.equal(value, plain.gradient[name]) for name, value in known.gradient.items())


def test_entries_may_change_their_tensor() -> None:
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([6]), "c": torch.Size([70, 70])}
    found = find_map(
        lambda gradient, number: {"a": 3 * gradient["b"].view(2, 3), "b": gradient["a"].flatten(), "c": gradient["c"]},
        shapes,
        torch.float32,
    )
    assert found is not None
    before = {name: torch.randn(shape) for name, shape in shapes.items()}
    back = found.inverse({"a": 3 * before["b"].view(2, 3), "b": before["a"].flatten(), "c": before["c"]})
    assert back.keys() == before.keys()
    assert all(torch.allclose(back[name], before[name], rtol=1e-6) for name in before)
    assert find_map(lambda gradient, number: {"c": gradient["c"] @ gradient["c"]}, shapes, torch.float32) is None
    assert find_map(lambda gradient, number: {"a": 0 * gradient["a"]}, shapes, torch.float32) is None


@pytest.mark.long
@pytest.mark.parametrize("attack", ["peel", "lb(steps=60)"])
def test_an_inverted_release_leaks_as_no_defense_does(attack: str) -> None:
    data = datasets.parse("samples(size=16)")
    images, labels = data.load([0, 9])
    torch.manual_seed(0)
    network = models.parse("lenet").build(data.image_shape, data.num_classes)
    score = metrics.parse("ssim_aligned")
    plain = attack_on(attack, observe(network, images, labels, seed=1000)).images
    assert float(score(plain, images).min()) > 0.6
    for change in MOVES.values():
        found = attack_on(
            attack, observe(network, images, labels, defense=Odd(change), threat="informed=simulate", seed=1000)
        ).images
        assert float(score(found, images).min()) > 0.6
    rolled = attack_on(attack, observe(network, images, labels, defense=Odd(MOVES["roll"]), seed=1000)).images
    assert float(score(rolled, images).max()) < 0.6


def test_the_attacker_draws_by_itself_and_each_trial_its_own() -> None:
    """Whatever the trials beside it, and never as the client did."""
    taken: list[int] = []

    @dataclass(frozen=True)
    class Notes(Defense):
        name: ClassVar[str] = "notes"

        def release(self, step: Step, rng: torch.Generator) -> Gradient:
            taken.append(rng.initial_seed())
            return {name: value + torch.randn(value.shape, generator=rng) for name, value in step.gradient().items()}

    observation = watch("lenet", Notes(), "labels=known, informed=simulate", trials=2)
    clients, attack = list(taken), attacks.parse("ig(steps=3)")
    both = attack(observation, Rng(("a", "b"))).images
    assert not set(clients) & set(taken[len(clients) :])
    half = replace(
        observation,
        gradient={name: value[1:] for name, value in observation.gradient.items()},
        weights={
            name: value[1:] if value.ndim > 1 and len(value) == 2 else value
            for name, value in observation.weights.items()
        },
        labels=None if observation.labels is None else observation.labels[1:],
    )
    torch.testing.assert_close(attack(half, Rng(("b",))).images[0], both[1], rtol=1e-4, atol=1e-4)


def test_what_cannot_be_simulated_is_unsupported_in_one_line() -> None:
    @dataclass(frozen=True)
    class Inspects(Defense):
        name: ClassVar[str] = "inspects"

        def release(self, step: Step, rng: torch.Generator) -> Gradient:
            if type(step) is not Step:
                raise RuntimeError("no client\nof mine")
            return step.gradient()

    with pytest.raises(Unsupported, match="'inspects' cannot be run on a dummy gradient: no client of mine; use"):
        prepare(attacks.parse("ig"), seen(shuffled, Inspects()))
    for empty in (Odd(lambda value, rng: torch.zeros_like(value)), Zoo("other")):
        with pytest.raises(Unsupported, match=f"'{empty.name}' sends does not depend on the gradient"):
            prepare(attacks.parse("ig"), seen(shuffled, empty))
    for control in ("none", "norm-only"):
        with pytest.raises(Unsupported, match=f"'{control}' does nothing to model"):
            prepare(attacks.parse("ig"), watch("lenet", control, "informed=simulate"))


def test_a_fixed_encoding_is_run_on_the_dummy_image() -> None:
    @dataclass(frozen=True)
    class Mirrors(Defense):
        name: ClassVar[str] = "mirrors"
        rounds: bool = False

        def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
            x = x.flip(-1)
            return (255 * x).round() / 255 if self.rounds else x, y

    for defense, smooth in ((Mirrors(), True), (Mirrors(rounds=True), False)):
        encode = simulated(seen(shuffled, defense)).encode
        assert isinstance(encode, Encoding)
        assert encode.smooth is smooth
        images = torch.rand(2, *SHAPE, requires_grad=True)
        encoded, labels = encode(images, torch.tensor([1, 2]), Rng(("a", "b")).generators("x"))
        torch.testing.assert_close(encoded, images.flip(-1), rtol=0, atol=1 / 255)
        assert labels.tolist() == [1, 2]
        assert bool(torch.autograd.grad(encoded.sum(), images)[0].any())
    assert simulated(seen(shuffled, defenses.parse("ats"))).encode is None


@pytest.mark.parametrize("spec", ["clip(norm=0.1)", "prune", "soteria", "dp", "quantise(bits=4)", "mixup", "ats"])
def test_every_shipped_defense_is_simulated(spec: str) -> None:
    observation = watch("lenet", spec, "labels=known, informed=simulate")
    found = attacks.parse("ig(steps=3)")(observation, Rng(("a", "b")))
    assert bool(torch.isfinite(found.images).all())


@pytest.mark.parametrize(("spec", "count"), [("precode(k=6)", 1), ("keylock(length=9)", 5)])
def test_every_secret_is_optimised(spec: str, count: int) -> None:
    observation = watch("lenet", spec, "labels=known, informed=simulate")
    _, known = prepare(attacks.parse("lb(steps=2)"), observation)
    objective = attacks.parse("lb(steps=2)")._objective(known, Rng(("a", "b")))
    assert sum(secret.optimised for secret in objective.observation.secrets) == count
    assert len([name for name in objective.attack._begin(objective) if name.startswith("secret:")]) == count
    assert bool(torch.isfinite(attacks.parse("lb(steps=2)")(observation, Rng(("a", "b"))).images).all())


def test_weights_that_are_sent_are_simulated_or_refused() -> None:
    threat = "shares=weights, learning_rate=0.1, rate=known, informed=simulate"
    for spec in ("weight-noise", "weight-sparsify", "noise"):
        _, known = prepare(attacks.parse("ig"), watch("lenet", spec, threat))
        assert known.adaptive is not None
        assert known.adaptive.models_release
    with pytest.raises(Unsupported, match="in the units of the update"):
        prepare(attacks.parse("dlm+"), watch("lenet", "noise", "shares=weights, informed=simulate"))
    _, known = prepare(attacks.parse("dlm+"), watch("lenet", Odd(MOVES["roll"]), "shares=weights, informed=simulate"))
    assert known.shown is not None, "an inversion needs no rate"


def test_a_defense_that_states_no_attacker_has_this_one_and_none_can_take_its_name() -> None:
    _, known = prepare(attacks.parse("ig"), watch("lenet", Odd(MOVES["flip"]), "informed=true"))
    assert known.shown is not None

    class Takes(Defense):
        name = "takes"

        def attackers(self):
            return {"simulate": simulated}

    with pytest.raises(BadOption):
        by_informed(Takes())


def test_every_adds_it_to_each_defense_but_the_controls() -> None:
    axes = {"attacks": ["ig"], "models": ["lenet"], "datasets": ["samples"], "images": 1, "floors": False}
    used = ["none", "norm-only", "prune", "precode", "ats"]
    cells = [trial.cell for trial in Matrix(defenses=used, threats=[{"informed": "every"}], **axes).trials()]
    found: dict[str, list[bool | str]] = {}
    for cell in cells:
        found.setdefault(cell.defense.name, []).append(cell.threat.informed)
    assert found == {
        "prune": [True, "simulate"],
        "precode": [True, "splice", "omit", "simulate"],
        "ats": ["simulate"],
    }


def test_the_suite_has_a_simulated_twin_of_every_attack() -> None:
    trials = [one.cell for one in Matrix(**expand(load_suite("worst-case"), "smoke")[0]).trials()]
    simulating = {one.attack.name for one in trials if one.threat.informed == "simulate" and not one.attack.floor}
    assert simulating == {"peel", "lb", "ig", "grnn", "ggl"}
