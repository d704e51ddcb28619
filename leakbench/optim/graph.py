"""The objective and its gradient recorded as a CUDA graph: one launch an evaluation instead of hundreds."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from leakbench.core.device import accelerator
from leakbench.optim.base import Evaluation, Objective, Recordable, Unknowns, value_and_gradient

Evaluate = Callable[[Unknowns, Evaluation], tuple[Tensor, Unknowns]]

WARM_UP_EVALUATIONS = 3
"""Evaluations before the recording, in which libraries allocate and choose their kernels."""

CHECK_DISTANCE = 0.05
"""How far from the recorded start the recording is compared with an evaluation, relative to 1 + |x|."""


def recorded(objective: Objective, start: Unknowns, note: Callable[[str], None] | None = None) -> Evaluate:
    """Return ``value_and_gradient`` of an objective, on a GPU as a recorded graph if that gives the same numbers.

    The next evaluation overwrites the tensors that one returned. An objective that reads values while it is evaluated
    cannot be recorded, which is found before anything is: torch does not recover from every recording that fails. One
    whose recording differs from an evaluation at another point is evaluated without it.

    Args:
        objective: the per-trial objective.
        start: name -> [T, *shape]; only unknowns of these shapes can be evaluated.
        note: called with a line if the objective cannot be recorded.
    """

    def plain(unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns]:
        return value_and_gradient(objective, unknowns, evaluation)

    device = next(iter(start.values())).device
    module = accelerator(device)
    if module is None:
        return plain
    own = objective.buffered() if isinstance(objective, Recordable) else objective
    with module.device(device):  # otherwise streams and recordings are those of the current device
        reason = waits(lambda: value_and_gradient(own, start, 0), module)
        if not reason:
            try:
                replay = _record(own, start, module)
                other = {name: value + CHECK_DISTANCE * (1 + value.abs()) for name, value in start.items()}
                if _agree(replay(other, 1), plain(other, 1)):
                    return replay
                reason = "its recording gives other numbers"
            except RuntimeError as error:  # memory that does not suffice
                module.synchronize()
                reason = str(error).splitlines()[0]
    if note is not None:
        note(f"the search is not recorded as a graph, and so takes longer: {reason}")
    return plain


def waits(work: Callable[[], object], module: ModuleType) -> str:
    """Return what waits for the device when work is done for the second time; empty if nothing does."""
    work()  # what is computed once may wait
    before = module.get_sync_debug_mode()
    module.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        module.set_sync_debug_mode(before)
    return ""


def _record(objective: Objective, start: Unknowns, module: ModuleType) -> Evaluate:
    inputs = {name: tensor.detach().clone() for name, tensor in start.items()}
    stream = module.Stream()
    stream.wait_stream(module.current_stream())
    with module.stream(stream):
        for _ in range(WARM_UP_EVALUATIONS):
            value_and_gradient(objective, inputs, 0)
    module.current_stream().wait_stream(stream)
    graph = module.CUDAGraph()
    # a stream of its own: torch's one for all recordings belongs to the device that was recorded on first
    with module.graph(graph, stream=stream, capture_error_mode="thread_local"):
        value, gradient = value_and_gradient(objective, inputs, 0)

    def replay(unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns]:
        if isinstance(objective, Recordable):
            objective.prepare(evaluation)
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
