"""MSE, PSNR and SSIM in the standard convention: pixels in [0, 1], the reconstruction clamped to that range."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbench.metrics.base import Metric, by_rows, check_pair, register

PSNR_CAP = 100.0
"""dB; the PSNR of equal images, which would be infinite."""

ERROR_PIXELS = 2**16
"""Pixels of the images of which errors are computed at once."""

_SSIM_PIXELS = 2**14

# piq 0.8.0 is called with float64 images in [0, 1]: it asserts that range, and float32, or the TF32 convolutions of a
# GPU, would spoil variances, which are differences of nearly equal numbers. Its psnr adds 1e-8 to the MSE, which puts
# 80 dB in place of 100 and moves 30 dB by 4e-5: the MSE that it reports for equal images is subtracted again. Its ssim
# takes no sample covariance, which is the same as a smaller K2, and averages images of over 384 pixels unless told not
# to; it convolves single channels several times as fast as groups of them.


def windowed_ssim(images: Tensor, truth: Tensor, window: int, sigma: float, data_range: float, k2: float) -> Tensor:
    """Return piq's structural similarity, averaged over the positions of its window and the channels.

    Args:
        images: [T, C, H, W] in [0, data_range].
        truth: [T, C, H, W] in [0, data_range].
        window: pixels, odd; the side of the Gaussian window, which stays inside the image.
        sigma: pixels; the window's standard deviation, infinite for a uniform window.
        data_range: the largest value that a pixel can have.
        k2: the constant K2; K1 is 0.01.

    Returns:
        [T] float64 in [-1, 1]; 1 for equal images.
    """
    import piq  # takes two seconds

    def similarity(*pair: Tensor) -> Tensor:
        x, y = (part.double().flatten(0, 1).unsqueeze(1) for part in pair)
        values: Tensor = piq.ssim(x, y, window, sigma, data_range, "none", downsample=False, k2=k2)
        return values.unflatten(0, (-1, images.shape[1])).mean(1)

    return by_rows(similarity, images, truth, _SSIM_PIXELS)


@register("mse")
@dataclass(frozen=True)
class MSE(Metric):
    """Mean squared error of the pixels."""

    convention: ClassVar[str] = "mean over channels and pixels in [0, 1], reconstruction clamped; 0 to 1"
    reference: ClassVar[str] = "definition"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [0, 1]; see ``Metric``."""
        check_pair(self, images, truth)

        def error(x: Tensor, y: Tensor) -> Tensor:
            return (x.double().clamp(0, 1) - y.double()).square().flatten(1).mean(dim=1)

        return by_rows(error, images, truth, ERROR_PIXELS)


@register("psnr")
@dataclass(frozen=True)
class PSNR(Metric):
    """Peak signal-to-noise ratio."""

    higher_is_better: ClassVar[bool] = True
    convention: ClassVar[str] = (
        f"dB, 10 log10(1/MSE) of pixels in [0, 1], reconstruction clamped; 0 to {PSNR_CAP:g}, capped there"
    )
    reference: ClassVar[str] = "definition"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in dB, 0 to 100; see ``Metric``."""
        import piq  # takes two seconds

        check_pair(self, images, truth)

        def error(x: Tensor, y: Tensor) -> Tensor:
            x, y = x.double().clamp(0, 1), y.double()
            own, least = (10 ** (-piq.psnr(part, y, reduction="none") / 10) for part in (x, y))
            return own - least

        errors = by_rows(error, images, truth, ERROR_PIXELS).clamp(10 ** (-PSNR_CAP / 10), 1)
        return 10 * torch.log10(1 / errors)


@register("ssim")
@dataclass(frozen=True)
class SSIM(Metric):
    """Structural similarity in an 11 x 11 Gaussian window."""

    higher_is_better: ClassVar[bool] = True
    smallest: ClassVar[int] = 11
    convention: ClassVar[str] = (
        "-1 to 1; pixels in [0, 1], reconstruction clamped; Gaussian 11x11 window of sigma 1.5 inside the image, "
        "K1 0.01, K2 0.03, data range 1, population covariance, mean over channels, no downsampling"
    )
    reference: ClassVar[str] = "Wang et al. 2004, Image quality assessment, IEEE TIP 13(4)"

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in [-1, 1], 1 for equal images; see ``Metric``."""
        check_pair(self, images, truth)
        return windowed_ssim(images.clamp(0, 1), truth, self.smallest, sigma=1.5, data_range=1, k2=0.03)
