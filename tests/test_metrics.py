"""The metrics against closed forms, identities, independent implementations and the paper's own pipeline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import lpips as lpips_package
import numpy as np
import pytest
import safetensors.torch
import skimage.data
import skimage.metrics
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur, to_pil_image

from leakbench import metrics
from leakbench.core.types import Reconstruction
from leakbench.errors import CorruptAsset, MissingAsset
from leakbench.metrics import Truth, perceptual
from leakbench.metrics import lpips as lpips_module
from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM, align
from leakbench.metrics.lpips import TRUNKS, Net, load_network
from leakbench.metrics.paper import PaperMSE, PaperPSNR, PaperSSIM, quantise
from leakbench.metrics.standard import MSE, PSNR, SSIM

NAMES = [
    "mse",
    "psnr",
    "ssim",
    "lpips_vgg",
    "lpips_alex",
    "psnr_aligned",
    "ssim_aligned",
    "label_correct",
    "paper_mse",
    "paper_psnr",
    "paper_ssim",
    "paper_lpips_vgg",
    "paper_lpips_alex",
]
NAMED_ONLY = {"ms_ssim": 161, "vif": 41, "gmsd": 8, "fsim": 8}
"""The metrics that a run must name, with the smallest image of each."""
TRUNK_METRICS = [name for name in NAMES if "lpips" in name]
IMAGE_METRICS = [name for name in NAMES if name != "label_correct"]
NETS: tuple[Net, ...] = ("vgg", "alex")

mse, psnr, ssim = MSE(), PSNR(), SSIM()
psnr_aligned, ssim_aligned = AlignedPSNR(), AlignedSSIM()
paper_mse, paper_psnr, paper_ssim = PaperMSE(), PaperPSNR(), PaperSSIM()


def lpips(images: Tensor, truth: Tensor, net: Net) -> Tensor:
    return metrics.parse(f"lpips_{net}")(images, truth)


def paper_lpips(images: Tensor, truth: Tensor, net: Net) -> Tensor:
    return metrics.parse(f"paper_lpips_{net}")(images, truth)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torchvision_features(net: Net) -> nn.Module:
    """Return torchvision's layers with random weights, without the large classifier behind them."""
    if net == "alex":
        return torchvision.models.AlexNet(num_classes=1).features
    configuration = torchvision.models.vgg.cfgs["D"]
    return torchvision.models.vgg.make_layers(configuration)


def fed_directly(net: Net, weights: dict[str, Tensor]) -> nn.Module:
    """Return the lpips package's own network, built by its documented constructor, with the trunk copied in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False)
    for part in network.net.children():
        for index, layer in part.named_children():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = weights[f"features.{index}.weight"]
                layer.bias.data = weights[f"features.{index}.bias"]
    return network


@pytest.fixture(scope="module")
def trunk_files(tmp_path_factory: pytest.TempPathFactory) -> dict[Net, Path]:
    """Trunks of random weights, in the form in which the assets hold the true ones."""
    files: dict[Net, Path] = {}
    for net in NETS:
        features = torchvision_features(net).state_dict()
        files[net] = tmp_path_factory.mktemp("trunks") / f"{net}.safetensors"
        safetensors.torch.save_file({f"features.{name}": value for name, value in features.items()}, files[net])
    return files


@pytest.fixture(scope="module")
def random_networks(trunk_files: dict[Net, Path]) -> dict[Net, nn.Module]:
    return {net: load_network(net, file) for net, file in trunk_files.items()}


@pytest.fixture
def random_trunks(random_networks: dict[Net, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let LPIPS run on trunks of random weights: enough for shapes, ranges and rows, never for values."""
    monkeypatch.setattr(lpips_module, "_network", lambda net, device: random_networks[net])


# What every metric has in common


def test_the_metrics_are_registered_in_the_order_of_their_columns() -> None:
    assert metrics.names()[: len(NAMES)] == NAMES
    every_run = [*NAMES, "psnr_encoded", "ssim_encoded", "psnr_encoded_floor", "ssim_encoded_floor"]
    assert [metric.name for metric in metrics.of_run()][: len(every_run)] == every_run
    assert not set(NAMED_ONLY) & {metric.name for metric in metrics.of_run()}
    assert [metric.name for metric in metrics.of_run(["fsim", "psnr"])][len(every_run)] == "fsim"


