"""Conditional DCGANs of 32 x 32 pixels: those that ship with the package, and those that a user trains.

The file of one holds its weights, its training data, and two mean images, in safetensors.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench.core.files import draft
from leakbench.errors import BadOption, CorruptAsset, Unsupported, one_line
from leakbench.generators.base import Card, Generator, is_mean, register

FORMAT = "leakbench-dcgan-1"

SIDE = 32
"""The side of the images, in pixels."""

AUTO = "auto"

SHIPPED: Mapping[str, str] = {
    "mnist": "d59a4cb05b21f423322feeb955d6aaba4a18be21f848d6ed26d320052642b490",
    "cifar10": "d9f1d765cd679ae1eb3df9e59d28d522493c1909d04d14b38aa2ed825802e313",
}
"""Name of the shipped weights -> SHA-256."""


class ConditionalNorm(nn.Module):
    """Batch normalisation whose scale and shift are the class's own (Dumoulin et al. 2017, arXiv 1610.07629)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Parameter(torch.ones(classes, channels))
        self.shift = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return [N, C, H, W] normalised, scaled and shifted by the labels [N]."""
        return self.norm(x) * self.scale[labels][:, :, None, None] + self.shift[labels][:, :, None, None]


class Decoder(nn.Module):
    """DCGAN's generator (Radford et al. 2016, arXiv 1511.06434), conditioned through its normalisations.

    Args:
        latent: the size of the latent.
        classes: number of classes.
        channels: 1 or 3.
        width: the channels at 4 x 4 pixels; half as many at 8 x 8, a quarter at 16 x 16.
    """

    def __init__(self, latent: int, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(latent, width * 16, bias=False)
        sizes = [width, width // 2, width // 4]
        self.norms = nn.ModuleList(ConditionalNorm(size, classes) for size in sizes)
        # only the last layer has a bias: a normalisation would remove that of the others
        ups = [
            nn.ConvTranspose2d(before, after, 4, 2, 1, bias=last)
            for before, after, last in zip(sizes, [*sizes[1:], channels], (False, False, True))
        ]
        self.ups = nn.ModuleList(ups)
        for weight in (self.project.weight, *(up.weight for up in ups)):
            nn.init.normal_(weight, 0.0, 0.02)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images [N, C, 32, 32] in [-1, 1] for latents [N, d] and labels [N] int64."""
        x = self.project(latent).view(-1, self.width, 4, 4)
        for norm, up in zip(self.norms, self.ups):
            x = up(F.relu(norm(x, labels)))
        return torch.tanh(x)


@dataclass(frozen=True)
class Trained:
    """The description of the decoder in a file.

    Attributes:
        data: the spec of the dataset on whose training split it was trained.
        licence: the terms of the weights.
        command: the command that made it.
        steps: number of training steps.
        seed: of every draw of the training.
        latent: the size of the latent, which follows N(0, I).
        classes: number of classes.
        channels: 1 or 3.
        width: the channels at 4 x 4 pixels.
    """

    data: str
    licence: str
    command: str
    steps: int
    seed: int
    latent: int
    classes: int
    channels: int
    width: int

    def decoder(self) -> Decoder:
        """Return the network, its weights still to be filled in."""
        return Decoder(self.latent, self.classes, self.channels, self.width)


def write(file: Path, trained: Trained, decoder: Decoder, seen: Tensor, unseen: Tensor) -> None:
    """Write a decoder in half precision.

    Args:
        file: replaced in one step.
        trained: its description.
        decoder: the network, in evaluation mode.
        seen: [C, H, W], the mean of the images it was trained on, at their own size.
        unseen: [C, H, W], the mean of the other split, which is attacked.
    """
    state = _stored(decoder).items()
    tensors = {
        f"decoder.{name}": (value.half() if value.is_floating_point() else value).contiguous() for name, value in state
    }
    tensors |= {"mean.seen": seen.float().contiguous(), "mean.unseen": unseen.float().contiguous()}
    # one entry: several would come in another order each time, and the same weights must give the same file
    with draft(file) as own:
        save_file(tensors, own, {FORMAT: json.dumps(asdict(trained))})


