"""The line that an audit must not cross: ``recovered > 0.1``, parsed and never evaluated as code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from leakbench.errors import BadOption

RECOVERED = "recovered"
LABELS = "labels"

_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_RULE = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Gate:
    """A line: what is measured, how it is compared, and with what.

    Attributes:
        name: ``recovered`` (the share of the images that at least one attacker recovers, 0 to 1), ``labels`` (the share
            of the labels that are read off what was sent, 0 to 1), or a metric (of the image that leaks most, by the
            attacker that shows most of it).
        sign: ``>``, ``>=``, ``<`` or ``<=``.
        limit: a number.
    """

    name: str
    sign: str
    limit: float

    def crossed(self, value: float) -> bool:
        """Return whether a value crosses the line; NaN does not."""
        return _COMPARE[self.sign](value, self.limit)

    def __str__(self) -> str:
        """Return the line as it is written."""
        return f"{self.name} {self.sign} {self.limit:g}"


def parse_gate(text: str, metrics: Collection[str]) -> Gate:
    """Return the line that ``NAME COMPARATOR NUMBER`` states.

    Args:
        text: such as ``recovered > 0.1`` or ``psnr>=20``.
        metrics: the names of the metrics that there are.

    Raises:
        BadOption: the text is not of this form, or the name is none that is measured.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise BadOption(
            f"--fail-if {text!r} is not NAME COMPARATOR NUMBER; write one such as 'recovered > 0.1' or 'psnr >= 20'"
        )
    name, sign, limit = match[1], match[2], float(match[3])
    known = [RECOVERED, LABELS, *metrics]
    if name not in known:
        raise BadOption(f"--fail-if {text!r}: unknown name {name!r}; known: {', '.join(known)}")
    if not math.isfinite(limit):
        raise BadOption(f"--fail-if {text!r}: the number is too large; give a finite one")
    return Gate(name, sign, limit)
