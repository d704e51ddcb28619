"""The registered models: one file a family; and a user's own network as a model."""

from leakbench.models import lenet, mlp, resnet, resnet18, vgg
from leakbench.models.base import Model, register, registry
from leakbench.models.module import OwnModule

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = [
    "Model",
    "OwnModule",
    "get",
    "lenet",
    "mlp",
    "names",
    "parse",
    "register",
    "registry",
    "resnet",
    "resnet18",
    "spec",
    "vgg",
]