@pytest.mark.parametrize("name", [*NAMES, *NAMED_ONLY])
def test_a_metric_states_its_convention_direction_and_source(name: str) -> None:
    cls = metrics.get(name)
    assert len(cls.convention) > 10
    assert cls.reference
    assert "\n" not in cls.convention + cls.reference
    assert cls.higher_is_better == any(word in name for word in ("psnr", "sim", "correct", "vif"))
    assert cls.summary().endswith(".")
    assert metrics.spec(metrics.parse(name)) == name


@pytest.mark.parametrize("name", IMAGE_METRICS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.usefixtures("random_trunks")
def test_batched_equals_one_by_one(name: str, channels: int) -> None:
    metric = metrics.parse(name)
    images, truth = 2 * randn(7, channels, 32, 32), rand(7, channels, 32, 32, seed=1)
    together = metric(images, truth)
    alone = torch.cat([metric(images[row : row + 1], truth[row : row + 1]) for row in range(7)])
    tolerance = 1e-5 if "lpips" in name else 1e-12
    assert together.shape == (7,)
    assert together.dtype == torch.float64
    assert len(set(together.tolist())) == 7
    torch.testing.assert_close(together, alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", IMAGE_METRICS)
@pytest.mark.usefixtures("random_trunks")
def test_a_row_does_not_depend_on_its_neighbours_and_inputs_stay(name: str) -> None:
    metric = metrics.parse(name)
    images, truth = randn(3, 3, 32, 32), rand(3, 3, 32, 32, seed=1)
    before = images.clone(), truth.clone()
    first = metric(images, truth)
    assert torch.equal(images, before[0])
    assert torch.equal(truth, before[1])
    images[0], truth[0] = 1e6 * images[0], 1 - truth[0]
    second = metric(images, truth)
    torch.testing.assert_close(first[1:], second[1:], rtol=1e-12, atol=1e-12)
    assert first[0] != second[0]


@pytest.mark.parametrize("name", IMAGE_METRICS)
@pytest.mark.usefixtures("random_trunks")
def test_equal_images_score_best(name: str) -> None:
    metric = metrics.parse(name)
    truth = rand(2, 3, 32, 32)
    best = 100.0 if "psnr" in name else 1.0 if "ssim" in name else 0.0
    assert metric(truth, truth).tolist() == pytest.approx([best] * 2, abs=1e-9)
    worse = metric(truth + 0.1 * randn(2, 3, 32, 32, seed=1), truth)
    assert bool((worse < best - 1e-6).all() if metric.higher_is_better else (worse > best + 1e-6).all())


@pytest.mark.parametrize("name", IMAGE_METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e6, 1e30, 3e38])
@pytest.mark.usefixtures("random_trunks")
def test_any_finite_reconstruction_has_a_finite_value(name: str, scale: float) -> None:
    images = scale * (2 * rand(2, 3, 32, 32) - 1)
    assert bool(torch.isfinite(metrics.parse(name)(images, rand(2, 3, 32, 32, seed=1))).all())


@pytest.mark.parametrize("name", IMAGE_METRICS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x[:1], y), r"shape \[1, 3, 32, 32\] do not match a truth of shape \[2, 3, 32, 32\]"),
        (lambda x, y: (x[0], y[0]), r"\[T, C, H, W\]"),
        (lambda x, y: (torch.where(torch.arange(2).view(2, 1, 1, 1) == 1, math.nan, x), y), "row 1 is not finite"),
        (lambda x, y: (x / 0, y), "reconstruction of row 0 is not finite"),
        (lambda x, y: (x, y + 1), "truth ranges from 1"),
        (lambda x, y: (x, y - 0.5), "truth ranges from -0"),
        (lambda x, y: (x, y * math.nan), "truth of row 0 is not finite"),
        (lambda x, y: (x.half(), y), "torch.float16"),
    ],
    ids=["rows", "dimensions", "nan", "inf", "above", "below", "truth-nan", "half"],
)
@pytest.mark.usefixtures("random_trunks")
def test_unfit_images_are_refused_in_one_line(
    name: str, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], message: str
) -> None:
    images, truth = change(rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1))
    with pytest.raises(ValueError, match=message) as caught:
        metrics.parse(name)(images, truth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "window"), [("ssim", 11), ("ssim_aligned", 11), ("paper_ssim", 7), *NAMED_ONLY.items()]
)
def test_small_images_are_refused_and_the_column_says_so(name: str, window: int) -> None:
    metric = metrics.parse(name)
    assert metric(rand(1, 3, window, window), rand(1, 3, window, window, seed=1)).shape == (1,)
    assert metric.note((3, window, window)) == ""
    small = rand(1, 3, window - 1, 200)
    with pytest.raises(ValueError, match=f"at least {window} x {window} pixels; {window - 1} x 200"):
        metric(small, small)
    assert f"not defined for {window - 1} x 200 images" in metric.note((3, window - 1, 200))


