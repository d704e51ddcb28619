"""Which inputs of convolutions follow from what was sent, without a search: predicted from sizes, and found.

An input follows from the gradient of its convolution's weight by itself (``factorise_convolution``), or from inputs
that follow so: below them layer by layer (``recover_everywhere``), above them by the network's forward pass.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from leakbench.attacks.analytic import input_shapes
from leakbench.attacks.peeling.descent import recover_everywhere
from leakbench.attacks.peeling.exposure import SPARE, Exposure, predict_exposure
from leakbench.attacks.peeling.factors import NotFactorised
from leakbench.attacks.peeling.lattice import CONVOLUTIONS, Lattice
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.pointwise import factorise_pointwise
from leakbench.attacks.peeling.shifts import factorise_convolution
from leakbench.attacks.peeling.trace import filled, trace
from leakbench.core.rng import generator, seeded
from leakbench.core.text import english, plural
from leakbench.errors import Unsupported
from leakbench.observation import Observation

MAX_IMAGES = 2
"""The number of images that are tried: whether a layer is exposed depends more on its size than on the image."""

MAX_ERROR = 1e-2
"""The distance from the true input, relative to its norm, up to which a layer counts as exposed if that is known."""

SHOWN_CHANNELS = 16
"""The number of channels whose features are drawn, those with the largest norms."""

MAX_NAMES = 6
"""The number of layers up to which all are named in a sentence."""

MAX_UNORDERED = 16
"""The number of positions of a 1x1 convolution up to which they are searched for; more take long."""

MIN_ZEROS = 0.01
"""The share of zeros from which a layer's input counts as the output of a ReLU."""


BELOW_SINGLE_VALUES = Exposure("hidden", "its errors add up to zero: a normalisation takes one value of each image")
"""The rank of such a convolution's gradient is one too low for the images of a step."""

NOT_TRAINED = Exposure("hidden", "the gradient of its weight is not computed: it is frozen, or made of other tensors")


@dataclass(frozen=True)
class LayerExposure:
    """Whether the input of a convolution follows from what was sent.

    Attributes:
        layer: its name.
        kernel: the size of its kernel, such as (3, 3).
        inputs: (C, H, W) of its input.
        images: how many images were tried.
        exposed: for how many of them the input follows from the gradient of the layer's weight by itself, up to a
            positive factor.
        derived: for how many others the input follows from those of other layers.
        positions: of a 1x1 convolution, of how many of its positions the input follows from its own gradient, in
            unknown order and each up to a positive factor; the fewest of all images.
        read: how many positions the kernel reads.
        reason: why it is not exposed, for the first image for which that is so; empty if there is none.
        error: the relative error of the input against the truth after the best factor, the largest of the images for
            which it follows, or of the positions in unknown order; NaN without a truth or such a value.
        features: channels of the recovered input of the first such image as a PNG, and of the true one beside it if
            that is known; None if it follows for no image.
    """

    layer: str
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    images: int
    exposed: int
    derived: int
    positions: int
    read: int
    reason: str
    error: float
    features: bytes | None

    @property
    def everywhere(self) -> bool:
        """Whether the input follows from the layer's own gradient for every image that was tried."""
        return self.exposed == self.images > 0

    @property
    def unordered(self) -> bool:
        """Whether every position follows for every image, but in unknown order."""
        return self.positions == self.read > 0 and not self.known

    @property
    def known(self) -> bool:
        """Whether the input follows for every image that was tried, by itself or from other layers."""
        return self.exposed + self.derived == self.images > 0


def predicted(network: nn.Module, image_shape: tuple[int, ...], images: int = 1) -> dict[str, Exposure]:
    """Return for every convolution that runs once whether it is expected to expose its input, by sizes only.

    Args:
        network: in the mode in which clients train it; a random image shows the sizes, and which inputs have zeros.
        image_shape: (C, H, W).
        images: in a client's step.
    """
    normalised = any(_own_statistics(module) for module in network.modules())
    taken, lone = _run(network, image_shape)
    found = {}
    for name, values in taken.items():
        module = network.get_submodule(name)
        if len(values) != 1 or not isinstance(module, CONVOLUTIONS):
            continue
        (value,) = values
        try:
            lattice = Lattice.of(module, value.shape[1:])
        except Unsupported as error:
            found[name] = Exposure("hidden", str(error))
            continue
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or not weight.requires_grad:
            found[name] = NOT_TRAINED
            continue
        if name in lone:
            found[name] = BELOW_SINGLE_VALUES
            continue
        channels = module.in_channels, module.out_channels
        found[name] = predict_exposure(lattice, *channels, images, sparse=_sparse(value), own_statistics=normalised)
    return found


