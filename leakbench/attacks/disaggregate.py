"""The attack that separates the images of a batch, or of a whole local training, in closed form."""

import contextlib
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.analytic import pixel_layers
from leakbench.attacks.base import Attack, check_images, register
from leakbench.attacks.batch_labels import batch_labels
from leakbench.attacks.disaggregation import disaggregate, most_inputs
from leakbench.attacks.peeling.beginnings import most_begun
from leakbench.attacks.peeling.flat import FlatHead, flat_features, flat_head, most_separated
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.opened import OpenedTrial, opened, reconstruction
from leakbench.attacks.peeling.restore import Restored, images_of
from leakbench.attacks.peeling.trace import trace
from leakbench.attacks.shared_errors import shared_errors
from leakbench.core.component import LATER
from leakbench.core.rng import Rng
from leakbench.core.text import plural
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.low_rank import LowRank, bias_change, low_rank, rounding_error
from leakbench.observation import Observation


@dataclass(frozen=True)
class LayerChange:
    """One trial's change of a linear layer that takes the pixels, without weight decay.

    Attributes:
        name: of the layer.
        change: [M, D] float64, on the CPU, a sum of one term for each image; ``errors`` [M] that of the bias, None if
            it was not sent.
        shown: its rank, and the decay that was removed.
        before: the weight [M, D] and the bias [M] that were handed out; ``moved``: the change before decay was removed.
        order: [D], the pixel of each entry of the layer's input, which is ``slope`` times the pixel plus ``shift``.
    """

    name: str
    change: Tensor
    errors: Tensor | None
    shown: LowRank
    before: tuple[Tensor, Tensor | None]
    moved: tuple[Tensor, Tensor | None]
    order: Tensor
    slope: Tensor
    shift: Tensor

    def pixels(self, inputs: Tensor, shifted: bool = True) -> Tensor:
        """Return inputs [N, D] of the layer as images [N, D]; combinations of images if not ``shifted``.

        Those are combinations of the inputs in the units of pixels, of which the shift has yet to be removed.
        """
        found = torch.empty_like(inputs)
        found[:, self.order] = (inputs - self.shift if shifted else inputs) / self.slope
        return found

    def limits(self, most: int) -> str:
        """Return that ``most`` images are separated in this layer, in words."""
        rows, columns = self.change.shape
        return (
            f"separates at most {plural(most, 'image')} in the change of layer {self.name}, which has "
            f"{plural(rows, 'unit')} and takes {plural(columns, 'value')}"
        )

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """What a black and a white image [D] are in the units of ``pixels(shifted=False)``."""
        shift = torch.empty_like(self.shift)
        shift[self.order] = self.shift / self.slope
        return shift, 1 + shift

    def scaled(self, found: Tensor, factor: Tensor | None) -> Tensor:
        """Return images [N, D] of which multiples were found, in the units of ``pixels(shifted=False)``.

        Args:
            found: [N, D], ``factor`` times the images and their shift.
            factor: [N]; None: each image is scaled to [0, 1], with the sign that makes more of it dark.
        """
        if factor is not None:
            tiny = torch.finfo(found.dtype).tiny
            return found / torch.where(factor.abs() < tiny, tiny, factor)[:, None] - self.bounds[0]
        sign = (found.mean(1) - (found.amax(1) + found.amin(1)) / 2).sign()
        turned = -found * torch.where(sign == 0, 1.0, sign)[:, None]
        low, high = turned.amin(1, keepdim=True), turned.amax(1, keepdim=True)
        return (turned - low) / (high - low).clamp(min=torch.finfo(found.dtype).tiny)


def layer_changes(observation: Observation, bias: bool = True) -> list[LayerChange]:
    """Return the change of the first layer that takes the pixels, of every trial.

    Args:
        observation: what the attacker sees.
        bias: whether the gradient of its bias is needed.

    Raises:
        Unsupported: there is no such layer, or its gradient was not sent.
    """
    sent = observation.gradient
    found = pixel_layers(observation)
    name = next((one for one in found if f"{one}.weight" in sent and (not bias or f"{one}.bias" in sent)), None)
    if name is None:
        wanted = (
            "a linear layer that takes the pixels, with its bias" if bias else "a linear layer that takes the pixels"
        )
        raise Unsupported(f"the attack needs the gradient of {wanted}, and none was sent")
    order, slope, shift = (part.cpu() for part in found[name])
    shares, rows = observation.threat.shares == "weights", []
    parts = [part for part in ("weight", "bias") if f"{name}.{part}" in sent]
    for t in range(observation.trials):
        unit = observation.unit * (1.0 if observation.size is None else float(observation.size[t]))
        eps = torch.finfo(observation.dtype).eps
        moved = {part: sent[f"{name}.{part}"][t].detach().cpu().double() * unit for part in parts}
        before = {part: observation.weights[f"{name}.{part}"][t].detach().cpu().double() for part in parts}
        decayed = before["weight"] if shares else torch.zeros_like(before["weight"])
        error = rounding_error(before["weight"] if shares else torch.zeros(()), moved["weight"], eps)
        shown = low_rank(moved["weight"], decayed, error)
        change = moved["weight"] - shown.decay * decayed
        errors = moved.get("bias")
        if errors is not None and shown.decay:
            decays = bias_change(change, errors, before["bias"], shown, eps).decays
            errors = errors if decays is False else errors - shown.decay * before["bias"]
        place = t if len(slope) > 1 else 0
        known = (before["weight"], before.get("bias")), (moved["weight"], moved.get("bias"))
        rows.append(LayerChange(name, change, errors, shown, *known, order, slope[place], shift[place]))
    return rows