# Standard


@given(difference=st.floats(1e-4, 1.0))
@settings(deadline=None, max_examples=30)
def test_a_constant_difference_has_closed_forms(difference: float) -> None:
    truth = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    assert mse(truth + difference, truth).item() == pytest.approx(difference**2)
    assert psnr(truth + difference, truth).item() == pytest.approx(-20 * math.log10(difference), abs=1e-9)
    # Flat images differ in luminance alone: (2 x y + C1) / (x^2 + y^2 + C1) with x = 0.
    assert ssim(truth + difference, truth).item() == pytest.approx(1e-4 / (difference**2 + 1e-4), rel=1e-6)


def test_the_reconstruction_is_clamped() -> None:
    truth = rand(4, 3, 16, 16)
    images = 3 * randn(4, 3, 16, 16, seed=1)
    for function in (mse, psnr, ssim):
        assert torch.equal(function(images, truth), function(images.clamp(0, 1), truth))
    white = torch.ones(1, 1, 16, 16)
    assert mse(white + 41, white).item() == 0
    assert mse(-white, white).item() == 1


def test_psnr_is_capped_at_100_and_starts_at_0() -> None:
    truth = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    assert psnr(truth, truth).item() == 100
    assert psnr(truth + 1e-5 * (1 + 1e-3), truth).item() == pytest.approx(99.99, abs=0.01)
    assert psnr(truth + 1e-6, truth).item() == 100
    assert psnr(truth + 1, truth).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 11, 40), (3, 64, 64)])
def test_psnr_and_ssim_equal_skimage(shape: tuple[int, int, int]) -> None:
    truth = rand(5, *shape, dtype=torch.float64)
    images = (truth + 0.2 * randn(5, *shape, seed=1)).clamp(0, 1)
    for row in range(5):
        pair = truth[row].numpy(), images[row].numpy()
        expected = skimage.metrics.peak_signal_noise_ratio(*pair, data_range=1)
        assert psnr(images, truth)[row].item() == pytest.approx(expected, abs=1e-9)
        # skimage's Gaussian of sigma 1.5 also spans 11 pixels, and its mean leaves out the 5 at each border.
        expected = skimage.metrics.structural_similarity(
            *pair, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1
        )
        assert ssim(images, truth)[row].item() == pytest.approx(expected, abs=1e-9)


def test_ssim_is_symmetric_bounded_and_exact_on_flat_images() -> None:
    first, second = rand(3, 3, 24, 24), rand(3, 3, 24, 24, seed=1)
    torch.testing.assert_close(ssim(first, second), ssim(second, first), rtol=0, atol=1e-14)
    assert bool((ssim(1 - first, first) < 0).all())
    flat = torch.full((1, 1, 16, 16), 0.7)
    assert ssim(flat, flat + 1e-3).item() == pytest.approx(1 - 1e-6 / (2 * 0.7**2), abs=1e-7)


def test_ssim_does_not_depend_on_the_precision_of_its_input() -> None:
    images, truth = rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1)
    assert torch.equal(ssim(images, truth), ssim(images.double(), truth.double()))


# Further measures of piq, which a run must name


@pytest.mark.parametrize("name", NAMED_ONLY)
def test_a_further_measure_is_best_for_equal_images_and_worsens_with_noise(name: str) -> None:
    metric = metrics.parse(name)
    truth = photo(max(64, NAMED_ONLY[name]))
    noise = randn(*truth.shape)
    noisy = torch.cat([truth + level * noise for level in (0.0, 0.02, 0.05, 0.1, 0.2)])
    values = metric(noisy, truth.expand_as(noisy))
    assert values.dtype == torch.float64
    assert values[0].item() == pytest.approx(1.0 if metric.higher_is_better else 0.0, abs=1e-6)
    assert bool((values.diff() < 0).all() if metric.higher_is_better else (values.diff() > 0).all()), values
    torch.testing.assert_close(metric(noisy.clamp(0, 1), truth.expand_as(noisy)), values)
    each = torch.cat([metric(row[None], truth) for row in noisy])
    torch.testing.assert_close(each, values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMED_ONLY)
