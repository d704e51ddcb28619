"""What a network's output is, and the loss that it is trained with, as a forward hook of the network.

Networks return logits, or a tuple, a dict or an object that has them; some return one logit for two classes. ``Head``
makes logits [B, K] of all of these, and every attack and client then computes the loss of ``training_loss``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.errors import BadOption, Unsupported

LossFunction = Callable[[Any, Tensor], Tensor]
"""A loss of one's own: (what the network returns, targets [B, K], or [B, 1] of one logit) -> the mean loss."""

CROSS_ENTROPY = "cross-entropy"

LOGITS = ("logits", "out", "output", "prediction")
"""The keys of a dict under which networks return logits; the first that it has counts."""

LOSSES: Mapping[str, str] = {
    CROSS_ENTROPY: "the cross-entropy of the logits and the label",
    "bce": "the binary cross-entropy of the logits and the label (mean over the outputs)",
    "mse": "the squared error of the outputs to the label's one-hot vector (mean over the outputs)",
    "nll": "the negative log-likelihood of the label (the outputs are log-probabilities)",
}
"""The losses by name, each in words."""

_RAW: ContextVar[bool] = ContextVar("raw", default=False)


@contextmanager
def raw_outputs() -> Iterator[None]:
    """In this context networks return what they return by themselves."""
    token = _RAW.set(True)
    try:
        yield
    finally:
        _RAW.reset(token)


@dataclass(frozen=True)
class Head:
    """The loss of a network, and a forward hook that makes logits [B, K] of its output.

    Attributes:
        loss: a name in ``LOSSES``, or a function of one's own.
        single: whether the network returns one logit, for two classes: the logits are then 0 and that one, whose
            cross-entropy is the binary cross-entropy of the one.
        plain: whether the network returns the tensor of logits itself.
    """

    loss: str | LossFunction = CROSS_ENTROPY
    single: bool = False
    plain: bool = True

    def __call__(self, module: nn.Module, inputs: object, output: Any) -> Tensor:
        """Return the logits of an output."""
        if _RAW.get():
            kept: Tensor = output
            return kept
        found = main_output(output)
        if self.single:
            column = found.reshape(len(found), 1)
            found = torch.cat([torch.zeros_like(column), column], 1)
        return found

    @property
    def name(self) -> str:
        """The name of the loss."""
        return self.loss if isinstance(self.loss, str) else f"{self.loss.__module__}:{self.loss.__qualname__}"

    @property
    def several(self) -> bool:
        """Whether an image may have several classes, or none: each output is a class by itself."""
        return self.loss == "bce" and not self.single

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the class probabilities [..., K] of logits [..., K] by the loss."""
        return torch.sigmoid(logits) if self.several else torch.softmax(logits, -1)

    @property
    def words(self) -> str:
        """The loss in words."""
        if not isinstance(self.loss, str):
            return f"the function {self.name} of the network's outputs and the label's one-hot vector"
        if self.single:
            return "the binary cross-entropy of the one logit and the label"
        return LOSSES[self.loss]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Head":
        """Return this one: it never changes."""
        return self


def main_output(output: Any) -> Tensor:
    """Return the tensor of logits in what a network returns: the first of a tuple, or that under a key of ``LOGITS``.

    Raises:
        Unsupported: there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = next((output[key] for key in LOGITS if isinstance(output.get(key), Tensor)), None)
        if named is None:
            keys = ", ".join(map(str, output))
            raise Unsupported(f"the network returns a dict of {keys}; return the logits as 'logits'")
        return named
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Sequence):
        found = next((one for one in output if isinstance(one, Tensor)), None)
    if not isinstance(found, Tensor):
        raise Unsupported(f"the network returns {type(output).__name__}; return a tensor of logits")
    return found


def head_of(model: nn.Module) -> Head:
    """Return the head of a network, also of one that was built around it; the usual one if it has none."""
    for layer in model.modules():
        for hook in layer._forward_hooks.values():
            if isinstance(hook, Head):
                return hook
    return Head()


def targets(labels: Tensor, like: Tensor) -> Tensor:
    """Return labels [B] int64 as one-hot vectors of the shape of the logits [B, K]; probabilities as they are."""
    if labels.is_floating_point():
        return labels
    return (labels[:, None] == torch.arange(like.shape[1], device=labels.device)).to(like.dtype)


def training_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss [B] of images x [B, C, H, W] that the network is trained with.

    Args:
        model: the network; its ``Head`` says what the loss is.
        x: images.
        y: [B] int64, or [B, K] class probabilities.

    Raises:
        BadOption: a loss of one's own returns something else than one number for one image.
    """
    head = head_of(model)
    if not isinstance(head.loss, str):
        return _own_loss(head, model, x, y)
    logits: Tensor = model(x)
    if head.loss == CROSS_ENTROPY or head.single:
        return F.cross_entropy(logits, y, reduction="none")
    wanted = targets(y, logits)
    if head.loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    if head.loss == "mse":
        return (logits - wanted).square().mean(1)
    return -(wanted * logits).sum(1)


def _own_loss(head: Head, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss [B] of a function of one's own, which is called with one image's outputs at a time."""
    assert not isinstance(head.loss, str)
    with raw_outputs():
        output = model(x)
    main = main_output(output)
    like = torch.zeros(len(x), 2 if head.single else main.shape[1], dtype=main.dtype, device=main.device)
    wanted, rows = targets(y, like), []
    wanted = wanted[:, 1:] if head.single else wanted
    for place in range(len(x)):
        value = head.loss(_row(output, place), wanted[place : place + 1])
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise BadOption(f"--loss {head.name} returns {kind} for one image; return one number, the mean of a batch")
        rows.append(value.reshape(()))
    return torch.stack(rows)


def _row(output: Any, place: int) -> Any:
    """Return what a network returned for one image of a batch."""
    if isinstance(output, Tensor):
        return output[place : place + 1] if output.dim() else output
    if isinstance(output, Mapping):
        return type(output)(**{str(key): _row(value, place) for key, value in output.items()})
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_row(value, place) for value in output))
    if isinstance(output, (list, tuple)):
        return type(output)(_row(value, place) for value in output)
    return output


def loss_named(name: str) -> str:
    """Return the name of a loss.

    Raises:
        BadOption: there is no such loss.
    """
    if name not in LOSSES:
        raise BadOption(f"--loss {name!r} is none of {', '.join(LOSSES)}; give one, or package.module:function")
    return name


def last_function(logits: Tensor) -> str:
    """Return ``softmax``, ``sigmoid`` or ``log_softmax`` if that was the last operation; else nothing.

    Args:
        logits: the network's own output, with a graph.
    """
    name = type(logits.grad_fn).__name__.lower()
    kinds = ("logsoftmax", "softmax", "sigmoid")
    found = next((kind for kind in kinds if name.startswith(kind)), "")
    return "log_softmax" if found == "logsoftmax" else found
