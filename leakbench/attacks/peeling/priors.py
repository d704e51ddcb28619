"""What is assumed of a convolution's input beforehand: normal distributions, as products and as matrices.

An input of n values is taken to be normal with a mean m and a precision matrix P (the inverse of its covariance).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

PIXEL_DEVIATION = 1.0
"""The standard deviation of a pixel about the public mean, which keeps undetermined pixels near it."""


class Prior(Protocol):
    """A normal distribution of n values."""

    @property
    def mean(self) -> Tensor:
        """m, [n], float64."""
        ...

    def times(self, values: Tensor) -> Tensor:
        """Return P a for each row a of [T, n], in their type."""
        ...

    def diagonal(self) -> Tensor:
        """Return the diagonal of P, [n]."""
        ...

    def matrix(self) -> Tensor:
        """Return P, [n, n]."""
        ...


@dataclass(frozen=True)
class Independent:
    """Independent values of mean 0 and variance 1; ``mean`` is zeros [n]."""

    mean: Tensor

    def times(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def diagonal(self) -> Tensor:
        """Return ones [n]."""
        return torch.ones_like(self.mean)

    def matrix(self) -> Tensor:
        """Return the identity [n, n]."""
        return torch.eye(len(self.mean)).to(self.mean)


@dataclass(frozen=True)
class Smooth:
    """An image whose neighbouring pixels are alike, and whose colours change together.

    P is a Kronecker product, of a matrix over the colours and the Laplacian of the pixel grid, plus
    1 / PIXEL_DEVIATION^2.

    Attributes:
        image: the mean [C, H, W], float64.
        roughness: the standard deviation by which neighbouring pixels differ.
        colour: how much less the differences between colours change than their mean.
    """

    image: Tensor
    roughness: float
    colour: float

    @property
    def mean(self) -> Tensor:
        """The mean, [n]."""
        return self.image.flatten()

    def _colours(self) -> Tensor:
        """Return the matrix over the colours [C, C]: their mean and their differences apart."""
        channels = len(self.image)
        eye = torch.eye(channels).to(self.image)
        common = torch.full_like(eye, 1 / channels)
        return common / (channels * self.roughness**2) + (eye - common) / (self.colour * self.roughness) ** 2

    def times(self, values: Tensor) -> Tensor:
        """Return P a, by differences between neighbours: without a matrix."""
        a = values.unflatten(1, self.image.shape)
        out = torch.zeros_like(a)
        across, down = a.diff(dim=3), a.diff(dim=2)
        out[..., 1:] += across
        out[..., :-1] -= across
        out[..., 1:, :] += down
        out[..., :-1, :] -= down
        out = torch.einsum("cd,tdhw->tchw", self._colours().to(values), out)
        return out.flatten(1) + values / PIXEL_DEVIATION**2

    def diagonal(self) -> Tensor:
        """Return each pixel's number of neighbours times its colour's entry, plus 1 / PIXEL_DEVIATION^2."""
        neighbours = torch.zeros_like(self.image[0])
        neighbours[1:] += 1
        neighbours[:-1] += 1
        neighbours[:, 1:] += 1
        neighbours[:, :-1] += 1
        return (self._colours().diagonal()[:, None, None] * neighbours).flatten() + 1 / PIXEL_DEVIATION**2

    def matrix(self) -> Tensor:
        """Return P, [n, n]."""
        _, height, width = self.image.shape
        eye = torch.eye(max(height, width)).to(self.image)
        across, down = (eye[:size, :size].diff(dim=0) for size in (width, height))
        change = torch.kron(eye[:height, :height], across.T @ across) + torch.kron(down.T @ down, eye[:width, :width])
        matrix = torch.kron(self._colours(), change)
        matrix.diagonal().add_(1 / PIXEL_DEVIATION**2)
        return matrix