def test_a_further_measure_is_symmetric_but_for_vif_and_takes_grey_as_rgb(name: str) -> None:
    metric = metrics.parse(name)
    size = max(48, NAMED_ONLY[name])
    first, second = photo(size), (photo(size) + 0.1 * randn(1, 3, size, size)).clamp(0, 1)
    symmetric = abs(metric(first, second).item() - metric(second, first).item()) < 1e-9
    assert symmetric == (name != "vif")
    grey = first[:, :1], second[:, :1]
    torch.testing.assert_close(metric(*grey), metric(*(image.expand(-1, 3, -1, -1) for image in grey)))
    with pytest.raises(ValueError, match="2 channels"):
        metric(first[:, :2], second[:, :2])


@pytest.mark.parametrize("name", NAMED_ONLY)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_further_measure_of_any_finite_reconstruction_is_finite(name: str, scale: float) -> None:
    images = scale * (2 * rand(2, 1, 161, 161) - 1)
    assert bool(torch.isfinite(metrics.parse(name)(images, rand(2, 1, 161, 161, seed=1))).all())


def test_ms_ssim_of_flat_images_is_the_luminance_of_the_last_scale() -> None:
    truth = torch.full((1, 3, 161, 161), 0.3, dtype=torch.float64)
    luminance = (2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4)
    assert metrics.parse("ms_ssim")(2 * truth, truth).item() == pytest.approx(luminance**0.1333, rel=1e-6)


def test_vif_is_above_one_only_for_more_contrast_than_the_truths() -> None:
    truth = 0.25 + 0.5 * photo(64)
    images = torch.cat([0.5 + contrast * (truth - 0.5) for contrast in (0.1, 0.5, 0.9, 1.1, 1.5)])
    values = metrics.parse("vif")(images, truth.expand_as(images))
    assert bool((values.diff() > 0).all())
    assert (values > 1).tolist() == [False, False, False, True, True]


def test_gmsd_is_the_deviation_of_scipys_prewitt_gradients() -> None:
    truth, images = photo(32)[:, :1].double(), rand(1, 1, 32, 32, dtype=torch.float64)

    def magnitude(image: Tensor) -> np.ndarray:
        halved = F.avg_pool2d(image, 2)[0, 0].numpy()
        return np.hypot(*(ndimage.prewitt(halved, axis, mode="constant") / 3 for axis in (0, 1)))

    first, second = magnitude(images), magnitude(truth)
    constant = 170 / 255**2
    similarity = (2 * first * second + constant) / (first**2 + second**2 + constant)
    assert metrics.parse("gmsd")(images, truth).item() == pytest.approx(similarity.std(), rel=1e-6)


# Aligned


@given(
    slope=st.one_of(st.floats(1e-6, 1e6), st.floats(-1e6, -1e-6), st.sampled_from([1e4, -1e4, 1.0, -1.0])),
    offset=st.floats(-100, 100),
)
@settings(deadline=None, max_examples=60)
def test_an_affine_image_of_the_truth_aligns_perfectly(slope: float, offset: float) -> None:
    truth = rand(2, 3, 16, 16, dtype=torch.float64)
    images = slope * truth + slope * offset
    assert psnr_aligned(images, truth).tolist() == [100, 100]
    assert ssim_aligned(images, truth).tolist() == pytest.approx([1, 1], abs=1e-9)


@pytest.mark.parametrize("slope", [1e-6, 1e-2, 1e4, -1e4, 1e6, 1e30, -1e-30])
def test_float32_images_of_any_scale_align_to_the_same_value(slope: float) -> None:
    truth = rand(3, 3, 16, 16)
    images = truth + 0.3 * randn(3, 3, 16, 16, seed=1)
    torch.testing.assert_close(align(slope * images, truth), align(images, truth), rtol=0, atol=1e-5)
    torch.testing.assert_close(psnr_aligned(slope * images, truth), psnr_aligned(images, truth), rtol=0, atol=1e-4)


