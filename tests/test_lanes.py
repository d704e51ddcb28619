"""Whole evaluations by the compiled kernels: the same numbers as one-at-a-time double backward in plain torch."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import select
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import watch
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench import attacks, models
from leakbench.attacks.ig import IG, cosine_from
from leakbench.attacks.matching import total_variation
from leakbench.core import compiled
from leakbench.core.device import out_of_memory
from leakbench.core.types import Gradient
from leakbench.errors import Unsupported
from leakbench.gradients import Evaluator, choose_path
from leakbench.gradients.bilinear import products, squared_gap
from leakbench.gradients.evaluate import architecture, plain_loss, tensors_of
from leakbench.gradients.lanes import library
from leakbench.gradients.lanes.evaluation import Program
from leakbench.gradients.lanes.fused import _combined, variation
from leakbench.gradients.lanes.layout import innermost, joined, strides
from leakbench.gradients.lanes.trace import Kind, trace
from leakbench.optim.adam import Adam
from leakbench.optim.base import rows_finite, value_and_gradient
from leakbench.optim.solvers import all_finite

SHAPE, CLASSES = (3, 12, 12), 4

with_kernels = pytest.mark.skipif(library.kernels() is None, reason=str(library.found_or_reason()))


class Odd(nn.Module):
    """Every operation that the kernels know, with uneven kernels, strides, padding, dilation and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False)
        self.second = nn.Conv2d(6, 9, 3, padding=2, dilation=2, groups=3)
        self.third = nn.Conv2d(9, 7, 5, stride=3, padding="valid")
        self.norm = nn.BatchNorm2d(6)
        self.running = nn.BatchNorm2d(9, affine=False).eval()
        self.side = nn.Conv2d(6, 9, 1)
        self.pool = nn.MaxPool2d(2, stride=1, padding=1)
        self.drop = nn.Dropout(0.5).eval()
        self.unused = nn.Linear(3, 3)
        self.hidden = nn.Linear(2 * 11, 17)
        self.last = nn.Linear(17, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        side = self.side(x)
        x = self.running(self.second(x))
        x += side
        x = self.pool(F.leaky_relu(x, 0.2))
        x = self.third(F.avg_pool2d(F.pad(x[:, :, :, 1:], (0, 0, 1, 0)), (2, 1))) if x.shape[2] > 20 else self._short(x)
        x = self.drop(torch.sigmoid(x)).flatten(1)
        return self.last(F.relu(self.hidden(x)))

    def _short(self, x: Tensor) -> Tensor:
        wide = F.pad(x[:, ::2].transpose(2, 3), (2, 0, 1, 1))
        return F.adaptive_avg_pool2d(wide[:, :2], (1, 11))


def setting(
    model: nn.Module, trials: int, own: bool, dtype: torch.dtype = torch.float64, shape: tuple[int, int, int] = SHAPE
) -> tuple[Evaluator, dict[str, Tensor], Tensor, Tensor]:
    """Return an evaluator, the tensors of its trials, images, and soft labels."""
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    parameters = dict(model.named_parameters())
    for name, value in tensors_of(model).items():
        one = value.detach().to(dtype) if value.is_floating_point() else value
        if name in parameters:
            scales = 1 + 0.1 * torch.randn(trials, generator=rng, dtype=torch.float64).to(dtype)
            rows = one * scales.view(-1, *[1] * one.ndim)
            tensors[name] = rows if own else one.expand(trials, *one.shape)
        else:
            tensors[name] = one
    x = torch.rand(trials, *shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    y = torch.softmax(torch.randn(trials, CLASSES, generator=rng, dtype=torch.float64), 1).to(dtype).requires_grad_()
    return Evaluator(architecture(model), tuple(parameters), path="lanes"), tensors, x, y


def of_several(rows: Tensor, batch: int) -> Tensor:
    """Return as many other rows [T, B, ...] between 0 and 1 for each trial."""
    rng = torch.Generator().manual_seed(3)
    several = torch.rand(len(rows), batch, *rows.shape[1:], generator=rng, dtype=torch.float64)
    return several.to(rows.dtype).requires_grad_()


def twice(evaluator: Evaluator, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Gradient, list[Tensor]]:
    """Return the gradient, and the derivatives of a projection of it by images and soft labels."""
    gradient = evaluator.gradient(tensors, x, y)
    rng = torch.Generator().manual_seed(2)
    total = x.new_zeros(())
    for value in gradient.values():
        along = torch.randn(value.shape, generator=rng, dtype=torch.float64).to(value.dtype)
        total = total + (value * along).sum()
    inputs = [x, y] if y.is_floating_point() else [x]
    return {name: value.detach() for name, value in gradient.items()}, list(torch.autograd.grad(total, inputs))


def built(spec: str) -> nn.Module:
    torch.manual_seed(0)
    return Odd() if spec == "odd" else models.parse(spec).build(SHAPE, CLASSES)


NETWORKS = (
    "odd",
    "lenet",
    "lenet-bn",
    "lenet-bn(mode=eval)",
    "mlp(hidden=9-8)",
    "convnet(width=2,activation=sigmoid)",
    "resnet20(width=2,activation=sigmoid)",
    "resnet20(width=2,shortcut=conv,mode=eval)",
)


@with_kernels
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("spec", NETWORKS)
def test_kernels_give_the_numbers_of_double_backward(spec: str, own: bool) -> None:
    evaluator, tensors, x, y = setting(built(spec), 3 if own else 11, own)
    fast, fast_by = twice(evaluator, tensors, x, y)
    slow, slow_by = twice(replace(evaluator, path="one-at-a-time"), tensors, x, y)
    whole = torch.stack([value.norm() for value in slow.values()]).norm()
    for name, value in slow.items():
        assert float((fast[name] - value).norm()) <= 1e-12 * float(whole), name
    for a, b in zip(fast_by, slow_by):
        assert float((a - b).norm()) <= 1e-12 * float(b.norm())


@with_kernels
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("spec", "batch"),
    [
        *(("odd", 1), ("lenet-bn", 1), ("lenet-bn(mode=eval)", 1)),
        *(("lenet-bn(mode=eval)", batch) for batch in (2, 3, 4, 7, 12, 20)),
        *(("mlp(hidden=9-8)", batch) for batch in (3, 6, 16, 32, 33, 64)),
        *(("resnet20(width=2,shortcut=conv,mode=eval)", batch) for batch in (8, 16)),
    ],
)
def test_a_gradient_is_compared_without_being_written(spec: str, batch: int, own: bool) -> None:
    evaluator, tensors, x, y = setting(built(spec), 3 if own else 11, own)
    if batch > 1:
        x, y = of_several(x, batch), of_several(y, batch)
    slow = replace(evaluator, path="one-at-a-time").gradient(tensors, x, y)
    rng = torch.Generator().manual_seed(2)
    observed = {
        name: innermost(torch.randn(value.shape, generator=rng, dtype=value.dtype))
        for name, value in reversed(slow.items())  # in another order, and one of them withheld
        if name != "classifier.bias"
    }
    for gap in (False, True):
        dots, squares = evaluator.compare(tensors, x, y, observed, gap)
        own_rows = {name: (slow[name] - other if gap else slow[name]).flatten(1) for name, other in observed.items()}
        wanted = torch.stack([row.square().sum(1) for row in own_rows.values()])
        products_of = [(row * observed[name].flatten(1)).sum(1) for name, row in own_rows.items()]
        wanted_dots = torch.zeros_like(wanted) if gap else torch.stack(products_of)
        torch.testing.assert_close(squares, wanted, rtol=1e-12, atol=1e-15 * float(wanted.detach().max()))
        torch.testing.assert_close(dots, wanted_dots, rtol=1e-12, atol=1e-15 * float(wanted.detach().max()))
        along = torch.rand(2, *wanted.shape, generator=rng, dtype=wanted.dtype)
        pairs = [
            torch.autograd.grad((along[0] * a).sum() + (along[1] * b).sum(), (x, y), retain_graph=True)
            for a, b in ((squares, dots), (wanted, wanted_dots))
        ]
        for a, b in zip(*pairs):
            assert float((a - b).norm()) <= 1e-12 * float(b.norm())
    with pytest.raises(Unsupported, match="one of them at a time"):
        evaluator.compare(tensors, x, y, {name: value.float() for name, value in observed.items()}, True)


@with_kernels
def test_tensors_of_another_size_are_refused_and_not_read_beyond() -> None:
    evaluator, tensors, x, y = setting(built("lenet"), 5, True)
    with pytest.raises(ValueError, match=r"labels: \(5, 3\) is given, and \(5, 4\) is needed"):
        evaluator.gradient(tensors, x, y[:, :3])
    with pytest.raises(ValueError, match="labels"):
        evaluator.gradient(tensors, x, y[:4])
    observed = {name: value.detach() for name, value in evaluator.gradient(tensors, x, y).items()}
    fewer = {name: value[:4] for name, value in observed.items()}
    with pytest.raises(ValueError, match=r"classifier.bias: \(4, 4\) is given"):
        evaluator.compare(tensors, x, y, {"classifier.bias": fewer["classifier.bias"]}, True)
    with pytest.raises(ValueError, match="is needed"):
        evaluator.gradient({name: value[:4] for name, value in tensors.items()}, x, y)
    with pytest.raises(ValueError, match="is needed"):
        evaluator.gradient(tensors, x[:4], y[:4])


@with_kernels
def test_the_trace_knows_every_operation() -> None:
    found = trace(architecture(Odd()), plain_loss, SHAPE)
    assert {step.kind for step in found.steps} == set(Kind)
    long = trace(architecture(Odd()), plain_loss, (3, 48, 10))  # where it takes the other branch
    assert Kind.AVERAGE in {step.kind for step in long.steps}
    assert len(long.steps) != len(found.steps)


@with_kernels
@pytest.mark.parametrize(("trials", "parts"), [(21, [slice(0, 9), slice(3, 20)]), (4, [slice(0, 1), slice(2, 4)])])
def test_a_trial_has_the_same_bits_among_any_others(trials: int, parts: list[slice]) -> None:
    evaluator, tensors, x, y = setting(built("lenet-bn"), trials, False, torch.float32)
    parameters = dict(evaluator.model.named_parameters())
    whole, by = twice_alike(evaluator, tensors, x, y)
    for rows in parts:  # which fill registers of the same size
        some = {name: value[rows] if name in parameters else value for name, value in tensors.items()}
        part, part_by = twice_alike(evaluator, some, x[rows].detach().requires_grad_(), y[rows])
        assert all(torch.equal(part[name], whole[name][rows]) for name in whole)
        assert torch.equal(part_by, by[rows])


def twice_alike(evaluator: Evaluator, tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Gradient, Tensor]:
    gradient = evaluator.gradient(tensors, x, y)
    (by,) = torch.autograd.grad(sum(value.sum() for value in gradient.values()), x)  # type: ignore[arg-type]
    return gradient, by


@with_kernels
def test_hard_labels_withheld_parameters_and_second_calls() -> None:
    evaluator, tensors, x, _ = setting(built("lenet"), 5, False, torch.float32)
    labels = torch.tensor([0, 3, 1, 1, 2])
    some = replace(evaluator, names=("features.2.weight", "classifier.bias"))
    fast, fast_by = twice(some, tensors, x, labels)
    slow, slow_by = twice(replace(some, path="batched"), tensors, x, labels)
    assert list(fast) == list(some.names)
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast_by[0], slow_by[0], rtol=1e-3, atol=1e-4)
    gradient = evaluator.gradient(tensors, x, labels)
    total = sum(value.square().sum() for value in gradient.values())
    (first,) = torch.autograd.grad(total, x, retain_graph=True)  # type: ignore[arg-type]
    other = evaluator.gradient(tensors, x * 0.5, labels)
    (again,) = torch.autograd.grad(total, x)  # type: ignore[arg-type]
    assert torch.equal(first, again)
    assert not any(value.requires_grad for value in evaluator.gradient(tensors, x, labels, create_graph=False).values())
    assert other.keys() == gradient.keys()


