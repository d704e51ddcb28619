"""The contract of an attack: from an Observation to a Reconstruction, all trials at once."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

from leakbench.component import Component
from leakbench.errors import Unsupported
from leakbench.registry import Registry
from leakbench.rng import Rng
from leakbench.types import Observation, Reconstruction, ThreatModel


class Attack(Component):
    """What a curious server does with what it saw.

    Attributes:
        floor: True for an attack that uses no gradient; tables show every other attack's gain over the best floor.
        updates: True for an attack that works on an update of unknown learning rate; any other one is given the
            gradient that the update is of, and needs a threat model that grants the rate.
        queue: how many times as many trials it is given as it works on at a time (``Observation.slots``); more than 1
            for an attack whose trials end at different times, and that then begins the next one in the free place.
    """

    floor: ClassVar[bool] = False
    updates: ClassVar[bool] = False
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
            attacker of a defense that gives it nothing to know; or the client shares weights, and the attack needs the
            learning rate, which is not granted.
    """
    known = observation if attack.floor else work_out(inform(per_step(attack, observation)))
    return adapt(attack, observation.threat), known


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


def per_step(attack: Attack, observation: Observation) -> Observation:
    """Return what an attack works on where the client shares its weights: the mean gradient of its local steps.

    That is the update divided by the number of steps and, unless the attack has ``updates``, by the learning rate.

    Raises:
        Unsupported: the attack needs the learning rate, and it is not granted.
    """
    threat = observation.threat
    if threat.shares == "gradient":
        return observation
    unit = float(threat.local_steps)
    if not attack.updates:
        if threat.learning_rate is None:
            raise Unsupported(
                f"{attack.name} needs the gradient, and an update of unknown learning rate does not give its size; use "
                "dlm or dlm+, or a threat model with rate=known"
            )
        unit *= threat.learning_rate
    gradient = {name: value / unit for name, value in observation.gradient.items()}
    return dataclasses.replace(observation, gradient=gradient, unit=unit)


def work_out(observation: Observation) -> Observation:
    """Return what an informed attacker knows: secrets and class probabilities that the defense lets it work out."""
    defense = observation.defense
    if defense is None:
        return observation
    seen = (observation.model, observation.gradient, observation.weights)
    found = {name: value for name, value in defense.recover(*seen).items() if name not in observation.weights}
    targets = defense.targets(*seen)
    labels = observation.labels
    return dataclasses.replace(
        observation,
        weights={**observation.weights, **found},
        labels=targets.argmax(1) if labels is None and targets is not None else labels,
        targets=targets,
        secrets=tuple(secret for secret in observation.secrets if secret.name not in found),
    )