def test_the_fit_is_numpys_least_squares_over_all_channels_and_pixels() -> None:
    images, truth = 5 * randn(4, 3, 12, 12) + 2, rand(4, 3, 12, 12, seed=1)
    images[2] = -20 * truth[2] + images[2] / 10
    for row in range(4):
        slope, offset = np.polyfit(images[row].double().flatten(), truth[row].double().flatten(), 1)
        expected = (slope * images[row].double() + offset).clamp(0, 1)
        torch.testing.assert_close(align(images, truth)[row], expected, rtol=0, atol=1e-10)


def test_the_fit_comes_before_the_clip() -> None:
    truth = rand(2, 3, 16, 16)
    images = 10 * truth - 30  # clamped first, nothing would be left of it
    assert bool((psnr_aligned(images, truth) > 90).all())
    assert bool((psnr(images, truth) < 10).all())
    aligned = align(randn(50, 1, 12, 12, seed=1), torch.bernoulli(rand(50, 1, 12, 12, seed=2)))
    assert aligned.min() >= 0
    assert aligned.max() <= 1


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e6, 1e-6, 1e-38, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_reconstruction_becomes_the_mean_of_the_truth(value: float, dtype: torch.dtype) -> None:
    truth = rand(2, 3, 12, 12, dtype=torch.float64)
    images = torch.full((2, 3, 12, 12), value, dtype=dtype)
    mean = truth.mean(dim=(1, 2, 3), keepdim=True).expand_as(truth)
    torch.testing.assert_close(align(images, truth), mean, rtol=0, atol=1e-12)
    expected = -10 * torch.log10((truth - mean).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(psnr_aligned(images, truth), expected)


def test_alignment_never_lowers_the_psnr_of_an_image_in_range() -> None:
    truth = rand(20, 3, 12, 12)
    images = rand(20, 3, 12, 12, seed=1)
    assert bool((psnr_aligned(images, truth) > psnr(images, truth)).all())


# Labels


def test_label_correct() -> None:
    images = rand(3, 1, 12, 12)
    truth = Truth(images, torch.tensor([4, 0, 7]))
    metric = metrics.parse("label_correct")
    right = metric.score(Reconstruction(images, labels=torch.tensor([4, 1, 7])), truth)
    assert right.tolist() == [1, 0, 1]
    assert bool(metric.score(Reconstruction(images), truth).isnan().all())
    assert metric.score(Reconstruction(images), truth).shape == (3,)
    assert bool(metric(images, images).isnan().all())
    with pytest.raises(ValueError, match=r"labels of shape \[2\]"):
        metric.score(Reconstruction(images, labels=torch.tensor([1, 2])), truth)


def test_metrics_of_the_image_score_the_image_alone() -> None:
    images, truth = rand(3, 3, 12, 12), Truth(rand(3, 3, 12, 12, seed=1), torch.tensor([4, 0, 7]))
    score = metrics.parse("psnr").score(Reconstruction(images, labels=torch.tensor([1, 1, 1])), truth)
    assert torch.equal(score, psnr(images, truth.images))


# The paper's convention


def as_written(image: Tensor) -> np.ndarray:
    """Return the bytes [H, W, 3] in BGR order that the paper's code reads back from its PNG files."""
    with np.errstate(invalid="ignore"):
        rgb = np.asarray(to_pil_image(image).convert("RGB"))
    return rgb[:, :, ::-1]


def test_bytes_wrap_around() -> None:
    values = torch.tensor([-0.5, 1.2, 0.0, 1.0, 0.5, 256 / 255, -1 / 255, -0.001]).view(1, 1, 2, 4)
    assert quantise(values)[0, 0].flatten().tolist() == [129, 50, 0, 255, 127, 0, 255, 0]


def test_bytes_equal_torchvisions_and_torchs_own_cast() -> None:
    for scale in (0.1, 1, 10, 1e3):
        images = scale * randn(2, 3, 40, 40)
        assert torch.equal(quantise(images), images.mul(255).byte())
        for image, ours in zip(images, quantise(images)):
            assert np.array_equal(as_written(image), ours.flip(0).permute(1, 2, 0).numpy())


@given(value=st.floats(-(2.0**100), 2.0**100, width=32))
@settings(deadline=None)
def test_bytes_are_the_integer_part_modulo_256(value: float) -> None:
    product = float(np.float32(value) * np.float32(255))
    assert quantise(torch.full((1, 3, 1, 1), value)).unique().tolist() == [int(product) % 256]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_came_from_bytes_return_to_them(dtype: torch.dtype) -> None:
    levels = torch.arange(256).view(1, 1, 16, 16)
    assert torch.equal(quantise(levels.to(dtype) / 255)[:, :1].long(), levels)


def test_white_against_black_in_the_papers_units() -> None:
    white, black = torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    assert paper_mse(white, black).item() == 255
    assert paper_psnr(white, black).item() == pytest.approx(24.07, abs=0.005)
    assert paper_psnr(white, white).item() == 100


@pytest.mark.parametrize("channels", [1, 3])
def test_the_papers_numbers_are_those_of_its_pipeline(channels: int) -> None:
    truth = rand(6, channels, 32, 32)
    images = truth + torch.linspace(0.02, 2, 6).view(6, 1, 1, 1) * randn(6, channels, 32, 32, seed=1)
    for row in range(6):
        theirs, ours = as_written(images[row]), as_written(truth[row])
        rmse = np.sqrt(np.mean((theirs.astype(float) - ours.astype(float)) ** 2))
        assert paper_mse(images, truth)[row].item() == pytest.approx(rmse)
        assert paper_psnr(images, truth)[row].item() == pytest.approx(10 * np.log10(255.0**2 / rmse))
        expected = skimage.metrics.structural_similarity(theirs, ours, channel_axis=2)
        assert paper_ssim(images, truth)[row].item() == pytest.approx(expected, abs=1e-12)


def test_standard_psnr_follows_from_the_papers_where_nothing_wraps() -> None:
    truth = quantise(rand(8, 3, 16, 16)).double() / 255
    images = quantise(rand(8, 3, 16, 16, seed=1)).double() / 255
    torch.testing.assert_close(psnr(images, truth), 2 * paper_psnr(images, truth) - 48.131, rtol=0, atol=5e-4)
    noise = randn(8, 3, 16, 16, seed=2)  # out of range, where the two conventions part
    assert bool((psnr(noise, truth) - (2 * paper_psnr(noise, truth) - 48.131)).abs().min() > 0.1)


def test_the_papers_metrics_refuse_images_that_are_neither_grey_nor_rgb() -> None:
    for name in [name for name in IMAGE_METRICS if "paper" in name or "lpips" in name]:
        with pytest.raises(ValueError, match="images of 4 channels"):
            metrics.parse(name)(rand(1, 4, 32, 32), rand(1, 4, 32, 32))


# LPIPS on trunks of random weights: everything but the values


@pytest.mark.parametrize("net", NETS)
def test_the_network_is_the_lpips_packages(
    net: Net, trunk_files: dict[Net, Path], random_networks: dict[Net, nn.Module]
) -> None:
    state = torch.random.get_rng_state()
    network = load_network(net, trunk_files[net])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    first, second = 2 * rand(3, 3, 40, 48) - 1, 2 * rand(3, 3, 40, 48, seed=1) - 1
    expected = fed_directly(net, safetensors.torch.load_file(trunk_files[net]))(first, second)
    torch.testing.assert_close(network(first, second), expected)
    assert bool((expected > 1e-3).all())


@pytest.mark.parametrize("net", NETS)
def test_a_file_that_is_no_trunk_is_corrupt(net: Net, trunk_files: dict[Net, Path], tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(trunk_files[net])
    missing = {name: value for name, value in weights.items() if name != "features.0.bias"}
    reshaped = {**weights, "features.0.bias": torch.zeros(7)}
    for unfit in (missing, reshaped):
        file = tmp_path / "unfit.safetensors"
        safetensors.torch.save_file(unfit, file)
        with pytest.raises(CorruptAsset, match=f"run `leakbench assets fetch lpips-{net}`") as caught:
            load_network(net, file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.usefixtures("random_trunks")
def test_lpips_is_fed_clamped_rgb_in_minus_one_to_one(net: Net, random_networks: dict[Net, nn.Module]) -> None:
    images, truth = randn(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1)
    with torch.no_grad():
        expected = random_networks[net](2 * images.clamp(0, 1) - 1, 2 * truth - 1).flatten().double()
    torch.testing.assert_close(lpips(images, truth, net), expected)
    assert not lpips(images.requires_grad_(), truth, net).requires_grad


@pytest.mark.parametrize("net", NETS)
@pytest.mark.usefixtures("random_trunks")
def test_lpips_of_large_images_in_several_pieces_is_that_of_each(
    net: Net, random_networks: dict[Net, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = lpips_module._LARGE  # from here on the channels are last
    monkeypatch.setattr(lpips_module, "_PIXELS", 2 * side**2)
    images, truth = rand(3, 3, side, side), rand(3, 3, side, side, seed=1)
    with torch.no_grad():
        expected = torch.cat([random_networks[net](2 * x[None] - 1, 2 * y[None] - 1) for x, y in zip(images, truth)])
    torch.testing.assert_close(lpips(images, truth, net), expected.flatten().double(), rtol=1e-4, atol=1e-6)


def test_metrics_of_large_images_in_several_pieces_are_those_of_each() -> None:
    images, truth = randn(7, 1, 100, 110), rand(7, 1, 100, 110, seed=1)
    for name in [name for name in IMAGE_METRICS if name not in TRUNK_METRICS]:
        metric = metrics.parse(name)
        each = torch.cat([metric(x[None], y[None]) for x, y in zip(images, truth)])
        torch.testing.assert_close(metric(images, truth), each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.usefixtures("random_trunks")
def test_the_papers_lpips_is_fed_raw_bytes_in_bgr_order(net: Net, random_networks: dict[Net, nn.Module]) -> None:
    images, truth = randn(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1)
    read = [torch.stack([torch.tensor(as_written(x).transpose(2, 0, 1).copy()) for x in y]) for y in (images, truth)]
    with torch.no_grad():
        expected = random_networks[net](read[0].float(), read[1].float()).flatten().double()
    torch.testing.assert_close(paper_lpips(images, truth, net), expected)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.usefixtures("random_trunks")
def test_images_too_small_for_the_trunk_are_enlarged_and_the_column_says_so(net: Net) -> None:
    smallest = TRUNKS[net].smallest
    for name in (f"lpips_{net}", f"paper_lpips_{net}"):
        metric = metrics.parse(name)
        fits, small = rand(2, 1, smallest, smallest), rand(2, 1, smallest - 1, smallest + 9)
        assert bool((metric(fits, 1 - fits) > 0).all())
        assert metric.note((1, smallest, smallest)) == ""
        assert bool((metric(small, 1 - small) > 0).all())
        width = round((smallest + 9) * 32 / (smallest - 1))
        assert f"enlarged bilinearly to 32 x {width}" in metric.note((1, smallest - 1, smallest + 9))
    truth, images = rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1)
    large = [F.interpolate(x, scale_factor=4, mode="bilinear") for x in (images, truth)]
    torch.testing.assert_close(lpips(images, truth, net), lpips(large[0], large[1], net))


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_admissible_image_is_stated_correctly(net: Net, random_networks: dict[Net, nn.Module]) -> None:
    smallest = TRUNKS[net].smallest
    assert bool(random_networks[net](rand(1, 3, smallest, smallest), rand(1, 3, smallest, smallest)).isfinite())
    with pytest.raises(RuntimeError, match="too small"):
        random_networks[net](rand(1, 3, smallest - 1, 64), rand(1, 3, smallest - 1, 64))


@pytest.mark.parametrize("name", TRUNK_METRICS)
def test_without_its_trunk_lpips_is_never_computed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path))
    lpips_module._network.cache_clear()
    net = name.rpartition("_")[2]
    title = {"vgg": "VGG16", "alex": "AlexNet"}[net]
    metric = metrics.parse(name)
    with pytest.raises(MissingAsset) as caught:
        metric.check()
    assert str(caught.value) == (
        f"{name} needs the {title} trunk, which is not in the cache; run `leakbench assets fetch lpips-{net}`"
    )
    with pytest.raises(MissingAsset, match=f"fetch lpips-{net}`"):
        metric(rand(1, 3, 32, 32), rand(1, 3, 32, 32))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TRUNK_METRICS])
def test_other_metrics_need_no_assets(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path))
    metric = metrics.parse(name)
    metric.check()
    assert metric(rand(1, 3, 32, 32), rand(1, 3, 32, 32)).shape == (1,)
    assert list(tmp_path.iterdir()) == []


