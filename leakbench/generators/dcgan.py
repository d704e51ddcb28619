"""Conditional DCGANs of 32 x 32 pixels: those that ship with the package, and those that a user trains."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from leakbench.errors import CorruptAsset, Unsupported
from leakbench.generators import files
from leakbench.generators.base import Card, Generator, is_mean, register
from leakbench.generators.networks import SIDE

AUTO = "auto"

SHIPPED: Mapping[str, str] = {
    "mnist": "d59a4cb05b21f423322feeb955d6aaba4a18be21f848d6ed26d320052642b490",
    "cifar10": "d9f1d765cd679ae1eb3df9e59d28d522493c1909d04d14b38aa2ed825802e313",
}
"""Name of the shipped weights -> SHA-256."""


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
        """Return the decoder."""
        trained, state, _, _ = self._read()
        return files.decoder_of(trained, state)

    def settings(self) -> dict[str, Any]:
        """Return name, version, options and the checksum of the weights; for ``auto`` those of all shipped ones."""
        if self.weights != AUTO:
            return super().settings()
        return {"name": self.name, "version": self.version, **self.options(), "checksum": dict(SHIPPED)}

    def _read(self) -> tuple[files.Trained, dict[str, Tensor], dict[str, Tensor], str]:
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
def _read(file: Path, mtime: int) -> tuple[files.Trained, dict[str, Tensor], dict[str, Tensor], str]:
    trained, state, means = files.read(file)
    return trained, state, means, hashlib.sha256(file.read_bytes()).hexdigest()
