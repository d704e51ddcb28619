"""A user's own network as a model of a matrix."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from leakbench.errors import Unsupported
from leakbench.models.base import Model


@dataclass(frozen=True, eq=False)
class OwnModule(Model):
    """A network that the user built: any ``nn.Module`` from images [B, C, H, W] in [0, 1] to logits [B, K].

    Attributes:
        label: what reports call it.
        module: the network; it is attacked as it is, in its mode and with its weights, and never changed.
    """

    name: ClassVar[str] = "module"
    label: str
    module: nn.Module = field(repr=False)

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Return a copy of the module, after checking that it maps one blank image to ``num_classes`` logits."""
        model = copy.deepcopy(self.module).cpu()
        probe = copy.deepcopy(model).eval()
        with torch.no_grad():
            try:
                logits = probe(torch.full((1, *image_shape), 0.5))
            except (RuntimeError, ValueError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise Unsupported(f"model {self.label!r} takes no image of shape {image_shape}: {reason}") from error
        if getattr(logits, "shape", None) != (1, num_classes):
            raise Unsupported(
                f"model {self.label!r} returns {getattr(logits, 'shape', type(logits).__name__)} for one image, "
                f"not logits of shape (1, {num_classes}); give it one output a class"
            )
        return model

    def settings(self) -> dict[str, Any]:
        """Return the label, and a hash of the architecture, mode and values."""
        digest = hashlib.sha256(repr(self.module).encode())
        digest.update(str([module.training for module in self.module.modules()]).encode())
        for name, value in self.module.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {"name": self.name, "version": self.version, "label": self.label, "module": digest.hexdigest()[:16]}
