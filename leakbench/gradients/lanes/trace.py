"""A network's loss as a list of the operations that the kernels know, found by running it on tensors without values."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from leakbench.errors import Unsupported
from leakbench.gradients.lanes.geometry import Pair, windows

MAX_TAPS = 1024
"""The largest kernel, height times width, that ``kernels.cpp`` takes."""

TRACED_IMAGES = 2


class Kind(enum.IntEnum):
    """The operations, in the order of ``kernels.cpp``."""

    CONVOLUTION = 0
    SIGMOID = 1
    TANH = 2
    RELU = 3
    NORM = 4
    SCALE = 5
    ADD = 6
    PICK = 7
    AVERAGE = 8
    MAXIMUM = 9
    LOSS = 10


@dataclass(frozen=True)
class TracedStep:
    """One operation y = op(x, second) on numbered values; value 0 is the image.

    Attributes:
        kind: the operation.
        x: the number of its operand.
        y: the number of its result; -1 for the loss.
        second: the other operand of a sum; else -1.
        shape: channels, height and width of x.
        out: channels, height and width of y.
        kernel: of a convolution or a pool, as the next four.
        stride: see ``kernel``.
        padding: see ``kernel``.
        dilation: see ``kernel``.
        groups: of a convolution.
        weight: the name of a parameter or buffer; empty for none, as the next three.
        bias: see ``weight``.
        mean: the running mean.
        variance: the running variance.
        picks: the element of x for each element of y, or -1 for zero.
        number: the slope of a ReLU below zero, or the epsilon of a normalisation.
    """

    kind: Kind
    x: int
    y: int
    second: int = -1
    shape: tuple[int, int, int] = (1, 1, 1)
    out: tuple[int, int, int] = (1, 1, 1)
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    weight: str = ""
    bias: str = ""
    mean: str = ""
    variance: str = ""
    picks: tuple[int, ...] = ()
    number: float = 0.0

    @property
    def named(self) -> tuple[str, ...]:
        """The names of its parameters and buffers."""
        return tuple(name for name in (self.weight, self.bias, self.mean, self.variance) if name)


@dataclass(frozen=True)
class Trace:
    """The operations that the loss depends on, in their order, and the number of elements of each value."""

    steps: tuple[TracedStep, ...]
    sizes: tuple[int, ...]


def trace(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    image_shape: tuple[int, ...],
) -> Trace:
    """Return the operations of the loss of a network for one image.

    Args:
        model: the network; its tensors may be without values (``meta``).
        loss: (model, images, class probabilities) -> the loss of each image.
        image_shape: channels, height and width.

    Raises:
        Unsupported: the network has an operation that the kernels do not know.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    dtype = next((value.dtype for value in own.values() if value.is_floating_point()), torch.float32)
    # counters are counted; everything else has a shape only, by which no operation is run
    bare = {
        name: torch.empty_like(value, device="meta") if value.is_floating_point() else torch.zeros(value.shape)
        for name, value in own.items()
    }
    x = torch.empty((TRACED_IMAGES, *image_shape), dtype=dtype, device="meta")
    y = torch.empty((TRACED_IMAGES, 1), dtype=dtype, device="meta")  # the loss gets it, and nothing reads its shape
    recorder = _Recorder(bare, x, y)
    with torch.no_grad(), warnings.catch_warnings(), recorder:
        warnings.simplefilter("ignore")  # what a network warns of, it warns of in its own passes
        out = torch.func.functional_call(_Loss(model, loss), {f"model.{name}": t for name, t in bare.items()}, (x, y))
    if not recorder.steps or recorder.steps[-1].kind is not Kind.LOSS or out is not recorder.result:
        raise Unsupported("the kernels take a network whose loss is the cross-entropy of its outputs")
    wanted, used = {recorder.steps[-1].x}, [recorder.steps[-1]]
    for step in reversed(recorder.steps[:-1]):
        if step.y in wanted:
            used.append(step)
            wanted |= {step.x, step.second} - {-1}
    if 0 not in wanted:
        raise Unsupported("the loss does not depend on the image")
    return Trace(tuple(reversed(used)), tuple(recorder.sizes))


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.model, x, y)


