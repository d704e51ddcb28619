"""Further full-reference measures of piq, in the standard convention; a run has those that it names (``--metric``).

piq computes each in float64, with the constants of its paper.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn

from leakbench import assets
from leakbench.errors import MissingAsset
from leakbench.metrics.base import Metric, by_rows, check_pair, register, rgb
from leakbench.metrics.lpips import TRUNKS, trunk_file

_CHUNK_PIXELS = 2**14
_PIXELS = "pixels in [0, 1], reconstruction clamped"


class PiqMetric(Metric):
    """A measure that piq computes, which no run has by default.

    Attributes:
        function: piq's name for it.
    """

    default: ClassVar[bool] = False
    function: ClassVar[str]

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values in the range of ``convention``; see ``Metric``. C is 1 or 3."""
        check_pair(self, images, truth)
        return by_rows(self.measure, rgb(images.double().clamp(0, 1)), rgb(truth.double()), _CHUNK_PIXELS)

    def measure(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] values of reconstructions and truth, both [T, 3, H, W] float64 in [0, 1]; grey is replicated."""
        import piq  # takes two seconds

        values: Tensor = getattr(piq, self.function)(images, truth, reduction="none")
        return values


@register("ms_ssim")
@dataclass(frozen=True)
class MultiScaleSSIM(PiqMetric):
    """Structural similarity on five scales; only with --metric ms_ssim."""

    higher_is_better: ClassVar[bool] = True
    smallest: ClassVar[int] = 161
    convention: ClassVar[str] = (
        f"0 to 1; {_PIXELS}; five scales, each half the size of the one before, weighted 0.0448, 0.2856, 0.3001, "
        "0.2363, 0.1333; window and constants of ssim; negative factors count as 0"
    )
    reference: ClassVar[str] = "Wang et al. 2003, Multi-scale structural similarity for image quality assessment"
    function: ClassVar[str] = "multi_scale_ssim"


@register("vif")
@dataclass(frozen=True)
class VIF(PiqMetric):
    """Visual information fidelity in the pixel domain; only with --metric vif."""

    higher_is_better: ClassVar[bool] = True
    smallest: ClassVar[int] = 41
    convention: ClassVar[str] = (
        f"0 or more, 1 for equal images, above 1 for more contrast than the truth's; luminance of {_PIXELS}, scaled to "
        "255; four scales, noise variance 2; always 1 for a truth of one colour"
    )
    reference: ClassVar[str] = "Sheikh and Bovik 2006, Image information and visual quality, IEEE TIP 15(2)"
    function: ClassVar[str] = "vif_p"


@register("gmsd")
@dataclass(frozen=True)
class GMSD(PiqMetric):
    """Gradient magnitude similarity deviation; only with --metric gmsd."""

    smallest: ClassVar[int] = 8
    convention: ClassVar[str] = (
        f"0 or more, lower is closer; luminance of {_PIXELS}, halved in size; Prewitt filters, constant 170/255^2"
    )
    reference: ClassVar[str] = "Xue et al. 2014, Gradient magnitude similarity deviation, IEEE TIP 23(2)"
    function: ClassVar[str] = "gmsd"


@register("fsim")
@dataclass(frozen=True)
class FSIM(PiqMetric):
    """Feature similarity, with the chromatic components of colour images; only with --metric fsim."""

    higher_is_better: ClassVar[bool] = True
    smallest: ClassVar[int] = 8
    convention: ClassVar[str] = (
        f"0 to 1; FSIMc; {_PIXELS}, scaled to 255; phase congruency on 4 scales and 4 orientations, shortest wave 6 "
        "pixels; images above 384 pixels are averaged down to about 256"
    )
    reference: ClassVar[str] = "Zhang et al. 2011, FSIM: A feature similarity index, IEEE TIP 20(8)"
    function: ClassVar[str] = "fsim"


@functools.cache
def _network(device: torch.device) -> nn.Module:
    """Return piq's DISTS with the weights of the cache: piq 0.8.0 downloads its own, and takes no others."""
    import piq
    import torchvision

    with torch.device("meta"):
        features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    trunk = safetensors.torch.load_file(trunk_file(TRUNKS["vgg"], DISTS.name))
    features.load_state_dict({name.removeprefix("features."): v for name, v in trunk.items()}, assign=True)
    own = {name: value.double() for name, value in safetensors.torch.load_file(_weights()).items()}
    total = own["alpha"].sum() + own["beta"].sum()
    weights = [part for name in ("alpha", "beta") for part in (own[name] / total).split(_CHANNELS, dim=1)]
    network: nn.Module = piq.DISTS.__new__(piq.DISTS)
    piq.ContentLoss.__init__(
        network, features, _LAYERS, weights, True, reduction="none", allow_layers_weights_mismatch=True
    )
    return network.double().to(device)


_LAYERS = ("3", "8", "15", "22", "29")
_CHANNELS = [3, 64, 128, 256, 512, 512]


def _weights() -> Path:
    try:
        return assets.path("dists")
    except MissingAsset:
        raise MissingAsset(
            f"{DISTS.name} needs weights that are not in the cache; run `leakbench assets fetch dists`"
        ) from None


@register("dists")
@dataclass(frozen=True)
class DISTS(PiqMetric):
    """Deep image structure and texture similarity on the features of VGG16; only with --metric dists."""

    smallest: ClassVar[int] = 16
    convention: ClassVar[str] = (
        f"0 to 1, lower is closer; {_PIXELS}, grey replicated, normalised as for ImageNet; images above 256 pixels are "
        "scaled down to 256"
    )
    reference: ClassVar[str] = "Ding et al. 2020, Image quality assessment: Unifying structure and texture similarity"

    def check(self) -> None:
        """Raise MissingAsset, with the command that fetches it, if the trunk or the weights are not in the cache."""
        trunk_file(TRUNKS["vgg"], self.name)
        _weights()

    def measure(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] distances, 0 or more; 0 for equal images."""
        return _network(images.device)(images, truth)
