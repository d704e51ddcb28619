"""A network as steps that can be run one by one, forwards and, where they are affine, backwards.

A step is one operation of the traced network whose output depends on the image. With the masks of its ReLUs known, a
network is affine, and the error (the derivative of the loss) at a step's input follows from that at its output.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from leakbench.attacks.peeling.layers import Convolution
from leakbench.attacks.peeling.trace import Traced, read_convolution, reads_shape
from leakbench.core.rng import generator, seeded
from leakbench.defenses.keylock import KeyLock
from leakbench.errors import Unsupported
from leakbench.gradients.draws import Draws
from leakbench.gradients.intercept import Interception

StepKind = Literal["image", "convolution", "linear", "scaling", "normalisation", "relu", "max-pool", "affine", "other"]

TOLERANCE = 1e-9
"""How far from affine a step may be on random inputs, relative to its output."""


@dataclass(frozen=True)
class NetworkStep:
    """One operation on the way from the image to the logits.

    Attributes:
        name: the module's path, or the function's name in the trace.
        kind: what it does; ``scaling`` is batch normalisation by running statistics, ``normalisation`` that by the
            statistics of the image, ``relu`` also a leaky one or one with a ceiling, and ``other`` neither known nor
            affine.
        inputs: the positions of the steps whose outputs it takes.
        users: the positions of the steps that take its output.
        shape: of its output, of one image; empty if it is no single tensor.
        layer: the convolution; None for other steps, and for one that runs more than once.
        slope: of a ReLU below 0.
        ceiling: the value above which a ReLU is constant, such as 6 for ReLU6.
        shift: the name of the parameter that is added to each channel (a bias, or a normalisation's beta), if any.
    """

    name: str
    kind: StepKind
    inputs: tuple[int, ...]
    users: tuple[int, ...]
    shape: tuple[int, ...]
    layer: Convolution | None = None
    slope: float = 0.0
    ceiling: float = math.inf
    shift: str | None = None


class Network:
    """The steps of a traced network, in the order in which they run, with the values of its tensors.

    Args:
        traced: the trace.
        secrets: the names of tensors that are not known. ``locked`` are the places of the key-locks that have some, in
            place of whose scale and shift any others may stand; none if a lock's scale and shift are another one's key.
            ``hidden`` are the places of all modules that have some.
    """

    def __init__(self, traced: Traced, secrets: Collection[str] = ()) -> None:
        graph, values = traced.graph, traced.values
        self._graph, self._constants = graph, values
        image = next(node for node in graph.nodes if node.op == "placeholder")
        moved = {image}
        for node in graph.nodes:
            if node.op != "output" and not reads_shape(node) and any(each in moved for each in node.all_input_nodes):
                moved.add(node)
        self._nodes = [node for node in graph.nodes if node in moved]
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._run = fx.Interpreter(fx.GraphModule(traced.twin, graph))
        self._drawn, self._kept, self._trial = traced.drawn, traced.kept, 0
        self.steps: tuple[NetworkStep, ...] = ()  # what ``forward`` needs is there now
        modules = dict(traced.twin.named_modules())
        uses = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        self.steps = tuple(self._read(node, modules, uses) for node in self._nodes)
        named = {place: modules.get(step.name) for place, step in enumerate(self.steps)}
        locks = {place: module for place, module in named.items() if isinstance(module, KeyLock)}
        chained = any(lock.previous is not None for lock in locks.values())
        hidden = {place for place in locks if any(name.startswith(f"{self.steps[place].name}.") for name in secrets)}
        self.locked = frozenset() if chained else frozenset(hidden)
        owners = [name.rpartition(".")[0] for name in secrets]
        self.hidden = frozenset(
            place
            for place, step in enumerate(self.steps)
            if any(f"{own}.".startswith(f"{step.name}.") for own in owners)
        )

    def on(self, twin: nn.Module, trial: int = 0) -> Network:
        """Return the same steps with the tensors of another network of the same architecture, of any floating type.

        Args:
            twin: the network.
            trial: whose it is; random layers repeat this trial's draws.
        """
        other = object.__new__(Network)
        run = fx.Interpreter(fx.GraphModule(twin, self._graph))
        constants = dict(self._constants)
        fixed: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node.op == "get_attr":
                constants[node] = run.get_attr(node.target, (), {})
            elif node.op in _CALLS and node.all_input_nodes and fixed.issuperset(node.all_input_nodes):
                constants[node] = _call(run, node, constants)
            else:
                continue
            fixed.add(node)
        other.__dict__ = {**self.__dict__, "_run": run, "_constants": constants, "_trial": trial}
        return other

    def forward(self, place: int, inputs: Sequence[Tensor]) -> Tensor:
        """Return the output [B, ...] of the step at a place for its inputs [B, ...]."""
        node = self._nodes[place]
        if node.op == "placeholder":
            raise ValueError("the image is given, not computed")
        if len(inputs[0]) > 1 and self.steps and self.steps[place].kind in ("affine", "other"):
            # the trace has shapes of one image
            return torch.cat([self.forward(place, each) for each in zip(*(value.split(1) for value in inputs))])
        values = {**self._constants, **dict(zip(self._inputs(node), inputs))}
        if node not in self._kept:
            out: Tensor = _call(self._run, node, values)
            return out
        mask = self._kept[node][0].to(inputs[0].device)
        with Interception(Draws(None, self._trial, {0: mask})):
            return _call(self._run, node, values)

    def output(self, place: int, images: Tensor) -> Tensor:
        """Return the output [B, ...] of the step at a place for images [B, C, H, W]."""
        values: dict[int, Tensor] = {}
        for at in sorted(self.below(place)):
            step = self.steps[at]
            values[at] = images if step.kind == "image" else self.forward(at, [values[each] for each in step.inputs])
        return values[place]

    def coefficients(self, place: int) -> tuple[Tensor, Tensor]:
        """Return scale and shift [C] of a key-lock, with draws in the place of its secrets."""
        lock = self.module(place)
        assert isinstance(lock, KeyLock)
        return lock.coefficients()

    def rescaled(self, place: int, value: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Return the output [B, C, H, W] of a key-lock for its input, with a scale and a shift [C] of one's own."""
        lock = self.module(place)
        assert isinstance(lock, KeyLock)
        normalised: Tensor = lock.norm(value)
        return scale[:, None, None] * normalised + shift[:, None, None]

    def unknown(self, place: int) -> bool:
        """Return whether a step draws random numbers that do not follow from the gradient."""
        return self._nodes[place] in self._drawn - self._kept.keys()

    def backward(self, place: int, source: int, error: Tensor) -> Tensor:
        """Return the error [B, ...] that the output error of an affine step gives at the output of step ``source``."""
        step = self.steps[place]
        inputs = [error.new_zeros((len(error), *self.steps[each].shape)) for each in step.inputs]
        at = step.inputs.index(source)
        inputs[at].requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.forward(place, inputs), inputs[at], error)
        return found

    def factor(self, place: int, source: int) -> Tensor | None:
        """Return the factor [1, ...] of each value if a step only scales step ``source``'s and adds something to it."""
        step = self.steps[place]
        if step.kind not in ("scaling", "affine") or step.shape != self.steps[source].shape:
            return None
        ones = torch.ones((1, *step.shape), dtype=torch.float64)
        factor = self.backward(place, source, ones)
        pattern = torch.linspace(1.0, 2.0, ones.numel(), dtype=torch.float64).view_as(ones)
        return factor if torch.allclose(self.backward(place, source, pattern), factor * pattern, 1e-9) else None

    def shift(self, place: int) -> str | None:
        """Return the parameter whose gradient is the sum, over a channel, of the error at the input of a step."""
        unseen = list(self.steps[place].inputs[:1])
        while unseen:
            at = unseen.pop()
            if self.steps[at].shift is not None:
                return self.steps[at].shift
            for source in self.steps[at].inputs:
                factor = self.factor(at, source)
                if factor is not None and bool((factor == 1).all()):
                    unseen.append(source)
        return None

    def ceiling(self, place: int) -> float:
        """Return the ceiling of a ReLU, or of the ReLU whose maxima a step gives; infinite without any."""
        step = self.steps[place]
        return self.ceiling(step.inputs[0]) if step.kind == "max-pool" else step.ceiling

    def topmost_linear(self) -> int | None:
        """Return the place of the linear layer on top; None if there is none."""
        return next((at for at in reversed(range(len(self.steps))) if self.steps[at].kind == "linear"), None)

    def reader(self, place: int) -> str:
        """Return the name of the first convolution or linear layer that takes a step's output; else the step's own."""
        users = (self.steps[user] for user in self.steps[place].users)
        return next((user.name for user in users if user.kind in ("convolution", "linear")), self.steps[place].name)

    def module(self, place: int) -> nn.Module:
        """Return the module of a step that is one, with this network's tensors."""
        return self._run.module.get_submodule(self.steps[place].name)

    def below(self, *places: int) -> set[int]:
        """Return the places of steps and of all that they depend on."""
        found: set[int] = set()
        unseen = list(places)
        while unseen:
            at = unseen.pop()
            if at not in found:
                found.add(at)
                unseen += self.steps[at].inputs
        return found

    def below_affine(self, place: int) -> int:
        """Return the first step from a place downwards that is no affine step of a single input."""
        while self.steps[place].kind == "affine" and len(self.steps[place].inputs) == 1:
            (place,) = self.steps[place].inputs
        return place

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes of the steps that a node takes, each once."""
        return [other for other in dict.fromkeys(node.all_input_nodes) if other in self._place]

    def _read(self, node: fx.Node, modules: dict[str, nn.Module], uses: list[str]) -> NetworkStep:
        value = self._constants[node]
        name = str(node.target) if node.op == "call_module" else node.name
        module = modules[name] if node.op == "call_module" else None
        inputs = self._inputs(node)
        users = tuple(self._place[user] for user in node.users if user in self._place)
        shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
        kind, (slope, ceiling) = _kind(node, module), _rectifier(node, module) or (0.0, math.inf)
        layer, shift = None, None
        once = uses.count(name) == 1
        if kind == "convolution" and once:
            before = self._constants[inputs[0]]
            assert isinstance(module, nn.Conv2d)
            assert isinstance(before, Tensor)
            assert isinstance(value, Tensor)
            try:
                layer = read_convolution(name, module, before, value)
            except Unsupported:
                layer = None  # odd padding: an affine step like others
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) and module.bias is not None and once:
            shift = f"{name}.bias"
        places = tuple(self._place[each] for each in inputs)
        if kind == "other" and shape and self._affine(node, inputs):
            kind = "affine"
        return NetworkStep(name, kind, places, users, shape, layer, slope, ceiling, shift)

    def _affine(self, node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
        """Return whether a step is affine in its inputs, by three random ones."""
        rng = generator("affine", node.name)
        values = [self._constants[each] for each in inputs]
        examples = [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]
        if len(examples) < len(values):
            return False
        first, second = (
            [torch.randn(each.shape, generator=rng, dtype=torch.float64) for each in examples] for _ in range(2)
        )
        between = [0.3 * a + 0.7 * b for a, b in zip(first, second)]
        with torch.no_grad(), seeded("affine"):
            try:
                a, b, mixed = (self.forward(self._place[node], each) for each in (first, second, between))
            except Exception:  # a step that does not take such inputs is none to go back through
                return False
        return bool((0.3 * a + 0.7 * b - mixed).norm() <= TOLERANCE * mixed.norm())


_CALLS = ("call_module", "call_function", "call_method")


def _call(run: fx.Interpreter, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Return the output of a node, from the values of the nodes that it takes."""
    args, kwargs = (fx.node.map_arg(each, lambda other: values[other]) for each in (node.args, node.kwargs))
    return getattr(run, node.op)(node.target, args, kwargs)


