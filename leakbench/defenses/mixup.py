"""MixUp: the client trains on a blend of two of its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from leakbench.defenses.base import Defense, register


@register("mixup")
@dataclass(frozen=True)
class MixUp(Defense):
    """MixUp: train on a blend of the attacked image with another one of the client's, and of their labels.

    The client trains on the one example l * x + (1 - l) * x', y alike, with l drawn from Beta(alpha, alpha) for every
    step. x' is any other image of the dataset, drawn for the client. What is attacked, and compared with, is x, which
    can be the fainter one.

    Attributes:
        alpha: of the Beta law: small values mix little (l near 0 or 1), large ones halve; 1 is uniform.
    """

    reference: ClassVar[str] = "Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, ICLR, equation 1"
    assumes: ClassVar[str] = "The attacker wants the images apart."
    cost: ClassVar[str] = "Training on blends, which often helps accuracy."
    fails: ClassVar[str] = "What is recovered is the blend, in which both images are seen."
    companions: ClassVar[int] = 1
    alpha: Annotated[float, Field(ge=1e-3, le=1e6)] = 1.0

    def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the blend [1, C, H, W] and its class probabilities [1, K]."""
        seed = int(torch.randint(2**62, (), generator=rng))
        share = float(np.random.default_rng(seed).beta(self.alpha, self.alpha))
        return share * x[:1] + (1 - share) * x[1:2], share * y[:1] + (1 - share) * y[1:2]
