"""The registered generators: pretrained networks that draw images, one file each."""

# imported to be registered, in the order in which they are listed
from leakbench.generators import dcgan, biggan, file  # isort: skip  # noqa: F401
from leakbench.generators.base import Card, Generator, check_fit, load, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Card", "Generator", "check_fit", "get", "load", "names", "parse", "register", "registry", "spec"]