def read(file: Path) -> tuple[Trained, dict[str, Tensor], dict[str, Tensor]]:
    """Return a file's description, its decoder's state (float32), and its mean images ``seen`` and ``unseen``.

    Raises:
        BadOption: the file does not exist.
        CorruptAsset: ``leakbench train generator`` did not write the file, or it is damaged.
    """
    if not file.is_file():
        raise BadOption(
            f"the weight file {str(file)!r} does not exist; give a file written by `leakbench train generator`"
        )
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            if FORMAT not in metadata:
                raise ValueError(f"it is not of the format {FORMAT!r}")
            trained = Trained(**json.loads(metadata[FORMAT]))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        state = {
            name.removeprefix("decoder."): value.float()
            for name, value in tensors.items()
            if name.startswith("decoder.")
        }
        means = {name: tensors[f"mean.{name}"].float() for name in ("seen", "unseen")}
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in _stored(trained.decoder()).items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError("its tensors do not belong to the network that it describes")
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise ValueError("it holds values that are not finite")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptAsset(
            f"the weight file {str(file)!r} cannot be used: {one_line(error)}; "
            "train it again with `leakbench train generator`"
        ) from None
    return trained, state, means


def _stored(decoder: Decoder) -> dict[str, Tensor]:
    """Return the tensors of a decoder that a file holds."""
    state = decoder.state_dict()
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@register("dcgan")
@dataclass(frozen=True)
class DCGAN(Generator):
    """Class-conditional DCGAN, 32 x 32; weights for mnist and cifar10 ship with the package, train others yourself.

    Attributes:
        weights: ``mnist`` or ``cifar10``, which ship; a file that ``leakbench train generator`` wrote; or ``auto``, the
            shipped weights whose training images have the public mean image of the attacked ones.
    """

    reference: ClassVar[str] = "Radford et al. 2016, DCGAN, arXiv 1511.06434; Miyato and Koyama 2018, arXiv 1802.05637"
    weights: str = AUTO

    def choose(self, image_shape: tuple[int, int, int], num_classes: int, mean_image: Tensor) -> Generator:
        """Return this generator, or for ``auto`` the shipped one of the images that are attacked."""
        if self.weights != AUTO:
            return self
        for name in SHIPPED:
            candidate = replace(self, weights=name)
            card = candidate.card()
            # the other split of the same data: refused later, with the reason
            if any(mean is not None and is_mean(mean, mean_image) for mean in (card.seen, card.unseen)):
                return candidate
        raise Unsupported(
            f"no generator that ships with leakbench was trained on images like these (there are {', '.join(SHIPPED)})"
            "; train one with `leakbench train generator`, or name one: generator=dcgan:mnist"
        )

    def card(self) -> Card:
        """Return the description in the weight file."""
        trained, _, means, checksum = self._read()
        return Card(
            latent=trained.latent,
            image_shape=(trained.channels, SIDE, SIDE),
            num_classes=trained.classes,
            data=trained.data,
            licence=trained.licence,
            checksum=checksum,
            seen=means["seen"],
            unseen=means["unseen"],
        )

    def network(self) -> nn.Module:
        """Return the decoder with its weights, in evaluation mode and without gradients."""
        trained, state, _, _ = self._read()
        decoder = trained.decoder()
        decoder.load_state_dict(state, strict=False)
        return decoder.eval().requires_grad_(False)

    def settings(self) -> dict[str, Any]:
        """Return name, version, options and the checksum of the weights; for ``auto`` those of all shipped ones."""
        if self.weights != AUTO:
            return super().settings()
        return {"name": self.name, "version": self.version, **self.options(), "checksum": dict(SHIPPED)}

    def _read(self) -> tuple[Trained, dict[str, Tensor], dict[str, Tensor], str]:
        name = next(iter(SHIPPED)) if self.weights == AUTO else self.weights
        if name not in SHIPPED:
            file = Path(name).expanduser()
            return _read(file, file.stat().st_mtime_ns if file.is_file() else 0)
        folder = resources.files("leakbench") / "generators" / "weights"
        with resources.as_file(folder / f"{name}.safetensors") as file:
            found = _read(file, 0)
        if found[3] != SHIPPED[name]:
            raise CorruptAsset(f"the shipped generator {str(file)!r} is damaged; reinstall leakbench")
        return found


@functools.lru_cache(maxsize=8)
def _read(file: Path, mtime: int) -> tuple[Trained, dict[str, Tensor], dict[str, Tensor], str]:
    trained, state, means = read(file)
    return trained, state, means, hashlib.sha256(file.read_bytes()).hexdigest()
