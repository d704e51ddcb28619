"""Defenses of a client that sends its weights: noise on them, and small ones left out."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.core.component import NonNegative, Positive
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.noise import NoiseKind, drawn, smooth_abs
from leakbench.defenses.prune import Ratio, sparse
from leakbench.gradients.bilinear import shared

Snapshots = Literal["both", "after"]


class WeightDefense(Defense):
    """A defense that acts on each parameter tensor of the model that is sent; what the server sees is the update.

    In training, where clients get the exact model and send their own back, it acts only on the second.

    Attributes:
        snapshots: ``both`` as released: the server compares two models that went through the defense, each with draws
            of its own; ``after``: it compares the second with the exact one that it handed out. Dummy gradients are
            taken at the exact weights in either case; of the models that are compared, an attacker has the difference.
    """

    batched: ClassVar[bool] = True

    snapshots: Snapshots = "both"

    @abstractmethod
    def defended(self, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Return what is sent of one parameter tensor."""

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the update between two defended models; raise Unsupported if a gradient is sent."""
        return self._between(step, rng, self.snapshots == "both")

    def reply(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the exact model less the defended one; raise Unsupported if a gradient is sent."""
        return self._between(step, rng, False)

    def _between(self, step: Step, rng: torch.Generator, both: bool) -> Gradient:
        trained = step.trained()
        sent = {}
        for name, weight in step.weights().items():
            before = self.defended(weight, rng) if both else weight
            sent[name] = before - self.defended(trained[name], rng)
        return sent


