"""The attacks as one would write them for a single image, in plain torch: an ordinary network and a torch optimiser.

Nothing here is batched over trials, and nothing is slower than it has to be: the second derivative is taken by the
unknowns alone, what does not change is computed once, and no value is fetched from the device inside a loop that can
do without. Tests hold each loop against leakbench in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Found:
    """What an attack ends with.

    Attributes:
        image: [1, C, H, W], of any range.
        evaluations: how often objective and gradient were computed.
        diverged: they became non-finite, or the gradient is no closer than at the start.
    """

    image: Tensor
    evaluations: int
    diverged: bool


def ig(
    network: nn.Module,
    observed: Sequence[Tensor],
    label: Tensor,
    start: Tensor,
    *,
    steps: int,
    tv: float = 1e-4,
    lr: float = 0.1,
) -> Found:
    """Inverting Gradients: signed Adam on the cosine distance plus total variation, boxed to [0, 1].

    Args:
        network: maps [1, C, H, W] in [0, 1] to logits; used in its mode.
        observed: the gradient to match, one tensor a parameter, in their order.
        label: [1] int64.
        start: [1, C, H, W].
        steps: iterations.
        tv: the weight of the total variation.
        lr: Adam's step size, which falls tenfold after 3/8, 5/8 and 7/8 of the steps.
    """
    parameters = list(network.parameters())
    target = torch.cat([value.flatten() for value in observed])
    target = target / target.norm()

    def distance(image: Tensor) -> Tensor:
        loss = F.cross_entropy(network(image), label)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([value.flatten() for value in gradient])
        return 1 - torch.dot(flat, target) / flat.norm()

    image = start.clone().requires_grad_()
    begun = distance(image).detach()
    optimiser = torch.optim.Adam([image], lr=lr)
    milestones = [step for part in (2.667, 1.6, 1.142) if (step := int(steps / part))]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
    for _ in range(steps):
        objective = distance(image) + tv * _variation(image)
        (gradient,) = torch.autograd.grad(objective, image)
        image.grad = gradient.sign()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            image.clamp_(0, 1)
    diverged = not bool(distance(image) < begun)
    return Found(image.detach(), steps + 2, diverged)


def dlg(
    network: nn.Module, observed: Sequence[Tensor], start: Tensor, start_label: Tensor, *, steps: int, lr: float = 1.0
) -> Found:
    """Deep Leakage from Gradients: L-BFGS over image and label logits on the squared distance between gradients.

    The search ends after ``steps`` outer steps of up to twenty iterations, when the objective is no longer finite, and
    when an outer step can no longer move.

    Args:
        network: see ``ig``.
        observed: see ``ig``.
        start: [1, C, H, W].
        start_label: [1, K], label logits.
        steps: outer steps.
        lr: the length of a step.
    """
    parameters = list(network.parameters())

    def distance(image: Tensor, logits: Tensor) -> Tensor:
        loss = F.cross_entropy(network(image), torch.softmax(logits, 1))
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        return sum(((value - target).square().sum() for value, target in zip(gradient, observed)), loss.new_zeros(()))

    image, logits = start.clone().requires_grad_(), start_label.clone().requires_grad_()
    begun = distance(image, logits).detach()
    optimiser = torch.optim.LBFGS([image, logits], lr=lr, max_iter=20, history_size=100)

    def closure() -> Tensor:
        objective = distance(image, logits)
        image.grad, logits.grad = torch.autograd.grad(objective, (image, logits))
        return objective.detach()

    evaluations = 0
    for _ in range(steps):
        value = float(optimiser.step(closure))
        spent, evaluations = evaluations, optimiser.state[image]["func_evals"]
        if not math.isfinite(value) or evaluations - spent == 1:
            break
    diverged = not bool(distance(image, logits) < begun)
    return Found(image.detach(), evaluations + 2, diverged)


class Generator(nn.Module):
    """GRNN's generator for images [1, C, S, S] and their soft labels, S a power of two of at least 8."""

    def __init__(self, latent: int, channels: int, side: int, classes: int) -> None:
        super().__init__()
        widths = [32 * 2**block for block in reversed(range(int(math.log2(side)) - 2))]
        self.first = nn.ConvTranspose2d(latent, 2 * widths[0], 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(inputs, 2 * outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(2 * outputs, track_running_stats=False),
                nn.GLU(1),
            )
            for inputs, outputs in zip(widths, [*widths[1:], channels])
        )
        self.label = nn.Linear(latent, classes)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image in (0, 1) and label logits [1, K] for a latent [1, D]."""
        x = F.glu(self.first(latent[..., None, None]), 1)
        for block in self.blocks:
            x = block(x)
        return torch.sigmoid(x), self.label(latent)


def grnn(
    network: nn.Module,
    observed: Sequence[Tensor],
    generator: Generator,
    latent: Tensor,
    *,
    steps: int,
    tv: float = 1e-3,
    lr: float = 1e-4,
) -> Found:
    """GRNN: RMSprop on a generator's weights, on squared distance, distance and squared total variation.

    Args:
        network: see ``ig``.
        observed: see ``ig``.
        generator: what is trained, in place.
        latent: [1, D].
        steps: iterations.
        tv: the weight of the total variation.
        lr: the step size.
    """
    parameters, weights = list(network.parameters()), list(generator.parameters())

    def render() -> tuple[Tensor, Tensor]:
        image, logits = generator(latent)
        loss = F.cross_entropy(network(image), torch.softmax(logits, 1))
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        squared = sum(
            ((value - target).square().sum() for value, target in zip(gradient, observed)), loss.new_zeros(())
        )
        return image, squared

    begun = render()[1].detach()
    optimiser = torch.optim.RMSprop(weights, lr=lr, alpha=0.99, momentum=0.99)
    for _ in range(steps):
        image, squared = render()
        objective = squared + squared.sqrt() + tv * _squared_variation(image)
        for weight, gradient in zip(weights, torch.autograd.grad(objective, weights)):
            weight.grad = gradient
        optimiser.step()
    image, squared = render()
    return Found(image.detach(), steps + 2, not bool(squared < begun))


def _variation(x: Tensor) -> Tensor:
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def _squared_variation(x: Tensor) -> Tensor:
    across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return 2 * (across.square().mean() + down.square().mean())
