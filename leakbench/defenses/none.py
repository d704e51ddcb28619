"""No defense: the ceiling of every attack."""

from dataclasses import dataclass
from typing import ClassVar

from leakbench.defenses.base import Defense, register


@register("none")
@dataclass(frozen=True)
class NoDefense(Defense):
    """No defense: the plain gradient is sent."""

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = "the control, by definition"
    assumes: ClassVar[str] = "Nothing."
    cost: ClassVar[str] = "Nothing."
    fails: ClassVar[str] = "It is the control: the attacker has the whole gradient."
