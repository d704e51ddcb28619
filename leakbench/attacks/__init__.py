"""The registered attacks: one file each."""

# imported to be registered, in the order in which they are listed
from leakbench.attacks import dlg, dlm, ig, log_cosine, lb, analytic, peel, grnn, ggl  # isort: skip  # noqa: F401
from leakbench.attacks import dip, imprint, trap, floors, nearest_public  # isort: skip  # noqa: F401
from leakbench.attacks.base import Attack, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Attack", "get", "names", "parse", "register", "registry", "spec"]
