"""Deep image prior: search the weights of an untrained network whose output is the image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from leakbench.attacks.adam import ig_milestones
from leakbench.attacks.base import register
from leakbench.attacks.doubling import convolve_doubled
from leakbench.attacks.ig import cosine_distance
from leakbench.attacks.matching import Count, GradientMatching, MatchingObjective, NonNegative, Positive
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient
from leakbench.gradients.intercept import batch_norm
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns, descend

DOUBLINGS = 2
"""How often the side of the noise is doubled: it is a quarter of the image's."""

NOISE = "noise"
"""The name of the network's fixed input among the unknowns; its step size is 0."""

SLOPE = 0.2
"""The slope of the leaky ReLU below 0."""


@register("dip")
@dataclass(frozen=True)
class DeepImagePrior(GradientMatching):
    """Deep image prior: the weights of an untrained network are searched (Adam), by the cosine distance of IG.

    The network takes fixed noise of a quarter of the image's side: two blocks that double it and one at full size, each
    a 3x3 convolution with batch normalisation and a leaky ReLU, and a last convolution with a sigmoid. Natural images
    are easier for it than noise, without training and without any other image. Each trial has weights and noise of its
    own. See GradientMatching for the options.

    Attributes:
        width: the channels of each block.
    """

    reference: ClassVar[str] = (
        "Ulyanov, Vedaldi and Lempitsky 2018, Deep Image Prior, CVPR, arXiv 1711.10925; with the distance of Geiping "
        "et al. 2020, Inverting Gradients"
    )
    assumes: ClassVar[str] = "A hard label, inferred from the last layer; a network that can be differentiated twice."
    cost: ClassVar[str] = "One evaluation and a pass of the generator a step: 2,000 by default."
    fails: ClassVar[str] = "Images that are not smooth; many steps fit noise on the gradient too."
    steps: Count = 2000
    lr: Positive = 0.01
    tv: NonNegative = 1e-4
    labels: Literal["joint", "analytic"] = "analytic"
    width: Count = 64

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return networks with torch's initial weights, their noise, and label logits if labels are optimised."""
        channels, height, width = observation.image_shape
        start = {}
        for name, shape in self._layout(channels).items():
            bound = (shape[-1] * 9) ** -0.5
            start[name] = (2 * rng.uniform(f"generator {name}", shape) - 1) * bound
        quarter = (self.width, -(-height // 2**DOUBLINGS), -(-width // 2**DOUBLINGS))
        start[NOISE] = rng.uniform(NOISE, quarter)
        if observation.labels is None:
            start["label"] = rng.normal("label", (observation.num_classes,))
        return {name: value.to(observation.dtype) for name, value in start.items()}

    def render(self, unknowns: Unknowns, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Return what the networks make of their noise, cropped to the images' size."""
        x = unknowns[NOISE]
        for block in range(DOUBLINGS):
            x = _normalised(convolve_doubled(x, unknowns[f"{block}.weight"]))
        x = _normalised(_convolved(x, unknowns["full.weight"]))
        images = torch.sigmoid(_convolved(x, unknowns["last.weight"]))
        height, width = observation.image_shape[1:]
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width], unknowns.get("label")

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the cosine distance."""
        return cosine_distance(gradient, observed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run Adam with IG's schedule; the noise stays as it is."""
        return descend(
            objective,
            start,
            steps=self.steps,
            lr=dict.fromkeys(start, self.lr) | {NOISE: 0.0},
            milestones=ig_milestones(self.steps),
            note=objective.observation.note,
        )

    def _layout(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the kernels, with their taps first."""
        inner = (3, 3, self.width, self.width)
        blocks = {f"{block}.weight": inner for block in range(DOUBLINGS)}
        return {**blocks, "full.weight": inner, "last.weight": (3, 3, channels, self.width)}


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Return the 3x3 convolution of images [T, C, H, W], padded by 1, with kernels [T, 3, 3, O, C] of their own."""
    trials, channels, height, width = x.shape
    kernel = weight.permute(0, 3, 4, 1, 2).flatten(0, 1)
    found = F.conv2d(x.reshape(1, trials * channels, height, width), kernel, padding=1, groups=trials)
    return found.view(trials, -1, height, width)


def _normalised(x: Tensor) -> Tensor:
    """Return features normalised by their own statistics, after a leaky ReLU."""
    return F.leaky_relu(batch_norm(x, None, None, None, None, training=True), SLOPE)
