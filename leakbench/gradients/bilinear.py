"""The linear map with per-trial weights, with derivatives of every order in fast, contiguous forms.

The map, its gradient by the input and its gradient by the weight are three bilinear maps, and the derivative of each is
made of the other two. Written out, every weight-sized result is contiguous and every product is taken in row form;
plain autograd yields transposed weight gradients, which cost several strided copies at each use.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from leakbench.gradients.lanes.fused import Products, SquaredGap
from leakbench.gradients.lanes.layout import are_innermost


def needed(ctx: Any, index: int) -> bool:
    """Return whether the running backward pass will use the gradient by a Function's input.

    ``needs_input_grad`` only says that the input has a gradient; the first pass by parameters does not use the
    gradient by the image, and the second pass by the image does not use the gradient by the parameters. The engine
    can tell, except for leaves.
    """
    node = ctx.next_functions[index][0]
    if node is None or not ctx.needs_input_grad[index]:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return True


def shared(tensor: Tensor) -> bool:
    """Return whether all trials have the same values of a tensor [T, *shape], judged by its layout."""
    return tensor.stride(0) == 0 or len(tensor) == 1


class Form(NamedTuple):
    """A form t(x, w, y), linear in each of its operands: its gradient by each of them, a function of the other two.

    Attributes:
        by_input: (w, y) -> the gradient by x.
        by_weight: (x, y) -> the gradient by w.
        by_output: (x, w) -> the gradient by y: the map itself, such as a convolution.
    """

    by_input: Callable[[Tensor, Tensor], Tensor]
    by_weight: Callable[[Tensor, Tensor], Tensor]
    by_output: Callable[[Tensor, Tensor], Tensor]

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the map of x and weight, differentiable any number of times."""
        out: Tensor = FormGradient.apply(x, weight, self, 2)
        return out


class FormGradient(Function):
    """The gradient of a form by the operand at ``place``, a function of the other two in their order.

    Linear in both, so that its derivative by each is the form's gradient by that operand, with the incoming gradient at
    ``place``.
    """

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, form: Form, place: int) -> Tensor:
        """Return the gradient."""
        ctx.save_for_backward(first, second)
        ctx.form, ctx.place = form, place
        return form[place](first, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients by both operands."""
        operands = list(ctx.saved_tensors)
        operands.insert(ctx.place, grads[0])

        def by(place: int) -> Tensor:
            others = operands[:place] + operands[place + 1 :]
            return FormGradient.apply(*others, ctx.form, place)

        given = [place for place in range(3) if place != ctx.place]
        return *(by(place) if needed(ctx, index) else None for index, place in enumerate(given)), None, None


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """Return y^T x [T, O, I] of x [T, R, I] and y [T, R, O]; a single row is an outer product."""
    left = y.transpose(1, 2)
    return left * x if x.shape[1] == 1 else torch.bmm(left, x)


LINEAR = Form(
    by_input=lambda weight, y: torch.bmm(y, weight),
    by_weight=_outer,
    by_output=lambda x, weight: torch.bmm(x, weight.transpose(1, 2)),
)
"""The linear map x weight^T [T, R, O] of x [T, R, I] and weight [T, O, I]."""


class SquaredNorm(Function):
    """rows [T, N] give the sums of their squares [T], in one pass each way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Multiply each row by itself."""
        ctx.save_for_backward(rows)
        return inner(rows, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return twice the rows, scaled."""
        (rows,) = ctx.saved_tensors
        return rows * (2 * grads[0])[:, None]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return [T], the inner products of the rows of a and b, both [T, *shape], without a product the size of either."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), 1, -1).transpose(1, 2))[:, 0, 0]


def squared_norm(a: Tensor) -> Tensor:
    """Return [T], the squared Euclidean norms of the rows of a [T, *shape]."""
    return SquaredNorm.apply(a.reshape(len(a), -1))


def squared_distance(gradient: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Tensor:
    """Return [T]: the sum over the observed parameters, [T, *shape] by name, of |g' - g|^2.

    The difference is taken first, so that it stays exact.
    """
    return squared_distance_from(observed)(gradient)


def squared_distance_from(observed: Mapping[str, Tensor]) -> "FromGaps":
    """Return ``squared_distance`` from an observed gradient."""
    return FromGaps(observed, lambda squares: squares.sum(0))


def squared_gap(x: Tensor, y: Tensor) -> Tensor:
    """Return [T], the squared Euclidean norms of the rows of x - y, both [T, *shape]; differentiable in x."""
    rows = x.reshape(len(x), -1), y.reshape(len(y), -1)
    if are_innermost(*rows) and not y.requires_grad:
        out: Tensor = SquaredGap.apply(*rows)
        return out
    return squared_norm(x - y)


def products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return [T] and [T]: the inner products of the rows of x and y [T, *shape], and the squared norms of those of x.

    Differentiable in x; the rows of y have no gradient.
    """
    rows = x.reshape(len(x), -1), y.reshape(len(y), -1)
    if are_innermost(*rows) and not y.requires_grad:
        out: tuple[Tensor, Tensor] = Products.apply(*rows)
        return out
    return inner(x, y), squared_norm(x)


@dataclass(frozen=True)
class FromProducts:
    """A distance [T] from an observed gradient that depends on a gradient by inner products and norms alone.

    Attributes:
        observed: the observed gradient, [T, *shape] by name.
        of: from <g, y> and <g, g> [P, T] of each tensor to the distance. A gradient may come in other tensors than
            ``observed``, unless the attack is ``per_tensor``.
        derived: the distance and its derivatives by both, [T] and twice [P, T] or [T]; None: by automatic
            differentiation, which takes longer than the few numbers do.
    """

    observed: Mapping[str, Tensor]
    of: Callable[[Tensor, Tensor], Tensor]
    derived: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None

    def __call__(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a gradient."""
        pairs = [products(gradient[name], target) for name, target in self.observed.items()]
        return self.of(*(torch.stack([pair[part] for pair in pairs]) for part in (0, 1)))


@dataclass(frozen=True)
class FromGaps:
    """A distance [T] from an observed gradient that depends on a gradient by the norms of differences alone.

    Attributes:
        observed: see ``FromProducts``.
        of: from |g - y|^2 [P, T] of each tensor to the distance.
    """

    observed: Mapping[str, Tensor]
    of: Callable[[Tensor], Tensor]

    def __call__(self, gradient: Mapping[str, Tensor]) -> Tensor:
        """Return the distance of a gradient."""
        return self.of(torch.stack([squared_gap(gradient[name], target) for name, target in self.observed.items()]))
