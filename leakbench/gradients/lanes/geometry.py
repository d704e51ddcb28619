"""The parameters of a convolution, and how many windows it has."""

from typing import NamedTuple

Pair = tuple[int, int]


def windows(image: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """Return how many windows of a kernel an image has, by height and width."""
    sizes = zip(image, kernel, stride, padding, dilation)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    return height, width


class Geometry(NamedTuple):
    """The parameters of a 2-d convolution apart from its operands; pairs are (vertical, horizontal)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    image: Pair
    kernel: Pair

    @property
    def outputs(self) -> Pair:
        """The height and width of the output."""
        return windows(self.image, self.kernel, self.stride, self.padding, self.dilation)
