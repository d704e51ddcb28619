"""Shift factorisation: exact inputs and errors from one weight gradient, and the cases in which there are none."""

from __future__ import annotations

import doctest
import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from benchmarks.speed import factorisation, networks
from leakbench.attacks.peeling import shifts
from leakbench.attacks.peeling.completion import factorise_incomplete
from leakbench.attacks.peeling.exposure import predict_exposure
from leakbench.attacks.peeling.factors import ConvolutionFactors, NotFactorised, scale_by_bias, scale_by_shift
from leakbench.attacks.peeling.krylov import DENSE, lowest_eigenvectors
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.masks import factorise_masked, factorise_valued, split_rows
from leakbench.attacks.peeling.pointwise import PointwiseFactors, factorise_pointwise
from leakbench.attacks.peeling.shifts import clear_rank, factorise_convolution
from leakbench.attacks.peeling.unmixing import unmix
from leakbench.errors import BadOption, Unsupported

EXACT = {
    "3x3": (nn.Conv2d(40, 24, 3, padding=1), (4, 4)),
    "rectangular": (nn.Conv2d(40, 24, 3, padding=1), (3, 5)),
    "fewer outputs than positions": (nn.Conv2d(40, 6, 3, padding=1), (4, 4)),
    "iterative": (nn.Conv2d(80, 32, 3, padding=1), (5, 5)),
    "no padding": (nn.Conv2d(40, 24, 3), (5, 4)),
    "wide padding": (nn.Conv2d(40, 24, 3, padding=4), (3, 3)),
    "5x5": (nn.Conv2d(40, 24, 5, padding=2), (4, 4)),
    "3x5": (nn.Conv2d(40, 24, (3, 5), padding=(1, 2)), (4, 4)),
    "2x2": (nn.Conv2d(40, 24, 2, padding=1), (4, 4)),
    "4x4 same": (nn.Conv2d(40, 24, 4, padding="same"), (4, 4)),
    "kernel of the image's size": (nn.Conv2d(40, 24, 4), (4, 4)),
    "stride 2, odd size": (nn.Conv2d(40, 24, 3, padding=1, stride=2), (5, 5)),
    "4x4, stride 2": (nn.Conv2d(40, 24, 4, padding=1, stride=2), (4, 6)),
    "groups": (nn.Conv2d(60, 24, 3, padding=1, groups=3), (4, 4)),
    "one dimension": (nn.Conv1d(30, 24, 3, padding=1), (12,)),
    "three dimensions": (nn.Conv3d(40, 24, 3, padding=1), (3, 3, 3)),
    "one position": (nn.Conv2d(8, 4, 3, padding=1), (1, 1)),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step(layer: nn.Module, image: tuple[int, ...], images: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight gradient of a convolution on ReLU inputs, by autograd in float64, those and random errors."""
    layer = layer.double()
    h = torch.randn(images, layer.in_channels, *image, dtype=torch.float64, generator=rng(seed)).relu()
    out = layer(h)
    d = torch.randn(out.shape, dtype=torch.float64, generator=rng(seed + 1))
    return torch.autograd.grad(out, layer.weight, d)[0], h, d


def error(found: Tensor, true: Tensor, groups: int = 1) -> float:
    """Return the largest relative error of an image (of a group) after the best scale, in the best order."""
    worst = 0.0
    for own, exact in zip(found.chunk(groups, 1), true.chunk(groups, 1)):
        for image in exact.flatten(1):
            scale = own.flatten(1) @ image / own.flatten(1).square().sum(1)
            off = (scale[:, None] * own.flatten(1) - image).norm(dim=1) / image.norm()
            worst = max(worst, float(off.min()))
    return worst


def factors(gradient: Tensor | None, lattice: Lattice, images: int = 1, seed: int = 0) -> ConvolutionFactors:
    found = factorise_convolution(gradient, lattice, rng(seed), images)
    assert isinstance(found, ConvolutionFactors), found
    return found


def refusal(gradient: Tensor | None, lattice: Lattice, images: int = 1) -> NotFactorised:
    found = factorise_convolution(gradient, lattice, rng(), images)
    assert isinstance(found, NotFactorised)
    return found


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", EXACT)
def test_one_image_is_exact(case: str) -> None:
    layer, image = EXACT[case]
    gradient, h, d = step(layer, image)
    lattice = Lattice.of(layer, image)
    found = factors(gradient, lattice)
    assert found.inputs.shape == h.shape
    assert found.errors.shape == d.shape
    assert error(found.inputs, h, layer.groups) < 1e-10
    read = (lattice.taps() < lattice.inputs).any(0).view(lattice.output)  # an error whose output reads only padding is
    assert error(found.errors, d * read, layer.groups) < 1e-10  # in no gradient
    assert found.misfit < 1e-11
    rounded = factors(gradient.float(), lattice)
    assert error(rounded.inputs, h, layer.groups) < 3e-6


@pytest.mark.parametrize("images", [2, 4, 8])
def test_batches_are_exact(images: int) -> None:
    layer = nn.Conv2d(16 * images, 32, 3, padding=1)
    gradient, h, d = step(layer, (3, 3), images)
    found = factors(gradient, Lattice.of(layer, (3, 3)), images)
    assert error(found.inputs, h) < 1e-10
    assert error(found.errors, d) < 1e-10
    assert error(factors(gradient.float(), Lattice.of(layer, (3, 3)), images).inputs, h) < 3e-6


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("images", [1, 3])
def test_a_network_is_exact_in_both_modes_of_batch_norm(images: int, training: bool) -> None:
    """The scale, too, by the shift of the normalisation below and, in eval mode, by that above."""
    torch.manual_seed(0)
    below = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    layer, above = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        for norm in (below[1], above):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    nn.Sequential(below, layer, above, head).double().train(training)
    h = below(torch.rand(images, 3, 4, 4, dtype=torch.float64))
    out = layer(h)
    loss = nn.functional.cross_entropy(head(above(out)), torch.arange(images))
    d, gradient, by_shift, by_upper = torch.autograd.grad(loss, [out, layer.weight, below[1].bias, above.bias])
    h = h.detach()
    lattice = Lattice.of(layer, (4, 4))
    found = factors(gradient, lattice, images)
    assert error(found.inputs, h) < 1e-10
    scaled = [scale_by_shift(found, layer.weight, lattice, by_shift)]
    if not training:
        scaled.append(scale_by_bias(found, above.weight.detach() / (above.running_var + above.eps).sqrt() * by_upper))
    for each in scaled:
        assert each.scale_misfit is not None
        assert each.scale_misfit < 1e-9
        for own, mine in ((each.inputs, h), (each.errors, d)):
            order = torch.cdist(own.flatten(1), mine.flatten(1)).argmin(0)
            assert torch.allclose(own[order], mine, rtol=1e-8, atol=1e-9 * float(mine.abs().max()))


def test_a_bias_gives_the_scale_of_every_group() -> None:
    layer = nn.Conv2d(48, 24, 3, padding=1, groups=2)
    gradient, h, d = step(layer, (4, 4))
    found = scale_by_bias(factors(gradient, Lattice.of(layer, (4, 4))), d.sum((0, 2, 3)))
    assert torch.allclose(found.inputs, h, atol=1e-10)
    assert torch.allclose(found.errors, d, atol=1e-10)
    assert found.scale_misfit < 1e-10
    with pytest.raises(BadOption, match="does not have the layer's 24 channels"):
        scale_by_bias(found, torch.ones(5))


@pytest.mark.parametrize("images", [1, 2])
def test_dilation_exposes_sub_lattices(images: int) -> None:
    layer = nn.Conv2d(30 * images, 24, 3, padding=2, dilation=2)
    gradient, h, d = step(layer, (4, 6), images)
    found = scale_by_bias(factors(gradient, Lattice.of(layer, (4, 6)), images), d.sum((0, 2, 3)))
    assert found.phases == 4
    own, mine = ((found.inputs, h), (found.errors, d))
    for values, true in (own, mine):
        pieces = torch.cat([true[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])
        order = torch.cdist(values.flatten(1), pieces.flatten(1)).argmin(0)
        assert torch.allclose(values[order], pieces, atol=1e-9)


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1)])
def test_a_kernel_in_one_direction_exposes_rows_or_columns(kernel: tuple[int, int]) -> None:
    layer = nn.Conv2d(40, 24, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    gradient, h, _ = step(layer, (4, 4))
    found = factors(gradient, Lattice.of(layer, (4, 4)))
    assert found.phases == 4
    along = 2 + kernel.index(1)
    assert error(found.inputs, torch.cat(h.split(1, along))) < 1e-10


def test_each_group_of_a_batch_has_its_own_order() -> None:
    layer = nn.Conv2d(60, 24, 3, padding=1, groups=2)
    gradient, h, d = step(layer, (3, 3), 2)
    found = scale_by_bias(factors(gradient, Lattice.of(layer, (3, 3)), 2), d.sum((0, 2, 3)))
    assert error(found.inputs, h, 2) < 1e-10
    assert error(found.errors, d, 2) < 1e-10
    assert found.scale_misfit < 1e-9


REFUSED = {
    "stride 2": (nn.Conv2d(80, 24, 3, padding=1, stride=2), (4, 4), 1, "its shifts leave 4 dimensions"),
    "one tap, padded": (nn.Conv2d(80, 24, (1, 3), padding=1), (4, 4), 1, "its shifts leave 16 dimensions"),
    "2x1": (nn.Conv2d(80, 24, (2, 1), padding="same"), (4, 4), 1, "its shifts leave 4 dimensions"),
    "2x2 same": (nn.Conv2d(80, 24, 2, padding="same"), (4, 4), 1, "its shifts leave 16 dimensions"),
    "1x1": (nn.Conv2d(80, 24, 1), (4, 4), 1, "its shifts leave 256 dimensions"),
    "unlike sub-lattices": (nn.Conv2d(80, 24, 3, padding=2, dilation=2), (5, 5), 1, "its shifts leave 4 dimensions"),
    "few channels": (nn.Conv2d(15, 24, 3, padding=1), (4, 4), 1, "15 channels are fewer than 1 x 16 positions"),
    "batch": (nn.Conv2d(40, 24, 3, padding=1), (4, 4), 3, "40 channels are fewer than 3 x 16 positions"),
    "depthwise": (nn.Conv2d(32, 32, 3, padding=1, groups=32), (4, 4), 1, "1 channels of a group are fewer than"),
    "one output": (nn.Conv2d(40, 1, 3, padding=1), (4, 4), 1, "9 independent rows, and needs 16"),
    "large": (nn.Conv2d(800, 1, 3, padding=1), (28, 28), 1, "614656 unknowns are more than"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_determine_the_input_is_refused_with_the_reason(case: str) -> None:
    layer, image, images, reason = REFUSED[case]
    gradient = torch.randn(layer.weight.shape, generator=rng())
    assert reason in refusal(gradient, Lattice.of(layer, image), images).reason


def test_a_wrong_assumption_is_measured() -> None:
    """Circular padding that is taken for zeros, a wrong number of images, an input of low rank, and only noise."""
    layer = nn.Conv2d(40, 24, 3, padding=1)
    lattice = Lattice.of(layer, (4, 4))
    around = nn.Conv2d(40, 24, 3, padding=1, padding_mode="circular")
    found = refusal(step(around, (4, 4))[0], lattice)
    assert "1 eigenvalue should vanish" in found.reason
    assert found.gap > 0.2
    two = step(layer, (4, 4), 2)[0]
    assert "rank 32 instead of 16" in refusal(two, lattice).reason
    one, h, d = step(layer, (4, 4))
    assert "rank 16, and 32 is needed" in refusal(one, lattice, 2).reason
    h[:, :, 0, 0] = h[:, :, 1, 1]
    low = torch.autograd.grad(layer(h), layer.weight, d)[0].float()
    assert "rank 15, and 16 is needed" in refusal(low, lattice).reason
    noise = refusal(torch.randn(one.shape, generator=rng()), lattice)
    assert noise.gap > 0.2


def test_a_layer_too_large_for_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(80, 32, 3, padding=1)
    gradient, _, _ = step(layer, (5, 5))
    factors(gradient, Lattice.of(layer, (5, 5)))
    monkeypatch.setattr(shifts, "free_memory", lambda _: 8 * 625 * 100)
    assert "the eigenvectors of 625 unknowns take" in refusal(gradient, Lattice.of(layer, (5, 5))).reason


@pytest.mark.parametrize(
    ("layer", "image", "reason"),
    [
        (nn.ConvTranspose2d(8, 8, 3), (4, 4), "a transposed convolution"),
        (nn.Linear(8, 8), (4, 4), "a Linear"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (4, 4), "circular padding, whose shifts commute"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (4, 4), "reflect padding, which repeats"),
        (nn.Conv2d(8, 8, 3), (4,), "takes 2 dimensions, and the input has 1"),
        (nn.Conv2d(8, 8, 5), (4, 4), "is smaller than the kernel's reach"),
    ],
)
def test_layers_without_shifts_are_unsupported(layer: nn.Module, image: tuple[int, ...], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        Lattice.of(layer, image)


def test_bad_gradients_are_one_line() -> None:
    layer = nn.Conv2d(40, 24, 3, padding=1)
    lattice = Lattice.of(layer, (4, 4))
    gradient = step(layer, (4, 4))[0]
    assert "was not sent" in refusal(None, lattice).reason
    assert "not finite" in refusal(torch.where(gradient > 3, torch.nan, gradient), lattice).reason
    assert "is zero" in refusal(torch.zeros_like(gradient), lattice).reason
    groups = nn.Conv2d(40, 24, 3, padding=1, groups=2)
    half = step(groups, (4, 4))[0].index_fill(0, torch.arange(12), 0.0)
    assert "zero, at least of one group" in refusal(half, Lattice.of(groups, (4, 4))).reason
    tiny = factors(1e-60 * gradient, lattice)
    assert torch.allclose(tiny.errors, 1e-60 * factors(gradient, lattice).errors, rtol=1e-9, atol=0)
    with pytest.raises(BadOption, match="expected"):
        factorise_convolution(gradient[..., :2], lattice, rng())
    with pytest.raises(BadOption, match="images=0"):
        factorise_convolution(gradient, lattice, rng(), 0)


def test_the_same_seed_gives_the_same_numbers() -> None:
    layer = nn.Conv2d(80, 24, 3, padding=1)
    gradient = step(layer, (3, 4), 3)[0].float()
    before = gradient.clone()
    one, two, other = (factors(gradient, Lattice.of(layer, (3, 4)), 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.errors, two.errors)
    assert error(one.inputs, other.inputs) < 1e-5
    assert torch.equal(gradient, before)


def test_noise_costs_accuracy_in_proportion() -> None:
    layer = nn.Conv2d(64, 64, 3, padding=1)
    gradient, h, _ = step(layer, (4, 4))
    noise = torch.randn(gradient.shape, dtype=torch.float64, generator=rng(9)) * gradient.square().mean().sqrt()
    for level in (1e-4, 1e-2):
        found = factors(gradient + level * noise, Lattice.of(layer, (4, 4)))
        off = error(found.inputs, h)
        assert level / 10 < off < 10 * level
        stated = float(found.variance.mean().sqrt() / found.inputs.square().mean().sqrt())
        assert stated / 3 < off < 3 * stated


@pytest.mark.parametrize("images", [2, 4])
def test_images_are_separated_behind_noise(images: int) -> None:
    layer = nn.Conv2d(30 * images, 64, 3, padding=1)
    gradient, h, _ = step(layer, (3, 3), images)
    noise = torch.randn(gradient.shape, dtype=torch.float64, generator=rng(9)) * gradient.square().mean().sqrt()
    found = factors(gradient + 1e-2 * noise, Lattice.of(layer, (3, 3)), images)
    assert error(found.inputs, h) < 0.05


def test_a_dominant_singular_value_is_no_rank() -> None:
    """Noise hides where the rank ends, and a large mean of the inputs makes the first ratio a large one."""
    singular = torch.cat([torch.tensor([1e3]), torch.linspace(1, 0.5, 15), torch.full((20,), 0.1)]).double()
    assert clear_rank(singular, 16, torch.float32) == pytest.approx(5.0)


SMALL = [
    (nn.Conv2d(1, 1, 3, padding=1), (2, 3)),
    (nn.Conv2d(1, 1, 3, padding=1, stride=2), (4, 4)),
    (nn.Conv2d(1, 1, 3, padding=1, stride=2), (3, 4)),
    (nn.Conv2d(1, 1, 2, padding="same"), (3, 3)),
    (nn.Conv2d(1, 1, (1, 2), padding=(0, 1)), (2, 3)),
    (nn.Conv1d(1, 1, 3, padding=3), (3,)),
    (nn.Conv1d(1, 1, 3, padding=2, dilation=2), (5,)),
    (nn.Conv1d(1, 1, 3, padding=1, dilation=2), (6,)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("index", range(len(SMALL)))
def test_the_ambiguity_is_the_dimension_of_a_null_space(index: int) -> None:
    """Beside the connected components: S_k Z = R S_k as linear equations, with S_k by convolving unit images."""
    layer, image = SMALL[index]
    lattice = Lattice.of(layer, image)
    units = torch.eye(math.prod(image)).view(-1, 1, *image)
    taps = []
    for k in range(layer.weight.numel()):
        weight = torch.zeros(layer.weight.numel()).index_fill_(0, torch.tensor([k]), 1.0).view(layer.weight.shape)
        taps.append(layer._conv_forward(units, weight, None).flatten(1).mT.double())
    places = taps[0].shape[1]
    read = torch.cat(taps, 1).any(1).nonzero().flatten()
    taps = [tap[read] for tap in taps]
    outputs = len(read)
    rows = [
        torch.cat([torch.kron(tap, torch.eye(places)), -torch.kron(torch.eye(outputs), tap.mT.contiguous())], 1)
        for tap in taps
    ]
    matrix = torch.cat(rows)
    assert lattice.ambiguity() == matrix.shape[1] - int(torch.linalg.matrix_rank(matrix))


def test_lanczos_finds_a_multiple_eigenvalue_as_the_dense_solver_does() -> None:
    size, count = DENSE + 100, 3
    vectors = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=rng()))[0]
    values = torch.cat([torch.zeros(count), torch.linspace(0.1, 1, size - count)]).double()
    matrix = (vectors * values) @ vectors.mT
    found, rows = lowest_eigenvectors(lambda x: x @ matrix, size, count, rng())
    assert torch.allclose(found, values[: count + 1], atol=1e-3)
    assert float((rows @ matrix).norm()) < 1e-10
    assert torch.allclose(rows @ rows.mT, torch.eye(count, dtype=torch.float64), atol=1e-10)


def test_unmixing_needs_zeros() -> None:
    rows = torch.rand(300, 3, dtype=torch.float64, generator=rng())
    mixing = torch.randn(3, 3, dtype=torch.float64, generator=rng(1))
    none = torch.zeros(300, dtype=torch.float64)
    sparse = torch.where(torch.rand(300, 3, generator=rng(2)) < 0.5, 0.0, rows)
    found = unmix(sparse @ mixing, none, rng())
    values = sparse @ mixing @ found.mT
    assert error(values.mT[:, None], sparse.mT[:, None]) < 1e-10
    assert len(unmix(rows @ mixing, none, rng())) < 3


def sparse(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=rng(seed)).relu()


def test_masks_are_found_in_an_input_of_low_rank() -> None:
    """14 of 40 channels are alive, which is fewer than the 16 positions; values and counts of the errors are known."""
    layer = nn.Conv2d(40, 64, 3, padding=1).double()
    lattice = Lattice.of(layer, (4, 4))
    h = sparse((1, 40, 4, 4))
    h[:, 14:] = 0
    masks = (torch.rand(1, 64, 4, 4, generator=rng(1)) < 0.6).double()
    values = torch.randn(64, dtype=torch.float64, generator=rng(2))
    values[3] = 0
    d = values.view(1, 64, 1, 1) * masks
    gradient = torch.autograd.grad(layer(h), layer.weight, d)[0]
    assert "rank 14, and 16 is needed" in refusal(gradient, lattice).reason
    found = factorise_masked(gradient, lattice, values, masks.sum((0, 2, 3)), rng())
    assert isinstance(found, ConvolutionFactors)
    assert torch.allclose(found.inputs, h, atol=1e-10)
    assert torch.allclose(found.errors, d, atol=1e-10)
    wrong = factorise_masked(gradient, lattice, values.flip(0), masks.sum((0, 2, 3)), rng())
    assert isinstance(wrong, NotFactorised)
    assert wrong.gap > 0.3
    few = factorise_masked(gradient, lattice, values * (torch.arange(64) == 7), masks.sum((0, 2, 3)), rng())
    assert isinstance(few, NotFactorised)
    assert "1 output channels do not determine" in few.reason
    with pytest.raises(BadOption, match="expected two tensors"):
        factorise_masked(gradient, lattice, values[:5], masks.sum((0, 2, 3)), rng())


def test_masks_are_found_behind_noise_and_noise_alone_is_refused() -> None:
    """Values are known up to a factor, and some counts. Masks are wrong only where a value is below the noise."""
    layer = nn.Conv2d(64, 128, 3, padding=1).double()
    lattice = Lattice.of(layer, (4, 4))
    h = sparse((1, 64, 4, 4))
    masks = torch.rand(1, 128, 4, 4, generator=rng(1)) < 0.6
    values = torch.randn(128, dtype=torch.float64, generator=rng(2))
    gradient = torch.autograd.grad(layer(h), layer.weight, values.view(1, 128, 1, 1) * masks)[0]
    noise = torch.randn(gradient.shape, dtype=torch.float64, generator=rng(3)) * gradient.square().mean().sqrt()
    unknown = torch.full_like(values, torch.nan)
    for level, most in ((0.0, 1e-10), (0.1, 0.1), (0.3, 0.3)):
        found = factorise_valued(gradient + level * noise, lattice, 5 * values, unknown, rng())
        assert isinstance(found, ConvolutionFactors), found
        wrong = ((found.errors != 0) != masks).any(0).flatten(1).any(1)
        assert error(found.inputs, h) <= most
        assert bool((values[wrong].abs() < 2 * level).all())
    for nothing in (noise, 0 * noise):
        assert isinstance(factorise_valued(nothing, lattice, values, unknown, rng()), NotFactorised)
    counts = torch.where(values > 0, masks.sum((0, 2, 3)), torch.nan)
    found = factorise_valued(gradient + noise, lattice, values, counts, rng())
    assert isinstance(found, ConvolutionFactors), found
    assert torch.equal((found.errors != 0).sum((0, 2, 3))[values > 0], counts[values > 0].long())
    with pytest.raises(BadOption, match="expected two tensors"):
        factorise_valued(gradient, lattice, values[:5], unknown, rng())


def test_rows_are_split_into_value_and_mask() -> None:
    values = torch.tensor([[2.0, -0.5, 0.0, 1.0]], dtype=torch.float64)
    masks = torch.rand(1, 4, 3, 3, generator=rng()) < 0.5
    errors = values[..., None, None] * masks + 1e-3 * torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=rng(1))
    found = split_rows(errors)
    assert torch.equal(found.masks, masks & (values != 0)[..., None, None])
    assert torch.allclose(found.values, values, atol=2e-3)
    assert torch.equal(found.errors, found.values[..., None, None] * found.masks)
    assert found.deviation < 3e-3


@pytest.mark.parametrize("images", [1, 2])
def test_a_pruned_gradient_is_exact(images: int) -> None:
    layer = nn.Conv2d(60, 48, 3, padding=1)
    gradient, h, d = step(layer, (3, 3), images)
    share = torch.linspace(1.4, 0.1, 60)[None, :, None, None]  # of some channels nearly nothing is sent
    sent = torch.rand(gradient.shape, generator=rng(5)) < share
    sent[:, 59] = False
    found = factorise_incomplete(torch.where(sent, gradient, torch.nan), sent, Lattice.of(layer, (3, 3)), rng(), images)
    assert isinstance(found, ConvolutionFactors), found
    known = torch.isfinite(found.inputs).all(0).flatten(1).all(1)
    assert known.sum() > 40
    assert not known[59]
    assert error(found.inputs[:, known], h[:, known]) < 1e-6
    assert error(found.errors, d) < 1e-6
    assert found.misfit < 1e-7


def test_too_few_entries_are_refused() -> None:
    layer = nn.Conv2d(60, 48, 3, padding=1)
    gradient = step(layer, (3, 3))[0]
    sent = torch.rand(gradient.shape, generator=rng(5)) < 0.1
    found = factorise_incomplete(gradient, sent, Lattice.of(layer, (3, 3)), rng())
    assert isinstance(found, NotFactorised)
    assert "the dense core" in found.reason
    none = factorise_incomplete(gradient, torch.zeros_like(sent), Lattice.of(layer, (3, 3)), rng())
    assert isinstance(none, NotFactorised)
    assert "is zero" in none.reason
    with pytest.raises(BadOption, match="equal shapes"):
        factorise_incomplete(gradient, sent[:4], Lattice.of(layer, (3, 3)), rng())


@pytest.mark.parametrize("images", [1, 2])
def test_a_pointwise_convolution_exposes_the_positions(images: int) -> None:
    layer = nn.Conv2d(90, 40, 1)
    gradient, h, d = step(layer, (2, 3), images)
    columns, errors = (each.flatten(2).mT.flatten(0, 1) for each in (h, d))
    found = factorise_pointwise(gradient, 6, rng(), images)
    assert isinstance(found, PointwiseFactors)
    assert torch.allclose(columns @ found.row_space.mT @ found.row_space, columns)
    assert error(found.inputs, columns) < 1e-9
    assert error(found.errors, errors) < 1e-9
    rounded = factorise_pointwise(gradient.float(), 6, rng(), images)
    assert isinstance(rounded, PointwiseFactors)
    assert error(rounded.inputs, columns) < 3e-6


def test_a_pointwise_convolution_without_zeros_exposes_only_the_row_space() -> None:
    h = torch.rand(5, 50, dtype=torch.float64, generator=rng())
    d = torch.randn(30, 5, dtype=torch.float64, generator=rng(1))
    found = factorise_pointwise((d @ h)[..., None, None], 5, rng())
    assert isinstance(found, PointwiseFactors)
    assert len(found.inputs) < 5
    assert torch.allclose(h @ found.row_space.mT @ found.row_space, h)
    for gradient, positions, reason in [
        (None, 5, "was not sent"),
        (torch.zeros(30, 50, 1, 1), 5, "is zero"),
        (torch.full((30, 50, 1, 1), torch.nan), 5, "not finite"),
        (torch.ones(30, 50, 1, 1), 40, "40 positions are more than 50 channels or 30 output channels"),
        (torch.ones(30, 50, 1, 1), 5, "rank 1, and 5 is needed"),
    ]:
        refused = factorise_pointwise(gradient, positions, rng())
        assert isinstance(refused, NotFactorised)
        assert reason in refused.reason
    with pytest.raises(BadOption, match="expected"):
        factorise_pointwise(torch.ones(3, 3, 3, 3), 5, rng())


@pytest.mark.parametrize("case", [*EXACT, *REFUSED])
def test_the_prediction_agrees_with_the_factorisation(case: str) -> None:
    layer, image, images, _ = REFUSED.get(case) or (*EXACT[case], 1, "")
    lattice = Lattice.of(layer, image)
    found = predict_exposure(lattice, layer.in_channels, layer.out_channels, images, own_statistics=True)
    assert (found.verdict == "hidden") == (case in REFUSED and case != "1x1"), found


def test_the_prediction_before_any_gradient() -> None:
    """The rule: channels against positions, with 1.3 times as many behind a ReLU whose channels may all be zero."""

    def verdict(channels: int, side: int, images: int = 1, kernel: int = 3, **known: bool) -> str:
        lattice = Lattice.of(nn.Conv2d(8, 8, kernel, padding=kernel // 2), (side, side))
        return predict_exposure(lattice, channels, channels, images, **known).verdict

    assert verdict(256, 14) == "exposed"
    assert verdict(64, 8) == "possible"
    assert verdict(64, 8, own_statistics=True) == "exposed"
    assert verdict(64, 8, sparse=False) == "exposed"
    assert verdict(64, 9) == "hidden"
    assert verdict(512, 4, images=8) == "exposed"
    assert verdict(512, 4, images=8, sparse=False) == "hidden"
    assert verdict(512, 4, images=33) == "hidden"
    assert verdict(512, 2, kernel=1) == "partly"
    assert verdict(512, 1, kernel=1) == "exposed"
    assert verdict(512, 32, kernel=1) == "hidden"


def test_the_example_and_the_benchmark_run() -> None:
    assert doctest.testmod(shifts).failed == 0
    row = factorisation.measure(factorisation.Point(3, 40, 2), rounds=1)
    assert row["error"] < 1e-6
    about = {"processor": "a processor", "torch": "2", "commit": "abc"}
    page = factorisation.page({"machine": about, "curves": {"images": [row]}})
    assert f"| 9 | 40 | 2 | {row['seconds'][0]:.2f} | {row['error']:.1e} |" in page


def test_the_benchmark_of_networks_runs() -> None:
    case = networks.Case("resnet18(stem=cifar, max_pool=false, width=8, mode=eval)", "samples(size=16)", (0,), 1, 20)
    found = networks.measure(case, 0)
    assert found["psnr"] > 15
    assert found["gib"] > 0
    about = {"processor": "a processor", "torch": "2", "commit": "abc"}
    page = networks.page(
        {"machine": about, "rows": [{**asdict(case), "measured": [found, {**found, "seconds": 99.0}]}]}
    )
    assert f"| 1 of samples(size=16) | 2 | {(found['seconds'] + 99) / 2:.1f} | 99.0 | 20 | {found['gib']:.2f} |" in page
