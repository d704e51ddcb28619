"""A user's own network as a model of a matrix."""

import copy
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leakbench.core.rng import generator, seeded
from leakbench.errors import Unsupported, one_line
from leakbench.models.base import Model


@dataclass(frozen=True, eq=False)
class OwnModule(Model):
    """A network that the user built: any ``nn.Module`` from images [B, C, H, W] in [0, 1] to logits [B, K].

    Attributes:
        label: its name in reports.
        module: the network; it is attacked as it is, in its mode and with its weights, and never changed.
    """

    name: ClassVar[str] = "module"
    label: str
    module: nn.Module = field(repr=False)
    _behaviours: dict[tuple[int, int, int], str] = field(default_factory=dict, init=False, repr=False)

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return a copy of the module, after checking that it maps a blank image to ``num_classes`` logits."""
        logits = self.logits(torch.full((1, *image_shape), 0.5))
        if logits.shape != (1, num_classes):
            raise Unsupported(
                f"model {self.label!r} returns logits of shape {tuple(logits.shape)} for one image, "
                f"not (1, {num_classes}); give it one output a class"
            )
        return copy.deepcopy(self.module).cpu()

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the network's first such parameter, in which it takes images."""
        return next((tensor.dtype for tensor in self.module.parameters() if tensor.is_floating_point()), torch.float32)

    def logits(self, images: Tensor) -> Tensor:
        """Return the network's output in evaluation mode for images [B, C, H, W]; the network is not changed.

        Raises:
            Unsupported: the network does not take such images, or returns no [B, K] logits.
        """
        probe = copy.deepcopy(self.module).cpu().eval()
        try:
            with torch.no_grad():
                out = probe(images.to(self.dtype))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = one_line(error)
            raise Unsupported(
                f"model {self.label!r} takes no image of shape {tuple(images.shape[1:])}: {reason}"
            ) from error
        if not isinstance(out, Tensor) or out.ndim != 2:
            raise Unsupported(f"model {self.label!r} returns {type(out).__name__}; give logits of shape [B, K]")
        return out

    def settings(self) -> dict[str, Any]:
        """Return the label, and a hash of the architecture, mode and values."""
        return {"name": self.name, "version": self.version, "label": self.label, "module": self._fingerprint}

    def behaviour(self, image_shape: tuple[int, int, int]) -> dict[str, str]:
        """Return a hash of ``forward``'s results, which a list of layers does not determine; once for each shape."""
        if image_shape not in self._behaviours:
            self._behaviours[image_shape] = _behaviour(self.module, image_shape)
        return {"behaviour": self._behaviours[image_shape]}

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.module).encode())
        digest.update(str([module.training for module in self.module.modules()]).encode())
        for name, value in [*self.module.named_parameters(), *self.module.named_buffers()]:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _behaviour(module: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Return a hash of a module's logits and gradient on a fixed image and its label; empty if it has none.

    In float64, and of so few digits that another machine finds the same; in float32 if the module supports no other.
    """
    image = torch.rand((1, *image_shape), generator=generator("behaviour"), dtype=torch.float64)
    for dtype, digits in ((torch.float64, 6), (torch.float32, 3)):
        probe = copy.deepcopy(module).cpu().to(dtype)
        try:
            with seeded("behaviour"):
                logits = probe(image.to(dtype))
                nn.functional.cross_entropy(logits, torch.zeros(1, dtype=torch.int64)).backward()
        except Exception:  # whatever a user's module raises: it is refused, with its reason, when it is built
            continue
        sizes = [0.0 if p.grad is None else float(p.grad.double().norm()) for p in probe.parameters()]
        values = [f"{value:.{digits}g}" for value in (*logits.detach().flatten().tolist(), *sizes)]
        return hashlib.sha256(" ".join(values).encode()).hexdigest()[:16]
    return ""
