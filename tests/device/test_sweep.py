"""Every attack, defense and model that ships, under four kinds of threat models, on the pretended GPU and on the CPU.

Both attack what clients sent that took their steps on the CPU; the steps of clients on the device are compared apart.
The components are those of the registries, so that a new one is swept.

By default every attack meets every defense and every model, and threat models take turns; ``SWEEP=full`` crosses all.
``SWEEP=few``, for every commit, has every attack, defense and model, but not every pair of them.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
from conftest import SHAPE, SMALL
from test_device import attacked, compared, gpu, same, seen, stepped  # noqa: F401

from leakbench import attacks, defenses, models
from leakbench.attacks.matching import double
from leakbench.core.component import shipped
from leakbench.core.registry import Registry
from leakbench.core.types import Reconstruction
from leakbench.errors import LeakbenchError
from leakbench.optim import graph

THREATS = ("paper", "known-label", "weights", "informed=true")

ROUNDED = {
    **{name: f"{name}(steps=3, solver=adam, lr=0.1)" for name in ("dlg", "idlg")},
    "disaggregate": "disaggregate(search=1)",
    "peel": "peel(search=1)",
    "cocktail": "cocktail(steps=30)",
}
"""Long searches amplify the last digits too far, such as 20 iterations of L-BFGS in float32, which ``lb`` has in
float64. So do the searches of ``peel`` and ``disaggregate`` on a ReLU network: 150 iterations with a line search grow
1e-16 to 1e-4 if there is a max-pool. Images of a short one differ by 1e-9 in float64, and by up to 1e-2 in float32."""

WIDE: Mapping[str, tuple[str, tuple[int, int, int]]] = {
    "convnet": ("convnet", (1, 9, 9)),
    "resnet18": ("resnet18", (1, 33, 33)),
    "resnet32": ("resnet32", (1, 8, 8)),
    "resnet34": ("resnet34", (1, 33, 33)),
    "vgg16": ("vgg16(hidden=64)", (1, 32, 32)),
    "vit": ("vit(patch=2)", (1, 8, 8)),
}
"""The large models at their full width, for one step of one attack."""

EXACT = ("peel", "disaggregate")
"""The attacks that are compared in float64."""

SIGNS = ("censor", "signsgd")
"""The defenses that send signs. An adaptive attacker takes those of the dummy gradient, too, and a transformer has
entries that are 0 up to rounding: a bias of all keys changes no attention. There, oblivious attackers are compared."""

FLIPS = {"quantise": 0.01}
"""The share of a client's entries that may differ: one between two levels goes to either, by the last digit."""

SMOOTH = {"svt-privacy": "svt-privacy(gamma=0.01)"}
"""An entry that the last digit moves over the threshold changes all later draws; smaller noise makes it unlikely."""

NETWORKS: Mapping[str, tuple[str, tuple[int, int, int]]] = {
    "convnet": ("convnet(width=2)", (1, 9, 9)),
    "resnet18": ("resnet18(width=8, stem=cifar, max_pool=false)", (1, 16, 16)),
    "resnet32": ("resnet32(width=8)", SHAPE),
    "resnet34": ("resnet34(width=2)", (1, 33, 33)),
    "vgg16": ("vgg16(width=2, hidden=8)", (1, 32, 32)),
    "vit": ("vit(patch=2, dim=32, depth=2, init=uniform(0.5))", SHAPE),
}
"""Narrow networks in place of the large models, with images that they take; the others are swept as they are.

The transformer's weights are drawn anew: those of its last normalisation are all 1 at first, so that the features of
an image sum up to 0, and the label that is inferred from such sums hangs on rounding.
"""


@dataclass(frozen=True)
class Case:
    """An attack on clients, on both devices.

    Attributes:
        threats: threat models; the first one is taken under which the attack is not refused.
        batch: the images of each client.
        served: the attack must not be refused.
        exact: whether they are compared in float64.
    """

    attack: str
    defense: str = "none"
    model: str = "lenet"
    threats: tuple[str, ...] = THREATS
    batch: int = 1
    shape: tuple[int, int, int] = SHAPE
    served: bool = False
    exact: bool = False

    def __str__(self) -> str:
        """Return the name of a test."""
        return " ".join([self.attack, self.defense, self.model, self.threats[0], str(self.batch)])


