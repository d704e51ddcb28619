"""The inputs of a linear layer above convolutions, of each image of a batch, and the images that they belong to.

The gradient of W f + b is E F, the errors [M, N] of N images times their inputs [N, S], and that of b is E 1. Two kinds
of zeros tell the images apart: a ReLU behind the layer leaves zeros in the columns of E (``attacks.disaggregation``),
and a ReLU in front of it makes the rows of F non-negative vectors with zeros (``unmixing``). Either gives both.

Below, an image is searched for whose forward pass gives its inputs (``inversion``), each by itself. That is exact if
the layer takes more positive values than an image has pixels, and gives a blurred image otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakbench.attacks.disaggregation import disaggregate, most_inputs
from leakbench.attacks.peeling.descent import Feature
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.unmixing import MAX_PROGRAMS, Sparsity, unmix
from leakbench.gradients.low_rank import CLEAR_OF_NOISE, LowRank, largest_rank, low_rank, rounding_error

FEW_ZEROS = Sparsity(zeros=0.002, like=0.02, angle=1e-3)
"""What counts as a layer's input: those of two images differ in few zeros, and errors tell the false ones."""

MIN_AGREEMENT = 0.97
"""The least share of units behind a layer that are on where, and only where, there is an error."""

MAX_ERROR = 0.02
"""The largest error, relative to their size, of the errors of a classifier that its own inputs imply; and of a change
that inputs and errors give."""

NO_ERROR = 1e-4
"""Errors below this share of an image's largest are zeros of the ReLU behind the layer."""

ZERO = 1e-5
"""Values below this share of the root mean square are zeros of the ReLU."""


@dataclass(frozen=True)
class FlatHead:
    """A linear layer that takes all values of a convolutional part.

    Attributes:
        place: of the layer; ``at``: of the ReLU or max-pool whose values it takes, in another order or repeated.
        gated: whether a ReLU follows the layer.
        last: whether it is the classifier.
    """

    place: int
    at: int
    gated: bool
    last: bool


@dataclass(frozen=True)
class FlatInputs:
    """What the gradient of a linear layer gives of each image.

    Attributes:
        inputs: [N, S] float64, in no order.
        errors: [N, M], the derivative of the loss by the layer's output.
        deviation: how far the inputs may be from exact, relative to their size.
    """

    inputs: Tensor
    errors: Tensor
    deviation: float


def flat_head(network: Network, sent: Mapping[str, Tensor]) -> FlatHead | None:
    """Return the lowest linear layer if it takes the values of a ReLU, or of a max-pool of one, and sent its gradients.

    None otherwise.
    """
    steps = network.steps
    for place, step in enumerate(steps):
        if step.kind != "linear":
            continue
        at = network.below_affine(step.inputs[0])
        below = [steps[each].kind for each in network.below(at)]
        known = {f"{step.name}.weight", f"{step.name}.bias"} <= set(sent)
        gate = steps[at] if steps[at].kind != "max-pool" else steps[steps[at].inputs[0]]
        if not known or gate.kind != "relu" or gate.slope or "convolution" not in below:
            return None
        gated = len(step.users) == 1 and steps[step.users[0]].kind == "relu" and steps[step.users[0]].slope == 0
        return FlatHead(place, at, gated, not step.users)
    return None


def most_separated(network: Network, head: FlatHead, sent: Mapping[str, Tensor]) -> int:
    """Return how many images ``flat_features`` tells apart at the most, by the size [M, S] of the layer alone."""
    rows, columns = sent[f"{network.steps[head.place].name}.weight"].shape[-2:]
    by_inputs = min(largest_rank(rows, columns), MAX_PROGRAMS)
    return max(by_inputs, most_inputs(rows, columns)) if head.gated else by_inputs


def flat_features(
    network: Network, head: FlatHead, sent: Mapping[str, Tensor], images: int, eps: float, rng: torch.Generator
) -> Feature | str:
    """Return the values [B, C, H, W] of the ReLU or max-pool below a linear layer, or why they were not found.

    Args:
        network: a trial's, in float64.
        head: the layer.
        sent: the trial's gradient, by name, in whichever unit.
        images: how many there are, B.
        eps: of the number type in which the gradient was computed.
        rng: of the searches.
    """
    name = network.steps[head.place].name
    found = _separated(network, head, sent, images, eps, rng)
    if isinstance(found, str):
        return found
    value, top = found.inputs, network.steps[head.place].inputs[0]
    while top != head.at:
        (lower,) = network.steps[top].inputs
        one = torch.ones((1, *network.steps[lower].shape), dtype=torch.float64)
        offset = network.forward(top, [torch.zeros_like(one)])
        below = network.backward(top, lower, value.view(len(value), *network.steps[top].shape) - offset)
        below = below / network.backward(top, lower, network.forward(top, [one]) - offset)
        again = network.forward(top, [below]).flatten(1)
        if not float((again - value.flatten(1)).norm()) <= MAX_ERROR * float(value.norm()):
            return f"the input of {name} does not give that of the layers below it"
        value, top = below, lower
    least = ZERO * value.square().mean().sqrt()
    value = torch.where(value > least, value, 0.0)
    missing = float("nan")
    return Feature(head.at, value, found.deviation, missing, missing, None)


