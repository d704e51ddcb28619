"""Compiled kernels behind single operations, for networks that the kernels cannot trace whole: the numbers of torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import randn
from test_lanes import built, setting, with_kernels
from torch import Tensor

from leakbench.core.compiled import SWITCH
from leakbench.gradients.convolution import convolution, convolve, input_gradient, weight_gradient
from leakbench.gradients.intercept import adaptive_avg_pool2d, batch_norm, conv2d, linear, taken
from leakbench.gradients.lanes import maps
from leakbench.gradients.lanes.geometry import Geometry
from leakbench.gradients.lanes.layout import innermost

CASES = {
    "strides": (5, 1, 3, 4, Geometry((2, 2), (1, 1), (1, 1), 1, (9, 8), (3, 3))),
    "groups, batch": (8, 3, 4, 6, Geometry((1, 2), (2, 2), (1, 1), 2, (7, 7), (5, 5))),
    "dilation": (19, 1, 4, 8, Geometry((1, 1), (0, 1), (2, 1), 1, (10, 9), (3, 2))),
    "every channel by itself": (8, 2, 4, 4, Geometry((2, 2), (0, 0), (1, 1), 4, (6, 6), (1, 1))),
    "one pixel": (16, 1, 7, 5, Geometry((1, 1), (0, 0), (1, 1), 1, (1, 1), (1, 1))),
}


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm()) <= 1e-12 * float(theirs.norm())


def is_innermost(x: Tensor) -> bool:
    return x.movedim(0, -1).is_contiguous()


@with_kernels
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("laid_out", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_three_maps_of_a_convolution_are_torchs(case: str, own: bool, laid_out: bool) -> None:
    trials, batch, channels, outputs, geometry = CASES[case]
    x = randn(trials * batch, channels, *geometry.image)
    kernel = (outputs, channels // geometry.groups, *geometry.kernel)
    weight = randn(trials, *kernel, seed=1) if own else randn(1, *kernel, seed=1).expand(trials, *kernel)
    y = convolve(x, weight, geometry)
    towards = randn(*y.shape, seed=2)
    slow = input_gradient(towards, weight, geometry), weight_gradient(x, towards, geometry, trials), y
    if laid_out:
        x, weight, towards = innermost(x), innermost(weight), innermost(towards)
    form = convolution(geometry, trials)
    fast = form.by_input(weight, towards), form.by_weight(x, towards), form.by_output(x, weight)
    for ours, theirs in zip(fast, slow, strict=True):
        agree(ours, theirs)
        assert is_innermost(ours)


@with_kernels
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("spec", ["odd", "lenet-bn", "mlp(hidden=9-8)", "resnet20(width=2,activation=sigmoid)"])
def test_networks_have_the_derivatives_of_double_backward(spec: str, own: bool) -> None:
    """By images and by weights, by which training that is repeated is differentiated."""
    evaluator, tensors, x, _ = setting(built(spec), 3 if own else 11, own)
    tensors = {name: value.requires_grad_() if value.ndim > 1 and own else value for name, value in tensors.items()}
    inputs = [x, *(value for value in tensors.values() if value.requires_grad)]
    labels = torch.arange(len(x)) % 4

    def derivatives(path: str) -> list[Tensor]:
        gradient = replace(evaluator, path=path).gradient(tensors, x, labels)
        total = torch.stack([(value * value.detach().cos()).sum() for value in gradient.values()]).sum()
        found = torch.autograd.grad(total, inputs, allow_unused=True)
        return [*(value.detach() for value in gradient.values()), *(by for by in found if by is not None)]

    fast, slow = derivatives("batched"), derivatives("one-at-a-time")
    scale = max(float(value.norm()) for value in slow)
    for ours, theirs in zip(fast, slow, strict=True):
        assert float((ours - theirs).norm()) <= 1e-12 * scale


@with_kernels
@pytest.mark.usefixtures("float64")
def test_operations_between_keep_the_trials_innermost() -> None:
    x = innermost(randn(16, 4, 6, 6)).requires_grad_()
    weight = innermost(randn(16, 5, 4, seed=1)).requires_grad_()
    half = taken(batch_norm(x, None, None, training=True).sigmoid(), (slice(None), slice(None), slice(3)))
    out = linear(adaptive_avg_pool2d(half, 1).flatten(1), weight)
    gradients = torch.autograd.grad(out, (x, weight), randn(16, 5, seed=2))
    for value in (out, *gradients):
        assert maps.are_served(value)


@pytest.mark.usefixtures("float64")
def test_few_trials_and_other_memory_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = randn(16, 4, 6, 6)
    assert not maps.are_served(rows)
    assert not maps.are_served(innermost(rows)[:, :, 1:])
    assert not maps.are_served(innermost(rows).half())
    assert not maps.enough(1, rows.float())  # one number of four or more; of float64 they may be two
    monkeypatch.setenv(SWITCH, "off")
    assert not maps.are_served(innermost(rows))


@with_kernels
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["every other channel", "channels last"])
def test_a_shared_weight_may_have_any_layout(kind: str) -> None:
    size = 1 if kind == "every other channel" else 3
    geometry = Geometry((1, 1), (0, 0), (1, 1), 1, (6, 5), (size, size))
    weight = randn(1, 7, 8, size, size)
    weight = weight[:, :, ::2] if size == 1 else weight[0, :, :4].to(memory_format=torch.channels_last)[None]
    x, weight = randn(8, 4, 6, 5, seed=1), weight.expand(8, 7, 4, size, size)
    assert not weight[0].is_contiguous()
    y = convolve(x, weight.contiguous(), geometry)
    form = convolution(geometry, 8)
    agree(form.by_output(x, weight), y)
    agree(form.by_input(weight, y), input_gradient(y, weight.contiguous(), geometry))


@with_kernels
@pytest.mark.parametrize("kind", ["types", "channels"])
def test_operands_that_do_not_fit_are_refused_as_by_torch(kind: str) -> None:
    x, weight = torch.rand(16, 3, 6, 6), torch.rand(16, 5, 3, 3, 3)
    x, weight = (x, weight.double()) if kind == "types" else (torch.rand(16, 4, 6, 6), weight)
    with pytest.raises(RuntimeError, match=r"type|channels"):
        conv2d(x, weight)