def _kind(node: fx.Node, module: nn.Module | None) -> StepKind:
    """Return the kind of an operation; "other" for what has no kind of its own."""
    if node.op == "placeholder":
        return "image"
    exact = type(module)
    if exact is nn.Conv2d:
        return "convolution"
    if exact is nn.Linear:
        return "linear"
    if isinstance(module, KeyLock):
        return "other"
    if isinstance(module, nn.BatchNorm2d):
        return "normalisation" if module.training or module.running_mean is None else "scaling"
    if _rectifier(node, module) is not None:
        return "relu"
    if exact is nn.MaxPool2d or node.target in (F.max_pool2d, torch.max_pool2d):
        return "max-pool"
    return "other"


_RELUS = (torch.relu, F.relu, "relu")
_CLAMPS = (torch.clamp, torch.clip, "clamp", "clip")
_FLOORS = (torch.clamp_min, "clamp_min")
_THRESHOLDS = (torch.threshold, F.threshold)


def _rectifier(node: fx.Node, module: nn.Module | None) -> tuple[float, float] | None:
    """Return the slope below 0 and the ceiling of a ReLU, in whichever way it is written; None for other operations.

    A clamp differs from a ReLU where its input is 0 exactly: there its derivative is 1.
    """
    exact = type(module)
    if exact is nn.ReLU or node.target in _RELUS:
        return 0.0, math.inf
    if isinstance(module, nn.LeakyReLU):
        return float(module.negative_slope), math.inf
    if node.target is F.leaky_relu:
        return float(_argument(node, 1, "negative_slope", 0.01)), math.inf
    low: Any
    high: Any
    if exact is nn.Threshold:
        assert isinstance(module, nn.Threshold)
        low, high = (0 if module.threshold == 0 and module.value == 0 else None), None
    elif exact in (nn.ReLU6, nn.Hardtanh):
        assert isinstance(module, nn.Hardtanh)
        low, high = module.min_val, module.max_val
    elif node.target is F.relu6:
        low, high = 0, 6
    elif node.target is F.hardtanh:
        low, high = _argument(node, 1, "min_val", -1.0), _argument(node, 2, "max_val", 1.0)
    elif node.target in _THRESHOLDS:
        given = _argument(node, 1, "threshold", None), _argument(node, 2, "value", None)
        low, high = (0 if given == (0, 0) else None), None
    elif node.target in _FLOORS:
        low, high = _argument(node, 1, "min", None), None
    elif node.target in _CLAMPS:
        low, high = _argument(node, 1, "min", None), _argument(node, 2, "max", None)
    else:
        return None
    high = math.inf if high is None else high
    numbers = isinstance(low, int | float) and isinstance(high, int | float)
    return (0.0, float(high)) if numbers and low == 0 and high > 0 else None


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """Return an argument of a call, given by place or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