class _Recorder(TorchFunctionMode):
    """Notes every operation on the image and on what is made of it, and refuses those that are not known.

    Attributes:
        steps: the operations so far.
        sizes: the elements of each value, of one image.
        result: the loss.
    """

    def __init__(self, own: Mapping[str, Tensor], x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.steps: list[TracedStep] = []
        self.sizes: list[int] = []
        self.result: Tensor | None = None
        self._names = {id(value): name for name, value in own.items()}
        self._labels = y
        self._numbers: dict[int, int] = {}
        self._held: list[Tensor] = []  # so that no two of them have the same id
        self.add(x)

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note a call that takes a traced tensor."""
        given = kwargs or {}
        if not any(self.known(value) for value in _tensors((*args, *given.values()))):
            return func(*args, **given)
        if func in _KNOWN:
            return _KNOWN[func](self, *args, **given)
        if func in _MOVES:
            return self.move(func, args, given)
        if func in _HARMLESS:
            return func(*args, **given)
        raise Unsupported(f"the kernels do not know {getattr(func, '__name__', func)}")

    def known(self, value: Any) -> bool:
        """Return whether a tensor was made of the image."""
        return id(value) in self._numbers

    def number(self, value: Any) -> int:
        """Return the number of a traced tensor."""
        if not isinstance(value, Tensor) or not self.known(value):
            raise Unsupported("the kernels take operations on the image and on what is made of it")
        return self._numbers[id(value)]

    def name(self, value: Any) -> str:
        """Return the name of a parameter or buffer; empty for None."""
        if value is None:
            return ""
        if id(value) not in self._names:
            raise Unsupported("the kernels take the network's own parameters, and none that is computed")
        return self._names[id(value)]

    def add(self, value: Tensor) -> int:
        """Number a new value."""
        self._numbers[id(value)] = len(self.sizes)
        self._held.append(value)
        self.sizes.append(value[0].numel())
        return len(self.sizes) - 1

    def alias(self, value: Tensor, like: int) -> Tensor:
        """Give a tensor the number of another one with the same elements."""
        self._numbers[id(value)] = like
        self._held.append(value)
        return value

    def note(self, step: TracedStep, out: Tensor) -> Tensor:
        """Note an operation and its result."""
        self.steps.append(replace(step, y=self.add(out)))
        return out

    def move(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Note an operation that only moves elements, or puts zeros beside them: on the numbers of the elements."""
        x = args[0]
        number, size = self.number(x), x[0].numel()
        if any(isinstance(value, Tensor) for value in _tensors((*args[1:], *kwargs.values()))):
            raise Unsupported("the kernels take indices that are no tensors")
        places = torch.arange(1, len(x) * size + 1, dtype=torch.float64).view(x.shape)
        moved = func(places, *args[1:], **kwargs)
        if not isinstance(moved, Tensor) or moved.ndim == 0 or len(moved) != len(x):
            raise Unsupported("the kernels take each image by itself")
        rows = moved.reshape(len(x), -1).long()
        if not torch.equal(rows[1], torch.where(rows[0] > 0, rows[0] + size, 0)) or int(rows[0].max()) > size:
            raise Unsupported("the kernels take each image by itself")
        out = torch.empty(moved.shape, dtype=x.dtype, device="meta")
        if torch.equal(rows[0], torch.arange(1, size + 1)):
            return self.alias(out, number)
        return self.note(TracedStep(Kind.PICK, number, -1, picks=tuple((rows[0] - 1).tolist())), out)

    def finish(self, logits: Tensor, target: Tensor) -> Tensor:
        """Note the loss."""
        if target is not self._labels or logits.ndim != 2:
            raise Unsupported("the kernels take the cross-entropy of logits and labels")
        self.steps.append(TracedStep(Kind.LOSS, self.number(logits), -1))
        self.result = torch.empty(len(logits), dtype=logits.dtype, device="meta")
        return self.result


def _tensors(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _pair(value: int | tuple[int, ...] | list[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _image(x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 4:
        raise Unsupported("the kernels take images of two dimensions")
    return (x.shape[1], x.shape[2], x.shape[3])


def _bare(like: Tensor, *shape: int) -> Tensor:
    """Return a tensor of a shape, for as many images as another one, without values."""
    return torch.empty((len(like), *shape), dtype=like.dtype, device="meta")


def _conv2d(
    recorder: _Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    spread, kernel = _pair(dilation), (weight.shape[2], weight.shape[3])
    around = (0, 0) if padding == "valid" else padding
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(spread, kernel)]
        if any(total % 2 for total in totals):
            raise Unsupported("the kernels take padding that is the same on both sides")
        around = [total // 2 for total in totals]
    if kernel[0] * kernel[1] > MAX_TAPS:
        raise Unsupported(f"the kernels take convolutions of up to {MAX_TAPS} taps")
    size = windows(_image(input)[1:], kernel, _pair(stride), _pair(around), spread)
    step = TracedStep(
        Kind.CONVOLUTION,
        recorder.number(input),
        -1,
        shape=_image(input),
        out=(len(weight), *size),
        kernel=kernel,
        stride=_pair(stride),
        padding=_pair(around),
        dilation=spread,
        groups=groups,
        weight=recorder.name(weight),
        bias=recorder.name(bias),
    )
    return recorder.note(step, _bare(input, len(weight), *size))


def _linear(recorder: _Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim != 2:
        raise Unsupported("the kernels take linear maps of one row an image")
    outputs, inputs = weight.shape
    step = TracedStep(
        Kind.CONVOLUTION,
        recorder.number(input),
        -1,
        shape=(inputs, 1, 1),
        out=(outputs, 1, 1),
        weight=recorder.name(weight),
        bias=recorder.name(bias),
    )
    return recorder.note(step, _bare(input, outputs))


def _batch_norm(
    recorder: _Recorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    own = training or running_mean is None or running_var is None
    channels, pixels = input.shape[1], input[0, 0].numel()
    if own and pixels == 1:
        raise Unsupported("batch normalisation needs more than one value per channel of a trial")
    step = TracedStep(
        Kind.NORM if own else Kind.SCALE,
        recorder.number(input),
        -1,
        shape=(channels, pixels, 1),
        out=(channels, pixels, 1),
        weight=recorder.name(weight),
        bias=recorder.name(bias),
        mean="" if own else recorder.name(running_mean),
        variance="" if own else recorder.name(running_var),
        number=eps,
    )
    return recorder.note(step, torch.empty_like(input))


def _element(kind: Kind) -> Callable[..., Tensor]:
    def noted(recorder: _Recorder, input: Tensor, inplace: bool = False) -> Tensor:
        out = input if inplace else torch.empty_like(input)
        return recorder.note(TracedStep(kind, recorder.number(input), -1), out)

    return noted


def _leaky_relu(recorder: _Recorder, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    if negative_slope <= 0:
        raise Unsupported("the kernels take a leaky ReLU of a positive slope")
    out = input if inplace else torch.empty_like(input)
    return recorder.note(TracedStep(Kind.RELU, recorder.number(input), -1, number=negative_slope), out)


def _add(recorder: _Recorder, input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    if alpha != 1 or not isinstance(other, Tensor) or input.shape != other.shape:
        raise Unsupported("the kernels add values of the same shape")
    step = TracedStep(Kind.ADD, recorder.number(input), -1, recorder.number(other))
    return recorder.note(step, torch.empty_like(input))


def _add_in_place(recorder: _Recorder, input: Tensor, other: Any, *, alpha: float = 1) -> Tensor:
    out = _add(recorder, input, other, alpha=alpha)
    return recorder.alias(input, recorder.number(out))


def _dropout(
    recorder: _Recorder, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if training and p > 0:
        raise Unsupported("the kernels take no random layers")
    return input


def _same(recorder: _Recorder, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs:
        raise Unsupported("the kernels take copies of the same kind")
    return recorder.alias(torch.empty_like(input), recorder.number(input))


def _adaptive(recorder: _Recorder, input: Tensor, output_size: Any) -> Tensor:
    channels, *whole = _image(input)
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    height, width = (own if size is None else size for size, own in zip(sizes, whole))
    step = TracedStep(Kind.AVERAGE, recorder.number(input), -1, shape=_image(input), out=(channels, height, width))
    return recorder.note(step, _bare(input, channels, height, width))


def _avg_pool2d(
    recorder: _Recorder,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    kernel, (_, height, width) = _pair(kernel_size), _image(input)
    steps = kernel if stride is None else _pair(stride)
    whole = height % kernel[0] == 0 and width % kernel[1] == 0
    if steps != kernel or _pair(padding) != (0, 0) or not whole or divisor_override is not None:
        raise Unsupported("the kernels take average pools whose windows lie side by side")
    return _adaptive(recorder, input, (height // kernel[0], width // kernel[1]))


def _mean(recorder: _Recorder, input: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    axes = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if input.ndim != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise Unsupported("the kernels take means of an image's pixels")
    out = _adaptive(recorder, input, 1)
    return out if keepdim else recorder.alias(torch.empty_like(out[:, :, 0, 0]), recorder.number(out))


def _max_pool2d(
    recorder: _Recorder,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if ceil_mode or return_indices:
        raise Unsupported("the kernels take max-pools without ceil_mode and indices")
    steps = kernel_size if stride is None or stride == [] else stride
    channels = _image(input)[0]
    size = windows(_image(input)[1:], _pair(kernel_size), _pair(steps), _pair(padding), _pair(dilation))
    step = TracedStep(
        Kind.MAXIMUM,
        recorder.number(input),
        -1,
        shape=_image(input),
        out=(channels, *size),
        kernel=_pair(kernel_size),
        stride=_pair(steps),
        padding=_pair(padding),
        dilation=_pair(dilation),
    )
    return recorder.note(step, _bare(input, channels, *size))


def _cross_entropy(
    recorder: _Recorder,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if weight is not None or reduction != "none" or label_smoothing or size_average is not None or reduce is not None:
        raise Unsupported("the kernels take the plain cross-entropy of each image")
    return recorder.finish(input, target)


_KNOWN: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    torch.conv2d: _conv2d,
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((torch.sigmoid, F.sigmoid, Tensor.sigmoid), _element(Kind.SIGMOID)),
    **dict.fromkeys((torch.tanh, F.tanh, Tensor.tanh), _element(Kind.TANH)),
    **dict.fromkeys((torch.relu, F.relu, Tensor.relu), _element(Kind.RELU)),
    F.leaky_relu: _leaky_relu,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_in_place),
    F.dropout: _dropout,
    **dict.fromkeys((Tensor.contiguous, Tensor.clone), _same),
    F.adaptive_avg_pool2d: _adaptive,
    F.avg_pool2d: _avg_pool2d,
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    F.cross_entropy: _cross_entropy,
}

_MOVES = frozenset(
    (
        *(torch.flatten, Tensor.flatten, Tensor.view, torch.reshape, Tensor.reshape, Tensor.__getitem__, F.pad),
        *(torch.permute, Tensor.permute, torch.transpose, Tensor.transpose, torch.squeeze, Tensor.squeeze),
        *(torch.unsqueeze, Tensor.unsqueeze, Tensor.unflatten, F.pixel_shuffle, F.pixel_unshuffle),
    )
)
"""They move elements of a tensor, the first argument, and make no new ones but zeros."""

_HARMLESS = frozenset(
    (
        *(Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.dtype.__get__, Tensor.device.__get__),  # type: ignore[attr-defined]
        *(Tensor.requires_grad.__get__, Tensor.is_meta.__get__, Tensor.layout.__get__),  # type: ignore[attr-defined]
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, torch.is_floating_point),
    )
)
"""They return what does not depend on values."""
