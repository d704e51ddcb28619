"""Local normalisation, as in FedBN: scale and shift of normalisations stay with the client."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from leakbench.core.types import Gradient
from leakbench.defenses.base import Defense, Step, register

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


@register("local-norm")
@dataclass(frozen=True)
class LocalNorm(Defense):
    """Send nothing of the scale and shift of any normalisation, which stay with the client.

    The server knows the ones that it sent at first, as in the first round of FedBN. In training here they stay as they
    are, whereas clients of FedBN train their own. A network without normalisations sends everything.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    reference: ClassVar[str] = (
        "Li et al. 2021, FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR, arXiv "
        "2102.07623"
    )
    assumes: ClassVar[str] = "The attacker needs the sums of errors that the gradients of shifts are, as `peel` does."
    cost: ClassVar[str] = "Each client needs a normalisation of its own; nothing less is sent of all other layers."
    fails: ClassVar[str] = "Attackers who take the scale of a layer from the classifier, and searches."

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the gradient without that of normalisations."""
        kept = {
            f"{name}.{own}"
            for name, module in step.structure.named_modules()
            if isinstance(module, NORMALISATIONS)
            for own, _ in module.named_parameters(recurse=False)
        }
        return {name: value for name, value in step.gradient().items() if name not in kept}
