"""L-BFGS on a distance between gradients: what the attacks that use it share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from leakbench.attacks.adam import adam
from leakbench.attacks.matching import GradientMatching, MatchingObjective
from leakbench.core.component import LATER
from leakbench.core.types import Gradient
from leakbench.gradients.bilinear import squared_distance, squared_distance_from
from leakbench.optim import LineSearch, Solution, Unknowns, lbfgs

HISTORY = 100
"""How many pairs of steps and gradient differences are kept, as in torch."""

ITERATIONS = 20
"""Iterations of an outer step at most, as in torch; without a line search each is one evaluation."""


@dataclass(frozen=True)
class QuasiNewton(GradientMatching):
    """Gradient matching by L-BFGS, by default on the squared distance; see GradientMatching for the other options.

    Attributes:
        line_search: ``none``, as published, or torch's ``strong-wolfe``, which costs up to 25 evaluations a step.
        solver: ``lbfgs``; ``adam``, whose step size is ``lr`` and which takes ``steps`` steps of one evaluation; or
            ``signed-adam``, the same by the sign of the image's gradient, with the image boxed to [0, 1] and the step
            size falling tenfold after 3/8, 5/8 and 7/8 of the steps, as in IG: for networks of ReLUs, on which L-BFGS
            stalls.
    """

    queue: ClassVar[int] = 4  # trials end at different times
    held: ClassVar[int] = 2 * HISTORY + 5  # the pairs, two iterates, two gradients and a direction
    tolerance_grad: ClassVar[float] = 1e-7
    tolerance_change: ClassVar[float] = 1e-9
    line_search: LineSearch = "none"
    solver: Literal["lbfgs", "adam", "signed-adam"] = field(default="lbfgs", metadata=LATER)

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the squared distance."""
        return squared_distance(gradient, observed)

    def distance_from(self, observed: Mapping[str, Tensor]) -> Callable[[Gradient], Tensor]:
        """Return the squared distance."""
        return squared_distance_from(observed)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run at most ``steps`` outer steps of L-BFGS, or ``steps`` steps of Adam."""
        if self.solver != "lbfgs":
            signed = self.solver == "signed-adam"
            eighths = tuple(self.steps * part // 8 for part in (3, 5, 7)) if signed else ()
            return adam(objective, start, self.steps, self.lr, signed=signed, boxed=signed, milestones=eighths)
        return lbfgs(
            objective,
            start,
            steps=self.steps,
            lr=self.lr,
            max_iter=ITERATIONS,
            history=HISTORY,
            tolerance_grad=self.tolerance_grad,
            tolerance_change=self.tolerance_change,
            line_search=self.line_search,
            stop_below=self.done_below(),
            budget=self.budget(),
            slots=objective.observation.slots,
            compiled=objective.evaluator.path == "lanes",
            note=objective.observation.note,
        )

    @property
    def planned(self) -> int:
        """Up to 20 evaluations an outer step, or the budget."""
        return self.budget() or self.steps * (ITERATIONS if self.solver == "lbfgs" else 1)

    @property
    def compares(self) -> bool:
        """Whether a line search does."""
        return self.solver == "lbfgs" and self.line_search != "none"

    def budget(self) -> int | None:
        """Return the evaluations after which a trial is done; any number by default."""
        return None

    def done_below(self) -> float:
        """Return the objective below which, at every tenth outer step, a trial is done; none is by default."""
        return float("-inf")
