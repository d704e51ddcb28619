"""Which convolutions expose their input, predicted from sizes alone, before there is any gradient."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.pointwise import MAX_POSITIONS
from leakbench.attacks.peeling.shifts import MAX_UNKNOWNS

SPARE = 1.3
"""How many times as many channels as positions a ReLU's output needs for a full rank; with fewer it is measured to
have some per cent less, if no normalisation by the batch's own statistics keeps all channels in use."""

Verdict = Literal["exposed", "possible", "partly", "hidden"]


@dataclass(frozen=True)
class Exposure:
    """Whether a convolution's weight gradient is expected to determine its input, without any other information.

    Attributes:
        verdict: ``exposed``; ``possible``, if the rank of the input decides; ``partly``, if only the row space or
            sub-lattices in unknown order are; ``hidden``.
        reason: a phrase.
    """

    verdict: Verdict
    reason: str


def predict_exposure(
    lattice: Lattice, channels: int, outputs: int, images: int = 1, *, sparse: bool = True, own_statistics: bool = False
) -> Exposure:
    """Return the prediction for one convolution.

    Args:
        lattice: its geometry.
        channels: C, all groups together.
        outputs: O, all groups together.
        images: B.
        sparse: the input is a ReLU's output, which has zeros; several images cannot be separated without.
        own_statistics: the input is normalised by the batch's own statistics (batch normalisation in train mode), so
            that no channel is zero everywhere.
    """
    taps = prod(lattice.kernel)
    channels, outputs = channels // lattice.groups, outputs // lattice.groups
    positions = images * lattice.inputs
    counted = f"{images} x {lattice.inputs} positions" if images > 1 else f"{positions} positions"
    of = " of a group" if lattice.groups > 1 else ""
    if taps == 1:
        return _pointwise(lattice, channels, outputs, images, sparse)
    if channels < positions:
        few = f"1 channel{of} is" if channels == 1 else f"{channels} channels{of} are"
        return Exposure("hidden", f"{few} fewer than {counted}")
    if taps * outputs < positions:
        return Exposure("hidden", f"{taps} taps x {outputs} output channels{of} are fewer than {counted}")
    own = lattice.undilated()
    if own.inputs * positions > MAX_UNKNOWNS:
        return Exposure("hidden", f"{own.inputs * positions} unknowns are more than {MAX_UNKNOWNS} (time)")
    if own.ambiguity() > 1:
        return Exposure("hidden", f"{lattice}: its shifts do not determine the input")
    pieces = images * lattice.phases
    if pieces > 1 and not sparse:
        return Exposure("hidden", f"{pieces} images (or sub-lattices) are mixed, and the input has no zeros")
    if channels < SPARE * positions and sparse and not own_statistics:
        return Exposure("possible", f"{channels} channels{of} for {counted}: if the input's rank is full")
    if lattice.phases > 1:
        return Exposure("partly", f"{lattice.phases} sub-lattices of each image, in unknown order")
    return Exposure("exposed", f"{channels} channels{of} for {counted}")


def _pointwise(lattice: Lattice, channels: int, outputs: int, images: int, sparse: bool) -> Exposure:
    """Return the prediction for a 1x1 convolution, which sees each output position by itself."""
    positions = images * lattice.outputs
    if lattice.groups > 1:
        return Exposure("hidden", "a 1x1 kernel with groups")
    if positions > min(channels, outputs):
        return Exposure("hidden", f"{min(channels, outputs)} channels are fewer than {positions} positions")
    if positions == 1:
        return Exposure("exposed", "one position")
    if sparse and positions <= MAX_POSITIONS:
        return Exposure("partly", f"the {positions} positions, in unknown order, if they have enough zeros")
    return Exposure("partly", f"only the row space of {positions} positions")
