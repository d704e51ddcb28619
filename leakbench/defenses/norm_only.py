"""The placebo beside key-lock: its normalisation without its secret."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from leakbench.defenses.base import Defense, register
from leakbench.models.surgery import replace_first_norm


@register("norm-only")
@dataclass(frozen=True)
class NormOnly(Defense):
    """The key-lock's control arm: its normalisation alone, scale 1 and shift 0, with no secret."""

    reference: ClassVar[str] = (
        "control for arXiv 2305.04095: separates what the normalisation does from what the lock does"
    )

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a copy whose first normalisation has no affine part, inserted where the network has none."""
        return replace_first_norm(model, lambda channels: nn.BatchNorm2d(channels, affine=False))
