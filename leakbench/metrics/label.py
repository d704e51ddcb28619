"""Whether the attack found the private label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.types import Reconstruction
from leakbench.metrics.base import Metric, Truth, register


def label_correct(guess: Tensor | None, truth: Tensor) -> Tensor:
    """Return 1.0 where the label is right and 0.0 where it is wrong; NaN everywhere where there is no guess.

    Args:
        guess: [T] int64, or None.
        truth: [T] int64.

    Returns:
        [T] float64: 0, 1 or NaN.

    Raises:
        ValueError: the shapes differ.
    """
    if guess is None:
        return torch.full(truth.shape, torch.nan, dtype=torch.float64, device=truth.device)
    if guess.shape != truth.shape:
        raise ValueError(f"labels of shape {list(guess.shape)} do not fit a truth of shape {list(truth.shape)}")
    return (guess == truth).double()


@register("label_correct")
@dataclass(frozen=True)
class LabelCorrect(Metric):
    """Whether the label that the attack inferred is the private one."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = "1 right, 0 wrong, none where the attack names no label; trivially 1 where it was given"
    reference: ClassVar[str] = "definition"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: the images alone say nothing of the label."""
        return label_correct(None, truth[:, 0, 0, 0])

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values 0, 1 or NaN; see ``label_correct``."""
        return label_correct(guess.labels, truth.labels)
