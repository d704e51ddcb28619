"""The gradient of each trial's loss with respect to that trial's parameters, differentiable in the image.

Four paths give the same numbers. ``lanes`` runs compiled kernels (``lanes/kernels.cpp``) on networks of the operations
that they know; ``batched`` runs the network once on all trials, with intercepted calls; ``vmap`` runs it on one trial
under ``torch.vmap``, which batches every operation that torch has a rule for; ``one-at-a-time`` is a loop.
``choose_path`` takes the first that agrees with the loop in float64, second derivative included.
"""

import copy
import dataclasses
import enum
import functools
import types
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakbench.core.device import accelerator
from leakbench.core.rng import generator, seeded
from leakbench.core.types import Gradient
from leakbench.errors import Unsupported
from leakbench.gradients.bilinear import shared
from leakbench.gradients.draws import Draws, Generators, MadeDraws
from leakbench.gradients.intercept import UNDER_VMAP, Interception, Operations, per_trial
from leakbench.gradients.lanes.evaluation import GradientComparison, Program
from leakbench.gradients.lanes.library import kernels
from leakbench.gradients.lanes.trace import trace
from leakbench.gradients.losses import training_loss
from leakbench.gradients.normalisation import batch_normalisations
from leakbench.gradients.plain import without_autocast, without_checkpointing

BATCHED = 5
"""The axes of trials of several images: [T, B, C, H, W]."""

Path = Literal["lanes", "batched", "vmap", "one-at-a-time"]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the loss [B] that the network is trained with (``training_loss``), by default the cross-entropy.

    Args:
        model: from images x [B, C, H, W] to logits.
        x: images.
        y: [B] int64, or [B, K] class probabilities.
    """
    return training_loss(model, x, y)


class _LossModule(nn.Module):
    """A module whose output is a loss, so that one ``functional_call`` covers both."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss [B]."""
        return self.loss(self.model, x, y)


