"""What is above recovered values: the network's forward pass, and the error that the linear layer on top gives.

A descent that begins in the middle of a residual block does not know the error that goes around the convolution. If
the values above follow from those that were recovered, so do the masks, and with the gradient of the topmost bias all
errors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakbench.attacks.peeling.correlation import FLOOR, Fitted
from leakbench.attacks.peeling.knowledge import Knowledge
from leakbench.attacks.peeling.standard import Standard, standardised
from leakbench.gradients.linear import layer_input

MAX_CONTRADICTION = 1e-3
"""How far the linear layer's input by the forward pass may be from the one that its gradients give, relative to it."""


def complete_above(known: Knowledge) -> int | None:
    """Fill in what the forward pass gives above the recovered values, and the error at the linear layer's input.

    One image, and a gradient without noise: a value near 0 would get a wrong mask. With d = dL/db of the linear layer,
    its input must be (dL/dW)^T d / |d|^2; nothing is filled in if it is not.

    Returns:
        The place at which the error is new; None if nothing new follows.
    """
    network = known.network
    computed, deviations = _outputs(known)
    head = network.topmost_linear()
    if head is None:
        return None
    step = network.steps[head]
    top = step.inputs[0] if step.inputs else head
    names = tuple(f"{step.name}.{own}" for own in ("weight", "bias"))
    if top not in computed or len(step.shape) != 1 or top in known.pinned or not all(map(known.complete, names)):
        return None
    by_weight, error = (known.sent[name] for name in names)
    given = layer_input(by_weight[None], error[None])[0]
    if not float((computed[top].flatten() - given).norm()) < MAX_CONTRADICTION * float(given.norm()):
        return None
    for place, value in computed.items():
        kind = network.steps[place].kind
        if place in known.values or place in known.standards:
            continue
        if kind == "relu":
            (before,) = network.steps[place].inputs
            size = deviations[place] * float(value.square().mean().sqrt())
            known.values[place] = Fitted(value, torch.full_like(value, size))
            known.masks[place] = (computed[before] > 0) & (computed[before] < network.steps[place].ceiling)
            known.followed.add(place)
        elif kind == "normalisation":
            _standardise(known, place, computed)
    known.pinned[top] = network.backward(head, top, error[None])
    known.errors = {}
    return top


def _outputs(known: Knowledge) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Return the outputs of steps that are recovered or follow from such ones, and their relative deviations."""
    network = known.network
    computed, deviations = {}, {}
    for place, step in enumerate(network.steps):
        if place in known.values:
            value = known.clean(place)
            computed[place] = value
            deviations[place] = float(known.values[place].deviation.norm() / value.norm().clamp(min=1e-300))
        elif step.inputs and all(each in computed for each in step.inputs):
            if network.unknown(place) or place in network.hidden or not step.shape:
                continue
            computed[place] = network.forward(place, [computed[each] for each in step.inputs])
            deviations[place] = max(FLOOR, *(deviations[each] for each in step.inputs))
    return computed, deviations


def _standardise(known: Knowledge, place: int, computed: dict[int, Tensor]) -> None:
    """Set the statistics of a normalisation by the image's own ones whose input is known."""
    name = f"{known.network.steps[place].name}.weight"
    module = known.network.module(place)
    if name in known.sent and isinstance(module, nn.BatchNorm2d):
        z, spread = standardised(computed[known.network.steps[place].inputs[0]], module.eps)
        known.standards[place] = Standard(z, spread, module.weight.detach(), known.sent[name])
