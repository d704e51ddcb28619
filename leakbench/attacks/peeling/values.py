"""A step's output from the weight gradients of the convolutions that take it, and where these are weak, from above."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from leakbench.attacks.peeling.correlation import Fitted, directions, joined, least_squares
from leakbench.attacks.peeling.factors import NotFactorised
from leakbench.attacks.peeling.gates import correct
from leakbench.attacks.peeling.knowledge import Knowledge, Reader
from leakbench.attacks.peeling.settle import COPIES, MAX_DEVIATION, settle
from leakbench.core.device import free_memory

MASK_ROUNDS = 3
"""How often the masks above a convolution are decided again from its weight gradient."""

MAX_PLACES = 4096
"""The most positions of a channel that are solved for."""

MAX_OPEN = 1024
"""The most values of a layer's input that are found from the values above it, because its own equations are weak."""

EQUATIONS = 6
"""How many equations from above are used for each of these values."""

FEW = 1.5
"""With fewer equations than this many times the unknowns, weak directions are looked for."""

WEAK = 1e-3
"""The part of the largest singular value below which a direction counts as weak."""


def solve(known: Knowledge, place: int, readers: Sequence[Reader], most: float = MAX_DEVIATION) -> None:
    """Recover a step's output from the equations of the convolutions that take it; correct the masks above.

    What is more uncertain than ``most``, relative to its size, is not taken: it would spoil these masks.
    """
    normal = [each for each in readers if each.normalisation is not None]
    names = " and ".join(each.layer.name for each in readers)
    if normal and len(normal) < len(readers):
        known.missing[place] = f"{names}: only some are normalised by the image's own statistics"
        return
    refused = refusal(known, place, readers)
    if refused is not None:
        known.missing[place] = f"{names}: {refused.reason}"
        return
    for _ in range(MASK_ROUNDS):
        if normal:
            refused = settle(known, place, readers)
        else:
            found = complete(known, place, readers)
            refused = found if isinstance(found, NotFactorised) else None
            if isinstance(found, Fitted) and not float(found.deviation.norm() / found.value.norm()) < most:
                refused = NotFactorised("its equations leave the input too uncertain")
                known.values.pop(place, None)
            elif isinstance(found, Fitted):
                known.values[place] = known.shaped(place, found)
        if refused is not None:
            known.missing[place] = f"{names}: {refused.reason}"
            return
        changed = [correct(known, place, each.layer, each.place) for each in readers]
        if not any(changed):
            return


def refusal(known: Knowledge, place: int, readers: Sequence[Reader]) -> NotFactorised | None:
    """Return why the equations of a step's output are not solved, by their numbers alone; None if they may be."""
    channels, equations, places = _counts(known, place, readers)
    if places > MAX_PLACES:
        return NotFactorised(f"{places} values in each channel of the input are more than {MAX_PLACES}")
    own_statistics = any(each.normalisation is not None for each in readers)
    most = 1 if own_statistics else MAX_OPEN // channels - 1
    if equations < places - most:
        return _undetermined(equations, places)
    needed, free = COPIES * 8 * equations * places, free_memory(torch.device("cpu"))
    if needed > free:
        sizes = f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return NotFactorised(f"{equations} equations of {places} values take {sizes}")
    return None


def _counts(known: Knowledge, place: int, readers: Sequence[Reader]) -> tuple[int, int, int]:
    """Return the channels of a step's output, the equations of each channel, and its values, of all images."""
    channels, *size = known.network.steps[place].shape
    return channels, sum(each.equations for each in readers), known.images * prod(size)


def _undetermined(equations: int, places: int) -> NotFactorised:
    return NotFactorised(f"{equations} equations do not determine the {places} values of a channel of the input")


