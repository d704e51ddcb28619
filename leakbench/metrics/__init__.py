"""The registered metrics: one file each."""

from leakbench.metrics.base import Metric, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Metric", "get", "names", "parse", "register", "registry", "spec"]