def _separated(
    network: Network, head: FlatHead, sent: Mapping[str, Tensor], images: int, eps: float, rng: torch.Generator
) -> FlatInputs | str:
    """Return the inputs of the layer of each image, or why they were not found."""
    name = network.steps[head.place].name
    change, total = (sent[f"{name}.{part}"].double() for part in ("weight", "bias"))
    shown = low_rank(change, torch.zeros_like(change), rounding_error(torch.zeros(()), change, eps))
    if not shown.low or not shown.rank:
        return f"the gradient of {name} is not of low rank: noise, or as many images as it has outputs"
    if shown.rank != images:
        most = ", the most that its outputs can tell apart" if shown.rank >= len(change) - 1 else ""
        return f"{name} shows {shown.rank} different inputs{most}, not {images}"
    module = network.module(head.place)
    assert isinstance(module, nn.Linear)
    layer = module.weight.detach().double(), module.bias.detach().double()
    if head.gated:
        got = disaggregate(change, total, shown, [layer], rng)
        if got.complete and (images == 1 or got.agreement(layer) >= MIN_AGREEMENT):
            return FlatInputs(got.inputs, got.errors.T, _deviation(got.inputs, got.errors, change))
    found = _by_zeros(change, total, shown, rng)
    if found is None:
        return f"the inputs of {name} were not separated by their zeros"
    wrong = head.last and _contradiction(found, *layer) > MAX_ERROR
    wrong = wrong or (head.gated and _agreement(found, *layer) < MIN_AGREEMENT)
    if wrong or found.deviation > MAX_ERROR:
        return f"the inputs that were found of {name} contradict its gradient"
    return found


def _by_zeros(change: Tensor, total: Tensor, shown: LowRank, rng: torch.Generator) -> FlatInputs | None:
    """Return the inputs that are non-negative vectors with zeros, if all are found."""
    sizes, rows = torch.linalg.svd(change, full_matrices=False)[1:]
    mixed = (sizes[: shown.rank, None] * rows[: shown.rank]).T  # [S, N]
    noise = shown.noise / (CLEAR_OF_NOISE * (change.shape[0] ** 0.5 + change.shape[1] ** 0.5))
    directions = unmix(mixed, mixed.new_full((len(mixed),), noise), rng, FEW_ZEROS)
    if len(directions) < shown.rank:
        return None
    inputs = (mixed @ directions.T).clamp(min=0).T  # each up to a factor
    errors = torch.linalg.lstsq(inputs.T, change.T).solution.T  # [M, N]
    scale = torch.linalg.lstsq(errors, total[:, None]).solution[:, 0]
    if not bool((scale > 0).all()):
        return None
    inputs, errors = inputs / scale[:, None], errors * scale
    return FlatInputs(inputs, errors.T, _deviation(inputs, errors, change))


def _deviation(inputs: Tensor, errors: Tensor, change: Tensor) -> float:
    """Return how far inputs [N, S] and errors [M, N] are from giving the change [M, S], relative."""
    return float((errors @ inputs - change).norm() / change.norm())


def _agreement(found: FlatInputs, weight: Tensor, bias: Tensor) -> float:
    """Return the least share, of all images, of units that are on where, and only where, they have an error."""
    values = found.inputs @ weight.T + bias
    on = found.errors.abs() > NO_ERROR * found.errors.abs().amax(1, keepdim=True)
    return float(((values > 0) == on).double().mean(1).min())


def _contradiction(found: FlatInputs, weight: Tensor, bias: Tensor) -> float:
    """Return how far the errors at the logits of cross-entropy are from those of the inputs, by the best labels."""
    chance = torch.softmax(found.inputs @ weight.T + bias, 1)
    labels = found.errors.argmin(1)
    expected = chance - nn.functional.one_hot(labels, len(bias))
    size = (found.errors * expected).sum() / expected.square().sum()
    return float((found.errors - size * expected).norm() / found.errors.norm())
