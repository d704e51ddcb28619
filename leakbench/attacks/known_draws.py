"""The random draws of a client's layers that its gradient leaks: masks of dropout, branches that were left out.

What dropout sets to zero enters the next layer as an exact zero, and the gradient of that layer's weight is exactly
zero there. A branch that stochastic depth left out has a gradient of zeros. No attack has to guess such draws.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, log2, prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from leakbench.core.rng import generator, seeded
from leakbench.gradients.draws import Draws
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.intercept import Interception
from leakbench.gradients.plain import without_autocast, without_checkpointing
from leakbench.observation import Observation

PROBES = 4
"""The number of random images on which the network is looked at."""

SURE = 5.0
"""A mask with fewer zeros than this many standard deviations below the expected number was not read: noise hides it."""


MIN_LIVE = 0.1
"""The share of a layer's inputs that must not be zero on the random images, so that they show the order of all."""

MIN_AGREEMENT = 0.999
"""The share of a gradient's entries that must be zero or not as their column is; others may be too small to show."""

MAX_MISSED = 0.1
"""Otherwise, the most entries of a row that may be zero though their column is not; more were pruned."""

MAX_UNSEEN = 1e-6
"""How many columns may be expected to have missed every row, if rows miss them independently."""


@dataclass(frozen=True)
class KnownDraws:
    """The draws of one forward pass that follow from a gradient.

    Attributes:
        masks: by the number of the drawing call in a pass, what was kept: [T, 1, *shape] of 0 and 1.
        complete: whether these are all draws of a pass.
    """

    masks: Mapping[int, Tensor] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True)
class DrawCall:
    """A drawing call of a pass: the shape of one image's draws, and the probability of a zero if they are 0 or 1."""

    shape: tuple[int, ...]
    zero: float | None


