"""Defenses of a client that sends its weights: noise on them, and small ones left out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.prune import Ratio, percentile
from leakbench.types import Gradient

Snapshots = Literal["both", "after"]
Bound = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OnWeights(Defense):
    """A defense that acts on each parameter tensor of the model that is sent; what the server sees is the update.

    Attributes:
        snapshots: ``both`` as released: the server compares two models that went through the defense, each with draws
            of its own; ``after``: it compares the second with the exact one that it handed out. Dummy gradients are
            taken at the exact weights in either case.
    """

    snapshots: Snapshots = "both"

    @abstractmethod
    def defended(self, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Return what is sent of one parameter tensor."""

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the update between two defended models; raise Unsupported where a gradient is sent."""
        trained = step.trained()
        sent = {}
        for name, weight in step.weights().items():
            before = self.defended(weight, rng) if self.snapshots == "both" else weight
            sent[name] = before - self.defended(trained[name], rng)
        return sent


@register("weight-noise")
@dataclass(frozen=True)
class WeightNoise(OnWeights):
    """Add noise to every weight that is sent, after each parameter tensor was clipped by the norms of its rows.

    With m the largest Euclidean norm over axis 1 of a tensor W (of all of it, for a vector) and
    phi = max(1, m / (clip + 1e-6)), W / phi + noise is sent. The released code multiplies that by phi again, which
    undoes the clipping and enlarges the noise. Clients that share weights only. See OnWeights for ``snapshots``.

    Attributes:
        scale: of the noise, in the weights' units: the standard deviation of Gaussian noise, the b of Laplace noise,
            whose standard deviation is b * sqrt(2).
        kind: ``gaussian`` or ``laplace``.
        clip: the largest norm of a row that is sent; none: tensors are not clipped.
        as_released: send phi (W / phi + noise), as the released code does.
    """

    reference: ClassVar[str] = "Zhao et al. 2022, Deep Leakage from Model in Federated Learning, arXiv 2206.04887"
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    kind: Literal["gaussian", "laplace"] = "gaussian"
    clip: Bound | None = 0.2
    as_released: bool = False
    snapshots: Snapshots = "both"

    def defended(self, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Return the tensor, clipped and with noise."""
        phi = self.divisor(weight)
        noisy = weight / phi + self._noise(weight, rng)
        return noisy * phi if self.as_released else noisy

    def divisor(self, weight: Tensor) -> float:
        """Return phi >= 1, by which a tensor is divided."""
        if self.clip is None:
            return 1.0
        norm = float(weight.norm() if weight.ndim < 2 else weight.norm(dim=1).max())
        return max(1.0, norm / (self.clip + 1e-6))

    def _noise(self, like: Tensor, rng: torch.Generator) -> Tensor:
        if self.kind == "gaussian":
            return self.scale * torch.randn(like.shape, generator=rng)
        # the difference of two exponentials of mean b is Laplace(b)
        first, second = (torch.empty(like.shape).exponential_(generator=rng) for _ in range(2))
        return self.scale * (first - second)


@register("weight-sparsify")
@dataclass(frozen=True)
class WeightSparsify(OnWeights):
    """Send zero for the weights of each parameter tensor whose magnitude is below the tensor's percentile.

    A weight w is sent where |w| >= t, with t the percentile 100 * ratio of the tensor's |w|. Clients that share weights
    only. See OnWeights for ``snapshots``.

    Attributes:
        ratio: the share of each tensor's entries that becomes zero.
    """

    reference: ClassVar[str] = "Zhao et al. 2022, Deep Leakage from Model in Federated Learning, arXiv 2206.04887"
    informed: ClassVar[str] = "matches the update where it is not zero"
    ratio: Ratio = 0.5
    snapshots: Snapshots = "both"

    def defended(self, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Return the tensor without its small entries; nothing is drawn."""
        return torch.where(weight.abs() < percentile(weight.abs(), self.ratio), 0.0, weight)

    def surrogate(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Gradient:
        """Return the dummy update with zeros where zeros were seen."""
        return {name: torch.where(observed[name] != 0, value, 0.0) for name, value in gradient.items()}
