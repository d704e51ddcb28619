"""Batch normalisation by the statistics of the images themselves, when its input is not known yet.

y = gamma z + beta with z = (u - mean) / s in each channel gives the error e at y back as gamma / s (e - mean(e) -
z mean(e z)). Both means follow from the gradients by beta and gamma, and e from above: only z and s are unknown.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standard:
    """What is known of one normalisation.

    Attributes:
        z: [B, O, h, w], its output before scale and shift; of mean 0 in each channel.
        spread: [O], the standard deviation by which it divides, eps included.
        scale: [O], gamma.
        products: [O], the gradient by gamma: the sum of the error times z.
    """

    z: Tensor
    spread: Tensor
    scale: Tensor
    products: Tensor

    @property
    def gain(self) -> Tensor:
        """[1, O, 1, 1], the factor of the error at its output in that at its input."""
        return (self.scale / self.spread).view(1, -1, 1, 1)

    def offset(self, sums: Tensor) -> Tensor:
        """Return [B, O, h, w], what is added to the error at its input; ``sums`` [O] are those at its output."""
        return -self.gain * (sums[:, None, None] + self.products[:, None, None] * self.z) / self.z[:, 0].numel()

    def backward(self, error: Tensor) -> Tensor:
        """Return the error [B, O, h, w] at the input for that at the output."""
        return self.gain * error + self.offset(error.sum((0, 2, 3)))


def standardised(values: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return z [B, O, h, w] and the standard deviations [O] of the channels of [B, O, h, w]."""
    spread = (values.var((0, 2, 3), unbiased=False) + eps).sqrt()
    return (values - values.mean((0, 2, 3), keepdim=True)) / spread[:, None, None], spread


def relative_spreads(errors: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return the spreads [O] of each of several normalisations of the same input's convolutions, up to one factor.

    A row of a weight gradient times its channel's spread is a combination of the columns that the errors before the
    division by spreads give, the same for all rows. So the spreads are the null vector of a positive matrix.

    Args:
        errors: [O, K, J], the equations of a convolution (``correlation.design``), with all spreads 1.
        gradients: [O, K, C], the gradient by its weight.
    """
    sizes = [own.flatten(1).norm(dim=1).clamp(min=1e-300) for own in gradients]
    columns = torch.linalg.qr(torch.cat([own.flatten(0, 1) for own in errors]))[0]
    parts, begin = [], 0
    for error, gradient, size in zip(errors, gradients, sizes):
        end = begin + error[:, :, 0].numel()
        own = columns[begin:end].view(*error.shape[:2], -1)
        parts.append(torch.einsum("okc,okj->ocj", gradient / size[:, None, None], own).flatten(1))
        begin = end
    seen = torch.cat(parts)
    matrix = torch.eye(len(seen)).to(seen) - seen @ seen.T
    vector = torch.linalg.eigh(matrix)[1][:, 0]
    vector = vector * vector.sum().sign()
    spreads = vector.clamp(min=1e-3 * float(vector.abs().mean())).split([len(own) for own in errors])
    return [spread / size for spread, size in zip(spreads, sizes)]
