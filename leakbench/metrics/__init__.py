"""The registered metrics, one file for each convention."""

from leakbench.metrics import standard, lpips, aligned, label, paper, encoded  # isort: skip (listed in this order)
from leakbench.metrics.base import Metric, Truth, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = [
    "Metric",
    "Truth",
    "aligned",
    "encoded",
    "get",
    "label",
    "lpips",
    "names",
    "paper",
    "parse",
    "register",
    "registry",
    "spec",
    "standard",
]
