"""BigGAN-deep of 128, 256 or 512 pixels, through the package ``pytorch-pretrained-biggan`` (extra ``biggan``)."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import assets
from leakbench.errors import BadOption, CorruptAsset, MissingAsset, one_line
from leakbench.generators.base import Card, Generator, TruncatedNormal, register

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"


@register("biggan-deep")
@dataclass(frozen=True)
class BigGANDeep(Generator):
    """BigGAN-deep trained on ImageNet, 1000 classes; weights from a folder, or from its package's own cache.

    Attributes:
        resolution: the side of the images.
        path: a folder with config.json and pytorch_model.bin as published; none takes the cache of
            pytorch-pretrained-biggan. Nothing is downloaded.
        truncation: the latent is N(0, 1) cut off at 2, times this; 1 in GGL.
        classes: for each label of the dataset its ImageNet class (0 to 999), as in 207+281+340;
            ``all`` takes labels as they are.
    """

    reference: ClassVar[str] = "Brock et al. 2019, Large Scale GAN Training, arXiv 1809.11096, section 3.1"
    resolution: Literal[128, 256, 512] = 256
    path: str | None = None
    truncation: Annotated[float, Field(gt=0, le=1)] = 1.0
    classes: str = "all"

    def __post_init__(self) -> None:
        self._classes(1000)

    def card(self) -> Card:
        """Return the description from files and options."""
        config = _config(self._files()[0])
        side = int(config["output_dim"])
        if self.path is None and side != self.resolution:
            raise CorruptAsset(
                f"the weights in the cache have output_dim={side}, not {self.resolution}; fetch them again"
            )
        classes = self._classes(int(config["num_classes"]))
        return Card(
            latent=int(config["z_dim"]),
            image_shape=(3, side, side),
            num_classes=len(classes) or int(config["num_classes"]),
            data="the training split of ImageNet (ILSVRC 2012)",
            licence="Apache-2.0 (code); the published weights' terms are those of TensorFlow Hub",
            checksum=assets.checksum(self._files()[1]),
            law=TruncatedNormal(self.truncation),
        )

    def network(self) -> nn.Module:
        """Return the network with its weights.

        Raises:
            MissingAsset: the package or the weights are not there.
            CorruptAsset: the files are not those of a BigGAN-deep.
        """
        package = _package()
        config_file, weights_file = self._files()
        config = package.BigGANConfig.from_dict(_config(config_file))
        try:
            network = package.BigGAN(config)
            state = torch.load(weights_file, map_location="cpu", weights_only=True)
            missing = network.load_state_dict(state, strict=False).missing_keys
        except Exception as error:
            raise CorruptAsset(
                f"the weights {str(weights_file)!r} are not those of {str(config_file)!r}: "
                f"{type(error).__name__}: {one_line(error)[:200]}; download both files again"
            ) from None
        if missing:
            raise CorruptAsset(f"the weights {str(weights_file)!r} lack {missing[0]!r}; download the file again")
        return _Conditional(network, self._classes(config.num_classes), config.num_classes, self.truncation)

    def _classes(self, count: int) -> list[int]:
        """Return the class of each label, empty for all; raise BadOption if one does not exist."""
        if self.classes == "all":
            return []
        try:
            classes = [int(part) for part in self.classes.split("+")]
        except ValueError:
            raise BadOption(
                f"classes={self.classes!r} is not a list of class indices; write classes=207+281+340"
            ) from None
        for index in classes:
            if not 0 <= index < count:
                raise BadOption(
                    f"the class index {index} is unknown to the generator; give indices from 0 to {count - 1}"
                )
        return classes

    def _files(self) -> tuple[Path, Path]:
        """Return the paths of configuration and weights."""
        if self.path is None:
            model = f"biggan-deep-{self.resolution}"
            return _cached(f"{model}-{CONFIG}"), _cached(f"{model}-{WEIGHTS}")
        folder = Path(self.path).expanduser()
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise BadOption(f"the folder {str(folder)!r} has no {name}; give the folder of a published BigGAN-deep")
        return folder / CONFIG, folder / WEIGHTS


class _Conditional(nn.Module):
    """A BigGAN at one truncation, called with labels in place of class vectors."""

    def __init__(self, network: nn.Module, classes: list[int], count: int, truncation: float) -> None:
        super().__init__()
        self.network = network
        self.count = count
        self.truncation = truncation
        self.classes: Tensor
        self.register_buffer("classes", torch.tensor(classes or list(range(count))))

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Return images [N, 3, H, W] in [-1, 1]."""
        vector = F.one_hot(self.classes[labels], self.count).to(latent.dtype)
        images: Tensor = self.network(latent, vector, self.truncation)
        return images


def _package() -> ModuleType:
    """Return pytorch-pretrained-biggan; raise MissingAsset if it is not installed."""
    try:
        return importlib.import_module("pytorch_pretrained_biggan")
    except ImportError:
        raise MissingAsset(
            "generator 'biggan-deep' needs pytorch-pretrained-biggan; run pip install pytorch-pretrained-biggan"
        ) from None


def _cached(name: str) -> Path:
    """Return a file of the package's own cache, which names files by hashes and keeps each one's address beside it."""
    cache = Path(_package().PYTORCH_PRETRAINED_BIGGAN_CACHE)
    for note in sorted(cache.glob("*.json")):
        file = note.with_suffix("")
        try:
            address = str(json.loads(note.read_text(encoding="utf-8"))["url"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if address.endswith(f"/{name}") and file.is_file():
            return file
    model = name.rsplit("-", 1)[0]
    raise MissingAsset(
        f'{name} is not in the cache {cache}; run python -c "from pytorch_pretrained_biggan import BigGAN; '
        f"BigGAN.from_pretrained('{model}')\", or give a folder: biggan-deep(path=FOLDER)"
    )


def _config(config_file: Path) -> dict[str, Any]:
    """Return the configuration, whose sizes are checked."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if not all(int(config[name]) > 0 for name in ("output_dim", "z_dim", "num_classes")):
            raise ValueError("a size is not positive")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptAsset(
            f"{str(config_file)!r} is not the configuration of a BigGAN ({type(error).__name__}: {error}); download it "
            "again"
        ) from None
    return dict(config)
