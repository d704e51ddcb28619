"""The registered attacks: one file each."""

from leakbench.attacks import dlg, ig, floors  # isort: skip (listed in this order)
from leakbench.attacks.base import Attack, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Attack", "dlg", "floors", "get", "ig", "names", "parse", "register", "registry", "spec"]
