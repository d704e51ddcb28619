"""A network's forward pass as torch.fx traces it, with the values that a random image has on the way."""

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from leakbench.attacks.known_draws import Recorder, read_draws
from leakbench.attacks.peeling.layers import Convolution
from leakbench.core.rng import generator, seeded
from leakbench.defenses.keylock import KeyLock
from leakbench.errors import Unsupported, one_line
from leakbench.gradients.convolution import pair
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.intercept import Interception
from leakbench.gradients.lanes.geometry import Geometry
from leakbench.observation import Observation


@dataclass(frozen=True)
class Traced:
    """A traced network.

    Attributes:
        twin: the network of the first trial in float64 on the CPU, with draws in the place of hidden secrets.
        graph: its operations in order.
        image: a random image [1, C, H, W] in [0, 1].
        values: the value of each operation on that image; where the network draws what to keep, everything is kept. In
            a step on several images, a normalisation of a single value per channel gives its shift.
        drawn: the operations that draw random numbers.
        kept: of those whose draws the gradient leaks, [T, 1, *shape] of 0 and 1, and the probability of a 0.
    """

    twin: nn.Module
    graph: fx.Graph
    image: Tensor
    values: Mapping[fx.Node, object]
    drawn: frozenset[fx.Node] = frozenset()
    kept: Mapping[fx.Node, tuple[Tensor, float]] = field(default_factory=dict)


def trace(observation: Observation) -> Traced:
    """Return the trace of an observation's network.

    Raises:
        Unsupported: torch.fx cannot trace it, or it does not run on one image, as one of those of the step.
    """
    twin = filled(observation)
    try:
        graph = _Tracer().trace(twin)
    except Exception as error:  # whatever a forward that depends on its data, or that torch.fx does not know, raises
        raise Unsupported(
            f"peel cannot follow {type(twin).__name__}: {one_line(error)}; "
            "write its forward without branches on the data"
        ) from error
    _out_of_place(twin, graph)
    image = torch.rand((1, *observation.image_shape), generator=generator("peel"), dtype=torch.float64)
    several = observation.count > 1
    run = _Interpreter(twin, graph, several)
    with torch.no_grad(), seeded("peel"):
        state = torch.get_rng_state()
        try:
            run.run(image)
        except Exception as error:  # such as a normalisation over a batch, of one value
            reason = one_line(str(error).partition("While executing")[0])
            raise Unsupported(f"peel runs a network on one image, which it does not take: {reason}") from error
        if not torch.equal(state, torch.get_rng_state()):
            return _redrawn(Traced(twin, graph, image, run.env), observation, several)
    return Traced(twin, graph, image, run.env)


class _Interpreter(fx.Interpreter):
    """Runs a network on one image and keeps the values.

    A normalisation over a batch takes no single value per channel, but a step on ``several`` images has more than one.
    It is then given the image's value twice, so that shapes stay those of one image.
    """

    def __init__(self, twin: nn.Module, graph: fx.Graph, several: bool) -> None:
        super().__init__(fx.GraphModule(twin, graph), garbage_collect_values=False)
        self.several = several

    def run_node(self, n: fx.Node) -> Any:
        if not self.several or not _is_batch_normalisation(n, self.module):
            return super().run_node(n)
        (taken,) = n.all_input_nodes[:1]
        value = self.env[taken]
        if value[0, 0].numel() > 1:
            return super().run_node(n)
        self.env[taken] = value.repeat(2, *[1] * (value.ndim - 1))
        try:
            return super().run_node(n)[:1]
        finally:
            self.env[taken] = value


def _is_batch_normalisation(node: fx.Node, root: nn.Module) -> bool:
    """Return whether an operation normalises by the statistics of a batch."""
    if node.op == "call_function":
        return node.target is F.batch_norm
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), _BATCH_NORMALISATIONS)