def served_by(model: str, server: str = "", batch: int = 1) -> dict[str, Any]:
    """Return the parts of a case for an attack that not every network and server serves."""
    own = [f"server={server}", f"server={server}, labels=known", f"server={server}, informed=true"]
    return {"model": model, "batch": batch, **({"threats": tuple(own)} if server else {})}


HOMES: Mapping[str, Mapping[str, Any]] = {
    "analytic": served_by("mlp"),
    "april": served_by("vit(first=bare, patch=2, dim=32, depth=2, init=uniform(0.5))"),
    "april-search": served_by(NETWORKS["vit"][0]),
    "cocktail": served_by("mlp(hidden=16, activation=sigmoid)", batch=2),
    "disaggregate": served_by("mlp(hidden=64)", batch=2),
    "imprint": served_by("lenet", "imprint(bins=16)", batch=2),
    "trap": served_by("lenet", "trap(rows=64)", batch=2),
}
"""What attacks need that no honest network with convolutions serves."""

WIDE_HOMES: Mapping[str, Mapping[str, Any]] = {
    "peel": served_by("resnet18(stem=cifar, max_pool=false, width=8, mode=eval)"),
}
"""What attacks need for batches of two: channels for the places of two images."""


def names(registry: Registry[Any]) -> list[str]:
    """Return the components of a registry that ship, without those that other tests register."""
    return sorted(name for name in registry.names() if shipped(registry.get(name)))


def spec_of(name: str) -> str:
    """Return an attack of few steps."""
    steps = "steps" in attacks.registry.fields(attacks.get(name))
    return ROUNDED.get(name) or SMALL.get(name) or (f"{name}(steps=3)" if steps else name)


def of_defense(name: str) -> dict[str, Any]:
    """Return the parts of a case for a defense: secure aggregation needs the images of several clients."""
    return {"defense": "secagg(clients=2)", "batch": 2} if name == "secagg" else {"defense": SMALL.get(name, name)}


def of_model(name: str) -> dict[str, Any]:
    """Return the parts of a case for a model."""
    spec, shape = NETWORKS.get(name, (name, SHAPE))
    return {"model": spec, "shape": shape}


def found_cases() -> Iterator[Case]:
    """Yield the comparisons, without what takes turns."""
    for name in names(attacks.registry):
        spec, home = spec_of(name), {"exact": name in EXACT, **HOMES.get(name, {})}
        for defense in names(defenses.registry):
            known = "dlm" if defense.startswith("weight-") else "ig"
            served = name == known or defense == "none"
            threats = {"threats": THREATS[:2]} if name == "april-search" and defense in SIGNS else {}
            if attacks.get(name).batches or defense != "secagg":
                yield Case(**{"attack": spec, **home, **of_defense(defense), **threats, "served": served})
        for model in names(models.registry):
            yield Case(**{"attack": spec, **home, **of_model(model), "served": name == "ig"})
        if attacks.get(name).batches:
            for defense in ("none", "noise", "keylock", "soteria"):
                wide = {**home, **WIDE_HOMES.get(name, {}), "batch": 2}
                yield Case(**{"attack": spec, **wide, **of_defense(defense), "served": defense == "none"})

    for model, shape in WIDE.values():
        yield Case("ig(steps=1)", "none", model, ("known-label",), shape=shape, served=True, exact=True)


def turned(threats: Sequence[str], by: int) -> tuple[str, ...]:
    """Return threat models in another order, so that each comes first in turn."""
    start = by % len(threats)
    return (*threats[start:], *threats[:start])


def cases() -> list[Case]:
    """Return the comparisons, each once."""
    if os.environ.get("SWEEP") == "full":
        every = itertools.product(*(names(one.registry) for one in (attacks, defenses, models)))
        crossed = [
            (
                spec_of(attack),
                {"exact": attack in EXACT, **HOMES.get(attack, {})},
                of_defense(defense),
                of_model(model),
            )
            for attack, defense, model in every
        ]
        return [
            Case(**{"attack": spec, **home, **network, **defense, "threats": (threat,)})
            for spec, home, defense, network in crossed
            for threat in home.get("threats", THREATS)
        ]
    turns = (Case(**{**vars(case), "threats": turned(case.threats, turn)}) for turn, case in enumerate(found_cases()))
    pairs = list({str(case): case for case in turns}.values())
    if os.environ.get("SWEEP") == "few":
        wide = [model for model, _ in WIDE.values()]
        return [case for place, case in enumerate(pairs) if (case.served or place % 4 == 0) and case.model not in wide]
    return pairs


