"""The gradient of a linear layer that takes the pixels, row by row: what the images of crafted layers follow from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.attacks.analytic import pixel_layers
from leakbench.attacks.peel import read_labels
from leakbench.attacks.simulate import filled
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.evaluate import tensors_of
from leakbench.observation import Observation

ROUNDING_STEPS = 64
"""Errors below this many relative roundings of the largest one count as zero."""

MIN_MATCH, MAX_MATCH = 1e-6, 3e-4
"""Bounds of the relative difference between an error that was observed and that of a reconstruction which is proved.

Between them it is the rounding of the error.
"""

SAME = 1e-5
"""The mean squared difference up to which two reconstructions are the same image."""


@dataclass(frozen=True)
class PixelRows:
    """One trial's view of a linear layer that takes the pixels.

    Attributes:
        layer: its name.
        weight: [M, D] float64, its rows as the server handed them out; likewise ``bias`` [M].
        change: [M, D] float64, the gradient of the weight; likewise ``errors`` [M], that of the bias.
        order: [D], the pixel of each entry of the layer's input, which is ``slope`` times the pixel plus ``shift``.
        least: errors up to this size are rounding.
    """

    layer: str
    weight: Tensor
    bias: Tensor
    change: Tensor
    errors: Tensor
    order: Tensor
    slope: Tensor
    shift: Tensor
    least: float

    def pixels(self, sums: Tensor, sizes: Tensor) -> Tensor:
        """Return the images [N, D] of which rows of gradients [N, D] with errors [N] are multiples."""
        taken = (sums / sizes[:, None] - self.shift) / self.slope
        found = torch.empty_like(taken)
        found[:, self.order] = taken
        return found


def pixel_rows(observation: Observation) -> list[PixelRows]:
    """Return the layer of every trial.

    Raises:
        Unsupported: no linear layer with a bias takes the pixels, or its gradient was not sent.
    """
    found = pixel_layers(observation)
    sent = observation.gradient
    name = next((one for one in found if f"{one}.weight" in sent and f"{one}.bias" in sent), None)
    if name is None:
        reason = "its gradient was not sent" if found else "this network has none"
        raise Unsupported(f"a crafted layer must be linear with a bias and take every pixel, and {reason}")
    order, slope, shift = found[name]
    rows = []
    for t in range(observation.trials):
        change, errors = (sent[f"{name}.{part}"][t].double() for part in ("weight", "bias"))
        weight, bias = (_of_trial(observation, f"{name}.{part}", t) for part in ("weight", "bias"))
        own = t if len(slope) > 1 else 0
        least = ROUNDING_STEPS * torch.finfo(observation.dtype).eps * float(errors.abs().max())
        rows.append(PixelRows(name, weight, bias, change, errors, order, slope[own], shift[own], least))
    return rows


def wanted(observation: Observation, images: Tensor) -> int:
    """Return how many images a client has: those that were derived [N, C, H, W] if their number is not known."""
    return observation.count or max(1, len(images))


def reconstruction(
    observation: Observation, read: Sequence[tuple[Tensor, Tensor]], findings: Mapping[str, Sequence[float]]
) -> Reconstruction:
    """Return what an attacker derived, whose objective is the share of images that are not proved.

    Args:
        observation: what the attacker sees.
        read: each trial's images [N, C, H, W], the best first, and which of them are proved [N].
        findings: further numbers by trial; ``proved`` is added.
    """
    counts = [
        (float(right[: wanted(observation, images)].sum()), wanted(observation, images)) for images, right in read
    ]
    images, failed = _stacked([images for images, _ in read], observation)
    device = observation.device
    values = {**findings, "proved": [number for number, _ in counts]}
    return Reconstruction(
        images=images,
        labels=read_labels(observation) if observation.count == 1 else None,
        objective=torch.tensor(
            [1.0 - number / among for number, among in counts], dtype=observation.dtype, device=device
        ),
        failed=failed,
        path="batched",
        findings={name: torch.tensor(own, device=device) for name, own in values.items()},
    )


def _stacked(found: Sequence[Tensor], observation: Observation) -> tuple[Tensor, Tensor]:
    """Return each trial's first images [T, C, H, W], or [T, B, C, H, W] of batches, and which trials [T] have none.

    Where a trial has fewer images than the others, or than the batch, the last ones are NaN.
    """
    most = observation.count or max(1, *(len(images) for images in found))
    rows = []
    for images in found:
        own = images[:most].to(observation.device, observation.dtype)
        rows.append(torch.cat([own, own.new_full((most - len(own), *observation.image_shape), torch.nan)]))
    images = torch.stack(rows)
    failed = torch.tensor([not len(images) for images in found], device=observation.device)
    return images[:, 0] if observation.count == 1 else images, failed


def _of_trial(observation: Observation, name: str, t: int) -> Tensor:
    """Return a public tensor of a trial in float64; raise Unsupported if the server does not know it."""
    value = observation.weights.get(name)
    if value is None:
        raise Unsupported(
            f"the crafted layer's {name!r} is not known to the server; use another defense or threat model"
        )
    return value[t if len(value) > 1 else 0].double()


def proved(
    observation: Observation, t: int, layer: PixelRows, images: Tensor, rows: Tensor, errors: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """Return which reconstructions [N] would give the errors that were observed, and with which labels [N].

    The error of an image at the crafted layer follows from the network for each label. If one of these is the error
    that was observed, the reconstruction is an image of the batch: a mixture of several fits none of them. No private
    image is needed. None is proved where errors cannot be computed: the network is not known completely, normalises
    over the batch, or draws; or the learning rate is not known.

    Args:
        observation: as the attack got it.
        t: the trial.
        layer: the crafted layer.
        images: [N, C, H, W].
        rows: [N], the row of the layer whose error each image has.
        errors: [N], these errors.
        batch: the number of the client's images; their loss is a mean. 0 if it is not known.
    """
    none = torch.zeros(len(images), dtype=torch.bool), torch.full((len(images),), -1)
    rate = 1.0 if observation.threat.shares == "gradient" else observation.threat.learning_rate
    mixed = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    unknown = any(isinstance(one, mixed) and one.training for one in observation.model.modules())
    if (
        not len(images)
        or not batch
        or rate is None
        or unknown
        or observation.secrets
        or observation.targets is not None
    ):
        return none
    own = tensors_of(observation.model)
    tensors = {}
    for name, like in own.items():
        value = observation.weights[name]
        tensors[name] = (value[t if len(value) > 1 else 0] if value.ndim > like.ndim else value).cpu()
    network = filled(observation.model, tensors, torch.float64)
    taken: list[Tensor] = []
    network.get_submodule(layer.layer).register_forward_hook(lambda _, __, output: taken.append(output))
    try:
        with torch.enable_grad():
            logits = network(images.detach().double().cpu().clone().requires_grad_())
    except Exception:  # of a network that does not run in float64
        return none
    size = 1.0 if observation.size is None else float(observation.size[t])
    wanted = errors.cpu() * batch * size / rate
    place = torch.arange(len(images))
    best, labels = torch.full((len(images),), torch.inf, dtype=torch.float64), none[1].clone()
    for label in range(observation.num_classes):
        loss = F.cross_entropy(logits, torch.full((len(images),), label), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, taken[0], retain_graph=True)
        own_error = gradient.detach().flatten(1)[place, rows.cpu()]
        difference = (own_error - wanted).abs() / wanted.abs().clamp(min=torch.finfo(torch.float64).tiny)
        labels = torch.where(difference < best, label, labels)
        best = torch.minimum(best, difference)
    rounding = (layer.least / errors.abs().cpu()).clamp(MIN_MATCH, MAX_MATCH)
    return best <= rounding, labels


def different(images: Tensor, order: Sequence[int]) -> tuple[list[int], Tensor]:
    """Return which images [N, C, H, W] to keep, in this order, so that no two are the same, and [N, N], which are."""
    flat = images.flatten(1)
    square = flat.square().sum(1)
    alike = ((square[:, None] + square - 2 * flat @ flat.T) / max(1, flat.shape[1]) <= SAME).cpu()
    chosen: list[int] = []
    for one in order:
        if not bool(alike[one, chosen].any()):
            chosen.append(one)
    return chosen, alike
