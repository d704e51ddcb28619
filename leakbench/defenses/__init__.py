"""The registered defenses: one file each."""

from leakbench.defenses import none, noise, precode, keylock, norm_only  # isort: skip (listed in this order)
from leakbench.defenses.base import Defense, Step, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = [
    "Defense",
    "Step",
    "get",
    "keylock",
    "names",
    "noise",
    "none",
    "norm_only",
    "parse",
    "precode",
    "register",
    "registry",
    "spec",
]
