"""The registered kinds of local training: one file each."""

# imported to be registered, in the order in which they are listed
from leakbench.clients import local  # noqa: F401
from leakbench.clients.base import LocalTraining, check_threat, register, registry, take_step

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = [
    "LocalTraining",
    "check_threat",
    "get",
    "names",
    "parse",
    "register",
    "registry",
    "spec",
    "take_step",
]
