"""Secure aggregation: the server sees the sum over several clients' gradients, and none of a single client."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker
from leakbench.defenses.base import Defense, Step, register


@register("secagg")
@dataclass(frozen=True)
class SecAgg(Defense):
    """Secure aggregation: only the sum over ``clients`` clients' gradients reaches the server, divided by their number.

    The images of a batch are those of all clients, an equal part of each: with ``batch=16``, 8 clients have 2 images
    each. Every client computes its gradient by itself (of its own batch statistics, if the network normalises by
    them). The cryptography is not modelled: nothing but the sum is observed, and no attack is given the gradient of one
    client.

    Attributes:
        clients: how many clients' gradients are summed.
    """

    reference: ClassVar[str] = (
        "Bonawitz et al. 2017, Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS"
    )
    assumes: ClassVar[str] = "The server follows the protocol, and hands out honest weights."
    cost: ClassVar[str] = "Messages and time; no accuracy."
    fails: ClassVar[str] = (
        "The sum is the gradient of one large batch: attacks on batches apply, and a server that crafts the weights "
        "reads single images out of it (server=imprint). It hides whose image it is only if every client gets the same "
        "weights: with different ones the server reads a single client (Pasquini et al. 2022)."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    aggregated: ClassVar[bool] = True
    clients: Annotated[int, Field(ge=2, le=100_000)] = 8

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the mean over the clients of the gradients of their images.

        Raises:
            Unsupported: the images are not an equal number for each client, or the clients share weights.
        """
        return {name: value.mean(0) for name, value in step.by_part(self.clients).items()}

    def reply(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the update of one client that trains: the server sums those of all."""
        return step.gradient()

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who takes the sum for the gradient of one large batch, which it is."""
        words = "takes the mean over the clients for the gradient of one batch of all their images"
        return {"default": AdaptiveAttacker(words, batched=True)}
