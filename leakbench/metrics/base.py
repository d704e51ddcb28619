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
        labels: [T] int64; -1 where a label is not known.
        encoded: [T, C, H, W], the images that the clients trained on if their defense changes them; else None.
    """

    images: Tensor
    labels: Tensor
    encoded: Tensor | None = None


class Metric(Component):
    """A per-image measure of leakage.

    Attributes:
        higher_is_better: True if a higher value means a better reconstruction (more leakage).
        convention: units, range and conventions, shown beside every column.
        default: whether every run has the metric; otherwise only a run that names it (``--metric NAME``).
        smallest: pixels; the metric is not defined for images whose shorter side is below this.
    """

    higher_is_better: ClassVar[bool] = False
    convention: ClassVar[str] = ""
    default: ClassVar[bool] = True
    smallest: ClassVar[int] = 1

    @abstractmethod
    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return the values of a batch of reconstructions.

        Args:
            images: [T, C, H, W] float32 or float64, of any finite range.
            truth: [T, C, H, W] float32 or float64, in [0, 1].

        Returns:
            [T] float64, in the units and the range of ``convention``.

        Raises:
            ValueError: shapes differ, a value is not finite, the truth leaves [0, 1], the images are narrower than
                ``smallest``, or the metric is not defined for their number of channels.
            MissingAsset: the metric needs pretrained weights that are not in the cache.
        """

    def score(self, guess: Reconstruction, truth: Truth) -> Tensor:
        """Return [T] values, NaN if there is none; a metric that only compares images need not override it."""
        return self(guess.images, truth.images)

    def check(self) -> None:
        """Raise MissingAsset if the metric cannot be computed on this machine."""

    def note(self, image_shape: tuple[int, int, int]) -> str:
        """Return what a reader must know of the column for images of this shape (C, H, W), or an empty string."""
        _, height, width = image_shape
        if min(height, width) >= self.smallest:
            return ""
        return f"not defined for {height} x {width} images: {self.smallest} x {self.smallest} pixels are needed"


registry: Registry[Metric] = Registry("metric", "leakbench.metrics", Metric)
register = registry.register