def complete(known: Knowledge, place: int, readers: Sequence[Reader]) -> Fitted | NotFactorised:
    """Return a step's output [B * J, C] from the equations of its readers and, where these are weak, the values above.

    A convolution of stride 2 reads a quarter of the positions by its middle tap only, whose equations can be too
    few. What is above the step is known where a ReLU is open there, and is linear in the step's output.
    """
    channels, equations, places = _counts(known, place, readers)
    weak_equations = _undetermined(equations, places)
    matrix, right = known.equations(readers)
    found = least_squares(matrix, right)
    if found is not None and (len(matrix) > FEW * places or not bool(right.isfinite().all())):
        return found
    if not bool(right.isfinite().all()):
        return weak_equations
    parts = directions(matrix, right)
    strong = int((parts.size > WEAK * parts.size[0]).sum())
    strong = max(strong, places - MAX_OPEN // channels)
    if strong == places:
        return parts.solution(places)
    if not bool((parts.size[:strong] > 0).all()):
        return weak_equations
    weak = parts.basis[strong:]
    particular = Fitted(parts.basis.T @ parts.value, parts.solution(strong).deviation)
    upper = from_above(known, place, known.shaped(place, particular).value, weak)
    if upper is None:
        return found or weak_equations
    # the coordinates [n, C] in the weak directions, from what is above, and from their own equations
    jacobian, residual, weight = upper
    own = parts.size[strong:, None] / parts.noise.sqrt()
    rows = torch.cat([weight[:, None] * jacobian, torch.diag(own.flatten())])
    wanted = torch.cat([weight * residual, torch.zeros_like(own.flatten())])
    return joined(particular, weak, rows, wanted) or found or weak_equations


def from_above(known: Knowledge, place: int, value: Tensor, weak: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return how the open ReLUs above a step depend on its output [B, C, H, W] in directions [n, B * H * W].

    Returns:
        The derivatives [R, n * C] of the inputs of open ReLUs, how far these are from what the values say [R], and
        one over the standard deviation of that [R]. None if nothing above is known.
    """
    steps = known.network.steps
    shape = steps[place].shape
    gates = [at for at in sorted(reached(known, place)) if at in known.values and at in known.masks]
    jacobians, residuals, weights = [], [], []
    for gate in gates:
        (before,) = steps[gate].inputs
        base = follow(known, before, place, value)
        if base is None:
            continue
        (open_,) = known.masks[gate].flatten().nonzero(as_tuple=True)
        open_ = open_[:: max(1, len(gates) * len(open_) // (EQUATIONS * len(weak) * shape[0]))]
        own = known.values[gate]
        residuals.append((own.value - base).flatten()[open_])
        weights.append(1 / own.deviation.flatten()[open_])
        columns = []
        for direction in weak:
            moved = torch.zeros(shape[0], known.images, *shape, dtype=torch.float64)
            moved[range(shape[0]), :, range(shape[0])] = direction.view(known.images, *shape[1:])
            changed = follow(known, before, place, (value + moved).flatten(0, 1))
            assert changed is not None
            columns.append((changed.view(shape[0], *base.shape) - base).flatten(1)[:, open_])
        jacobians.append(torch.cat(columns).T)
    if not jacobians:
        return None
    return torch.cat(jacobians), torch.cat(residuals), torch.cat(weights)


def reached(known: Knowledge, place: int) -> set[int]:
    """Return the ReLUs that a step's output reaches through affine steps."""
    found, unseen = set(), [place]
    while unseen:
        for user in known.network.steps[unseen.pop()].users:
            if known.network.steps[user].kind == "relu":
                found.add(user)
            elif known.network.steps[user].kind in ("convolution", "scaling", "affine"):
                unseen.append(user)
    return found


def follow(known: Knowledge, at: int, place: int, value: Tensor) -> Tensor | None:
    """Return the outputs [N * B, ...] of a step for N outputs [N * B, C, H, W] of the step at ``place`` below it."""
    if at == place:
        return value
    if at in known.values:
        return known.clean(at).repeat(len(value) // known.images, 1, 1, 1)
    step = known.network.steps[at]
    if step.kind not in ("convolution", "scaling", "affine"):
        return None
    inputs = [follow(known, each, place, value) for each in step.inputs]
    given = [each for each in inputs if each is not None]
    return known.network.forward(at, given) if len(given) == len(inputs) else None
