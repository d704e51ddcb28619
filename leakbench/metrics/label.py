"""Whether the attack found the private label."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.types import Reconstruction
from leakbench.metrics.base import Metric, Truth, register


@register("label_correct")
@dataclass(frozen=True)
class LabelCorrect(Metric):
    """Whether the label that the attack inferred is the private one."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = "1 right, 0 wrong, none if the attack names no label; always 1 if it was given"
    reference: ClassVar[str] = "definition"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: images do not state their labels."""
        return torch.full((len(truth),), torch.nan, dtype=torch.float64, device=truth.device)

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] float64: 1 for the right label, 0 for a wrong one, NaN if either is not known.

        Raises:
            ValueError: the labels are not [T], one for each image.
        """
        if guess.labels is None:
            return self(guess.images, truth.images)
        if guess.labels.shape != truth.labels.shape:
            raise ValueError(
                f"labels of shape {list(guess.labels.shape)} do not match a truth of shape {list(truth.labels.shape)}"
            )
        return (guess.labels == truth.labels).double().masked_fill(truth.labels < 0, torch.nan)
