"""The contract of a model: a factory of networks that map images in [0, 1] to logits."""

from __future__ import annotations

from abc import abstractmethod

from torch import nn

from leakbench.core.component import Component
from leakbench.core.registry import Registry
from leakbench.models.weights import Checkpoint


class Model(Component):
    """A network architecture with its weights: drawn from torch's global generator (seeded by the caller) or loaded."""

    @abstractmethod
    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return a network from [B, *image_shape] in [0, 1] to logits [B, num_classes], in the mode it is attacked in.

        Raises:
            Unsupported: the architecture does not admit this shape.
        """

    def fresh_weights(self) -> bool:
        """Return whether every trial draws its own weights instead of sharing its seed's."""
        return False

    def behaviour(self, image_shape: tuple[int, int, int]) -> dict[str, str]:
        """Return the identity of the network beside ``settings``, if these do not suffice, on images of a shape."""
        return {}

    def checkpoint(self) -> Checkpoint | None:
        """Return which file of trained weights is loaded and what it states; None if weights are drawn."""
        return None


registry: Registry[Model] = Registry("model", "leakbench.models", Model)
register = registry.register
