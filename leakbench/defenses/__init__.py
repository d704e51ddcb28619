"""The registered defenses: one file each."""

# In the order in which they are listed.
# isort: off
from leakbench.defenses import none, noise, prune, clip, dp, quantise, soteria, precode, mixup, ats, keylock, norm_only
from leakbench.defenses import weights

# isort: on
from leakbench.defenses.adaptive import AdaptiveAttacker
from leakbench.defenses.base import Defense, Step, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = [
    "AdaptiveAttacker",
    "Defense",
    "Step",
    "ats",
    "clip",
    "dp",
    "get",
    "keylock",
    "mixup",
    "names",
    "noise",
    "none",
    "norm_only",
    "parse",
    "precode",
    "prune",
    "quantise",
    "register",
    "registry",
    "soteria",
    "spec",
    "weights",
]
