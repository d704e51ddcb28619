"""PRECODE: a variational bottleneck before the classifier."""

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.core.component import NonNegative
from leakbench.core.types import Gradient, Normal, Secret
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, register
from leakbench.errors import Unsupported
from leakbench.gradients.linear import layer_input
from leakbench.models.surgery import linears, replace_module

_NOTHING_BELOW = "precode has no layer below its bottleneck here to be matched; use informed=true"


class VariationalBottleneck(nn.Module):
    """z = mu + sigma * noise with (mu, s) = encoder(f) and sigma = softplus(s), decoded back to f's size.

    The noise is a tensor of the module, drawn anew by the client for every pass.
    """

    noise: Tensor

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(features, 2 * size)
        self.decoder = nn.Linear(size, features)
        self.register_buffer("noise", torch.zeros(size))

    def forward(self, features: Tensor) -> Tensor:
        """Return decoded features [B, D] for features [B, D]."""
        mu, raw = self.encoder(features).chunk(2, dim=-1)
        return self.decoder(mu + F.softplus(raw) * self.noise)


def divergence(encoded: Tensor) -> Tensor:
    """Return [B], the Kullback-Leibler divergence in bits of N(mu, sigma^2) from N(0, I) for the encoder's [B, 2K]."""
    mu, raw = encoded.chunk(2, dim=-1)
    sigma = F.softplus(raw)
    # softplus(raw) is exp(raw) far below zero, where its own logarithm would be -inf
    log_sigma = torch.where(raw > -20, F.softplus(raw.clamp(min=-20)).log(), raw)
    return -0.5 * (1 + 2 * log_sigma - mu.square() - sigma.square()).sum(-1) / math.log(2)


@register("precode")
@dataclass(frozen=True)
class Precode(Defense):
    """PRECODE: a variational bottleneck with fresh noise before the classifier; its layers' gradients are sent.

    Attributes:
        k: the size K of the bottleneck.
        beta: the weight of the divergence to N(0, I), in bits, in the client's loss.
    """

    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    version: ClassVar[int] = 3  # 3: a line search meets one draw of the noise
    reference: ClassVar[str] = "Scheliga et al. 2022, PRECODE, WACV, section 4"
    assumes: ClassVar[str] = "The attacker does not know the noise of the bottleneck."
    cost: ClassVar[str] = "A bottleneck of its own, and a divergence in the loss."
    fails: ClassVar[str] = (
        "The noise follows from the sent gradients in closed form; the layers below can be matched without it."
    )
    k: Annotated[int, Field(ge=1, le=65536)] = 256
    beta: NonNegative = 1e-3

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a copy with the bottleneck before the last linear layer."""
        model = copy.deepcopy(model)
        found = list(linears(model).items())
        if not found:
            raise Unsupported("precode needs a linear classifier to stand before, and the network has none")
        name, classifier = found[-1]
        bottleneck = VariationalBottleneck(classifier.in_features, self.k)
        replace_module(model, name, nn.Sequential(bottleneck, classifier).train(model.training))
        return model

    def secrets(self, model: nn.Module) -> tuple[Secret, ...]:
        """Return the noise of the client's forward pass."""
        return tuple(Secret(f"{name}.noise", "noise", Normal(), fresh=True) for name in bottlenecks(model))

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return cross-entropy plus ``beta`` times the divergence, [B]."""
        encoded: list[Tensor] = []
        hooks = [
            bottleneck.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output))
            for bottleneck in bottlenecks(model).values()
        ]
        try:
            loss = super().loss(model, x, y)
        finally:
            for hook in hooks:
                hook.remove()
        return loss + self.beta * torch.stack([divergence(output) for output in encoded]).sum(0)

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who recovers the noise; ``splice``, who does not need it; ``omit``, who does without it.

        ``splice`` matches the layers below the bottleneck: the gradient of the encoder's bias is the error at its
        output, so that dL/df = W_e^T dL/db_e at the features f. Whatever the bottleneck and all above it did, the
        gradients below are those of the loss <f, dL/df>. The error is in the gradient's units.

        ``omit`` leaves out the stochastic gradients, as the authors' later attack does: those of the bottleneck and of
        the classifier behind it, which say most of the noise. The attacker's own bottleneck draws its noise anew in
        every pass (or an attack optimises it: ``secrets=optimise``).
        """
        exact = AdaptiveAttacker(
            "recovers noise and label from what is sent, and includes the divergence in its loss",
            recover=recovered_noise,
            targets=label_by_bias,
            loss=self.loss,
            scale_free=True,
        )
        splice = replace(
            exact,
            description="infers the error below the bottleneck, and matches only the layers there",
            relax=spliced,
            recover=error_at_features,
            loss=spliced_loss,
            scale_free=False,
        )
        omit = replace(
            exact,
            description=(
                "leaves out the gradients of the bottleneck and the classifier (Scheliga et al. 2022, arXiv 2208.04767)"
            ),
            relax=frozen_heads,
            recover=None,
            summed=True,
        )
        return {"default": exact, "splice": splice, "omit": omit}