@with_kernels
def test_images_of_any_layout_have_the_same_derivatives() -> None:
    evaluator, tensors, x, y = setting(built("lenet"), 5, False)
    kinds = {
        "channels last": x.detach().to(memory_format=torch.channels_last),
        "trials innermost": innermost(x.detach()),
        "rows apart": torch.cat([x.detach()] * 2, 3)[..., : SHAPE[2]],
    }
    expected, wanted = twice(evaluator, tensors, x, y)
    for kind, images in kinds.items():
        gradient, found = twice(evaluator, tensors, images.requires_grad_(), y)
        for name, value in expected.items():
            assert torch.equal(gradient[name], value), kind
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours, theirs), kind


class Refused(nn.Module):
    """A network with one thing that the kernels do not know."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.last = nn.Linear(100, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight / self.conv.weight.norm() if self.kind == "computed weight" else self.conv.weight
        x = F.conv2d(x - 0.5 if self.kind == "constant" else x, weight, self.conv.bias, 2)
        if self.kind == "dropout":
            x = F.dropout(x, 0.5, True)
        if self.kind == "batch":
            x = x + x.roll(1, 0)
        if self.kind == "value" and x.mean() > 0:
            x = -x
        if self.kind == "gelu":
            x = F.gelu(x)
        return self.last(torch.sigmoid(x).flatten(1))


@with_kernels
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("spec", ["lenet", "lenet-bn(mode=eval)", "resnet20(width=2,activation=sigmoid,mode=eval)"])
def test_a_trial_of_several_images_is_the_mean_of_theirs(spec: str, own: bool) -> None:
    evaluator, tensors, _, _ = setting(built(spec), 3, own)
    _, _, images, labels = setting(built(spec), 12, own)
    x, y = (value.detach().unflatten(0, (3, 4)).requires_grad_() for value in (images, labels))
    fast, fast_by = twice(evaluator, tensors, x, y)
    slow, slow_by = twice(replace(evaluator, path="one-at-a-time"), tensors, x, y)
    whole = torch.stack([value.norm() for value in slow.values()]).norm()
    for name, value in slow.items():
        assert float((fast[name] - value).norm()) <= 1e-12 * float(whole), name
    for a, b in zip(fast_by, slow_by):
        assert float((a - b).norm()) <= 1e-12 * float(b.norm())
    assert choose_path(evaluator, tensors, SHAPE, CLASSES, 4, lanes=3) == "lanes"
    hard, _ = twice(evaluator, tensors, x, y.detach().argmax(2))
    other, _ = twice(replace(evaluator, path="batched"), tensors, x, y.detach().argmax(2))
    for name, value in other.items():
        assert float((hard[name] - value).norm()) <= 1e-12 * float(whole), name


@with_kernels
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only there the kernels say so")
def test_numbers_that_are_no_normal_ones_are_zeros_in_the_kernels_alone() -> None:
    tiny = innermost(torch.full((2, 5), 1e-40))
    ones = torch.ones(2)
    assert not bool(_combined(tiny, ones, tiny, ones).any())
    assert bool((tiny * 1.0).all())


@with_kernels
def test_images_that_meet_in_a_normalisation_are_left_to_other_paths() -> None:
    evaluator, tensors, _, _ = setting(built("lenet-bn"), 3, False)
    assert choose_path(evaluator, tensors, SHAPE, CLASSES, lanes=3) == "lanes"
    assert choose_path(evaluator, tensors, SHAPE, CLASSES, 4, lanes=3) == "batched"
    with pytest.raises(Unsupported, match="no statistics"):
        evaluator.gradient(tensors, torch.rand(3, 4, *SHAPE).double(), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(Unsupported, match="no statistics"):
        evaluator.compare(tensors, torch.rand(3, 4, *SHAPE).double(), torch.zeros(3, 4, dtype=torch.int64), {}, True)


@with_kernels
def test_a_batch_whose_gradients_take_too_much_memory_is_left_to_other_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch the kernels write each image's gradient; other paths write their mean."""
    evaluator, _, _, _ = setting(built("lenet"), 3, False)
    values = sum(value.numel() for value in tensors_of(evaluator.model).values())
    program = evaluator._program(SHAPE, torch.device("cpu"))
    assert program.suits(3, torch.float32, 4)
    monkeypatch.setattr("leakbench.gradients.lanes.evaluation.MAX_BLOCK_BYTES", 2**23)
    most = 2**23 // (4 * values)
    assert program.suits(3, torch.float32, most)
    assert program.suits(3 * most, torch.float32)
    assert not program.suits(3, torch.float32, most + 1)


