"""MixUp: the client trains on a blend of two of its images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, register
from leakbench.gradients.linear import target_probabilities
from leakbench.gradients.losses import CROSS_ENTROPY, head_of
from leakbench.models.surgery import linears


@register("mixup")
@dataclass(frozen=True)
class MixUp(Defense):
    """MixUp: train on a blend of the attacked image with another one of the client's, and of their labels.

    The client trains on the one example l * x + (1 - l) * x', y alike, with l drawn from Beta(alpha, alpha) for every
    step. x' is any other image of the dataset, drawn for the client. What is attacked is x, which can be the fainter
    one; a reconstruction is compared with it and, in the metrics ``*_encoded``, with the blend.

    Attributes:
        alpha: of the Beta distribution: small values mix little (l near 0 or 1), large ones halve; 1 is uniform.
    """

    reference: ClassVar[str] = "Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, ICLR, equation 1"
    assumes: ClassVar[str] = "The attacker wants the two images separately."
    cost: ClassVar[str] = "Training on blends, which often helps accuracy."
    fails: ClassVar[str] = "The blend is recovered, and both images are visible in it."
    companions: ClassVar[int] = 1
    joint: ClassVar[bool] = True
    alpha: Annotated[float, Field(ge=1e-3, le=1e6)] = 1.0

    def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the blend [1, C, H, W] and its class probabilities [1, K]."""
        seed = int(torch.randint(2**62, (), generator=rng))
        share = float(np.random.default_rng(seed).beta(self.alpha, self.alpha))
        return share * x[:1] + (1 - share) * x[1:2], share * y[:1] + (1 - share) * y[1:2]

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who derives the blend's class probabilities.

        An attacker who takes the blend for an image of one class matches another gradient.
        """
        words = "infers both labels and their shares from the classifier's gradient, and matches the blend"
        return {"default": AdaptiveAttacker(words, targets=blended_targets)}


def blended_targets(model: nn.Module, observed: Observed, weights: Weights) -> Tensor | None:
    """Return the class probabilities [T, K] by ``target_probabilities``.

    None without a linear classifier and bias, or if the loss is not the cross-entropy.
    """
    if head_of(model).loss != CROSS_ENTROPY:
        return None
    names = [f"{name}.{tensor}" for name in list(linears(model))[-1:] for tensor in ("weight", "bias")]
    if not names or not set(names) <= observed.keys():
        return None
    return target_probabilities(*(observed[name] for name in names), *(weights[name] for name in names))
