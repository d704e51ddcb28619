"""The attack that separates the images of a batch, or of a whole local training, in closed form."""

import contextlib
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.analytic import pixel_layers
from leakbench.attacks.base import Attack, register
from leakbench.attacks.batch_labels import batch_labels
from leakbench.attacks.disaggregation import disaggregate
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.low_rank import LowRank, low_rank, rounding_error
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
        # decay acts on the bias as on the weights
        errors = moved["bias"] - shown.decay * before["bias"] if "bias" in moved else None
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
    """Every image of a batch, or of a whole local training by SGD, exactly, from the first linear layer before a ReLU.

    The change of W x + b by any number of steps of SGD, with any momentum and weight decay, is a sum of one term for
    each image. The number of images is its rank, and the zeros that the ReLU leaves in each term tell them apart. It
    needs neither the learning rate, nor the number of images, nor how the client trained. What comes out is checked
    against itself: units must be on where, and only where, an image has an error.

    Attributes:
        agreement: the least share of units that agree, for the images to count as found.
    """

    reference: ClassVar[str] = (
        "in the family of Dimitrov et al. 2024, SPEAR, arXiv 2403.03945; local training, decay, and the search for "
        "sparse vectors are this package's own"
    )
    assumes: ClassVar[str] = (
        "A linear layer with a bias that takes the pixels, with a ReLU behind it and many more units than there are "
        "images; a gradient that is nearly exact; SGD."
    )
    cost: ClassVar[str] = "Under a second for each client up to 16 images, and about ten at 32."
    fails: ClassVar[str] = (
        "Adam and its kind, noise, augmentation (each copy is an image of its own), two equal images, other "
        "activations, and convolutions below the layer."
    )
    version: ClassVar[int] = 2  # 2: images were not separated at 2 and 4, or without an input normalisation
    batches: ClassVar[bool] = True
    updates: ClassVar[bool] = True
    agreement: Annotated[float, Field(ge=0, le=1)] = 0.75

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if no linear layer with a bias takes the pixels, or its gradient was not sent."""
        layer_changes(observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the images of every trial; one in which not all were separated has failed."""
        draws = zip(layer_changes(observation), rng.generators("rows"))
        each = [self._separated(observation, layer, own) for layer, own in draws]
        most = observation.count or max(1, *(len(one.images) for one in each))
        images = torch.full((len(each), most, *observation.image_shape), torch.nan)
        for row, one in enumerate(each):
            images[row, : len(one.images)] = one.images[:most].float()
        labels = None
        with contextlib.suppress(Unsupported):
            labels = batch_labels(observation) if observation.places else None
        images = images if observation.places else images[:, 0]
        return Reconstruction(
            images=images.to(observation.device, observation.dtype),
            labels=labels,
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

    def _separated(self, observation: Observation, layer: LayerChange, rng: torch.Generator) -> _Separated:
        name, shown = layer.name, layer.shown
        none = torch.zeros(0, *observation.image_shape)
        if not shown.low or not shown.rank:
            return _Separated(none, shown.rank, reason=f"the change of {name} is not of low rank: Adam, or noise")
        if observation.count and shown.rank != observation.count:
            count = observation.count
            return _Separated(none, shown.rank, reason=f"{name} shows {shown.rank} different inputs, not {count}")
        (weight, bias), (moved, moved_bias) = layer.before, layer.moved
        assert layer.errors is not None, "``layer_changes`` asks for the bias"
        assert bias is not None
        assert moved_bias is not None
        states = [(weight, bias)]
        if observation.threat.shares == "weights":
            states.append((weight - moved, bias - moved_bias))
        found = disaggregate(layer.change, layer.errors, shown, states, rng)
        if not found.complete:
            reason = f"{found.found} of the {shown.rank} inputs of {name} were separated, and images need all"
            return _Separated(none, shown.rank, found.found, reason=reason)
        agreement = found.agreement(*states)
        images = layer.pixels(found.inputs).view(-1, *observation.image_shape)
        if shown.rank > 1 and agreement < self.agreement:
            reason = f"the images contradict {1 - agreement:.0%} of the units of {name}"
        else:
            reason = ""
        return _Separated(images if not reason else none, shown.rank, found.found, agreement, reason)
