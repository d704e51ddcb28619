"""The objective that a solver minimises, and the solution that it returns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from leakbench.core.loss_curve import Curve

Unknowns = dict[str, Tensor]
"""Name -> [T, *shape]: everything that the attacker optimises."""

Evaluation = int | Sequence[int]
"""How many evaluations came before, the same for every row or one number a row."""


class Objective(Protocol):
    """A per-trial function of the unknowns."""

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [T], row t a differentiable function of only row t of the unknowns.

        Args:
            unknowns: name -> [T, *shape].
            evaluation: how many evaluations of the row came before; draws at each evaluation depend on it.
        """
        ...

    def select(self, rows: Sequence[int]) -> Self:
        """Return the objective of only these trials."""
        ...


class Recordable(ABC):
    """An objective that draws random numbers for its evaluations, and can have them on the device beforehand."""

    @abstractmethod
    def buffered(self) -> Self:
        """Return the objective with its draws in a buffer, which a recorded evaluation reads."""

    @abstractmethod
    def prepare(self, evaluation: Evaluation) -> None:
        """Fill the buffer for a recorded evaluation, before each."""


@dataclass(frozen=True)
class Solution:
    """The end of an optimisation.

    Attributes:
        unknowns: name -> [T, *shape], the last iterate at which the objective was finite.
        value: [T], the objective at the last evaluation; NaN or infinite in diverged rows.
        finite: [T] bool, False for a trial whose objective or gradient became non-finite.
        evaluations: [T] int64, evaluations of the objective and its gradient.
        curve: the objective on the way.
    """

    unknowns: Unknowns
    value: Tensor
    finite: Tensor
    evaluations: Tensor
    curve: Curve | None = None


class Explicit(ABC):
    """An objective that can compute its gradient without a graph of its evaluation."""

    @abstractmethod
    def explicit(self, unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns] | None:
        """Return ``value_and_gradient``, or None if only a graph gives it."""


def value_and_gradient(objective: Objective, unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns]:
    """Return the objective [T] and its gradient by every unknown; an unknown without influence gets zeros."""
    if isinstance(objective, Explicit):
        found = objective.explicit(unknowns, evaluation)
        if found is not None:
            return found
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in unknowns.items()}
    value = objective(leaves, evaluation)
    grads = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    return value.detach(), {
        name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), grads)
    }


def joined(unknowns: Unknowns) -> tuple[Tensor, Callable[[Tensor], Unknowns]]:
    """Return unknowns as rows [T, N], and the function that makes such rows [R, N] unknowns again."""
    shapes = {name: tensor.shape[1:] for name, tensor in unknowns.items()}
    sizes = [shape.numel() for shape in shapes.values()]

    def unpack(rows: Tensor) -> Unknowns:
        parts = rows.split(sizes, dim=1)
        return {name: part.reshape(len(rows), *shape) for (name, shape), part in zip(shapes.items(), parts)}

    return torch.cat([tensor.detach().flatten(1) for tensor in unknowns.values()], 1), unpack


def rows_finite(value: Tensor, gradient: Unknowns) -> Tensor:
    """Return [T] bool: the objective and every gradient entry of the row are finite."""
    sizes = [largest(grad.flatten(1)) for grad in gradient.values()]
    return torch.isfinite(value) & torch.isfinite(torch.stack(sizes)).all(0)


def largest(rows: Tensor) -> Tensor:
    """Return [T], the largest absolute entry of each row of [T, N]; NaN in a row with a NaN."""
    return rows.abs().amax(1)


def where_rows(rows: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Choose whole rows: ``rows`` is [T] bool, the others [T, *shape]."""
    return torch.where(rows.view(-1, *[1] * (yes.ndim - 1)), yes, no)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return the rows [R] of [T, *shape]; a tensor that all rows share (stride 0) stays shared."""
    return tensor[:1].expand(len(rows), *tensor.shape[1:]) if tensor.stride(0) == 0 else tensor[rows]
