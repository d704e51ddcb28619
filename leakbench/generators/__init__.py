"""The registered generators: pretrained networks that draw images, one file each."""

from leakbench.generators import dcgan, biggan, file  # isort: skip (listed in this order)
from leakbench.generators.base import Card, Generator, check_fit, load, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = [
    "Card",
    "Generator",
    "biggan",
    "check_fit",
    "dcgan",
    "file",
    "get",
    "load",
    "names",
    "parse",
    "register",
    "registry",
    "spec",
]
