"""L-BFGS on a distance between gradients: what the attacks that use it share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leakbench.attacks.matching import GradientMatching, MatchingObjective
from leakbench.optim import LineSearch, Solution, Unknowns, lbfgs

HISTORY = 100
"""How many pairs of steps and gradient differences are kept, as in torch."""


@dataclass(frozen=True)
class QuasiNewton(GradientMatching):
    """Gradient matching by L-BFGS; see GradientMatching for the other options.

    Attributes:
        line_search: ``none``, as published, or torch's ``strong-wolfe``, which costs up to 25 evaluations a step.
    """

    queue: ClassVar[int] = 4  # trials end at different times
    held: ClassVar[int] = 2 * HISTORY + 5  # the pairs, two iterates, two gradients and a direction
    tolerance_grad: ClassVar[float] = 1e-7
    tolerance_change: ClassVar[float] = 1e-9
    line_search: LineSearch = "none"

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run at most ``steps`` outer steps."""
        return lbfgs(
            objective,
            start,
            steps=self.steps,
            lr=self.lr,
            history=HISTORY,
            tolerance_grad=self.tolerance_grad,
            tolerance_change=self.tolerance_change,
            line_search=self.line_search,
            stop_below=self.done_below(),
            budget=self.budget(),
            slots=objective.observation.slots,
        )

    def budget(self) -> int | None:
        """Return the evaluations after which a trial is done; any number by default."""
        return None

    def done_below(self) -> float:
        """Return the objective below which, at every tenth outer step, a trial is done; none is by default."""
        return float("-inf")
