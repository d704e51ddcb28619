"""GRNN: train a generator until the image and the label that it makes have the observed gradient."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.base import register
from leakbench.attacks.doubling import doubled
from leakbench.attacks.matching import (
    Count,
    GradientMatching,
    MatchingObjective,
    NonNegative,
    Positive,
    root,
)
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient
from leakbench.gradients.bilinear import FromGaps, squared_distance
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns, descend
from leakbench.optim.rmsprop import EPS
from leakbench.optim.solvers import call, serves

WIDTH = 32
"""Channels before the last block; each block before it has twice as many."""

LATENT_WEIGHTS = ("first.weight", "label.weight")
"""The weights that are multiplied with the latent; their product with it is optimised (``latent_gain``)."""


@register("grnn")
@dataclass(frozen=True)
class GRNN(GradientMatching):
    """GRNN: trains a generator on a fixed latent (RMSprop); loss: squared distance, distance and squared TV.

    The objective is |g' - g|^2 + |g' - g| + tv TV. The generator of each trial is drawn anew, has one branch for the
    image and one for the soft label, and normalises its one image by that image's statistics. An image whose side is
    not a power of two is the centre of the next larger one. Instead of weights that are multiplied with the latent,
    their product is optimised, which is the same search (``latent_gain``). See GradientMatching for the options.

    Attributes:
        tv: the weight of the total variation, here that of squared differences; 1e-6 for ResNet-18 in the paper's code.
        latent: size of the latent; FedKL's scripts take 1024.
        wd: the second term: ``l2norm`` is what the released code computes under the name of a Wasserstein distance;
            ``wasserstein`` sorts the entries of both gradients first, as the name says (an extension).
    """

    reference: ClassVar[str] = "Ren et al. 2022, GRNN: Generative Regression Neural Network, ACM TIST (released code)"
    assumes: ClassVar[str] = "A network that can be differentiated twice; images of 32 to 256 pixels."
    cost: ClassVar[str] = (
        "One evaluation a step: 1,000 by default. Each trial has its own generator, whose weights take most of the "
        "memory."
    )
    fails: ClassVar[str] = "Small budgets leave smooth images; behind key-lock it is no better than the floors."
    steps: Count = 1000
    lr: Positive = 1e-4
    tv: NonNegative = 1e-3
    latent: Count = 128
    wd: Literal["l2norm", "wasserstein"] = "l2norm"

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return generators with torch's initial weights, without the label branch where the label is known."""
        classes = observation.num_classes if observation.labels is None else 0
        latent = self._latent(rng)
        start = {}
        for name, layer in layout(observation.image_shape, self.latent, classes).items():
            rows = []
            for own, generator in zip(latent, rng.generators(f"generator {name}")):
                drawn = layer.draw(generator)
                rows.append(torch.tensordot(own, drawn, 1) if name in LATENT_WEIGHTS else drawn)
            start[name] = torch.stack(rows).to(rng.device, observation.dtype)
        return start

    def render(self, unknowns: Unknowns, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Return what the generators make of the latents, cropped to the images' size."""
        images, logits = generate(unknowns)
        height, width = observation.image_shape[1:]
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width], logits

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance plus the distance."""
        squared = squared_distance(gradient, observed)
        return squared + root(squared if self.wd == "l2norm" else sorted_distance(gradient, observed))

    def distance_from(self, observed: Mapping[str, Tensor]) -> Callable[[Gradient], Tensor]:
        """Return ``distance`` from an observed gradient."""
        if self.wd != "l2norm":
            return super().distance_from(observed)
        return FromGaps(observed, lambda squares: squares.sum(0) + root(squares.sum(0)))

    def prior(self, images: Tensor) -> Tensor:
        """Return the weighted squared total variation."""
        return self.tv * squared_variation(images)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run RMSprop with momentum 0.99."""
        gain = latent_gain(self._latent(objective.rng).to(next(iter(start.values()))))
        return descend(
            objective,
            start,
            steps=self.steps,
            lr=dict.fromkeys(start, self.lr),
            rule="rmsprop",
            gain={name: gain for name in LATENT_WEIGHTS if name in start},
            compiled=objective.evaluator.path == "lanes",
            note=objective.observation.note,
        )

    def _latent(self, rng: Rng) -> Tensor:
        """Return [T, D], each trial's latent, from N(0, 1)."""
        return rng.normal("latent", (self.latent,)).cpu()


