"""The registered models: one file a family; and a user's own network as a model."""

# imported to be registered, in the order in which they are listed
from leakbench.models import lenet, mlp, resnet, vgg, convnet, vit  # isort: skip  # noqa: F401
from leakbench.models.base import Model, register, registry
from leakbench.models.module import OwnModule

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

__all__ = ["Model", "OwnModule", "get", "names", "parse", "register", "registry", "spec"]