# LPIPS on the true trunks


def photo(pixels: int = 64) -> Tensor:
    """Return the astronaut that ships with scikit-image, [1, 3, H, W] in [0, 1]."""
    image = torch.tensor(skimage.data.astronaut()[:256, 96:352]).permute(2, 0, 1).float() / 255
    return F.adaptive_avg_pool2d(image, pixels).unsqueeze(0)


@pytest.mark.assets
@pytest.mark.parametrize("name", TRUNK_METRICS)
def test_true_lpips_is_zero_for_equal_images_and_grows_with_noise(name: str) -> None:
    metric = metrics.parse(name)
    metric.check()
    truth = photo()
    assert metric(truth, truth).item() == 0
    noisy = torch.cat([truth + level * randn(1, 3, 64, 64) for level in (0.02, 0.05, 0.1, 0.2)]).clamp(0, 1)
    values = metric(noisy, truth.expand(4, -1, -1, -1))
    assert bool((values.diff() > 0).all()), values


@pytest.mark.assets
def test_dists_is_the_authors_for_a_noisy_photo() -> None:
    """The values are those of the authors' own module, version 0.1, on the same trunk and weights."""
    metric = metrics.parse("dists")
    truth = photo()
    noisy = torch.cat([truth + level * randn(1, 3, 64, 64) for level in (0, 0.02, 0.05, 0.1, 0.2, 0.4)])
    expected = [0, 0.0702, 0.1325, 0.2668, 0.4061, 0.4935]
    assert metric(noisy, truth.expand_as(noisy)).tolist() == pytest.approx(expected, abs=1e-4)
    assert metric(noisy[2:3].clamp(0, 1), truth).item() == pytest.approx(metric(truth, noisy[2:3].clamp(0, 1)).item())


