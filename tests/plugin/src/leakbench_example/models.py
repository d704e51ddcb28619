"""A model."""

from __future__ import annotations

from math import prod

from torch import nn

from leakbench import Model, models


@models.register("softmax")
class Softmax(Model):
    """Softmax regression: one linear layer from pixels to logits."""

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network in training mode."""
        return nn.Sequential(nn.Flatten(), nn.Linear(prod(image_shape), num_classes))
