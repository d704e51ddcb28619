"""The contract of a dataset: float images in [0, 1] at fixed indices."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from leakbench.core.component import Component
from leakbench.core.registry import Registry


class Dataset(Component):
    """Images that a client might hold, each at a fixed index, with class labels."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """How many classes the labels come from."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images can be attacked; indices run from 0 to len - 1."""

    @abstractmethod
    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, C, H, W] float32 in [0, 1] and labels [N] int64 at these indices.

        Raises:
            MissingAsset: the data is not in the cache; the message names the command that fetches it.
            CorruptAsset: the data does not have its checksum or its form.
        """

    @abstractmethod
    def mean(self) -> Tensor:
        """Return [C, H, W] in [0, 1], the mean of public images, which are never attacked."""

    def group(self, index: int) -> int:
        """Return the group of an image: images of one group are alike, such as crops of one photograph.

        Intervals and tests take groups, not images, as independent. By default every image is its own group. It needs
        no data of the cache, since reports ask for it too.
        """
        return index

    def public(self) -> Tensor:
        """Return public images [P, C, H, W] in [0, 1] that an attacker may have memorised; by default ``samples``."""
        from leakbench.datasets.samples import crops  # its class derives from this one

        return crops(self.image_shape)

    def unattacked(self) -> Tensor:
        """Return public images [P, C, H, W] in [0, 1], as alike to the others as there are, none of which is attacked.

        By default they are the 32 crops of photographs that no dataset has.
        """
        from leakbench.datasets.samples import public_crops  # its class derives from this one

        return public_crops(self.image_shape)

    def note(self) -> str:
        """Return a warning about scores over these images, in one line, or an empty string."""
        return ""


registry: Registry[Dataset] = Registry("dataset", "leakbench.datasets", Dataset)
register = registry.register
