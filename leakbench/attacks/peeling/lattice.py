"""The geometry of a convolution in any number of dimensions: which input position each tap of its kernel reads.

Positions are numbered in row-major order, inputs by ``P_in`` and outputs by ``P_out``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from leakbench.errors import Unsupported

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Lattice:
    """The parameters of a convolution apart from its channels; a number for each dimension.

    Attributes:
        image: the size of the input.
        kernel: the size of the kernel.
        padding: the zeros (before, after) the input.
        stride: the step between outputs.
        dilation: the step between taps.
        groups: into how many groups the channels are divided.
    """

    image: tuple[int, ...]
    kernel: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module, image: Sequence[int]) -> Lattice:
        """Return the geometry of a torch convolution (1, 2 or 3 dimensions) on inputs of a size.

        Raises:
            Unsupported: the layer is no convolution, is transposed, pads with something else than zeros, or the input
                has another number of dimensions or is smaller than the kernel.
        """
        name = type(layer).__name__
        if not isinstance(layer, CONVOLUTIONS):
            kind = "a transposed convolution" if "Transpose" in name else f"a {name}"
            raise Unsupported(f"{kind} has no shifts of its input to factorise; use a Conv1d, Conv2d or Conv3d")
        if layer.padding_mode != "zeros":
            reason = "whose shifts commute" if layer.padding_mode == "circular" else "which repeats values of the input"
            raise Unsupported(f"{name} has {layer.padding_mode} padding, {reason}; only zero padding is supported")
        if len(image) != len(layer.kernel_size):
            raise Unsupported(f"{name} takes {len(layer.kernel_size)} dimensions, and the input has {len(image)}")
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        if layer.padding == "same":
            padding = tuple((each // 2, each - each // 2) for each in reach)
        elif layer.padding == "valid":
            padding = tuple((0, 0) for _ in reach)
        else:
            padding = tuple((int(each), int(each)) for each in layer.padding)
        sizes = tuple(map(int, image))
        if any(size + sum(pad) <= far for size, pad, far in zip(sizes, padding, reach)):
            raise Unsupported(f"{name}: an input of {_times(sizes)} is smaller than the kernel's reach")
        stride, dilation = tuple(layer.stride), tuple(layer.dilation)
        return cls(sizes, tuple(layer.kernel_size), padding, stride, dilation, layer.groups)

    @property
    def output(self) -> tuple[int, ...]:
        """The size of the output."""
        parts = zip(self.image, self.kernel, self.padding, self.stride, self.dilation)
        return tuple((n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, k, pad, s, d in parts)

    @property
    def inputs(self) -> int:
        """P_in, the number of input positions."""
        return prod(self.image)

    @property
    def outputs(self) -> int:
        """P_out, the number of output positions."""
        return prod(self.output)

    @property
    def phases(self) -> int:
        """The number of sub-lattices of ``undilated``; 1 if there is only one, or they differ."""
        return 1 if self._sublattice() is None else prod(self._steps())

    def undilated(self) -> Lattice:
        """Return the convolution that a dilated one is on each of its sub-lattices, without dilation.

        A convolution of stride 1 and dilation d connects only positions that are equal modulo d, and one with a single
        tap in a dimension only equal positions there. It is thus the same as a convolution without dilation of
        ``phases`` times as many images: the input's sub-lattices. They are alike if size and padding are multiples of
        d; otherwise, and for a 1x1 kernel, the geometry itself is returned.
        """
        return self._sublattice() or self

    def _steps(self) -> tuple[int, ...]:
        return tuple(n if k == 1 else d for n, k, d in zip(self.image, self.kernel, self.dilation))

    def _sublattice(self) -> Lattice | None:
        steps = self._steps()
        alike = all(
            n % d == before % d == after % d == 0 for n, (before, after), d in zip(self.image, self.padding, steps)
        )
        if not alike or set(self.stride) != {1} or set(self.kernel) == {1} or set(steps) == {1}:
            return None
        image = tuple(n // d for n, d in zip(self.image, steps))
        padding = tuple((before // d, after // d) for (before, after), d in zip(self.padding, steps))
        return replace(self, image=image, padding=padding, dilation=(1,) * len(steps))

    def taps(self) -> Tensor:
        """Return [K, P_out], the input position that each of the kernel's K taps reads; P_in outside the input."""
        place, inside = np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=bool)
        parts = zip(self.image, self.kernel, self.padding, self.stride, self.dilation, self.output)
        for n, k, (before, _), s, d, m in parts:
            own = np.arange(k)[:, None] * d + np.arange(m) * s - before
            shape = (len(place) * k, place.shape[1] * m)
            place = (place[:, None, :, None] * n + own[None, :, None, :]).reshape(shape)
            valid = ((own >= 0) & (own < n))[None, :, None, :]
            inside = (inside[:, None, :, None] & valid).reshape(shape)
        return torch.from_numpy(np.where(inside, place, self.inputs))

    def readers(self) -> Tensor:
        """Return [K, P_in], the output position at which each tap reads an input position; P_out if there is none."""
        taps = self.taps()
        found = torch.full((len(taps), self.inputs + 1), self.outputs)
        found.scatter_(1, taps, torch.arange(self.outputs).expand_as(taps))
        return found[:, :-1]

    def ambiguity(self) -> int:
        """Return the dimension of the linear maps of the input that the weight gradient cannot tell from identity.

        With S_k the 0/1 matrix of tap k, they are the pairs (Z, R) with S_k Z = R S_k for all k. Each equation says
        that two entries of Z and R are equal, or that one is zero, so the dimension is a number of connected
        components. It is 1 (only multiples of the identity) if and only if the weight gradient of one image determines
        input and error, up to a factor, whenever both have full rank.
        """
        return _ambiguity(replace(self, groups=1))

    def __str__(self) -> str:
        parts = [f"a {_times(self.kernel)} kernel on {_times(self.image)}"]
        parts += [f"stride {_times(self.stride)}"] if set(self.stride) != {1} else []
        parts += [f"dilation {_times(self.dilation)}"] if set(self.dilation) != {1} else []
        return ", ".join(parts)


@cache
def _ambiguity(lattice: Lattice) -> int:
    taps, readers = lattice.taps().numpy(), lattice.readers().numpy()
    inputs, outputs = lattice.inputs, lattice.outputs
    # entries of Z, then of R, then one node for zero; a place outside stands for a row or column of zeros
    zero = inputs**2 + outputs**2
    pairs = []
    for tap, reader in zip(taps, readers):
        left = tap[:, None] * inputs + np.arange(inputs)
        right = inputs**2 + np.arange(outputs)[:, None] * outputs + reader
        left, right = np.broadcast_arrays(
            np.where(tap[:, None] < inputs, left, zero), np.where(reader[None] < outputs, right, zero)
        )
        differ = left != right
        pairs.append(np.stack([left[differ], right[differ]]))
    first, second = np.concatenate(pairs, 1)
    ones = np.ones(len(first), dtype=np.int8)
    graph = coo_array((ones, (first, second)), shape=(zero + 1, zero + 1))
    _, labels = connected_components(graph, directed=False)
    # the error at an output that reads only padding is in no equation, and does not count
    read = np.asarray((taps < inputs).any(0))
    counted = np.concatenate([np.ones(inputs**2, dtype=bool), np.outer(read, read).ravel(), [True]])
    return len(np.unique(labels[counted])) - 1


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
