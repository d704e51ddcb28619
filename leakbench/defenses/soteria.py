"""Soteria: the classifier's gradient is perturbed in the columns whose inputs say most about the image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from leakbench.core.component import Positive
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.prune import Ratio, percentile
from leakbench.errors import Unsupported
from leakbench.models.surgery import linears


@register("soteria")
@dataclass(frozen=True)
class Soteria(Defense):
    """Zero the columns of the classifier's gradient for the features that depend least on the image for their size.

    With r [D] the classifier's input, feature i is scored s_i = |d r_i / d x|_2 / (|r_i| + offset). A column i of
    dL/dW with s_i below the percentile 100 * ratio of s becomes zero. The bias and all other layers are sent as they
    are. The classifier is the network's last linear layer. Batches of one image only.

    The paper prunes where |r_i (d r_i / d x)^-1|_2 is largest; the released code has the ratio above, with r_i in
    place of |r_i|, which differs only for negative features.

    Attributes:
        ratio: the share of the columns that becomes zero.
        offset: keeps the score finite where a feature is 0; released versions have 0, 1e-10 and 0.1.
    """

    reference: ClassVar[str] = (
        "Sun et al. 2021, Soteria: Provable Defense against Privacy Leakage in Federated Learning from Representation "
        "Perspective, CVPR, section 4 (and released code)"
    )
    assumes: ClassVar[str] = "The attacker matches the classifier's pruned gradient."
    cost: ClassVar[str] = "A derivative of every feature by the image, for every step."
    fails: ClassVar[str] = (
        "Attackers who leave out the pruned columns: the gradients of the layers below are sent unchanged."
    )
    joint: ClassVar[bool] = True
    ratio: Ratio = 0.5
    offset: Positive = 1e-10

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the gradient with the weakest columns of the classifier's weight set to zero."""
        if len(step.images) != 1:
            raise Unsupported(f"soteria is defined for one image, and the batch has {len(step.images)}")
        found = list(linears(step.structure).items())
        if not found:
            raise Unsupported("soteria masks the gradient of a linear classifier, and the network has none")
        name, _ = found[-1]
        gradient = step.gradient()
        features, norms = step.sensitivity(name)
        scores = norms / (features.abs() + self.offset)
        weight = gradient[f"{name}.weight"]
        return gradient | {f"{name}.weight": torch.where(scores < percentile(scores, self.ratio), 0.0, weight)}

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who leaves out the pruned columns."""
        words = "leaves out the columns of the classifier's gradient that were sent as zero"
        return {"default": AdaptiveAttacker(words, undo=without_zero_columns)}


def without_zero_columns(observed: Observed, weights: Weights) -> Gradient:
    """Return what was sent, with NaN in the columns of the classifier's weight that were sent as zero.

    The classifier's weight is the last of the matrices that were sent.
    """
    name = [name for name, value in observed.items() if value.ndim == 3][-1]
    live = (observed[name] != 0).any(1, keepdim=True)
    return {**observed, name: torch.where(live, observed[name], torch.nan)}
