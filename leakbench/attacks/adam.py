"""Adam on a distance between gradients: what the attacks that use it share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leakbench.attacks.matching import GradientMatching, MatchingObjective, Positive
from leakbench.optim import Solution, Unknowns, descend


def ig_milestones(steps: int) -> tuple[int, ...]:
    """Return the steps before which IG's released code divides the step size by ten: after 3/8, 5/8 and 7/8 of all."""
    return tuple(step for part in (2.667, 1.6, 1.142) if (step := int(steps / part)))


def logarithm(distance: Tensor) -> Tensor:
    """Return the logarithm of distances [T], or of likelihoods, which are positive as well; finite at zero."""
    return distance.clamp(min=torch.finfo(distance.dtype).tiny).log()


def adam(
    objective: MatchingObjective,
    start: Unknowns,
    steps: int,
    lr: float,
    *,
    signed: bool = True,
    boxed: bool = True,
    milestones: Sequence[int] | None = None,
    decay: float = 0.1,
) -> Solution:
    """Run Adam; labels and secrets, if they are optimised, follow their plain gradient.

    Args:
        objective: what is minimised.
        start: name -> [T, *shape].
        steps: how many.
        lr: the step size of all unknowns.
        signed: the image follows the sign of its gradient.
        boxed: the image is projected to [0, 1] after every step.
        milestones: the steps before which the step size is multiplied by ``decay``; those of IG by default.
        decay: see ``milestones``.
    """
    return descend(
        objective,
        start,
        steps=steps,
        lr=dict.fromkeys(start, lr),
        sign=("image",) if signed else (),
        milestones=ig_milestones(steps) if milestones is None else milestones,
        decay=decay,
        boxed=("image",) if boxed else (),
        compiled=objective.evaluator.path == "lanes",
        note=objective.observation.note,
    )


@dataclass(frozen=True)
class AdamSearch(GradientMatching):
    """Gradient matching by Adam, with the label inferred from the last layer; see GradientMatching for the options."""

    batches: ClassVar[bool] = True
    lr: Positive = 0.1
    labels: Literal["joint", "analytic"] = "analytic"
