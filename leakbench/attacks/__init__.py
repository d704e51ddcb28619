"""The registered attacks: one file each."""

# imported to be registered, in the order in which they are listed
# isort: off
from leakbench.attacks import dlg, dlm, ig, log_cosine, gradinversion, lb, analytic, peel, disaggregate, cocktail, april  # noqa: F401
from leakbench.attacks import grnn, dip, ggl, imprint, trap, floors, nearest_public  # noqa: F401

# isort: on
from leakbench.attacks.base import Attack, register, registry

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Attack", "get", "names", "parse", "register", "registry", "spec"]