_BATCH_NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _CountingInterpreter(_Interpreter):
    """Runs a network that keeps everything, and notes which operations draw, by the numbers of their drawing calls."""

    def __init__(self, traced: Traced, several: bool) -> None:
        super().__init__(traced.twin, traced.graph, several)
        self.recorder = Recorder({}, len(traced.image))
        self.calls: dict[fx.Node, range] = {}

    def run_node(self, n: fx.Node) -> Any:
        before, state = len(self.recorder.calls), torch.get_rng_state()
        out = super().run_node(n)
        calls = range(before, len(self.recorder.calls))
        if calls or not torch.equal(state, torch.get_rng_state()):
            self.calls[n] = calls
        return out


def _redrawn(traced: Traced, observation: Observation, several: bool) -> Traced:
    """Return the trace of a network that draws random numbers, with the draws that its gradient leaks."""
    run, masks = _CountingInterpreter(traced, several), read_draws(observation).masks
    with Interception(run.recorder):
        run.run(traced.image)
    kept = {
        node: (masks[calls[0]], zero)
        for node, calls in run.calls.items()
        if len(calls) == 1 and calls[0] in masks and (zero := run.recorder.calls[calls[0]].zero) is not None
    }
    return replace(traced, values=run.env, drawn=frozenset(run.calls), kept=kept)


class _Tracer(fx.Tracer):
    """A tracer that treats every layer of torch's, and key-lock's, as a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, KeyLock) or super().is_leaf_module(m, module_qualified_name)


def _out_of_place(twin: nn.Module, graph: fx.Graph) -> None:
    """Make every operation of a graph leave its inputs as they are, as their values are needed afterwards."""
    for module in twin.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    for node in graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        if node.op == "call_function":
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            node.target = node.target.removesuffix("_")


_OUT_OF_PLACE: Mapping[object, Callable[..., object]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.hardtanh_: F.hardtanh,
    torch.threshold_: torch.threshold,
    torch.clamp_: torch.clamp,
    torch.clamp_min_: torch.clamp_min,
    torch.clip_: torch.clip,
}
"""Functions that overwrite their first argument, and those that do not."""


def filled(observation: Observation, trial: int = 0) -> nn.Module:
    """Return the network of a trial in float64 on the CPU, with draws in the place of hidden secrets."""
    twin = copy.deepcopy(observation.model).to_empty(device="cpu").double().requires_grad_(False)
    laws = {secret.name: secret.law for secret in observation.secrets}
    with torch.no_grad():
        for name, tensor in tensors_of(twin).items():
            if name in laws:
                value = laws[name].draw(tuple(tensor.shape), generator("peel", name))
            else:
                value = observation.weights[name]
            tensor.copy_(value[trial] if value.ndim > tensor.ndim else value)
    return twin


def reads_shape(node: fx.Node) -> bool:
    """Return whether a node looks only at a tensor's shape."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(reads_shape(other) for other in inputs)


def read_convolution(name: str, module: nn.Conv2d, before: Tensor, after: Tensor) -> Convolution:
    """Return the layer of a module, for inputs and outputs like ``before`` and ``after``.

    Raises:
        Unsupported: it does not pad with zeros, as many on each side.
    """
    spread = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
    if module.padding_mode != "zeros" or (module.padding == "same" and any(total % 2 for total in spread)):
        raise Unsupported(f"peel needs zeros around an image, as many on each side, and {name} pads otherwise")
    around = module.padding
    if isinstance(around, str):
        around = tuple(total // 2 if around == "same" else 0 for total in spread)
    return Convolution(
        name=name,
        weight=f"{name}.weight",
        bias=None if module.bias is None else f"{name}.bias",
        geometry=Geometry(
            stride=pair(module.stride),
            padding=pair(around),
            dilation=pair(module.dilation),
            groups=module.groups,
            image=pair(before.shape[2:]),
            kernel=pair(module.kernel_size),
        ),
        inputs=(before.shape[1], before.shape[2], before.shape[3]),
        outputs=(after.shape[1], after.shape[2], after.shape[3]),
    )
