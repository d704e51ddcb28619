"""The operations that stand in for torch's own: the same values, twice differentiable, each trial's own numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import CLASSES, GENERAL_PATHS, close, rand, randn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from leakbench.core.rng import generator
from leakbench.errors import Unsupported
from leakbench.gradients import Evaluator, Path
from leakbench.gradients.draws import Draws
from leakbench.gradients.evaluate import fingerprint
from leakbench.gradients.intercept import Interception

pytestmark = pytest.mark.usefixtures("float64")


def both(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return value and second derivatives of a call, intercepted and by torch's own mathematical kernels."""
    results = []
    for context in (Interception(Draws(None)), sdpa_kernel(SDPBackend.MATH)):
        own = [tensor.clone().requires_grad_() for tensor in inputs]
        with context:
            value = call(*own)
        grads = torch.autograd.grad(value.square().sum(), own, create_graph=True)
        seconds = torch.autograd.grad(sum((g.square().sum() for g in grads), torch.zeros(())), own)
        results.append([value.detach(), *seconds])
    return results[0], results[1]


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "added mask": {"attn_mask": randn(5, 5, seed=4)},
    "allowed": {"attn_mask": torch.eye(5, dtype=torch.bool) | (randn(5, 5, seed=4) > 0)},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_torchs(name: str) -> None:
    options = {
        key: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in ATTENTION[name].items()
    }
    got, expected = both(
        partial(F.scaled_dot_product_attention, **options),
        *(randn(2, 3, 5, size, seed=size) for size in (4, 4, 6)),
    )
    for a, b in zip(got, expected):
        close(a, b, 1e-12)


def test_grouped_queries_are_torchs() -> None:
    got, expected = both(
        partial(F.scaled_dot_product_attention, enable_gqa=True), randn(2, 4, 5, 3), *2 * [randn(2, 2, 5, 3, seed=1)]
    )
    for a, b in zip(got, expected):
        close(a, b, 1e-12)


MULTI_HEAD = {
    "self": lambda net, x, y: net(x, x, x)[0],
    "without weights": lambda net, x, y: net(x, x, x, need_weights=False)[0],
    "cross": lambda net, x, y: net(x, y, y)[0],
    "weights by head": lambda net, x, y: net(x, y, y, average_attn_weights=False)[1],
    "mean weights": lambda net, x, y: net(x, y, y)[1],
    "forbidden": lambda net, x, y: net(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1))[0],
    "mask by head": lambda net, x, y: net(x, x, x, attn_mask=randn(6, 5, 5, seed=2))[0],
    "padding": lambda net, x, y: net(x, x, x, key_padding_mask=torch.arange(5).expand(3, 5) > 3)[0],
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention_is_torchs(name: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(4, 2, batch_first=batch_first)
    shape = (3, 5, 4) if batch_first else (5, 3, 4)
    got, expected = both(lambda x, y: MULTI_HEAD[name](net, x, y) + 0 * y.sum(), randn(*shape), randn(*shape, seed=1))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_hardsigmoid_is_torchs_and_acts_in_place() -> None:
    x = torch.tensor([-4.0, -3.0, -1.0, 0.0, 2.0, 3.0, 5.0])
    with Interception(Draws(None)):
        apart, inside = F.hardsigmoid(x), x.clone()
        assert F.hardsigmoid(inside, inplace=True) is inside
    torch.testing.assert_close(apart, F.hardsigmoid(x))
    assert torch.equal(apart, inside)


class Random(nn.Module):
    """A small network around something that draws."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(144, CLASSES)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.draw(self.draw(torch.sigmoid(self.conv(x))))).flatten(1))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "dropout of maps": lambda x: F.dropout2d(x, 0.3),
    "dropout of everything": lambda x: x + F.dropout(x, 1.0),
    "stochastic depth": lambda x: x + x * torch.empty(len(x), 1, 1, 1).bernoulli_(0.5) / 0.5,
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
    "normal noise": lambda x: x + torch.randn_like(x),
    "uniform noise": lambda x: x + torch.rand_like(x),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_trials_numbers_depend_on_nothing_but_its_generator(name: str) -> None:
    torch.manual_seed(0)
    net = Random(DRAWS[name])
    tensors = {key: p.detach().expand(3, *p.shape) for key, p in net.named_parameters()}
    x, y = rand(3, 1, 8, 8), torch.tensor([0, 1, 2])

    def gradient(path: Path, rows: list[int], draw: int = 0) -> Tensor:
        evaluator = Evaluator(net, tuple(tensors), path=path)
        own = {key: value[: len(rows)] for key, value in tensors.items()}
        grads = evaluator.gradient(own, x[rows], y[rows], generators=lambda: [generator(draw, t) for t in rows])
        return torch.cat([g.detach().flatten(1) for g in grads.values()], 1)

    state = torch.get_rng_state()
    together = gradient("batched", [0, 1, 2])
    for path in GENERAL_PATHS:
        for rows in ([0, 1, 2], [2, 0], [1]):
            close(gradient(path, rows), together[rows], 1e-12)
    if name != "dropout of everything":
        assert not torch.allclose(gradient("batched", [0, 1, 2], draw=1), together)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_keeps_the_mean_and_the_share() -> None:
    with Interception(Draws(lambda: [generator(t) for t in range(4)])):
        dropped = F.dropout(torch.ones(4, 5000), 0.3)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert float((dropped == 0).double().mean()) == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(dropped[0], dropped[1])


def test_numbers_without_a_source_are_refused() -> None:
    net = Random(F.dropout)
    tensors = {key: p.detach().expand(2, *p.shape) for key, p in net.named_parameters()}
    for path in GENERAL_PATHS:
        with pytest.raises(Unsupported, match="random numbers"):
            Evaluator(net, tuple(tensors), path=path).gradient(tensors, rand(2, 1, 8, 8), torch.tensor([0, 1]))


def test_a_fingerprint_tells_architectures_apart_and_copies_together() -> None:
    torch.manual_seed(0)
    make: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval(),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5)),
        lambda: Random(torch.sigmoid),
        lambda: Random(F.silu),
    ]
    prints = [fingerprint(build()) for build in make]
    assert len(set(prints)) == len(make)
    assert prints == [fingerprint(copy.deepcopy(build()).to("meta")) for build in make]
    with pytest.raises(TypeError):
        fingerprint(Random(Interception(Draws(None))))  # type: ignore[arg-type]
