"""The parameters of a convolution."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """The parameters of a 2-d convolution apart from its operands; pairs are (vertical, horizontal)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    image: tuple[int, int]
    kernel: tuple[int, int]
