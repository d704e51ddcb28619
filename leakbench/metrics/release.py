"""How much of its gradient a client sends: a release that has nothing of it protects, and trains nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.core.types import Reconstruction
from leakbench.metrics.base import Metric, Truth, register


@register("release_cosine")
@dataclass(frozen=True)
class ReleaseCosine(Metric):
    """Cosine of what the client sent and what it would have sent without its defense."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = (
        "-1 to 1, over all entries, 0 if only zeros were sent; it measures no leakage: around 0, a server that uses "
        "what is sent as a gradient trains nothing"
    )
    reference: ClassVar[str] = "definition"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] NaN: images do not tell what was sent."""
        return torch.full((len(images),), torch.nan, dtype=torch.float64)

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values, NaN if it is not known what the client would have sent."""
        return self(guess.images, truth.images) if truth.cosines is None else truth.cosines