@pytest.mark.parametrize("kind", ["computed weight", "constant", "dropout", "batch", "value", "gelu"])
def test_what_the_kernels_do_not_know_is_left_to_other_paths(kind: str) -> None:
    with pytest.raises(Unsupported, match="the kernels"):
        trace(architecture(Refused(kind)), plain_loss, SHAPE)
    assert len(trace(architecture(Refused("")), plain_loss, SHAPE).steps) == 4


@with_kernels
def test_the_path_is_chosen_for_attacks_and_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, tensors, _, _ = setting(built("lenet"), 2, False)
    assert choose_path(evaluator, tensors, SHAPE, CLASSES, lanes=2) == "lanes"
    assert choose_path(evaluator, tensors, SHAPE, CLASSES) == "batched"
    right = Program.gradient

    def wrong(*args: Any) -> Gradient:
        return {name: 1.0001 * value for name, value in right(*args).items()}

    with monkeypatch.context() as patch:
        patch.setattr("leakbench.gradients.evaluate._CHOSEN", {})
        patch.setattr(Program, "gradient", wrong)
        assert choose_path(evaluator, tensors, SHAPE, CLASSES, lanes=2) == "batched"
    monkeypatch.setenv(compiled.SWITCH, "off")
    assert isinstance(library.found_or_reason(), compiled.Absent)
    assert choose_path(evaluator, tensors, SHAPE, CLASSES, lanes=2) == "batched"
    network = models.parse("lenet").build(SHAPE, CLASSES)
    observation = leakbench.observe(network, torch.rand(2, *SHAPE), torch.tensor([0, 1]))
    assert leakbench.attack("ig(steps=2)", observation).path == "batched"
    monkeypatch.delenv(compiled.SWITCH)
    assert leakbench.attack("ig(steps=2)", observation).path == "lanes"


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    found = compiled._built.__wrapped__(library.SOURCE)
    assert isinstance(found, compiled.Absent)
    assert "no C++ compiler" in found.reason
    failing = tmp_path / "g++"
    failing.write_text(
        "#!/bin/sh\necho 'no such option' >&2\n[ $1 = --version ] && echo compiler 1\n", encoding="utf-8"
    )
    failing.chmod(0o755)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: str(failing))
    monkeypatch.setattr(compiled.pooch, "os_cache", lambda name: tmp_path / name)
    broken = compiled._built.__wrapped__(library.SOURCE)
    assert isinstance(broken, compiled.Absent)
    assert "no such option" in broken.reason
    failing.write_text("#!/bin/sh\n[ $1 = --version ] && echo compiler 2 && exit\nkill -9 $$\n", encoding="utf-8")
    killed = compiled._built.__wrapped__(library.SOURCE)
    assert isinstance(killed, compiled.Absent)
    assert killed.reason.endswith("ended with -9, and said nothing")
    assert not [file for file in (tmp_path / "leakbench").rglob("*") if file.is_file()]


