"""The registered defenses: one file each."""

from leakbench.defenses.base import Defense, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Defense", "get", "names", "parse", "register", "registry", "spec"]