def recovered_noise(model: nn.Module, observed: Observed, weights: Weights) -> Gradient:
    """Return the noise [T, K] by name, exact but for rounding: (z - mu) / sigma.

    The gradients of the decoder give its input z, those of the encoder the features f, from which the public weights
    compute mu and sigma; in float64.
    """
    found = {}
    for name in bottlenecks(model):
        layers = [f"{name}.{layer}.{tensor}" for layer in ("encoder", "decoder") for tensor in ("weight", "bias")]
        if not set(layers) <= observed.keys():
            continue
        sent = [observed[layer].double() for layer in layers]
        features, code = layer_input(*sent[:2]), layer_input(*sent[2:])
        weight, bias = (weights[layer].double() for layer in layers[:2])
        mu, raw = (torch.einsum("tij,tj->ti", weight, features) + bias).chunk(2, dim=-1)
        noise = (code - mu) / F.softplus(raw)
        found[f"{name}.noise"] = noise.to(observed[layers[0]].dtype)
    return found


def label_by_bias(model: nn.Module, observed: Observed, weights: Weights) -> Tensor | None:
    """Return the label as probabilities [T, K]: the class whose bias has a negative gradient; None if it was not sent.

    The sums over the classifier's weights that others go by mislead: its inputs, decoded, have any sign.
    """
    by_bias = observed.get(f"{list(linears(model))[-1]}.bias")
    return None if by_bias is None else F.one_hot(by_bias.argmin(1), by_bias.shape[1]).to(by_bias.dtype)


class Splice(nn.Module):
    """The product of features with a known error: the loss that leaves this error at them."""

    error: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("error", torch.zeros(features))

    def forward(self, features: Tensor) -> Tensor:
        """Return [B] for features [B, D]."""
        return (features * self.error).sum(-1)


def spliced(model: nn.Module, hidden: Collection[str]) -> tuple[nn.Module, tuple[Secret, ...]]:
    """Return the network up to the features, and their product with the error [B] in place of logits."""
    model = copy.deepcopy(model)
    for name, bottleneck in heads(model).items():
        replace_module(model, name, Splice(bottleneck.encoder.in_features))
    if not list(model.parameters()):
        raise Unsupported(_NOTHING_BELOW)
    return model, ()


def spliced_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return <f, dL/df> [B] of a spliced network."""
    product: Tensor = model(x)
    return product


def error_at_features(model: nn.Module, observed: Observed, weights: Weights) -> Gradient:
    """Return the error [T, D] at the features by name, W_e^T dL/db_e."""
    return {
        f"{name}.error": torch.einsum(
            "tij,ti->tj", weights[f"{name}.0.encoder.weight"], observed[f"{name}.0.encoder.bias"]
        )
        for name in heads(model)
    }


def frozen_heads(model: nn.Module, hidden: Collection[str]) -> tuple[nn.Module, tuple[Secret, ...]]:
    """Return the network with bottleneck and classifier frozen, so that their gradients are not matched."""
    model = copy.deepcopy(model)
    for name in heads(model):
        model.get_submodule(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Unsupported(_NOTHING_BELOW)
    return model, ()


def heads(model: nn.Module) -> dict[str, VariationalBottleneck]:
    """Return by name what ``wrap`` put in the classifier's place, the bottleneck and the classifier: its bottleneck."""
    return {name.rpartition(".")[0]: bottleneck for name, bottleneck in bottlenecks(model).items()}


def bottlenecks(model: nn.Module) -> dict[str, VariationalBottleneck]:
    """Return every bottleneck of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, VariationalBottleneck)}
