"""What an adaptive attacker knows of a defense: it is not part of what the client does."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leakbench.core.types import Gradient, Secret
from leakbench.errors import BadOption

DEFAULT_ATTACKER = "default"
"""The attacker of a defense that ``informed = true`` in a threat model asks for."""

SIMULATE = "simulate"
"""The adaptive attacker that every defense has: it runs the defense's own code on each dummy gradient."""
SIMULATED = "runs the defense's own code on each dummy gradient, or inverts it if it moves and scales entries"
"""The description of ``SIMULATE``."""
CONTROLS = frozenset({"none", "norm-only"})
"""The defenses that change at most the network, which every attacker runs: there is nothing else to model."""

Observed = Mapping[str, Tensor]
"""What was sent, [T, *shape] per parameter; withheld names are absent."""
Weights = Mapping[str, Tensor]
"""The values that the attacker knows: parameters and revealed secrets [T, *shape], buffers [*shape]."""


@dataclass(frozen=True)
class Dummies:
    """The dummy gradients of T trials, and all that an attacker knows of the steps that they are of.

    Attributes:
        gradient: [T, *shape] per trainable parameter, those of secrets included; an update where clients share weights.
        images: [T, C, H, W], the dummy images that the network ran on.
        labels: [T] int64, or [T, K] class probabilities.
        tensors: every tensor of the network by name, [T, *shape] or (buffers) [*shape], with the attacker's values in
            the place of secrets.
        generators: number of a draw -> one generator a trial, the attacker's own.
    """

    gradient: Gradient
    images: Tensor
    labels: Tensor
    tensors: Mapping[str, Tensor]
    generators: Callable[[int], Sequence[torch.Generator]]


@dataclass(frozen=True)
class AdaptiveAttacker:
    """An attacker who knows which defense is in use and models it (Tramèr et al. 2020, arXiv 2002.08347).

    Every attack runs with what is stated here; None means "not modelled". T is the number of trials, which all
    functions take together. No function changes its arguments.

    Attributes:
        description: what the attacker does about the defense, in a few words: a verb in the third person, no full stop.
        relax: (model, hidden) -> (network, secrets). The network that the attacker differentiates through, and those of
            its tensors that are optimised together with the image, each from a start drawn by its distribution.
            ``model`` is the public architecture, without values, and is not changed; ``hidden`` are the names of the
            secrets that the attacker neither was given nor recovered. A tensor of both networks has one name. What was
            sent is matched for the parameters of the relaxed network that require a gradient, and for no others.
        relax_on: in place of ``relax``, for tensors of the size of an image: (model, hidden, (C, H, W), classes) ->
            (network, secrets).
        undo: (observed, weights) -> [T, *shape] per parameter. What went into ``release``, as far as what was sent
            shows it, and NaN elsewhere. The attack works on that in place of what was sent, and leaves out the NaN.
            No entry may depend on the learning rate, which need not be known.
        surrogate: (gradient, observed, weights) -> [T, *shape] per parameter. A dummy gradient (where the client
            shares its weights, a dummy update) as ``release`` would have sent it.
        release: dummies -> [T, *shape] per parameter. In place of ``surrogate``, for a ``release`` that reads more than
            the gradient, or that draws; the attack then computes the dummy gradient of every trainable parameter.
        encode: (images, labels, generators, one a trial) -> images and labels as ``Defense.encode`` would have returned
            them; the network runs on these. None: the network runs on the dummy images.
        likelihood: (gradient, observed, weights) -> [T]. -log p(observed | gradient) up to a constant, for a dummy
            gradient as ``surrogate`` returns it. It takes the place of the attack's own distance, relative to its value
            at a gradient of zeros. None: what is sent follows from the gradient without noise.
        spread: (observed, weights) -> [T] per parameter. The standard deviation of the error of an entry of what was
            sent, for closed forms, which weigh their equations by it. None, or a parameter that is left out: unknown.
        recover: (model, observed, weights) -> [T, *shape] by name. The secrets that follow from what was sent in closed
            form, tensors that only the relaxed network has among them. ``observed`` is the gradient; of a client that
            shares weights the mean gradient of its steps, or a multiple of it where the rate is hidden.
        targets: (model, observed, weights) -> [T, K] or None. The class probabilities of the client's loss that follow
            from what was sent; they take the place of the label in every attack's loss.
        loss: (model, x, y) -> [B]. The loss that the attacker differentiates, for images x [B, C, H, W] and y, [B]
            int64 or [B, K] class probabilities. None: cross-entropy.
        scale_free: ``recover`` and ``targets`` accept any multiple of the gradient, so that they serve an update of
            unknown learning rate.
        batched: all that is stated serves the mean gradient of a batch as it serves that of one image.
        summed: ``recover`` and ``targets`` accept the mean gradient of several local steps, not only that of one step.
    """

    description: str
    relax: Callable[[nn.Module, Collection[str]], tuple[nn.Module, tuple[Secret, ...]]] | None = None
    relax_on: (
        Callable[[nn.Module, Collection[str], tuple[int, int, int], int], tuple[nn.Module, tuple[Secret, ...]]] | None
    ) = None
    undo: Callable[[Observed, Weights], Gradient] | None = None
    surrogate: Callable[[Gradient, Observed, Weights], Gradient] | None = None
    release: Callable[[Dummies], Gradient] | None = None
    encode: Callable[[Tensor, Tensor, Sequence[torch.Generator]], tuple[Tensor, Tensor]] | None = None
    likelihood: Callable[[Gradient, Observed, Weights], Tensor] | None = None
    spread: Callable[[Observed, Weights], Gradient] | None = None
    recover: Callable[[nn.Module, Observed, Weights], Gradient] | None = None
    targets: Callable[[nn.Module, Observed, Weights], Tensor | None] | None = None
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    scale_free: bool = False
    summed: bool = False
    batched: bool = False

    def __post_init__(self) -> None:
        """Raise BadOption if the description is not text."""
        if not isinstance(self.description, str):
            raise BadOption(f"an AdaptiveAttacker's description is {self.description!r}; give text")

    @property
    def models_release(self) -> bool:
        """Whether the attacker models what the defense makes of a gradient, in the units in which it is sent."""
        return self.surrogate is not None or self.release is not None or self.likelihood is not None

    @property
    def derives(self) -> bool:
        """Whether the attacker derives secrets or class probabilities analytically from what was sent."""
        return self.recover is not None or self.targets is not None
