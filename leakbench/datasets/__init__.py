"""The registered datasets: one file for each family."""

# imported to be registered, in the order in which they are listed
from leakbench.datasets import samples, mnist, cifar, folder, arrays  # isort: skip  # noqa: F401
from leakbench.datasets.base import Dataset, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Dataset", "get", "names", "parse", "register", "registry", "spec"]
