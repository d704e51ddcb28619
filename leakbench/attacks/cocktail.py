"""The cocktail party attack: independent component analysis separates the images of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.base import Attack, check_images, register
from leakbench.attacks.disaggregate import LayerChange, layer_changes
from leakbench.core.component import Count, NonNegative, Positive
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.gradients.low_rank import largest_rank
from leakbench.observation import Observation

GAUSSIAN = 0.37456720749
"""The mean of log cosh of a standard normal variable."""

SHARPNESS = 12.0
"""How steeply two rows of the unmixing matrix repel each other as they become parallel."""

INSIDE = 0.05
"""Pixels of a reconstruction may lie this far outside of [0, 1]."""


@register("cocktail")
@dataclass(frozen=True)
class CocktailParty(Attack):
    """The images of a batch from the first linear layer's gradient, by independent component analysis.

    The gradient is E X with the images as rows of X, so that the B images are combinations of its B leading right
    singular vectors. Adam looks for the combinations, of unit variance, that are least like Gaussian noise, smooth, and
    not parallel: minimised is the mean over images of -(mean log cosh x_i - 0.3746)^2 / 0.3746^2 + tv TV(x_i) + box
    O(x_i), plus apart mean_ij (exp(12 |cos_ij|) - 1) / exp(12). The gradient of the bias gives the size and sign of
    each image, which the analysis leaves open: its entries are the same errors E, of inputs that are 1. So O, by how
    much pixels are outside of [0, 1], counts too. Without the bias an image is scaled to [0, 1] at the end. No
    activation is needed, and no exact zeros.

    Attributes:
        steps: of Adam.
        lr: its step size.
        tv: the weight of the total variation.
        apart: the weight of the repulsion of parallel rows.
        box: the weight of pixels outside of [0, 1], relative to the spread of an image.
        restarts: independent starts; the one with the lowest objective is returned.
    """

    reference: ClassVar[str] = (
        "Kariyappa, Guo, Maeng, Xiong, Suh, Qureshi and Lee 2023, Cocktail Party Attack: Breaking Aggregation-Based "
        "Privacy in Federated Learning Using Independent Component Analysis, ICML, arXiv 2209.05578; sizes, signs and "
        "bounds by the bias are this package's own"
    )
    assumes: ClassVar[str] = (
        "A linear layer that takes the pixels and has more units than there are images, of any activation; images that "
        "are independent of each other; SGD."
    )
    cost: ClassVar[str] = "A product of B x B with B x pixels a step: seconds to a minute for each client."
    fails: ClassVar[str] = (
        "Images that are alike, which no combination tells apart; large batches of small images, which have few pixels "
        "for B^2 unknowns; noise. Features below the layer are separated, not the images: convolutions are not served."
    )
    batches: ClassVar[bool] = True
    updates: ClassVar[bool] = True
    steps: Count = 2000
    lr: Positive = 0.02
    tv: NonNegative = 1.0
    apart: NonNegative = 1.5
    box: NonNegative = 50.0
    restarts: Count = 1

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if no linear layer takes the pixels, it is too small, or its gradient was not sent."""
        _separable(observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the images of every trial, those with the most pixels in [0, 1] first."""
        each = _separable(observation)
        counts = [observation.count or one.shown.rank for one in each]
        reasons = [_reason(one, count) for one, count in zip(each, counts)]
        height, width = observation.image_shape[1:]
        found = []
        for row, (one, count) in enumerate(zip(each, counts)):
            if reasons[row]:
                found.append((torch.zeros(0, *observation.image_shape), math.nan))
                continue
            runs = [
                self._separated(one, count, (height, width), rng.fork(f"restart {number}").generators("rows")[row])
                for number in range(self.restarts)
            ]
            pixels, objective = min(runs, key=lambda run: run[1])
            found.append((pixels.view(-1, *observation.image_shape), objective))
        most = observation.count or max(1, *(len(images) for images, _ in found))
        images = torch.full((len(each), most, *observation.image_shape), torch.nan)
        for row, (own, _) in enumerate(found):
            images[row, : len(own)] = own[:most].float()
        device, kind = observation.device, observation.dtype
        inside = torch.tensor([_inside(own) for own, _ in found], device=device)
        return Reconstruction(
            images=(images if observation.places else images[:, 0]).to(device, kind),
            objective=torch.tensor([objective for _, objective in found], device=device, dtype=kind),
            failed=torch.tensor([bool(reason) for reason in reasons], device=device),
            reasons=tuple(reasons),
            path="one-at-a-time",
            findings={
                "inputs": torch.tensor([float(one.shown.rank) for one in each], device=device),
                "inside": inside,
            },
        )

    def _separated(
        self, layer: LayerChange, count: int, size: Sequence[int], rng: torch.Generator
    ) -> tuple[Tensor, float]:
        """Return the images [B, pixels] in the range of the pixels, and the objective of their unmixing."""
        left, sizes, rows = torch.linalg.svd(layer.change, full_matrices=False)
        rows = layer.pixels(rows[:count], shifted=False)  # [B, pixels], in the order of the pixels
        centred = rows - rows.mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh(centred @ centred.T / rows.shape[1])
        whitening = vectors / values.clamp(min=values.max() * 1e-12).sqrt()
        mixture = _Mixture(whitening.T @ centred, whitening.T @ rows, None, layer.bounds, size)
        if layer.errors is not None:  # the errors are the same combinations of ones
            share = (left[:, :count].T @ layer.errors) / sizes[:count]
            mixture = replace(mixture, ones=whitening.T @ share)
        unmixing = torch.linalg.qr(torch.randn(count, count, generator=rng, dtype=rows.dtype))[0].requires_grad_()
        adam = torch.optim.Adam([unmixing], self.lr)
        milestones = [int(self.steps / part) for part in (1.6, 1.142)]
        value = torch.zeros(())
        for step in range(self.steps):
            if step in milestones:
                adam.param_groups[0]["lr"] *= 0.3
            value = self._objective(unmixing, mixture)
            (unmixing.grad,) = torch.autograd.grad(value, [unmixing])
            adam.step()
        weights = F.normalize(unmixing.detach(), dim=1)
        images = layer.scaled(weights @ mixture.raw, None if mixture.ones is None else weights @ mixture.ones)
        order = ((images > -INSIDE) & (images < 1 + INSIDE)).double().mean(1).argsort(descending=True, stable=True)
        return images[order], float(value.detach())

    def _objective(self, unmixing: Tensor, mixture: _Mixture) -> Tensor:
        unit = F.normalize(unmixing, dim=1)
        sources = unit @ mixture.white
        magnitude = sources.abs()
        contrast = (magnitude + torch.log1p(torch.exp(-2 * magnitude))).mean(1) - math.log(2) - GAUSSIAN
        planes = sources.view(len(sources), -1, *mixture.size)
        roughness = (planes[..., 1:] - planes[..., :-1]).abs().flatten(1).mean(1)
        roughness = roughness + (planes[..., 1:, :] - planes[..., :-1, :]).abs().flatten(1).mean(1)
        each = -(contrast / GAUSSIAN).square() + self.tv * roughness
        if mixture.ones is not None and self.box:
            low, high = (bound * (unit @ mixture.ones)[:, None] for bound in mixture.bounds)
            raw = unit @ mixture.raw
            outside = (torch.minimum(low, high) - raw).relu() + (raw - torch.maximum(low, high)).relu()
            each = each + self.box * outside.mean(1)
        cosines = (unit @ unit.T - torch.eye(len(unit), dtype=unit.dtype)).abs()
        repulsion = (torch.expm1(SHARPNESS * cosines) / math.exp(SHARPNESS)).sum() / max(1, len(unit))
        return each.mean() + self.apart * repulsion


@dataclass(frozen=True)
class _Mixture:
    """What the images of a client are unmixed from.

    Attributes:
        white: [B, pixels], combinations of the images without their means, uncorrelated and of unit variance.
        raw: [B, pixels], the same combinations with their means.
        ones: [B], the same combinations of ones; None if the bias was not sent.
        bounds: [pixels] each, the smallest and largest value of an image in the units of ``raw``.
        size: (H, W).
    """

    white: Tensor
    raw: Tensor
    ones: Tensor | None
    bounds: tuple[Tensor, Tensor]
    size: Sequence[int]


def _separable(observation: Observation) -> list[LayerChange]:
    """Return ``layer_changes``; raise Unsupported if the layer is too small for a client's images, too."""
    found = layer_changes(observation, bias=False)
    most = largest_rank(*found[0].change.shape)
    check_images(observation, most, f"cocktail {found[0].limits(most)}")
    return found


def _reason(layer: LayerChange, count: int) -> str:
    """Return why the images of a layer cannot be separated; empty if they can."""
    rank = layer.shown.rank
    if not layer.shown.low or not rank:
        return f"the change of {layer.name} is not of low rank: Adam, or noise"
    return "" if rank == count else f"{layer.name} shows {rank} different inputs, not {count}"


def _inside(images: Tensor) -> float:
    """Return the share of pixels in [0, 1]; 0 without images."""
    if not images.numel():
        return 0.0
    return float(((images > -INSIDE) & (images < 1 + INSIDE)).double().mean())
