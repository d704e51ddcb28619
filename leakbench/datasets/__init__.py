"""The registered datasets: one file each."""

from leakbench.datasets.base import Dataset, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Dataset", "get", "names", "parse", "register", "registry", "spec"]
