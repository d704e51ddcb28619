"""The objective and its gradient recorded as a CUDA graph: one launch an evaluation instead of hundreds."""

from collections.abc import Callable

import torch
from torch import Tensor

from leakbench.optim.base import Evaluation, Objective, Unknowns, value_and_gradient

Evaluate = Callable[[Unknowns, Evaluation], tuple[Tensor, Unknowns]]

WARM_UP_EVALUATIONS = 3
"""Evaluations before the recording, in which libraries allocate and choose their kernels."""


def recorded(objective: Objective, start: Unknowns) -> Evaluate:
    """Return ``value_and_gradient`` of an objective, on CUDA as a recorded graph if that gives the same numbers.

    The next evaluation overwrites the tensors that one returned. An objective that cannot be recorded, or whose
    recording differs from a later evaluation of the start (it draws something at each), is evaluated without one.

    Args:
        objective: the per-trial objective.
        start: name -> [T, *shape]; only unknowns of these shapes can be evaluated.
    """

    def plain(unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns]:
        return value_and_gradient(objective, unknowns, evaluation)

    if next(iter(start.values())).device.type != "cuda":
        return plain
    try:
        replay = _record(objective, start)
        agree = _agree(replay(start, 1), plain(start, 1))
    except RuntimeError:  # an operation that waits for the device, or memory that does not suffice
        torch.cuda.synchronize()
        return plain
    return replay if agree else plain


def _record(objective: Objective, start: Unknowns) -> Evaluate:
    inputs = {name: tensor.detach().clone() for name, tensor in start.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_EVALUATIONS):
            value_and_gradient(objective, inputs, 0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = value_and_gradient(objective, inputs, 0)

    def replay(unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns]:
        for name, tensor in inputs.items():
            tensor.copy_(unknowns[name])
        graph.replay()
        return value, gradient

    return replay


def _agree(a: tuple[Tensor, Unknowns], b: tuple[Tensor, Unknowns]) -> bool:
    """Return whether two evaluations gave the same, up to the order of summation."""
    pairs = [(a[0], b[0]), *((a[1][name], b[1][name]) for name in b[1])]
    sizes = [float(y.nan_to_num().abs().max()) for _, y in pairs]
    return all(torch.allclose(x, y, 1e-3, 1e-5 * size, equal_nan=True) for (x, y), size in zip(pairs, sizes))
