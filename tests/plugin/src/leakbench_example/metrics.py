"""A metric."""

from __future__ import annotations

from torch import Tensor

from leakbench import Metric, metrics


@metrics.register("worst_pixel")
class WorstPixel(Metric):
    """The largest absolute error of a pixel."""

    convention = "pixels in [0, 1], reconstruction clamped; 0 is exact, 1 the worst"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [0, 1]."""
        return (images.clamp(0, 1) - truth).abs().flatten(1).amax(1)
