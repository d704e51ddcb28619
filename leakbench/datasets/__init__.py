"""The registered datasets: one file for each family."""

from leakbench.datasets import samples, mnist, cifar, folder  # isort: skip (listed in this order)
from leakbench.datasets.base import Dataset, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Dataset", "cifar", "folder", "get", "mnist", "names", "parse", "register", "registry", "samples", "spec"]
