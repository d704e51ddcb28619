"""A convolution and its two gradients with the trials innermost, written for numba, for ``benchmarks.speed.choices``.

numba keeps a sum in a vector register only within an innermost loop over lanes, and only where the compiler knows
every size. So each map of each layer is a source of its own: in the loop over lanes stand, one by one, the products of
all taps of a channel for several outputs and pixels, whose sums are read and written once around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Map = Literal["forward", "input gradient", "weight gradient"]
MAPS: tuple[Map, ...] = ("forward", "input gradient", "weight gradient")

LANES = 16
"""Trials of a block: float32 numbers of a register of 64 bytes."""


@dataclass(frozen=True)
class Layer:
    """A convolution of square images by square kernels.

    Attributes:
        title: what it is.
        channels: of its input.
        outputs: channels of its output.
        kernel: side of the kernel.
        stride: of the windows.
        padding: zeros on each side.
        side: of its input.
    """

    title: str
    channels: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    side: int

    @property
    def rows(self) -> int:
        """The side of the output."""
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def products(self) -> int:
        """Multiplications of a trial in each of the maps, those with zeros of the padding among them."""
        return self.channels * self.outputs * (self.kernel * self.rows) ** 2


@dataclass(frozen=True)
class Tile:
    """What stands in one loop over lanes.

    Attributes:
        outputs: channels that are written; of a weight's gradient those of the output.
        pixels: neighbours of a row.
        rows: of the kernel, of a weight's gradient.
    """

    outputs: int
    pixels: int
    rows: int = 1


@dataclass(frozen=True)
class _Sums:
    """out[o][y][x] = sum over channels c and taps k of in[c][at[k] + y, x] w[o][c][tap[k]], as in ``kernels.cpp``.

    Places and strides are in vectors of ``LANES`` numbers.
    """

    channels: int
    outputs: int
    side: int
    in_channel: int
    in_row: int
    in_step: int
    at: tuple[int, ...]
    tap: tuple[int, ...]
    w_output: int
    w_channel: int
    to: int
    to_output: int
    to_row: int
    to_step: int


def padded_sizes(layer: Layer, which: Map) -> tuple[int, int, int, int]:
    """Return channels and side of what is padded, the zeros in front of each row, and the side with the zeros."""
    if which == "input gradient":
        return layer.outputs, layer.rows, layer.kernel, layer.rows + 2 * layer.kernel
    return layer.channels, layer.side, layer.padding, layer.side + 2 * layer.padding


def source(layer: Layer, which: Map, tile: Tile) -> str:
    """Return the source of ``run(a, b, out, padded, blocks)``, of flat float32 arrays.

    ``a`` and ``b`` are x and w (forward), d and w (input gradient), or x and d (weight gradient), d the gradient at the
    output: [blocks][C][H][W][LANES], and weights [blocks][O][C][k][k][LANES]. ``padded`` are zeros for one block, whose
    border stays as it is.
    """
    channels, side, before, whole = padded_sizes(layer, which)
    sizes = {
        "x": layer.channels * layer.side**2,
        "w": layer.outputs * layer.channels * layer.kernel**2,
        "d": layer.outputs * layer.rows**2,
    }
    first, second, last = {"forward": "xwd", "input gradient": "dwx", "weight gradient": "xdw"}[which]
    lines = [
        "import numpy as np",
        "",
        "def run(a, b, out, padded, blocks):",
        " for block in range(blocks):",
        *(
            f"  {own} = {name}[block * {sizes[kind] * LANES} : (block + 1) * {sizes[kind] * LANES}]"
            for own, name, kind in (("inner", "a", first), ("other", "b", second), ("result", "out", last))
        ),
        f"  for c in range({channels}):",
        f"   for y in range({side}):",
        f"    row = padded[((c * {whole} + y + {before}) * {whole} + {before}) * {LANES} :]",
        f"    own = inner[(c * {side} + y) * {side * LANES} :]",
        f"    for i in range({side * LANES}):",
        "     row[i] = own[i]",
    ]
    if which == "weight gradient":
        lines += _weight_lines(layer, whole, tile)
    for sums in _forward(layer, whole) if which == "forward" else _phases(layer, before, whole):
        lines += _sum_lines(sums, tile) if which != "weight gradient" else []
    return "\n".join(lines) + "\n"


def _forward(layer: Layer, whole: int) -> list[_Sums]:
    k = layer.kernel
    at = tuple(y * whole + x for y in range(k) for x in range(k))
    steps = (whole**2, layer.stride * whole, layer.stride)
    weights = (layer.channels * k * k, k * k)
    out = (0, layer.rows**2, layer.rows, 1)
    return [_Sums(layer.channels, layer.outputs, layer.rows, *steps, at, tuple(range(k * k)), *weights, *out)]


def _phases(layer: Layer, before: int, whole: int) -> list[_Sums]:
    """Return the sums of the pixels of each phase of the stride, by the taps that reach them."""
    k, s, found = layer.kernel, layer.stride, []
    for top in range(s):
        for left in range(s):
            reach = [
                (top + layer.padding - y, left + layer.padding - x, y * k + x)
                for y in range(k)
                for x in range(k)
                if (top + layer.padding - y) % s == 0 and (left + layer.padding - x) % s == 0
            ]
            at = tuple((before + y // s) * whole + before + x // s for y, x, _ in reach)
            tap = tuple(tap for _, _, tap in reach)
            weights = (k * k, layer.channels * k * k)
            out = (top * layer.side + left, layer.side**2, s * layer.side, s)
            size = (layer.outputs, layer.channels, layer.side // s)
            found.append(_Sums(*size, whole**2, whole, 1, at, tap, *weights, *out))
    return found


def _groups(count: int, size: int) -> list[tuple[int, int, int]]:
    """Return first, end and size of the tiles of ``size`` of ``count``, and of a smaller one for the rest."""
    whole = count // size * size
    return [group for group in ((0, whole, size), (whole, count, count - whole)) if group[0] < group[1]]


def _sum_lines(sums: _Sums, tile: Tile) -> list[str]:
    lines = []
    for begin, end, outputs in _groups(sums.outputs, tile.outputs):
        for left, right, pixels in _groups(sums.side, tile.pixels):
            where = f"o * {sums.to_output} + y * {sums.to_row} + x * {sums.to_step}"
            lines += [
                f"  for o in range({begin}, {end}, {outputs}):",
                f"   for y in range({sums.side}):",
                f"    for x in range({left}, {right}, {pixels}):",
                f"     to = result[({sums.to} + {where}) * {LANES} :]",
                f"     for c in range({sums.channels}):",
                f"      pixel = padded[(c * {sums.in_channel} + y * {sums.in_row} + x * {sums.in_step}) * {LANES} :]",
                f"      weight = other[(o * {sums.w_output} + c * {sums.w_channel}) * {LANES} :]",
                f"      for i in range({LANES}):",
            ]
            places = {
                (o, p): (o * sums.to_output + p * sums.to_step) * LANES for o in range(outputs) for p in range(pixels)
            }
            lines += [
                f"       s{o}_{p} = to[{place} + i] if c > 0 else np.float32(0)" for (o, p), place in places.items()
            ]
            for at, tap in zip(sums.at, sums.tap):
                lines += [f"       w{o} = weight[{(o * sums.w_output + tap) * LANES} + i]" for o in range(outputs)]
                for p in range(pixels):
                    lines.append(f"       v = pixel[{(at + p * sums.in_step) * LANES} + i]")
                    lines += [f"       s{o}_{p} += w{o} * v" for o in range(outputs)]
            lines += [f"       to[{place} + i] = s{o}_{p}" for (o, p), place in places.items()]
    return lines


def _weight_lines(layer: Layer, whole: int, tile: Tile) -> list[str]:
    lines, k, rows = [], layer.kernel, layer.rows
    for begin, end, outputs in _groups(layer.outputs, tile.outputs):
        for top, bottom, height in _groups(k, tile.rows):
            taps = [(o, y, x) for o in range(outputs) for y in range(height) for x in range(k)]
            places = {(o, y, x): (o * layer.channels * k * k + y * k + x) * LANES for o, y, x in taps}
            lines += [
                f"  for o in range({begin}, {end}, {outputs}):",
                f"   for c in range({layer.channels}):",
                f"    for t in range({top}, {bottom}, {height}):",
                f"     to = result[((o * {layer.channels} + c) * {k * k} + t * {k}) * {LANES} :]",
                f"     for y in range({rows}):",
                f"      for x in range(0, {rows}, {tile.pixels}):",
                f"       at = (c * {whole} + y * {layer.stride} + t) * {whole} + x * {layer.stride}",
                f"       pixel = padded[at * {LANES} :]",
                f"       error = other[((o * {rows} + y) * {rows} + x) * {LANES} :]",
                f"       for i in range({LANES}):",
            ]
            lines += [
                f"        s{o}_{y}_{x} = to[{place} + i] if y + x > 0 else np.float32(0)"
                for (o, y, x), place in places.items()
            ]
            for p in range(tile.pixels):
                lines += [f"        d{o} = error[{(o * rows * rows + p) * LANES} + i]" for o in range(outputs)]
                for y in range(height):
                    for x in range(k):
                        lines.append(f"        v = pixel[{(y * whole + x + p * layer.stride) * LANES} + i]")
                        lines += [f"        s{o}_{y}_{x} += d{o} * v" for o in range(outputs)]
            lines += [f"        to[{place} + i] = s{o}_{y}_{x}" for (o, y, x), place in places.items()]
    return lines
