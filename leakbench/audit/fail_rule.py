"""The rule of ``--fail-if``, such as ``recovered > 0.1``: it is parsed, and never evaluated as code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from leakbench.errors import BadOption

SHARE_RECOVERED = "recovered"
LABELS = "labels"

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_RULE = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class FailRule:
    """The condition under which an audit fails.

    Attributes:
        name: ``recovered`` (the share of the images that at least one attacker recovers, 0 to 1), ``labels`` (the share
            of the labels that are inferred correctly in closed form, 0 to 1), or a metric (its largest leakage over
            all images and attackers).
        sign: ``>``, ``>=``, ``<`` or ``<=``.
        limit: a finite number.
    """

    name: str
    sign: str
    limit: float

    def holds(self, value: float) -> bool:
        """Return whether the condition is true of a value; it never is of NaN."""
        return _COMPARE[self.sign](value, self.limit)

    def __str__(self) -> str:
        """Return the rule as ``parse`` reads it."""
        return f"{self.name} {self.sign} {self.limit:g}"

    @classmethod
    def parse(cls, text: str, metrics: Collection[str]) -> FailRule:
        """Return the rule of a text ``NAME COMPARATOR NUMBER``.

        Args:
            text: such as ``recovered > 0.1`` or ``psnr>=20``.
            metrics: the names of all metrics.

        Raises:
            BadOption: the text has another form, or the name is unknown.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise BadOption(
                f"--fail-if {text!r} is not NAME COMPARATOR NUMBER; write one such as 'recovered > 0.1' or 'psnr >= 20'"
            )
        name, sign, limit = match[1], match[2], float(match[3])
        known = [SHARE_RECOVERED, LABELS, *metrics]
        if name not in known:
            raise BadOption(f"--fail-if {text!r}: unknown name {name!r}; known: {', '.join(known)}")
        if not math.isfinite(limit):
            raise BadOption(f"--fail-if {text!r}: the number is too large; give a finite one")
        return cls(name, sign, limit)
