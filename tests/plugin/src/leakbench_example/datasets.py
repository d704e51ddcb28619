"""A dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from leakbench import Dataset, datasets


@datasets.register("dots")
class Dots(Dataset):
    """Grey squares in one of four corners, the class; index // 4 is the place inside the corner."""

    size: Annotated[int, Field(ge=8, multiple_of=2)] = 12
    num_classes = 4

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """One channel of size x size pixels."""
        return (1, self.size, self.size)

    def __len__(self) -> int:
        """As many images as places in a corner, for each corner."""
        return 4 * (self.size // 2 - 2)

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return images [N, 1, size, size] of 0.25 and 0.75, and labels [N]."""
        images = torch.full((len(indices), *self.image_shape), 0.25)
        for image, index in zip(images, indices):
            top, left = index // 2 % 2 * self.size // 2, index % 2 * self.size // 2
            place = index // 4
            image[:, top + place : top + place + 3, left + place : left + place + 3] = 0.75
        return images, torch.tensor([index % 4 for index in indices])

    def mean(self) -> Tensor:
        """Return the background."""
        return torch.full(self.image_shape, 0.25)
