"""The contract of a model, a factory of networks that map images in [0, 1] to logits; and the package's networks."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from leakbench.core.component import Component
from leakbench.core.registry import Registry
from leakbench.errors import BadOption, Unsupported
from leakbench.models.weights import Checkpoint, Init, fingerprint, initialise, load, stated

Mode = Literal["train", "eval"]


def with_mode(spec: str, settings: Mapping[str, Any]) -> str:
    """Return the spec of a stored model with its mode, as ``models.spec`` returns it; older runs have it without.

    Args:
        spec: the stored spec.
        settings: the stored settings; those of a model without modes have none.
    """
    mode = settings.get("mode")
    if mode is None or f"mode={mode}" in spec:
        return spec
    return f"{spec[:-1]}, mode={mode})" if spec.endswith(")") else f"{spec}(mode={mode})"


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


class Architecture(Model):
    """A network of the package; its options are no fields, so that each states them in the order of its own specs.

    Its weights are drawn from a named distribution or loaded, and it has a mode.

    Attributes:
        init: the distribution of every weight.
        mode: that in which the network is attacked.
        fresh: every trial draws its own weights instead of sharing its seed's.
        weights: the path of a checkpoint to attack instead of random weights.
    """

    init: Init
    mode: Mode = "train"
    fresh: bool
    weights: str | None

    def __post_init__(self) -> None:
        if self.fresh and self.weights is not None:
            raise BadOption(
                f"fresh=true draws weights for every trial, and weights={self.weights!r} are the same for all; keep one"
            )

    @abstractmethod
    def network(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network with its ``default`` initialisation.

        Raises:
            Unsupported: the architecture does not admit this shape.
        """

    def require(self, image_shape: tuple[int, int, int], side: int) -> None:
        """Raise Unsupported if the images (C, H, W) have fewer than ``side`` pixels in one direction."""
        _, height, width = image_shape
        if min(height, width) < side:
            raise Unsupported(f"{self.name} needs images of at least {side}x{side}, not {height}x{width}; set size=32")

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return the network with its weights, in its mode; see ``network``."""
        network = self.network(image_shape, num_classes)
        initialise(network, self.init)
        checkpoint = self.checkpoint()
        if checkpoint is not None and not checkpoint.defense:
            load(network, checkpoint.file)  # that of a network behind a defense is loaded once that is in place
        return network.train(self.mode == "train")

    def fresh_weights(self) -> bool:
        """Return ``fresh``."""
        return self.fresh

    def checkpoint(self) -> Checkpoint | None:
        """Return what the file of ``weights`` states of its training; None if weights are drawn."""
        return None if self.weights is None else stated(self.weights)

    def settings(self) -> dict[str, Any]:
        """Return the options, with the checkpoint's content in place of its path."""
        content = None if self.weights is None else fingerprint(self.weights)
        return {**super().settings(), "weights": content}


registry: Registry[Model] = Registry("model", "leakbench.models", Model)
register = registry.register
