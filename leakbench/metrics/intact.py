"""Whether the metrics that ship with leakbench are still its own: a plugin adds metrics, and replaces none."""

import sys
from collections.abc import Iterator, Mapping
from types import FunctionType

from leakbench.errors import LeakbenchError
from leakbench.metrics.base import registry

FOLDER = "leakbench.metrics."


class ReplacedMetric(LeakbenchError):
    """A part of a metric that ships with leakbench was replaced; this ends the run."""


def snapshot() -> Mapping[str, object]:
    """Return every function (its code), class and constant of the modules of metrics, and each metric, by name."""
    found: dict[str, object] = {f"metric {name!r}": cls for name, cls in registry._classes.items()}
    for name, module in list(sys.modules.items()):
        if name.startswith(FOLDER) and name != __name__:
            found |= _members(name, vars(module))
    return found


def _members(place: str, members: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in list(members.items()):
        if name.startswith("__") and name != "__call__":
            continue
        if isinstance(value, FunctionType):
            yield f"{place}.{name}", (value.__code__, value.__defaults__, value.__kwdefaults__)
        else:
            yield f"{place}.{name}", value
        if isinstance(value, type) and value.__module__.startswith(FOLDER):
            yield from _members(f"{place}.{name}", vars(value))


def refuse_replaced(shipped: Mapping[str, object]) -> None:
    """Raise ReplacedMetric if a part of the metrics is not what it was in ``shipped``, an earlier ``snapshot``."""
    present = snapshot()
    for name in dict.fromkeys((*shipped, *present)):
        before, now = shipped.get(name), present.get(name)
        new = name not in shipped and name.startswith("metric ")
        if not (new or before is now or (isinstance(before, tuple) and before == now)):
            raise ReplacedMetric(
                f"a plugin or script replaced {name} of leakbench; register a metric under a name of its own"
            )
