"""Top-k sparsification with error feedback: the largest entries are sent, and the rest is kept for the next round."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from leakbench.core.component import Count
from leakbench.core.types import Gradient
from leakbench.defenses.adaptive import AdaptiveAttacker, Observed, Weights
from leakbench.defenses.base import Defense, Step, register
from leakbench.defenses.prune import without_zeros


@register("top-k")
@dataclass(frozen=True)
class TopK(Defense):
    """Send the largest share of the entries of each gradient tensor; what was not sent is added to the next gradient.

    m_0 = 0; in round r, p = m_{r-1} + g, the k largest entries of |p| are sent, and m_r = p without them. What is
    attacked is what a client sends in round ``rounds`` if its image, its network and so its gradient stayed the same.
    In training, each step has a gradient of its own, and m is kept from step to step; in federated training each client
    keeps it from round to round.

    Attributes:
        keep: k over the number of entries of a tensor; at least one entry is sent.
        rounds: the round that is attacked; in the first, nothing was kept.
    """

    reference: ClassVar[str] = (
        "Aji and Heafield 2017, Sparse Communication for Distributed Gradient Descent, EMNLP, arXiv 1704.05021; error "
        "feedback as in Stich, Cordonnier and Jaggi 2018, Sparsified SGD with Memory, NeurIPS, arXiv 1809.07599"
    )
    assumes: ClassVar[str] = "The attacker also matches the zeros, or does not know of what was kept."
    cost: ClassVar[str] = "Less to send; a copy of the gradient in each client's memory."
    fails: ClassVar[str] = (
        "Attackers who match only the entries that were sent. Over several rounds, more and more different entries are."
    )
    batched: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    keep: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.1
    rounds: Count = 1

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        """Return the largest entries of the gradient and of what was kept, and zeros."""
        return {name: self._sent(value[None])[0] for name, value in step.gradient().items()}

    def feedback(self, step: Step, memory: Gradient, rng: torch.Generator) -> tuple[Gradient, Gradient]:
        """Return the largest entries of this gradient and of what was kept, and the rest, which is kept."""
        sent, kept = {}, {}
        for name, value in step.gradient().items():
            full = value + memory[name].to(value) if name in memory else value
            sent[name] = self._largest(full[None])[0]
            kept[name] = full - sent[name]
        return sent, kept

    def attackers(self) -> Mapping[str, AdaptiveAttacker]:
        """Return the attacker who leaves out the zeros or, after the first round, repeats the rounds on the dummy."""
        if self.rounds == 1:
            words = "matches only the entries that were not sent as zero"
            return {"default": AdaptiveAttacker(words, undo=without_zeros, batched=True)}
        words = "repeats the rounds on the dummy gradient, with what they keep"
        return {"default": AdaptiveAttacker(words, surrogate=self._repeated, batched=True)}

    def _repeated(self, gradient: Gradient, observed: Observed, weights: Weights) -> Gradient:
        return {name: self._sent(value) for name, value in gradient.items()}

    def _sent(self, value: Tensor) -> Tensor:
        """Return what is sent of gradients [T, *shape] in the last round."""
        kept = sent = torch.zeros_like(value)
        for _ in range(self.rounds):
            full = kept + value
            sent = self._largest(full)
            kept = full - sent
        return sent

    def _largest(self, value: Tensor) -> Tensor:
        """Return the largest entries of each row of [T, *shape], and zeros."""
        rows = value.flatten(1)
        count = max(1, round(self.keep * rows.shape[1]))
        chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(1, rows.abs().topk(count, 1).indices, True)
        return torch.where(chosen, rows, 0.0).view_as(value)