class Recorder(Draws):
    """A source that keeps everything, or what ``masks`` say, and notes every call.

    Args:
        masks: by the number of the drawing call in the pass, what it keeps; the others keep everything.
        images: how many images the pass has.
    """

    def __init__(self, masks: Mapping[int, Tensor], images: int) -> None:
        super().__init__(None)
        self._masks, self._images = masks, images
        self.calls: list[DrawCall] = []

    def kept(self, x: Tensor, shape: Sequence[int], p: float) -> Tensor:
        """Return what dropout keeps of a tensor."""
        return self._noted(x, shape, p)

    def ones(self, x: Tensor, p: float | Tensor) -> Tensor:
        """Return draws that are 1 with probability ``p``."""
        return self._noted(x, x.shape, 1 - float(torch.as_tensor(p).double().mean()))

    def uniform(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Return 0.5 for draws that no gradient leaks."""
        self.calls.append(DrawCall((), None))
        return torch.full(tuple(like.shape if shape is None else shape), 0.5, device=like.device)

    def normal(self, like: Tensor) -> Tensor:
        """Return 0, likewise."""
        self.calls.append(DrawCall((), None))
        return torch.zeros_like(like)

    def _noted(self, x: Tensor, shape: Sequence[int], zero: float) -> Tensor:
        place = len(self.calls)
        own = tuple(shape)[1:] if len(shape) and shape[0] == self._images else None
        self.calls.append(DrawCall(own or (1,), None if own is None else zero))
        mask = self._masks.get(place)
        return (
            torch.ones(tuple(shape), dtype=torch.bool, device=x.device) if mask is None else mask.expand(tuple(shape))
        )


def read_draws(observation: Observation) -> KnownDraws:
    """Return the draws of a client's one step that follow from its gradient.

    Draws are read only if the gradient shows them without a doubt in every trial: exact zeros, as many as are expected.
    """
    try:
        return _read(observation)
    except Exception:  # whatever a user's network raises on random images: nothing is known of it
        return KnownDraws({}, complete=False)


def _read(observation: Observation) -> KnownDraws:
    if observation.shown is not None or (observation.threat.shares == "weights" and observation.threat.local_steps > 1):
        return KnownDraws({}, complete=False)
    look = _Look(observation)
    calls, base = look.inputs({})
    masks: dict[int, Tensor] = {}
    for place, call in enumerate(calls):
        if call.zero is None or not 0 < call.zero < 1:
            continue
        found = _branch(look, place) if prod(call.shape) == 1 else _mask(look, place, call, base)
        if found is not None:
            masks[place] = found.view(observation.trials, 1, *call.shape)
    certain = [place for place, call in enumerate(calls) if call.zero is not None and not 0 < call.zero < 1]
    return KnownDraws(masks, complete=look.intercepted and len(masks) + len(certain) == len(calls))


class _Look:
    """The network of an observation, on a few random images.

    Attributes:
        intercepted: whether every draw of a pass was noted.
    """

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        own, device = tensors_of(observation.model), observation.device
        self._tensors = {name: _first(observation.weights.get(name), value, device) for name, value in own.items()}
        self._model = copy.deepcopy(observation.model)
        self._images = torch.rand(
            (PROBES, *observation.image_shape), generator=generator("masks"), dtype=torch.float64
        ).to(device)
        self.intercepted = True

    def inputs(self, masks: Mapping[int, Tensor]) -> tuple[list[DrawCall], dict[str, Tensor]]:
        """Return the drawing calls of a pass, and which entries of layers' inputs are not zero: [S] bool by layer.

        Of linear layers and convolutions, whose entries are channels; those that run several times are left out.
        """
        taken: dict[str, list[Tensor]] = {}
        handles = [
            layer.register_forward_pre_hook(partial(_note, taken, name))
            for name, layer in self._model.named_modules()
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
        ]
        try:
            with torch.no_grad(), self._pass(masks) as (recorder, logits):
                logits()
        finally:
            for handle in handles:
                handle.remove()
        return recorder.calls, {name: values[0] for name, values in taken.items() if len(values) == 1}

    def silent(self, masks: Mapping[int, Tensor]) -> set[str]:
        """Return the parameters whose gradient on every image is exactly zero."""
        names = [name for name in self.observation.gradient if self._tensors[name].is_floating_point()]
        own = {name: self._tensors[name].clone().requires_grad_() for name in names}
        with self._pass(masks, own) as (_, logits):
            loss = F.cross_entropy(logits(), torch.zeros(PROBES, dtype=torch.int64, device=self._images.device))
            found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        return {name for name, value in zip(names, found) if value is None or not bool(value.any())}

    @contextlib.contextmanager
    def _pass(
        self, masks: Mapping[int, Tensor], own: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[Recorder, Callable[[], Tensor]]]:
        """Yield a recorder, and the pass that it records."""
        recorder = Recorder(masks, PROBES)
        tensors = {name: value.clone() for name, value in self._tensors.items()} | dict(own or {})
        with (
            seeded("masks", device=self._images.device),
            Interception(recorder),
            without_checkpointing(),
            without_autocast(),
        ):
            state = torch.get_rng_state()
            yield recorder, lambda: functional_call(self._model, tensors, (self._images,))
            self.intercepted &= torch.equal(state, torch.get_rng_state())


def _branch(look: _Look, place: int) -> Tensor | None:
    """Return [T], whether a branch that one number multiplies was kept; None if its gradient does not show it."""
    dropped = {place: torch.zeros((), dtype=torch.bool, device=look.observation.device)}
    names = look.silent(dropped) - look.silent({})
    if not names:
        return None
    any_left = [look.observation.gradient[name].flatten(1).ne(0).any(1) for name in sorted(names)]
    return torch.stack(any_left).any(0).double()


def _mask(look: _Look, place: int, call: DrawCall, base: Mapping[str, Tensor]) -> Tensor | None:
    """Return [T, n], what dropout kept of the n numbers that it draws; None if no layer's gradient shows it.

    The number j of every entry of a layer's input is found from passes in which the bits of j + 1 select what is kept.
    Entries that are zero on all random images, as behind a ReLU, show none; if the others are in the order of the
    draws, these are too. An entry that is zero anyway counts as dropped: neither a value nor a derivative passes there.
    """
    size, zero = prod(call.shape), call.zero
    assert zero is not None
    bits = ceil(log2(size + 2))
    numbers = torch.arange(1, size + 1, device=look.observation.device)
    codes: dict[str, Tensor] = {name: torch.zeros(len(value), dtype=torch.int64) for name, value in base.items()}
    for bit in range(bits):
        _, shown = look.inputs({place: (numbers >> bit & 1).bool().view(call.shape)})
        codes = {name: code + (shown[name].cpu().long() << bit) for name, code in codes.items() if name in shown}
    coin = torch.rand(size, generator=generator("masks", place)) < 0.5
    _, shown = look.inputs({place: coin.to(numbers.device).view(call.shape)})
    for name, code in codes.items():
        live = base[name].cpu() & (code >= 1) & (code <= size)
        if not torch.equal(shown[name].cpu()[live], coin[code[live] - 1]):
            continue
        order = numbers.cpu()
        if len(code) == size and live.double().mean() >= MIN_LIVE and torch.equal(code[live], order[live]):
            code, live = order, torch.ones_like(live)
        elif len(code[live].unique()) < size:
            continue
        found = _left(look.observation, name)
        if found is None:
            continue
        kept = torch.zeros(len(found), size).index_add_(1, code[live] - 1, found.cpu()[:, live].float()) > 0
        expected = zero * size - SURE * sqrt(size * zero * (1 - zero)) - 1
        if bool(((~kept).sum(1) >= max(expected, 1)).all()):
            return kept.double().to(numbers.device)
    return None


def _left(observation: Observation, layer: str) -> Tensor | None:
    """Return [T, S] bool, the entries of a layer's input that are not zero, by its weight's gradient; None if in doubt.

    At least two rows of the gradient must not be zero, and all these must have the same zeros; or rows enough that
    one of them shows every entry although behind a ReLU each misses a few.
    """
    weight = observation.gradient.get(f"{layer}.weight")
    if weight is None:
        return None
    entries = weight.ne(0) if weight.ndim == 3 else weight.flatten(3).ne(0).any(3)
    rows = entries.any(2, keepdim=True)
    found = entries.any(1)
    agree = (entries | ~rows) == (found[:, None] | ~rows)
    count = rows.sum((1, 2))
    missed = (~agree).sum((1, 2)) / (rows & found[:, None]).sum((1, 2)).clamp(min=1)
    unseen = found.shape[1] * missed.double() ** count
    sure = (missed <= MAX_MISSED) & (unseen < MAX_UNSEEN)
    if bool((count >= 2).all()) and (bool(agree.double().mean() > MIN_AGREEMENT) or bool(sure.all())):
        return found
    return None


def _first(value: Tensor | None, own: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the first trial's network in float64; zeros if it is not known."""
    if value is None:
        value = torch.zeros(own.shape, dtype=own.dtype, device=device)
    value = value[0] if value.ndim > own.ndim else value
    return value.detach().double() if value.is_floating_point() else value.clone()


def _note(taken: dict[str, list[Tensor]], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Note which entries of what a layer takes are not zero on any image: of a convolution, which channels."""
    value = inputs[0].detach()
    if isinstance(layer, nn.Conv2d):
        value = value.flatten(2).abs().amax(2)
    if value.ndim == 2 and len(value) == PROBES:
        taken.setdefault(name, []).append(value.ne(0).any(0))
    else:
        taken.setdefault(name, []).extend([value, value])  # several vectors: left out
