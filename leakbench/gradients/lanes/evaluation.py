"""The gradient of each trial's loss by its parameters by the compiled kernels, differentiable in image and labels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leakbench.core.compiled import SUFFIXES
from leakbench.core.types import Gradient
from leakbench.errors import Unsupported
from leakbench.gradients.bilinear import shared, squared_norm
from leakbench.gradients.lanes.geometry import Pair
from leakbench.gradients.lanes.layout import JOINED_VALUES, innermost, strides, views
from leakbench.gradients.lanes.library import Kernels
from leakbench.gradients.lanes.trace import Kind, Trace, TracedStep

CHANNEL_NUMBERS = 7
"""What a normalisation keeps of each channel."""

SMALL_BLOCK_BYTES = 2**24
"""A network whose values of a block of trials take less is small: its evaluations are short, even of few trials."""

FULL_GROUP = 16
"""The lanes of the largest register, of the smallest numbers."""

MIN_FILL = 0.75
"""From this share of lanes with an image on, the gradients of a trial's images are added without being written."""

MAX_BLOCK_BYTES = 2**30
"""A network whose block, or a trial of several images whose gradients take more is left to the other paths."""

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Op(ctypes.Structure):
    """``Op`` of ``kernels.cpp``."""

    _fields_ = [
        *((name, _INT) for name in ("kind", "x", "x2", "y", "channels", "height", "width", "outputs")),
        *((name, _INT * 2) for name in ("kernel", "stride", "padding", "dilation")),
        *(
            (name, _INT)
            for name in ("groups", "rows", "columns", "weight", "bias", "mean", "variance", "adds", "moves")
        ),
        ("kept", _LONG),
        ("picks", _POINTER),
        ("number", ctypes.c_double),
    ]


class _Program(ctypes.Structure):
    """``Program`` of ``kernels.cpp``."""

    _fields_ = [
        *((name, _LONG) for name in ("ops", "values", "kept", "spare")),
        ("op", ctypes.POINTER(Op)),
        *((name, _POINTER) for name in ("size", "a", "e", "t", "f")),
    ]


class _Parameter(ctypes.Structure):
    """``Parameter`` of ``kernels.cpp``."""

    _fields_ = [
        ("value", _POINTER),
        ("own", _LONG),
        ("gradient", _POINTER),
        ("v", _POINTER),
        *((name, _LONG) for name in ("v_trial", "v_element", "size")),
        ("observed", _POINTER),
        *((name, _LONG) for name in ("place", "tangent", "gap", "group", "images")),
        *((name, _POINTER) for name in ("dot", "square")),
    ]


class _Rows(ctypes.Structure):
    """``Rows`` of ``kernels.cpp``."""

    _fields_ = [("data", _POINTER), ("trial", _LONG), ("element", _LONG)]


