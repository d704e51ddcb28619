"""A user's own network as a model of a matrix."""

import copy
import hashlib
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from leakbench.core.component import LATER
from leakbench.core.device import out_of_memory
from leakbench.core.rng import generator, seeded
from leakbench.errors import Unsupported, words
from leakbench.gradients.losses import (
    CROSS_ENTROPY,
    Head,
    LossFunction,
    head_of,
    loss_named,
    main_output,
    training_loss,
)
from leakbench.gradients.plain import without_checkpointing
from leakbench.models.base import Model
from leakbench.models.surgery import with_buffers


@dataclass(frozen=True, eq=False)
class OwnModule(Model):
    """A network that the user built: any ``nn.Module`` from images [B, C, H, W] in [0, 1] to logits [B, K].

    The logits may be in a tuple, a dict or an object (``main_output``). One logit is for two classes, with the loss
    ``bce`` or a function of one's own.

    Attributes:
        label: its name in reports.
        module: the network; it is attacked as it is, in its mode and with its weights, and never changed.
        loss: what it is trained with (``Head``): a name in ``LOSSES``, or a function of one's own.

    Raises:
        BadOption: there is no loss of this name.
    """

    name: ClassVar[str] = "module"
    label: str
    module: nn.Module = field(repr=False)
    loss: str | LossFunction = field(default=CROSS_ENTROPY, metadata=LATER)
    _heads: dict[tuple[int, int, int], Head] = field(default_factory=dict, init=False, repr=False)
    _behaviours: dict[tuple[int, int, int], str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Take off what ``torch.compile`` and data parallelism put around the network (``unwrapped``)."""
        if isinstance(self.loss, str):
            loss_named(self.loss)
        object.__setattr__(self, "module", unwrapped(self.module, f"model {self.label!r}"))

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return a copy of the module, after checking that it maps a blank image to ``num_classes`` logits.

        Lazy layers are initialised, and a tensor that is a plain attribute of a layer becomes a buffer, which is moved
        and converted with the network.

        Raises:
            Unsupported: the network returns other logits, or a layer keeps a tensor in a list, tuple or dict.
        """
        logits = self.logits(torch.full((1, *image_shape), 0.5))
        if logits.shape != (1, num_classes):
            raise Unsupported(
                f"model {self.label!r} returns logits of shape {tuple(logits.shape)} for one image, "
                f"not (1, {num_classes}); give it one output a class"
            )
        network = self.initialised(image_shape)
        head = self.head(image_shape)
        if head != Head() and head_of(network) == Head():
            network.register_forward_hook(head)
        self._refuse_hidden(network)
        return with_buffers(network)

    def head(self, image_shape: tuple[int, int, int]) -> Head:
        """Return the head of the network: the usual one if it returns a tensor of logits, trained by cross-entropy.

        Raises:
            Unsupported: the network takes no such image, or returns no logits.
        """
        if image_shape not in self._heads:
            self._heads[image_shape] = self._head(image_shape)
        return self._heads[image_shape]

    def _head(self, image_shape: tuple[int, int, int]) -> Head:
        known = head_of(self.module)
        if known != Head():
            return known
        output = self._output(torch.full((1, *image_shape), 0.5))
        found = self._main(output)
        single = found.ndim == 1 or found.shape[1] == 1
        if single and isinstance(self.loss, str) and self.loss != "bce":
            raise Unsupported(
                f"model {self.label!r} returns 1 logit; give it one output for each class, at least two, or the loss "
                "bce"
            )
        return Head(self.loss, single, isinstance(output, Tensor))

    def _output(self, images: Tensor) -> Any:
        """Return what the network returns in evaluation mode for images [B, C, H, W]."""
        probe = self.initialised(images.shape[1:]).eval()
        with self._refused(images.shape[1:]), without_checkpointing(), torch.no_grad():
            return probe(images.to(self.dtype))

    def _main(self, output: Any) -> Tensor:
        """Return the tensor of logits in it, [B, K] or [B] of one logit."""
        try:
            found = main_output(output)
        except Unsupported as error:
            raise Unsupported(f"model {self.label!r}: {error}") from None
        if found.ndim > 2 or not found.ndim:
            raise Unsupported(
                f"model {self.label!r} returns a tensor of shape {tuple(found.shape)}; give logits of shape [B, K]"
            )
        return found

    def _refuse_hidden(self, network: nn.Module) -> None:
        """Raise Unsupported for a tensor in a container of a layer, which does not move with the network."""
        known = {id(value) for value in (*network.parameters(), *network.buffers())}
        for place, layer in network.named_modules():
            for name, value in vars(layer).items():
                if name not in _OF_MODULES and isinstance(value, (list, tuple, dict)) and _holds_tensor(value, known):
                    part = f"layer {place!r}" if place else "it"
                    raise Unsupported(
                        f"model {self.label!r}: {part} ({type(layer).__name__}) keeps a tensor in its "
                        f"{type(value).__name__} {name!r}, which does not move with the network; use "
                        "register_buffer, nn.ParameterList or nn.ParameterDict"
                    )

    def initialised(self, image_shape: tuple[int, ...]) -> nn.Module:
        """Return a copy on the CPU, in which lazy layers are initialised, always in the same way.

        Raises:
            Unsupported: the network takes no blank image of this shape.
        """
        network = copy.deepcopy(self.module).cpu()
        if any(map(is_lazy, network.parameters())):
            modes = {layer: layer.training for layer in network.modules()}
            with self._refused(image_shape), seeded("lazy"), without_checkpointing(), torch.no_grad():
                network.eval()(torch.full((1, *image_shape), 0.5, dtype=self.dtype))
            for layer in network.modules():
                layer.training = modes[layer]
        return network

    @contextmanager
    def _refused(self, image_shape: tuple[int, ...]) -> Iterator[None]:
        """Turn whatever the network raises on an image into Unsupported."""
        try:
            yield
        except Exception as error:  # whatever a user's module raises
            if out_of_memory(error):
                raise
            raise Unsupported(
                f"model {self.label!r} takes no image of shape {tuple(image_shape)}: {words(error)}"
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the network's first such parameter, in which it takes images."""
        return network_dtype(self.module)

    def logits(self, images: Tensor) -> Tensor:
        """Return the network's output in evaluation mode for images [B, C, H, W]; the network is not changed.

        Raises:
            Unsupported: the network does not take such images, or returns no [B, K] logits.
        """
        found: Tensor = self._main(self._output(images))
        if found.ndim == 1 or found.shape[1] == 1:
            return Head(single=True)(self.module, (), found)
        return found

    @property
    def title(self) -> str:
        """What reports call the network: its label, and the loss if that is not the cross-entropy."""
        return self.label if self.loss == CROSS_ENTROPY else f"{self.label}, loss {Head(self.loss).name}"

    def settings(self) -> dict[str, Any]:
        """Return the label, and a hash of the architecture, mode and values."""
        own = {"name": self.name, "version": self.version, "label": self.label, "module": self._fingerprint}
        return own if self.loss == CROSS_ENTROPY else {**own, "loss": Head(self.loss).name}

    def behaviour(self, image_shape: tuple[int, int, int]) -> dict[str, str]:
        """Return a hash of ``forward``'s results, which a list of layers does not determine; once for each shape."""
        if image_shape not in self._behaviours:
            try:
                self._behaviours[image_shape] = _behaviour(self.module, image_shape, self.head(image_shape))
            except Unsupported:  # said when it is built
                self._behaviours[image_shape] = ""
        return {"behaviour": self._behaviours[image_shape]}

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.module).encode())
        digest.update(str([module.training for module in self.module.modules()]).encode())
        for name, value in [*self.module.named_parameters(), *self.module.named_buffers()]:
            digest.update(name.encode())
            if is_lazy(value):  # its values follow from the shape of the images
                continue
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


_OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""


def _holds_tensor(value: object, known: Collection[int]) -> bool:
    """Return whether a tensor that is none of the known ones, by ``id``, is in a container or in those within it."""
    if isinstance(value, Tensor):
        return id(value) not in known
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(_holds_tensor(each, known) for each in inner)


def unwrapped(module: nn.Module, name: str) -> nn.Module:
    """Return a network without the wrappers of ``torch.compile`` and data parallelism, which compute the same.

    A network with such a wrapper within is copied; others are returned as they are.

    Args:
        module: the network.
        name: what errors call it.

    Raises:
        Unsupported: it, or a part of it, is TorchScript, whose operations cannot be followed.
    """
    while (inner := _inside(module)) is not None:
        module = inner
    for place, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            part = f"its layer {place!r} is" if place else "it is"
            raise Unsupported(f"{name}: {part} TorchScript, which no attack can follow; give the nn.Module itself")
    wrapped = {layer: inner for layer in module.modules() if (inner := _inside(layer)) is not None}
    compiled = [place for place, layer in module.named_modules() if _compiled_forward(layer, name)]
    if not wrapped and not compiled:
        return module
    memo: dict[int, Any] = {}
    for layer, inner in reversed(wrapped.items()):
        memo[id(layer)] = copy.deepcopy(unwrapped(inner, name), memo)
    network: nn.Module = copy.deepcopy(module, memo)
    for place in compiled:
        del network.get_submodule(place).__dict__["forward"]
    return network


