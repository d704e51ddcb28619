"""CENSOR: a random direction in place of the gradient, orthogonal to it, of which several are tried."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.core.component import Count, Positive
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register

TOLERANCE = 1e-3
"""The relative error up to which the attacker takes a norm for equal, and the cosine up to which for orthogonal."""


@register("censor")
@dataclass(frozen=True)
class Censor(Defense):
    """CENSOR: send, in place of each gradient tensor, a random direction orthogonal to it, of the tensor's norm.

    With g a tensor of the gradient and r a random unit vector of its shape, r - (r.g / |g|^2) g is sent, scaled to the
    norm |g|. Of several draws for the whole network the one is sent that lowers the client's loss most.

    The first-order change of the loss along an orthogonal direction is zero. The released code subtracts (r.g / |g|) g
    instead, which is orthogonal only for |g| = 1, so that the draws differ in how far they descend
    (``projection=released``).

    Attributes:
        samples: how many draws are tried.
        rate: the step by which the loss of a draw is computed, in the network's eval mode.
        projection: ``orthogonal``, as the paper has it, or ``released``, as its code has it.
    """

    reference: ClassVar[str] = (
        "Zhang, Cheng, Shen, Ribeiro, An, Chen, Zhang and Li 2025, CENSOR: Defense Against Gradient Inversion via "
        "Orthogonal Subspace Bayesian Sampling, NDSS, arXiv 2501.15718 (and released code)"
    )
    assumes: ClassVar[str] = "Many more parameters than a search can use; networks that learn from random directions."
    cost: ClassVar[str] = "A pass for each draw, and accuracy: what is sent is orthogonal to the gradient."
    fails: ClassVar[str] = (
        "With projection=released, tensors whose norm is far from 1 keep a component along their gradient. The norm of "
        "each tensor is sent exactly."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = False  # it runs the client's own network again and again
    samples: Count = 20
    rate: Positive = 1e-4
    projection: Literal["orthogonal", "released"] = "orthogonal"

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the draw with the lowest loss."""
        gradient, network = step.gradient(), copy.deepcopy(step.model).eval()
        own = {name: parameter for name, parameter in network.named_parameters() if name in gradient}
        before = {name: parameter.detach().clone() for name, parameter in own.items()}
        best, lowest = {name: self._drawn(value, rng) for name, value in gradient.items()}, math.inf
        for draw in range(self.samples):
            tried = best if not draw else {name: self._drawn(value, rng) for name, value in gradient.items()}
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(before[name] - self.rate * tried[name].to(parameter))
                loss = float(self.loss(network, step.images, step.labels).mean())
            if loss < lowest:
                best, lowest = tried, loss
        return best

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who weighs what was sent by its density, given the dummy gradient."""
        words = "asks for the norm of each tensor, and weighs the direction by its density given the dummy gradient"
        return {"default": AdaptiveAttacker(words, likelihood=self._likelihood, batched=True)}

    def _drawn(self, value: Tensor, rng: torch.Generator) -> Tensor:
        """Return a random tensor without its component along ``value``, of the norm of ``value``."""
        size = value.norm()
        random = torch.randn(value.shape, generator=rng).to(value)
        random = random / random.norm().clamp(min=torch.finfo(value.dtype).tiny)
        along = (random * value).sum() / (size.square() if self.projection == "orthogonal" else size)
        left = random - torch.nan_to_num(along) * value
        return left * (size / left.norm().clamp(min=torch.finfo(value.dtype).tiny))

    def _likelihood(self, gradient: Gradient, observed: Observed, weights: Weights) -> Tensor:
        """Return [T], the sum over tensors of -log p(direction | gradient), and of errors of the norm.

        A unit vector r without its component along g has, as a direction, an angular central Gaussian density, with
        the inverse covariance 1 + (1 / (1 - |g|)^2 - 1) g g^T / |g|^2 for the released code; |g| is known.
        """
        errors = []
        for name, value in observed.items():
            dummy, sent = gradient[name].flatten(1), value.flatten(1)
            tiny = torch.finfo(value.dtype).tiny
            size, known = dummy.norm(dim=1), sent.norm(dim=1)
            cosine = (dummy * sent).sum(1) / (size * known).clamp(min=tiny**0.5)
            errors.append(((size / known.clamp(min=tiny) - 1) / TOLERANCE).square())
            if self.projection == "orthogonal":
                errors.append((cosine / TOLERANCE).square())
            else:
                inverse = 1 / (1 - known).square().clamp(min=TOLERANCE**2) - 1
                errors.append(dummy.shape[1] / 2 * torch.log1p((inverse * cosine.square()).clamp(min=TOLERANCE - 1)))
        return torch.stack(errors).sum(0)
