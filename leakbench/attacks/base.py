"""The contract of an attack: from an Observation to a Reconstruction, all trials at once."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import torch

from leakbench.core.component import Component
from leakbench.core.registry import Registry
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction, ThreatModel
from leakbench.defenses.base import Defense
from leakbench.errors import Unsupported
from leakbench.observation import Observation


class Attack(Component):
    """What a curious server does with what it saw.

    Attributes:
        floor: True for an attack that uses no gradient; tables show every other attack's gain over the best floor.
        updates: True for an attack that works on an update of unknown learning rate; any other one is given the
            gradient that the update is of, and needs a threat model that grants the rate.
        learns_rate: True for one of these that finds the rate on the way.
        queue: how many times as many trials it is given as it works on at a time (``Observation.slots``); more than 1
            for an attack whose trials end at different times, and that then begins the next one in the free place.
    """

    floor: ClassVar[bool] = False
    updates: ClassVar[bool] = False
    learns_rate: ClassVar[bool] = False
    queue: ClassVar[int] = 1

    @abstractmethod
    def __call__(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return a reconstruction of every trial; nothing of the observation is changed.

        Raises:
            Unsupported: the attack cannot serve this observation; the message says why.
        """

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where the attack cannot serve this observation; called with a blank image before a run."""

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Do a small, typical piece of the work on all trials, from whose time and memory their number is chosen.

        Returns:
            The bytes that the whole work holds beside what this piece needs; None where nothing was done, and the
            default number of trials at a time shall be taken.
        """
        return None


registry: Registry[Attack] = Registry("attack", "leakbench.attacks", Attack)
register = registry.register


def prepare(attack: Attack, observation: Observation) -> tuple[Attack, Observation]:
    """Return an attack and what it works on, both as the threat model has them.

    Raises:
        Unsupported: the threat model has the attacker search for secrets, which this attack cannot; or it informs the
            attacker of a defense that gives it nothing to know; or the client shares weights, and the attack, or what
            the attacker knows of the defense, needs the learning rate, which is not granted, or one step alone.
    """
    if attack.floor:
        return attack, observation
    unit = unit_of(attack, observation.threat)
    informed = inform(observation)
    _check_units(attack, informed)
    return adapt(attack, observation.threat), per_step(work_out(informed), unit)


def inform(observation: Observation) -> Observation:
    """Return the observation with the defense as the attacker models it that the threat model asks for.

    Raises:
        Unsupported: the defense states no such attacker.
    """
    defense, variant = observation.defense, observation.threat.informed
    if defense is None:
        return observation
    if not defense.informed:
        raise Unsupported(
            f"to be informed of the defense {defense.name!r} adds nothing: it states no informed attacker; "
            "use a threat model with informed=false"
        )
    if isinstance(variant, bool):
        return observation
    others = defense.attackers()
    if variant not in others:
        known = " or ".join(["true", *others])
        raise Unsupported(
            f"the defense {defense.name!r} states no informed attacker {variant!r}; write informed={known}"
        )
    return dataclasses.replace(observation, defense=others[variant])


def adapt(attack: Attack, threat: ThreatModel) -> Attack:
    """Return the attack as the threat model has it act: with ``secrets=optimise`` where it ``optimises``.

    Raises:
        Unsupported: the attack has no such option.
    """
    if not threat.optimises or attack.floor:
        return attack
    if "secrets" not in attack.options():
        raise Unsupported(f"{attack.name} cannot search for secrets; use a threat model with optimises=false")
    return dataclasses.replace(attack, secrets="optimise")  # type: ignore[type-var]


def unit_of(attack: Attack, threat: ThreatModel) -> float:
    """Return what the observed gradient is divided by to be what an attack works on.

    Where the client shares its weights, that is the mean gradient of its local steps: the update divided by the number
    of steps and, unless the attack has ``updates``, by the learning rate.

    Raises:
        Unsupported: the attack needs the learning rate, and it is not granted.
    """
    if threat.shares == "gradient":
        return 1.0
    if attack.updates:
        return float(threat.local_steps)
    if threat.unit is None:
        raise Unsupported(
            f"{attack.name} needs the gradient, and an update of unknown learning rate does not give its size; use "
            "dlm or dlm+, or a threat model with rate=known"
        )
    return threat.unit


def per_step(observation: Observation, unit: float) -> Observation:
    """Return the observation with its gradient divided by this unit (``unit_of``)."""
    if unit == 1.0:
        return observation
    gradient = {name: value / unit for name, value in observation.gradient.items()}
    return dataclasses.replace(observation, gradient=gradient, unit=unit)


def _check_units(attack: Attack, observation: Observation) -> None:
    """Raise Unsupported where an informed attacker cannot model what becomes of an update whose size is not known."""
    defense = observation.defense
    if defense is None or observation.threat.unit is not None or attack.learns_rate or not defense.models_release():
        return
    raise Unsupported(
        f"what {defense.name!r} does to an update counts in the units of the update, and the learning rate is neither "
        f"known nor learned by {attack.name}; use dlm, a threat model with rate=known, or informed=false"
    )


def work_out(observation: Observation) -> Observation:
    """Return what an informed attacker knows before any search.

    That is the secrets and the class probabilities that the defense lets it work out from the gradient (the mean one of
    several local steps), and the gradient or update as far as what was sent shows it.

    Args:
        observation: as the client sent it, in the units in which it did.

    Raises:
        Unsupported: secrets or probabilities follow from a gradient in its own units, and the learning rate is hidden;
            or from one gradient, and what was sent is the sum of several.
    """
    defense, threat = observation.defense, observation.threat
    if defense is None:
        return observation
    if defense.works_out():
        _check_worked_out(observation)
    size = threat.unit or 1.0
    gradient = {name: value / size for name, value in observation.gradient.items()}
    seen = (observation.model, gradient, observation.weights)
    found = {name: value for name, value in defense.recover(*seen).items() if name not in observation.weights}
    targets = defense.targets(*seen)
    labels = observation.labels
    return dataclasses.replace(
        _undone(observation, defense),
        weights={**observation.weights, **found},
        labels=targets.argmax(1) if labels is None and targets is not None else labels,
        targets=targets,
        secrets=tuple(secret for secret in observation.secrets if secret.name not in found),
    )


def _check_worked_out(observation: Observation) -> None:
    defense, threat = observation.defense, observation.threat
    assert defense is not None
    if threat.unit is None and not defense.scale_free:
        raise Unsupported(
            f"what an informed attacker works out of {defense.name!r} needs the gradient in its own units, and the "
            "learning rate is not known; use a threat model with rate=known, or informed=false"
        )
    if threat.shares == "weights" and threat.local_steps > 1 and not defense.summed:
        raise Unsupported(
            f"what an informed attacker works out of {defense.name!r} follows from the gradient of one step, and an "
            f"update of {threat.local_steps} local steps is a sum of several; use local_steps=1, or informed=false"
        )


def _undone(observation: Observation, defense: Defense) -> Observation:
    """Return the observation with what the defense did undone as far as what was sent shows it."""
    if type(defense).undo is Defense.undo:
        return observation
    before = defense.undo(observation.gradient, observation.weights)
    shown = {name: ~torch.isnan(value) for name, value in before.items()}
    gradient = {name: torch.where(shown[name], value, 0.0) for name, value in before.items()}
    return dataclasses.replace(observation, gradient=gradient, shown=shown)