@with_kernels
def test_one_of_several_at_once_builds_and_a_cache_that_cannot_be_written_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }\n', encoding="utf-8")
    monkeypatch.setattr(compiled.pooch, "os_cache", lambda name: tmp_path / name)
    calls = []
    run = compiled._compile

    def counted(call: list[str]) -> None:
        calls.append(call)
        run(call)

    monkeypatch.setattr(compiled, "_compile", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compiled._built.__wrapped__, [source] * 4))
    for one in found:
        assert isinstance(one, compiled.Library)
        assert one.functions.one() == 1
    assert len(calls) == 1, "the others waited for what the first one built"
    files = sorted(file for file in (tmp_path / "leakbench" / "kernels").rglob("*") if file.is_file())
    assert [file.name for file in files] == ["one.sha256", "one.so"], "no draft is left"
    built = files[1].read_bytes()
    for times, damaged in enumerate((b"", built[: len(built) // 2], b"not a library", None), start=1):
        files[1].unlink()  # it is mapped
        if damaged is not None:
            files[1].write_bytes(damaged)
        assert isinstance(compiled._built.__wrapped__(source), compiled.Library)
        assert isinstance(compiled._built.__wrapped__(source), compiled.Library)
        assert len(calls) == 1 + times, "a damaged library is built again, and once"
        assert ctypes.CDLL(str(shutil.copy(files[1], tmp_path / f"{times}.so"))).one() == 1
    files[0].unlink()
    assert isinstance(compiled._built.__wrapped__(source), compiled.Library)
    assert len(calls) == 1 + times + 1, "what was not finished is built again"
    monkeypatch.setattr(compiled.pooch, "os_cache", lambda name: source)
    absent = compiled._built.__wrapped__(source)
    assert isinstance(absent, compiled.Absent)
    assert "Not a directory" in absent.reason


def test_a_compiler_that_takes_too_long_ends_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"  # at its end when all who can write to it have ended
    os.mkfifo(pipe)
    slow = tmp_path / "g++"
    slow.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && echo compiler 3 && exit\n"
        f"exec 3>'{pipe}'\n(echo begun >&3; exec sleep 60) &\nwait\n",
        encoding="utf-8",
    )
    slow.chmod(0o755)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: str(slow))
    monkeypatch.setattr(compiled.pooch, "os_cache", lambda name: tmp_path / name)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    communicate = subprocess.Popen.communicate

    def too_long(process: Any, *args: Any, **options: Any) -> Any:
        if "-o" not in process.args:
            return communicate(process, *args, **options)
        assert select.select([reader], [], [], 60)[0]
        assert os.read(reader, 100) == b"begun\n"
        raise subprocess.TimeoutExpired(process.args, 1)

    monkeypatch.setattr(subprocess.Popen, "communicate", too_long)
    found = compiled._built.__wrapped__(library.SOURCE)
    assert isinstance(found, compiled.Absent)
    assert "timed out" in found.reason
    assert select.select([reader], [], [], 30)[0]
    assert os.read(reader, 100) == b""
    os.close(reader)


@with_kernels
def test_kernels_without_memory_raise_an_error_and_work_afterwards() -> None:
    kernels = library.kernels()
    assert kernels is not None
    x, one, by = torch.rand(1, 1, 4, 4), torch.ones(1), torch.zeros(1, 1, 4, 4)
    with pytest.raises(MemoryError, match="not enough memory") as caught:
        kernels.call("variation", x, one, torch.zeros(1), by, sizes=(1, 4, 2**57, 1))
    assert out_of_memory(caught.value)
    value = torch.zeros(1)
    kernels.call("variation", x, one, value, by, sizes=(1, 4, 4, 1))
    torch.testing.assert_close(value[0], x.diff(dim=3).abs().mean() + x.diff(dim=2).abs().mean())


@with_kernels
def test_distances_and_variation_are_those_of_plain_torch() -> None:
    rng = torch.Generator().manual_seed(3)
    for trials, height, width in ((2, 5, 19), (37, 8, 8)):
        x = torch.rand(trials, 2, height, width, generator=rng, dtype=torch.float64).requires_grad_()
        along = torch.rand(trials, generator=rng, dtype=torch.float64)
        pairs = [variation(x), total_variation(x)]
        torch.testing.assert_close(*pairs, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            *(torch.autograd.grad((value * along).sum(), x)[0] for value in pairs), rtol=1e-13, atol=1e-16
        )
        g, o = (innermost(torch.rand(trials, 301, generator=rng, dtype=torch.float64)) for _ in range(2))
        g.requires_grad_()
        found = [*products(g, o), squared_gap(g, o)]
        assert found[0].grad_fn is not None
        assert "Products" in found[0].grad_fn.name()
        plain = [(g * o).sum(1), g.square().sum(1), (g - o).square().sum(1)]
        for a, b in zip(found, plain):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
            by = [torch.autograd.grad((value * along).sum(), g, retain_graph=True)[0] for value in (a, b)]
            torch.testing.assert_close(*by, rtol=1e-12, atol=1e-14)


def test_the_derivative_of_the_cosine_distance_is_that_of_its_graph() -> None:
    rng = torch.Generator().manual_seed(4)
    observed = {name: torch.randn(3, 5, generator=rng, dtype=torch.float64) for name in ("a", "b")}
    distance = cosine_from(observed)
    assert distance.derived is not None
    dots = torch.randn(2, 3, generator=rng, dtype=torch.float64).requires_grad_()
    squares = (1 + torch.rand(2, 3, generator=rng, dtype=torch.float64)).requires_grad_()
    value = distance.of(dots, squares)
    expected = torch.autograd.grad(value.sum(), (dots, squares))
    found = distance.derived(dots.detach(), squares.detach())
    torch.testing.assert_close(found[0], value.detach(), rtol=1e-14, atol=1e-15)
    for own, other in zip(found[1:], expected):
        torch.testing.assert_close(own.expand_as(other), other, rtol=1e-13, atol=1e-15)


def test_tensors_with_trials_innermost_are_joined_without_a_copy() -> None:
    buffer = torch.arange(30.0).view(10, 3)
    parts = [buffer[:4].view(2, 2, 3).movedim(-1, 0), buffer[4:].movedim(-1, 0)]
    rows = joined([part.requires_grad_() for part in parts])
    assert rows.data_ptr() == buffer.data_ptr()
    assert torch.equal(rows, buffer.mT)
    by = torch.autograd.grad((rows * buffer.mT.square()).sum(), parts)
    assert torch.equal(by[0], parts[0].detach().square())
    apart = joined([parts[1], parts[0]])
    assert torch.equal(apart, torch.cat([parts[1], parts[0].flatten(1)], 1))
    assert strides(parts[0])[1:] == (1, 3)
    assert strides(torch.rand(3, 4, 5))[1:] == (20, 1)
    assert strides(torch.rand(3, 5, 4).mT)[1:] == (20, 1)  # copied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_has_the_bits_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own = [torch.rand(3, 300, 100, dtype=dtype), torch.rand(3, 7, dtype=dtype)]
    other = [tensor.clone() for tensor in own]
    groups = [[{"params": [tensor], "lr": lr} for tensor, lr in zip(tensors, (0.1, 0.03))] for tensors in (own, other)]
    pair = Adam(groups[0]), torch.optim.Adam(groups[1])
    for step in range(12):
        for a, b in zip(own, other):
            a.grad = b.grad = torch.randn_like(a)
        for optimiser in pair:
            optimiser.step()
            for group in optimiser.param_groups:
                group["lr"] *= 0.5 if step == 6 else 1
    assert all(map(torch.equal, own, other))


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_adam_is_torchs_but_for_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    own = [torch.rand(3, 30, 7, dtype=dtype), torch.rand(3, 7, dtype=dtype)]
    other, best = ([tensor.clone() for tensor in own] for _ in range(2))
    fast = Adam([{"params": [tensor], "lr": lr} for tensor, lr in zip(own, (0.1, 0.03))])
    slow = torch.optim.Adam([{"params": [tensor], "lr": lr} for tensor, lr in zip(other, (0.1, 0.03))])
    finite = torch.tensor([True, True, False])
    for _ in range(12):
        before = [tensor.clone() for tensor in own]
        for a, b in zip(own, other):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.sign() if a is own[0] else a.grad
        fast.advance(dict(zip(own, best)), finite, own[:1], own[:1])
        slow.step()
        other[0].clamp_(0, 1)
        for a, b, kept, was in zip(own, other, best, before):
            torch.testing.assert_close(a, b, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
            assert torch.equal(kept[:2], was[:2])
    assert {float(own[0].min()), float(own[0].max())} == {0.0, 1.0}
    value, gradient = torch.zeros(4), {"x": torch.zeros(4, 3), "y": torch.zeros(4, 2)}
    value[0], gradient["x"][1, 2], gradient["y"][2, 0] = torch.nan, torch.inf, -torch.inf
    assert torch.equal(all_finite(value, gradient), rows_finite(value, gradient))
    assert all_finite(value, gradient).tolist() == [False, False, False, True]


@with_kernels
@pytest.mark.parametrize("spec", ["ig(steps=3)", "log-cosine(steps=3)", "dlg(steps=1)", "lb(steps=3)", "grnn(steps=2)"])
def test_attacks_take_the_same_steps_as_without_kernels(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = models.parse("lenet").build(SHAPE, CLASSES).double()
    observation = leakbench.observe(network, torch.rand(3, *SHAPE), torch.tensor([0, 1, 2]))
    fast = leakbench.attack(spec, observation, seed=0)
    again = leakbench.attack(spec, observation, seed=0)
    monkeypatch.setenv(compiled.SWITCH, "off")
    slow = leakbench.attack(spec, observation, seed=0)
    assert (fast.path, slow.path) == ("lanes", "batched")
    assert torch.equal(fast.images, again.images)
    assert fast.objective is not None
    assert slow.objective is not None
    torch.testing.assert_close(fast.objective, slow.objective, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fast.images, slow.images, rtol=1e-6, atol=1e-7)


@with_kernels
@pytest.mark.parametrize("spec", ["log-cosine", "dlg(tv=0.01)"])
def test_value_and_gradient_are_those_of_a_graph(spec: str) -> None:
    torch.manual_seed(0)
    network = models.parse("lenet").build(SHAPE, CLASSES).double()
    observation = leakbench.observe(network, torch.rand(3, *SHAPE), torch.tensor([0, 1, 2]), threat="paper")
    attack = attacks.parse(spec)
    objective = attack._objective(observation, leakbench.Rng(("a", "b", "c"))).with_path()
    objective = replace(objective, prior_factor=torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64))
    start = attack._begin(objective)
    found = objective.explicit(start, 0)
    assert found is not None
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    value = objective(leaves, 0)
    torch.testing.assert_close(found[0], value.detach(), rtol=1e-12, atol=1e-14)
    for name, wanted in zip(leaves, torch.autograd.grad(value.sum(), list(leaves.values()))):
        assert float((found[1][name] - wanted).norm()) <= 1e-12 * float(wanted.norm())


def test_attacks_that_differentiate_by_weights_do_not_take_kernels() -> None:
    network = models.parse("mlp(hidden=8)").build(SHAPE, CLASSES)
    observation = leakbench.observe(
        network,
        torch.rand(2, *SHAPE),
        torch.tensor([0, 1]),
        threat="shares=weights, local_steps=2, learning_rate=0.1, rate=known",
    )
    found = attacks.parse("ig(steps=2,local=unrolled)")(observation, leakbench.Rng(("a", "b")))
    assert found.path == "batched"


@dataclass(frozen=True)
class Even(IG):
    """An attack of a plugin with a prior of its own."""

    def prior(self, images: Tensor) -> Tensor:
        return self.tv * images.square().flatten(1).mean(1)


@with_kernels
def test_an_attack_with_another_prior_takes_the_kernels_too() -> None:
    found = leakbench.attack(Even(steps=3, tv=0.5), watch("lenet", "none"))
    assert found.path == "lanes"
    assert not bool(found.failed.any())
    other = leakbench.attack(IG(steps=3, tv=0.5), watch("lenet", "none"))
    assert not torch.equal(found.images, other.images)


def live() -> int:
    return sum(type(one) is Tensor for one in gc.get_objects())


@pytest.mark.parametrize("path", ["lanes", "batched", "one-at-a-time"])
@pytest.mark.parametrize("spec", ["ig", "log-cosine", "dlg", "lb", "grnn", "even"])
def test_an_evaluation_leaves_no_tensor_behind(spec: str, path: str) -> None:
    """A graph that holds its own results is never freed, so that a long search takes all memory."""
    if path == "lanes" and library.kernels() is None:
        pytest.skip("there are no kernels")
    torch.manual_seed(0)
    network = models.parse("lenet").build(SHAPE, CLASSES)
    observation = leakbench.observe(network, torch.rand(3, *SHAPE), torch.tensor([0, 1, 2]))
    attack = Even(tv=0.5) if spec == "even" else attacks.parse(spec)
    objective = attack._objective(observation, leakbench.Rng(("a", "b", "c"))).with_path()
    if path != "lanes":
        objective = replace(objective, evaluator=replace(objective.evaluator, path=path))
    assert objective.evaluator.path == path
    start = attack._begin(objective)
    gc.disable()
    gc.freeze()  # what there was before is not counted
    try:
        counts = []
        for evaluation in range(5):
            value_and_gradient(objective, start, evaluation)
            counts.append(live())
    finally:
        gc.unfreeze()
        gc.enable()
    assert counts[1] == counts[-1], counts
