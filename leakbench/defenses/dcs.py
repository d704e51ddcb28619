"""DCS: the gradient of a concealed image, which looks different and has a similar gradient, is mixed in."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.core.component import Count, NonNegative, Positive
from leakbench.core.types import Gradient, Normal, Secret, Uniform
from leakbench.defenses.adaptive import AdaptiveAttacker
from leakbench.defenses.base import Defense, Step, register

PIXEL = 0.25
"""The unit of distances between images, about the standard deviation of a pixel, by which the paper normalises."""

CONCEALED, CONCEALED_LABEL = "concealed", "concealed_label"
"""The tensors of the attacker's network that stand for a concealed image, and for the logits of its label."""


@register("dcs")
@dataclass(frozen=True)
class DCS(Defense):
    """DCS: mix in the gradient of a concealed image, optimised to look different and to have a similar gradient.

    The concealed image of a sensitive one x with label y starts at mix U[0, 1] + (1 - mix) x and gets another label z.
    Adam minimises 1 - cos(g(concealed), g(x)) + exp(-apart d) + alike |f(concealed) - f(x)| / |f(x)|, where g is the
    gradient of the loss, f the logits, and d the distance of the images in units of 0.25; it stops where d exceeds
    ``distance``. What is sent is the gradient of (L(batch) + mix L(concealed, z) + (1 - mix) L(concealed, y)) / 3, over
    2 for mix = 1. If that has a negative inner product with the gradient of the batch, this component is removed.

    Attributes:
        steps: of Adam; the paper takes 500 to 1,000.
        lr: its step size.
        mix: the weight of the other label, and of noise in the start.
        apart: the weight of the distance of the images.
        alike: the weight of the distance of the logits.
        distance: at which the search stops.
        sensitive: how many images of a batch are concealed, the first ones.
    """

    reference: ClassVar[str] = (
        "Wu, Hayat, Zhou and Harandi 2024, Concealing Sensitive Samples against Gradient Leakage in Federated "
        "Learning, AAAI, arXiv 2209.05724 (and released code, DCS-2)"
    )
    assumes: ClassVar[str] = "The attacker takes what was sent for the gradient of the private images only."
    cost: ClassVar[str] = "A search with second derivatives in every step of the training."
    fails: ClassVar[str] = (
        "Attackers who search for the concealed image beside the private one. Closed forms of a first linear layer "
        "separate the two as they separate a batch."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = False  # it runs the client's own network again and again
    steps: Count = 500
    lr: Positive = 0.1
    mix: Annotated[float, Field(gt=0, le=1)] = 0.7
    apart: NonNegative = 0.01
    alike: NonNegative = 0.01
    distance: Positive = 500.0
    sensitive: Count = 1

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the gradient of the batch and of the concealed images.

        Raises:
            Unsupported: the client shares weights.
        """
        gradient = {name: value[0] for name, value in step.by_part(1).items()}
        concealed, labels = self._concealed(step, rng)
        mixed = step.gradient_of(concealed, labels)
        sent = {name: (value + mixed[name]) / self._parts for name, value in gradient.items()}
        product = sum(float((sent[name] * value).sum()) for name, value in gradient.items())
        if product >= 0:
            return sent
        share = product / sum(float(value.square().sum()) for value in gradient.values())
        return {name: value - share * gradient[name] for name, value in sent.items()}

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who optimises the concealed image and its label together with the private image."""
        words = "optimises a concealed image and its label beside the private one, and matches the mixed gradient"
        return {"default": AdaptiveAttacker(words, relax_on=beside, loss=partial(mixed_loss, mix=self.mix))}

    @property
    def _parts(self) -> float:
        """What the sum of the losses is divided by."""
        return 2.0 if self.mix == 1 else 3.0

    def _concealed(self, step: Step, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the concealed images [N, C, H, W], and their labels as class probabilities [N, K]."""
        model, x = copy.deepcopy(step.model), step.images[: self.sensitive]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            logits = model(x)
        own = as_probabilities(step.labels[: self.sensitive], logits)
        shift = torch.randint(1, max(2, logits.shape[1]), (len(x),), generator=rng).to(x.device)
        other = F.one_hot((own.argmax(1) + shift) % logits.shape[1], logits.shape[1]).to(own)
        target = torch.autograd.grad(self.loss(model, x, own).mean(), parameters, allow_unused=True)
        noise = torch.rand(x.shape, generator=rng).to(x)
        found = (self.mix * noise + (1 - self.mix) * x).requires_grad_()
        adam = torch.optim.Adam([found], self.lr)
        for number in range(self.steps):
            for part in (2.667, 1.6, 1.142):
                if number == int(self.steps / part):
                    adam.param_groups[0]["lr"] *= 0.1
            loss = self.loss(model, found, other).mean()
            gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            pairs = [(a, b) for a, b in zip(gradient, target) if a is not None and b is not None]
            product, *sizes = (
                torch.stack([(pair[i] * pair[j]).sum() for pair in pairs]).sum() for i, j in ((0, 1), (0, 0), (1, 1))
            )
            cosine = product / (sizes[0].sqrt() * sizes[1].sqrt()).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
            apart = (found - x).flatten(1).norm(dim=1).mean() / PIXEL
            alike = ((model(found) - logits).norm(dim=1) / logits.norm(dim=1).clamp(min=1e-12)).mean()
            objective = 1 - cosine + torch.exp(-self.apart * apart) + self.alike * alike
            (found.grad,) = torch.autograd.grad(objective, [found])
            adam.step()
            if float(apart.detach()) > self.distance:
                break
        return found.detach(), self.mix * other + (1 - self.mix) * own


def as_probabilities(labels: Tensor, logits: Tensor) -> Tensor:
    """Return labels [N], or class probabilities [N, K], as class probabilities of the type of the logits [N, K]."""
    return (labels if labels.is_floating_point() else F.one_hot(labels, logits.shape[1])).to(logits)


def beside(
    model: nn.Module, hidden: Collection[str], image_shape: tuple[int, int, int], classes: int
) -> tuple[nn.Module, tuple[Secret, ...]]:
    """Return the network with a concealed image and the logits of its label, from U[0, 1) and N(0, 1)."""
    own = copy.deepcopy(model)
    own.register_buffer(CONCEALED, torch.zeros(image_shape, device="meta"))
    own.register_buffer(CONCEALED_LABEL, torch.zeros(classes, device="meta"))
    return own, (Secret(CONCEALED, CONCEALED, Uniform()), Secret(CONCEALED_LABEL, CONCEALED, Normal()))


def mixed_loss(model: nn.Module, x: Tensor, y: Tensor, mix: float) -> Tensor:
    """Return [T], the loss whose gradient DCS sends of images x [T, C, H, W], labels y, and the concealed images."""
    logits = model(x)
    concealed = model.get_buffer(CONCEALED).expand_as(x)
    own = as_probabilities(y, logits)
    other = torch.softmax(model.get_buffer(CONCEALED_LABEL), -1).expand_as(own)
    mixed = F.cross_entropy(model(concealed), mix * other + (1 - mix) * own, reduction="none")
    return (F.cross_entropy(logits, own, reduction="none") + mixed) / (2.0 if mix == 1 else 3.0)
