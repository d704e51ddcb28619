"""LPIPS in the standard convention; without the pretrained trunk it is never computed."""

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import assets
from leakbench.errors import CorruptAsset, MissingAsset
from leakbench.metrics.base import Metric, by_rows, check_pair, register, rgb

Net = Literal["vgg", "alex"]

ENLARGED = 32
"""Pixels; the shorter side of an image that was too small for the trunk."""

_PIXELS = 2**17

_LARGE = 128


@dataclass(frozen=True)
class Trunk:
    """The network whose features LPIPS compares.

    Attributes:
        title: its name in messages.
        asset: its weights among the assets.
        smallest: the narrowest image, in pixels, for which no feature map is empty.
    """

    title: str
    asset: str
    smallest: int


TRUNKS: dict[Net, Trunk] = {
    "vgg": Trunk("VGG16", "lpips-vgg", 16),
    "alex": Trunk("AlexNet", "lpips-alex", 31),
}


def trunk_distance(images: Tensor, truth: Tensor, net: Net) -> Tensor:
    """Return the LPIPS of two batches of values fed as they are, enlarged if they are too small for the trunk.

    Args:
        images: [T, 3, H, W], in the range of the convention.
        truth: [T, 3, H, W], in the same range.
        net: the trunk.

    Returns:
        [T] float64.

    Raises:
        MissingAsset: the trunk is not in the cache.
    """
    network = _network(net, images.device)
    smallest = TRUNKS[net].smallest

    # on a CPU, convolutions of large images are faster with the channels last
    large = images.device.type == "cpu" and min(images.shape[-2:]) >= _LARGE
    layout = torch.channels_last if large else torch.contiguous_format

    def distance(x: Tensor, y: Tensor) -> Tensor:
        x, y = (_enlarge(part.float(), smallest).contiguous(memory_format=layout) for part in (x, y))
        return network(x, y).flatten()

    with torch.no_grad():
        return by_rows(distance, images, truth, _PIXELS).double()


def load_network(net: Net, trunk: Path) -> nn.Module:
    """Return the network of the ``lpips`` package on the CPU, in eval mode, with this trunk's weights.

    Args:
        net: the trunk's architecture.
        trunk: a safetensors file with torchvision's ``features.N.weight`` and ``features.N.bias``.

    Raises:
        CorruptAsset: the file lacks a weight of the trunk, or has one of another shape.
    """
    import lpips as package  # takes seconds

    with warnings.catch_warnings(), torch.device("meta"):  # draws no random weights, which would be replaced anyway
        for message in ("The parameter 'pretrained' is deprecated", "Arguments other than a weight enum"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        network: nn.Module = package.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    linear = Path(package.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(linear, map_location="cpu", weights_only=True)
    state |= {name.replace("lin", "lins.", 1): value for name, value in state.items()}  # the package lists them twice
    state |= {name: value for name, value in network.state_dict().items() if name.startswith("scaling_layer.")}
    features = safetensors.torch.load_file(trunk)
    for name in network.state_dict():
        if name.startswith("net."):
            index, kind = name.split(".")[-2:]
            if f"features.{index}.{kind}" in features:
                state[name] = features[f"features.{index}.{kind}"].float()
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError:
        raise CorruptAsset(
            f"{trunk} does not hold the weights of {TRUNKS[net].title}; "
            f"delete it and run `leakbench assets fetch {TRUNKS[net].asset}`"
        ) from None
    return network.eval().requires_grad_(False)


@functools.cache
def _network(net: Net, device: torch.device) -> nn.Module:
    return load_network(net, trunk_file(TRUNKS[net], "LPIPS")).to(device)


def trunk_file(trunk: Trunk, metric: str) -> Path:
    """Return the file of a trunk; raise MissingAsset, with the command that fetches it, for this metric."""
    try:
        return assets.path(trunk.asset)
    except MissingAsset:
        raise MissingAsset(
            f"{metric} needs the {trunk.title} trunk, which is not in the cache; "
            f"run `leakbench assets fetch {trunk.asset}`"
        ) from None


def _enlarge(images: Tensor, smallest: int) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) >= smallest:
        return images
    return F.interpolate(images, size=_enlarged(height, width), mode="bilinear", align_corners=False)


def _enlarged(height: int, width: int) -> tuple[int, int]:
    shorter = min(height, width)
    return round(height * ENLARGED / shorter), round(width * ENLARGED / shorter)


class TrunkMetric(Metric):
    """A metric that compares the features of a pretrained trunk.

    Attributes:
        net: the trunk.
    """

    net: ClassVar[Net]

    def check(self) -> None:
        """Raise MissingAsset, with the command that fetches it, if the trunk is not in the cache."""
        trunk_file(TRUNKS[self.net], self.name)

    def note(self, image_shape: tuple[int, int, int]) -> str:
        """Return that images (C, H, W) are enlarged, and to what size, or an empty string."""
        _, height, width = image_shape
        trunk = TRUNKS[self.net]
        if min(height, width) >= trunk.smallest:
            return ""
        to_height, to_width = _enlarged(height, width)
        return (
            f"{height} x {width} images are enlarged bilinearly to {to_height} x {to_width}: {trunk.title} admits none "
            f"below {trunk.smallest} pixels"
        )


class LPIPS(TrunkMetric):
    """The learned perceptual distance of Zhang et al. 2018, version 0.1 with its linear layers."""

    convention: ClassVar[str] = (
        "0 or more, lower is closer; RGB in [-1, 1], reconstruction clamped, grey replicated; version 0.1, linear "
        "layers"
    )

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] distances, 0 or more, 0 for equal images; see ``Metric``."""
        check_pair(self, images, truth)
        return trunk_distance(2 * rgb(images.clamp(0, 1)) - 1, 2 * rgb(truth) - 1, self.net)


_REFERENCE = "Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, CVPR"


@register("lpips_vgg")
@dataclass(frozen=True)
class LPIPSVGG(LPIPS):
    """Learned perceptual distance on the features of VGG16."""

    net: ClassVar[Net] = "vgg"
    reference: ClassVar[str] = _REFERENCE


@register("lpips_alex")
@dataclass(frozen=True)
class LPIPSAlex(LPIPS):
    """Learned perceptual distance on the features of AlexNet."""

    net: ClassVar[Net] = "alex"
    reference: ClassVar[str] = _REFERENCE
