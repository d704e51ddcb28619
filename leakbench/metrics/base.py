"""The contract of a metric: a pure function of reconstruction and truth, with its convention stated."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
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
        encoded: the images [B, C, H, W] that the network of each of the T clients ran on in place of the private one,
            None for one that ran on its private image or on nothing of it; None if that is not known.
        public: returns public images [P, C, H, W] in [0, 1] of the same kind (``Dataset.public``); None if there are
            none.
        floors: the images [T, C, H, W] of each floor, if a client trained on other images than its private one.
        cosines: [T], of what each client sent and what it would have sent without a defense; None if that is not known.
    """

    images: Tensor
    labels: Tensor
    encoded: Sequence[Tensor | None] | None = None
    public: Callable[[], Tensor] | None = None
    floors: Sequence[Tensor] = ()
    cosines: Tensor | None = None


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


def check_pair(metric: Metric, images: Tensor, truth: Tensor) -> None:
    """Raise ValueError unless a metric can compare the images.

    Args:
        metric: which; it states the smallest image.
        images: [T, C, H, W] reconstructions of any finite range, float32 or float64.
        truth: [T, C, H, W] in [0, 1], float32 or float64.
    """
    if images.dim() != 4 or images.shape != truth.shape:
        raise ValueError(
            f"reconstructions of shape {list(images.shape)} do not match a truth of shape {list(truth.shape)}; "
            "give two tensors [T, C, H, W]"
        )
    for name, values in (("reconstruction", images), ("truth", truth)):
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the {name} has dtype {values.dtype}; give torch.float32 or torch.float64")
        if values.numel() and not bool(torch.isfinite(torch.stack(values.aminmax())).all()):
            row = int((~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[0, 0])
            raise ValueError(f"the {name} of row {row} is not finite; replace failed rows before they are scored")
    if truth.numel():
        low, high = (float(value) for value in truth.aminmax())
        if low < 0 or high > 1:
            raise ValueError(f"the truth ranges from {low:g} to {high:g}; give it in [0, 1]")
    height, width = images.shape[-2:]
    if min(height, width) < metric.smallest:
        raise ValueError(
            f"{metric.name} needs images of at least {metric.smallest} x {metric.smallest} pixels; {height} x {width} "
            "is too small"
        )


def rgb(images: Tensor) -> Tensor:
    """Return [T, 3, H, W]: grey images [T, 1, H, W] replicated, RGB as it is; raise ValueError for other channels."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images of {images.shape[1]} channels are neither grey nor RGB; give 1 or 3 channels")
    return images.expand(-1, 3, -1, -1)


def by_rows(metric: Callable[[Tensor, Tensor], Tensor], images: Tensor, truth: Tensor, pixels: int) -> Tensor:
    """Return the metric's values [T, ...], computed on as many rows at once as hold about this many pixels."""
    rows = max(1, pixels // (images.shape[-2] * images.shape[-1]))
    return torch.cat([metric(x, y) for x, y in zip(images.split(rows), truth.split(rows))])


registry: Registry[Metric] = Registry("metric", "leakbench.metrics", Metric)
register = registry.register
