"""Columns of errors that differ in nothing but where they are zero: one hidden layer before two classes or one logit.

Then the loss moves each unit of the layer by the same number for every image, times a factor of the image, wherever
the unit is on. The search for columns with many zeros cannot tell them from differences of two of them, which are zero
where both units are on or both off. But divided by these numbers, a column is 0 or 1 in each row, so that it equals its
square. The products of pairs of a basis make that linear: with more rows than pairs, the only solutions are sums of
the squares of the columns, and the eigenvectors of two of them are the columns.
"""

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakbench.attacks.batch_labels import models_of, public_noise
from leakbench.core.rng import seeded
from leakbench.gradients.losses import CROSS_ENTROPY, head_of
from leakbench.gradients.plain import without_checkpointing
from leakbench.observation import Observation

SPREAD = 1e-3
"""Errors of a unit count as one number if no public image's differs by more than this, relative to it."""

LEAST_ERROR = 1e-2
"""Rows of smaller errors, relative to the largest, are left out: dividing by them enlarges the rounding."""

OFF = 0.25
"""A value below this share of a column's values of 1 counts as 0."""


def shared_errors(observation: Observation, trial: int, layer: str) -> Tensor | None:
    """Return by which number [M] the loss moves each output of a layer, for every image up to a factor of its own.

    Args:
        observation: what the attacker sees.
        trial: which of its trials.
        layer: the name of a linear layer.

    Returns:
        float64 on the CPU, 0 for a unit that no public image switches on; None if images differ in more than a factor.
    """
    model, taken = copy.deepcopy(observation.model), list[Tensor]()
    head = head_of(model)

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taken.append(output)

    model.get_submodule(layer).register_forward_hook(keep)
    noise = public_noise(observation).requires_grad_()
    tensors = {name: value.clone() for name, value in models_of(observation, trial)[0].items()}
    with torch.enable_grad(), seeded("public noise"), without_checkpointing():
        logits: Tensor = functional_call(model, tensors, (noise,))
        if len(taken) != 1 or taken[0].ndim != 2 or logits.ndim != 2 or len(taken[0]) != len(logits):
            return None
        if logits.shape[1] == 2 and (head.loss == CROSS_ENTROPY or head.single):
            moved = logits[:, 0] - logits[:, 1]
        elif logits.shape[1] == 1:
            moved = logits[:, 0]
        else:
            return None
        (errors,) = torch.autograd.grad(moved.sum(), taken[0])
    errors = errors.detach().cpu().double()
    on = errors != 0
    mean = errors.sum(0) / on.sum(0).clamp(min=1)
    alike = ~on | ((errors - mean).abs() <= SPREAD * mean.abs())
    return mean if bool(alike.all()) and bool(on.any()) else None


def columns_of(rows: Tensor, errors: Tensor, rng: torch.Generator) -> Tensor:
    """Return directions a [N, N] in which ``rows @ a`` is, in each row, 0 or one factor times the error of the row.

    Args:
        rows: [m, N], a basis of the columns.
        errors: [m] (``shared_errors``), one at least not 0.
        rng: of two sums of squares.

    Returns:
        Of norm 1. Those that are wrong have fewer zeros than a column. None, [0, N], of too few rows.
    """
    count = rows.shape[1]
    large = errors.abs() > LEAST_ERROR * errors.abs().max()
    first, second = torch.triu_indices(count, count)
    if int(large.sum()) < len(first) + count:
        return rows[:0]
    binary = rows[large] / errors[large, None]
    binary = binary / binary.square().mean().sqrt()
    products = binary[:, first] * binary[:, second]
    equations = torch.cat([products, -binary], 1) * errors[large, None]
    null = torch.linalg.svd(equations, full_matrices=False)[2][-count:]
    sums = torch.randn(2, count, generator=rng, dtype=rows.dtype) @ null[:, : len(first)]
    squares = rows.new_zeros(2, count, count)
    squares[:, first, second] = sums / 2
    squares = squares + squares.mT
    quotient, singular = torch.linalg.solve_ex(squares[1], squares[0], left=False)
    if int(singular) or not bool(torch.isfinite(quotient).all()):
        return rows[:0]
    found = torch.linalg.eig(quotient)[1].real
    values = binary @ found
    ones = values.pow(3).sum(0) / values.square().sum(0)
    each = []
    for column, one in zip(values.T, ones):
        off = rows[large][column.abs() < OFF * one.abs()]
        each.append(torch.linalg.eigh(off.T @ off)[1][:, 0])
    return torch.stack(each)
