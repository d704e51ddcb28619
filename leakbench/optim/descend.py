"""First-order descent of many trials at once: (signed) Adam and RMSprop with a step schedule and bounds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from leakbench.core.loss_curve import Curve, marks
from leakbench.optim.adam import Adam
from leakbench.optim.base import Objective, Solution, Unknowns, rows_finite, where_rows
from leakbench.optim.graph import recorded
from leakbench.optim.rmsprop import GainFunction, RMSprop
from leakbench.optim.solvers import all_finite, serves


def descend(
    objective: Objective,
    start: Unknowns,
    *,
    steps: int,
    lr: Mapping[str, float],
    rule: Literal["adam", "rmsprop"] = "adam",
    sign: Sequence[str] = (),
    milestones: Sequence[int] = (),
    decay: float = 0.1,
    boxed: Sequence[str] = (),
    gain: Mapping[str, GainFunction] | None = None,
    compiled: bool = False,
    note: Callable[[str], None] | None = None,
) -> Solution:
    """Descend for ``steps`` steps; a trial that becomes non-finite stops at its last finite iterate.

    Args:
        objective: the per-trial objective.
        start: name -> [T, *shape].
        steps: how many updates.
        lr: the step size of each unknown.
        rule: torch's Adam (betas 0.9, 0.999) or RMSprop (alpha 0.99, momentum 0.99).
        sign: the unknowns whose gradient is replaced by its sign before the update.
        milestones: the steps before which every step size is multiplied by ``decay``.
        decay: see ``milestones``.
        boxed: the unknowns that are clamped to [0, 1] after every update.
        gain: for unknowns whose RMSprop does not divide as torch's does; see ``RMSprop``.
        compiled: compiled code (``solvers``) takes the steps where there is any: the same but for rounding.
        note: called with a line if the objective cannot be recorded on a GPU.
    """
    unknowns = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in start.items()}
    trials, device = len(next(iter(unknowns.values()))), next(iter(unknowns.values())).device
    rates = dict.fromkeys(lr[name] for name in unknowns)
    groups = [{"params": [own for name, own in unknowns.items() if lr[name] == rate], "lr": rate} for rate in rates]
    optimiser: torch.optim.Optimizer | Adam | RMSprop
    if rule == "adam":
        optimiser = Adam(groups) if device.type == "cpu" else torch.optim.Adam(groups)
    else:
        optimiser = RMSprop(groups, {unknowns[name]: own for name, own in (gain or {}).items()})
    finite = torch.ones(trials, dtype=torch.bool, device=device)
    evaluations = torch.zeros(trials, dtype=torch.int64, device=device)
    best = {name: tensor.clone() for name, tensor in unknowns.items()}  # the last iterate known to be finite
    value = torch.full((trials,), float("nan"), device=device)
    evaluate = recorded(objective, unknowns, note)
    fused = compiled and not isinstance(optimiser, torch.optim.Optimizer) and all(map(serves, unknowns.values()))
    fused = fused and not (rule == "rmsprop" and (sign or boxed))
    kept = {tensor: best[name] for name, tensor in unknowns.items()}
    signed, inside = ([unknowns[name] for name in names] for names in (sign, boxed))
    places = marks(steps)
    seen: list[Tensor] = []
    for step in range(steps):
        if step in milestones:
            for group in optimiser.param_groups:
                group["lr"] *= decay
        value, gradient = evaluate(unknowns, step)
        if step + 1 in places:
            seen.append(value.clone())
        evaluations += finite
        finite = finite & (all_finite(value, gradient) if fused else rows_finite(value, gradient))
        if step % 50 == 0 and not bool(finite.any()):  # reading a value waits for the device, so only now and then
            break
        if fused:
            assert isinstance(optimiser, Adam | RMSprop)
            for name, tensor in unknowns.items():
                tensor.grad = gradient[name]
            optimiser.advance(kept, finite, signed, inside)
            continue
        some = device.type != "cpu" or not bool(finite.all())
        for name, tensor in unknowns.items():
            # diverged rows keep updating; their result is discarded
            best[name] = where_rows(finite, tensor, best[name]) if some else best[name].copy_(tensor)
            tensor.grad = gradient[name].sign() if name in sign else gradient[name]
        optimiser.step()
        for name in boxed:
            unknowns[name].clamp_(0, 1)
    unknowns = {name: where_rows(finite, tensor, best[name]) for name, tensor in unknowns.items()}
    seen += [torch.full_like(value, torch.nan)] * (len(places) - len(seen))
    curve = Curve(steps, 1, torch.stack(seen, 1))
    return Solution(unknowns, torch.where(finite, value, torch.nan), finite, evaluations, curve)
