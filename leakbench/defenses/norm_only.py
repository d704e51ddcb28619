"""The placebo for key-lock: its normalisation without its secret."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from leakbench.core.text import FEDKL
from leakbench.defenses.base import Defense, register
from leakbench.models.surgery import Layers, plain_norm, replace_norms


@register("norm-only")
@dataclass(frozen=True)
class NormOnly(Defense):
    """The control for keylock: its normalisation with scale 1 and shift 0, without a secret.

    Attributes:
        layers: as for key-lock: the ``first`` convolution's block, or ``all`` of them.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = f"a control for {FEDKL}: the effect of the normalisation without that of the lock"
    assumes: ClassVar[str] = "Nothing: it is the placebo for key-lock."
    cost: ClassVar[str] = "That of a normalisation without scale and shift."
    fails: ClassVar[str] = "It hides only the contrast of an image."
    layers: Layers = "first"

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a copy whose normalisation has no affine part, inserted where the network has none."""
        return replace_norms(model, plain_norm, self.layers)
