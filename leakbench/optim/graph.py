"""The objective and its gradient recorded as a CUDA graph: one launch an evaluation instead of hundreds."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from leakbench.core.device import accelerator
from leakbench.optim.base import Evaluation, Objective, Recordable, Unknowns, value_and_gradient

Evaluate = Callable[[Unknowns, Evaluation], tuple[Tensor, Unknowns]]
Replay = Callable[[], None]
Result = TypeVar("Result")

WARM_UP_EVALUATIONS = 3
"""Evaluations before the recording, in which libraries allocate and choose their kernels."""

CHECK_DISTANCE = 0.05
"""How far from the recorded start the recording is compared with an evaluation, relative to 1 + |x|."""

FAR = 10**6
"""The number of the evaluation that is compared: if an objective changes slowly, the next one is nearly the same."""

MAX_COMPARED = 2**22
"""Entries that are compared at a time."""

OTHER_NUMBERS = "its recording gives other numbers"
"""Why a recording is not used."""


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
                (value, gradient), (own_value, own_gradient) = (evaluate(other, FAR) for evaluate in (replay, plain))
                if agree([value, *gradient.values()], [own_value, *own_gradient.values()]):
                    return replay
                reason = OTHER_NUMBERS
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once in a process that this mode is a prototype
        module.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        module.set_sync_debug_mode(before)
    return ""


def rehearsed(work: Callable[[], object], module: ModuleType) -> Any:
    """Return a stream of the current device, on which libraries have allocated and chosen their kernels for work."""
    # a stream of its own: torch's one for all recordings belongs to the device that was recorded on first
    stream = module.Stream()
    stream.wait_stream(module.current_stream())
    with module.stream(stream):
        for _ in range(WARM_UP_EVALUATIONS):
            work()
    module.current_stream().wait_stream(stream)
    return stream


def capture(work: Callable[[], Result], stream: Any, module: ModuleType) -> tuple[Replay, Result]:
    """Return what does work, whose memory stays the same, as a recorded graph; and the result that it writes.

    Nothing of the work has run yet.
    """
    graph = module.CUDAGraph()
    with module.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


def _record(objective: Objective, start: Unknowns, module: ModuleType) -> Evaluate:
    inputs = {name: tensor.detach().clone() for name, tensor in start.items()}

    def once() -> tuple[Tensor, Unknowns]:
        return value_and_gradient(objective, inputs, 0)

    again, (value, gradient) = capture(once, rehearsed(once, module), module)

    def replay(unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns]:
        if isinstance(objective, Recordable):
            objective.prepare(evaluation)
        for name, tensor in inputs.items():
            tensor.copy_(unknowns[name])
        again()
        return value, gradient

    return replay


def agree(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Return whether tensors have the same numbers, up to the order of summation; this waits for the device once."""
    each = [
        _close(own, other) for x, y in zip(found, expected, strict=True) for own, other in zip(_parts(x), _parts(y))
    ]
    return bool(torch.stack(each).all())


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Return parts of a tensor, for comparisons that take little memory."""
    return x.split(max(1, MAX_COMPARED * len(x) // x.numel()))


def _close(x: Tensor, y: Tensor) -> Tensor:
    """Return a bool on the device: whether no entry differs by more than rounding can explain."""
    if not y.is_floating_point():
        return (x == y).all()
    size = torch.where(y.isfinite(), y.abs(), 0.0)
    near = y.isfinite() & ((x - y).abs() <= 1e-5 * size.max() + 1e-3 * size)
    return (near | (x == y) | (x.isnan() & y.isnan())).all()