class Layer(NamedTuple):
    """The shape of a tensor of the generator, and its initial values: U(-bound, bound), or a constant if bound is 0."""

    shape: tuple[int, ...]
    bound: float = 0.0
    constant: float = 0.0

    def draw(self, rng: torch.Generator) -> Tensor:
        """Return a tensor of this shape."""
        if not self.bound:
            return torch.full(self.shape, self.constant)
        return torch.rand(self.shape, generator=rng).mul_(2 * self.bound).sub_(self.bound)


def layout(image_shape: tuple[int, int, int], latent: int, classes: int) -> dict[str, Layer]:
    """Return the generator's tensors by name, with torch's default initial values; without classes no label branch.

    The image branch is a transposed convolution from the latent to 4 x 4, then blocks that double the side until it
    is that of the image, or the next power of two. Kernels have their taps first.
    """
    channels, height, width = image_shape
    blocks = max(1, (max(height, width) - 1).bit_length() - 2)
    widths = [WIDTH * 2**block for block in reversed(range(blocks))]
    first = 2 * widths[0]  # a gated linear unit halves the channels
    bound = (first * 16) ** -0.5
    layers = {"first.weight": Layer((latent, first, 4, 4), bound), "first.bias": Layer((first,), bound)}
    for block, (inputs, outputs) in enumerate(zip(widths, [*widths[1:], channels])):
        layers[f"{block}.weight"] = Layer((3, 3, 2 * outputs, inputs), (inputs * 9) ** -0.5)
        layers[f"{block}.scale"] = Layer((2 * outputs,), constant=1.0)
        layers[f"{block}.shift"] = Layer((2 * outputs,))
    if classes:
        layers["label.weight"] = Layer((latent, classes), latent**-0.5)
        layers["label.bias"] = Layer((classes,), latent**-0.5)
    return layers


def generate(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return images [T, C, H, H] in (0, 1), and label logits [T, K] where there is a label branch.

    Args:
        weights: the tensors of ``layout``, each [T, *shape]; those of ``LATENT_WEIGHTS`` already multiplied by the
            latent.
    """
    x = F.glu(weights["first.weight"] + weights["first.bias"][..., None, None], 1)
    block = 0
    while f"{block}.weight" in weights:
        x = doubled(x, *(weights[f"{block}.{name}"] for name in ("weight", "scale", "shift")))
        block += 1
    logits = weights["label.weight"] + weights["label.bias"] if "label.weight" in weights else None
    return torch.sigmoid(x), logits


def latent_gain(latent: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how RMSprop on a layer's weights W moves the layer's values v W for a fixed latent v.

    With d the gradient by a value, that by a weight is v_i d, and the root of its mean square |v_i| r, r that of d. So
    where RMSprop adds v_i d / (|v_i| r + eps) to the momentum of each weight, it adds d sum_i v_i^2 / (|v_i| r + eps)
    to that of the value, which is all that the rest of the generator sees of the weights: the search is the same, and
    neither the weights nor their moments have to be kept.

    Args:
        latent: v [T, D].

    Returns:
        r [T, *shape] -> sum_i v_i^2 / (|v_i| r + eps), of the same shape.
    """
    size = latent.abs()
    eps = torch.tensor(EPS, dtype=torch.float64)
    offset = EPS / size  # infinite at zero, where the term is zero
    most = 2**18 if latent.device.type == "cpu" else 2**26  # values at a time: what a cache, or a GPU, holds easily

    def gain(root: Tensor) -> Tensor:
        if serves(root):
            out = torch.empty_like(root)
            call("gain", (root, size, out, eps), (root[0].numel(), latent.shape[1]), len(root))
            return out
        parts = root.flatten(1).split(max(1, most // latent.numel()), 1)
        sums = [torch.bmm(size[:, None], (part[:, None] + offset[..., None]).reciprocal_()) for part in parts]
        return torch.cat(sums, 2).view_as(root)

    return gain


def sorted_distance(gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: sum_k (g'_(k) - g_(k))^2 over the sorted entries of both gradients, N W_2^2 for N entries.

    W_2 is the Wasserstein distance between the distributions of the entries; sorting makes this no larger than the
    squared distance, in whose units it is.
    """
    own = torch.cat([gradient[name].flatten(1) for name in observed], 1).sort(1).values
    other = torch.cat([target.flatten(1) for target in observed.values()], 1).sort(1).values
    return (own - other).square().sum(1)


def squared_variation(x: Tensor) -> Tensor:
    """Return [T]: 2 (mean squared horizontal difference + mean squared vertical difference) of [T, C, H, W]."""
    across = (x[..., 1:] - x[..., :-1]).square().flatten(1).mean(1)
    down = (x[..., 1:, :] - x[..., :-1, :]).square().flatten(1).mean(1)
    return 2 * (across + down)
