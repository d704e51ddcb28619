"""The contract of an attack: from an Observation to a Reconstruction, all trials at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from leakbench.component import Component
from leakbench.registry import Registry
from leakbench.rng import Rng
from leakbench.types import Observation, Reconstruction


class Attack(Component):
    """What a curious server does with what it saw.

    Attributes:
        floor: True for an attack that uses no gradient; tables show every other attack's gain over the best floor.
    """

    floor: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return a reconstruction of every trial; nothing of the observation is changed.

        Raises:
            Unsupported: the attack cannot serve this observation; the message says why.
        """

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where the attack cannot serve this observation; called with a blank image before a run."""


registry: Registry[Attack] = Registry("attack", "leakbench.attacks", Attack)
register = registry.register