def _inside(module: nn.Module) -> nn.Module | None:
    """Return the network within a wrapper of torch's; None for anything else."""
    if type(module).__name__ == "OptimizedModule":
        inner: nn.Module | None = module._modules.get("_orig_mod")
        return inner
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return None


def _compiled_forward(layer: nn.Module, name: str) -> bool:
    """Return whether a layer's own ``forward`` is its class's, compiled.

    Raises:
        Unsupported: another function was compiled and put in its place.
    """
    compiled = getattr(vars(layer).get("forward"), "_torchdynamo_orig_callable", None)
    if compiled is None or _inside(layer) is not None:
        return False
    function = inspect.unwrap(compiled)
    if getattr(function, "__func__", function) is not type(layer).forward:
        raise Unsupported(
            f"{name}: the forward of its {type(layer).__name__} is compiled from another function than its class's; "
            "give the network before torch.compile"
        )
    return True


def network_dtype(module: nn.Module) -> torch.dtype:
    """Return the floating-point type of a network's first such parameter, in which it takes images."""
    return next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)


def _behaviour(module: nn.Module, image_shape: tuple[int, int, int], head: Head) -> str:
    """Return a hash of a module's logits and gradient on a fixed image and its label; empty if it has none.

    In float64, and of so few digits that another machine finds the same; in float32 if the module supports no other.
    """
    image = torch.rand((1, *image_shape), generator=generator("behaviour"), dtype=torch.float64)
    for dtype, digits in ((torch.float64, 6), (torch.float32, 3)):
        probe = copy.deepcopy(module).cpu().to(dtype)
        if head != Head() and head_of(probe) == Head():
            probe.register_forward_hook(head)
        try:
            with seeded("behaviour"):
                logits = probe(image.to(dtype))
                label = torch.zeros(1, dtype=torch.int64)
                if head.loss == CROSS_ENTROPY or head.single:
                    nn.functional.cross_entropy(logits, label).backward()
                else:
                    training_loss(probe, image.to(dtype), label).mean().backward()
        except Exception:  # whatever a user's module raises: it is refused, with its reason, when it is built
            continue
        sizes = [0.0 if p.grad is None else float(p.grad.double().norm()) for p in probe.parameters()]
        values = [f"{value:.{digits}g}" for value in (*logits.detach().flatten().tolist(), *sizes)]
        return hashlib.sha256(" ".join(values).encode()).hexdigest()[:16]
    return ""
