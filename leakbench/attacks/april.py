"""April: images from the gradients of a position embedding and of the attention behind it, solved for or searched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from leakbench.attacks.adam import AdamSearch, adam
from leakbench.attacks.base import Attack, register
from leakbench.attacks.ig import cosine_distance
from leakbench.attacks.matching import Count, MatchingObjective, NonNegative, analytic_labels
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient, Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.bilinear import squared_norm
from leakbench.models.vit import VisionTransformer
from leakbench.observation import Observation
from leakbench.optim import Solution, Unknowns

ATTENTION = "blocks.0.attention"
"""The name of the first attention."""
POSITION = "position"
"""The name of the position embedding."""


@register("april")
@dataclass(frozen=True)
class April(Attack):
    """April: the tokens z behind a position embedding solve a linear system that the shared gradient gives.

    With queries W_q z, keys W_k z and values W_v z, and nothing between z and the attention, the gradient of z is that
    of the position embedding, G, and G^T z = W_q^T dL/dW_q + W_k^T dL/dW_k + W_v^T dL/dW_v. It is solved by least
    squares in float64, and the patches of pixels from z likewise. The class token, which is known, tells whether the
    solution is right: the objective is its relative error.
    """

    reference: ClassVar[str] = (
        "Lu, Zhang, Zhao, He and Cheng 2022, APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers, "
        "CVPR, arXiv 2112.14087 (the closed form)"
    )
    assumes: ClassVar[str] = (
        "A position embedding that is trained and added right before an attention, without a normalisation or a skip "
        "connection between (vit(first=bare)); one image; tokens at least as wide as there are of them, and as a patch "
        "has values; weights so large that the tokens do not all get the same attention."
    )
    cost: ClassVar[str] = "Two least squares: milliseconds."
    fails: ClassVar[str] = (
        "Standard transformers, whose first attention is behind a layer normalisation and beside a skip connection; "
        "batches; noise, which the least squares magnify."
    )
    updates: ClassVar[bool] = True

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if the network has no such attention, or its gradients were not sent."""
        _parts(observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the image of every trial; draws nothing."""
        images, errors = [], []
        sent, known = _parts(observation)
        for t in range(observation.trials):
            position, token = known(POSITION, t)[0], known("token", t)[0, 0]
            products = [_product(sent, known, name, t) for name in ("query", "key", "value")]
            tokens = torch.linalg.pinv(sent(POSITION, t)[0].T) @ torch.stack(products).sum(0)  # [N + 1, D]
            expected = token + position[0]
            errors.append(float((tokens[0] - expected).norm() / expected.norm()))
            kernel, bias = known("patches.weight", t), known("patches.bias", t)
            pixels = torch.linalg.pinv(kernel.flatten(1)) @ (tokens[1:] - position[1:] - bias).T  # [C p p, N]
            _, channels, side, _ = kernel.shape
            height, width = (size // side for size in observation.image_shape[1:])
            grid = pixels.view(channels, side, side, height, width)
            images.append(grid.permute(0, 3, 1, 4, 2).reshape(observation.image_shape))
        return Reconstruction(
            images=torch.stack(images).to(observation.device, observation.dtype),
            labels=analytic_labels(observation),
            objective=torch.tensor(errors, device=observation.device, dtype=observation.dtype),
            path="batched",
        )


@register("april-search")
@dataclass(frozen=True)
class AprilSearch(AdamSearch):
    """April's search: Adam on the squared distance of gradients and on the angle of the position embedding's gradient.

    Minimised is |g' - g|^2 / |g|^2 + angle (1 - cos(p', p)) + tv TV, where p is the part of the gradient g that belongs
    to the position embedding. Unlike the closed form it needs no bare attention, and serves batches. The paper's
    distance is absolute; a relative one serves networks of any size. See GradientMatching for the options.

    Attributes:
        angle: the weight of the cosine distance of the position embedding's gradient.
        signed: update by the sign of the gradient; unsigned Adam otherwise.
    """

    reference: ClassVar[str] = (
        "Lu, Zhang, Zhao, He and Cheng 2022, APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers, "
        "CVPR, arXiv 2112.14087 (the search)"
    )
    assumes: ClassVar[str] = "A transformer whose position embedding is trained; a hard label, inferred from the head."
    cost: ClassVar[str] = "One evaluation a step: 2,000 by default."
    fails: ClassVar[str] = "Noise, and defenses that do not send the gradient of the position embedding."
    per_tensor: ClassVar[bool] = True
    steps: Count = 2000
    tv: NonNegative = 1e-4
    angle: NonNegative = 1.0
    signed: bool = True

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if the network has no position embedding, or its gradient was not sent."""
        _transformer(self.name, observation)
        super().check(observation)

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the relative squared distance, and the weighted cosine distance of the position embedding's part."""
        errors = torch.stack([squared_norm(gradient[name] - target) for name, target in observed.items()]).sum(0)
        whole = torch.stack([squared_norm(target) for target in observed.values()]).sum(0)
        position = {POSITION: observed[POSITION]} if POSITION in observed else {}
        return errors / whole + (self.angle * cosine_distance(gradient, position) if position else 0.0)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run Adam within [0, 1]."""
        return adam(objective, start, self.steps, self.lr, signed=self.signed)


Tensors = Callable[[str, int], Tensor]


def _product(sent: Tensors, known: Tensors, name: str, trial: int) -> Tensor:
    """Return W^T dL/dW [D, D] of one of the attention's layers."""
    layer = f"{ATTENTION}.{name}.weight"
    return known(layer, trial).T @ sent(layer, trial)


def _transformer(attack: str, observation: Observation) -> VisionTransformer:
    """Return the network of an observation that has the gradient of its position embedding; raise Unsupported."""
    if not isinstance(observation.model, VisionTransformer):
        raise Unsupported(f"{attack} needs a network with a position embedding before its attention; use model=vit")
    _require(attack, observation, POSITION)
    return observation.model


def _require(attack: str, observation: Observation, name: str) -> None:
    """Raise Unsupported if the gradient of a parameter was not sent."""
    if name not in observation.gradient:
        raise Unsupported(f"{attack} needs the gradient of {name!r}, and it was not sent; use another defense")


def _parts(observation: Observation) -> tuple[Tensors, Tensors]:
    """Return what was sent of the network and what is known of it by name and trial, in float64 on the CPU.

    Raises:
        Unsupported: it is no such transformer, or what is needed was not sent.
    """
    model = _transformer("april", observation)
    if not model.blocks[0].bare:
        raise Unsupported(
            "the first attention is behind a normalisation and beside a skip connection, and april needs neither; use "
            "vit(first=bare)"
        )
    if not isinstance(model.patches, nn.Conv2d):
        raise Unsupported("the defense puts a layer behind the patches, and april solves for what the patches are")
    count, width = model.position.shape[1:]
    patch = model.patches.weight[0].numel()
    if width < max(count, patch):
        raise Unsupported(
            f"april needs tokens of width {max(count, patch)} for {count} tokens and patches of {patch} values, and "
            f"those of this vit have {width}; use a wider one"
        )
    for name in ("query", "key", "value"):
        _require("april", observation, f"{ATTENTION}.{name}.weight")

    def sent(name: str, trial: int) -> Tensor:
        return observation.gradient[name][trial].detach().cpu().double()

    def known(name: str, trial: int) -> Tensor:
        return observation.weights[name][trial].detach().cpu().double()

    return sent, known