def has_relus(network: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Return whether a convolution or linear layer takes values that a ReLU set to 0."""
    taken, _ = _run(network, image_shape)
    return any(_sparse(value) for values in taken.values() for value in values)


def _run(network: nn.Module, image_shape: tuple[int, ...]) -> tuple[dict[str, list[Tensor]], set[str]]:
    """Run a network on a random image without draws.

    Returns:
        What convolutions and linear layers take of the image, in order of execution; and which of them are right below
        a normalisation by the batch's statistics of one value of each image.
    """
    own = {name for name, module in network.named_modules() if _own_statistics(module)}
    network = copy.deepcopy(network).eval()
    taken: dict[str, list[Tensor]] = {}
    made: list[tuple[str, Tensor]] = []
    lone: set[str] = set()

    def take(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        taken.setdefault(name, []).append(given[0][0])

    def note(name: str, _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        made.append((name, out))

    def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if given[0][0, 0].numel() == 1:
            lone.update(name for name, out in made if out is given[0])

    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            module.register_forward_pre_hook(partial(take, name))
            module.register_forward_hook(partial(note, name))
        elif name in own:
            module.register_forward_pre_hook(look)
    image = torch.rand((1, *image_shape), generator=generator("exposure"))
    with torch.no_grad(), seeded("exposure"), contextlib.suppress(Exception):  # what ran before it breaks counts
        network(image.to(next(network.parameters(), image)))
    return taken, lone


def _sparse(value: Tensor) -> bool:
    """Return whether values have zeros as a ReLU leaves them."""
    return float((value == 0).double().mean()) > MIN_ZEROS


def _own_statistics(module: nn.Module) -> bool:
    """Return whether a layer normalises by the statistics of the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)


def rule_in_words(found: Mapping[str, Exposure], image_shape: Sequence[int], images: int = 1) -> str:
    """Return by which rule convolutions are expected to expose their input, and how many and which these are."""
    if not found:
        return "the network has no convolution that runs once"
    parts = []
    for verdict, words in (("exposed", "of {}"), ("possible", "more if its rank is full"), ("partly", "in part")):
        names = [name for name, each in found.items() if each.verdict == verdict]
        shown = english(names) if 0 < len(names) <= MAX_NAMES else f"the lowest is {names[0]}" if names else ""
        if names or verdict == "exposed":
            words = words.format(plural(len(found), "convolution"))
            parts.append(f"{len(names)} {words}{f' ({shown})' if shown else ''}")
    lone = "; none right below a normalisation of one value of each image"
    return (
        f"{', '.join(parts)}, for {plural(images, 'image')} of {' x '.join(map(str, image_shape))} in a step. "
        "The rule: a kernel above 1x1, stride 1, and in each group as many channels as positions x images; "
        f"behind a ReLU {SPARE:g} times as many, unless the network normalises by the batch's own statistics"
        f"{lone if BELOW_SINGLE_VALUES in found.values() else ''}"
    )


def exposures(observation: Observation, truth: Mapping[str, Sequence[Tensor]] | None) -> list[LayerExposure]:
    """Return every convolution that sent the gradient of its weight and runs once, in order of execution.

    Args:
        observation: what the server saw.
        truth: layer -> its true inputs, flattened, one for each image; None if they are not known.
    """
    shapes = input_shapes(observation, CONVOLUTIONS)
    others = [_derived(observation, trial) for trial in range(min(observation.trials, MAX_IMAGES))]
    found = []
    for layer, taken in shapes.items():
        if len(taken) == 1 and f"{layer}.weight" in observation.gradient:
            own = [values.get(layer) for values in others]
            found.append(_exposure(observation, layer, taken[0], own, None if truth is None else truth.get(layer)))
    return found


def _derived(observation: Observation, trial: int) -> dict[str, Tensor]:
    """Return the inputs [C, H, W] of convolutions that follow from those of other layers, by layer."""
    sent = {name: value[trial].cpu() for name, value in observation.gradient.items()}
    sent = {name: value for name, value in sent.items() if bool(torch.isfinite(value).all())}
    try:
        network = Network(trace(observation)).on(filled(observation, trial), trial)
    except Unsupported:
        return {}
    values = {}
    for feature in recover_everywhere(network, sent, generator("audit", "descent")):
        wrong = any(error > MAX_ERROR for error in (feature.check, feature.balance))  # NaN if nothing shows it
        if feature.deviation <= MAX_ERROR and not wrong:
            values[feature.place] = feature.value
    for place, step in enumerate(network.steps):
        if place not in values and step.inputs and all(each in values for each in step.inputs):
            taken = [values[each] for each in step.inputs]
            with torch.no_grad():
                once, again = (network.forward(place, taken) for _ in range(2))
            if isinstance(once, Tensor) and torch.equal(once, again):  # it draws nothing at random
                values[place] = once
    steps = [step for step in network.steps if step.kind == "convolution" and step.inputs[0] in values]
    return {step.name: values[step.inputs[0]][0] for step in steps}


