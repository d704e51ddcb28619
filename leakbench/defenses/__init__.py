"""The registered defenses: one file each."""

# imported to be registered, in the order in which they are listed
# isort: off
from leakbench.defenses import none, noise, prune, clip, dp, quantise, soteria, precode, mixup, ats, keylock, norm_only  # noqa: F401
from leakbench.defenses import weights, percentile_privacy, svt_privacy, sign, topk, outpost, censor, dcs, secagg  # noqa: F401
from leakbench.defenses import local_norm  # noqa: F401

# isort: on
from leakbench.defenses.adaptive import AdaptiveAttacker
from leakbench.defenses.base import Defense, Step, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["AdaptiveAttacker", "Defense", "Step", "get", "names", "parse", "register", "registry", "spec"]
