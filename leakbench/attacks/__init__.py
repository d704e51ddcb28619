"""The registered attacks: one file each."""

from leakbench.attacks.base import Attack, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Attack", "get", "names", "parse", "register", "registry", "spec"]
