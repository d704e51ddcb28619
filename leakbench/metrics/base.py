"""The contract of a metric: a pure function of reconstruction and truth, with its convention stated."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from leakbench.core.component import Component
from leakbench.core.registry import Registry
from leakbench.core.types import Reconstruction


@dataclass(frozen=True)
class Truth:
    """What the metrics compare with.

    Attributes:
        images: [T, C, H, W] in [0, 1], the private images.
        labels: [T] int64.
        encoded: [T, C, H, W], the images that the clients trained on, where their defense changes these; else None.
    """

    images: Tensor
    labels: Tensor
    encoded: Tensor | None = None


class Metric(Component):
    """A per-image measure of leakage.

    Attributes:
        higher_is_better: True where a higher value means a better reconstruction (more leakage).
        convention: units, range and conventions, shown beside every column.
    """

    higher_is_better: ClassVar[bool] = False
    convention: ClassVar[str] = ""

    @abstractmethod
    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values for reconstructions [T, C, H, W] (any finite range) and truth [T, C, H, W] in [0, 1]."""

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values, NaN where there is none; metrics of the image alone need not override it."""
        return self(guess.images, truth.images)

    def check(self) -> None:
        """Raise MissingAsset where the metric cannot be computed on this machine."""

    def note(self, image_shape: tuple[int, int, int]) -> str:
        """Return what a reader must know of the column for images of this shape, or an empty string."""
        return ""


registry: Registry[Metric] = Registry("metric", "leakbench.metrics", Metric)
register = registry.register
