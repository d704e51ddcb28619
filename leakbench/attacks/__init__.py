"""The registered attacks: one file each."""

from leakbench.attacks import dlg, dlm, ig, lb, analytic, peel, grnn, ggl, floors  # isort: skip (listed in this order)
from leakbench.attacks.base import Attack, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = [
    "Attack",
    "analytic",
    "dlg",
    "dlm",
    "floors",
    "get",
    "ggl",
    "grnn",
    "ig",
    "lb",
    "names",
    "parse",
    "peel",
    "register",
    "registry",
    "spec",
]