@dataclass(frozen=True)
class Evaluator:
    """Per-trial gradients of one architecture.

    Attributes:
        model: the architecture; the values of its tensors are given with every call.
        names: the parameters to differentiate by.
        loss: (model, x [B, C, H, W], y) -> [B].
        path: ``lanes``, ``batched``, ``vmap`` or ``one-at-a-time``; ``lanes`` computes gradients, and the rest is
            computed as by ``batched``.
    """

    model: nn.Module
    names: tuple[str, ...]
    loss: Loss = plain_loss
    path: Path = "batched"

    def losses(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        generators: Generators | MadeDraws | None = None,
        known: Mapping[int, Tensor] = types.MappingProxyType({}),
        native: bool = False,
    ) -> Tensor:
        """Return the loss [T] of each trial; the arguments are those of ``gradient``."""
        module = _LossModule(self.model, self.loss)
        draws = Draws(generators, known=known, native=native)
        batch = x.shape[1] if x.ndim == BATCHED else 0
        if self.path in ("lanes", "batched"):
            with Interception(draws, per_trial(batch or 1)), without_checkpointing(), without_autocast():
                if not batch:
                    return functional_call(module, self._named(self._placed(tensors)), (x, y))
                own = self._named(self._placed(tensors, batch))
                losses: Tensor = functional_call(module, own, (x.flatten(0, 1), y.flatten(0, 1)))
                return losses.view(len(x), batch).mean(1)
        if self.path == "vmap":
            named = self._named(tensors)

            def alone(tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, index: Tensor) -> Tensor:
                with Interception(draws.of(index), UNDER_VMAP), without_checkpointing(), without_autocast():
                    rows = (x, y) if batch else (x[None], y[None])
                    loss: Tensor = functional_call(module, dict(tensors), rows).mean()
                return loss

            axes = {
                f"model.{name}": 0 if value.ndim > self._own[name].ndim else None for name, value in tensors.items()
            }
            index = torch.arange(len(x), device=x.device)
            with warnings.catch_warnings():
                # an operation that vmap has no rule for is looped over, which it says every time
                warnings.filterwarnings("ignore", "There is a performance drop")
                out: Tensor = torch.vmap(alone, in_dims=(axes, 0, 0, 0), randomness="same")(named, x, y, index)
            return out
        # all rows are taken at once: the derivative of each by itself would be as large as that of all
        apart = {name: v.unbind() if v.ndim > self._own[name].ndim else [v] * len(x) for name, v in tensors.items()}
        rows = []
        for t, (image, label) in enumerate(zip(x.split(1), y.split(1))):
            with Interception(draws.of(t)), without_checkpointing(), without_autocast():
                own = self._named({name: values[t] for name, values in apart.items()})
                pair = (image[0], label[0]) if batch else (image, label)
                rows.append(functional_call(module, own, pair).mean(0, keepdim=True))
        return torch.cat(rows)

    def gradient(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        create_graph: bool = True,
        generators: Generators | MadeDraws | None = None,
        known: Mapping[int, Tensor] = types.MappingProxyType({}),
        native: bool = False,
    ) -> Gradient:
        """Return each trial's gradient by its own parameters, [T, *shape] per name.

        Args:
            tensors: every parameter and buffer of the model by name; parameters [T, *shape], buffers [*shape] or
                [T, *shape].
            x: [T, C, H, W]; of trials of B images [T, B, C, H, W], and the loss of a trial is the mean of theirs.
            y: [T] int64 or [T, K] class probabilities; [T, B] or [T, B, K].
            create_graph: keep the graph, so that the gradient can be differentiated by x, y and ``tensors``.
            generators: makes one generator a trial for the network's random layers, such as dropout, or has draws that
                were made before; without it a network that draws raises Unsupported.
            known: the draws of random layers that are known (``Draws``).
            native: random layers draw as torch's own do on the CPU (``Draws``).
        """
        if self.path == "lanes" and not any(value.requires_grad for value in tensors.values()):
            return self._by_kernels(tensors, x if create_graph else x.detach(), y if create_graph else y.detach())
        # views, because the backward pass can leave out only tensors that are no leaves
        own = {name: _differentiable(tensors[name]) for name in self.names}
        loss = self.losses({**tensors, **own}, x.view_as(x), y, generators, known, native)
        grads = torch.autograd.grad(loss.sum(), list(own.values()), create_graph=create_graph, allow_unused=True)
        return {name: torch.zeros_like(own[name]) if grad is None else grad for name, grad in zip(self.names, grads)}

    def _by_kernels(self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Gradient:
        """Return the gradients of ``gradient`` by the compiled kernels; raises Unsupported."""
        program, x, q, batch = self._for_kernels(x, y)
        return program.gradient(tensors, x, q, self.names, batch)

    def _for_kernels(self, x: Tensor, y: Tensor) -> tuple[Program, Tensor, Tensor, int]:
        """Return the traced loss, images [T B, C, H, W], class probabilities [T B, K] and B; raises Unsupported."""
        program, batch = self._program(tuple(x.shape[-3:]), x.device), 1
        q = program.probabilities(y, x.dtype)
        if x.ndim == BATCHED:
            batch, x, q = x.shape[1], x.flatten(0, 1), q.flatten(0, 1)
            if not program.apart and batch > 1:
                raise Unsupported("the kernels take trials of several images if no statistics are taken of them")
        return program, x, q, batch

    def compare(
        self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, observed: Mapping[str, Tensor], gap: bool
    ) -> tuple[Tensor, Tensor]:
        """Compare each trial's gradient with an observed one by the kernels, which need not write it: ``lanes`` only.

        Args:
            tensors: as for ``gradient``.
            x: as for ``gradient``.
            y: as for ``gradient``.
            observed: an observed gradient by some of the parameters, [T, *shape] by name.
            gap: compare by the difference.

        Returns:
            <g', g> and <g', g'>, or with ``gap`` zeros and |g' - g|^2: [P, T] in the order of ``observed``;
            differentiable once in x and y.
        """
        program, x, q, batch = self._for_kernels(x, y)
        return program.compare(tensors, x, q, observed, gap, batch)

    def comparison(
        self, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor, observed: Mapping[str, Tensor], gap: bool
    ) -> GradientComparison:
        """Return ``compare`` with a derivative that is asked for, instead of a graph; of batches by [T B] images."""
        program, x, q, batch = self._for_kernels(x, y)
        return GradientComparison(program, tensors, x, q, observed, gap, batch)

    def _program(self, shape: tuple[int, ...], device: torch.device) -> Program:
        """Return the traced loss of images of a shape; raises Unsupported."""
        if shape not in self._programs:
            found = kernels()
            if found is None or device.type != "cpu" or len(shape) != BATCHED - 2:
                raise Unsupported("there are kernels for a CPU, if they could be built")
            shapes = {name: tuple(value.shape) for name, value in self._own.items()}
            self._programs[shape] = Program(found, trace(self.model, self.loss, shape), shapes)
        return self._programs[shape]

    def suits_kernels(
        self, image_shape: tuple[int, ...], trials: int, device: torch.device, dtype: torch.dtype, batch: int = 1
    ) -> bool:
        """Return whether the kernels know the network, and this many trials, of ``batch`` images, are worth it."""
        if kernels() is None:
            return False
        try:
            program = self._program(image_shape, device)
            return (batch == 1 or program.apart) and program.suits(trials, dtype, batch)
        except (Unsupported, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False

    def statistics(
        self,
        tensors: Mapping[str, Tensor],
        x: Tensor,
        generators: Generators | MadeDraws | None = None,
    ) -> dict[str, tuple[Tensor, Tensor, int]]:
        """Return mean and biased variance [T, C] of what each batch normalisation takes, and over how many values.

        They are differentiable in x; a layer that does not run is left out, and of one that runs several times the
        first pass counts.

        Args:
            tensors: as for ``gradient``.
            x: [T, C, H, W], or [T, B, C, H, W] of trials of B images.
            generators: as for ``gradient``.
        """
        layers, taken = batch_normalisations(self.model), dict[str, list[Tensor]]()
        batch = x.shape[1] if x.ndim == BATCHED else 0
        draws = Draws(generators, known={})

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, inputs: taken.setdefault(name, []).append(inputs[0])

        def run(named: dict[str, Tensor], rows: Tensor, own: Draws, operations: Operations) -> None:
            with Interception(own, operations), without_checkpointing(), without_autocast():
                functional_call(self.model, named, (rows,))

        hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
        try:
            if self.path in ("lanes", "batched"):
                named = self._cloned(self._placed(tensors, batch or 1))
                run(named, x.flatten(0, 1) if batch else x, draws, per_trial(batch or 1))
                first = {name: values[0] for name, values in taken.items()}
            else:
                each: dict[str, list[Tensor]] = {}
                for t in range(len(x)):
                    taken.clear()
                    own = {name: v[t] if v.ndim > self._own[name].ndim else v for name, v in tensors.items()}
                    run(self._cloned(own), x[t] if batch else x[t : t + 1], draws.of(t), {})
                    for name, values in taken.items():
                        each.setdefault(name, []).append(values[0])
                first = {name: torch.cat(values) for name, values in each.items()}
        finally:
            for hook in hooks:
                hook.remove()
        found = {}
        for name, value in first.items():
            rows = value.reshape(len(x), -1, value.shape[1], *value.shape[2:]).transpose(1, 2).flatten(2)
            found[name] = rows.mean(2), rows.var(2, correction=0), rows.shape[2]
        return found

    def _cloned(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by name, with buffers cloned, because modules write into them."""
        return {
            name: value.clone() if name in self._buffers and not value.requires_grad else value
            for name, value in tensors.items()
        }

    def _placed(self, tensors: Mapping[str, Tensor], batch: int = 1) -> dict[str, Tensor]:
        """Put the trials of [T, 1, *shape] in the place of the batch axis that a parameter keeps free: [T, *shape].

        Class tokens, position embeddings and other parameters that a network adds to or joins with activations do so.
        Of trials of several images, each image gets a row of it; a tensor [T, B, *shape] has one for each already.
        """
        placed = {name: value.squeeze(1) if name in self._free else value for name, value in tensors.items()}
        if batch == 1:
            return placed
        for name, value in placed.items():
            if name in self._free:
                placed[name] = value.repeat_interleave(batch, 0)
            elif value.ndim == self._own[name].ndim + 2:
                placed[name] = value.flatten(0, 1)
        return placed

    def _named(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name tensors as ``_LossModule`` does; buffers are cloned, because modules write into them."""
        return {f"model.{name}": value for name, value in self._cloned(tensors).items()}

    @cached_property
    def _programs(self) -> dict[tuple[int, ...], Program]:
        """The traced loss by the shape of the image."""
        return {}

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return tensors_of(self.model)

    @cached_property
    def _buffers(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.model.named_buffers())

    @cached_property
    def _free(self) -> frozenset[str]:
        """The parameters [1, *shape] of modules that are none of torch's own, whose calls are intercepted instead."""
        return frozenset(
            name
            for name, value in self.model.named_parameters()
            if value.ndim >= 2 and value.shape[0] == 1 and not _of_torch(self.model, name)
        )


def _differentiable(tensor: Tensor) -> Tensor:
    """Return a view of a tensor that gradients can be taken by."""
    tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
    return tensor.view_as(tensor)


def _of_torch(model: nn.Module, name: str) -> bool:
    """Return whether a parameter belongs to one of torch's own layers, or to a class that is built on one."""
    owner = type(model.get_submodule(name.rpartition(".")[0]))
    return any(base.__module__.startswith("torch.nn.modules.") for base in owner.__mro__ if base is not nn.Module)


def choose_path(
    evaluator: Evaluator,
    tensors: Mapping[str, Tensor],
    image_shape: tuple[int, ...],
    classes: int,
    batch: int = 1,
    *,
    lanes: int = 0,
) -> Path:
    """Return the first path that agrees with one-at-a-time double backward in float64 to 1e-8.

    The comparison takes two trials with different images and, if trials have their own, different parameters; the
    gradient itself, and the derivative of a projection of it by the image. It is made once in a process for networks
    that differ only in the values of their parameters. Trials of several images (``batch``) are compared with two.

    Args:
        evaluator: the network and its loss.
        tensors: as for ``Evaluator.gradient``.
        image_shape: channels, height and width.
        classes: the number of classes.
        batch: the images of a trial.
        lanes: how many trials are to take the path ``lanes``, by which a gradient is differentiated by image and labels
            only; 0: it is none of the paths.

    Raises:
        Unsupported: the network cannot be differentiated twice even one trial at a time, or draws random numbers
            in a way that is not intercepted.
    """
    own = tensors_of(evaluator.model)
    device = next(iter(tensors.values())).device
    served: tuple[Path, ...] = ("batched", "vmap")
    dtype = next((value.dtype for value in tensors.values() if value.is_floating_point()), torch.float32)
    if lanes and evaluator.suits_kernels(image_shape, lanes, device, dtype, batch):
        served = ("lanes", *served)
    try:
        key = (
            served,
            fingerprint(evaluator.model),
            fingerprint(evaluator.loss),
            evaluator.names,
            image_shape,
            classes,
            batch > 1,
            tuple((name, _kind(value, own[name])) for name, value in tensors.items()),
        )
    except (TypeError, RecursionError):
        return _compare(evaluator, tensors, image_shape, classes, batch, served)
    if key not in _CHOSEN:
        _CHOSEN[key] = _compare(evaluator, tensors, image_shape, classes, batch, served)
    return _CHOSEN[key]


_CHOSEN: dict[Hashable, Path] = {}
"""The results of ``choose_path``, by everything that they depend on."""


def _kind(value: Tensor, own: Tensor) -> Hashable:
    """Return the properties of a tensor that a path can depend on: device, type, trial axis, values of integers."""
    axis = "none" if value.ndim == own.ndim else "shared" if shared(value) else "own"
    values = () if value.is_floating_point() else tuple(value.flatten().tolist())
    return (str(value.device), value.dtype, axis, values)


def _compare(
    evaluator: Evaluator,
    tensors: Mapping[str, Tensor],
    image_shape: tuple[int, ...],
    classes: int,
    batch: int,
    served: tuple[Path, ...],
) -> Path:
    """Return the first path that gives the loop's numbers; see ``choose_path``."""
    rng = generator("choose path")
    device = next(iter(tensors.values())).device
    own = tensors_of(evaluator.model)
    pair = {}
    for name, value in tensors.items():
        two = value.detach()
        if value.ndim > own[name].ndim:
            one = value[:1].detach()
            if value.ndim == own[name].ndim + 2:  # a draw for each image
                one = one[:, :2]
            if shared(value) or not one.is_floating_point():
                two = one.to(_double(one)).expand(2, *one.shape[1:])
            else:
                two = torch.cat([one.double(), 0.9 * one.double()])
        pair[name] = two.to(_double(two))
    # the values are given with each call; the module itself only has to be of the same type
    places = (2,) if batch == 1 else (2, 2)
    x = torch.rand((*places, *image_shape), generator=rng, dtype=torch.float64).to(device)
    y = torch.softmax(torch.randn((*places, classes), generator=rng, dtype=torch.float64), -1).to(device)
    along = {name: torch.randn(own[name].shape, generator=rng).to(device, torch.float64) for name in evaluator.names}

    def second(path: Path) -> tuple[Gradient, Tensor]:
        probe = x.clone().requires_grad_()
        with seeded("choose path", device=device):
            state = _global_state(device)
            gradient = replace(evaluator, path=path).gradient(pair, probe, y, generators=_own_generators)
            if not all(map(torch.equal, state, _global_state(device))):
                raise Unsupported(
                    "the network draws random numbers in a way that cannot be made each trial's own (dropout, "
                    "stochastic depth and rand_like can); attack it in eval mode"
                )
        used = [name for name in evaluator.names if gradient[name].requires_grad]
        weights = [along[name].expand_as(gradient[name]) for name in used]
        outputs = [gradient[name] for name in used]
        (by_image,) = torch.autograd.grad(outputs, probe, weights, allow_unused=True) if used else (None,)
        if by_image is None:
            raise Unsupported("the gradient does not depend on the image; there is nothing to match")
        return {name: value.detach() for name, value in gradient.items()}, by_image

    def agrees(path: Path) -> bool:
        try:
            fast_gradient, fast = second(path)
        except (RuntimeError, ValueError, NotImplementedError, TypeError, IndexError, Unsupported):
            return False
        return _close(fast, slow) and all(_close(fast_gradient[name], slow_gradient[name]) for name in evaluator.names)

    try:
        slow_gradient, slow = second("one-at-a-time")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Unsupported(f"the network cannot be differentiated twice: {' '.join(str(error).split())}") from error
    return next((path for path in served if agrees(path)), "one-at-a-time")


def _double(value: Tensor) -> torch.dtype:
    return torch.float64 if value.is_floating_point() else value.dtype


def _own_generators() -> list[torch.Generator]:
    return [generator("choose path", trial) for trial in range(2)]


def _global_state(device: torch.device) -> list[Tensor]:
    """Return the states of torch's global generators that a network on this device may draw from."""
    states = [torch.get_rng_state()]
    return states if (module := accelerator(device)) is None else [*states, module.get_rng_state(device)]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-8 * b.norm() + 1e-12)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a network by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def fingerprint(value: object) -> Hashable:
    """Return the structure of a network, without the values of its parameters: equal for copies, unequal otherwise.

    Raises:
        TypeError: something in the network cannot be compared, such as an object of a class of one's own.
    """
    if value is None or isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, (tuple, list)):
        return (type(value), *map(fingerprint, value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(map(fingerprint, value)))
    if isinstance(value, dict):
        return (type(value), tuple((fingerprint(key), fingerprint(item)) for key, item in value.items()))
    if isinstance(value, functools.partial):
        return (functools.partial, *map(fingerprint, (value.func, value.args, value.keywords)))
    if isinstance(value, types.MethodType):
        return (types.MethodType, value.__func__, fingerprint(value.__self__))
    if dataclasses.is_dataclass(value):
        return (type(value), fingerprint(vars(value)))
    if isinstance(value, nn.Module):
        tensors = [
            (name, type(tensor), tuple(tensor.shape), tensor.dtype)
            for held in (value._parameters, value._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        # hooks of loading and saving have no part in a forward pass
        rest = {k: v for k, v in vars(value).items() if k not in ("_parameters", "_buffers") and "state_dict" not in k}
        return (type(value), tuple(tensors), fingerprint(rest))
    raise TypeError(f"a {type(value).__name__} cannot be compared")


_PLAIN = (
    *(bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, enum.Enum),
    *(types.FunctionType, types.BuiltinFunctionType),
)


HALF = (torch.float16, torch.bfloat16)


def working(model: nn.Module) -> torch.dtype:
    """Return the type in which an attacker computes with a network: float64 for such a network, float32 for any other.

    A client of a network in half precision computes in half precision, and the server may take its numbers for more
    exact ones.
    """
    kinds = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return torch.float64 if torch.float64 in kinds else torch.float32


def architecture(model: nn.Module) -> nn.Module:
    """Return a copy of a network without its values: every tensor is moved to the ``meta`` device.

    Tensors of half precision become float32, in which the server computes (``lifted``).
    """
    own = copy.deepcopy(model).to("meta")
    return own.float() if any(value.dtype in HALF for value in tensors_of(own).values()) else own


def lifted(value: Tensor) -> Tensor:
    """Return a tensor of half precision as float32, and any other as it is."""
    return value.float() if value.dtype in HALF else value