@pytest.mark.parametrize("missing", ["lpips-vgg", "dists"])
def test_dists_names_the_missing_weights(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path))
    if missing == "dists":
        monkeypatch.setattr(perceptual, "trunk_file", lambda trunk, metric: tmp_path)
    with pytest.raises(MissingAsset, match=f"dists needs .*run `leakbench assets fetch {missing}`"):
        metrics.parse("dists").check()


@pytest.mark.assets
@pytest.mark.parametrize("net", NETS)
def test_true_lpips_orders_blurs_of_a_photo(net: Net) -> None:
    truth = photo(128)
    blurred = torch.cat([gaussian_blur(truth, [21, 21], [sigma, sigma]) for sigma in (0.5, 1.0, 2.0, 4.0)])
    values = lpips(blurred, truth.expand(4, -1, -1, -1), net)
    assert bool((values.diff() > 0).all()), values
    # To a trained trunk a blur is far worse than a fade to white of the same MSE; to random weights it is not.
    fade = (mse(blurred[3:], truth) / mse(torch.ones_like(truth), truth)).sqrt().item()
    faded = truth + fade * (1 - truth)
    assert mse(faded, truth).item() == pytest.approx(mse(blurred[3:], truth).item(), rel=1e-4)
    assert lpips(faded, truth, net).item() < values[3].item() / 2