@register("weight-noise")
@dataclass(frozen=True)
class WeightNoise(WeightDefense):
    """Add noise to every weight that is sent, after each parameter tensor was clipped by the norms of its rows.

    With m the largest Euclidean norm over axis 1 of a tensor W (of all of it, for a vector) and
    phi = max(1, m / (clip + 1e-6)), W / phi + noise is sent. The released code multiplies that by phi again, which
    undoes the clipping and enlarges the noise. Clients that share weights only. See WeightDefense for ``snapshots``.

    Attributes:
        scale: of the noise, in the weights' units: the standard deviation of Gaussian noise, the b of Laplace noise,
            whose standard deviation is b * sqrt(2).
        kind: ``gaussian`` or ``laplace``.
        clip: the largest norm of a row that is sent; none: tensors are not clipped.
        as_released: send phi (W / phi + noise), as the released code does.
    """

    joint: ClassVar[bool] = True
    version: ClassVar[int] = 3  # 3: adaptive attackers weigh the prior with the likelihood
    reference: ClassVar[str] = "Zhao et al. 2022, Deep Leakage from Model in Federated Learning, arXiv 2206.04887"
    assumes: ClassVar[str] = "The attacker does not model the noise and the clipping."
    cost: ClassVar[str] = (
        "Accuracy, if the noise is large compared with the change of the weights in a round of training."
    )
    fails: ClassVar[str] = (
        "Noise below the size of the update; the clipping by itself hides nothing from an attacker who models it."
    )
    scale: NonNegative = 1e-3
    kind: NoiseKind = "gaussian"
    clip: Positive | None = 0.2
    as_released: bool = False
    snapshots: Snapshots = "both"

    def defended(self, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Return the tensor, clipped and with noise."""
        phi = self._divisor(weight[None])[0]
        noisy = weight / phi + self.scale * drawn(self.kind, weight.shape, rng)
        return noisy * phi if self.as_released else noisy

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who models clipping and noise."""
        attacker = AdaptiveAttacker(
            "also clips the dummy's weights, and weighs an error by the distribution of the models' noise",
            surrogate=self._clipped,
            likelihood=self._likelihood if self.scale > 0 else None,
            batched=True,
        )
        return {"default": attacker}

    def _clipped(self, gradient: Gradient, observed: Observed, weights: Weights) -> Gradient:
        """Return the dummy update as it is without noise: W / phi(W) - W' / phi', for W' = W less the dummy.

        The first model is exact with ``snapshots=after``. The second model's phi' is one number a tensor: it is the one
        by which W' comes closest to the second model as observed (least squares). Taken from the dummy instead, it
        would move all entries of a tensor with one row of it, and a search would follow that one number. It is 1 where
        W is not clipped; with ``as_released``, which undoes the clipping, all are.
        """
        if self.clip is None or self.as_released:
            return gradient
        sent = {}
        for name, value in gradient.items():
            before = weights[name]
            after, phi = before - value, self._divisor(before)
            first = before / phi if self.snapshots == "both" else before
            axes = tuple(range(1, after.ndim))
            size = after.square().sum(axes, keepdim=True)
            share = ((first - observed[name]) * after).sum(axes, keepdim=True) / torch.where(size > 0, size, 1.0)
            sent[name] = first - after * torch.where(phi > 1, share, 1.0)
        return sent

    def _likelihood(self, gradient: Gradient, observed: Observed, weights: Weights) -> Tensor:
        """Return [T], the sum over all entries of -log p(e) for the error e = (u' - u) / scale.

        Where both models have noise, e is the difference of two draws: of variance 2, e^2 / 4, for Gaussian noise; for
        Laplace noise of density (1 + |e|) exp(-|e|) / 4, |e| - log(1 + |e|). Of one model's noise it is e^2 / 2 or |e|,
        smoothed near 0 (SMOOTHING).
        With ``as_released`` the scale is ``scale * phi`` for each tensor. The second model's phi is not known: that of
        the public weights is used for it; the two differ as little as the update is small compared with the weights.
        """
        errors = []
        for name, value in observed.items():
            scale = self.scale * self._divisor(weights[name]) if self.as_released else self.scale
            errors.append(self._unlikely((gradient[name] - value) / scale).flatten(1).sum(1))
        return torch.stack(errors).sum(0)

    def _unlikely(self, error: Tensor) -> Tensor:
        """Return -log p of errors in units of the noise's scale, each up to a constant."""
        if self.kind == "gaussian":
            return error.square() / (4 if self.snapshots == "both" else 2)
        if self.snapshots == "both":
            return error.abs() - error.abs().log1p()
        return smooth_abs(error)

    def _divisor(self, weight: Tensor) -> Tensor:
        """Return phi >= 1 [T, 1, ...], by which tensors [T, *shape] of one parameter are divided."""
        if self.clip is None:
            return weight.new_ones((1,) * weight.ndim)
        norm = weight.norm(dim=2).flatten(1).amax(1) if weight.ndim > 2 else weight.flatten(1).norm(dim=1)
        return (norm / (self.clip + 1e-6)).clamp(min=1).view(-1, *[1] * (weight.ndim - 1))


@register("weight-sparsify")
@dataclass(frozen=True)
class WeightSparsify(WeightDefense):
    """Send zero for the weights of a parameter tensor whose magnitude is below a percentile of the tensor.

    A weight w is sent where |w| >= t, with t the percentile 100 * ratio of the tensor's |w|. Clients that share weights
    only. See WeightDefense for ``snapshots``.

    Attributes:
        ratio: the share of each tensor's entries that becomes zero.
    """

    joint: ClassVar[bool] = True
    version: ClassVar[int] = 2  # 2: what adaptive attackers know of the update
    reference: ClassVar[str] = "Zhao et al. 2022, Deep Leakage from Model in Federated Learning, arXiv 2206.04887"
    assumes: ClassVar[str] = "The attacker mistakes the difference of two sparse models for the update."
    cost: ClassVar[str] = "Less to send; a network without most of its weights needs many rounds to learn again."
    fails: ClassVar[str] = (
        "Attackers who have the weights before training: weights that are not zeroed show their update exactly."
    )
    ratio: Ratio = 0.5
    snapshots: Snapshots = "both"

    def defended(self, weight: Tensor, rng: torch.Generator) -> Tensor:
        """Return the tensor without its small entries; nothing is drawn."""
        return sparse(weight, self.ratio)

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who knows the weights that were handed out."""
        words = "computes the update of the kept weights from the public weights, and matches no others"
        return {"default": AdaptiveAttacker(words, undo=self._kept, batched=True)}

    def _kept(self, observed: Observed, weights: Weights) -> Gradient:
        """Return the update of every weight that is in the second model, and NaN for the others.

        With S(W) the sparse model of the public weights W, which anyone can make (W itself with ``snapshots=after``),
        and d = S(W) - S(W') what was observed, the second model is S(W') = S(W) - d. Where it is not zero it holds W'
        itself, and the update is W - W' = d + W - S(W): d where W was kept too, d + W where W had been dropped. Where
        it is zero, W' is below its tensor's percentile, and d is W or 0 whatever the update was. That bound, which
        hardly any weight of a small update comes near, is all there is; it is not used.
        """
        found = {}
        for name, value in observed.items():
            weight = weights[name]
            rows = weight[:1] if shared(weight) else weight
            first = torch.stack([sparse(row, self.ratio) for row in rows]) if self.snapshots == "both" else rows
            found[name] = torch.where(first != value, value + (weight - first), torch.nan)
        return found
