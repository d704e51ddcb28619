"""Floors are verified: an attack that states that it uses no gradient returns the same images for another gradient."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from leakbench.attacks import Attack
from leakbench.core.rng import Rng, generator
from leakbench.core.types import Reconstruction
from leakbench.engine.isolation import Isolation, foreign
from leakbench.errors import BadOption
from leakbench.observation import Observation

TOLERANCE = 1e-4
"""The largest difference of two pixels that rounding on a GPU explains."""


class FalseFloor(BadOption):
    """An attack states that it is a floor, and uses the gradient; this ends the run."""


def verify_floor(
    isolation: Isolation,
    attack: Attack,
    observation: Observation,
    rng: Rng,
    guess: Reconstruction | None,
    other: Mapping[str, Tensor],
) -> None:
    """Raise FalseFloor if the images of a floor change when only the gradient does.

    A floor may use a label that the threat model grants, which stays the same. Only a floor of leakbench may infer the
    label from the gradient (``prior``): it gets this label with the other gradient.

    Args:
        isolation: calls the attack.
        attack: the floor.
        observation: what it observes.
        rng: what it draws from.
        guess: what it returned for this observation; None to ask for it.
        other: the other gradient, of another image and another label.
    """
    guess = isolation.run(attack, observation, rng) if guess is None else guess
    labels = observation.labels if foreign(attack) or observation.labels is not None else guess.labels
    again = isolation.run(attack, replace(observation, gradient=other, labels=labels), rng)
    if not torch.allclose(guess.images.float(), again.images.float(), rtol=0, atol=TOLERANCE):
        raise FalseFloor(
            f"attack {attack.name!r} states floor = True, and its images change with the gradient; a floor uses no "
            "gradient: state floor = False"
        )


def noise_like(observation: Observation) -> Mapping[str, Tensor]:
    """Return normal draws of the size of each gradient tensor's entries."""
    rng = generator("floor")
    return {
        name: torch.randn(value.shape, generator=rng, dtype=value.dtype).to(value.device) * value.std(correction=0)
        for name, value in observation.gradient.items()
    }
