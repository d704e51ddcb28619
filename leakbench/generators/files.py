"""The file of a trained DCGAN: its weights, what it was trained on, and two mean images, in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leakbench.core.files import draft
from leakbench.errors import BadOption, CorruptAsset
from leakbench.generators.networks import Decoder

FORMAT = "leakbench-dcgan-1"


@dataclass(frozen=True)
class Trained:
    """What a file says of its decoder.

    Attributes:
        data: the spec of the dataset whose training split it saw, and nothing else.
        licence: the terms of the weights.
        command: the command that made it.
        steps: how many steps of training.
        seed: what every draw of the training came from.
        latent: the size of the latent, which follows N(0, I).
        classes: how many classes it draws.
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
        file: where to; replaced in one step.
        trained: what it is.
        decoder: the network, in evaluation mode.
        seen: [C, H, W], the mean of the images it was trained on, at their own size.
        unseen: [C, H, W], the mean of the other split, which is attacked.
    """
    tensors = {
        f"decoder.{name}": (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in decoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    tensors |= {"mean.seen": seen.float().contiguous(), "mean.unseen": unseen.float().contiguous()}
    # one entry alone: several come in an order of their own each time, and the same weights shall give the same file
    with draft(file) as own:
        save_file(tensors, own, {FORMAT: json.dumps(asdict(trained))})


def read(file: Path) -> tuple[Trained, dict[str, Tensor], dict[str, Tensor]]:
    """Return what a file is, its decoder's state (float32), and its mean images ``seen`` and ``unseen``.

    Raises:
        BadOption: the file does not exist.
        CorruptAsset: it is no file that ``leakbench train generator`` wrote, or is damaged.
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
            shapes = {
                name: value.shape
                for name, value in trained.decoder().state_dict().items()
                if not name.endswith("num_batches_tracked")
            }
        if {name: value.shape for name, value in state.items()} != shapes:
            raise ValueError("its tensors are not those of the network that it describes")
        if not all(bool(torch.isfinite(value).all()) for value in state.values()):
            raise ValueError("it holds values that are not finite")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptAsset(
            f"the weight file {str(file)!r} cannot be used: {' '.join(str(error).split())}; "
            "train it anew with `leakbench train generator`"
        ) from None
    return trained, state, means


def decoder_of(trained: Trained, state: dict[str, Tensor]) -> Decoder:
    """Return the decoder with its weights, in evaluation mode and without gradients."""
    decoder = trained.decoder()
    decoder.load_state_dict(state, strict=False)
    return decoder.eval().requires_grad_(False)