class Program:
    """A traced loss, laid out for the kernels.

    Args:
        kernels: the compiled kernels.
        trace: the operations.
        shapes: the shape of each parameter and buffer; a tensor with one more axis has a value for each trial.
    """

    def __init__(self, kernels: Kernels, trace: Trace, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.kernels, self._shapes = kernels, shapes
        self._free: Tensor | None = None
        self._orders: dict[tuple[str, ...], tuple[tuple[str, ...], int]] = {}
        self._seen: dict[tuple[str, int], tuple[Tensor, Pair, tuple[Tensor, int, int]]] = {}
        self._observed: dict[str, tuple[Tensor, tuple[int, int, int, int], Tensor]] = {}
        self._labels: tuple[Tensor, int, Tensor] | None = None
        self.names = tuple(dict.fromkeys(name for step in trace.steps for name in step.named))
        self._places = {name: place for place, name in enumerate(self.names)}
        self._lay_out(trace)

    def gradient(
        self, tensors: Mapping[str, Tensor], x: Tensor, q: Tensor, names: Sequence[str], images: int = 1
    ) -> Gradient:
        """Return each trial's gradient by the parameters of these names, [T, *shape] with the trials innermost.

        It is differentiable once in x and q. Parameters that the loss does not depend on have zeros.

        Args:
            tensors: [T, *shape] or [*shape] by name; those of each trial's own are best with the trials innermost.
            x: [T, C, H, W]; of trials of B images [T B, C, H, W], and the loss of a trial is the mean of theirs.
            q: [T, K], class probabilities; [T B, K].
            names: the parameters to differentiate by.
            images: B. Each image has lanes of its own, so that a network whose images meet (``apart``) is not served.
        """
        self._check(tensors, x, q)
        given = [self._given(name, tensors[name], len(x), images) for name in self.names]
        names = tuple(names)
        if names not in self._orders:
            counts = {name: math.prod(self._shapes[name]) for name in names}
            # side by side in the order in which they are joined
            placed = sorted(names, key=lambda name: (counts[name] > JOINED_VALUES, name))
            self._orders[names] = tuple(placed), sum(counts.values())
        order, count = self._orders[names]
        buffer = x.new_empty(count, len(x)).mT
        own = dict(zip(order, views(buffer, [self._shapes[name] for name in order])))
        for name in names:
            if name not in self._places:
                own[name].zero_()
        served = [name for name in names if name in self._places]
        out = dict(zip(served, _Gradient.apply(x, q, self, given, served, own)))
        each = {name: out[name] if name in out else own[name] for name in names}
        return each if images == 1 else {name: _mean(gradient, images) for name, gradient in each.items()}

    def compare(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        q: Tensor,
        observed: Mapping[str, Tensor],
        gap: bool,
        images: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Compare each trial's gradient g by some parameters with an observed one, without writing it.

        Args:
            tensors: as for ``gradient``.
            x: as for ``gradient``.
            q: as for ``gradient``.
            observed: y [T, *shape] by the name of the parameter, best with the trials innermost.
            gap: compare by the difference.
            images: as for ``gradient``; worth it if they fill their lanes (``fills``).

        Returns:
            <g, y> and <g, g>, or with ``gap`` zeros and |g - y|^2: [P, T] in the order of ``observed``; differentiable
            once in x and q.
        """
        out: tuple[Tensor, Tensor] = _Comparison.apply(x, q, self, tensors, observed, gap, images)
        return out

    def _check(
        self, tensors: Mapping[str, Tensor], x: Tensor, q: Tensor, observed: Mapping[str, Tensor] | None = None
    ) -> None:
        kinds = {tensors[name].dtype for name in self.names} | {y.dtype for y in (observed or {}).values()}
        if x.dtype not in SUFFIXES or kinds - {x.dtype}:
            raise Unsupported("the kernels compute in float32 and float64, and with one of them at a time")
        self._require("labels", q, (len(x), self.logits))

    def _require(self, name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
        """Refuse a tensor of none of these shapes, beyond whose memory the kernels would read."""
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name}: {tuple(tensor.shape)} is given, and {' or '.join(map(str, shapes))} is needed")

    def _in_blocks(self, name: str, tensor: Tensor, trials: int, group: int, lanes: int) -> Tensor:
        """Return an observed gradient as the kernels take it; one that was given before is the same as then.

        A block of trials of ``group`` lanes is contiguous [N, L], with zeros where it lacks trials.
        """
        seen, state = self._observed.get(name), (tensor._version, trials, group, lanes)
        if seen is None or seen[0] is not tensor or seen[1] != state:
            self._require(name, tensor, (trials, *self._shapes[name]))
            own = tensor.detach().flatten(1).repeat_interleave(group, 0)
            rows = F.pad(own, (0, 0, 0, -len(own) % lanes))
            own = rows.unflatten(0, (-1, lanes)).mT.contiguous()
            self._observed[name] = seen = tensor, state, own
        return seen[2]

    def probabilities(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return labels [T] or [T, B] as probabilities [..., K] of this type; probabilities as they are."""
        if labels.is_floating_point():
            return labels.to(dtype)
        seen = self._labels
        if seen is None or seen[0] is not labels or seen[1] != labels._version or seen[2].dtype != dtype:
            self._labels = seen = labels, labels._version, F.one_hot(labels, self.logits).to(dtype)
        return seen[2]

    def _given(self, name: str, tensor: Tensor, trials: int, images: int = 1) -> tuple[Tensor, int, int]:
        """Return a parameter as the kernels take it; one that was given before is the same as then."""
        seen, state = self._seen.get((name, images)), (tensor._version, trials)
        if seen is None or seen[0] is not tensor or seen[1] != state:
            shape = self._shapes[name]
            self._require(name, tensor, shape, (trials // images, *shape))
            axis = tensor.ndim > len(shape)
            alone = not axis or images == 1 or shared(tensor)
            own = _placed(tensor if alone else tensor.repeat_interleave(images, 0), axis, trials)
            self._seen[name, images] = seen = tensor, state, own
        return seen[2]

    def suits(self, trials: int, dtype: torch.dtype, batch: int = 1) -> bool:
        """Return whether this many trials, of ``batch`` images, are worth whole registers and fit into memory.

        A register that is half empty costs as much as a full one. Of a small network that is nothing beside the calls
        that another path makes. Of a batch each image's gradient is written, where other paths write one a trial.
        """
        block, vector_bytes = self._program.kept + self._program.spare, self.kernels.vector_bytes
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        written = batch * sum(sizes) * dtype.itemsize if batch > 1 else 0
        if max((block + 3 * max(sizes, default=0)) * vector_bytes, written) > MAX_BLOCK_BYTES:
            return False
        return 2 * trials * batch >= self.kernels.lanes(dtype, 1) or block * vector_bytes <= SMALL_BLOCK_BYTES

    def run(
        self, name: str, parameters: Sequence[_Parameter], x: _Rows, q: _Rows, memory: _Memory, trials: int
    ) -> None:
        """Run the first or the second half of an evaluation, on blocks of trials that the threads share."""
        rows, given = memory.rows, (_Parameter * len(parameters))(*parameters)
        pointers = ctypes.byref(memory.layout), given, x, q, _POINTER(rows.data_ptr())
        self.kernels.run(name, rows.dtype, *pointers, _LONG(trials), _LONG(len(rows)), lanes=memory.lanes)

    def meet(self, parameters: Sequence[_Parameter], memory: _Memory, lanes: int, group: int) -> None:
        """Compare the mean gradient of trials whose images fill several blocks each."""
        rows, given = memory.rows, (_Parameter * len(parameters))(*parameters)
        sizes = map(_LONG, (lanes, group, len(parameters), lanes // group * len(parameters)))
        pointers = ctypes.byref(memory.layout), given, _POINTER(rows.data_ptr())
        self.kernels.run("meet", rows.dtype, *pointers, *sizes, lanes=memory.lanes)

    def memory(self, like: Tensor, trials: int, comparing: bool = False) -> _Memory:
        """Return memory [blocks, N] for what an evaluation keeps for its derivative; that of an earlier one if free.

        One that compares gradients keeps them, too, at ``places``.
        """
        layout = self._comparing if comparing else self._program
        lanes = self.kernels.lanes(like.dtype, trials, torch.get_num_threads())
        shape = (-(-trials // lanes), layout.kept * lanes)
        free, self._free = self._free, None
        if free is None or (free.dtype, tuple(free.shape)) != (like.dtype, shape):
            free = like.new_empty(shape)
        return _Memory(self, free, layout, lanes)

    @property
    def apart(self) -> bool:
        """Whether the images of a trial do not meet: no statistics are taken of them."""
        return all(step.kind is not Kind.NORM for step in self._steps)

    @cached_property
    def logits(self) -> int:
        """The number of classes."""
        return self._sizes[self._steps[-1].x]

    def _lay_out(self, trace: Trace) -> None:
        """Place values in memory: a and e of all of them are kept, t and f are only of the second half."""
        self._steps, self._sizes = trace.steps, trace.sizes
        moves, written, kept, spare = set[int](), set[int](), 0, 0
        a, e, t, f = ([0] * len(trace.sizes) for _ in range(4))
        ops = (Op * len(trace.steps))()
        self._held: list[Any] = [ops]
        used = {0, *(step.y for step in trace.steps if step.y >= 0)}
        for step in trace.steps:
            if step.y >= 0 and (step.named or step.x in moves or step.second in moves):
                moves.add(step.y)
        for value in sorted(used):
            size = trace.sizes[value]
            a[value], kept = kept, kept + size
            if value in moves:
                e[value], kept = kept, kept + size
                t[value], spare = spare, spare + size
        free: dict[int, list[int]] = {}
        for place in range(len(trace.steps) - 1, -1, -1):
            step, op = trace.steps[place], ops[place]
            for bit, value in enumerate((step.x, step.second)):
                if value < 0:
                    continue
                op.adds |= (value in written) << bit
                op.moves |= (value in moves) << bit
                if value not in written:  # f(y) ends where f(x) begins, and another value of its size follows it
                    size = trace.sizes[value]
                    f[value], spare = (free[size].pop(), spare) if free.get(size) else (spare, spare + size)
                written.add(value)
            if step.y >= 0:
                free.setdefault(trace.sizes[step.y], []).append(f[step.y])
            self._fill(op, step)
            op.kept = kept
            kept += self._kept_by(step)
        arrays = [(_LONG * len(values))(*values) for values in (trace.sizes, a, e, t, f)]
        self._held += arrays
        pointers = [ctypes.cast(array, _POINTER) for array in arrays]
        self.places: dict[str, tuple[int, int]] = {}  # of a gradient and of v, where gradients are compared
        sizes = [kept, max(spare, 1)]
        whole = [*sizes]
        for name in self.names:
            self.places[name] = whole[0], whole[1]
            whole = [size + math.prod(self._shapes[name]) for size in whole]
        operations = ctypes.cast(ops, ctypes.POINTER(Op))
        self._program, self._comparing = (
            _Program(len(ops), len(a), *own, operations, *pointers) for own in (sizes, whole)
        )

    def _fill(self, op: Op, step: TracedStep) -> None:
        op.kind, op.x, op.x2, op.y = step.kind, step.x, step.second, step.y
        op.channels, op.height, op.width = step.shape
        op.outputs, op.rows, op.columns = step.out
        for name in ("kernel", "stride", "padding", "dilation"):
            setattr(op, name, (_INT * 2)(*getattr(step, name)))
        for name in ("weight", "bias", "mean", "variance"):
            setattr(op, name, self._places.get(getattr(step, name), -1))
        op.groups, op.number = step.groups, step.number
        if step.picks:
            picks = (_LONG * len(step.picks))(*step.picks)
            self._held.append(picks)
            op.picks = ctypes.cast(picks, _POINTER)

    def _kept_by(self, step: TracedStep) -> int:
        if step.kind is Kind.NORM:
            return CHANNEL_NUMBERS * step.shape[0]
        if step.kind is Kind.MAXIMUM:
            return math.prod(step.out)
        return 3 * self._sizes[step.x] if step.kind is Kind.LOSS else 0


class _Memory:
    """Memory of an evaluation, which its program gets back when the evaluation's graph is freed.

    New memory of this size comes from the kernel, which clears it page by page.
    """

    def __init__(self, program: Program, rows: Tensor, layout: _Program, lanes: int) -> None:
        self.rows, self.layout, self.lanes = rows, layout, lanes
        self._program = program

    def __del__(self) -> None:
        self._program._free = self.rows


class _Gradient(Function):
    """The gradient by each parameter, written into ``out``; its derivative by image and labels."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, q: Tensor, program: Program, given: list[Any], names: list[str], out: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """Run the network and its first backward pass."""
        memory = program.memory(x, len(x))
        parameters = [
            _Parameter(tensor.data_ptr(), own, _pointer(out.get(name)), None, 0, 0, size)
            for name, (tensor, own, size) in zip(program.names, given)
        ]
        image, labels = strides(x), strides(q)
        program.run("gradient", parameters, _rows(*image), _rows(*labels), memory, len(x))
        ctx.set_materialize_grads(False)
        ctx.program, ctx.given, ctx.names, ctx.memory, ctx.x = program, given, names, memory, x.detach()
        return tuple(out[name] for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the derivatives by image and labels of the gradient's product with ``grads``."""
        along = {name: strides(grad) for name, grad in zip(ctx.names, grads) if grad is not None}
        parameters = []
        for name, (tensor, own, size) in zip(ctx.program.names, ctx.given):
            v, trial, element = along.get(name, (None, 0, 0))
            parameters.append(_Parameter(tensor.data_ptr(), own, None, _pointer(v), trial, element, size))
        found = _derivative(ctx.program, parameters, ctx.x, ctx.memory, ctx.needs_input_grad[1])
        return *found, None, None, None, None


class GradientComparison:
    """The first half of an evaluation that compares gradients; the arguments are those of ``Program.compare``.

    Attributes:
        dots: [P, T]; see ``Program.compare``.
        squares: [P, T].
    """

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        q: Tensor,
        observed: Mapping[str, Tensor],
        gap: bool,
        images: int = 1,
    ) -> None:
        program._check(tensors, x, q, observed)
        self.images, self._group = images, group_of(images)
        trials, self.program, self.x = len(x) // images, program, self._filled(x.detach())
        lanes = len(self.x)
        self.memory = program.memory(x, lanes, comparing=True)
        # the results, and the derivatives by them, of each lane
        self._numbers = x.new_zeros(4, len(observed), lanes)
        self.dots, self.squares = self._numbers[:2, :, :: self._group].unbind()
        self._given, self._rows, self._held = [], {name: row for row, name in enumerate(observed)}, []
        for name in program.names:
            tensor, own, size = program._given(name, tensors[name], lanes, self._group)
            one = _Parameter(tensor.data_ptr(), own, None, None, 0, 0, size)
            if name in observed:
                blocks = program._in_blocks(name, observed[name], trials, self._group, self.memory.lanes)
                one.observed, one.gap, one.group, one.images = blocks.data_ptr(), gap, self._group, images
                one.place, one.tangent = program.places[name]
                self._held.append(blocks)
            self._held.append(tensor)
            self._given.append(one)
        for row, (name, y) in enumerate(observed.items()):
            if gap and name not in program.places:
                self.squares[row] = squared_norm(y)
        # copies live until the kernels have read them; a label of zeros gives a gradient of zeros
        image, labels = strides(self.x), strides(self._filled(q.detach()))
        program.run("gradient", self._parameters(0), _rows(*image), _rows(*labels), self.memory, lanes)
        if self._group > self.memory.lanes:
            program.meet(self._parameters(0), self.memory, lanes, self._group)

    def derivative(self, by_dots: Tensor, by_squares: Tensor, labels: bool) -> tuple[Tensor, Tensor | None]:
        """Return the derivatives by image and, if wanted, labels, of a function with these by both results.

        They are [P, T], or [T] for all tensors alike.
        """
        each = self._numbers.unflatten(-1, (-1, self._group))
        for place, by in enumerate((by_dots, by_squares), 2):
            each[place] = (by / self.images)[..., None]
        by_image, by_labels = _derivative(self.program, self._parameters(2), self.x, self.memory, labels)
        return self._taken(by_image), None if by_labels is None else self._taken(by_labels)

    def _filled(self, rows: Tensor) -> Tensor:
        """Return rows of images [T B, ...] with zeros for the images that a trial lacks in its lanes."""
        lacks = self._group - self.images
        if not lacks:
            return rows
        own = rows.unflatten(0, (-1, self.images))
        return torch.cat([own, own.new_zeros(len(own), lacks, *own.shape[2:])], 1).flatten(0, 1)

    def _taken(self, rows: Tensor) -> Tensor:
        """Return the rows of images [T B, ...] of those of lanes."""
        if self._group == self.images:
            return rows
        return rows.unflatten(0, (-1, self._group))[:, : self.images].flatten(0, 1)

    def _parameters(self, first: int) -> list[_Parameter]:
        """Return the parameters, with two of the numbers in the place of the products."""
        dots, squares = (self._numbers[place].data_ptr() for place in (first, first + 1))
        step = self._numbers.stride(1) * self._numbers.element_size()
        for name, one in zip(self.program.names, self._given):
            if name in self._rows:
                one.dot, one.square = (begin + self._rows[name] * step for begin in (dots, squares))
        return self._given


class _Comparison(Function):
    """``GradientComparison``, with its derivative by image and labels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        q: Tensor,
        program: Program,
        tensors: Mapping[str, Tensor],
        observed: Mapping[str, Tensor],
        gap: bool,
        images: int,
    ) -> tuple[Tensor, Tensor]:
        """Run the network and its first backward pass."""
        ctx.comparison = GradientComparison(program, tensors, x, q, observed, gap, images)
        # not its own tensors: they would hold this graph, which holds them, and never be freed
        return ctx.comparison.dots.detach(), ctx.comparison.squares.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the derivatives by image and labels."""
        return *ctx.comparison.derivative(*grads, labels=ctx.needs_input_grad[1]), *[None] * 5


def group_of(images: int) -> int:
    """Return how many lanes a trial of several images has: a power of two within a register, or whole registers."""
    if images > FULL_GROUP:
        return -(-images // FULL_GROUP) * FULL_GROUP
    return 1 << (images - 1).bit_length()


def fills(images: int) -> bool:
    """Return whether enough of the lanes of a trial of this many images have an image."""
    return images >= MIN_FILL * group_of(images)


def _derivative(
    program: Program, parameters: list[_Parameter], x: Tensor, memory: _Memory, labels: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the derivatives by image and, if wanted, labels."""
    by_image, *steps = strides(torch.empty_like(x))
    by_labels = x.new_empty(len(x), program.logits) if labels else None
    rows = _Rows(None, 0, 0) if by_labels is None else _rows(*strides(by_labels))
    program.run("derivative", parameters, _rows(by_image, *steps), rows, memory, len(x))
    return by_image, by_labels


def _placed(tensor: Tensor, axis: bool, trials: int) -> tuple[Tensor, int, int]:
    """Return a tensor as the kernels take it, whether each trial has its own values, and how many those are."""
    if axis and not shared(tensor):
        own = innermost(tensor.detach())
        dense = strides(own)[1:] in ((1, trials), (1, 1))
        return own if dense else innermost(own.contiguous()), 1, own[0].numel()
    one = (tensor[0] if axis else tensor).detach().contiguous()
    return one, 0, one.numel()


def _mean(gradient: Tensor, images: int) -> Tensor:
    """Return the mean [T, *shape] over the images of each trial of gradients [T B, *shape], trials innermost."""
    return gradient.movedim(0, -1).unflatten(-1, (-1, images)).mean(-1).movedim(-1, 0)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor, trial: int, element: int) -> _Rows:
    return _Rows(tensor.data_ptr(), trial, element)