CASES = cases()


def test_every_component_that_ships_is_swept() -> None:
    for registry, found in (
        (attacks.registry, {attacks.parse(case.attack).name for case in CASES}),
        (defenses.registry, {defenses.parse(case.defense).name for case in CASES}),
        (models.registry, {models.parse(case.model).name for case in CASES}),
    ):
        assert found == set(names(registry))
    assert NETWORKS.keys() == WIDE.keys()
    assert {threat for case in CASES for threat in case.threats[:1]} >= {*THREATS, "server=imprint(bins=16)"}


def outcome(case: Case, threat: str, device: str) -> Reconstruction | str:
    """Return what an attack reconstructs on a device, or why it is refused."""
    try:
        observation = seen(device, case.model, case.defense, threat, shape=case.shape, batch=case.batch)
        attacks.parse(case.attack).preflight(observation)  # as a run does
        return attacked(case.attack, double(observation) if case.exact else observation)
    except LeakbenchError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.device
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_outcome_on_a_gpu_is_that_on_the_cpu(gpu: ModuleType, case: Case) -> None:  # noqa: F811
    refusals = {}
    for threat in case.threats:
        here = outcome(case, threat, "cpu")
        if isinstance(here, Reconstruction):
            there = outcome(case, threat, "pretend:1")
            assert isinstance(there, Reconstruction), there
            same(here, there)
            return
        refusals[threat] = here
    assert not case.served, refusals
    threat = case.threats[0]
    assert outcome(case, threat, "pretend:1") == refusals[threat]


def clients_steps() -> list[tuple[dict[str, Any], str]]:
    """Return the clients and the threat model of each comparison of their steps."""
    found = [of_defense(defense) for defense in names(defenses.registry)]
    found += [
        of_model(model) | {"defense": defense} for model in names(models.registry) for defense in ("none", "soteria")
    ]
    return [
        ({"model": "lenet", "batch": 1, "shape": SHAPE, **one}, threat)
        for one in found
        for threat in ("paper", "weights")
    ]


@pytest.mark.device
@pytest.mark.parametrize(
    ("who", "threat"),
    clients_steps(),
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_the_step_of_clients_on_a_gpu_is_that_on_the_cpu(
    gpu: ModuleType,  # noqa: F811
    request: pytest.FixtureRequest,
    who: dict[str, Any],
    threat: str,
) -> None:
    if models.parse(who["model"]).name in NETWORKS:
        request.getfixturevalue("float64")  # deep networks amplify the rounding of float32 to a hundredth of an entry
    defense = SMOOTH.get(who["defense"], who["defense"])
    case = (who["model"], defense, threat)
    options = {"shape": who["shape"], "batch": who["batch"]}
    try:
        compared(*case, flips=FLIPS.get(who["defense"], 0.0), **options)
    except LeakbenchError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            stepped("cpu", *case, **options)


def test_labels_of_an_untrained_transformer_are_inferred_from_rounding() -> None:
    """Its last normalisation, without weights of its own, makes the features sum up to 0."""
    for spec, least, most in (("vit(patch=2, dim=32, depth=2)", 0.0, 1e-6), (NETWORKS["vit"][0], 1e-2, 1.0)):
        rows = stepped("cpu", spec).gradient["classifier.weight"]
        share = (rows.sum(2).abs() / rows.norm(dim=2)).max()
        assert least <= float(share) <= most


@pytest.mark.device
@pytest.mark.parametrize("name", names(attacks.registry))
def test_a_search_that_is_not_recorded_says_so(
    gpu: ModuleType,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    begun, notes = list[object](), list[str]()
    for solver in ("descend", "lbfgs"):
        module = sys.modules[f"leakbench.optim.{solver}"]
        own = module.recorded
        monkeypatch.setattr(module, "recorded", lambda *given, own=own: begun.append(given) or own(*given))
    monkeypatch.setattr(graph, "waits", lambda work, module: "a reason")
    home = HOMES.get(name, {"model": "resnet20"} if name == "peel" else {})
    case = Case(spec_of(name), **home)
    threat = "weights" if name.startswith("dlm") else case.threats[0]
    observation = seen("pretend", case.model, case.defense, threat, batch=case.batch)
    attacked(case.attack, replace(observation, note=notes.append))
    assert len(notes) == len(begun)
    assert (name in ("ig", "dlg", "peel", "dip")) <= bool(notes)
