"""The registered models: one file each."""

from leakbench.models.base import Model, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Model", "get", "names", "parse", "register", "registry", "spec"]