@dataclass(frozen=True)
class _Separated:
    """What one trial's gradient or update shows.

    Attributes:
        images: [N, C, H, W]; none if it failed.
        rank: the number of inputs that the layer's change is made of.
        found: how many of their columns of errors were found.
        agreement: of the signs of units with their errors (``Disaggregation.agreement``).
        reason: why it failed; empty if it did not.
    """

    images: Tensor
    rank: int
    found: int = 0
    agreement: float = 0.0
    reason: str = ""


@register("disaggregate")
@dataclass(frozen=True)
class Disaggregate(Attack):
    """Every image of a batch, or of a whole local training by SGD, from the layer that tells them apart.

    The change of W x + b by any number of steps of SGD, with any momentum and weight decay, is a sum of one term for
    each image. The number of images is its rank, and the zeros that the ReLU leaves in each term tell them apart. It
    needs neither the learning rate, nor the number of images, nor how the client trained. What comes out is checked
    against itself: units must be on where, and only where, an image has an error.

    If no linear layer takes the pixels, the same is done with the gradient of a batch above convolutions. A convolution
    of stride 1 with as many channels as the batch has places gives its input and error of each image, and the descent
    of ``peel`` those below. Else the lowest linear layer gives the values that it takes of each image, by the zeros of
    the ReLU behind it or in front of it. The images that have these values are then searched for one by one.

    Attributes:
        agreement: the least share of units that agree, for the images to count as found.
        search: above convolutions, the unit of the iterations from the values to an image, as for ``peel``.
    """

    reference: ClassVar[str] = (
        "in the family of Dimitrov et al. 2024, SPEAR, arXiv 2403.03945, and Kariyappa et al. 2023, CPA, ICML, arXiv "
        "2209.05578 (features); local training, decay, and the search for sparse vectors are this package's own"
    )
    assumes: ClassVar[str] = (
        "A linear layer with a bias that takes the pixels, with a ReLU behind it and many more units than there are "
        "images; a gradient that is nearly exact; SGD. Above convolutions: ReLUs, and the gradient of one step."
    )
    cost: ClassVar[str] = (
        "Under a second for each client up to 16 images, and about ten at 32. Above convolutions a search for each "
        "image: seconds to minutes."
    )
    fails: ClassVar[str] = (
        "Adam and its kind, noise, augmentation (each copy is an image of its own), two equal images, other "
        "activations; one hidden layer before two classes if it has fewer units than there are pairs of images; "
        "above convolutions, images are blurred or wrong if a linear layer takes far fewer positive values than an "
        "image has pixels."
    )
    # 2: images were not separated at 2 and 4, or without an input normalisation; 3: convolutions, unsupported before;
    # 4: one hidden layer before two classes, and columns with a little of another one in them; 5: several such columns;
    # 6: below a max-pool, the search of version 11 of ``peel``; 7: without one, that of its version 12; 8: that of 13
    version: ClassVar[int] = 8
    batches: ClassVar[bool] = True
    updates: ClassVar[bool] = True
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.75
    search: Annotated[int, Field(ge=1)] = field(default=200, metadata=LATER)

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if no layer tells the images apart, by its size alone, or its gradient was not sent."""
        if pixel_layers(observation):
            _separable(observation)
        else:
            _served(observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the images of every trial; one in which not all were separated has failed."""
        if not pixel_layers(observation):
            return self._above_convolutions(observation, rng)
        draws = enumerate(zip(_separable(observation), rng.generators("rows")))
        each = [self._separated(observation, t, layer, own) for t, (layer, own) in draws]
        most = observation.count or max(1, *(len(one.images) for one in each))
        images = torch.full((len(each), most, *observation.image_shape), torch.nan)
        for row, one in enumerate(each):
            images[row, : len(one.images)] = one.images[:most].float()
        images = images if observation.places else images[:, 0]
        return Reconstruction(
            images=images.to(observation.device, observation.dtype),
            labels=_labels(observation),
            objective=torch.tensor([1 - one.agreement for one in each]),
            failed=torch.tensor([bool(one.reason) for one in each]),
            reasons=tuple(one.reason for one in each),
            path="one-at-a-time",
            findings={
                "inputs": torch.tensor([float(one.rank) for one in each]),
                "columns": torch.tensor([float(one.found) for one in each]),
                "agreement": torch.tensor([one.agreement for one in each]),
            },
        )

    def _above_convolutions(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the images of every trial of a convolutional network."""
        network, head = _served(observation)
        parts = [self._opened(one, head, observation) for one in opened(network, observation, rng)]
        return reconstruction(parts, observation, _labels(observation))

    def _opened(self, one: OpenedTrial, head: FlatHead | None, observation: Observation) -> Restored:
        """Return the images of a trial by the descent, or else by the values that its lowest linear layer takes."""
        found = one.restored(self.search)
        if not found.reason or head is None:
            return found
        eps = torch.finfo(observation.dtype).eps
        whole = {name: value for name, value in one.sent.items() if bool(torch.isfinite(value).all())}
        if flat_head(one.network, whole) != head:
            return found
        values = flat_features(one.network, head, whole, len(one.noise), eps, one.draws)
        if isinstance(values, str):
            return replace(found, reason=values)
        return images_of(one.network, one.searched, [values], one.noise, self.search, {}, one.note)

    def _separated(self, observation: Observation, trial: int, layer: LayerChange, rng: torch.Generator) -> _Separated:
        name, shown = layer.name, layer.shown
        none = torch.zeros(0, *observation.image_shape)
        if not shown.low or not shown.rank:
            return _Separated(none, shown.rank, reason=f"the change of {name} is not of low rank: Adam, or noise")
        if observation.count and shown.rank != observation.count:
            count = observation.count
            return _Separated(none, shown.rank, reason=f"layer {name} shows {shown.rank} different inputs, not {count}")
        (weight, bias), (moved, moved_bias) = layer.before, layer.moved
        assert layer.errors is not None, "``layer_changes`` asks for the bias"
        assert bias is not None
        assert moved_bias is not None
        states = [(weight, bias)]
        if observation.threat.shares == "weights":
            states.append((weight - moved, bias - moved_bias))
        found = disaggregate(layer.change, layer.errors, shown, states, rng, shared_errors(observation, trial, name))
        if not found.complete:
            reason = f"{found.found} of the {shown.rank} inputs of layer {name} were separated, and images need all"
            return _Separated(none, shown.rank, found.found, reason=reason)
        agreement = found.agreement(*states)
        images = layer.pixels(found.inputs).view(-1, *observation.image_shape)
        if shown.rank > 1 and agreement < self.agreement:
            reason = f"the images contradict {1 - agreement:.0%} of the units of {name}"
        else:
            reason = ""
        return _Separated(images if not reason else none, shown.rank, found.found, agreement, reason)


def _separable(observation: Observation) -> list[LayerChange]:
    """Return ``layer_changes``; raise Unsupported if the layer is too small for a client's images, too."""
    found = layer_changes(observation)
    most = most_inputs(*found[0].change.shape)
    check_images(observation, most, f"disaggregate {found[0].limits(most)}")
    return found


def _served(observation: Observation) -> tuple[Network, FlatHead | None]:
    """Return a convolutional network and its lowest linear layer; None if that cannot tell images apart.

    Raises:
        Unsupported: no layer can, or what was sent is not the gradient of one step on a known number of images.
    """
    if observation.count == 0:
        raise Unsupported("above convolutions, disaggregate needs the number of images; use count=known")
    client, threat = observation.client, observation.threat
    steps = threat.local_steps if client is None else client.steps
    hidden = threat.shares == "weights" and client is None and threat.recipe == "hidden"
    if hidden or steps > 1:
        raise Unsupported(
            "no linear layer takes the pixels, and above convolutions, whose outputs move from step to step, "
            "disaggregate needs the gradient of one step; use clients that take one, and recipe=known"
        )
    network = Network(trace(observation), [secret.name for secret in observation.secrets])
    head = flat_head(network, observation.gradient)
    most = most_begun(network, observation.gradient)
    if head is not None:
        most = max(1, most, most_separated(network, head, observation.gradient))
    elif not most:
        raise Unsupported(
            "no layer tells images apart: no linear layer takes the pixels or the values of a ReLU, and no convolution "
            "of stride 1 with a kernel above 1x1, behind a ReLU, has as many channels as the batch has places"
        )
    check_images(
        observation, most, f"disaggregate separates at most {plural(most, 'image')} in the layers of this network"
    )
    for place in sorted(network.below(len(network.steps) - 1 if head is None else head.place)):
        if network.unknown(place) or place in network.locked:
            name = network.steps[place].name
            raise Unsupported(
                f"disaggregate cannot search for images below {name}, whose draws or secrets are not known"
            )
    return network, head


def _labels(observation: Observation) -> Tensor | None:
    """Return the labels [T, B] of batches, in ascending order; None if they do not follow."""
    with contextlib.suppress(Unsupported):
        return batch_labels(observation) if observation.places else None
    return None
