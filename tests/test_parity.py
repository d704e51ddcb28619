"""The same answers batched and one at a time: every model, attack and defense, in float64 over some steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ATTACKS, DEFENSES, MODES, watch

from leakbench import attacks
from leakbench.attacks.matching import GradientMatching
from leakbench.core.rng import Rng
from leakbench.errors import Unsupported
from leakbench.gradients import Path
from leakbench.observation import Observation
from leakbench.optim import Unknowns, value_and_gradient

STEPS = 5
FEW = 2
"""The steps of a network of twenty layers, whose steps take the longest."""
SIDE = 16
CHANGING = [spec for spec in DEFENSES if spec != "noise"]
"""Noise changes the numbers that an attack is given, and nothing of what is computed with them."""
CASES = [
    pytest.param(model, defense, marks=pytest.mark.long if model.startswith("resnet20") and index else ())
    for model in MODES
    for index, defense in enumerate(CHANGING)
]
"""Every model with every defense; most of the deepest network's with the longest tests."""
MATCHING = [spec for spec in ATTACKS if isinstance(attacks.parse(spec), GradientMatching)]


def walk(attack: GradientMatching, observation: Observation, path: Path, steps: int) -> tuple[torch.Tensor, Unknowns]:
    """Return the objective at each of some steps of fixed length down the slope, and where they lead."""
    objective = attack._objective(observation, Rng(("first", "second")))
    objective = replace(objective, evaluator=replace(objective.evaluator, path=path))
    unknowns, values = attack._begin(objective), []
    for step in range(steps):
        value, gradient = value_and_gradient(objective, unknowns, step)
        values.append(value)
        for name, slope in gradient.items():
            length = slope.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, *[1] * (slope.ndim - 1))
            unknowns = {**unknowns, name: unknowns[name] - 0.01 * slope / length}
    return torch.stack(values), unknowns


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("model", "defense"), CASES)
def test_batched_is_one_at_a_time(model: str, defense: str) -> None:
    served, steps = 0, FEW if model.startswith("resnet") else STEPS
    observation = watch(model, defense, fresh=True, shape=(1, SIDE, SIDE))
    for spec in MATCHING:
        attack = attacks.parse(spec)
        assert isinstance(attack, GradientMatching)
        try:
            attack.check(observation)
        except Unsupported:
            continue
        batched, apart = (walk(attack, observation, path, steps) for path in ("batched", "one-at-a-time"))
        (value, end), (expected, there) = batched, apart
        assert bool(torch.isfinite(expected).all())
        pairs = {"objective": (value, expected), **{name: (end[name], there[name]) for name in end}}
        for name, (a, b) in pairs.items():
            assert float((a - b).norm()) <= 1e-10 * max(1.0, float(b.norm())), f"{spec}, {name}"
        served += 1
    assert served