@pytest.mark.assets
def test_true_lpips_is_the_figure_that_torchmetrics_publishes() -> None:
    """An example in earlier torchmetrics: seed 123, VGG16 built, then two batches of noise give 0.3493."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        torchvision.models.vgg16(weights=None, init_weights=False)  # draws what it drew there, before its weights came
        for channels in (64, 128, 256, 512, 512):
            nn.Conv2d(channels, 1, 1, bias=False)
        images, truth = torch.rand(10, 3, 100, 100), torch.rand(10, 3, 100, 100)
    assert lpips(images, truth, "vgg").mean().item() == pytest.approx(0.3493, abs=5e-5)


@pytest.mark.assets
@pytest.mark.parametrize("net", NETS)
def test_true_lpips_equals_the_lpips_package_fed_directly(net: Net) -> None:
    from leakbench import assets

    network = fed_directly(net, safetensors.torch.load_file(assets.path(TRUNKS[net].asset)))
    truth = photo()
    images = truth + 0.3 * randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(images.clamp(0, 1), truth, normalize=True).flatten().double()
        wrong = network(images.clamp(0, 1), truth).flatten().double()
        paper = network(quantise(images).flip(1).float(), quantise(truth).flip(1).float()).flatten().double()
    torch.testing.assert_close(lpips(images, truth, net), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(paper_lpips(images, truth, net), paper, rtol=1e-5, atol=1e-6)
    assert (lpips(images, truth, net) - wrong).abs().item() > 1e-3  # [0, 1] is not the range it expects
    assert (lpips(images, truth, net) - paper).abs().item() > 1e-3
