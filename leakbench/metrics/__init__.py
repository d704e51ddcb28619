"""The registered metrics, one file for each convention."""

from collections.abc import Collection

# imported to be registered, in the order in which they are listed
from leakbench.metrics import standard, lpips, aligned, label, paper, encoded, perceptual  # isort: skip  # noqa: F401
from leakbench.metrics.base import Metric, Truth, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec


def of_run(named: Collection[str] = ()) -> list[Metric]:
    """Return the metrics of a run: those of every run, and those it names, in the order of their columns."""
    return [parse(name) for name in names() if get(name).default or name in named]


__all__ = ["Metric", "Truth", "get", "names", "of_run", "parse", "register", "registry", "spec"]