def _exposure(
    observation: Observation,
    layer: str,
    shape: tuple[int, ...],
    others: Sequence[Tensor | None],
    truth: Sequence[Tensor] | None,
) -> LayerExposure:
    gradient, module = observation.gradient[f"{layer}.weight"], observation.model.get_submodule(layer)
    exposed, derived, reasons, errors, pictures, apart, read = 0, 0, [], [], [], [], 0
    for image, other in enumerate(others):
        real = None if truth is None else truth[image].double().cpu()
        value = _checked(_input(gradient[image], module, shape, layer), real)
        if isinstance(value, str):
            reasons.append(value)
            value = _checked("" if other is None else other, real)
            derived += not isinstance(value, str)
        else:
            exposed += 1
        if not isinstance(value, str):
            errors.append(math.nan if real is None else _error(value.flatten(), real))
            pictures.append(_drawn(value, None if real is None else real.view_as(value)))
        elif set(gradient.shape[3:]) == {1} and gradient.shape[2] == shape[0]:
            found, read = _positions(gradient[image], module, shape, None if real is None else real.view(shape))
            apart.append(found)
    if len(apart) == len(others):  # otherwise the input is known in order
        errors = [max(each, default=math.nan) for each in apart]
    return LayerExposure(
        layer=layer,
        kernel=tuple(gradient.shape[3:]),
        inputs=shape,
        images=len(others),
        exposed=exposed,
        derived=derived,
        positions=min(map(len, apart)) if len(apart) == len(others) else 0,
        read=read,
        reason=reasons[0] if reasons else "",
        error=max(errors, default=math.nan),
        features=pictures[0] if pictures else None,
    )


def _positions(
    gradient: Tensor, module: nn.Module, shape: tuple[int, ...], real: Tensor | None
) -> tuple[list[float], int]:
    """Return for each position that follows from a 1x1 convolution's gradient its error, and how many are read.

    A vector counts if it is near a true one that no other vector is nearer to; the error is NaN without a truth.
    """
    try:
        lattice = Lattice.of(module, shape[1:])
    except Unsupported:
        return [], 0
    if lattice.outputs > MAX_UNORDERED:
        return [], lattice.outputs
    found = factorise_pointwise(gradient, lattice.outputs, generator("audit", "positions"))
    values = [] if isinstance(found, NotFactorised) else list(found.inputs)
    if real is None:
        return [math.nan] * len(values), lattice.outputs
    nearest: dict[int, float] = {}
    columns = real.flatten(1).T
    for value in values:
        errors = [_error(value, column) for column in columns]
        place = int(np.argmin(errors))
        nearest[place] = min(errors[place], nearest.get(place, math.inf))
    return [error for error in nearest.values() if error <= MAX_ERROR], lattice.outputs


def _checked(value: Tensor | str, real: Tensor | None) -> Tensor | str:
    """Return an input that agrees with the truth, if that is known, or the reason why it does not follow."""
    if isinstance(value, str) or real is None:
        return value
    if real.numel() != value.numel():
        return "it runs on several inputs"
    error = _error(value.flatten(), real)
    return value if error <= MAX_ERROR else f"what follows from the gradient is {error:.2g} from the true input"


def _input(gradient: Tensor, module: nn.Module, shape: tuple[int, ...], layer: str) -> Tensor | str:
    """Return the input [C, *image] up to a factor, or the reason why it does not follow."""
    try:
        lattice = Lattice.of(module, shape[1:])
    except Unsupported as error:
        return str(error)
    found = factorise_convolution(gradient, lattice, generator("audit", layer))
    if isinstance(found, NotFactorised):
        return found.reason
    if found.phases > 1 or found.groups > 1:
        return "it follows in parts only: each group and sub-lattice has a factor of its own"
    return found.inputs[0]


def _error(value: Tensor, real: Tensor) -> float:
    """Return the distance from the truth after the best factor, relative to the truth's norm."""
    factor = (value @ real) / (value @ value)
    size = float(real.norm())
    return float((factor * value - real).norm()) / size if size else math.inf


def _drawn(value: Tensor, real: Tensor | None) -> bytes | None:
    """Return the largest channels [C, H, W] in one row, each from its least to its largest value; the truth below."""
    if value.dim() != 3:
        return None
    chosen = value.flatten(1).norm(dim=1).argsort(descending=True, stable=True)[:SHOWN_CHANNELS]
    rows = [_row(each[chosen]) for each in (value, real) if each is not None]
    image = Image.fromarray(np.concatenate(rows, 0))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _row(channels: Tensor) -> np.ndarray:
    """Return channels [K, H, W] beside each other as bytes, with a line of white between and around them."""
    low, high = channels.amin((1, 2), keepdim=True), channels.amax((1, 2), keepdim=True)
    scaled = (channels - low) / (high - low).clamp(min=torch.finfo(channels.dtype).tiny)
    grey = (255 * scaled).round().to(torch.uint8)
    return nn.functional.pad(grey, (1, 1, 1, 1), value=255).permute(1, 0, 2).flatten(1).numpy()
