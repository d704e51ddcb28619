"""The attack that separates the images of a batch, or of a whole local training, in closed form."""

import contextlib
from collections.abc import Sequence
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
from leakbench.gradients.low_rank import low_rank, rounding_error
from leakbench.observation import Observation


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
    cost: ClassVar[str] = "A second for each client up to 16 images, and 10 to 30 at 32."
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
        self._layer(observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the images of every trial; one in which not all were separated has failed."""
        layer, view = self._layer(observation)
        each = [self._separated(observation, layer, view, row, own) for row, own in enumerate(rng.generators("rows"))]
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

    def _layer(self, observation: Observation) -> tuple[str, Sequence[Tensor]]:
        """Return the first layer that takes the pixels, and how it sees them (``pixel_layers``)."""
        for name, view in pixel_layers(observation).items():
            if {f"{name}.weight", f"{name}.bias"} <= set(observation.gradient):
                return name, view
        raise Unsupported(
            "disaggregate needs the gradient of a linear layer that takes the pixels, with its bias, and none was sent"
        )

    def _separated(
        self, observation: Observation, layer: str, view: Sequence[Tensor], row: int, rng: torch.Generator
    ) -> _Separated:
        weight, bias = (observation.gradient[f"{layer}.{part}"][row].detach().cpu() for part in ("weight", "bias"))
        before = [observation.weights[f"{layer}.{part}"][row].detach().cpu().double() for part in ("weight", "bias")]
        unit = observation.unit * (1.0 if observation.size is None else float(observation.size[row]))
        shares = observation.threat.shares == "weights"
        eps, change = torch.finfo(weight.dtype).eps, weight.double() * unit
        error = rounding_error(before[0] if shares else torch.zeros(()), change, eps)
        decayed = before[0] if shares else torch.zeros_like(before[0])
        shown = low_rank(change, decayed, error)
        none = torch.zeros(0, *observation.image_shape)
        if not shown.low or not shown.rank:
            return _Separated(none, shown.rank, reason=f"the change of {layer} is not of low rank: Adam, or noise")
        if observation.count and shown.rank != observation.count:
            count = observation.count
            return _Separated(none, shown.rank, reason=f"{layer} shows {shown.rank} different inputs, not {count}")
        offset = bias.double() * unit - shown.decay * before[1]  # decay acts on the bias as on the weights
        states = [(before[0], before[1])]
        if shares:
            states.append((before[0] - change, before[1] - bias.double() * unit))
        found = disaggregate(change - shown.decay * decayed, offset, shown, states, rng)
        if not found.complete:
            reason = f"{found.found} of the {shown.rank} inputs of {layer} were separated, and images need all"
            return _Separated(none, shown.rank, found.found, reason=reason)
        agreement = found.agreement(*states)
        order, slope, shift = (part.cpu() for part in view)
        place = row if len(slope) > 1 else 0
        pixels = torch.empty_like(found.inputs)
        pixels[:, order] = (found.inputs - shift[place]) / slope[place]
        images = pixels.view(-1, *observation.image_shape)
        if shown.rank > 1 and agreement < self.agreement:
            reason = f"the images contradict {1 - agreement:.0%} of the units of {layer}"
        else:
            reason = ""
        return _Separated(images if not reason else none, shown.rank, found.found, agreement, reason)
